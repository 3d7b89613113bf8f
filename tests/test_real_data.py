"""benchmarks/real on a made-up folder of the film's layout: 120, 90 and 60 seconds that say what is asked of them."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))
import measures
import ridge
import studyforrest
from studyforrest import Task

from sage_ext.data import AffWild2
from sage_ext.study.plan import Study, fold_views, scored_clips

SECONDS = {1: 120, 2: 90, 3: 60}
FIRST = {1: 0, 2: 886, 3: 1753}  # whole seconds of the film
HELD = 8  # seconds of one value of the observers


def write(path: Path, columns: dict[str, np.ndarray], delimiter: str = ",") -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(columns)
        rows.writerows(zip(*(values.tolist() for values in columns.values())))


def film(root: Path, late: float = 0.0) -> Path:
    """Sound and picture follow the arousal that observers mark; `late`: seconds that run 2's sound comes too late."""
    (root / "raw").mkdir(parents=True)
    rng = np.random.default_rng(0)
    tables, observed = [], []
    for run, seconds in SECONDS.items():
        start = studyforrest.STARTS[run - 1]
        arousal, valence = np.repeat(rng.uniform(-1, 1, (2, seconds // HELD + 1)), HELD, axis=1)[:, :seconds]
        onset = np.arange(25 * (seconds + 20)) / 25  # the files run on into the next run
        second = np.floor(onset + start - FIRST[run] + 1e-6).astype(int)
        place = np.clip(second, 0, seconds - 1)
        rms = 0.05 * np.exp(arousal[place] + rng.normal(0, 0.3, len(onset)))
        bright = 80 + 40 * valence[place] + rng.normal(0, 5, len(onset))
        if run == 1:
            rms[second == 5], rms[second == 6], bright[second == 7] = 1e-4, 0.3, 2.0
        moved = np.abs(rng.normal(0, 0.1, len(onset)))
        level = 20 * np.log10(rms)
        mean = [np.array([x[second == s].mean() for s in range(seconds)]) for x in (level, bright, moved)]
        delay = late if run == 2 else 0.0
        name = root / "raw" / f"conf_{{}}_run-{run}_events.tsv.gz"
        write(Path(str(name).format("audio")), {"onset": onset + delay, "rms": rms, "lrdiff": 0 * rms}, "\t")
        hidden = {"onset": onset, "brmean": bright, "phash": np.full(len(onset), "0e"), "norm_diff": moved}
        write(Path(str(name).format("visual")), hidden, "\t")
        tables.append(
            {
                "t_s": FIRST[run] + np.arange(seconds), "a_rms_db_mean": mean[0], "run": np.full(seconds, run),
                "v_brmean": mean[1], "v_normdiff_mean": mean[2],
                "l_speech_frac": (rng.uniform(size=seconds) < 0.5).astype(float), "av_arousal": arousal,
                "av_valence": valence, "obs_cue_face": valence,
            }
        )  # fmt: skip
        marks = {
            f"{rater}_{kind}": np.round(np.clip(truth + rng.normal(0, 0.3 * (k + 1), seconds), -1, 1))
            for k, rater in enumerate(("ao1o01", "av1o01", "av1o02", "av1o03"))
            for kind, truth in (("arousal", arousal), ("valence", valence))
        }
        observed.append({"t_s": tables[-1]["t_s"], **marks})
    for name, parts in ((studyforrest.FILM, tables), (studyforrest.OBSERVERS, observed)):
        write(root / name, {column: np.concatenate([part[column] for part in parts]) for column in parts[0]})
    write(root / "raw" / "shots.csv", {"start": np.array([0.0, 30.4, 886.0, 890.9])})
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "data")


def test_the_film_becomes_a_data_set(root, tmp_path):
    studyforrest.make_data(root, tmp_path, Task(quality="none"))
    data = {name: clip for split in ("train", "validation") for clip in AffWild2(tmp_path / "data", split)
            for name in [clip.name]}  # fmt: skip
    assert {name: clip.num_frames for name, clip in data.items()} == {str(r): n for r, n in SECONDS.items()}
    clip = data["2"]
    assert {name: rows.shape[1] for name, rows in clip.features.items()} == {"audio": 1, "picture": 2, "speech": 1}
    assert [target.name for target in clip.targets] == ["valence", "arousal"]
    assert clip.fps == 1
    source = studyforrest.read_columns(root / studyforrest.FILM)
    here = source["run"] == 2
    labels = np.stack([source["av_valence"], source["av_arousal"]], 1)[here]
    np.testing.assert_allclose(clip.labels, labels, atol=1e-6)
    np.testing.assert_allclose(clip.features["picture"][:, 0], source["v_brmean"][here], rtol=1e-6)


def test_quality_of_the_raw_samples(root):
    source = studyforrest.read_film(root)
    found, step = studyforrest.quality_of_run(root, source, 1)
    assert {name: rows.shape for name, rows in found.items()} == {
        name: (SECONDS[1], len(columns)) for name, columns in studyforrest.QUALITY.items()
    }
    assert min(step.values()) > 0.9999
    level, spread, quiet, loud = found["audio"].T
    assert np.flatnonzero(quiet == 1).tolist() == [5]
    assert loud[6] == 1
    np.testing.assert_allclose(level[5], -80, atol=1e-4)
    np.testing.assert_allclose(spread[5], 0, atol=0.01)
    dark, _, still, cut = found["picture"].T
    assert np.flatnonzero(dark == 1).tolist() == [7]
    assert not still.any()
    assert np.flatnonzero(cut).tolist() == [0, 30]
    np.testing.assert_array_equal(found["speech"][:, 0], source["l_speech_frac"][source["run"] == 1])
    later, _ = studyforrest.quality_of_run(root, source, 2)  # its file begins where the film is 886 s old
    assert np.flatnonzero(later["picture"][:, 3]).tolist() == [0, 4]


def test_quality_lies_beside_the_features(root, tmp_path):
    said = studyforrest.make_data(root, tmp_path, Task())
    assert re.fullmatch(r"run 2: audio 1\.0000, visual (1\.0000|0\.99\d\d)", said[-2])
    for name, columns in studyforrest.QUALITY.items():
        folder = tmp_path / "data" / "features" / name
        assert json.loads((folder / "meta.json").read_text())["quality"] == list(columns)
        for run, seconds in SECONDS.items():
            assert np.load(folder / f"{run}.quality.npy").shape == (seconds, len(columns))


@pytest.mark.parametrize("late", [1.0, -2.0])
def test_raw_files_out_of_step_are_refused(tmp_path, late):
    root = film(tmp_path / "film", late)
    source = studyforrest.read_film(root)
    studyforrest.quality_of_run(root, source, 1)
    with pytest.raises(
        ValueError, match=r"conf_audio_run-2_events.tsv.gz: expected samples in step with a_rms_db_mean .* got"
    ):
        studyforrest.quality_of_run(root, source, 2)


def test_labels_are_smoothed_within_a_run_and_noise_is_seeded(root, tmp_path):
    task = Task(noise=3, smooth=5, quality="none")
    assert task.name == "film-noise3-smooth5-quality-none"
    studyforrest.make_data(root, tmp_path / "a", task)
    studyforrest.make_data(root, tmp_path / "a", task)  # in place of the earlier one
    studyforrest.make_data(root, tmp_path / "b", task)
    tables = [(tmp_path / name / "table.csv").read_bytes() for name in "ab"]
    assert tables[0] == tables[1]
    made, source = (studyforrest.read_columns(path) for path in (tmp_path / "a/table.csv", root / studyforrest.FILM))
    np.testing.assert_allclose(made["valence"][119], source["av_valence"][117:120].mean(), atol=1e-6)
    np.testing.assert_allclose(made["valence"][120], source["av_valence"][120:123].mean(), atol=1e-6)
    noise = np.stack([made[f"noise_{k}"] for k in range(studyforrest.NOISE)])
    assert abs(noise.mean()) < 0.1
    assert 0.9 < noise.std() < 1.1


def test_raters_predict_those_left_out(root, tmp_path):
    studyforrest.make_data(root, tmp_path, Task("raters"))
    made, said = (studyforrest.read_columns(path) for path in (tmp_path / "table.csv", root / studyforrest.OBSERVERS))
    np.testing.assert_allclose(made["arousal"], said["av1o03_arousal"])  # the only one of the film who is left
    assert set(AffWild2(tmp_path / "data", "train").modalities) == set(studyforrest.RATERS)
    everybody = ("av1o01", "av1o02", "av1o03")
    with pytest.raises(ValueError, match="raters: expected to leave an observer of the film out, got all"):
        studyforrest.make_data(root, tmp_path, Task("raters", raters=everybody))
    with pytest.raises(
        ValueError, match=r"raters: expected two or more different ones of ao1o01, .*, got nobody, av1o01"
    ):
        studyforrest.make_data(root, tmp_path, Task("raters", raters=("nobody", "av1o01")))


def test_a_file_that_is_not_the_film_is_refused(root, tmp_path):
    (tmp_path / studyforrest.FILM).write_text("t_s,run,av_valence\n0,1,0\n")
    with pytest.raises(ValueError, match="expected the column av_arousal, got t_s, run, av_valence"):
        studyforrest.read_film(tmp_path)
    (tmp_path / studyforrest.FILM).write_text("t_s,run,av_valence,av_arousal\n0,9,0,0\n")
    with pytest.raises(ValueError, match="expected runs 1 to 8, got"):
        studyforrest.read_film(tmp_path)


def test_the_ridge_regression_learns_and_looks_at_the_past_alone(root, tmp_path):
    studyforrest.make_data(root, tmp_path, Task(quality="none"))
    study = Study(str(tmp_path / "data"), ("sage",), folds=3, group="run")
    parts = fold_views(study, tmp_path / "views")
    found = ridge.predictions(parts, ["audio", "picture", "speech"])
    truth = {clip.name: clip for part in parts for clip in scored_clips(part)}
    assert set(found) == set(truth) == {"1", "2", "3"}
    for name, clip in truth.items():
        assert ridge.concordance(found[name], clip.labels).min() > 0.6
    rows = np.random.default_rng(0).normal(size=(50, 2))
    whole, cut = ridge.causal_mean(rows, 8), ridge.causal_mean(rows[:20], 8)
    np.testing.assert_allclose(whole[:20], cut)
    np.testing.assert_allclose(whole[30], rows[23:31].mean(0))
    np.testing.assert_allclose(ridge.causal_mean(rows, 60)[-1], rows.mean(0))


def test_the_scale_of_the_ridge_regression_is_that_of_the_labels(root, tmp_path):
    studyforrest.make_data(root, tmp_path, Task(quality="none"))
    clips = [*AffWild2(tmp_path / "data", "train"), *AffWild2(tmp_path / "data", "validation")]
    fit = ridge.Ridge(clips, clips)
    said, truth = (np.concatenate(x) for x in zip(*((fit.predict(clip), clip.labels) for clip in clips)))
    np.testing.assert_allclose(said.mean(0), truth.mean(0), atol=1e-5)
    np.testing.assert_allclose(said.std(0), truth.std(0), rtol=1e-5)


@pytest.mark.slow
def test_from_the_folder_to_the_tables(root, tmp_path, capsys):
    arguments = [str(root), "--out", str(tmp_path), "--noise-stream", "--quality", "none", "--methods", "sage,concat", "--lr",
                 "2e-3,4e-3", "--seeds", "2", "--max-steps", "2", "--corruptions", "noise", "--processes", "1", "--draws",
                 "50", "--quiet"]  # fmt: skip
    studyforrest.main(arguments)
    printed = capsys.readouterr().out
    for row in ("SAGE", "concatenation", "ridge", "ridge noise", "joint", "audio", "noise"):
        assert re.search(rf"^{row} {{2,}}", printed, re.MULTILINE), printed
    studyforrest.main(arguments)  # a finished study says the same
    assert capsys.readouterr().out == printed
    report = (tmp_path / "film-noise-quality-none" / "report.md").read_text()
    assert measures.REFERENCE == "sage"
    assert "SAGE less this, mean of the folds" in report
