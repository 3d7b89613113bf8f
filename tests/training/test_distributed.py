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
    """`size` processes of `command`, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # sage_ext as it is imported here, whatever the script's own folder would give
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return [
        subprocess.Popen(
            [sys.executable, *command],
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


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """size -> folder of the runs of all cases, trained by so many processes."""
    done = {}

    def of(size):
        if size not in done:
            folder = tmp_path_factory.mktemp(f"by-{size}")
            run_jobs(size, [(config, folder / name, {}, None) for name, config in cases(data).items()], folder)
            done[size] = folder
        return done[size]

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


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", ["sage", "one-batch", "mult", "jca", "patience"])
def test_several_processes_train_what_one_does(trained, case, size):
    assert_same(trained(1) / case, trained(size) / case)


if __name__ == "__main__":
    trainer.Training, windows.clip_tensors = Exact, exactly(windows.clip_tensors)
    with joined() as group_:
        work(json.loads(Path(sys.argv[1]).read_text()), group_)
