"""save_pretrained and from_pretrained, what they refuse, and the model of release 0.1, which every later one has to read."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FIELDS, close, draw, tiny

from sage_ext.models import SAGE

RELEASE = Path(__file__).parent / "sage-0.1"


def same_bits(a, b, *inputs):
    with torch.no_grad():
        for x, y in zip(a(*inputs)[:7], b(*inputs)[:7]):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "uniform"},
        {"fusion": "concat"},
        {"causal": False},
        {"quality_dims": {"visual": 3}},
        {"memory": []},
    ],
    ids=str,
)
def test_a_saved_model_is_the_model(tmp_path, options):
    model = tiny(1, **options)
    model.save_pretrained(tmp_path / "model")
    loaded = SAGE.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == json.loads(json.dumps(model.config))
    same_bits(model, loaded, *draw(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(tmp_path, dtype):
    model = tiny(1).to(dtype)
    loaded = SAGE.from_pretrained(model.save_pretrained(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    features, present = draw(2)
    same_bits(model, loaded, {name: x.to(dtype) for name, x in features.items()}, present)


def test_trust_is_kept_with_its_pace(tmp_path):
    model = tiny(1)
    model.set_trust({"audio": 0.2}, pace=7.0, dwell=90.0)
    model.save_pretrained(tmp_path)
    loaded = SAGE.from_pretrained(tmp_path)
    assert (loaded.foreign.prior, loaded.foreign.pace, loaded.foreign.dwell) == ((0.2, 0.0), 7.0, 90.0)
    same_bits(model, loaded, *draw(2))


def test_the_card_says_what_goes_in_and_its_code_runs(tmp_path, monkeypatch):
    model = tiny(1)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| audio | 5 |" in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    same_bits(model, space["model"], *draw(2))
    (tmp_path / "README.md").write_text("mine")
    tiny(2).save_pretrained(tmp_path)  # replaces the model, not the words
    assert (tmp_path / "README.md").read_text() == "mine"
    same_bits(tiny(2), SAGE.from_pretrained(tmp_path), *draw(2))


def test_whatever_is_damaged_is_refused(tmp_path):
    """Every 97th byte of either file, flipped; both cut short."""
    tiny(1).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        path = tmp_path / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 97):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            try:
                loaded = SAGE.from_pretrained(tmp_path)
            except ValueError as error:
                assert name in str(error) or "config.json" in str(error)
            else:  # white space, or the library's name
                assert name == "config.json"
                same_bits(tiny(1), loaded, *draw(2))
        for size in (0, 7, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            if name == "config.json" and size == len(whole) - 1:
                continue  # the last line's end
            with pytest.raises(ValueError, match=name):
                SAGE.from_pretrained(tmp_path)
        path.write_bytes(whole)
    SAGE.from_pretrained(tmp_path)


def test_another_models_weights_are_refused(tmp_path):
    tiny(1).save_pretrained(tmp_path / "a")
    tiny(2).save_pretrained(tmp_path / "b")
    (tmp_path / "a/model.safetensors").write_bytes((tmp_path / "b/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights of the digest in config\.json"):
        SAGE.from_pretrained(tmp_path / "a")
    about = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(ValueError, match=r"config\.json: expected format 1, .* got 2"):
        SAGE.from_pretrained(tmp_path / "b")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder of SAGE\.save_pretrained .*config\.json"):
        SAGE.from_pretrained(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------------- for ever
def test_the_model_of_release_0_1_answers_as_it_did():
    kept = load_file(RELEASE / "answers.safetensors")
    model = SAGE.from_pretrained(RELEASE)
    plain = SAGE.from_config(model.config)
    plain.load_state_dict(load_file(RELEASE / "model.safetensors"))
    for m in (model, plain.eval()):
        with torch.no_grad():
            out = m({"audio": kept["audio"], "visual": kept["visual"]}, kept["present"])
        for field in FIELDS:
            torch.testing.assert_close(getattr(out, field), kept[field], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------- copies and pickles
def test_deepcopy_and_pickle_give_the_model(tmp_path):
    model = tiny(3)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        same_bits(model, other, *draw(4))
        with torch.no_grad():
            other.head[0].weight.add_(1.0)  # nothing is shared
    close(model(*draw(4)), tiny(3)(*draw(4)), tol=0)


def test_weights_load_with_weights_only(tmp_path):
    torch.save(tiny(3).state_dict(), tmp_path / "weights.pt")
    other = tiny(4)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    same_bits(tiny(3), other, *draw(4))
