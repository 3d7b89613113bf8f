"""The methods: each is a configuration that builds and predicts, each ablation changes one thing, peers come by name."""

import pytest
import torch

from sage_ext.models import FUSIONS, PeerFusion
from sage_ext.study.methods import VARIANTS, default_methods, find, methods, quick_methods, title
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
                                             "no-norm", "no-memory", "no-stuck")}  # fmt: skip
    assert set(methods()) == {"sage", "uniform", "can-plus", *FUSIONS, *ablations}
    base = build_model(TrainConfig("x", dim=8), SIZES).config
    for name in ablations - {"sage-no-calibration"}:
        config = build_model(TrainConfig("x", dim=8, **VARIANTS[name].overrides), SIZES).config
        # What is missing is not told where presence is hidden: not by being stuck either.
        assert sum(config[key] != base[key] for key in base) == (2 if name == "sage-no-mask" else 1), name
    plus = build_model(TrainConfig("x", dim=8, **VARIANTS["can-plus"].overrides), SIZES).config
    assert plus == {**base, "fusion": "can"}
    assert VARIANTS["sage-no-calibration"].overrides == {"reliability_weight": 0.0}
    assert VARIANTS["sage"].overrides == {}


def test_those_there_are_for_some_modalities():
    assert {"sage", "concat", "uniform", "gmu", "audio-only"} <= set(default_methods(["audio", "visual"]))
    assert "gmu" not in default_methods(["audio", "visual", "text"])
    assert quick_methods(["text", "audio"]) == ("sage", "concat", "uniform", "text-only", "audio-only")
    assert find("audio-only").overrides == {"modalities": ("audio",)}
    assert [title(name) for name in ("audio-only", "sage", "oracle")] == [
        "audio only", "SAGE", "oracle (true noise known)",
    ]  # fmt: skip


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
