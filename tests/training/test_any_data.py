"""Data of other kinds than Aff-Wild2's: one target by the hour, five at once a second; trained, scored, predicted, streamed."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from sage_ext import cli
from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.targets import unscaled
from sage_ext.training.runs import Run, write_predictions
from sage_ext.training.trainer import read_config

HOURLY = ({"glucose": [70.0, 180.0]}, 1 / 3600, {"watch": 6, "diary": 2})
SECONDS = ({"valence": [1, 9], "arousal": [1, 9], "stress": [0, 100], "pain": [0, 1], "a b": [-40, -4]}, 1.0,
           {"sound": 4, "speech": 3, "picture": 5})  # fmt: skip


def write(root, targets, fps, modalities, videos=6, frames=260, seed=0):
    """A data set whose targets are slow curves that each modality shows with noise; a third of the frames not annotated."""
    rng = np.random.default_rng(seed)
    names = list(targets)
    low, high = np.array(list(targets.values()), float).T
    mixes = {name: rng.standard_normal((len(names), dim)) for name, dim in modalities.items()}
    root.mkdir()
    (root / "targets.json").write_text(json.dumps(targets))
    (root / "fps.json").write_text(json.dumps(fps))
    for v in range(videos):
        split = "Validation_Set" if v % 3 == 2 else "Train_Set"
        walk = np.cumsum(rng.standard_normal((frames, len(names))), 0)
        kernel = np.ones(15) / 15
        slow = np.stack([np.convolve(column, kernel, "same") for column in walk.T], 1)
        latent = np.tanh((slow - slow.mean(0)) / slow.std(0))
        folder = root / "annotations" / split
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for row in (low + high) / 2 + latent * 0.9 * (high - low) / 2:
            cells = [f"{x:.6g}" for x in row]
            if rng.random() < 0.2:
                cells[rng.integers(len(cells))] = (
                    "nan" if len(cells) == 1 else ("", "nan")[rng.integers(2)]
                )  # an empty line is an error
            rows.append(",".join(cells))
        (folder / f"rec{v}.txt").write_text("\n".join([",".join(names), *rows]) + "\n")
        for name, dim in modalities.items():
            x = latent @ mixes[name] + 0.3 * rng.standard_normal((frames, dim))
            x[rng.random(frames) < 0.05] = np.nan
            (root / "features" / name).mkdir(parents=True, exist_ok=True)
            np.save(root / "features" / name / f"rec{v}.npy", x.astype(np.float32))
    return root


@pytest.fixture(scope="module", params=[HOURLY, SECONDS], ids=["one-hourly", "five-1Hz"])
def trained(request, tmp_path_factory):
    """(root, run, targets, fps): trained by the command with the defaults of the rate."""
    targets, fps, modalities = request.param
    path = tmp_path_factory.mktemp("any")
    root = write(path / "data", targets, fps, modalities)
    options = ["--dim", "16", "--blocks", "2", "--batch-size", "4", "--lr", "5e-3", "--epochs", "25", "--warmup", "5"]
    assert (
        cli.main(["train", "--data", str(root), "--run", str(path / "run"), *options, "--threads", "1", "--quiet"]) == 0
    )
    return root, path / "run", targets, fps


def test_it_learns(trained, capsys, tmp_path):
    root, path, targets, fps = trained
    run = Run.load(path)
    assert [(t.name, [t.low, t.high]) for t in run.targets] == [
        (name, list(map(float, r))) for name, r in targets.items()
    ]
    assert run.fps == fps
    doubting = Run.load(path, trust={run.names[0]: 0.3}).model.foreign
    assert (doubting.pace, doubting.dwell) == (
        max(fps, 7.5),
        60 * max(fps, 7.5),
    )  # a second, a minute; longer below 7.5 a second
    assert (run.window, run.hop) == (75, 50)
    assert run.model.config["memory"] == [2.0, 8.0, 32.0]
    assert read_config(path).window is None
    assert cli.main(["evaluate", "--run", str(path), "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    result = json.loads((path / "evaluation-validation.json").read_text())
    fused = result["scores"]["fused"]
    scored = ["CCC_V", "CCC_A"] if "valence" in targets else []
    assert list(fused) == [*scored, *(f"CCC_{name}" for name in list(targets)[len(scored) :]), "P"]
    assert fused["P"] == pytest.approx(np.mean(list(fused.values())[:-1]))
    assert fused["P"] > 0.6
    assert result["targets"] == {name: list(map(float, r)) for name, r in targets.items()}
    assert all(name in out for name in fused)
    header = (path / "log.csv").read_text().splitlines()[0].split(",")
    assert [name for name in header if name.startswith("val_")] == [f"val_{name}" for name in fused]
    assert (tmp_path / "training.png").exists()
    assert len(list(tmp_path.glob("video-*.png"))) == 2


def test_predictions_are_a_table_in_the_targets_own_units(trained, tmp_path, capsys):
    root, path, targets, fps = trained
    out = tmp_path / "said.csv"
    assert cli.main(["predict", "--run", str(path), "--split", "validation", "--out", str(out)]) == 0
    with open(out) as file:
        rows = list(csv.DictReader(file))
    run, clips = Run.load(path), AffWild2(root, "validation")
    weights = [f"{what} {name}" for what in ("weight", "confidence") for name in run.names]
    assert list(rows[0]) == ["video", "frame", "time", *targets, *weights]
    assert len(rows) == sum(clip.num_frames for clip in clips)
    got = np.array([[float(row[name]) for name in targets] for row in rows])
    want = np.concatenate([unscaled(run.predict(clip).prediction, run.targets) for clip in clips])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    low, high = np.array(list(targets.values()), float).T
    assert (got >= low).all()
    assert (got <= high).all()
    assert float(rows[1]["time"]) == pytest.approx(1 / fps, rel=1e-5)
    assert [row["frame"] for row in rows[:2]] == ["1", "2"]
    assert cli.main(["predict", "--run", str(path), "--out", str(tmp_path / "test.csv")]) == 2
    assert "expected a sample file, annotations in Test_Set, or an index.json" in capsys.readouterr().err


def test_streams(trained, tmp_path, capfd):
    """Frame by frame as the offline model, in the targets' own units; truth and concordance with --labels."""
    root, path, targets, _ = trained
    run, clip = Run.load(path), AffWild2(root, "validation")[0]
    want = unscaled(run.predict(clip).prediction, run.targets)
    lines = []
    for t in range(clip.num_frames):
        rows = {name: clip.features[name][t] for name in run.names}
        lines.append(json.dumps({name: None if np.isnan(row).any() else row.tolist() for name, row in rows.items()}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    labels = root / "annotations" / "Validation_Set" / f"{clip.name}.txt"
    report = ["--labels", str(labels), "--report", str(tmp_path / "report")]
    assert cli.main(["stream", "--run", str(path), "--input", str(tmp_path / "in.jsonl"), *report]) == 0
    out, err = capfd.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    got = np.array([[answer["prediction"][name] for name in targets] for answer in answers])
    span = np.array([high - low for low, high in targets.values()])
    assert (np.abs(got - want) / span).max() < 1e-5
    known = unscaled(clip.labels, run.targets)
    for t, answer in enumerate(answers):
        assert (answer["truth"] is not None) == clip.valid[t]
        if clip.valid[t]:
            assert np.abs((np.array(list(answer["truth"].values())) - known[t]) / span).max() < 1e-5
    assert set(answers[-1]["ccc"]) == set(targets)
    assert "CCC, last 75" in err
    assert (tmp_path / "report" / "session.png").exists()


@pytest.mark.slow
def test_compare_with_folds_of_groups(tmp_path, capsys):
    """Every group whole on one side, every clip scored once; the table of folds is what the rows of each fold give."""
    targets, fps, modalities = SECONDS
    root = write(tmp_path / "data", {"stress": targets["stress"]}, fps, modalities, videos=7, frames=120)
    groups = {f"rec{v}": f"p{v // 2}" for v in range(7)}
    (root / "groups.json").write_text(json.dumps({"person": groups}))
    out = tmp_path / "study"
    options = [
        "--methods", "sage,concat,sound-only", "--folds", "3", "--group", "person", "--seeds", "1", "--lr", "3e-3",
        "--corruptions", "noise,foreign", "--severities", "3", "--dim", "8", "--blocks", "2", "--stages", "2",
        "--reliability-rate", "3", "--max-steps", "6", "--window", "40", "--batch-size", "2", "--draws", "50", "--quiet",
    ]  # fmt: skip
    assert cli.main(["compare", "--data", str(root), "--out", str(out), *options]) == 0
    text = capsys.readouterr().out
    assert "By fold" in text
    assert "CCC_stress" in (out / "results.csv").read_text().splitlines()[0]
    scored = []
    for k in (1, 2, 3):
        sides = [AffWild2(out / f"fold-{k}", split) for split in ("train", "validation", "test")]
        people = [{groups[name] for name in side.names} for side in sides]
        assert all(people)
        assert sum(map(len, people)) == len(set().union(*people))
        assert sum(len(side) for side in sides) == 7
        scored += sides[2].names
        config = read_config(out / "runs" / "sage" / f"fold-{k}-seed-0-lr-0.003")
        assert (config.reliability_rate, config.stages, config.window) == (3.0, 2, 40.0)
        assert config.data == str(out / f"fold-{k}")
    assert sorted(scored) == sorted(groups)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")}
    assert cli.main(["compare", "--data", str(root), "--out", str(out), *options]) == 0  # read, not done again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert cli.main(["compare", "--data", str(root), "--out", str(tmp_path / "b"), *options, "--folds", "5"]) == 2
    assert "folds: expected at most as many as there are groups of videos" in capsys.readouterr().err
    assert cli.main(["compare", "--data", str(root), "--out", str(tmp_path / "c"), *options, "--methods", "jca"]) == 2
    assert "got jca: defined for two modalities, of which there are 3 here" in capsys.readouterr().err
    two = ["--modalities", "sound,picture", "--methods", "jca"]
    assert cli.main(["compare", "--data", str(root), "--out", str(tmp_path / "d"), *options, *two]) == 0


def test_what_does_not_fit_is_said(tmp_path, capsys):
    """By train, by evaluate and by compare; of many the first few."""
    targets, fps, modalities = HOURLY
    root = write(tmp_path / "data", targets, fps, modalities, videos=9, frames=90)
    for path in (root / "features" / "watch").glob("*.npy"):
        np.save(path, np.load(path)[:70])
    (root / "annotations" / "Train_Set" / "notes.csv").write_text("x\n")
    options = ["--dim", "8", "--blocks", "1", "--max-steps", "2", "--batch-size", "2"]
    run = str(tmp_path / "run")
    assert cli.main(["train", "--data", str(root), "--run", run, *options]) == 0
    err = capsys.readouterr().err
    assert "look at this: " in err
    assert "not read, for they do not end in .txt: notes.csv" in err
    assert "more, which sage-ext check lists" in err
    assert cli.main(["evaluate", "--run", run]) == 0
    assert "is their rate" in capsys.readouterr().err
    (root / "fps.json").write_text(json.dumps(fps * 2))
    assert cli.main(["evaluate", "--run", run, "--data", str(root)]) == 0
    said = " ".join(json.loads((tmp_path / "run" / "evaluation-validation.json").read_text())["mismatches"])
    assert f"frames come at {2 * fps:g} a second" in said


@pytest.mark.slow
def test_what_does_not_fit_is_said_by_compare(tmp_path, capsys):
    """Also what it leaves out: one video gives no donors."""
    targets, fps, modalities = HOURLY
    root = write(tmp_path / "data", targets, fps, modalities, videos=5, frames=90)
    (root / "annotations" / "Train_Set" / "notes.csv").write_text("x\n")
    options = ["--dim", "8", "--blocks", "1", "--max-steps", "2", "--batch-size", "2"]
    study = ["--methods", "sage", "--seeds", "1", "--lr", "1e-3", "--severities", "1", *options]
    kinds = ["--corruptions", "noise"]
    assert cli.main(["compare", "--data", str(root), "--out", str(tmp_path / "study"), *study, *kinds]) == 0
    err = capsys.readouterr().err
    assert "look at this: " in err
    assert "not read, for they do not end in .txt: notes.csv" in err
    kinds = ["--corruptions", "foreign"]
    assert cli.main(["compare", "--data", str(root), "--out", str(tmp_path / "b"), *study, *kinds]) == 2
    assert "corruptions: expected none of foreign: each takes another video for donor" in capsys.readouterr().err


def small(root, run, *options):
    """A training of two steps."""
    return cli.main(["train", "--data", str(root), "--run", str(run), "--dim", "8", "--blocks", "1", "--max-steps", "2",
                     "--batch-size", "2", "--threads", "1", "--quiet", *options])  # fmt: skip


def test_features_in_another_order_are_refused(tmp_path, capsys):
    targets, fps, modalities = HOURLY
    root = write(tmp_path / "data", targets, fps, modalities, videos=4, frames=90)
    meta = root / "features" / "watch" / "meta.json"
    meta.write_text(json.dumps({"columns": list("abcdef")}))
    assert small(root, tmp_path / "run") == 0
    assert Run.load(tmp_path / "run").columns == {"watch": list("abcdef")}
    assert cli.main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    meta.write_text(json.dumps({"columns": list("abdcef")}))
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(tmp_path / "run")]) == 2
    assert "in their order, got 'd' in place of 'c' (column 3)" in capsys.readouterr().err
    meta.write_text(json.dumps({"columns": ["a"]}))
    assert cli.main(["evaluate", "--run", str(tmp_path / "run")]) == 2
    assert "meta.json: columns: expected 6 names, as many as features, got 1" in capsys.readouterr().err


def test_a_modality_that_no_validation_video_has(tmp_path, capsys):
    """Training, calibration and scores go on; its own row says nothing."""
    targets, fps, modalities = HOURLY
    root = write(tmp_path / "data", targets, fps, modalities, videos=4, frames=90)
    for path in (root / "annotations" / "Validation_Set").glob("*.txt"):
        features = root / "features" / "diary" / f"{path.stem}.npy"
        np.save(features, np.full_like(np.load(features), np.nan))
    assert small(root, tmp_path / "run") == 0
    assert cli.main(["evaluate", "--run", str(tmp_path / "run"), "--report", str(tmp_path / "report")]) == 0
    result = json.loads((tmp_path / "run" / "evaluation-validation.json").read_text())
    assert result["calibration_error"]["after"]["diary"] is None
    assert result["calibration_error"]["after"]["watch"] >= 0
    assert (tmp_path / "report" / "reliability.png").exists()


def test_a_split_without_annotations_is_said_before_training(tmp_path, capsys):
    targets, fps, modalities = SECONDS
    root = write(tmp_path / "data", targets, fps, modalities, videos=4, frames=60)
    for path in (root / "annotations" / "Train_Set").glob("*.txt"):  # never all at once
        path.write_text(",".join(targets) + "\n" + "5,,,,\n,5,,,\n" * 30)
    assert small(root, tmp_path / "run") == 2
    assert "expected annotated frames in the train split, got none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_of_a_stream_are_read_by_name(trained, tmp_path, capfd):
    """Columns in another order, and others beside them."""
    root, path, targets, _ = trained
    clip = AffWild2(root, "validation")[0]
    (tmp_path / "in.jsonl").write_text("{}\n" * 3)
    order = ["note", *reversed(targets)]
    values = {name: round(low + 0.25 * (high - low), 3) for name, (low, high) in targets.items()}
    row = ",".join("x" if name == "note" else str(values[name]) for name in order)
    (tmp_path / "labels.txt").write_text("\n".join([",".join(order), row, row, row]) + "\n")
    options = ["--input", str(tmp_path / "in.jsonl"), "--labels", str(tmp_path / "labels.txt")]
    assert cli.main(["stream", "--run", str(path), *options]) == 0
    answer = json.loads(capfd.readouterr().out.splitlines()[0])
    assert answer["truth"] == pytest.approx(values, rel=1e-5)
    assert list(answer["truth"]) == list(targets)
    assert clip.targets == Run.load(path).targets


def test_predictions_keep_their_digits(tmp_path):
    """Of a narrow range far from zero; and frames of a long recording have times of their own."""
    root = write(tmp_path / "data", {"kelvin": [100_000, 100_010]}, 30.0, {"a": 3}, videos=4, frames=60)
    assert small(root, tmp_path / "run") == 0
    out = tmp_path / "out.csv"
    assert cli.main(["predict", "--run", str(tmp_path / "run"), "--split", "validation", "--out", str(out)]) == 0
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert len({row["kelvin"] for row in rows}) > 50
    said = {"v": Run.load(tmp_path / "run").predict(AffWild2(root, "validation")[0])}
    long = {"v": type(said["v"])(*(np.repeat(x[:1], 400_000, 0) for x in vars(said["v"]).values()))}
    write_predictions(out, long, {"v": 30.0}, Run.load(tmp_path / "run").targets, ["a"])
    times = [line.split(",")[2] for line in out.read_text().splitlines()[1:]]
    assert len(set(times)) == len(times)


def test_new_data_without_labels(tmp_path, capsys):
    """A table of the same columns in another order, without the target: imported for the run, checked, predicted; and refused
    where a column is missing, or the run does not know its columns."""
    rng = np.random.default_rng(0)

    def table(path, columns, videos, labelled):
        lines = [",".join(["video", "time", *columns, *(["stress"] if labelled else [])])]
        for v in range(videos):
            for t in range(40):
                cells = {name: f"{rng.normal():.4f}" for name in ("a_x", "a_y", "b_z")}
                label = [f"{rng.uniform(0, 9):.3f}"] if labelled else []
                lines.append(",".join([f"v{v}", str(t), *(cells[name] for name in columns), *label]))
        path.write_text("\n".join(lines) + "\n")

    table(tmp_path / "old.csv", ["a_x", "a_y", "b_z"], 4, True)
    table(tmp_path / "new.csv", ["b_z", "a_y", "a_x"], 2, False)
    old, new, run, out = (tmp_path / name for name in ("old", "new", "run", "out.csv"))
    options = ["--targets", "stress", "--range", "stress=0:9"]
    assert cli.main(["import", str(tmp_path / "old.csv"), "--out", str(old), *options]) == 0
    assert small(old, run) == 0
    assert cli.main(["import", str(tmp_path / "new.csv"), "--out", str(new), "--for", str(run)]) == 0
    assert "--for" not in capsys.readouterr().err
    assert cli.main(["check", str(new)]) == 0
    assert "data to predict from, not to train on" in capsys.readouterr().out
    assert cli.main(["predict", "--run", str(run), "--data", str(new), "--out", str(out)]) == 0
    with open(out) as file:
        assert len(list(csv.DictReader(file))) == 80
    clip = AffWild2(new, "test")[0]
    first = (tmp_path / "new.csv").read_text().splitlines()[1].split(",")
    np.testing.assert_allclose(clip.features["a"][0], [float(first[4]), float(first[3])], rtol=1e-6)
    assert not clip.valid.any()
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(run), "--data", str(new), "--split", "test"]) == 2
    assert "split: expected one with annotated frames, got test" in capsys.readouterr().err
    table(tmp_path / "poor.csv", ["b_z", "a_y"], 1, False)
    assert cli.main(["import", str(tmp_path / "poor.csv"), "--out", str(tmp_path / "p"), "--for", str(run)]) == 2
    assert "columns: 'a': expected a column of" in capsys.readouterr().err
    targets, fps, modalities = HOURLY
    root = write(tmp_path / "nameless", targets, fps, modalities, videos=4, frames=60)
    assert small(root, tmp_path / "other") == 0
    assert (
        cli.main(["import", str(tmp_path / "new.csv"), "--out", str(tmp_path / "n"), "--for", str(tmp_path / "other")])
        == 2
    )
    assert "--for: expected a run whose data named their columns" in capsys.readouterr().err


def test_a_submission_is_on_the_challenges_range(tmp_path):
    """Valence and arousal that were annotated from 0 to 10 are written from -1 to 1."""
    root = write(tmp_path / "data", {"valence": [0, 10], "arousal": [0, 10]}, 30.0, {"a": 3}, videos=4, frames=40)
    assert small(root, tmp_path / "run") == 0
    (root / "annotations" / "Test_Set").mkdir()
    rows = [f"rec2/{t:05d}.jpg,0,0" for t in range(1, 41)]
    (root / "sample_submission.txt").write_text("\n".join(["image_location,valence,arousal", *rows]) + "\n")
    out = tmp_path / "out.txt"
    assert cli.main(["predict", "--run", str(tmp_path / "run"), "--out", str(out)]) == 0
    got = np.loadtxt(out, delimiter=",", skiprows=1, usecols=(1, 2))
    want = Run.load(tmp_path / "run").predict(AffWild2(root, "validation")[0]).prediction
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got).max() < 1
