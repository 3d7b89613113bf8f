"""Races the implementations of every case of cases.py and prints a Markdown table: medians, ratios, targets met or missed.

    python benchmarks/report.py [--allocator default] [--runs 3] [--seconds 6] [--threads 2] [--only TEXT] [--json FILE]

One call of each implementation in turn, in an order drawn anew each round, all in one process: a kernel finds the caches as
other code left them and the threads asleep or not, as in a program that does more than call it. A ratio is the median of the
rounds' ratios, with their quartiles, so that a machine whose speed drifts does not decide it. "copy" is a copy that moves as
many bytes as the op reads and writes once.

Every case runs in a process of its own, with the allocator that is asked for: `default` is glibc's, which hands large blocks
back to the system and takes their pages anew; `keep` tells it to keep freed memory (MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_), for every implementation alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time

import torch
from cases import CASES, Case

import sage_ext
from sage_ext import _C

ALLOCATORS = {
    "default": {},
    "keep": {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)},
}


def _copy(numbers: int):
    """A copy of half of `numbers` floats: reads and writes `numbers` in all."""
    source = torch.randn(numbers // 2)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _quartiles(x: list[float]) -> list[float]:
    return statistics.quantiles(x, n=4, method="inclusive")


def measure(case: Case, seconds: float, compiled: bool) -> dict:
    runs = case.implementations(compiled)
    if case.bytes:
        runs["copy"] = _copy(case.bytes // 4)
    for run in runs.values():
        for _ in range(5):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffled, end = list(runs), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["kernel"]) < 5:
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    against = {n: [a / b for a, b in zip(t, times["kernel"])] for n, t in times.items() if n != "kernel"}
    return {
        "case": case.name,
        "rounds": len(times["kernel"]),
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "ratios": {name: _quartiles(ratio) for name, ratio in against.items()},
        "targets": case.targets,
    }


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            lines = [[part.strip() for part in line.split(":", 1)] for line in f if ":" in line]
        about = dict(reversed(lines))  # of the first processor
        cpu = about["model name"]
        if "model" in about:
            cpu += f" (family {about['cpu family']}, model {about['model']})"
    except (OSError, KeyError):
        pass
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sage_ext": sage_ext.__version__,
    }


def _against(result: dict, opponent: str) -> str:
    if opponent not in result["ratios"]:
        return "-"
    low, ratio, high = result["ratios"][opponent]
    target = result["targets"].get(opponent)
    verdict = "" if target is None else f"; target {target:g}: {'met' if ratio >= target else '**missed**'}"
    return f"{ratio:.1f}x ({low:.1f} to {high:.1f}{verdict})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both")
    parser.add_argument("--runs", type=int, default=1, help="of the whole race, each in fresh processes")
    parser.add_argument("--seconds", type=float, default=6.0, help="of rounds, each case and run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains one of these"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # this one alone, here, as JSON
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case is not None:
        print(json.dumps(measure(CASES[options.case], options.seconds, not options.no_compile)))
        return
    results = []
    print("| case | allocator | run | kernel | eager | torch.compile | copy | vs eager | vs torch.compile |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for index, case in enumerate(CASES):
        if not any(text in case.name for text in options.only):
            continue
        for allocator, environment in ALLOCATORS.items():
            if options.allocator not in (allocator, "both"):
                continue
            for number in range(options.runs):
                command = [sys.executable, __file__, "--case", str(index), "--seconds", str(options.seconds)]
                command += ["--threads", str(options.threads), *(["--no-compile"] if options.no_compile else [])]
                done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
                result = {**json.loads(done.stdout), "allocator": allocator, "run": number + 1}
                results.append(result)
                us = {name: f"{value * 1e6:,.0f} us" for name, value in result["seconds"].items()}
                print(
                    f"| {case.name} | {allocator} | {number + 1} | {us['kernel']} | {us['eager']} "
                    f"| {us.get('compile', '-')} | {us.get('copy', '-')} "
                    f"| {_against(result, 'eager')} | {_against(result, 'compile')} |",
                    flush=True,
                )
    about = machine()
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    if options.json:
        with open(options.json, "w") as f:
            json.dump({"machine": about, "results": results}, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
