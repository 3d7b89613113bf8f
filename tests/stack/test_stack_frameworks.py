"""Other people's training loops: the recipes of docs/frameworks.md run, and what they report and save is right."""

import os
import re
from pathlib import Path

import pytest
import torch

from sage_ext import functional

pytestmark = pytest.mark.slow  # the frameworks take seconds to import
PAGE = Path(__file__).parents[2] / "docs/frameworks.md"


def recipe(heading, folder, monkeypatch):
    """What the page's model and the block below `heading` leave behind, run in `folder`."""
    text = PAGE.read_text()
    blocks = [
        re.search(r"```python\n(.*?)```", part, re.DOTALL)[1] for part in (text, text.split(f"## {heading}\n")[1])
    ]
    monkeypatch.chdir(folder)
    space = {"__name__": "recipe"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)
    return space


def answers(model, space):
    """Predictions of the whole validation set, a recording at a time."""
    model.eval()
    with torch.no_grad():
        return [model(**space["collate"]([item]))["logits"][0] for item in space["validation"]]


def offline(found, space):
    labels = torch.cat([item["labels"] for item in space["validation"]])
    return functional.ccc(torch.cat(found).double(), labels.double(), labels.isfinite().all(-1))


def batch_losses(model, space):
    model.eval()
    with torch.no_grad():
        return float(model(**space["collate"](space["training"]))["loss"])


def learnt(model, space):
    torch.manual_seed(0)
    return batch_losses(model, space) < batch_losses(space["Estimator"](), space) - 0.05


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning")
    space = recipe("Lightning", tmp_path, monkeypatch)
    lit, trainer, again = space["lit"], space["trainer"], space["again"]
    assert learnt(lit.model, space)
    found = answers(lit.model, space)
    logged = trainer.callback_metrics["ccc"]
    whole = offline(found, space).mean()
    torch.testing.assert_close(logged.double(), whole, atol=1e-6, rtol=0)
    parts = [
        functional.ccc(torch.cat(found[a:b]).double(), y.double(), y.isfinite().all(-1)).mean()
        for a, b in ((0, 4), (4, 6))
        for y in [torch.cat([item["labels"] for item in space["validation"][a:b]])]
    ]
    assert abs(torch.stack(parts).mean() - whole) > 1e-4  # the mean over batches is another number
    assert again.hparams.lr == 1e-2
    same(answers(again.model, space), found)
    # The weights in bfloat16: the metric stays float64, and its value is that of the predictions.
    import pytorch_lightning as pl

    half = pl.Trainer(
        precision="bf16-true", accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    [values] = half.validate(lit, space["val_loader"], verbose=False)
    assert lit.score.moments.dtype == torch.float64
    assert abs(values["ccc"] - float(whole)) < 0.02


def test_accelerate(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    space = recipe("accelerate", tmp_path, monkeypatch)
    accelerator, model = space["accelerator"], space["model"]
    assert learnt(model, space)
    found = answers(model, space)
    # bfloat16 matrices of padded batches round otherwise than those of single recordings.
    torch.testing.assert_close(space["score"].compute(), offline(found, space), atol=5e-3, rtol=0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not torch.equal(answers(model, space)[0], found[0])
    accelerator.load_state("state")
    same(answers(model, space), found)


def test_hugging_face_trainer(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    space = recipe("Hugging Face Trainer", tmp_path, monkeypatch)
    trainer = space["trainer"]
    assert trainer.state.global_step == 6
    assert learnt(trainer.model, space)
    found = answers(trainer.model, space)
    metrics = trainer.evaluate()
    got = torch.tensor([metrics["eval_ccc_valence"], metrics["eval_ccc_arousal"]], dtype=torch.float64)
    torch.testing.assert_close(got, offline(found, space), atol=1e-6, rtol=0)
    from safetensors.torch import load_file

    other = space["Estimator"]()
    other.load_state_dict(load_file("hf/model/model.safetensors"))
    same(answers(other, space), found)
