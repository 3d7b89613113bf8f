"""Streams of no use and slow drift: what is written, what is measured, and both studies on a tiny data set."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.synthetic import TruthClips
from sage_ext.study.streams import Drifted, add_stream, deviations, fifth, label_variance, with_stream
from sage_ext.training.evaluate import ClipPrediction

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "streams.py"


def test_a_noise_stream_is_new_in_every_frame_of_every_clip(data, tmp_path):
    before = sorted(path.name for path in (data / "features").iterdir())
    root = with_stream(data, tmp_path / "data", "static", "noise")
    assert sorted(path.name for path in (data / "features").iterdir()) == before
    rows = []
    for split in ("train", "validation", "test"):
        clips, plain = AffWild2(root, split), AffWild2(data, split)
        assert dict(clips.modalities) == {**plain.modalities, "static": 16}
        for clip, theirs in zip(clips, plain, strict=True):
            assert clip.features["static"].shape == (clip.num_frames, 16)
            assert clip.present["static"].all()
            rows.append(np.asarray(clip.features["static"][:]))
            np.testing.assert_array_equal(clip.features["visual"][:], theirs.features["visual"][:])
    rows = np.concatenate(rows)
    assert len(np.unique(rows[:, 0])) == len(rows)
    assert np.abs(rows.mean(0)).max() < 0.1
    assert np.abs(rows.std(0) - 1).max() < 0.1
    again = with_stream(data, tmp_path / "again", "static", "noise")
    name = AffWild2(root, "test").names[0]
    held = [(place / "features" / "static" / f"{name}.npy").read_bytes() for place in (root, again)]
    assert held[0] == held[1]


def test_a_lagged_stream_is_the_other_one_half_a_second_before(data, tmp_path):
    root = with_stream(data, tmp_path / "data", "late", "lagged", of="audio", dim=12)
    maps = []
    for clip in AffWild2(root, "train"):
        source, late = (np.asarray(clip.features[m][: clip.num_frames], float) for m in ("audio", "late"))
        there, known = np.asarray(clip.present["audio"]), np.asarray(clip.present["late"])
        assert not known[:15].any()
        np.testing.assert_array_equal(known[15:], there[:-15])
        before = source[:-15][known[15:]]
        fitted, *_ = np.linalg.lstsq(before, late[15:][known[15:]], rcond=None)
        np.testing.assert_allclose(before @ fitted, late[15:][known[15:]], atol=1e-4)
        maps.append(before @ fitted - late[15:][known[15:]])
    assert len(maps) > 3


def test_streams_refuse(data, tmp_path):
    root = with_stream(data, tmp_path / "data", "static", "noise")
    with pytest.raises(FileExistsError, match="name: expected one that no modality has, got static"):
        add_stream(root, "static", "noise")
    with pytest.raises(ValueError, match="kind: expected one of noise, lagged, got 'pink'"):
        add_stream(root, "other", "pink")
    with pytest.raises(ValueError, match=r"of: expected one of audio, .*, got 'smell'"):
        add_stream(root, "other", "lagged", of="smell")
    assert not (root / "features" / "other").exists()


def test_a_drift_grows_from_clip_to_clip_in_one_direction(data):
    clips, train = list(TruthClips(data)), AffWild2(data, "train")
    deviation = deviations(train, "visual")
    drift = Drifted(clips, "visual", deviation, most=2.0)
    for i, (clip, moved) in enumerate(zip(clips, drift, strict=True)):
        change = np.asarray(moved.features["visual"]) - np.asarray(clip.features["visual"][: clip.num_frames])
        there = np.asarray(clip.present["visual"])[: len(change)]
        expected = 2 * i / (len(clips) - 1) * deviation
        np.testing.assert_allclose(np.abs(change[there]), np.broadcast_to(expected, change[there].shape), atol=1e-4)
        assert moved.features["audio"] is clip.features["audio"]
        assert moved.labels is clip.labels
    signs = np.sign(drift.direction[deviation > 0])
    assert {-1, 1} <= set(signs)
    rows = [np.asarray(clip.features["visual"][: clip.num_frames])[np.asarray(clip.present["visual"])[
        : len(clip.features["visual"][: clip.num_frames])]] for clip in train]  # fmt: skip
    np.testing.assert_allclose(deviation, np.concatenate(rows).astype(float).std(0), rtol=1e-6)


def test_a_fifth_counts_annotated_frames_that_have_the_modality(data):
    rng = np.random.default_rng(0)
    clips = list(AffWild2(data, "train"))[:4]
    said = []
    for clip in clips:
        frames = clip.num_frames
        own = rng.uniform(-1, 1, (frames, 2, 2)).astype(np.float32)
        shares = rng.dirichlet([1, 1], frames).astype(np.float32)
        trust = rng.uniform(0, 1, (frames, 2)).astype(np.float32)
        said.append(ClipPrediction(own.mean(1), own, shares, trust, np.ones((frames, 1), np.float32)))
    variance = label_variance(clips)
    found = fifth(clips, said, 1, "visual", variance)
    stated, weight, error, labels = [], [], [], []
    for clip, one in zip(clips, said):
        labels += [row for t, row in enumerate(clip.labels) if clip.valid[t]]
        for t in range(clip.num_frames):
            if clip.valid[t] and clip.present["visual"][t]:
                stated.append(one.confidence[t, 1])
                weight.append(one.weights[t, 1])
                error.append((one.unimodal[t, 1] - clip.labels[t]) ** 2)
    np.testing.assert_allclose(variance, np.var(np.array(labels, float), 0))
    assert len(stated) < len(labels)
    assert found.stated == pytest.approx(np.mean(stated), rel=1e-5)
    assert found.weight == pytest.approx(np.mean(weight), rel=1e-5)
    assert found.observed == pytest.approx(1 - np.mean(np.mean(error, 0) / variance), rel=1e-4)
    assert -1 < found.score < 1


@pytest.mark.slow
def test_both_studies_on_a_tiny_data_set(tmp_path, monkeypatch, capsys, undrawn):
    spec = importlib.util.spec_from_file_location("streams_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setitem(benchmark.QUICK, "train", 5)
    monkeypatch.setitem(benchmark.QUICK, "test", 6)
    benchmark.main(["--quick", "--out", str(tmp_path), "--max-steps", "2", "--methods", "sage,concat"])
    text = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    p = {}
    for study in ("without", "noise", "lagged"):
        with open(tmp_path / study / "results.csv") as file:
            p |= {
                (study, row["method"]): float(row["P"]) for row in csv.DictReader(file) if row["condition"] == "clean"
            }
    for kind in ("noise", "lagged"):
        for method, title in (("sage", "SAGE"), ("concat", "concatenation")):
            (row,) = (row for row in rows if row[:2] == [kind, title])
            assert float(row[2]) == pytest.approx(p[kind, method], abs=6e-4)
            assert float(row[3].split()[0]) == pytest.approx(p["without", method] - p[kind, method], abs=1.1e-3)
            assert 0 < float(row[4]) < 1
            assert (row[5] == "-") == (method == "concat")
    drift = [row for row in rows if row[:1] == ["audio"]][:6]
    assert [row[1] for row in drift] == ["1", "2", "3", "4", "5", "mean"]
    error = [abs(float(row[3]) - max(float(row[4]), 0)) for row in drift[:5]]
    np.testing.assert_allclose([float(row[5]) for row in drift[:5]], error, atol=2e-3)
    assert float(drift[5][5]) == pytest.approx(np.mean(error), abs=2e-3)
    assert "## Slow drift after training: SAGE\n" in text
