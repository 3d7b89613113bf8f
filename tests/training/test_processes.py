"""Training by several processes: that of one, whatever their number; one sentence and no wait where one of them ends.

Processes are started here as torchrun starts them, by its environment variables: `python test_distributed.py JOB` is one of
them. It trains in float64, in which what is left of the order of a sum is far below what is compared.
"""

import contextlib
import csv
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sage_ext
from sage_ext.data import windows
from sage_ext.models.layers import ChannelDropout, Dropout, Share
from sage_ext.training import trainer
from sage_ext.training.checkpoint import load_checkpoint
from sage_ext.training.distributed import ALONE, TIMEOUT, LostError, joined
from sage_ext.training.trainer import BEST, LAST, TrainConfig, train

ROOT = Path(sage_ext.__file__).parents[1]
STOPPED = 9  # exit code


class Exact(trainer.Training):
    """In float64, and ended without a word after `stop` steps."""

    stop = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model.double()

    def _one_step(self, batch):
        if self.step == self.stop:
            os._exit(STOPPED)
        super()._one_step(batch)


def exactly(read):
    """`clip_tensors` in float64."""

    def double(tree):
        if isinstance(tree, dict):
            return {name: double(x) for name, x in tree.items()}
        return tree.double() if tree.is_floating_point() else tree

    return lambda *arguments: double(read(*arguments))


def work(jobs, group):
    """jobs: [configuration, run directory, options of `train`, step to stop before] each."""
    for config, run, options, stop in jobs:
        Exact.stop = stop
        train(TrainConfig.from_json(config), run, group=group, progress=False, **options)


def start(size, command, **environment):
    """`size` processes of `command`, or of what it gives for a rank, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # sage_ext as it is imported here, whatever the script's own folder would give
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, *(command(rank) if callable(command) else command)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes, timeout=120):
    """Exit code, standard output and error of each."""
    until = time.monotonic() + timeout
    try:
        found = [p.communicate(timeout=max(until - time.monotonic(), 0.1)) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *said) for p, said in zip(processes, found)]


def run_jobs(size, jobs, folder):
    path = folder / f"jobs-{size}.json"
    path.write_text(json.dumps([[config.to_json(), str(run), options, stop] for config, run, options, stop in jobs]))
    found = ended(start(size, [__file__, str(path)]))
    assert {code for code, _, _ in found} == {0 if all(stop is None for *_, stop in jobs) else STOPPED}, found
    assert all(out == "" for _, out, _ in found)


def cases(data):
    """Uneven shares, dropout and rehearsal in all."""
    base = TrainConfig(
        str(data), dim=8, stages=2, blocks=2, window=2, hop=4 / 3, batch_size=5, epochs=9, max_steps=20, lr=3e-3, warmup=3,
        dropout=0.2, threads=1, checkpoint_every=2,
    )  # fmt: skip
    return {
        "sage": base,
        "one-batch": dataclasses.replace(base, batch_size=1000, max_steps=3),
        "mult": dataclasses.replace(base, fusion="mult", max_steps=10),
        "jca": dataclasses.replace(base, fusion="jca", max_steps=10),
        "patience": dataclasses.replace(base, lr=0.5, patience=1, max_steps=None),
    }


SLOW = ["one-batch", "mult", "jca", "patience"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """(size, case) -> the run of a case, trained by so many processes; the slow cases by the same ones."""
    done = {}

    def of(size, case):
        if (size, case) not in done:
            folder = tmp_path_factory.mktemp(f"by-{size}")
            names = SLOW if case in SLOW else [case]
            run_jobs(size, [(cases(data)[name], folder / name, {}, None) for name in names], folder)
            done.update({(size, name): folder / name for name in names})
        return done[size, case]

    return of


def rows_of(run):
    with open(run / "log.csv", newline="") as file:
        return [[float(x) for x in row] for row in list(csv.reader(file))[1:]]


def tensors(tree, path=""):
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(value, f"{path}/{key}")


def assert_same(a, b, tolerance=1e-10):
    """The last state, optimizer, generator and best weights included, and the log."""
    for name in (LAST, BEST):
        one, two = (dict(tensors(load_checkpoint(run / name))) for run in (a, b))
        assert one.keys() == two.keys()
        for key, x in one.items():
            assert x.dtype == two[key].dtype
            gap = float((x.double() - two[key].double()).abs().max()) if x.numel() else 0.0
            assert gap <= tolerance * max(float(x.double().abs().max()), 1.0), f"{name} {key}: {gap}"
    assert load_checkpoint(a / LAST)["at"] == load_checkpoint(b / LAST)["at"]
    np.testing.assert_allclose(rows_of(a), rows_of(b), rtol=1e-7, atol=1e-10)  # 8 digits


def test_two_processes_train_what_one_does(trained):
    assert_same(trained(1, "sage"), trained(2, "sage"))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "case"), [(3, "sage"), *((size, case) for size in (2, 3) for case in SLOW)])
def test_several_processes_train_what_one_does(trained, size, case):
    """Fewer rows than a batch, peers' dropout, an early stop that all agree on."""
    assert_same(trained(1, case), trained(size, case))
    if case == "patience":
        assert load_checkpoint(trained(size, case) / LAST)["at"]["step"] < 20


@pytest.mark.slow
def test_a_run_is_continued_by_another_number_of_processes(data, trained, tmp_path):
    config, run = cases(data)["sage"], tmp_path / "run"
    for size, resume, stop in ((2, False, 3), (3, True, 14), (1, True, None)):
        run_jobs(size, [(config, run, {"resume": resume}, stop)], tmp_path)
        assert load_checkpoint(run / LAST)["at"]["step"] in ((20,) if stop is None else (stop - 1, stop))
    assert_same(trained(1, "sage"), run)


def test_dropout_of_the_shares_is_dropout_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    for layer in (Dropout(0.4), ChannelDropout(0.4)):
        for whole, size, tracks in ((7, 3, 1), (6, 2, 4), (5, 5, 2), (4, 1, 3)):
            x = torch.rand(whole, tracks, 9, 5, generator=generator, dtype=torch.float64) + 1
            torch.manual_seed(3)
            layer.share = None
            expected = layer(x.flatten(0, 1)).unflatten(0, (whole, tracks))
            after = torch.get_rng_state()
            assert 0 < (expected == 0).sum() < expected.numel()
            for rank in range(size):
                torch.manual_seed(3)
                layer.share = Share(rank, size, whole)
                assert len(x[rank::size]) == layer.share.rows
                found = layer(x[rank::size].flatten(0, 1)).unflatten(0, (-1, tracks))
                torch.testing.assert_close(found, expected[rank::size], rtol=1e-15, atol=0)
                assert torch.equal(torch.get_rng_state(), after)  # of all processes alike
            layer.eval()
            assert torch.equal(layer(x), x)
            layer.train()


# ------------------------------------------------------------------------------------------------------------- the end
def command(data, run, *more):
    return ["-m", "sage_ext", "train", "--data", str(data), "--run", str(run), "--dim", "8", "--batch-size", "4", "--window",
            "2", "--checkpoint-every", "2", "--warmup", "3", "--lr", "3e-3", "--epochs", "9", *more]  # fmt: skip


def under_way(run, processes, steps=4):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert all(p.poll() is None for p in processes), ended(processes)
        with contextlib.suppress(Exception):
            if load_checkpoint(run / LAST)["at"]["step"] >= steps:
                return
        time.sleep(0.05)
    raise AssertionError("no checkpoint")


def sentences(*said):
    return [line for text in said for line in text.splitlines() if ": error: " in line or "Traceback" in line]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_ends_the_job_which_can_be_resumed(data, tmp_path, rank):
    run = tmp_path / "run"
    processes = start(3, command(data, run))
    under_way(run, processes)
    began = time.monotonic()
    processes[rank].kill()
    found = ended(processes)
    assert [code for code, _, _ in found] == [-signal.SIGKILL if r == rank else 2 for r in range(3)]
    assert time.monotonic() - began < 60
    said = sentences(*(err for _, _, err in found))
    assert set(said) == {
        "sage-ext train: error: another of the 3 processes ended or does not answer; continue from the last checkpoint in "
        f"{run} with --resume"
    }
    assert len(said) == 1 or rank == 0  # the first one holds what tells them who speaks; torchrun does where it is used
    assert all(out == "" for _, out, _ in found)
    ((code, out, err),) = ended(start(1, command(data, run, "--resume", "--quiet")))
    assert (code, err) == (0, "")
    assert "best validation P" in out
    assert [row[0] for row in rows_of(run)] == list(range(9))


@pytest.mark.slow
def test_processes_that_do_not_answer_are_not_waited_for_long(data, tmp_path):
    run = tmp_path / "run"
    processes = start(2, command(data, run), **{TIMEOUT: "12"})
    under_way(run, processes)
    processes[1].send_signal(signal.SIGSTOP)
    out, err = processes[0].communicate(timeout=90)
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == 2
    assert out == ""
    (sentence,) = sentences(err)
    assert "another of the 2 processes ended or does not answer" in sentence


@pytest.mark.slow
def test_an_error_is_said_once(data, tmp_path):
    """Of all processes, or of one."""
    found = ended(start(3, command(data, tmp_path / "run", "--batch-size", "2")))
    assert [code for code, _, _ in found] == [2, 2, 2]
    (sentence,) = sentences(*(err for _, _, err in found))
    assert "batch_size: expected a window or more for each of 3 processes, got 2 of " in sentence

    def elsewhere(rank):
        return command(tmp_path / "nowhere" if rank == 1 else data, tmp_path / "run")

    found = ended(start(2, elsewhere))
    assert [code for code, _, _ in found] == [2, 2]
    assert found[0][1:] == ("", "") or "starts at step 0" in found[0][2]
    (sentence,) = sentences(*(err for _, _, err in found))
    assert sentence in found[1][2]
    assert "nowhere" in sentence


@pytest.mark.slow
def test_torchrun(data, tmp_path):
    """The command of docs/scaling.md: one process speaks; the first one killed, another says so."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--"]
    ((code, out, err),) = ended(start(1, [*launch, *command(data, tmp_path / "run")[1:]]))
    assert code == 0, err
    assert out.count("best validation P") == out.count("calibration error") == 1
    assert len(out.splitlines()) == 2
    assert err.count("starts at step 0") == 1
    assert err.count("epoch   9/9") == 1

    (job,) = start(1, [*launch, *command(data, tmp_path / "killed", "--epochs", "500")[1:]])
    try:
        under_way(tmp_path / "killed", [job])
        (first,) = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and rank_of(p, job.pid) == "0"]
        os.kill(first, signal.SIGKILL)
    finally:
        ((code, out, err),) = ended([job])
    assert code == 1
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("sage-ext train: error: ")]) == 1


def rank_of(process, parent):
    """RANK of a child of `parent`; of no other process is anything read."""
    with contextlib.suppress(OSError):
        if f"PPid:\t{parent}\n" in (process / "status").read_text():
            variables = dict(x.partition("=")[::2] for x in (process / "environ").read_text().split("\0"))
            return variables["RANK"]
    return None


def test_variables_without_the_others_of_torchrun_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for value, said in (("2", "got 2 without RANK"), ("many", "expected a number of processes, got 'many'")):
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(ValueError, match=f"^WORLD_SIZE: .*{said}"), joined():
            pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as group:
        assert group is ALONE


def test_nobody_comes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(TIMEOUT, "soon")
    with pytest.raises(ValueError, match=f"^{TIMEOUT}: expected seconds, got 'soon'"), joined():
        pass
    monkeypatch.setenv(TIMEOUT, "1")
    with pytest.raises(LostError, match="another of the 2 processes"), joined():
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


if __name__ == "__main__":
    trainer.Training, windows.clip_tensors = Exact, exactly(windows.clip_tensors)
    with joined() as group_:
        work(json.loads(Path(sys.argv[1]).read_text()), group_)
