"""The trainer: it learns, it logs what it did, and a killed run continues to the bit."""

import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.synthetic import write_dataset
from sage_ext.files import LOCK, BusyError, alone
from sage_ext.training import trainer
from sage_ext.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sage_ext.training.evaluate import evaluate, predict_clip
from sage_ext.training.rehearsal import Rehearsal
from sage_ext.training.runs import Run
from sage_ext.training.trainer import BEST, LAST, RunError, TrainConfig, learning_rate, read_config, train

quiet = functools.partial(train, progress=False)


class Killed(BaseException):
    """Stands for a kill: nothing between the raise and the end of the run may clean up after it."""


def outcome(run):
    """All that a run leaves that must be reproducible: file name -> bytes, with checkpoints opened."""
    files = {"log.csv": (run / "log.csv").read_bytes(), "config.json": (run / "config.json").read_bytes()}
    for name in ("last.safetensors", "best.safetensors"):
        files[name] = (run / name).read_bytes()
    return files


def assert_same_run(a, b):
    one, two = outcome(a), outcome(b)
    assert one["log.csv"] == two["log.csv"]
    for name in ("best.safetensors", "last.safetensors"):
        x, y = load_checkpoint(a / name), load_checkpoint(b / name)
        for key in x["model"]:
            assert torch.equal(x["model"][key], y["model"][key]), f"{name} {key}"
        assert one[name] == two[name], name  # optimizer, generators, position, best: every byte
    assert [path.name for path in b.glob(".*")] == [LOCK]


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}, {}])
def test_a_run_directory_in_which_another_process_works_is_left_alone(tiny, tmp_path, how):
    if how:
        quiet(dataclasses.replace(tiny, max_steps=2), tmp_path / "run")
    with alone(tmp_path / "run", "training"):
        before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        with pytest.raises(BusyError, match=f"held by process {os.getpid()} on .*, training since "):
            quiet(dataclasses.replace(tiny, max_steps=2), tmp_path / "run", **how)
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The uninterrupted run, and its configuration."""
    config = TrainConfig(
        str(data), dim=8, stages=2, blocks=2, window=2, hop=4 / 3, batch_size=4, epochs=3, lr=3e-3, warmup=3, threads=1,
        checkpoint_every=2,
    )  # fmt: skip
    run = tmp_path_factory.mktemp("runs") / "whole"
    quiet(config, run)
    return config, run


def test_two_runs_are_the_same_run(whole, tmp_path):
    config, run = whole
    torch.manual_seed(1234)  # what the process did before must not matter, nor be disturbed
    before = torch.get_rng_state()
    quiet(config, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_run(run, tmp_path / "again")


def test_free_settings_do_not_change_the_result(whole, tmp_path):
    """Workers, and how often checkpoints are made."""
    config, run = whole
    quiet(dataclasses.replace(config, num_workers=2, checkpoint_every=1000), tmp_path / "run")
    assert (tmp_path / "run" / "log.csv").read_bytes() == (run / "log.csv").read_bytes()
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()


def test_the_seed_changes_the_result(whole, tmp_path):
    config, run = whole
    quiet(dataclasses.replace(config, seed=1), tmp_path / "run")
    assert (tmp_path / "run" / "log.csv").read_bytes() != (run / "log.csv").read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_anywhere_then_resumed(whole, tmp_path, monkeypatch, seed):
    """Stop at random disk operations, again and again, until the run is through."""
    config, reference = whole
    run, rng = tmp_path / "run", np.random.default_rng(seed)
    stops = 0

    def arm(after):
        """Raise before or after the `after`-th write, rename or sync from now; nothing else on the way out works."""
        left = [after]

        def wrap(call):
            def inner(*args, **kwargs):
                if left[0] < 0:
                    raise Killed
                left[0] -= 1
                if left[0] < 0 and rng.random() < 0.5:
                    raise Killed
                result = call(*args, **kwargs)
                if left[0] < 0:
                    raise Killed
                return result

            return inner

        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, wrap(real[name]))

    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for _ in range(40):
        arm(int(rng.integers(1, 25)))
        try:
            quiet(config, run, resume=True)
        except Killed:
            stops += 1
        else:
            break
        finally:
            monkeypatch.undo()
    else:
        quiet(config, run, resume=True)
    assert stops >= 2
    assert_same_run(reference, run)


_PROGRAM = "import sys; from sage_ext.cli import main; sys.exit(main(sys.argv[1:]))"


def _train_process(data, run, *more):
    arguments = [
        "train", "--data", str(data), "--run", str(run), "--dim", "8", "--stages", "2", "--blocks", "2",
        "--window", "60", "--hop", "20", "--batch-size", "4", "--epochs", "10", "--lr", "3e-3", "--threads", "1",
        "--checkpoint-every", "3", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.PIPE
    )


def _kill_and_resume(data, tmp_path, kills, seed):
    whole, run = tmp_path / "whole", tmp_path / "run"
    begin = time.monotonic()
    process = _train_process(data, whole)
    assert process.wait(timeout=120) == 0
    duration = time.monotonic() - begin
    rng, hit, steps = np.random.default_rng(seed), 0, []
    for _ in range(kills):
        process = _train_process(data, run, "--resume")
        while not (run / "config.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0.0, 0.35)) * duration)
        if process.poll() is None:
            hit += 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (run / "last.safetensors").exists():
            steps.append(load_checkpoint(run / "last.safetensors")["at"]["step"])
    process = _train_process(data, run, "--resume")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert hit >= 1
    assert steps == sorted(steps)
    assert_same_run(whole, run)
    return out


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    """kill -9, for real, twice; the calibrated best model and the log are the same bytes."""
    out = _kill_and_resume(data, tmp_path, kills=2, seed=0)
    assert b"best validation P" in out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("SAGE_TEST_KILLS", 8)) // 8))
def test_killed_many_times(data, tmp_path, seed):
    _kill_and_resume(data, tmp_path, kills=8, seed=seed)


def test_log_and_best(whole):
    config, run = whole
    lines = (run / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(trainer.COLUMNS)
    rows = [dict(zip(trainer.COLUMNS, map(float, line.split(",")))) for line in lines[1:]]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    last = load_checkpoint(run / "last.safetensors")
    assert rows[-1]["step"] == last["at"]["step"]
    assert last["at"]["done"] is True
    for row in rows:
        total = row["loss_prediction"] + 0.5 * row["loss_unimodal"] + 0.3 * row["loss_reliability"]
        assert row["loss"] == pytest.approx(total, abs=1e-5)
        assert row["val_P"] == pytest.approx((row["val_CCC_V"] + row["val_CCC_A"]) / 2, abs=1e-7)
        assert row["best_P"] == max(r["val_P"] for r in rows if r["epoch"] <= row["epoch"])
    best = load_checkpoint(run / "best.safetensors")
    top = max(rows, key=lambda row: row["val_P"])
    assert (best["epoch"], best["step"]) == (top["epoch"], top["step"])
    model = Run.load(run)
    clips = AffWild2(config.data, "validation")
    scores, _ = evaluate(lambda clip: predict_clip(model.model, clip, model.names), clips, model.names)
    assert scores["fused"]["P"] == pytest.approx(top["val_P"], abs=1e-6)  # the file holds the weights of that epoch
    assert scores == best["scores"]


def test_it_learns(data, tmp_path):
    config = TrainConfig(
        str(data), dim=16, stages=2, blocks=2, window=2, hop=1, batch_size=4, epochs=8, lr=5e-3, warmup=5, threads=1
    )
    quiet(config, tmp_path / "run")
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    rows = [dict(zip(trainer.COLUMNS, map(float, line.split(",")))) for line in lines]
    assert rows[-1]["loss_prediction"] < 0.7 * rows[0]["loss_prediction"]
    assert rows[-1]["train_P"] > 0.3
    assert rows[-1]["loss_reliability"] < rows[0]["loss_reliability"]


def losses(run):
    lines = (run / "log.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[trainer.COLUMNS.index("loss_prediction")]) for line in lines]


def interrupted(config, run, monkeypatch, at):
    """Train until the step `at` is to be made."""
    step = trainer.Training._one_step

    def killed(self, batch):
        if self.step == at:
            raise Killed
        step(self, batch)

    monkeypatch.setattr(trainer.Training, "_one_step", killed)
    with pytest.raises(Killed):
        quiet(config, run)
    monkeypatch.undo()


def test_bf16_autocast_learns_and_resumes(data, tmp_path, monkeypatch):
    config = TrainConfig(
        str(data), dim=16, stages=2, blocks=2, window=2, hop=1, batch_size=4, epochs=8, lr=5e-3, warmup=5, threads=1,
        precision="bf16", checkpoint_every=2,
    )  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    dtypes, linear = set(), torch.nn.functional.linear

    def spied(*arguments):
        found = linear(*arguments)
        if torch.is_grad_enabled():
            dtypes.add(found.dtype)
        return found

    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    quiet(config, whole)
    monkeypatch.undo()
    assert torch.bfloat16 in dtypes
    assert losses(whole)[-1] < 0.7 * losses(whole)[0]
    weights = load_checkpoint(whole / LAST)["model"].values()
    assert torch.bfloat16 not in {value.dtype for value in weights}
    interrupted(config, run, monkeypatch, at=11)
    with pytest.raises(RunError, match="precision 'bf16' -> 'float32'"):
        quiet(dataclasses.replace(config, precision="float32"), run, resume=True)
    quiet(config, run, resume=True)
    assert_same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("precision", trainer.PRECISIONS)
def test_compiled_training_learns_and_resumes(data, tmp_path, monkeypatch, precision):
    config = TrainConfig(
        str(data), dim=8, stages=2, blocks=1, window=2, hop=4 / 3, batch_size=4, epochs=2, lr=3e-3, warmup=3, threads=1,
        dropout=0.0, precision=precision, checkpoint_every=2,
    )  # fmt: skip
    compiled = dataclasses.replace(config, compile=True)
    calls, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or compiler(model))
    quiet(config, tmp_path / "eager")
    assert not calls
    quiet(compiled, tmp_path / "whole")
    assert len(calls) == 1
    monkeypatch.undo()
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=0.05)
    interrupted(compiled, tmp_path / "run", monkeypatch, at=7)
    quiet(compiled, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    Run.load(tmp_path / "whole")  # weights under their own names


def test_early_stopping_waits_for_patience(data, tmp_path, monkeypatch):
    """Validation P is scripted; the best epoch is kept, and `patience` worse ones end the run."""
    script = iter([0.1, 0.3, 0.2, 0.25, 0.29, 0.9, 0.9])
    values = []

    def scripted(self):
        values.append(next(script))
        return {"fused": {"CCC_V": values[-1], "CCC_A": values[-1], "P": values[-1]}}

    monkeypatch.setattr(trainer.Training, "_validated", scripted)
    config = TrainConfig(
        str(data), dim=8, stages=2, blocks=1, window=2, hop=2, batch_size=4, epochs=50, patience=3, threads=1
    )
    best = quiet(config, tmp_path / "run")
    assert values == [0.1, 0.3, 0.2, 0.25, 0.29]
    assert best["epoch"] == 1
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")["epoch"] == 1


def test_the_last_epoch_is_kept_where_asked(tiny, tmp_path):
    run = tmp_path / "run"
    best = quiet(dataclasses.replace(tiny, keep="last", patience=1), run)
    rows = [dict(zip(trainer.COLUMNS, line.split(","))) for line in (run / "log.csv").read_text().splitlines()[1:]]
    assert len(rows) == tiny.epochs
    assert best["epoch"] == tiny.epochs - 1
    assert rows[-1]["val_P"] == rows[-1]["best_P"]
    assert best["scores"]["fused"]["P"] == pytest.approx(float(rows[-1]["val_P"]), abs=1e-8)
    kept, last = (load_checkpoint(run / name)["model"] for name in ("best.safetensors", "last.safetensors"))
    assert all(kept[name].equal(last[name]) for name in last)
    with pytest.raises(ValueError, match="keep: expected best or last, got 'first'"):
        dataclasses.replace(tiny, keep="first")


def test_max_steps_ends_inside_an_epoch(tiny, tmp_path):
    quiet(dataclasses.replace(tiny, max_steps=8), tmp_path / "run")
    last = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert last["at"]["step"] == 8
    assert last["at"]["done"] is True


def test_a_finished_run_resumes_to_itself(whole, tmp_path):
    config, run = whole
    before = outcome(run)
    best = quiet(config, run, resume=True)
    assert outcome(run) == before
    assert best["step"] == load_checkpoint(run / "best.safetensors")["step"]


def test_a_run_from_before_limits_were_learnt_is_read_and_resumed(tiny, tmp_path):
    run, limits = tmp_path / "run", "stuck_limit"
    quiet(dataclasses.replace(tiny, epochs=1), run)
    for name in (BEST, LAST):
        state = load_checkpoint(run / name)
        for model in (state["model"], state.get("best", {"model": {}})["model"]):
            model.pop(limits, None)
        save_checkpoint(run / name, state)
    assert Run.load(run).model.stuck_limit.tolist() == [8, 8]
    last = load_checkpoint(run / LAST)
    last["at"]["done"] = False
    save_checkpoint(run / LAST, last)
    quiet(dataclasses.replace(tiny, epochs=1), run, resume=True)
    assert load_checkpoint(run / LAST)["model"][limits].tolist() == [8, 8]
    assert Run.load(run).model.stuck_limit.tolist() == [8, 8]


def test_existing_run_is_not_overwritten(tiny, tmp_path):
    run = tmp_path / "run"
    quiet(dataclasses.replace(tiny, epochs=1), run)
    before = outcome(run)
    with pytest.raises(RunError, match=r"expected no run there, got config\.json"):
        quiet(tiny, run)
    assert outcome(run) == before
    (run / "notes.txt").write_text("mine")
    quiet(dataclasses.replace(tiny, epochs=1, seed=5), run, overwrite=True)
    assert outcome(run)["last.safetensors"] != before["last.safetensors"]
    assert (run / "notes.txt").read_text() == "mine"
    with pytest.raises(RunError, match="resume, overwrite: expected one of them at most, got both"):
        quiet(tiny, run, overwrite=True, resume=True)


def test_resume_with_another_configuration_or_data(tiny, tmp_path, data):
    run = tmp_path / "run"
    quiet(dataclasses.replace(tiny, epochs=1), run)
    with pytest.raises(RunError, match=r"lr 0\.003 -> 0\.004"):
        quiet(dataclasses.replace(tiny, epochs=1, lr=0.004), run, resume=True)
    with pytest.raises(RunError, match="rehearsal"):
        quiet(dataclasses.replace(tiny, epochs=1, rehearsal=Rehearsal(probability=0.1)), run, resume=True)
    other = tmp_path / "other"
    write_dataset(
        other, seed=4, train=6, validation=4, test=0, frames=(120, 260), modalities={"audio": 12, "visual": 16}
    )
    with pytest.raises(RunError, match="expected the data that it began with"):
        quiet(dataclasses.replace(tiny, epochs=1, data=str(other)), run, resume=True)


def test_damaged_runs_are_named(tiny, tmp_path):
    run, config = tmp_path / "run", dataclasses.replace(tiny, epochs=1)
    quiet(config, run)
    whole = (run / "last.safetensors").read_bytes()
    (run / "last.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        quiet(config, run, resume=True)
    (run / "last.safetensors").write_bytes(whole)
    log = (run / "log.csv").read_bytes()
    (run / "log.csv").write_bytes(log[:-10])
    with pytest.raises(RunError, match=r"log\.csv"):
        quiet(config, run, resume=True)
    (run / "log.csv").write_bytes(log + b"garbage of a step that was lost\n")
    quiet(config, run, resume=True)
    assert (run / "log.csv").read_bytes() == log
    (run / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json"):
        read_config(run)
    with pytest.raises(RunError, match=r"config\.json"):
        quiet(config, run, resume=True)
    (run / "config.json").unlink()
    with pytest.raises(RunError, match=r"expected config\.json beside last\.safetensors, got none"):
        quiet(config, run, resume=True)
    with pytest.raises(RunError, match="expected a run directory, got one without"):
        read_config(tmp_path / "nowhere")


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    step = trainer.Training._one_step

    def poisoned(self, batch):
        step(self, batch)
        if self.step == 5:
            next(self.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(trainer.Training, "_one_step", poisoned)
    with pytest.raises(RunError, match="no longer finite"):
        quiet(tiny, run)
    monkeypatch.undo()
    state = load_checkpoint(run / "last.safetensors")
    assert state["at"]["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())


def test_one_modality_trains_on_the_same_failures(tiny, tmp_path, monkeypatch):
    """A model of one input sees exactly what that input of the joint model goes through."""
    seen = {}

    def spy(tag):
        def inner(self, batch):
            present = batch["present"][..., self.names.index("visual")]
            seen.setdefault(tag, []).append((batch["features"]["visual"].clone(), present.clone()))
            real(self, batch)

        return inner

    real = trainer.Training._one_step
    for tag, modalities in (("both", None), ("one", ("visual",))):
        monkeypatch.setattr(trainer.Training, "_one_step", spy(tag))
        quiet(dataclasses.replace(tiny, epochs=1, modalities=modalities), tmp_path / tag)
    assert len(seen["both"]) == len(seen["one"]) > 2
    for (a, p), (b, q) in zip(seen["both"], seen["one"]):
        assert torch.equal(a, b)
        assert torch.equal(p, q)


def test_learning_rate():
    config = TrainConfig("unused", lr=1e-3, warmup=10)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == max(rates) == pytest.approx(1e-3)
    assert all(b < a for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1e-3 / 50, rel=0.05)
    assert all(rate > 0 for rate in (learning_rate(config, step, 3) for step in range(3)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"window": 0.0}, "window"), ({"window": 2.0, "hop": 2.1}, "hop"), ({"stuck": -1}, "stuck"),
        ({"window": math.inf}, "window"), ({"batch_size": 0}, "batch_size"), ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"), ({"epochs": 0}, "epochs"), ({"max_steps": 0}, "max_steps"), ({"seed": -1}, "seed"),
        ({"unimodal_weight": -1.0}, "unimodal_weight"), ({"threads": 0}, "threads"),
        ({"grad_clip": math.inf}, "grad_clip"),
        ({"precision": "fp16"}, "precision: expected float32 or bf16, got 'fp16'"),
        ({"prefetch": -1}, r"prefetch: expected an int in \[0, 2\], got -1"),
        ({"prefetch": 3}, r"prefetch: expected an int in \[0, 2\], got 3"),
    ],
)  # fmt: skip
def test_bad_configuration(bad, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("unused", **bad)


def test_bad_kinds_in_a_configuration():
    with pytest.raises(TypeError, match="compile: expected a bool, got str"):
        TrainConfig("unused", compile="yes")
    with pytest.raises(TypeError, match="prefetch: expected an int, got bool"):
        TrainConfig("unused", prefetch=True)


def test_spans_are_seconds():
    """The defaults at 30 frames a second are so many frames; others keep the seconds, down to a quarter of the rate."""
    assert TrainConfig("unused").spans(30.0) == (300, 200, (8.0, 32.0, 128.0), 8, 8, 150)
    assert TrainConfig("unused").spans(60.0) == (600, 400, (16.0, 64.0, 256.0), 16, 16, 300)
    assert TrainConfig("unused").spans(15.0) == (150, 100, (4.0, 16.0, 64.0), 4, 4, 75)
    for slow in (7.5, 1.0, 1 / 3600):
        assert TrainConfig("unused").spans(slow) == (75, 50, (2.0, 8.0, 32.0), 2, 2, 38)
    asked = TrainConfig("unused", window=40, hop=10, memory=(2.0, 50.0), stuck=3, rehearsal=Rehearsal(length=(0.1, 30)))
    assert asked.spans(1.0) == (40, 10, (2.0, 50.0), 3, 1, 30)
    assert asked.spans(25.0) == (1000, 250, (50.0, 1250.0), 75, 3, 750)
    assert TrainConfig("unused", window=40).spans(1.0)[:2] == (40, 27)
    assert TrainConfig("unused", memory=(), stuck=0).spans(30.0)[2:4] == ((), 0)
    assert TrainConfig("unused", fusion="can").spans(30.0)[2:4] == ((), 0)
    assert TrainConfig("unused", fusion="can", peer_memory=True).spans(1.0)[2:4] == ((2.0, 8.0, 32.0), 2)
    assert TrainConfig("unused", use_present=False).spans(30.0).stuck == 0
    with pytest.raises(ValueError, match=r"window: expected at least 2 frames \(7200 s at 0.000277778 .*\), got 60 s"):
        TrainConfig("unused", window=60).spans(1 / 3600)
    with pytest.raises(ValueError, match=r"hop: expected at most the window \(10 s, or .*\), got 20 s"):
        TrainConfig("unused", hop=20).spans(30.0)


def test_a_run_of_another_format_is_refused(tiny, tmp_path):
    """Its spans would be read as seconds."""
    train(dataclasses.replace(tiny, max_steps=1), tmp_path / "run", progress=False)
    path = tmp_path / "run" / trainer.CONFIG
    stored = json.loads(path.read_text())
    del stored["format"]
    path.write_text(json.dumps(stored))
    with pytest.raises(RunError, match=r"config.json: damaged \(expected the format 3, got that of another version"):
        read_config(tmp_path / "run")


def test_configuration_round_trip(tiny):
    config = dataclasses.replace(
        tiny, modalities=("visual",), rehearsal=Rehearsal(probability=0.3, length=(4 / 30, 9 / 30))
    )
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="configuration: expected fields of TrainConfig, got colour"):
        TrainConfig.from_json({**config.to_json(), "colour": "red"})


def test_unknown_modality(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"modalities: expected some of audio, visual .*, got smell"):
        quiet(dataclasses.replace(tiny, modalities=("smell",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard(tiny, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    quiet(dataclasses.replace(tiny, epochs=2), run, tensorboard=True)
    events = event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [scalar.value for scalar in events.Scalars("val/P")]
    lines = (run / "log.csv").read_text().splitlines()[1:]
    want = [float(line.split(",")[trainer.COLUMNS.index("val_P")]) for line in lines]
    np.testing.assert_allclose(logged, want, rtol=1e-6)


def one(tensors):
    """The first of them, of another shape."""
    return {next(iter(tensors)): torch.zeros(3, 5, 7)}


@pytest.mark.parametrize("change", ["last", "modalities", "config", "huge", "missing", "values", "list"])
def test_a_checkpoint_of_another_kind_is_named(whole, tmp_path, change):
    """Whole and well signed, but not what belongs there: one line that names the file, for loading as for resuming."""
    config, whole_run = whole
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    best = load_checkpoint(run / BEST)
    if change == "last":
        shutil.copy(run / LAST, run / BEST)
    elif change == "modalities":
        save_checkpoint(run / BEST, {**best, "modalities": ["audio", "smell"]})
    elif change == "config":
        save_checkpoint(run / BEST, {**best, "model_config": {**best["model_config"], "dim": -3}})
    elif change == "huge":
        save_checkpoint(run / BEST, {**best, "model_config": {**best["model_config"], "dim": 2**40}})
    elif change == "missing":
        save_checkpoint(run / BEST, {key: value for key, value in best.items() if key != "epoch"})
    elif change == "values":
        save_checkpoint(run / BEST, {**best, "model": dict.fromkeys(best["model"], 3)})
    else:
        save_checkpoint(run / BEST, {**best, "model": []})
    with pytest.raises(
        CheckpointError, match=re.escape(str(run / BEST)) + ": expected the weights of a model"
    ) as error:
        Run.load(run)
    assert "\n" not in str(error.value)
    last = load_checkpoint(run / LAST)
    shutil.copy(whole_run / BEST, run / BEST)
    for wrong in (
        load_checkpoint(run / BEST),
        {**last, "at": {"step": "x"}},
        {**last, "at": {**last["at"], "step": "x"}},
        {**last, "rng": {"cpu": torch.zeros(3)}},
        {**last, "running": {"loss_sum": 3, "moments": None}},
        {**last, "optimizer": []},
        {**last, "best": {}},
        {**last, "best": {**last["best"], "P": "high"}},
        {**last, "best": {**last["best"], "model": {**last["best"]["model"], **one(last["best"]["model"])}}},
        {**last, "running": {**last["running"], "loss_sum": torch.zeros(3)}},
        {**last, "running": {**last["running"], "moments": torch.zeros(6, 2)}},
        {
            **last,
            "optimizer": {
                **last["optimizer"],
                "state": {
                    **last["optimizer"]["state"],
                    0: {**last["optimizer"]["state"][0], "exp_avg": torch.zeros(3, 7)},
                },
            },
        },
    ):
        save_checkpoint(run / LAST, wrong)
        with pytest.raises(CheckpointError, match=re.escape(str(run / LAST)) + ": expected the training state"):
            quiet(config, run, resume=True)


def test_a_log_that_cannot_grow_is_named(whole, tmp_path, monkeypatch):
    config, run = whole[0], tmp_path / "run"

    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(run / trainer.LOG):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{run / trainer.LOG}'")):
        quiet(config, run)
