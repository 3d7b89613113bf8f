"""The comparison: its statistics against direct computation, and the whole way on a tiny data set."""

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sage_ext import cli
from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.synthetic import Oracle, oracle_predictions, write_dataset
from sage_ext.functional import ccc_from_moments, ccc_moments, merge_moments
from sage_ext.robustness import Condition, corrupted
from sage_ext.training import compare as study_module
from sage_ext.training import compare_report
from sage_ext.training.compare import (
    ORACLE,
    Study,
    batches,
    calibration_error,
    compare,
    default_methods,
    evaluation_path,
    has_truth,
    predict_batch,
    read_evaluation,
    run_path,
    spoilt,
    tuning_view,
)
from sage_ext.training.compare_report import pooled_diagram
from sage_ext.training.demo import TruthClips
from sage_ext.training.evaluate import predict_clip, score
from sage_ext.training.jobs import Job, Workers
from sage_ext.training.runs import Run
from sage_ext.training.statistics import (
    additive,
    adjusted_mutual_information,
    concordance,
    expected_mutual_information,
    interval,
    mutual_information,
    pooled_score,
    resampled,
)
from sage_ext.training.trainer import RunError, TrainConfig, build_model

SIZES = {"dim": 8, "stages": 2, "blocks": 2, "window": 60, "hop": 40, "batch_size": 4, "max_steps": 6, "epochs": 9}
CORRUPTIONS = ("noise", "dead-zeroed", "foreign", "stage-zeroed", "missing")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare") / "data"
    write_dataset(root, seed=5, train=6, validation=4, test=5, frames=(90, 200), modalities={"audio": 12, "visual": 16})
    return root


def tiny(data, **changes):
    values = {
        "methods": ("sage", "concat", "audio-only", "visual-only"), "seeds": 2, "rates": (2e-3, 5e-3),
        "severities": (5,), "corruptions": CORRUPTIONS, "train": SIZES,
    }  # fmt: skip
    return Study(str(data), **{**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A study carried through, and its tables."""
    out = tmp_path_factory.mktemp("compare") / "study"
    return out, compare(tiny(data), out, processes=2, draws=200, quiet=True)


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures: they take longer than a tiny study."""
    monkeypatch.setattr(compare_report, "pictures", lambda scores: [])


def rows_of(out):
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------------- statistics
def some_moments(rng, videos=5, lead=()):
    """Predictions and labels of videos of different lengths, and their moments (videos, *lead, 2, 6)."""
    pairs, moments = [], []
    for _ in range(videos):
        frames = int(rng.integers(5, 40))
        target = rng.uniform(-1, 1, (frames, 2))
        pred = np.clip(target + rng.normal(0, 0.4, (*lead, frames, 2)) + 0.1, -1, 1)
        pairs.append((pred, target))
        flat = torch.from_numpy(pred.reshape(-1, frames, 2))
        same = torch.from_numpy(target).expand(len(flat), frames, 2)
        moments.append(ccc_moments(flat, same, pool="sequence").numpy().reshape(*lead, 2, 6))
    return pairs, np.stack(moments)


def test_sums_of_videos_give_what_merged_moments_give():
    _, moments = some_moments(np.random.default_rng(0))
    merged = torch.from_numpy(moments[0])
    for more in moments[1:]:
        merged = merge_moments(merged, torch.from_numpy(more))
    np.testing.assert_allclose(concordance(additive(moments).sum(0)), ccc_from_moments(merged).numpy(), atol=1e-13)


def test_a_draw_of_the_bootstrap_is_the_score_of_the_videos_drawn():
    rng = np.random.default_rng(1)
    pairs, moments = some_moments(rng, videos=6, lead=(3,))
    weights = resampled(list("abcdef"), 20, rng)
    found = pooled_score(moments, weights)
    assert found.shape == (20, 3)
    for r, m in itertools.product(range(20), range(3)):
        drawn = np.repeat(np.arange(6), weights[r].astype(int))
        pred = np.concatenate([pairs[v][0][m] for v in drawn])
        target = np.concatenate([pairs[v][1] for v in drawn])
        covariance = ((pred - pred.mean(0)) * (target - target.mean(0))).mean(0)
        direct = 2 * covariance / (pred.var(0) + target.var(0) + (pred.mean(0) - target.mean(0)) ** 2)
        assert found[r, m] == pytest.approx(direct.mean(), abs=1e-12)


def test_the_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    _, moments = some_moments(rng, videos=25)

    def pooled(index, axis=-1):  # index (..., 25) of videos
        weights = np.apply_along_axis(lambda i: np.bincount(i.astype(int), minlength=25), -1, np.atleast_2d(index))
        found = pooled_score(moments, weights.astype(float))
        return found if np.ndim(index) > 1 else found[0]

    theirs = stats.bootstrap(
        (np.arange(25),), pooled, n_resamples=3000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    ours = interval(pooled_score(moments, resampled([str(v) for v in range(25)], 3000, rng)))
    # two independent sets of 3000 draws: the standard error of a 2.5 % quantile is about 0.013 of the spread each
    spread = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.06 * spread)


def test_persons_of_one_video_are_drawn_together():
    weights = resampled(["a", "b", "a", "c"], 500, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert set(np.unique(weights)) == {0, 1, 2, 3}


def test_concordance_is_zero_where_not_defined_and_nan_where_unknown():
    target = torch.tensor([[0.3, -0.2]] * 5)
    constant = ccc_moments(target, target).numpy()
    assert concordance(additive(constant)).tolist() == [0, 0]
    assert concordance(np.zeros((3, 6))).tolist() == [0, 0, 0]
    assert np.isnan(concordance(np.full((2, 6), np.nan))).all()


def brute_expected_mutual_information(rows, columns):
    """The mean over all arrangements of the second labelling."""
    a = np.repeat(np.arange(len(rows)), rows)
    arrangements = Counter(itertools.permutations(np.repeat(np.arange(len(columns)), columns).tolist()))
    total = 0.0
    for b, count in arrangements.items():
        table = np.zeros((len(rows), len(columns)), int)
        np.add.at(table, (a, np.array(b)), 1)
        total += count * mutual_information(table)
    return total / sum(arrangements.values())


@pytest.mark.parametrize(
    ("rows", "columns"), [((2, 2), (2, 2)), ((3, 2, 2), (4, 3)), ((1, 5), (2, 2, 2)), ((7,), (7,))]
)
def test_expected_mutual_information_is_the_mean_over_all_arrangements(rows, columns):
    found = expected_mutual_information(np.array(rows), np.array(columns))
    assert found == pytest.approx(brute_expected_mutual_information(rows, columns), abs=1e-12)


def test_adjusted_mutual_information_by_hand():
    # 2 + 2 frames, every cell 1: MI = 0; of the 6 arrangements 2 have MI = log 2, so E = log(2) / 3, H = log 2
    assert adjusted_mutual_information(np.array([[1, 1], [1, 1]])) == pytest.approx(-1 / 2)
    assert adjusted_mutual_information(np.array([[2, 0], [0, 2]])) == 1
    # rows 3, 1 and columns 2, 2: MI of either possible table is the same, so chance explains all of it
    assert adjusted_mutual_information(np.array([[2, 1], [0, 1]])) == pytest.approx(0, abs=1e-12)
    assert adjusted_mutual_information(np.array([[4]])) == 1
    assert adjusted_mutual_information(np.array([[4, 4]])) == 0
    relabelled = np.array([[0, 9, 1], [8, 0, 0], [1, 0, 7]])
    assert adjusted_mutual_information(relabelled) == pytest.approx(
        adjusted_mutual_information(relabelled[[1, 0, 2]].T)
    )
    independent = np.random.default_rng(0).multinomial(3000, np.outer([0.5, 0.3, 0.2], [0.6, 0.4]).ravel())
    assert abs(adjusted_mutual_information(independent.reshape(3, 2))) < 0.005
    for bad in (np.zeros((2, 2)), np.array([[1.5]]), np.array([1, 2]), np.array([[-1, 2]])):
        with pytest.raises(ValueError, match="table"):
            adjusted_mutual_information(bad)


def test_calibration_error_and_pooled_diagrams():
    diagram = np.array([[0.2, 0.6, np.nan], [0.3, 0.5, np.nan], [10, 30, np.nan]])
    assert calibration_error(diagram) == pytest.approx(0.1)
    assert np.isnan(calibration_error(np.full((2, 3, 4), np.nan))).all()
    rng = np.random.default_rng(0)
    many = np.stack([rng.uniform(0, 1, (4, 15)), rng.uniform(0.1, 0.9, (4, 15)), np.full((4, 15), 20.0)], 1)
    x, y, frames = pooled_diagram(many)
    assert frames.tolist() == [80] * 15
    assert (np.diff(x) > 0).all()
    assert (frames * x).sum() == pytest.approx((many[:, 0] * many[:, 2]).sum())
    assert (frames / y).sum() == pytest.approx((many[:, 2] / many[:, 1]).sum())  # mean squared errors are averaged


# ----------------------------------------------------------------------------------------------------------------- jobs
def _answer(value):
    return value, os.environ["OMP_NUM_THREADS"]


def _fail(kind):
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no such thing") if kind == "mistake" else AssertionError("a bug")


def test_a_job_that_fails_costs_only_itself():
    jobs = [Job("one", _answer, (1,)), *(Job(kind, _fail, (kind,)) for kind in ("killed", "mistake", "bug"))]
    jobs += [Job(str(i), _answer, (i,)) for i in range(3)]
    before = os.environ.get("OMP_NUM_THREADS")
    with Workers(1) as workers:
        outcomes = {outcome.job.name: outcome for outcome in workers.run(jobs)}
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert len(outcomes) == len(jobs)
    for i in range(3):
        assert outcomes[str(i)].value == (i, "1")
        assert outcomes[str(i)].error is None
    assert "SIGKILL" in outcomes["killed"].error
    assert outcomes["mistake"].error == "no such thing"
    assert "Traceback" in outcomes["bug"].error
    with pytest.raises(ValueError, match="processes"):
        Workers(0)


# --------------------------------------------------------------------------------------------------------- whole studies
def test_results_are_those_of_the_public_evaluation(finished, data):
    """Every number in the file again, video by video, with what the command line uses."""
    out, _ = finished
    rates = {path.parent.name: float(path.name.rpartition("-lr-")[2]) for path in out.glob("runs/*/seed-1-*")}
    rows = {(row["method"], row["seed"], row["condition"]): row for row in rows_of(out)}
    conditions = [None, Condition("noise", 5, ("audio",)), Condition("stage-zeroed", 5, ("visual", "audio"))]
    clean = list(TruthClips(data))
    stages = {clip.name: np.load(data / "truth" / f"{clip.name}.npz")["stage"] for clip in clean}
    for method, condition in itertools.product(rates, conditions):
        run = Run.load(run_path(out, method, 1, rates[method]))
        seen = clean if condition is None else corrupted(clean, condition, 1, stages=stages)
        clips = list(seen)
        said = {clip.name: run.predict(clip).prediction for clip in clips}
        found = score(said, clips)
        row = rows[method, "1", "clean" if condition is None else condition.name]
        for key in ("CCC_V", "CCC_A", "P"):
            assert float(row[key]) == pytest.approx(found[key], abs=2e-6)


def test_every_method_seed_and_condition_has_a_row(finished):
    out, tables = finished
    rows = rows_of(out)
    # noise: audio, visual, both; dead-zeroed, foreign, missing: each; stage-zeroed: both orders; and clean
    assert len(rows) == 5 * 2 * (3 + 2 + 2 + 2 + 2 + 1)
    blank = {row["condition"] for row in rows if row["P"] == ""}
    assert blank == {"noise-5-audio+visual"}
    assert {row["method"] for row in rows if row["P"] == ""} == {ORACLE}
    for row in rows:
        if row["P"]:
            assert float(row["P"]) == pytest.approx((float(row["CCC_V"]) + float(row["CCC_A"])) / 2, abs=1e-6)
    titles = [table.title for table in tables]
    for wanted in ("Methods", "Claims", "By corruption", "SAGE against the best peer", "Calibration error by corruption",
                   "Confidence and stages against the truth, clean"):  # fmt: skip
        assert wanted in titles
    assert "By severity" not in titles  # there is one
    text = (out / "report.md").read_text()
    assert all(f"## {title}\n" in text for title in titles)
    for picture in ("methods", "differences", "corruptions", "calibration", "calibration-corruptions", "stages"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({picture}.png)" in text
    assert not list(out.rglob(".*.tmp"))


def test_methods_share_budget_data_and_grid_and_the_rate_has_the_best_validation(finished, data):
    out, tables = finished
    methods = tiny(data).methods
    configs = {}
    for method in methods:
        tried = sorted(path.name for path in (out / "runs" / method).iterdir())
        assert sum(name.startswith("seed-0-") for name in tried) == 2
        (later,) = (name for name in tried if name.startswith("seed-1-"))
        p = {name: json.loads((out / "runs" / method / name / "result.json").read_text())["P"] for name in tried}
        assert later.replace("seed-1-", "seed-0-") == max(tried[:2], key=p.__getitem__)
        values = json.loads((out / "runs" / method / later / "config.json").read_text())["train"]
        configs[method] = {k: v for k, v in values.items() if k not in ("lr", "fusion", "modalities")}
    assert all(values == configs["sage"] for values in configs.values())
    overview = {row[0]: row for row in tables[0].rows}
    assert overview["SAGE"][-1] == ""
    assert "[" in overview["concatenation"][-1]


def test_the_tables_are_means_and_differences_of_the_rows(finished):
    out, tables = finished
    p: dict[tuple[str, str, str], list[float]] = {}
    for row in rows_of(out):
        if row["P"]:
            p.setdefault((row["method"], row["corruption"], row["modalities"]), []).append(float(row["P"]))

    def mean(method, kind, *modalities):
        found = [v for key, v in p.items() if key[:2] == (method, kind) and (not modalities or key[2] in modalities)]
        return np.mean(found)

    def first(cell):
        return float(cell.split()[0])

    table = {title.title: {row[0]: row for row in title.rows} for title in tables}
    everywhere = {m: np.mean([mean(m, kind) for kind in CORRUPTIONS]) for m in ("sage", "concat", "audio-only")}
    for name, method in (("SAGE", "sage"), ("concatenation", "concat"), ("audio only", "audio-only")):
        row = table["Methods"][name]
        assert first(row[3]) == pytest.approx(mean(method, ""), abs=6e-4)
        assert first(row[3].partition("±")[2]) == pytest.approx(np.std(p[method, "", ""], ddof=1), abs=6e-4)
        assert first(row[4]) == pytest.approx(everywhere[method], abs=6e-4)
        if method != "sage":
            assert first(row[6]) == pytest.approx(everywhere["sage"] - everywhere[method], abs=6e-4)
            low, high = (float(x) for x in row[6].partition("[")[2].rstrip("]").split(","))
            assert low <= first(row[6]) <= high
            assert low < high
        assert first(table["By corruption"][name][3]) == pytest.approx(mean(method, CORRUPTIONS[2]), abs=6e-4)
    dead = "one dead for the whole clip"
    (claim,) = (row for name, row in table["Claims"].items() if "surviving" in name and dead in name)
    gaps = [mean("sage", "dead-zeroed", m) - mean(f"{other}-only", "dead-zeroed", m)
            for m, other in (("audio", "visual"), ("visual", "audio"))]  # fmt: skip
    assert first(claim[1]) == pytest.approx(np.mean(gaps), abs=6e-4)
    assert claim[3] == ("met" if np.mean(gaps) >= -0.02 else "missed")
    # concat to oracle where there is one and frames hit are empty: not with noise
    known = {kind: [m for (name, k, m) in p if name == ORACLE and k == kind] for kind in CORRUPTIONS}
    assert set(known.pop("noise")) == {"audio", "visual"}
    sage, concat, oracle = (
        np.mean([np.mean([mean(name, kind, m) for m in known[kind]]) for kind in known])
        for name in ("sage", "concat", ORACLE)
    )
    (share,) = (row for name, row in table["Claims"].items() if name.startswith("share of the gap"))
    assert first(share[1]) == pytest.approx((sage - concat) / (oracle - concat), abs=2e-3)


def test_a_finished_study_is_read_not_done_again_and_grows(finished, data, tmp_path, undrawn):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    before = {path: path.stat().st_mtime_ns for path in [*out.glob("runs/*/*/*"), *out.glob("evaluations/*/*")]}
    table = (out / "results.csv").read_bytes()
    compare(tiny(data), out, processes=1, draws=50, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "results.csv").read_bytes() == table
    compare(tiny(data, methods=(*tiny(data).methods, "uniform")), out, processes=1, draws=50, quiet=True)
    grown = rows_of(out)
    assert [row for row in grown if row["method"] != "uniform"] == list(csv.DictReader(table.decode().splitlines()))
    assert len([row for row in grown if row["method"] == "uniform"]) == 24
    held = read_evaluation(evaluation_path(out, 0, None))
    assert set(held) == {*tiny(data).methods, "uniform", ORACLE}
    assert held["sage"]["contingency"].sum() == sum(clip.num_frames for clip in TruthClips(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {**SIZES, "dim": 9}}, "dim 8 -> 9"),
        ({"rates": (1e-3,)}, "rates"),
        ({"tuning_seeds": 2}, "tuning_seeds 1 -> 2"),
    ],
)
def test_another_configuration_is_refused_by_name(finished, data, change, message):
    with pytest.raises(RunError, match="another configuration") as error:
        compare(tiny(data, **change), finished[0], processes=1, quiet=True)
    assert message in str(error.value)
    assert json.loads((finished[0] / "study.json").read_text())["dim"] == 8


def test_other_data_and_another_process_are_refused(finished, tmp_path, data):
    other = tmp_path / "data"
    write_dataset(
        other, seed=6, train=4, validation=2, test=2, frames=(90, 120), modalities={"audio": 12, "visual": 16}
    )
    with pytest.raises(RunError, match="shape"):
        compare(tiny(other), finished[0], processes=1, quiet=True)
    with (
        study_module._alone(finished[0]),
        pytest.raises(RunError, match="another process"),
    ):
        compare(tiny(data), finished[0], processes=1, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        compare(tiny(data), tmp_path / "mine", processes=1, quiet=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


KILLED = """
import sys
from test_compare import compare, tiny
if __name__ == "__main__":
    compare(tiny(sys.argv[1]), sys.argv[2], processes=1, quiet=True)
"""


@pytest.mark.slow
def test_a_study_that_is_killed_continues_to_the_same_results(finished, data, tmp_path, undrawn):
    """The parent and all it started get no chance to clean up; what they left is continued."""
    out, script = tmp_path / "study", tmp_path / "killed.py"
    script.write_text(KILLED)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, script, data, out], env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 60
    while len(list(out.glob("runs/*/*/result.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = len(list(out.glob("runs/*/*/result.json")))
    assert 2 <= done < 12
    time.sleep(0.5)  # the worker notices that its parent is gone
    assert len(list(out.glob("runs/*/*/result.json"))) <= done + 1
    compare(tiny(data), out, processes=1, draws=50, quiet=True)
    assert (out / "results.csv").read_bytes() == (finished[0] / "results.csv").read_bytes()


def _broken(config, path):
    if config.fusion == "concat" and config.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return study_module.train_one(config, path)


@pytest.mark.slow
def test_a_method_that_crashes_is_named_and_the_others_are_reported(data, tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(study_module, "train_one", _broken)
    study = tiny(data, methods=("concat", "sage"), rates=(2e-3,), corruptions=("dead-zeroed",))
    with pytest.raises(RunError, match=r"1 methods failed.*concat, seed 1, rate 0\.002.*SIGKILL"):
        compare(study, tmp_path / "study", processes=1, draws=20, quiet=True)
    assert {row["method"] for row in rows_of(tmp_path / "study")} == {"sage", ORACLE}


# --------------------------------------------------------------------------------------------------- data without truth
def test_licensed_data_are_scored_on_validation_and_tuned_on_held_out_training_videos(data, tmp_path, undrawn):
    """The exact layout of Aff-Wild2 and nothing else: no truth, no labels of the test split."""
    root = tmp_path / "Aff-Wild2"
    shutil.copytree(data, root)
    shutil.rmtree(root / "truth")
    assert not has_truth(root)
    assert has_truth(data)
    out = root / "study"  # even there
    study = tiny(root, methods=("sage", "concat"), seeds=1, rates=(2e-3,), corruptions=("missing",))
    tables = compare(study, out, processes=1, draws=20, quiet=True)
    rows = rows_of(out)
    assert {row["method"] for row in rows} == {"sage", "concat"}
    view = {split: AffWild2(out / "data", split) for split in ("train", "validation")}
    whole = AffWild2(root, "train")
    assert sorted(view["train"].names + view["validation"].names) == whole.names
    assert view["validation"].names
    assert view["train"].modalities == whole.modalities
    bare = [{name.removesuffix("_left").removesuffix("_right") for name in view[split].names} for split in view]
    assert not bare[0] & bare[1]
    for split in view:
        for clip in view[split]:
            theirs = whole[whole.names.index(clip.name)]
            np.testing.assert_array_equal(clip.labels, theirs.labels)
            np.testing.assert_array_equal(clip.features["audio"][:], theirs.features["audio"][:])
    run = Run.load(run_path(out, "sage", 0, 2e-3))
    clips = list(AffWild2(root, "validation"))
    expected = score({clip.name: run.predict(clip).prediction for clip in clips}, clips)["P"]
    assert float(rows[0]["P"]) == pytest.approx(expected, abs=2e-6)
    assert run.data == str(out / "data")
    titles = [table.title for table in tables]
    assert "Calibration error by most probable stage, clean" in titles
    assert "Scored on the validation split" in (out / "report.md").read_text()
    assert tuning_view(root, out / "data") == out / "data"  # again: the same


def test_the_view_keeps_faces_rates_and_persons(tmp_path):
    """What lies beside features and annotations: images that say where there is a face, frame rates, two persons."""
    root, out = tmp_path / "data", tmp_path / "study" / "data"
    write_dataset(root, seed=2, train=10, validation=1, test=0, frames=(40, 60), images=True)
    (root / "fps.json").write_text(json.dumps({"train-000": 25.0}))
    whole = AffWild2(root, "train")
    assert any(name.endswith("_left") for name in whole.names)
    out.parent.mkdir()
    tuning_view(root, out)
    parts = [AffWild2(out, split) for split in ("train", "validation")]
    assert [len({n.partition("_")[0] for n in part.names}) for part in parts] == [7, 2]  # a fifth of nine videos
    absent = 0
    for part in parts:
        for clip in part:
            theirs = whole[whole.names.index(clip.name)]
            np.testing.assert_array_equal(clip.present["visual"], theirs.present["visual"])
            absent += int((~clip.present["visual"]).sum())
            assert part.fps(clip.name) == whole.fps(clip.name)
    assert absent
    for part in parts:
        assert {n.replace("_left", "_right") for n in part.names if n.endswith("_left")} <= set(part.names)
    assert not any((out / name).exists() for name in ("6th ABAW Annotations",))


def test_tuning_needs_two_videos(data, tmp_path):
    root = tmp_path / "one"
    write_dataset(root, train=1, validation=1, test=0, frames=(90, 100))
    with pytest.raises(ValueError, match="two training videos"):
        tuning_view(root, tmp_path / "view")


# ------------------------------------------------------------------------------------------------------ parts of a study
@pytest.mark.parametrize(
    ("fusion", "causal"), [("reliability", True), ("reliability", False), ("late", True), ("jca", True), ("mult", True)]
)
def test_clips_side_by_side_get_what_each_gets_alone(data, fusion, causal, monkeypatch):
    """Causal in chunks, centred, and fusions that see the whole window, one of them of fixed length; of the clips some
    are shorter than a window."""
    monkeypatch.setattr(study_module, "_FRAMES", 400)
    monkeypatch.setattr(study_module, "_CHUNK", 50)
    config = TrainConfig(
        str(data), fusion=fusion, dim=8, stages=2, blocks=2, causal=causal, window=120, hop=70, threads=1
    )
    model = build_model(config, {"audio": 12, "visual": 16}).eval()
    run = Run(data, model, ["audio", "visual"], str(data), 120, 70, 0, 0, None, "cpu")
    clips = list(TruthClips(data))
    lengths = [clip.num_frames for clip in clips]
    seen = []
    for batch in batches(clips, lengths, ["audio", "visual"]):
        assert len(batch.places) * max(batch.lengths) <= 400 or len(batch.places) == 1
        said = predict_batch(run, batch)
        for b, place in enumerate(batch.places):
            alone = predict_clip(model, clips[place], run.names, window=120, hop=70).prediction
            np.testing.assert_allclose(said[b, : lengths[place]].numpy(), alone, atol=2e-6)
            seen.append(place)
    assert sorted(seen) == list(range(len(clips)))
    assert min(lengths) < 120 < max(lengths)


def test_the_oracle_takes_what_was_spoilt_as_absent(data):
    clips = list(TruthClips(data))
    oracle = Oracle(data)
    for name, plain in oracle_predictions(data, "test").items():
        np.testing.assert_array_equal(oracle.predict(name), plain)
    clip = clips[0]
    frozen = corrupted(clips, Condition("dead-zeroed", 3, ("visual",)), 0)[0]
    bad = spoilt(clip, frozen)
    present = np.asarray(clip.present["visual"])
    assert not bad[:, 0].any()
    first = int(np.argmax(bad[:, 1]))
    assert first > 0
    assert (bad[first:, 1] == present[first:]).all()  # what was absent before is not spoilt
    without = oracle.predict(clip.name, bad)
    np.testing.assert_array_equal(without[: first - 50], oracle.predict(clip.name)[: first - 50])
    assert np.abs(without - oracle.predict(clip.name)).max() > 0.05
    with pytest.raises(ValueError, match="useless"):
        oracle.predict(clip.name, bad[:, :1])


def test_a_study_says_what_is_wrong_with_it(data):
    for change, message in (
        ({"seeds": 0}, "seeds"),
        ({"tuning_seeds": 3}, "tuning_seeds"),
        ({"methods": ()}, "methods"),
        ({"rates": (1e-3, 1e-3)}, "rates"),
        ({"train": {"lr": 1e-3}}, "lr"),
        ({"train": {"dims": 3}}, "dims"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(data, **change)
    assert {"sage", "concat", "uniform", "gmu", "audio-only"} <= set(default_methods(["audio", "visual"]))
    assert "gmu" not in default_methods(["audio", "visual", "text"])
    assert math.isclose(dataclasses.replace(tiny(data)).base().lr, TrainConfig("x").lr)


@pytest.mark.slow
def test_quick_synthesises_its_data_and_compares_the_first_of_all(capsys, tmp_path, monkeypatch, undrawn):
    small = {"seed": 1, "train": 4, "validation": 2, "test": 3, "frames": (90, 120)}
    monkeypatch.setattr(study_module, "DATA", small)
    arguments = ["compare", "--out", str(tmp_path), "--quick", "--max-steps", "3", "--dim", "8", "--seeds", "1",
                 "--corruptions", "missing", "--processes", "1", "--draws", "20"]  # fmt: skip
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert {row["method"] for row in rows_of(tmp_path)} == {
        "sage", "concat", "uniform", "audio-only", "visual-only", ORACLE
    }  # fmt: skip
    assert {row["condition"] for row in rows_of(tmp_path)} == {"clean", "missing-3-audio", "missing-3-visual"}
    assert "5 trainings" in err
    assert "5/5  visual-only, seed 0, rate 0.002: validation P" in err
    assert "SAGE less this, clean" in out
    assert has_truth(tmp_path / "data")


def test_command_line_errors(capsys, data, tmp_path):
    assert cli.main(["compare", "--data", str(data), "--out", str(tmp_path / "s"), "--methods", "sage,telepathy"]) == 2
    err = capsys.readouterr().err
    assert "unknown telepathy; there are sage" in err
    assert err.startswith("sage-ext compare: error: ") or "\nsage-ext compare: error: " in err
    with pytest.raises(SystemExit):
        cli.main(["compare", "--out", str(tmp_path / "s"), "--severities", "all"])
