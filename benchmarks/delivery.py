"""How fast the CPU delivers training batches: the reader alone, with the failure rehearsal, and beside steps of a GPU.

    python benchmarks/delivery.py [--seconds 3] [--batch 32] [--step-ms 5] [--threads 2]

Batches are `batch` windows of 300 frames of two modalities of 128 features, of 24 synthetic videos, as `sage-ext train` makes
them. There is no GPU here: a step is a sleep of `step-ms`, an assumed time, in which the caller holds neither a core nor the
interpreter; copies to a device are not in it. A figure is the median of the seconds a batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sage_ext.data.synthetic import write_dataset
from sage_ext.training.prefetch import Prefetch
from sage_ext.training.progress import Progress
from sage_ext.training.rehearsal import Rehearsal
from sage_ext.training.trainer import TrainConfig, Training, open_data

NONE = Rehearsal(probability=0.0, unknown=0.0)


def batches(training: Training) -> Iterator[Any]:
    """Without an end, epoch after epoch."""
    while True:
        yield from training._rehearsed(training._batches(), training.epoch * training.per_epoch)
        training.epoch += 1


def measure(config: TrainConfig, run: Path, seconds: float, step: float) -> float:
    """Median seconds a batch, the first three aside."""
    training = Training(config, run, open_data(config), Progress(run, quiet=True))
    times: list[float] = []
    begin = last = time.perf_counter()
    with Prefetch(batches(training), config.prefetch) as items:
        for _ in items:
            if step:
                time.sleep(step)
            now = time.perf_counter()
            times.append(now - last)
            last = now
            if now > begin + seconds and len(times) >= 8:
                break
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="a figure")
    parser.add_argument("--batch", type=int, default=32, help="windows")
    parser.add_argument("--step-ms", type=float, default=5.0, help="assumed time of a step on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step = options.step_ms / 1e3
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(
            root / "data", train=24, validation=1, test=0, frames=(3000, 3000), quality=False,
            modalities={"audio": 128, "visual": 128},
        )  # fmt: skip
        config = TrainConfig(str(root / "data"), batch_size=options.batch, threads=options.threads, prefetch=0)
        print("| what | a batch | batches a second | a batch / the step |\n| --- | --- | --- | --- |")
        for name, changes, wait in (
            ("reader", {"rehearsal": NONE}, 0.0),
            ("reader + rehearsal", {}, 0.0),
            ("reader + rehearsal, 2 reading processes", {"num_workers": 2}, 0.0),
            ("with the step, prefetch 0", {}, step),
            ("with the step, prefetch 1", {"prefetch": 1}, step),
            ("with the step, prefetch 2", {"prefetch": 2}, step),
        ):
            took = measure(dataclasses.replace(config, **changes), root / "run", options.seconds, wait)
            print(f"| {name} | {took * 1e3:.1f} ms | {1 / took:.0f} | {took / step:.1f} |", flush=True)


if __name__ == "__main__":
    main()
