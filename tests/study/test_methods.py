"""The methods: each is a configuration that builds and predicts, each ablation changes one thing, peers come by name."""

import pytest
import torch

from sage_ext.models import FUSIONS, PeerFusion
from sage_ext.study.methods import (
    VARIANTS,
    default_methods,
    expanded,
    find,
    half,
    methods,
    quick_methods,
    single_methods,
    title,
)
from sage_ext.training.trainer import TrainConfig, build_model

SIZES = {"audio": 4, "visual": 6}


@pytest.mark.parametrize("name", methods())
def test_methods_are_configurations(name):
    method = methods()[name]
    assert method.name == name
    assert method.title
    config = TrainConfig("somewhere", window=0.8, hop=16 / 30, dim=8, blocks=2, **method.overrides)
    assert TrainConfig.from_json(config.to_json()) == config
    net = build_model(config, SIZES).eval()
    features = {m: torch.randn(2, 24, dim) for m, dim in SIZES.items()}
    present = torch.rand(2, 24, 2) > 0.2
    assert net(features, present).prediction.isfinite().all()


def test_methods_are_the_studys():
    ablations = {f"sage-{name}" for name in ("one-stage", "no-calibration", "undetached", "no-filter", "no-mask",
                                             "no-norm", "no-memory", "no-stuck", "no-joint")}  # fmt: skip
    assert set(methods()) == {"sage", "uniform", "can-plus", "sage-told", *FUSIONS, *ablations}
    base = build_model(TrainConfig("x", dim=8), SIZES).config
    for name in ablations - {"sage-no-calibration"}:
        config = build_model(TrainConfig("x", dim=8, **VARIANTS[name].overrides), SIZES).config
        # What is missing is not told where presence is hidden: not by being stuck either.
        assert sum(config[key] != base[key] for key in base) == (2 if name == "sage-no-mask" else 1), name
    plus = build_model(TrainConfig("x", dim=8, **VARIANTS["can-plus"].overrides), SIZES).config
    assert plus == {**base, "fusion": "can", "joint": False}
    assert VARIANTS["sage-no-calibration"].overrides == {
        "reliability_weight": 0.0,
        "fusion_options": {"detach_weights": False},  # else nothing would teach the weights
    }
    assert VARIANTS["sage"].overrides == {}


def test_those_there_are_for_some_modalities():
    assert {"sage", "concat", "uniform", "gmu", "audio-only"} <= set(default_methods(["audio", "visual"]))
    assert "gmu" not in default_methods(["audio", "visual", "text"])
    assert quick_methods(["text", "audio"]) == ("sage", "concat", "uniform", "text-only", "audio-only")
    assert find("audio-only").overrides == {"modalities": ("audio",), "quality": False}
    assert [title(name) for name in ("audio-only", "sage", "oracle", "sage+q", "visual-only+q")] == [
        "audio only", "SAGE", "oracle (true noise known, both directions)", "SAGE, with quality", "visual only, with quality",
    ]  # fmt: skip


def test_both_halves_where_the_data_have_quality():
    two = ["audio", "visual"]
    plain, both = default_methods(two), default_methods(two, quality=True)
    assert not any(half(name) for name in plain)
    assert both == (*plain, *(f"{name}+q" for name in plain))
    assert set(default_methods(two, truth=True)) - set(plain) == {"sage-told"}
    assert set(default_methods(two, quality=True, truth=True)) - set(both) == {"sage-told"}
    for name in both:
        assert find(name).name == name
        assert find(name).overrides["quality"] is name.endswith("+q")
        without = find(name.removesuffix("+q")).overrides
        assert {**find(name).overrides, "quality": False} == without
    assert find("sage-told").overrides == {"told": True, "quality": True}
    assert len({title(name) for name in both}) == len(both)


def test_names_are_expanded_as_asked():
    names = ("sage", "gmu+q", "sage-told", *single_methods(["audio"]))
    assert expanded(names, None, False) == names
    assert expanded(names, "without", True) == names
    assert expanded(names, "with", True) == ("sage+q", "gmu+q", "sage-told", "audio-only+q")
    assert expanded(names, None, True) == expanded(names, "both", True) == (*names, "sage+q", "audio-only+q")
    for wanted, quality in (("both", False), ("with", False), ("half", True)):
        with pytest.raises(ValueError, match=f"quality: expected .*without.*, got {wanted}"):
            expanded(names, wanted, quality)


def test_a_fusion_is_a_method_once_it_is_registered(monkeypatch):
    class Mine(PeerFusion):
        title, note = "my sum", "a note"

    monkeypatch.setitem(FUSIONS, "mine", Mine)
    method = methods()["mine"]
    assert (method.title, method.overrides, method.note) == ("my sum", {"fusion": "mine"}, "a note")
    assert "mine" in default_methods(["audio", "visual"])
    monkeypatch.setitem(FUSIONS, "sage-no-norm", Mine)
    with pytest.raises(ValueError, match=r"name: expected .* got sage-no-norm"):
        methods()
