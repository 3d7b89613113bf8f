"""Scores against numpy over concatenated frames; whole-video prediction against the model called by hand."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch

from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.windows import clip_tensors
from sage_ext.models.sage import SAGE
from sage_ext.training.evaluate import (
    ClipPrediction,
    alike,
    evaluate,
    mean_filter,
    predict_clip,
    predict_clips,
    score,
)
from sage_ext.training.trainer import TrainConfig, build_model


def numpy_ccc(pred, target):
    """Lin 1989, population moments, float64, one column."""
    p, t = pred.astype(np.float64), target.astype(np.float64)
    cov = ((p - p.mean()) * (t - t.mean())).mean()
    return 2 * cov / (p.var() + t.var() + (p.mean() - t.mean()) ** 2)


def make_model(causal=True, seed=0, fusion="reliability"):
    torch.manual_seed(seed)
    model = SAGE({"audio": 12, "visual": 16}, dim=8, stages=3, blocks=2, causal=causal, fusion=fusion)
    for p in model.parameters():  # away from the symmetric start
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def test_score_is_over_the_concatenated_valid_frames(data):
    clips = AffWild2(data, "validation")
    rng = np.random.default_rng(0)
    said = {}
    for i, clip in enumerate(clips):  # each video with its own offset: the mean over videos would be another number
        labels = np.where(clip.valid[:, None], clip.labels, np.nan)
        noise = 0.2 * rng.standard_normal(labels.shape)
        said[clip.name] = np.where(clip.valid[:, None], 0.6 * labels + noise + 0.2 * i, 1e6).astype(np.float32)
    valid = [clip.valid for clip in clips]
    assert not all(v.all() for v in valid)  # the fixture has -5 spans
    p = np.concatenate([said[clip.name][v] for clip, v in zip(clips, valid)])
    t = np.concatenate([clip.labels[v] for clip, v in zip(clips, valid)])
    got = score(said, clips)
    want = [numpy_ccc(p[:, c], t[:, c]) for c in range(2)]
    assert got["CCC_V"] == pytest.approx(want[0], abs=1e-12)
    assert got["CCC_A"] == pytest.approx(want[1], abs=1e-12)
    assert got["P"] == pytest.approx(sum(want) / 2, abs=1e-12)
    per_video = np.mean(
        [[numpy_ccc(said[c.name][v][:, k], c.labels[v][:, k]) for k in range(2)] for c, v in zip(clips, valid)]
    )
    assert abs(per_video - got["P"]) > 0.02


def test_evaluate_scores_every_head(data):
    clips = AffWild2(data, "validation")
    rng = np.random.default_rng(1)
    made = {}

    def predict(clip):
        n = clip.num_frames
        made[clip.name] = ClipPrediction(
            rng.uniform(-1, 1, (n, 2)).astype(np.float32), rng.uniform(-1, 1, (n, 2, 2)).astype(np.float32),
            np.full((n, 2), 0.5, np.float32), np.full((n, 2), 0.5, np.float32), np.ones((n, 1), np.float32),
        )  # fmt: skip
        return made[clip.name]

    scores, predictions = evaluate(predict, clips, ["audio", "visual"])
    assert predictions == made
    t = np.concatenate([clip.labels[clip.valid] for clip in clips])
    heads = {"fused": lambda q: q.prediction, "audio": lambda q: q.unimodal[:, 0], "visual": lambda q: q.unimodal[:, 1]}
    for name, get in heads.items():
        p = np.concatenate([get(made[clip.name])[clip.valid] for clip in clips])
        assert scores[name]["CCC_V"] == pytest.approx(numpy_ccc(p[:, 0], t[:, 0]), abs=1e-12)
        assert scores[name]["CCC_A"] == pytest.approx(numpy_ccc(p[:, 1], t[:, 1]), abs=1e-12)


def test_test_videos_cannot_be_scored(data):
    with pytest.raises(ValueError, match="clips: expected annotated ones, got test-000"):
        score({}, AffWild2(data, "test"))


@pytest.mark.parametrize("fusion", ["reliability", "uniform"])
@pytest.mark.parametrize("chunk", [1, 17, 100, 10_000])
def test_causal_chunks_equal_one_call(data, chunk, fusion):
    clip = AffWild2(data, "validation")[1]
    if chunk == 1:
        clip = dataclasses.replace(clip, num_frames=40, valid=clip.valid[:40], labels=clip.labels[:40])
    model, names = make_model(fusion=fusion).train(), ["audio", "visual"]
    got = predict_clip(model, clip, names, chunk=chunk)
    assert model.training  # as it was
    item = clip_tensors(clip, names)
    with torch.no_grad():
        want = model.eval()({n: x[None] for n, x in item["features"].items()}, present=item["present"][None])
    for field in ("prediction", "unimodal", "weights", "confidence", "stage"):
        value = getattr(got, field)
        assert value.dtype == np.float32
        assert value.shape[0] == clip.num_frames
        np.testing.assert_allclose(value, getattr(want, field)[0].numpy(), atol=2e-5, err_msg=field)
    assert np.abs(got.prediction).max() > 0.02


@pytest.mark.parametrize(("window", "hop"), [(50, 30), (64, 64), (10_000, 10_000)])
def test_centred_windows_are_averaged_per_frame(data, window, hop):
    clip = AffWild2(data, "validation")[1]
    model, names = make_model(causal=False).eval(), ["audio", "visual"]
    got = predict_clip(model, clip, names, window=window, hop=hop)
    total = clip.num_frames
    last = max(total - window, 0)
    sums, counts = np.zeros((total, 2)), np.zeros((total, 1))
    for start in [*range(0, last, hop), last]:
        stop = min(start + window, total)
        item = clip_tensors(clip, names, start, stop)
        with torch.no_grad():
            out = model({n: x[None] for n, x in item["features"].items()}, present=item["present"][None])
        sums[start:stop] += out.prediction[0].double().numpy()
        counts[start:stop] += 1
    assert counts.min() >= 1
    np.testing.assert_allclose(got.prediction, sums / counts, atol=1e-5)
    assert got.unimodal.shape == (total, 2, 2)
    assert got.stage.shape == (total, 3)
    np.testing.assert_allclose(got.stage.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "causal"), [("reliability", True), ("reliability", False), ("late", True), ("jca", True), ("mult", True)]
)
def test_clips_side_by_side_get_what_each_gets_alone(data, fusion, causal, monkeypatch):
    """Causal in chunks, centred, and fusions that see the whole window, one of them of fixed length; of the clips some
    are shorter than a window."""
    module = importlib.import_module("sage_ext.training.evaluate")  # its name in the package is the function's
    monkeypatch.setattr(module, "FRAMES", 500)
    config = TrainConfig(
        str(data), fusion=fusion, dim=8, stages=2, blocks=2, causal=causal, window=22 / 3, hop=7 / 3, threads=1
    )
    model, names = build_model(config, {"audio": 12, "visual": 16}).eval(), ["audio", "visual"]
    clips = AffWild2(data, "validation")
    lengths = [clip.num_frames for clip in clips]
    assert min(lengths) < 220 < max(lengths)
    groups = list(alike(lengths))
    assert sorted(i for places in groups for i in places) == list(range(len(clips)))
    assert max(map(len, groups)) > 1
    for places in groups:
        assert len(places) * max(lengths[i] for i in places) <= 500 or len(places) == 1
        together = predict_clips(model, [clips[i] for i in places], names, chunk=50, window=220, hop=70)
        for i, said in zip(places, together):
            alone = predict_clip(model, clips[i], names, window=220, hop=70)
            for field in dataclasses.fields(alone):
                ours, theirs = getattr(said, field.name), getattr(alone, field.name)
                assert ours.dtype == np.float32
                np.testing.assert_allclose(ours, theirs, atol=2e-6, err_msg=field.name)


def test_mean_filter_against_a_plain_loop():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((57, 2)).astype(np.float32)
    got = mean_filter(values, (20, 7))
    for c, width in enumerate((20, 7)):
        for t in range(57):
            low, high = max(0, t - width // 2), min(57, t + (width + 1) // 2)
            assert high - low <= width
            assert got[t, c] == pytest.approx(values[low:high, c].mean(), abs=1e-6)
    np.testing.assert_array_equal(mean_filter(values, (1, 1)), values)
    assert mean_filter(np.ones((3, 2), np.float32), (50, 50)).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("widths", [(1,), (0, 1), (3, -2)])
def test_mean_filter_refuses(widths):
    with pytest.raises(ValueError, match="widths"):
        mean_filter(np.zeros((4, 2)), widths)


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"window": 10, "hop": 11}, {"hop": 0}])
def test_predict_refuses(data, bad):
    with pytest.raises(ValueError, match="expected"):
        predict_clip(make_model(), AffWild2(data, "validation")[0], ["audio", "visual"], **bad)
