"""Measures every case of cases.py and prints a Markdown table: medians, ratios, targets met or missed.

    python benchmarks/report.py [--threads 2] [--rounds 60] [--default-malloc] [--json FILE]

The implementations of a case take turns, round by round, in one process; a ratio is the median of the rounds' ratios, so
that a machine whose speed drifts does not decide it. Inputs stay where the last round left them (warm cache). glibc is told
to keep freed memory (mallopt): otherwise whether a call pays for fresh pages, which can double its time, depends on where
the heap happens to end. --default-malloc leaves that as it is.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import time

import torch
from cases import CASES, Case

import sage_ext
from sage_ext import _C


def _time(run, budget: float = 0.02) -> float:
    """Seconds a call: enough calls in a row to fill `budget`, at least one."""
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    calls = max(1, int(budget / max(once, 1e-7)))
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _copy(numbers: int):
    """A copy of half of `numbers` floats: reads and writes `numbers` in all."""
    source = torch.randn(numbers // 2)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(case: Case, rounds: int, compiled: bool) -> dict:
    runs = case.implementations(compiled)
    if case.bytes:
        runs["copy"] = _copy(case.bytes // 4)
    for run in runs.values():
        for _ in range(3):
            run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_time(run))
    medians = {name: statistics.median(t) for name, t in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(t, times["kernel"]))
        for name, t in times.items()
        if name not in ("kernel", "copy")
    }
    result = {"case": case.name, "seconds": medians, "ratios": ratios, "targets": case.targets}
    if case.bytes:
        result["of_copy"] = statistics.median(b / a for a, b in zip(times["copy"], times["kernel"]))
    return result


def keep_freed_memory() -> None:
    try:
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**30)
    except (OSError, AttributeError):
        print("no mallopt here: times include fresh pages")


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--default-malloc", action="store_true")
    options = parser.parse_args()
    if not options.default_malloc:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    results = []
    print("| case | kernel | eager | torch.compile | vs eager | vs torch.compile |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        if options.only not in case.name:
            continue
        r = measure(case, options.rounds, not options.no_compile)
        results.append(r)
        us = {k: f"{v * 1e6:,.0f} us" for k, v in r["seconds"].items()}

        def against(opponent: str, r: dict = r) -> str:
            if opponent not in r["ratios"]:
                return "-"
            ratio, target = r["ratios"][opponent], r["targets"].get(opponent)
            verdict = "" if target is None else f" (target {target:g}: {'met' if ratio >= target else 'MISSED'})"
            return f"{ratio:.1f}x{verdict}"

        print(
            f"| {r['case']} | {us['kernel']} | {us['eager']} | {us.get('compile', '-')} "
            f"| {against('eager')} | {against('compile')} |",
            flush=True,
        )
        if "of_copy" in r:
            print(f"| ... time over that of copying the same bytes ({us['copy']}) | {r['of_copy']:.2f} | | | | |")
    about = machine()
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    if options.json:
        with open(options.json, "w") as f:
            json.dump({"machine": about, "results": results}, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
