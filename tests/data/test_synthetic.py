"""Synthetic data: the layout it writes, that its truth is true, and that fusing it well takes knowing the noise."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import sage_ext.data.synthetic as synthetic
from sage_ext import cli
from sage_ext.data import AffWild2, SyntheticSpec, Windows, clip_tensors, oracle_predictions, write_dataset
from sage_ext.data.affwild2 import read_annotation, read_sample
from sage_ext.data.synthetic import STAGES, read_spec, remeasured


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The default data set."""
    path = tmp_path_factory.mktemp("synthetic") / "data"
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def clips(root) -> dict[str, list[dict]]:
    """Per split: what the reader gives, and beside it the truth."""
    return {split: load(root, split) for split in ("train", "validation", "test")}


def load(root: Path, split: str) -> list[dict]:
    out = []
    for clip in AffWild2(root, split):
        item = clip_tensors(clip, list(clip.features))
        with np.load(root / "truth" / f"{clip.name}.npz") as truth:
            out.append({"name": clip.name, "clip": clip, **item, "truth": dict(truth)})
    return out


def ccc(p: np.ndarray, y: np.ndarray) -> float:
    """Lin's concordance with one divisor, the mean over the columns, in float64."""
    p, y = np.asarray(p, np.float64), np.asarray(y, np.float64)
    covariance = ((p - p.mean(0)) * (y - y.mean(0))).mean(0)
    return float((2 * covariance / (p.var(0) + y.var(0) + (p.mean(0) - y.mean(0)) ** 2)).mean())


# ------------------------------------------------------------------------------------------------------------ layout


def test_the_reader_reads_it(root):
    data = {split: AffWild2(root, split) for split in ("train", "validation", "test")}
    assert {split: len(d) for split, d in data.items()} == {"train": 24, "validation": 10, "test": 4}
    for split, d in data.items():
        assert d.modalities == {"audio": 32, "visual": 64}
        frames = {clip.name: clip.num_frames for clip in d}
        assert f"{split}-001_left" in frames
        assert frames[f"{split}-001_left"] == frames[f"{split}-001_right"]
        assert 73 <= frames[f"{split}-000"] < 300
        assert all(250 <= t <= 900 for name, t in frames.items() if not name.endswith("-000"))
        assert len(set(frames.values())) > 2
        assert any(t % 2 for t in frames.values())
    assert data["train"].mismatches[:2] == [
        m.format(*[data["train"][data["train"].names.index(n)].num_frames + k for k in ks])
        for n, m, ks in (
            ("train-006", "train-006: visual has {} rows for {} frames: visual is absent in the last 2", (-2, 0)),
            ("train-007", "train-007: audio has {} rows for {} frames: the last 3 are ignored", (3, 0)),
        )
    ]
    assert list(read_sample(root / "sample_submission.txt")) == data["test"].names != sorted(data["test"].names)
    assert not (root / "features/audio/train-001_left.npy").exists()
    assert (root / "features/audio/train-001.npy").exists()
    assert (root / "features/audio/train-003.mask.npy").exists()


def test_annotations_are_the_truth_less_the_invalid_spans(root, clips):
    folder = root / "6th ABAW Annotations/VA_Estimation_Challenge"
    places = set()
    for split, sub in (("train", "Train_Set"), ("validation", "Validation_Set")):
        for item in clips[split]:
            labels, valid = read_annotation(folder / sub / f"{item['name']}.txt")
            np.testing.assert_array_equal(labels[valid], item["truth"]["labels"][valid])
            assert valid.mean() > 0.85
            gone = np.flatnonzero(~valid)
            if len(gone):
                assert (np.diff(gone) == 1).all()
                first, last = gone[0] == 0, gone[-1] == len(valid) - 1
                raw = (folder / sub / f"{item['name']}.txt").read_text().split("\n")[1 + gone[0]]
                places.add((bool(first), bool(last), raw == "-5,-5"))
    assert places == {(True, False, True), (False, True, True), (False, False, True), (False, False, False)}


def test_presence_is_the_truth(clips):
    """NaN rows, masks and short files together say what the truth says, in every split."""
    for split in clips.values():
        for item in split:
            np.testing.assert_array_equal(item["present"].numpy(), item["truth"]["present"])
    share = np.concatenate([item["present"].numpy() for item in clips["train"]]).mean(axis=0)
    assert ((share > 0.9) & (share < 0.9999)).all()


@pytest.mark.parametrize(("index", "modality", "kept"), [(0, "visual", 50), (6, "visual", 48), (7, "audio", 53)])
def test_odd_lengths_shift_nothing(tmp_path, index, modality, kept):
    rows = np.repeat(np.arange(50, dtype=np.float32)[:, None], 2, axis=1)
    track = synthetic._Track(rows.copy(), rows, rows[:, 0], np.arange(50) != 20)
    (tmp_path / "features" / modality).mkdir(parents=True)
    synthetic._write_features(tmp_path, False, modality, "clip", track, index)
    written = np.load(tmp_path / "features" / modality / "clip.npy")
    expected = np.minimum(np.arange(kept), 49.0)
    if not (tmp_path / "features" / modality / "clip.mask.npy").exists():
        expected[20] = np.nan
    np.testing.assert_array_equal(written[:, 0], expected)
    np.testing.assert_array_equal(np.flatnonzero(~track.present), [20, 48, 49] if kept == 48 else [20])


def test_presence_by_images(tmp_path):
    write_dataset(tmp_path / "data", train=5, validation=0, test=0, frames=(300, 400), images=True, seed=1)
    data = AffWild2(tmp_path / "data", "train")
    absent = 0
    for clip, item in zip(data, load(tmp_path / "data", "train")):
        assert not np.isnan(clip.features["visual"]).any()
        np.testing.assert_array_equal(item["present"].numpy(), item["truth"]["present"])
        absent += int((~item["present"][:, 1]).sum())
    assert absent > 20


def test_training_needs_no_truth(root, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("truth"))
    for split in ("train", "validation", "test"):
        windows = Windows(AffWild2(copy, split))
        assert windows[len(windows) - 1]["frame"].any()


# ----------------------------------------------------------------------------------------------------------- quality
def test_quality_leaves_the_rest_as_it_is(root, tmp_path):
    """Without it, every other file has the same bytes; with it, it has a row for each row of the features."""
    small = {"seed": 3, "train": 8, "validation": 4, "test": 2, "frames": (40, 70)}
    spec = write_dataset(tmp_path / "with", **small)
    without = write_dataset(tmp_path / "without", **small, quality=False)
    assert (spec.quality, without.quality) == (True, False)
    files = {path.relative_to(tmp_path / "without") for path in (tmp_path / "without").rglob("*") if path.is_file()}
    for path in files:
        if path.name not in ("meta.json", "spec.json"):
            assert (tmp_path / "with" / path).read_bytes() == (tmp_path / "without" / path).read_bytes()
    more = {path.relative_to(tmp_path / "with") for path in (tmp_path / "with").rglob("*") if path.is_file()} - files
    features = {path for path in files if path.suffix == ".npy" and not path.name.endswith(".mask.npy")}
    assert more == {path.with_suffix(".quality.npy") for path in features}
    assert AffWild2(tmp_path / "without", "train").quality_dims == {}
    for split in ("train", "validation", "test"):
        data = AffWild2(tmp_path / "with", split)
        assert data.quality_dims == {"audio": 2, "visual": 2}
        names = {"audio": ("voice_activity", "loudness"), "visual": ("detector_score", "contrast")}
        assert data.quality_columns == names
    spec_file = tmp_path / "with" / "truth" / "spec.json"
    values = json.loads(spec_file.read_text())
    del values["quality"]  # of before there was any
    spec_file.write_text(json.dumps(values))
    assert read_spec(tmp_path / "with") == without


def quality_of(clips, modality):
    """(N, 2) quality, (N,) presence and variance, of the frames of all clips."""
    items = [(item, list(item["features"]).index(modality)) for item in clips]
    quality = np.concatenate([item["quality"][modality].numpy() for item, _ in items])
    present, variance = (
        np.concatenate([item["truth"][key][:, m] for item, m in items]) for key in ("present", "variance")
    )
    return quality, present, variance


def test_quality_tells_of_the_noise_and_is_no_oracle(clips):
    quality, present, variance = quality_of(clips["train"], "visual")
    known = np.isfinite(quality).all(1)
    assert not known[~present].any()
    assert 0.93 < known[present].mean() < 0.995
    score, variance = quality[known, 0].astype(np.float64), variance[known]
    assert 0 < score.min() < 0.05
    assert 0.95 < score.max() < 1
    logit = np.log(score / (1 - score))
    assert -0.85 < np.corrcoef(logit, np.log(variance))[0, 1] < -0.6
    slope, level = np.polyfit(np.log(variance), logit, 1)
    assert -1.1 < slope < -0.8  # of the whole time, 5 % of which is wrong
    assert 0.3 < level < 0.7
    error = logit - level - slope * np.log(variance)
    assert 1.6 < error.std() < 2.1  # of 1.5 and 1 together, 1.80
    occluded = np.isclose(variance, 4.5**2)
    assert occluded.any()
    assert quality[known, 1][occluded].mean() < quality[known, 1][~occluded].mean() - 0.8


def test_a_score_errs_for_half_a_second():
    """Its error keeps for 15 frames what is not the frame's own."""
    errors = synthetic._errors(np.random.default_rng(0), 60_000, (1.5, 1.0)).reshape(-1, 15)
    assert errors.var() == pytest.approx(1.5**2 + 1, rel=0.05)
    assert np.mean(errors[:, 0] * errors[:, -1]) == pytest.approx(1.5**2, rel=0.1)
    assert np.mean(errors[:-1, -1] * errors[1:, 0]) == pytest.approx(0, abs=0.15)


def test_voice_activity_and_loudness(clips):
    """Who speaks, or that turns are taken, in nine of ten frames; the loudness differs from video to video."""
    alone = [item for item in clips["train"] if "_" not in item["name"]]
    quality, present, _ = quality_of(alone, "audio")
    stage = np.concatenate([item["truth"]["stage"] for item in alone])
    known = np.isfinite(quality).all(1)
    assert not known[~present].any()
    voice = np.isin(stage, [0, 2])[known]
    right = (quality[known, 0] > 0.5) == voice
    assert 0.75 < right.mean() < 0.92  # 10 % wrong, and errors
    means = [np.nanmean(item["quality"]["audio"][:, 1]) for item in alone]
    assert 0.3 < np.std(means) < 0.9
    silent = (stage == 3)[known]
    assert np.median(quality[known, 1][silent]) > -3


def test_both_persons_share_the_track_and_its_quality(clips):
    left, right = (item for item in clips["train"] if item["name"] in ("train-001_left", "train-001_right"))
    np.testing.assert_array_equal(left["quality"]["audio"], right["quality"]["audio"])
    a, b = left["quality"]["visual"].numpy(), right["quality"]["visual"].numpy()
    assert not np.array_equal(a, b, equal_nan=True)


def recording(seed=0, n=400, dim=12):
    rng = np.random.default_rng(seed)
    before = (3 + rng.standard_normal((n, dim)) * np.linspace(0.5, 2, dim)).astype(np.float32)
    before[:, 3] = 7  # never varies
    score = rng.uniform(0.02, 0.98, (n, 1))
    quality = np.concatenate([score, rng.standard_normal((n, 1))], 1).astype(np.float32)
    quality[rng.random(quality.shape) < 0.1] = np.nan
    return before, quality, before.std(0, dtype=np.float64)


VIEW, SHARED = synthetic.VIEW_QUALITY, synthetic.SHARED_QUALITY


@pytest.mark.parametrize("names", [VIEW, SHARED])
def test_the_meter_reads_the_same_of_the_same(names):
    before, quality, spread = recording()
    quality[:3, 0] = [0, 1, 0.5]
    again = remeasured(names, quality, before, before.copy(), spread)
    np.testing.assert_array_equal(again, quality)
    assert again is not quality
    after = before.copy()
    after[::2] += spread
    half = remeasured(names, quality, before, after, spread)
    np.testing.assert_array_equal(half[1::2], quality[1::2])
    assert (half[::2] != quality[::2]).any()
    np.testing.assert_array_equal(np.isnan(half), np.isnan(quality))
    assert half[0, 0] == pytest.approx(0, abs=1e-5)
    assert half.dtype == np.float32


def test_the_meter_by_its_formula():
    before, quality, spread = recording()
    noise = np.random.default_rng(1).standard_normal(before.shape).astype(np.float32)
    after = before + noise
    varies = spread > 0
    varies[3] = False
    a = np.mean(((after - before)[:, varies] / spread[varies]) ** 2, axis=1)
    centre = before[:, varies].mean(0, dtype=np.float64)
    power = [np.mean(((x[:, varies] - centre) / spread[varies]) ** 2, axis=1) for x in (before, after)]
    score = quality[:, 0].astype(np.float64)
    v = np.exp(0.5 - np.log(score / (1 - score)))
    for names, share in ((VIEW, 1.0), (SHARED, 0.5)):
        out = remeasured(names, quality, before, after, spread)
        logit = 0.5 - np.log(v) - share * (np.log(v + 4 * a) - np.log(v))
        np.testing.assert_allclose(out[:, 0], 1 / (1 + np.exp(-logit)), rtol=1e-4)
        moved = quality[:, 1] + 0.5 * np.log((power[1] + 0.05) / (power[0] + 0.05))
        np.testing.assert_allclose(out[:, 1], moved, rtol=1e-4, atol=1e-5)


def test_the_meter_goes_the_right_way():
    """More noise, lower scores; louder, more; what does not vary tells nothing; other columns stay."""
    before, quality, spread = recording()
    noise = spread * np.random.default_rng(1).standard_normal(before.shape)
    scores = [quality]
    for level in (0.2, 0.5, 1.0, 3.0):
        scores.append(remeasured(VIEW, quality, before, (before + level * noise).astype(np.float32), spread))
    known = np.isfinite(quality[:, 0])
    for less, more in itertools.pairwise(scores):
        assert (more[known, 0] < less[known, 0]).all()
    voice = remeasured(SHARED, quality, before, (before + noise).astype(np.float32), spread)
    assert (voice[known, 0] > scores[3][known, 0]).all()
    mean = before.mean(0)
    for factor in (0.25, 4.0):
        out = remeasured(SHARED, quality, before, mean + np.float32(factor) * (before - mean), spread)
        moved = (out - quality)[np.isfinite(quality[:, 1]), 1]
        assert (moved * np.log(factor) > 0).all()
        assert abs(moved).max() <= np.log(4) + 1e-4
    still = remeasured(VIEW, quality, before, np.repeat(mean[None], len(before), 0), spread)
    assert np.isfinite(still[np.isfinite(quality)]).all()  # of no power: over the floor
    after = before.copy()
    after[:, 3] = 0
    out = remeasured(VIEW, quality, before, after, spread)
    np.testing.assert_allclose(out, quality, rtol=1e-5, atol=1e-6)
    named = remeasured(("blur", "contrast"), quality, before, (before + noise).astype(np.float32), spread)
    np.testing.assert_array_equal(named[:, 0], quality[:, 0])
    with pytest.raises(ValueError, match=r"quality: expected the shape \(n, 1\) of blur, got \(400, 2\)"):
        remeasured(("blur",), quality, before, before, spread)
    assert remeasured(VIEW, quality[:0], before[:0], before[:0], spread).shape == (0, 2)


def test_the_command_leaves_quality_out(tmp_path, capsys):
    sizes = ("--train", "1", "--validation", "1", "--test", "0", "--frames", "20,30")
    assert cli.main(["synth", str(tmp_path / "a"), *sizes]) == 0
    assert cli.main(["synth", str(tmp_path / "b"), *sizes, "--no-quality"]) == 0
    assert len(list((tmp_path / "a").rglob("*.quality.npy"))) == 4
    assert not list((tmp_path / "b").rglob("*.quality.npy"))


# ------------------------------------------------------------------------------------------------------------- bytes
def test_same_arguments_same_bytes(tmp_path):
    small = {"train": 5, "validation": 4, "test": 2, "frames": (40, 70)}

    def content(name: str, **arguments) -> dict[str, bytes]:
        folder = tmp_path / name
        write_dataset(folder, **{**small, **arguments})
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    first, again, other = content("a", seed=3), content("b/c", seed=3), content("d", seed=4)
    assert first == again
    assert len(first) > 5 * 3
    changed = {name for name in first.keys() & other.keys() if first[name] != other[name]}
    assert {n for n in first if n.endswith((".npy", ".npz", "_Set/train-003.txt"))} & other.keys() <= changed
    more = content("e", seed=3, test=3)
    assert all(more[name] == data for name, data in first.items() if "/train-" in name)  # splits do not stir each other


def test_spec_is_kept(tmp_path):
    spec = write_dataset(
        tmp_path / "data", seed=7, train=2, validation=1, test=0, frames=(20, 30), difficulty=0.5, stages=2,
        modalities={"audio": 9, "face": 8, "text": 10},
    )  # fmt: skip
    assert read_spec(tmp_path / "data") == spec
    assert spec == SyntheticSpec(7, 2, 1, 0, (20, 30), 0.5, 2, {"audio": 9, "face": 8, "text": 10}, False, False)
    assert AffWild2(tmp_path / "data", "train").modalities == {"audio": 9, "face": 8, "text": 10}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train": -1}, "train: expected a number of annotations >= 0, got -1"),
        ({"frames": (15, 20)}, "frames: expected 16 <= shortest <= longest, got (15, 20)"),
        ({"frames": (30, 20)}, "frames: expected 16 <= shortest <= longest, got (30, 20)"),
        ({"difficulty": 0}, "difficulty: expected a positive factor, got 0.0"),
        ({"difficulty": float("nan")}, "difficulty: expected a positive factor, got nan"),
        ({"stages": 17}, "stages: expected 1 to 16, got 17"),
        ({"stages": 0}, "stages: expected 1 to 16, got 0"),
        ({"modalities": {"audio": 7}}, "modalities: expected 1 to 8 names with D >= 8, got {'audio': 7}"),
        ({"modalities": {}}, "modalities: expected 1 to 8 names with D >= 8, got {}"),
        ({"modalities": {f"m{i}": 8 for i in range(9)}}, "modalities: expected 1 to 8 names"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        write_dataset(tmp_path / "data", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    small = {"train": 2, "validation": 0, "test": 0, "frames": (20, 30)}
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(FileExistsError, match=f"root: expected a folder that is empty or new, got .*{name}"):
            write_dataset(tmp_path / name, **small)
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", **small)
    assert len(AffWild2(tmp_path / "empty", "train")) == 2

    seen = []
    monkeypatch.setattr(
        synthetic.os, "replace", lambda a, b: seen.append((len(list(a.rglob("*.npz"))), b.exists())) or a.rename(b)
    )
    write_dataset(tmp_path / "new", **small)
    assert seen == [(2, False)]  # whole before it has the name

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(synthetic, "_write_annotation", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_dataset(tmp_path / "broken", **small)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full", "new"]


@pytest.mark.parametrize("stages", [1, 2, 3, 16])
@pytest.mark.parametrize("modalities", [{"audio": 8}, {"face": 8, "audio": 8, "text": 8, "body": 12}])
def test_any_number_of_stages_and_modalities(tmp_path, stages, modalities):
    write_dataset(
        tmp_path / "data", train=4, validation=0, test=0, frames=(90, 120), stages=stages, modalities=modalities
    )
    for item in load(tmp_path / "data", "train"):
        assert item["truth"]["stage"].max() < stages
        assert list(item["truth"]["modalities"]) == list(modalities)
        np.testing.assert_array_equal(
            item["present"].numpy()[:, np.argsort(list(modalities)).argsort()], item["truth"]["present"]
        )


# ------------------------------------------------------------------------------------------------- the truth is true


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[dict]:
    """Enough frames for statistics: 80,000."""
    path = tmp_path_factory.mktemp("many") / "data"
    write_dataset(path, seed=1, train=80, validation=0, test=0, frames=(1000, 1000))
    return [dict(np.load(p)) | {"name": p.stem} for p in sorted((path / "truth").glob("*.npz"))]


def test_reliability_is_defined_by_the_noise_variance(many):
    for truth in many:
        expected = np.where(truth["present"], 1 / (1 + truth["variance"].astype(np.float64)), 0)
        np.testing.assert_allclose(truth["reliability"], expected, rtol=1e-6)
        assert (truth["variance"] > 0).all()
        r = truth["reliability"][truth["present"].all(axis=1)].astype(np.float64)
        weights = (r / (1 - r)) / (r / (1 - r)).sum(axis=1, keepdims=True)
        precision = 1 / truth["variance"][truth["present"].all(axis=1)].astype(np.float64)
        np.testing.assert_allclose(weights, precision / precision.sum(axis=1, keepdims=True), rtol=1e-4)


def test_noise_has_the_variance_that_the_truth_says(many):
    """Standardised by the stated variance, the noise is of unit variance: overall, and in loud and quiet parts alike.
    Frames are correlated (memory 0.9), so a mean square over n frames is known to about sqrt(2 * 9.5 / n)."""
    alone = [t for t in many if not t["name"].endswith(("_left", "_right"))]
    for m in range(2):
        z = np.concatenate([(t["noisy"][:, m] - t["latents"]) / np.sqrt(t["variance"][:, m, None]) for t in alone])
        v = np.concatenate([t["variance"][:, m] for t in alone])
        for part in (v < 0.5, (v > 0.5) & (v < 5), v > 5):
            assert part.sum() > 4000
            square = (z[part] ** 2).mean(axis=0)
            np.testing.assert_allclose(square, 1, atol=5 * np.sqrt(2 * 9.5 / part.sum()))
            assert np.abs(z[part].mean(axis=0)).max() < 5 * np.sqrt(19 / part.sum())
        memory = (z[1:] * z[:-1]).mean() / (z**2).mean()
        assert 0.89 < memory < 0.91


def test_of_two_persons_the_track_follows_the_speaker(tmp_path):
    """Over many pairs, the error of the shared track has the stated variance for the one who speaks and the one who
    listens; their faces are their own."""
    persons: dict[str, list[dict]] = {"left": [], "right": []}
    for seed in range(12):
        root = tmp_path / str(seed)
        write_dataset(root, seed=seed, train=4, validation=0, test=0, frames=(1500, 1500))
        for side, found in persons.items():
            found.append(dict(np.load(root / "truth" / f"train-001_{side}.npz")))
    left, right = ({k: np.concatenate([t[k] for t in found]) for k in found[0]} for found in persons.values())
    swapped = np.where(left["stage"] < 2, 1 - left["stage"], left["stage"])
    np.testing.assert_array_equal(right["stage"], swapped)
    np.testing.assert_array_equal(left["noisy"][:, 0], right["noisy"][:, 0])  # one track
    assert not np.allclose(left["noisy"][:, 1], right["noisy"][:, 1])
    quiet = np.minimum(left["variance"], right["variance"])[:, 0] < 1
    for own, other in ((left, right), (right, left)):
        speaks = (own["stage"] == 0) & quiet
        listens = (own["stage"] == 1) & quiet
        assert own["variance"][speaks, 0] + 2 == pytest.approx(other["variance"][speaks, 0])
        error = (own["noisy"][:, 0] - own["latents"]) ** 2
        assert 0.8 < (error[speaks].mean() / own["variance"][speaks, 0].mean()) < 1.25
        assert 0.7 < (error[listens].mean() / own["variance"][listens, 0].mean()) < 1.4  # the other person's affect


def test_occlusion_is_noise_and_quiet(monkeypatch):
    """A covered face says little (variance of a burst) and does so faintly; a burst says as little, loudly."""
    world = synthetic._World(SyntheticSpec())
    inside = slice(100, 200)

    def record(kind: tuple[int, int]) -> synthetic._Track:
        def spans(rng, frames, share, lengths):
            return np.isin(np.arange(frames), np.arange(100, 200)) & (lengths == kind)

        monkeypatch.setattr(synthetic, "_spans", spans)
        rng = np.random.default_rng(0)
        source, stage = synthetic._latents(rng, 300), np.ones(300, np.int64)  # the face is good while listening
        return synthetic._record(world, rng, 1, source, stage, is_view=True)

    occluded, burst = record((30, 90)), record((15, 60))
    np.testing.assert_allclose(occluded.variance[inside], 4.5**2)
    np.testing.assert_allclose(burst.variance[inside], 4.5**2 + 0.3**2)
    np.testing.assert_allclose(occluded.variance[:100], 0.3**2)
    np.testing.assert_array_equal(occluded.rows[:100], burst.rows[:100])
    spread = [track.rows[inside].var(axis=0).mean() for track in (occluded, burst)]
    assert spread[0] < 0.6 * spread[1]


def test_affect_is_smooth_and_varied(many):
    labels = np.concatenate([t["labels"] for t in many])
    assert np.abs(labels).max() <= 1
    assert ((labels.std(axis=0) > 0.4) & (labels.std(axis=0) < 0.7)).all()
    assert 0.1 < np.corrcoef(labels.T)[0, 1] < 0.5
    for t in many:
        assert np.abs(np.diff(t["labels"], axis=0)).max() < 0.25
        np.testing.assert_allclose(t["labels"], np.tanh(0.8 * t["latents"]), atol=6e-4)
    latents = np.concatenate([t["latents"] for t in many])
    np.testing.assert_allclose(latents.var(axis=0), 1, atol=0.15)


def test_stages_are_a_markov_chain(many):
    """Dwell times as stated and geometric; from a stage, every other one is as likely."""
    pairs = np.concatenate(
        [np.stack([t["stage"][:-1], t["stage"][1:]], axis=1) for t in many if "right" not in t["name"]]
    )
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(pairs.T), 1)
    visits = counts.sum(axis=1)
    leave = 1 - counts.diagonal() / visits
    expected = 1 / np.array([100, 75, 75, 50])
    np.testing.assert_allclose(leave, expected, atol=5 * np.sqrt(expected.max() / visits.min()))
    for s in range(4):
        others = np.delete(counts[s], s) / np.delete(counts[s], s).sum()
        np.testing.assert_allclose(others, 1 / 3, atol=0.15)
    assert len(STAGES) == 4


# ------------------------------------------------------------------------------------------- embeddings and hardness


@pytest.fixture(scope="module")
def decoded(clips) -> dict[str, np.ndarray]:
    """Ridge on random tanh features of now and of the mean of the last 4 and 16 frames, fitted on train: predictions on
    validation, up to scale, of each modality and of both together."""
    rng = np.random.default_rng(0)

    def context(rows: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((1, rows.shape[1])), rows.cumsum(axis=0)])
        t = np.arange(1, len(rows) + 1)
        low = [np.maximum(t - k, 0) for k in (1, 4, 16)]
        return np.concatenate([(total[t] - total[b]) / (t - b)[:, None] for b in low], axis=1)

    def inputs(m: str) -> list[np.ndarray]:
        both = [np.concatenate([context(i["features"][m].numpy().astype(float)) for i in clips[s]]) for s in splits]
        mean, std = both[0].mean(axis=0), both[0].std(axis=0) + 1e-9
        both = [(x - mean) / std for x in both]
        inward = rng.standard_normal((len(mean), 300)) / np.sqrt(len(mean))
        bias = rng.standard_normal(300)
        return [np.concatenate([x / 10, np.tanh(x @ inward + bias)], axis=1) for x in both]

    def ridge(parts: list[list[np.ndarray]]) -> np.ndarray:
        x, heldout = (np.concatenate(pair, axis=1) for pair in zip(*parts))
        x, y = x[valid], labels[valid]
        mean = x.mean(axis=0)
        gram = (x - mean).T @ (x - mean) + 300 * np.eye(x.shape[1])
        return (heldout - mean) @ np.linalg.solve(gram, (x - mean).T @ (y - y.mean(axis=0)))

    splits = ("train", "validation")
    labels, valid = (np.concatenate([item[k].numpy() for item in clips["train"]]) for k in ("labels", "valid"))
    audio, visual = inputs("audio"), inputs("visual")
    truth = [item["truth"] for item in clips["validation"]]
    return {
        "audio": ridge([audio]),
        "visual": ridge([visual]),
        "concat": ridge([audio, visual]),
        "labels": np.concatenate([t["labels"] for t in truth]),
        "stage": np.concatenate([t["stage"] for t in truth]),
        "precision": np.concatenate([t["present"] / t["variance"] for t in truth]),
    }


def correlation(p: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(p[:, c], y[:, c])[0, 1] for c in range(2)]))


def test_the_stage_says_which_modality_is_good(decoded):
    """Measured on the embeddings: correlation of a decoder's output with the labels, stage by stage."""
    audio, visual = (
        [correlation(decoded[m][here], decoded["labels"][here]) for here in (decoded["stage"] == s for s in range(4))]
        for m in ("audio", "visual")
    )
    assert audio[0] > visual[0] + 0.3  # speaking
    assert visual[1] > audio[1] + 0.3  # listening
    assert visual[3] > audio[3] + 0.3  # silence
    assert audio[2] < audio[0]  # turn-taking: neither is at its best, neither is lost
    assert visual[2] < max(visual[1], visual[3])
    assert min(audio[2], visual[2]) > 0.25


def test_no_modality_suffices_and_knowing_the_noise_helps(root, clips, decoded):
    oracle = oracle_predictions(root, "validation")
    predictions = {m: decoded[m] for m in ("audio", "visual", "concat")}
    weights = decoded["precision"] / np.maximum(decoded["precision"].sum(axis=1, keepdims=True), 1e-9)
    predictions["average"] = decoded["audio"] + decoded["visual"]
    predictions["weighted"] = weights[:, :1] * decoded["audio"] + weights[:, 1:] * decoded["visual"]
    predictions["oracle"] = np.concatenate([oracle[item["name"]] for item in clips["validation"]])
    score = {name: correlation(p, decoded["labels"]) for name, p in predictions.items()}
    assert max(score["audio"], score["visual"]) < 0.65, score
    assert score["weighted"] > max(score["audio"], score["visual"]) + 0.12, score
    assert score["weighted"] > score["average"] + 0.05, score
    assert score["weighted"] > score["concat"] + 0.04, score
    assert score["oracle"] > score["concat"] + 0.15, score
    assert 0.85 < ccc(predictions["oracle"], decoded["labels"]) < 0.97


def test_amplitude_traces_the_noise_without_telling_it(clips):
    for m, name in enumerate(("audio", "visual")):
        rows = np.concatenate([i["features"][name].numpy()[i["present"][:, m].numpy()] for i in clips["train"]])
        mean, std = rows.mean(axis=0), rows.std(axis=0) + 1e-3
        energy, variance = [], []
        for item in clips["train"]:
            here = item["present"][:, m].numpy()
            energy.append(np.log((((item["features"][name].numpy() - mean) / std) ** 2).mean(axis=1)[here]))
            variance.append(np.log(item["truth"]["variance"][here, m]))
        trace = np.corrcoef(np.concatenate(energy), np.concatenate(variance))[0, 1]
        assert 0.15 < trace < 0.75, name


def test_embeddings_are_like_real_ones(clips):
    """Off-centre, correlated, some dimensions dead, and a voice or face of each video's own."""
    for m, name in enumerate(("audio", "visual")):
        parts = [i["features"][name].numpy()[i["present"][:, m].numpy()].astype(np.float64) for i in clips["train"]]
        rows = np.concatenate(parts)
        std = rows.std(axis=0)
        dead = std == 0
        assert 2 <= dead.sum() <= rows.shape[1] // 8
        assert (rows[:, dead] == 0).all(axis=0).any()
        assert (rows[0, dead] != 0).any()
        alive = rows[:, ~dead]
        centre = np.linalg.norm(alive.mean(axis=0)) / np.sqrt(alive.var(axis=0).sum())
        assert centre > 0.8  # zero is not the centre of the cloud
        share = np.linalg.eigvalsh(np.cov(alive.T))[::-1]
        assert share[: len(share) // 4].sum() > 0.5 * share.sum()
        between = np.stack([part[:, ~dead].mean(axis=0) for part in parts]).var(axis=0).mean()
        assert between > 0.02 * alive.var(axis=0).mean()


def test_centred_embeddings(tmp_path):
    write_dataset(tmp_path / "data", train=12, validation=0, test=0, centred=True)
    items = load(tmp_path / "data", "train")
    for m, name in enumerate(("audio", "visual")):
        rows = np.concatenate([i["features"][name].numpy()[i["present"][:, m].numpy()] for i in items])
        assert np.linalg.norm(rows.mean(axis=0)) < 0.25 * np.sqrt(rows.var(axis=0).sum())


def test_difficulty(tmp_path):
    scores = []
    for difficulty in (0.5, 1.0, 2.0):
        root = tmp_path / str(difficulty)
        write_dataset(root, train=8, validation=8, test=0, difficulty=difficulty)
        oracle = oracle_predictions(root, "validation")
        truth = [np.load(root / "truth" / f"{name}.npz")["labels"] for name in oracle]
        scores.append(ccc(np.concatenate(list(oracle.values())), np.concatenate(truth)))
    assert scores[0] > scores[1] + 0.02
    assert scores[1] > scores[2] + 0.02


# ------------------------------------------------------------------------------------------------------------ oracle


def test_oracle_predicts_every_clip(root, clips):
    for split in ("train", "validation", "test"):
        predictions = oracle_predictions(root, split)
        assert list(predictions) == AffWild2(root, split).names
        for item in clips[split]:
            p = predictions[item["name"]]
            assert p.shape == (item["clip"].num_frames, 2)
            assert p.dtype == np.float32
            assert np.isfinite(p).all()
            assert np.abs(p).max() <= 1


def test_oracle_does_not_see_the_labels_it_predicts(root, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    for path in (copy / "truth").glob("validation-*.npz"):
        truth = dict(np.load(path))
        truth["labels"], truth["latents"] = 0 * truth["labels"], 0 * truth["latents"]
        np.savez(path, **truth)
    expected, got = oracle_predictions(root, "validation"), oracle_predictions(copy, "validation")
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_oracle_gains_by_the_true_variances(root, clips, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    for path in (copy / "truth").glob("*.npz"):
        truth = dict(np.load(path))
        truth["variance"] = np.full_like(truth["variance"], np.median(truth["variance"]))
        np.savez(path, **truth)
    labels = np.concatenate([item["truth"]["labels"] for item in clips["validation"]])
    knowing, guessing = (
        ccc(np.concatenate(list(oracle_predictions(r, "validation").values())), labels) for r in (root, copy)
    )
    assert knowing > guessing + 0.05


def test_spec_file_is_readable(root):
    spec = json.loads((root / "truth/spec.json").read_text())
    assert spec["seed"] == 0
    assert spec["modalities"] == {"audio": 32, "visual": 64}
