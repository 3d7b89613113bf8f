"""What a training step costs where several processes share it (`torchrun ... sage-ext train`), on this machine's CPU over gloo.

    python benchmarks/training_processes.py [--processes 1 2] [--steps 40] [--rounds 3] [--dim 128] [--batch 16]

One thread a process, windows of 300 frames of two modalities, synthetic. A figure is the median over the rounds of the first
process's median step: on the wall, which includes waiting for the others; its own CPU time, which is what to go by where other
programs run; and the CPU time of making its windows of one batch (a run does it in a thread meanwhile).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(root: str, dim: int, batch: int, steps: int) -> dict[str, Any]:
    """Of this process, one of those that train together."""
    import torch

    from sage_ext.allocator import keep_freed_memory
    from sage_ext.training import trainer
    from sage_ext.training.distributed import joined
    from sage_ext.training.progress import Progress

    keep_freed_memory()
    torch.set_num_threads(1)
    config = trainer.TrainConfig(root, dim=dim, batch_size=batch, threads=1, num_workers=0)
    with joined() as group, tempfile.TemporaryDirectory() as run:
        data = trainer.open_data(config)
        training = trainer.Training(config, Path(run), data, Progress(Path(run), quiet=True), group)
        walls, cpus, makings = [], [], []
        for _ in range(steps):
            began = time.process_time()
            made = next(training._rehearsed(training._batches(), training.step))
            makings.append(time.process_time() - began)
            wall, cpu = time.perf_counter(), time.process_time()
            training._one_step(made)
            training.position = 0
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        return {name: statistics.median(x[3:]) for name, x in (("wall", walls), ("cpu", cpus), ("making", makings))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data:
        found = measure(options.data, options.dim, options.batch, options.steps)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return

    from sage_ext.data.synthetic import write_dataset

    flags = [f"--{name}={getattr(options, name)}" for name in ("steps", "dim", "batch")]
    times: dict[int, list[dict[str, float]]] = {count: [] for count in options.processes}
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "data")
        write_dataset(root, seed=0, train=24, validation=2, test=0, frames=(300, 900))
        for _ in range(options.rounds):
            for count, found in times.items():
                launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
                done = subprocess.run(
                    [sys.executable, "-m", *launch, __file__, f"--data={root}", *flags],
                    env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True, text=True,
                )  # fmt: skip
                found.append(json.loads(done.stdout))
    print("| processes | step, wall | CPU time of one process | a batch made |\n| --- | --- | --- | --- |")
    for count, found in times.items():
        wall, cpu, making = (1e3 * statistics.median(x[name] for x in found) for name in ("wall", "cpu", "making"))
        print(f"| {count} | {wall:.0f} ms | {cpu:.0f} ms | {making:.0f} ms |")


if __name__ == "__main__":
    main()
