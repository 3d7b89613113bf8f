"""The command line: the whole way on a small data set, and every expected failure as one line and exit code 2."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import start_interruptible

from sage_ext import cli
from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.synthetic import TruthClips
from sage_ext.demo import read_submission
from sage_ext.training.checkpoint import load_checkpoint
from sage_ext.training.trainer import read_config

SMALL = ("--dim=8", "--stages=2", "--blocks=2", "--window=2", "--hop=1.3333333333", "--batch-size=4", "--threads=1")


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "data"
    assert run("synth", root, "--train", 6, "--validation", 4, "--test", 4, "--frames", "120,260") == 0
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cli") / "run"
    assert run("train", "--data", data, "--run", path, *SMALL, "--epochs", 3, "--lr", "5e-3", "--quiet") == 0
    return path


def fails(capsys, *arguments, message):
    """Exit code 2, one line on stderr that holds `message`, nothing on stdout, no traceback."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith(f"sage-ext {arguments[0]}: error: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_evaluate(capsys, trained, data, tmp_path):
    assert run("evaluate", "--run", trained, "--report", tmp_path / "report", "--videos", 2) == 0
    out = capsys.readouterr().out
    result = json.loads((trained / "evaluation-validation.json").read_text())
    clips = AffWild2(data, "validation")
    assert result["valid_frames"] == sum(int(clip.valid.sum()) for clip in clips)
    assert result["videos"] == len(clips)
    assert set(result["scores"]) == {"fused", "audio", "visual"}
    for scores in result["scores"].values():
        assert scores["P"] == pytest.approx((scores["CCC_V"] + scores["CCC_A"]) / 2)
    assert f"{result['scores']['fused']['P']:.3f}" in out
    assert "no post-processing" in out
    error = result["calibration_error"]
    assert set(error) == {"before", "after", "held_out"}
    for name in ("audio", "visual"):
        assert 0 <= error["after"][name] <= error["before"][name] + 0.02
        assert 0 <= error["held_out"][name] <= 1
    pages = sorted(p.name for p in (tmp_path / "report").iterdir())
    assert {"report.html", "reliability.png", "training.png"} < set(pages)
    assert sum(name.startswith("video-") for name in pages) == 2


def test_smoothing_is_stated_and_changes_only_the_fused_score(capsys, trained):
    assert run("evaluate", "--run", trained) == 0
    plain = json.loads((trained / "evaluation-validation.json").read_text())["scores"]
    capsys.readouterr()
    assert run("evaluate", "--run", trained, "--smooth", "9,15") == 0
    smoothed = json.loads((trained / "evaluation-validation.json").read_text())
    assert "centred mean filter: valence 9, arousal 15 frames (fused only)" in capsys.readouterr().out
    assert smoothed["post_processing"] == {"mean_filter_frames": {"valence": 9, "arousal": 15}}
    assert smoothed["scores"]["fused"]["P"] != plain["fused"]["P"]
    assert smoothed["scores"]["audio"] == plain["audio"]


def test_predict_has_the_rows_of_the_sample(trained, data, tmp_path):
    out = tmp_path / "submission.txt"
    assert run("predict", "--run", trained, "--out", out) == 0
    sample = (data / "sample_submission.txt").read_text().splitlines()
    written = out.read_text().splitlines()
    assert [line.split(",")[0] for line in written] == [line.split(",")[0] for line in sample]
    values = np.array([[float(v) for v in line.split(",")[1:]] for line in written[1:]])
    assert values.shape[1] == 2
    assert (np.abs(values) <= 1).all()
    assert values.std() > 0.01
    said = read_submission(out)
    assert {name: len(rows) for name, rows in said.items()} == {clip.name: clip.num_frames for clip in TruthClips(data)}


def test_predict_follows_another_sample_file(trained, data, tmp_path):
    """Its videos, its rows, its order: here the last video alone, every third frame, backwards."""
    lines = (data / "sample_submission.txt").read_text().splitlines()
    video = lines[-1].split("/")[0]
    rows = [line for line in lines[1:] if line.startswith(video + "/")][::-3]
    sample, out = tmp_path / "sample.txt", tmp_path / "out.txt"
    sample.write_text("\n".join([lines[0], *rows]) + "\n")
    assert run("predict", "--run", trained, "--out", out, "--sample", sample) == 0
    assert [line.split(",")[0] for line in out.read_text().splitlines()[1:]] == [row.split(",")[0] for row in rows]


def test_resume_takes_the_runs_own_configuration(capsys, trained):
    before = (trained / "log.csv").read_bytes()
    assert run("train", "--run", trained, "--resume", "--quiet") == 0
    assert (trained / "log.csv").read_bytes() == before
    fails(capsys, "train", "--run", trained, "--resume", "--lr", "1e-4", message="lr 0.005 -> 0.0001")


@pytest.mark.parametrize("fusion", ["uniform", "reliability"])
def test_other_models_go_the_whole_way(capsys, data, tmp_path, fusion):
    path = tmp_path / "run"
    more = ("--fusion", fusion, "--centred", "--modalities", "visual", "--no-rehearsal", "--max-steps", 3)
    assert run("train", "--data", data, "--run", path, *SMALL, *more, "--quiet") == 0
    assert run("evaluate", "--run", path, "--report", tmp_path / "report") == 0
    assert run("predict", "--run", path, "--out", tmp_path / "out.txt") == 0
    assert set(json.loads((path / "evaluation-validation.json").read_text())["scores"]) == {"fused", "visual"}
    config = json.loads((path / "config.json").read_text())["train"]
    assert config["rehearsal"]["probability"] == 0
    assert config["causal"] is False


def test_how_to_train_is_asked_for_and_stays(capsys, data, tmp_path):
    path = tmp_path / "run"
    flags = ("--precision", "bf16", "--no-compile", "--prefetch", 0, "--max-steps", 2, "--quiet")
    assert run("train", "--data", data, "--run", path, *SMALL, *flags) == 0
    config = read_config(path)
    assert (config.precision, config.compile, config.prefetch) == ("bf16", False, 0)
    assert run("train", "--run", path, "--resume", "--quiet", "--prefetch", 1) == 0
    fails(capsys, "train", "--run", path, "--resume", "--quiet", "--compile", message="compile False -> True")
    fails(
        capsys, "train", "--run", path, "--overwrite", "--data", data, "--precision", "half",
        message="precision: expected float32 or bf16, got 'half'",
    )  # fmt: skip


def test_expected_failures(capsys, trained, data, tmp_path):
    fails(capsys, "train", "--data", data, "--run", trained, message="expected no run there, got config.json")
    fails(capsys, "train", "--run", tmp_path / "new", message="--data")
    fails(capsys, "train", "--data", tmp_path / "nothing", "--run", tmp_path / "new", message="nothing")
    fails(capsys, "train", "--data", data, "--run", tmp_path / "new", "--hop", 500, message="hop")
    fails(capsys, "train", "--data", data, "--run", tmp_path / "new", "--modalities", "smell", message="smell")
    fails(capsys, "train", "--data", data, "--run", tmp_path / "new", "--fusion", "magic", message="magic")
    assert not (tmp_path / "new").exists()
    fails(capsys, "evaluate", "--run", tmp_path / "new", message="expected a run directory")
    fails(capsys, "evaluate", "--run", trained, "--data", tmp_path, message=str(tmp_path))
    fails(
        capsys, "predict", "--run", trained, "--out", tmp_path / "o", "--sample", tmp_path / "s", message="No such file"
    )
    fails(capsys, "synth", data, message="expected a folder that is empty or new")
    fails(capsys, "demo", "--out", data, message="which holds something else")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((trained / "config.json").read_bytes())
    fails(capsys, "predict", "--run", damaged, "--out", tmp_path / "o", message="no epoch is finished")
    (damaged / "best.safetensors").write_bytes((trained / "best.safetensors").read_bytes()[:-9])
    fails(capsys, "predict", "--run", damaged, "--out", tmp_path / "o", message="best.safetensors")


def test_a_data_set_of_other_dimensions_is_refused(capsys, trained, tmp_path):
    from sage_ext.data.synthetic import write_dataset

    other = tmp_path / "other"
    write_dataset(other, train=1, validation=1, test=1, frames=(60, 80), modalities={"audio": 9, "visual": 64})
    fails(capsys, "evaluate", "--run", trained, "--data", other, message="'audio': 9")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train"], ["evaluate", "--run", "x", "--smooth", "few"], ["synth"]]
)
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: sage-ext" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["synth", "train", "evaluate", "predict", "stream", "info", "demo"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"sage-ext {command}" in capsys.readouterr().out


def test_missing_extra(capsys, monkeypatch, trained):
    for name in ("safetensors", "safetensors.torch"):  # the second alone would be found in the cache of modules
        monkeypatch.setitem(sys.modules, name, None)
    fails(capsys, "evaluate", "--run", trained, message="pip install sage-ext[train]")


def test_module_without_a_subcommand_is_info(capsys):
    done = subprocess.run([sys.executable, "-m", "sage_ext"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run("info") == 0
    out = capsys.readouterr().out
    assert done.stdout.splitlines()[:3] == out.splitlines()[:3]
    assert "stage_filter" in done.stdout


@pytest.mark.slow
def test_interrupt_leaves_a_resumable_run(data, tmp_path):
    """Ctrl-C: no traceback, a hint, exit code 130, and the run goes on from there."""
    path = tmp_path / "run"
    arguments = ["train", "--data", str(data), "--run", str(path), *SMALL, "--epochs", "400", "--checkpoint-every", "2"]
    process = start_interruptible([sys.executable, "-m", "sage_ext", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (path / "last.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"--run {path} --resume" in err
    step = load_checkpoint(path / "last.safetensors")["at"]["step"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sage_ext", "train", "--run", str(path), "--resume"], stderr=subprocess.PIPE, text=True
    )
    first = process.stderr.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert f"continues at step {step} of" in first


@pytest.mark.slow
def test_two_trainings_in_one_directory(capsys, data, tmp_path):
    """The second one refuses, with --overwrite and --resume too, and says who is there; a killed one holds nothing."""
    path = tmp_path / "run"
    arguments = ["train", "--data", data, "--run", path, *SMALL, "--epochs", 400, "--checkpoint-every", 2]
    command = [sys.executable, "-m", "sage_ext", *(str(a) for a in arguments)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        try:
            deadline = time.monotonic() + 60
            while not (path / "last.safetensors").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            for flag in ("--overwrite", "--resume"):
                fails(capsys, *arguments, flag, message=f"held by process {first.pid} on ")
            assert first.poll() is None
        finally:
            first.kill()
    process = subprocess.Popen(
        [sys.executable, "-m", "sage_ext", "train", "--run", str(path), "--resume"], stderr=subprocess.PIPE, text=True
    )
    said = process.stderr.readline()
    process.kill()
    process.communicate()
    assert "continues at step" in said


@pytest.mark.slow
def test_closed_descriptors(trained, data):
    """Nothing hangs, and what belongs to standard error never comes on standard output."""
    program = f"{sys.executable} -m sage_ext"

    def shell(command):
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        return done.returncode, done.stdout, done.stderr

    stream = f"{program} stream --run {trained}"
    closed = "sage-ext stream: error: {}: expected {}open, got it closed\n"
    assert shell(f"{stream} <&-") == (2, "", closed.format("--input", "standard input "))
    assert shell(f"{stream} >&-") == (2, "", closed.format("standard output", "it "))
    assert shell(f"{stream} <&- >&- 2>&-") == (2, "", "")
    code, out, _ = shell(f"(echo '{{}}'; echo oops) | {stream} 2>&-")
    assert code == 0
    assert [json.loads(line)["frame"] for line in out.splitlines()] == [1]
    assert shell(f"{program} evaluate --run nowhere 2>&-") == (2, "", "")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(data, tmp_path):
    """No file may grow beyond a few bytes: each command says which one could not, and what it began is not there."""

    def run_within(size, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", "sage_ext", *map(str, arguments)],
            capture_output=True, text=True, timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        return done.stderr.splitlines()[-1]

    made, trained = tmp_path / "made", tmp_path / "run"
    error = run_within(2000, "synth", made, "--train", 1, "--validation", 1, "--test", 1)
    assert re.fullmatch(rf"sage-ext synth: error: \[Errno \d+\] .*: '{made}.*'", error), error
    assert not made.exists()
    error = run_within(200, "train", "--data", data, "--run", trained, "--epochs", 1, "--dim", 8)
    assert re.fullmatch(rf"sage-ext train: error: \[Errno \d+\] .*: '{trained}/.+'", error), error
    assert not [*trained.glob("*.tmp"), *trained.glob("*.pt")]


@pytest.mark.slow
def test_a_full_disk_is_named(trained):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    for arguments, text in (
        (["info"], "sage-ext info: error: [Errno 28] No space left on device: 'standard output'\n"),
        (
            ["stream", "--run", str(trained)],
            "sage-ext stream: error: [Errno 28] No space left on device: 'standard output'\n",
        ),
    ):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "sage_ext", *arguments]
            done = subprocess.run(command, input=b"{}\n", stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 2
        assert done.stderr.decode().endswith(text)
        assert b"Traceback" not in done.stderr
        assert b"the input failed" not in done.stderr


def test_names_from_files_are_shown_and_not_obeyed(capsys, data, tmp_path):
    """A modality, a video, a data set and a run whose names hold escapes, markup, mathematics and line ends."""
    evil = "$\\x$\x1b[2J<b>\n&"
    root = tmp_path / evil / "data"
    shutil.copytree(data, root, ignore=shutil.ignore_patterns("truth"))
    (root / "features" / "visual").rename(root / "features" / f"see{evil}")
    for path in list(root.rglob("validation-*")):
        path.rename(path.with_name(path.name.replace("validation-", f"v{evil}")))
    out = tmp_path / evil / "run"
    assert run("train", "--data", root, "--run", out, *SMALL, "--epochs", 1) == 0
    assert run("evaluate", "--run", out, "--report", tmp_path / "report", "--videos", 1) == 0
    assert run("evaluate", "--run", out, "--data", tmp_path / evil) == 2
    shown = "".join(capsys.readouterr())
    assert "\x1b[2J" not in shown
    assert f"see{evil}" not in shown
    assert "see$\\x$\\x1b[2J<b>\\n&" in shown
    html = (tmp_path / "report" / "report.html").read_text()
    assert "<b>" not in html
    assert "\x1b" not in html
    assert "see$\\x$\\x1b[2J&lt;b&gt;" in html
