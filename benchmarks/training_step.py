"""What a user can set for a training step of SAGE on the CPU: each setting against the defaults, in turn, in fresh processes.

    python benchmarks/training_step.py [--rounds 5] [--seconds 3] [--batch 8] [--cpu-time] [--only NAME ...]

A step is forward, loss, backward and the optimizer's update on `batch` windows of 300 frames of two modalities, dim 128. A
figure is the median over the rounds of a process's median step; a ratio that of the rounds' ratios to the defaults.
LD_PRELOAD lines are measured where the library is found.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from bench import ALLOCATORS

SETTINGS: dict[str, dict[str, str]] = {
    "defaults": {},
    "keep_freed_memory()": {"KEEP": "1"},
    ", ".join(ALLOCATORS["keep"]): ALLOCATORS["keep"],
    "THP_MEM_ALLOC_ENABLE=1": {"THP_MEM_ALLOC_ENABLE": "1"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_WAIT_POLICY=active": {"OMP_WAIT_POLICY": "active"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def preloads() -> dict[str, dict[str, str]]:
    """LD_PRELOAD lines; a library of a folder in LIBRARIES, or one that the system knows."""
    found = {}
    for name in ("tcmalloc_minimal", "jemalloc"):
        path = ctypes.util.find_library(name)
        for folder in filter(None, os.environ.get("LIBRARIES", "").split(":")):
            here = [
                os.path.join(folder, file) for file in sorted(os.listdir(folder)) if file.startswith(f"lib{name}.so")
            ]
            path = here[-1] if here else path
        if path:
            found[f"LD_PRELOAD={os.path.basename(path)}"] = {"LD_PRELOAD": path}
    return found


def step(seconds: float, batch: int, clock: Callable[[], float]) -> float:
    """Median seconds a step, the first three aside."""
    import torch

    from sage_ext.allocator import keep_freed_memory
    from sage_ext.models import SAGE
    from sage_ext.nn import CCCLoss

    if os.environ.get("KEEP"):
        assert keep_freed_memory()
    torch.manual_seed(0)
    dims = {"audio": 128, "visual": 256}
    model, loss = SAGE(dims, dim=128), CCCLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    features, target = {name: torch.randn(batch, 300, dim) for name, dim in dims.items()}, torch.randn(batch, 300, 2)
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds or len(times) < 8:
        start = clock()
        optimizer.zero_grad()
        loss(model(features).prediction, target).backward()
        optimizer.step()
        times.append(clock() - start)
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="settings whose name contains one of these"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="of all threads, where other programs run beside this one"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(step(options.seconds, options.batch, time.process_time if options.cpu_time else time.perf_counter))
        return
    settings = {
        name: environment
        for name, environment in {**SETTINGS, **preloads()}.items()
        if name == "defaults" or any(text in name for text in options.only)
    }
    command = [sys.executable, __file__, "--child", "--seconds", str(options.seconds), "--batch", str(options.batch)]
    command += ["--cpu-time"] if options.cpu_time else []
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(options.rounds):
        for name, environment in settings.items():
            done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
            times[name].append(float(done.stdout))
    print("| setting | step | of the defaults' time |\n| --- | --- | --- |")
    for name, t in times.items():
        ratios = sorted(a / b for a, b in zip(t, times["defaults"]))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {statistics.median(t) * 1e3:.1f} ms | {spread} |")


if __name__ == "__main__":
    main()
