"""The study from end to end on a tiny data set: finished, continued, killed, refused, on licensed data, by command."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from studies import SIZES, rows_of, tiny

from sage_ext import cli
from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.synthetic import TruthClips, has_truth, write_dataset
from sage_ext.files import BusyError, alone
from sage_ext.study import plan
from sage_ext.study import run as run_module
from sage_ext.study.methods import UNTRAINED
from sage_ext.study.plan import evaluation_path, run_path, tuning_view
from sage_ext.study.results import read_evaluation
from sage_ext.study.run import compare
from sage_ext.training.evaluate import score
from sage_ext.training.runs import Run
from sage_ext.training.trainer import RunError


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
        assert values["quality"] is (method.endswith("+q") or method == "sage-told")
        own = ("lr", "fusion", "modalities", "quality", "told")
        configs[method] = {k: v for k, v in values.items() if k not in own}
    assert all(values == configs["sage"] for values in configs.values())
    overview = {row[0]: row for row in tables[0].rows}
    assert overview["SAGE"][-1] == ""
    assert "[" in overview["concatenation"][-1]


@pytest.mark.slow
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
    assert set(held) == {*tiny(data).methods, "uniform", *UNTRAINED}
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
    with pytest.raises(RunError, match="expected the configuration of the study that it holds, got another") as error:
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
        alone(finished[0], "testing"),
        pytest.raises(BusyError, match=f"held by process {os.getpid()} on .*, testing since"),
    ):
        compare(tiny(data), finished[0], processes=1, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="expected a directory that is empty, new or a study's"):
        compare(tiny(data), tmp_path / "mine", processes=1, quiet=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


KILLED = """
import sys
from studies import tiny
from sage_ext.study.run import compare
if __name__ == "__main__":
    compare(tiny(sys.argv[1]), sys.argv[2], processes=1, quiet=True)
"""


@pytest.mark.slow
def test_a_study_that_is_killed_continues_to_the_same_results(finished, data, tmp_path, undrawn):
    """The parent and all it started get no chance to clean up: what was reported done stays as it was, the rest is continued."""
    script, rng, left = tmp_path / "killed.py", np.random.default_rng(0), int(os.environ.get("SAGE_TEST_KILLS", 2))
    script.write_text(KILLED)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for number in itertools.count():
        out = tmp_path / f"study-{number}"
        done: dict[Path, bytes] = {}
        while True:
            process = subprocess.Popen(
                [sys.executable, script, data, out], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL
            )
            begun = set(out.glob("runs/*/*/result.json"))
            while left and process.poll() is None and set(out.glob("runs/*/*/result.json")) == begun:
                time.sleep(0.01)  # until it has done something more
            time.sleep(rng.uniform(0, 1.5) if left else 0)
            if not left or process.poll() is not None:
                assert process.wait(timeout=300) == 0
                break
            process.kill()
            process.wait()
            left -= 1
            time.sleep(0.5)  # the worker notices that its parent is gone
            now = {path: path.read_bytes() for path in out.glob("runs/*/*/result.json")}
            assert all(json.loads(text) for text in now.values())
            assert now.items() >= done.items()
            done = now
        assert (out / "results.csv").read_bytes() == (finished[0] / "results.csv").read_bytes()
        if not left:
            break


def _broken(config, path):
    if config.fusion == "concat" and config.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_module.train_one(config, path)


@pytest.mark.slow
def test_a_method_that_crashes_is_named_and_the_others_are_reported(data, tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(run_module, "train_one", _broken)
    study = tiny(data, methods=("concat", "sage"), rates=(2e-3,), corruptions=("dead-zeroed",))
    with pytest.raises(RunError, match=r"1 methods failed.*concat, seed 1, rate 0\.002.*SIGKILL"):
        compare(study, tmp_path / "study", processes=1, draws=20, quiet=True)
    assert {row["method"] for row in rows_of(tmp_path / "study")} == {"sage", *UNTRAINED}


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


@pytest.mark.slow
def test_quick_synthesises_its_data_and_compares_the_first_of_all(capsys, tmp_path, monkeypatch, undrawn):
    small = {"seed": 1, "train": 4, "validation": 2, "test": 3, "frames": (90, 120)}
    monkeypatch.setattr(plan, "DATA", small)
    arguments = ["compare", "--out", str(tmp_path), "--quick", "--max-steps", "3", "--dim", "8", "--seeds", "1",
                 "--corruptions", "missing", "--processes", "1", "--draws", "20"]  # fmt: skip
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    names = ("sage", "concat", "uniform", "audio-only", "visual-only")
    assert {row["method"] for row in rows_of(tmp_path)} == {*names, *(f"{name}+q" for name in names), *UNTRAINED}
    assert {row["condition"] for row in rows_of(tmp_path)} == {"clean", "missing-3-audio", "missing-3-visual"}
    assert "10 trainings" in err
    assert "10/10  visual-only+q, seed 0, rate 0.002: validation P" in err
    assert "SAGE less this, clean" in out
    assert has_truth(tmp_path / "data")


def test_command_line_errors(capsys, data, tmp_path):
    assert cli.main(["compare", "--data", str(data), "--out", str(tmp_path / "s"), "--methods", "sage,telepathy"]) == 2
    err = capsys.readouterr().err
    assert "methods: expected names among sage, " in err
    assert err.rstrip().endswith(", got telepathy")
    bare = tmp_path / "bare"
    shutil.copytree(data, bare)
    shutil.rmtree(bare / "truth")
    for path in bare.glob("features/*/*.quality.npy"):
        path.unlink()
    for meta in bare.glob("features/*/meta.json"):
        meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "quality"}))
    for asked, words in (
        (["--methods", "sage,concat+q"], "got concat+q: the data have no quality evidence"),
        (["--methods", "sage-told"], "got sage-told: the true noise is known of synthetic data"),
        (["--quality", "both"], "quality: expected without (the data have none), got both"),
    ):
        assert cli.main(["compare", "--data", str(bare), "--out", str(tmp_path / "s"), *asked]) == 2
        assert words in capsys.readouterr().err
    assert err.startswith("sage-ext compare: error: ") or "\nsage-ext compare: error: " in err
    with pytest.raises(SystemExit):
        cli.main(["compare", "--out", str(tmp_path / "s"), "--severities", "all"])


def test_nothing_of_a_users_is_taken_for_a_view(data, tmp_path, capsys, monkeypatch):
    """OUT/data that is the data set itself, or anything else; a study among the features."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    shutil.copytree(data, root)
    shutil.rmtree(root / "truth")
    before = sorted(path for path in root.rglob("*") if path.is_file())
    study = ["--methods", "sage", "--seeds", "1", "--lr", "1e-3", "--corruptions", "missing", "--severities", "1",
             "--max-steps", "1", "--dim", "8", "--blocks", "1", "--quiet"]  # fmt: skip
    assert cli.main(["compare", "--data", "data", "--out", ".", *study]) == 2
    assert "expected " in capsys.readouterr().err
    assert sorted(path for path in root.rglob("*") if path.is_file()) == before
    mine = tmp_path / "study" / "data" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    assert cli.main(["compare", "--data", "data", "--out", "study", *study]) == 2
    assert "expected nothing there, or a view of the data that an earlier study made" in capsys.readouterr().err
    assert mine.read_text() == "precious"
    assert cli.main(["compare", "--data", "data", "--out", "data/features/study", *study]) == 2
    assert "neither the data set nor among its features" in capsys.readouterr().err


def test_what_is_refused_leaves_nothing(data, tmp_path, capsys):
    out = tmp_path / "study"
    for name, words in (("foo", "got 'foo'"), ("waveform-noise", "got waveform-noise, which is not of features")):
        assert cli.main(["compare", "--data", str(data), "--out", str(out), "--corruptions", name, "--quiet"]) == 2
        assert words in capsys.readouterr().err
        assert not (out / "study.json").exists()


def test_another_dealing_is_refused(data, tmp_path, undrawn):
    """Runs that have seen what is scored now are not used."""
    root, out = tmp_path / "data", tmp_path / "study"
    shutil.copytree(data, root)
    study = tiny(root, methods=("sage",), seeds=1, rates=(2e-3,), corruptions=("missing",), folds=2)
    compare(study, out, processes=1, draws=20, quiet=True)
    names = [name for split in ("train", "validation") for name in AffWild2(root, split).names]
    groups = {name: f"g{i % 4}" for i, name in enumerate(names)}
    (root / "groups.json").write_text(json.dumps(groups))
    with pytest.raises(RunError, match="expected the videos dealt as when the study began, got another dealing"):
        compare(study, out, processes=1, draws=20, quiet=True)
