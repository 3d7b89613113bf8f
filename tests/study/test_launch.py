"""A study in shares, under a stand-in for Slurm and under joblib: the same files as a study by one command."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess

import joblib
import numpy as np
import pytest
from studies import SIZES, tiny

from sage_ext import cli
from sage_ext.files import BusyError, alone
from sage_ext.study import report
from sage_ext.study.run import PHASES, Share, compare, compare_share, prepare
from sage_ext.study.slurm import write_script
from sage_ext.training.trainer import RunError

FEW = {"methods": ("sage", "concat"), "corruptions": ("missing",), "train": {**SIZES, "window": 2.0, "max_steps": 2}}
FLAGS = ["--methods", "sage,concat", "--quality", "without", "--corruptions", "missing", "--seeds", "2", "--lr", "2e-3,5e-3",
         "--severities", "5", "--dim", "8", "--stages", "2", "--blocks", "2", "--window", "2", "--hop", str(4 / 3),
         "--batch-size", "4", "--max-steps", "2", "--epochs", "9", "--draws", "20"]  # fmt: skip

# Runs what is submitted before it answers: the tasks of an array in order or, ROUGH, shuffled and two at a time; the first of
# each array is then killed after some seconds and begun again, and the second of the first array never comes to anything.
SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >> "$FAKE/calls"
export id=$(wc -l < "$FAKE/calls") wrap
tasks=
for argument; do
  case $argument in
    --array=*) range=${argument#*=}; tasks=$(seq ${range/-/ });;
    --wrap=*) wrap=${argument#*=};;
    --chdir=*) cd "${argument#*=}";;
    --dependency=afterany:*) [[ -e "$FAKE/ended-${argument##*:}" ]] || exit 9;;
  esac
done
run() {
  if [[ -n $ROUGH && $id = 1 && $SLURM_ARRAY_TASK_ID = 2 ]]; then false
  elif [[ -n $ROUGH && $SLURM_ARRAY_TASK_ID = 1 ]]; then timeout -s KILL $ROUGH sh -c "$wrap"; sleep 1; sh -c "$wrap"
  else sh -c "$wrap"; fi >> "$FAKE/log" 2>&1 || echo "$id:$SLURM_ARRAY_TASK_ID" >> "$FAKE/failed"
}
export -f run
if [[ -z $tasks ]]; then run
elif [[ -n $ROUGH ]]; then shuf -e $tasks | xargs -P 2 -I {} env SLURM_ARRAY_TASK_ID={} bash -c run
else for task in $tasks; do SLURM_ARRAY_TASK_ID=$task run; done; fi
touch "$FAKE/ended-$id"
echo "$id;cluster"
"""


def contents(out):
    """{path: what is there} of all that the study measured; seconds of the processor are left out."""
    found = {"results.csv": (out / "results.csv").read_bytes()}
    for path in sorted(out.glob("runs/*/*/*")):
        if path.name == "result.json":
            held = json.loads(path.read_text())
            found[str(path.relative_to(out))] = {k: v for k, v in held.items() if k != "seconds"}
        elif path.suffix == ".safetensors":
            found[str(path.relative_to(out))] = path.read_bytes()
    for path in sorted(out.glob("evaluations/*/*.npz")):
        with np.load(path) as file:  # methods that came later stand later in it
            found[str(path.relative_to(out))] = {key: file[key].tobytes() for key in file.files}
    assert len(found) == 1 + 3 * 6 + 6, sorted(found)  # 6 runs of two files of weights, 2 seeds under 3 conditions
    return found


def submitted(script, folder, rough=""):
    """Submits to the stand-in for sbatch; the calls, and "call:task" of what failed."""
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(folder), "ROUGH": rough}
    subprocess.run(["bash", script, "--partition=fast"], env=env, check=True, capture_output=True, timeout=600)
    failed = (folder / "failed").read_text().split() if (folder / "failed").exists() else []
    return (folder / "calls").read_text().splitlines(), failed


@pytest.fixture(scope="module")
def local(tmp_path_factory, data):
    """What one command makes of the study."""
    out = tmp_path_factory.mktemp("launch") / "local"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "pictures", lambda scores: [])
        compare(tiny(data, **FEW), out, processes=1, draws=20, quiet=True)
    return contents(out)


def test_shares_in_any_order_make_the_study_of_one_command(local, data, tmp_path, undrawn):
    study, out, order = tiny(data, **FEW), tmp_path / "study", random.Random(0)
    assert prepare(study, out, quiet=True) == {"tune": 4, "train": 2, "evaluate": 6}
    here = {"launcher": "joblib", "quiet": True}
    with joblib.parallel_config("sequential"):  # in this process
        with pytest.raises(
            RunError,
            match=r"train:1/2: 2 methods failed: .*seed 0, rate .*: not finished, and train:1/2 comes after it",
        ):
            compare_share(study, out, Share("train", 1, 2), **here)
        for phase, done in zip(PHASES, (4, 6, 6)):
            shares = [Share(phase, i, 3) for i in (1, 2, 3)]
            for share in order.sample(shares, 3):
                before = set(out.glob("runs/*/*/result.json")) | set(out.glob("evaluations/*/*.npz"))
                compare_share(study, out, share, **here)
                new = (set(out.glob("runs/*/*/result.json")) | set(out.glob("evaluations/*/*.npz"))) - before
                assert (
                    len(new) == {"tune": (2, 1, 1), "train": (1, 1, 0), "evaluate": (2, 2, 2)}[phase][share.index - 1]
                )
            assert len(list(out.glob("runs/*/*/result.json"))) == done
        assert not (out / "results.csv").exists()
        times = {path: path.stat().st_mtime_ns for path in out.glob("[re]*/*/*")}
        compare(study, out, draws=20, **here)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # all had been done
    assert contents(out) == local


@pytest.mark.slow
@pytest.mark.parametrize("rough", ["", "7"])
def test_slurm_makes_the_study_of_one_command(local, data, tmp_path, capsys, rough, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "the study's").mkdir()
    command = [
        "compare",
        "--data",
        str(data),
        "--out",
        "the study's/out",
        *FLAGS,
        "--launcher",
        "slurm",
        "--tasks",
        "2",
    ]
    assert cli.main(command) == 0
    out = tmp_path / "the study's" / "out"
    assert shlex.split(capsys.readouterr().out) == ["bash", str(out / "slurm.sh")]
    assert not list(out.glob("runs/*"))
    calls, failed = submitted(out / "slurm.sh", tmp_path / "slurm", rough)
    assert len(calls) == 4
    assert all("--requeue" in call and "--partition=fast" in call and "--cpus-per-task=1" in call for call in calls)
    assert [re.findall("--dependency=[^ ]*", call) for call in calls] == [
        [],
        *[[f"--dependency=afterany:{i}"] for i in (1, 2, 3)],
    ]
    log = (tmp_path / "slurm" / "log").read_text()
    if rough:  # the lost task's runs were missing in two phases, and said to be; the last task did them
        assert {"1:2", "2:1", "3:1"} <= set(failed), log
        assert "4:" not in failed, log
    else:
        assert failed == [], log
    assert contents(out) == local


@pytest.mark.slow
def test_joblib_makes_the_study_of_one_command(local, data, tmp_path, undrawn):
    """On loky's processes, which know nothing of one thread each."""
    compare(tiny(data, **FEW), tmp_path / "study", processes=2, draws=20, quiet=True, launcher="joblib")
    assert contents(tmp_path / "study") == local


def test_what_a_share_refuses(data, tmp_path, capsys):
    out, study = tmp_path / "study", tiny(data, **FEW)
    command = ["compare", "--data", str(data), "--out", str(out), *FLAGS, "--quiet"]
    for text in ("tune", "tune:0/2", "tune:3/2", "tables:1/2", "tune:1", "tune:-1/2"):
        assert cli.main([*command, "--share", text]) == 2
        words = f"share: expected PHASE:I/N, of tune, train, evaluate, with I of 1 to N, got {text!r}"
        assert words in capsys.readouterr().err
    assert cli.main([*command, "--share", "tune:1/2", "--launcher", "slurm"]) == 2
    assert "share: expected none with --launcher slurm" in capsys.readouterr().err
    assert cli.main([*command, "--share", "tune:1/2"]) == 2
    assert "expected a study that was begun without --share" in capsys.readouterr().err
    with pytest.raises(ValueError, match="launcher: expected local or joblib, got 'mpi'"):
        compare(study, out, launcher="mpi")
    prepare(study, out, quiet=True)
    with pytest.raises(RunError, match=r"got another \(seeds 2 -> 1\)"):  # its places are others
        compare_share(tiny(data, **FEW, seeds=1), out, Share("tune", 1, 2), quiet=True)
    with alone(out, "comparing"), pytest.raises(BusyError, match="comparing since"):
        compare_share(study, out, Share("tune", 1, 2), quiet=True)
    with alone(out, "sharing", shared=True), pytest.raises(BusyError, match="and perhaps others, sharing since"):
        compare(study, out, quiet=True)
    for name in ("tasks", "processes"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            write_script(out, [], {"tune": 1}, **{"tasks": 1, "processes": 1, name: 0})


def test_shares_leave_the_views_of_the_data_as_they_are(data, tmp_path, undrawn):
    """Another share may be reading them."""
    root, out = tmp_path / "data", tmp_path / "study"
    shutil.copytree(data, root)
    study = tiny(root, **{**FEW, "methods": ("concat",)}, seeds=1, rates=(2e-3,), folds=2)
    assert prepare(study, out, quiet=True) == {"tune": 2, "train": 0, "evaluate": 2 * 3}
    before = {path: path.lstat().st_ino for path in out.glob("fold-*/**/*")}
    assert before
    with joblib.parallel_config("sequential"):
        for share in (Share("tune", 2, 2), Share("tune", 1, 2), Share("train", 1, 1), Share("evaluate", 1, 6)):
            compare_share(study, out, share, launcher="joblib", quiet=True)
    assert {path: path.lstat().st_ino for path in out.glob("fold-*/**/*")} == before
    assert len(list(out.glob("runs/*/*/result.json"))) == 2
    assert len(list(out.glob("evaluations/*/*.npz"))) == 1


def test_a_run_in_work_is_left_to_the_one_that_does_it(data, tmp_path):
    """The same share twice at once, say: the second names what is taken, and does the rest."""
    study, out = tiny(data, **{**FEW, "methods": ("concat",)}, seeds=1), tmp_path / "study"
    prepare(study, out, quiet=True)
    taken = out / "runs" / "concat" / "seed-0-lr-0.002"
    with (
        joblib.parallel_config("sequential"),
        alone(taken, "training"),
        pytest.raises(RunError, match=f"seed-0-lr-0.002: expected a folder .*held by process {os.getpid()}"),
    ):
        compare_share(study, out, Share("tune", 1, 1), launcher="joblib", quiet=True)
    assert [path.parent.name for path in out.glob("runs/*/*/result.json")] == ["seed-0-lr-0.005"]
    assert {path.name for path in taken.iterdir()} == {".lock"}
