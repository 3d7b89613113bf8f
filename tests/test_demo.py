"""The demonstration: the whole way on a data set of seconds, its streamed clip, and what it refuses."""

import json
import re

import numpy as np
import pytest
import torch

from sage_ext import demo as module
from sage_ext.data.synthetic import TruthClips, write_dataset
from sage_ext.data.targets import VALENCE_AROUSAL
from sage_ext.demo import demo, stream_clip
from sage_ext.training.runs import Run
from sage_ext.training.trainer import RunError, TrainConfig, build_model


def test_the_streamed_clip_is_what_the_run_predicts(tmp_path):
    root, sizes = tmp_path / "data", {"audio": 12, "visual": 16}
    write_dataset(root, seed=3, train=0, validation=0, test=1, frames=(60, 90), modalities=sizes)
    model = build_model(TrainConfig(str(root), dim=8, stages=3, blocks=2, threads=1), sizes).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():  # away from the start, where all stages are as likely
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    run = Run(root, model, list(sizes), VALENCE_AROUSAL, 30.0, {}, str(root), 300, 200, 0, 0, None, {}, False, "cpu")
    (clip,) = TruthClips(root)
    table = stream_clip(run, clip, lines=3)
    said = run.predict(clip)
    assert [row[0] for row in table.rows] == [str(t) for t in range(clip.num_frames - 2, clip.num_frames + 1)]
    np.testing.assert_allclose([row[1:3] for row in table.rows], said.prediction[-3:], atol=1e-5)
    np.testing.assert_allclose([row[3:5] for row in table.rows], said.weights[-3:], atol=1e-5)
    assert [row[5][0] for row in table.rows] == [str(s + 1) for s in said.stage[-3:].argmax(1)]
    assert re.search(rf"{clip.num_frames} frames: latency p50 .* p99 ", table.note)


@pytest.mark.slow
def test_the_whole_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "DATA", {"train": 4, "validation": 2, "test": 2, "frames": (60, 90)})
    monkeypatch.setattr(module, "MODEL", {**module.MODEL, "dim": 8, "max_steps": 3})
    out = tmp_path / "demo"
    tables = demo(out, seed=2)
    assert [row[0] for row in tables[1].rows] == [
        "SAGE", "uniform weights", "audio alone", "visual alone", "oracle (true noise known)",
    ]  # fmt: skip
    assert all(-1 <= p <= 1 for row in tables[1].rows for p in row[1:])
    stored = json.loads((out / "result.json").read_text())
    assert [row["P"] for row in stored[tables[1].title]] == [row[3] for row in tables[1].rows]
    assert len(list(out.glob("submissions/*.txt"))) == 4
    assert (out / "report" / "report.html").stat().st_size > 100_000
    assert "trained and calibrated SAGE, uniform weights, audio alone, visual alone" in capsys.readouterr().err
    with pytest.raises(RunError, match="--overwrite"):
        demo(out)


def test_a_training_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DATA", {"train": 4, "validation": 2, "test": 2, "frames": (60, 90)})
    monkeypatch.setattr(module, "MODEL", {**module.MODEL, "dim": -1})
    with pytest.raises(RunError, match=r"training of (SAGE|uniform weights|audio alone|visual alone) failed: .*dim"):
        demo(tmp_path / "demo")
