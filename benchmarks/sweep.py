"""How the ops scale: rows, channels, modalities, stages, dtype and threads, one changed at a time from a usual problem.

    python benchmarks/sweep.py [--op fusion ...] [--seconds 1] [--csv benchmarks/results/sweep.csv] [--compiled all]
    python benchmarks/sweep.py --table | --plot docs/sweep.png | --compare COMMIT      of what stands in the CSV

Before anything is timed, outputs and gradients of each implementation are compared with the reference in float64: there is no
number on a wrong result. Implementations are timed in turn (caches as others left them), and each alone in a loop (warm). Rows
are appended to the CSV with machine, versions and commit; nothing in it is ever changed. "compile" is torch.compile of the
reference, static shapes, by default for the usual problem of each op alone, for it takes a minute a point; "torchmetrics" is
its ConcordanceCorrCoef, forward alone.
"""

from __future__ import annotations

import argparse
import csv
import functools
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from report import machine
from torch import Tensor

from sage_ext import functional, reference

ROOT = Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "sweep.csv"
FIELDS = ("date", "cpu", "cores", "isa", "threads", "python", "torch", "sage_ext", "commit", "op", "changed", "value",
          "problem", "implementation", "in_turn_us", "alone_us", "rounds", "bytes")  # fmt: skip
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}  # of the largest entry of what the reference says in float64
Problem = dict[str, Any]
Make = Callable[[Problem, Callable, torch.dtype], Callable[[], tuple[Tensor, ...]]]


def _random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


@functools.cache
def _weights(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What the outputs' gradients are: made once, not in what is timed."""
    return _random(*shape, seed=99, dtype=dtype)


def _with_gradients(outputs: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return (outputs, *torch.autograd.grad(outputs, leaves, _weights(outputs.shape, outputs.dtype)))


def fusion(p: Problem, op: Callable, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    b, t, m, d, s = p["batch"], p["frames"], p["modalities"], p["dim"], p["stages"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = [
        _random(b, t, d, seed=i, dtype=torch.bfloat16 if p["dtype"] == "bfloat16" else dtype).to(dtype)
        for i in range(m)
    ]
    gate = _random(b, t, m, s, seed=20, dtype=wide)
    stage = torch.softmax(_random(b, t, s, seed=21, dtype=wide), -1)
    temperature, bias = 0.1 * _random(m, s, seed=22, dtype=wide), _random(m, s, seed=23, dtype=wide)
    sharpness, weight, shift = (_random(*shape, seed=24, dtype=wide).abs() + 0.5 for shape in ((m,), (m, d), (m, d)))
    leaves = [x.requires_grad_(p["backward"]) for x in (*values, gate)]

    def run() -> tuple[Tensor, ...]:
        fused = op(values, gate, stage, log_temperature=temperature, bias=bias, sharpness=sharpness, norm_weight=weight,
                   norm_bias=shift)[0]  # fmt: skip
        return _with_gradients(fused, leaves) if p["backward"] else (fused,)

    return run


def stage_filter(p: Problem, op: Callable, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [
        _random(p["batch"], p["frames"], p["stages"], seed=0, dtype=dtype),
        _random(p["stages"], p["stages"], seed=1, dtype=dtype),
    ]
    leaves = [x.requires_grad_() for x in leaves]
    return lambda: _with_gradients(op(*leaves)[0], leaves)


def ccc(p: Problem, op: Callable, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    target = _random(p["batch"], p["frames"], 2, seed=0, dtype=dtype)
    pred = (0.7 * target + 0.5 * _random(p["batch"], p["frames"], 2, seed=1, dtype=dtype)).requires_grad_(p["backward"])
    return lambda: _with_gradients(op(pred, target), [pred]) if p["backward"] else (op(pred, target),)


def temporal_ccc(p: Problem, op: Callable, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    target = _random(p["batch"], p["frames"], 2, seed=0, dtype=dtype)
    pred = (0.7 * target + 0.5 * _random(p["batch"], p["frames"], 2, seed=1, dtype=dtype)).requires_grad_()
    return lambda: _with_gradients(op(pred, target, window=p["window"])[0], [pred])


def leaky_average(p: Problem, op: Callable, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    x = _random(p["batch"], p["frames"], p["dim"], seed=0, dtype=dtype).requires_grad_()
    precision = _random(p["batch"], p["frames"], seed=1, dtype=dtype).abs().requires_grad_()
    halflife, prior = torch.tensor([8.0, 32.0, 128.0], dtype=dtype), torch.ones(3, dtype=dtype)
    return lambda: _with_gradients(op(x, precision, halflife, prior)[0], [x, precision])


def _torchmetrics(p: Problem) -> Callable[[], tuple[Tensor, ...]]:
    from torchmetrics.functional import concordance_corrcoef

    target = _random(p["batch"], p["frames"], 2, seed=0, dtype=torch.float32)
    pred = (0.7 * target + 0.5 * _random(p["batch"], p["frames"], 2, seed=1, dtype=torch.float32)).flatten(0, 1)
    target = target.flatten(0, 1)
    return lambda: (concordance_corrcoef(pred, target),)


# op -> how to make a run of it, the two implementations, the usual problem, and what is changed in it
USUAL: Problem = {"batch": 8, "frames": 300, "dtype": "float32", "threads": 2}
OPS: dict[str, tuple[Make, Callable, Callable, Problem, dict[str, list[Any]]]] = {
    "fusion": (fusion, functional.reliability_fusion, reference.reliability_fusion,
               {**USUAL, "modalities": 2, "dim": 256, "stages": 4, "backward": False},
               {"frames": [1, 30, 3000], "dim": [32, 128, 1024], "modalities": [1, 4, 8], "stages": [1, 16],
                "dtype": ["bfloat16"], "threads": [1], "backward": [True]}),
    "stage_filter": (stage_filter, functional.stage_filter, reference.stage_filter, {**USUAL, "stages": 4},
                     {"frames": [30, 1000], "stages": [2, 8, 16], "threads": [1]}),
    "ccc": (ccc, functional.ccc, reference.ccc, {**USUAL, "backward": False},
            {"frames": [30, 3000, 100_000], "threads": [1], "backward": [True]}),
    "temporal_ccc": (temporal_ccc, functional.temporal_ccc, reference.temporal_ccc, {**USUAL, "window": 75},
                     {"frames": [150, 3000], "window": [10, 150], "threads": [1]}),
    "leaky_average": (leaky_average, functional.leaky_average, reference.leaky_average, {**USUAL, "dim": 128},
                      {"frames": [30, 1000], "dim": [32, 512], "threads": [1]}),
}  # fmt: skip


def problems(op: str) -> Iterator[tuple[str, Any, Problem]]:
    """(what is changed, its value, the problem): first the usual one."""
    *_, usual, changes = OPS[op]
    yield "", "", usual
    for name, values in changes.items():
        for value in values:
            yield name, value, {**usual, name: value}


def check(made: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype, what: str) -> None:
    """ValueError where an implementation is wrong."""
    for place, (got, want) in enumerate(zip(made, truth)):
        error = float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max().clamp(min=1e-6))
        if not error <= TOLERANCE[dtype]:
            raise ValueError(
                f"{what}: output {place} is off by {error:.2g} of the largest entry, expected {TOLERANCE[dtype]:g}"
            )


def times(runs: dict[str, Callable], seconds: float) -> dict[str, tuple[float, float, int]]:
    """Medians in microseconds, (in turn, alone), and rounds."""
    for run in runs.values():
        for _ in range(3):
            run()
    turns: dict[str, list[float]] = {name: [] for name in runs}
    order, rng, end = list(runs), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns[order[0]]) < 5:
        rng.shuffle(order)
        for name in order:
            began = time.perf_counter()
            runs[name]()
            turns[name].append(time.perf_counter() - began)
    found = {}
    for name, run in runs.items():
        alone: list[float] = []
        end = time.perf_counter() + seconds / 3
        while time.perf_counter() < end or len(alone) < 5:
            began = time.perf_counter()
            run()
            alone.append(time.perf_counter() - began)
        found[name] = (1e6 * statistics.median(turns[name]), 1e6 * statistics.median(alone), len(turns[name]))
    return found


def sweep(op: str, seconds: float, compiled: str) -> Iterator[dict[str, Any]]:
    make, ours, theirs, *_ = OPS[op]
    for changed, value, problem in problems(op):
        dtype = getattr(torch, problem["dtype"])
        torch.set_num_threads(problem["threads"])
        truth = make(problem, theirs, torch.float64)()
        runs: dict[str, Callable] = {"sage_ext": make(problem, ours, dtype), "eager": make(problem, theirs, dtype)}
        if (compiled == "all" or (compiled == "usual" and not changed)) and op not in ("stage_filter", "temporal_ccc"):
            torch._dynamo.reset()  # the other two would be unrolled, a frame after the other
            runs["compile"] = make(problem, torch.compile(theirs, dynamic=False), dtype)
        for name, run in runs.items():
            check(run(), truth, dtype, f"{op} {problem}, {name}")
        if op == "ccc" and not problem["backward"]:
            runs["torchmetrics"] = _torchmetrics(problem)
        size = sum(x.numel() * x.element_size() for x in runs["sage_ext"]())
        if op == "fusion":  # the modalities read as well
            size += problem["modalities"] * problem["batch"] * problem["frames"] * problem["dim"] * dtype.itemsize
        for name, (turn, alone, rounds) in times(runs, seconds).items():
            yield {"op": op, "changed": changed, "value": value, "problem": " ".join(f"{k}={v}" for k, v in problem.items()),
                   "threads": problem["threads"], "implementation": name, "in_turn_us": f"{turn:.1f}", "alone_us": f"{alone:.1f}",
                   "rounds": rounds, "bytes": size}  # fmt: skip


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------------------- of the CSV
def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], dict[str, dict[str, str]]]:
    """(op, changed, value) -> implementation -> the last row of it."""
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["op"], row["changed"], row["value"]), {})[row["implementation"]] = row
    return found


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| op | changed | sage_ext, us | eager | torch.compile | torchmetrics |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (op, changed, value), by in latest(rows).items():
        ours = float(by["sage_ext"]["in_turn_us"])
        ratios = [
            f"{float(by[name]['in_turn_us']) / ours:.1f}x" if name in by else "-"
            for name in ("eager", "compile", "torchmetrics")
        ]
        lines.append(f"| {op} | {f'{changed} {value}' if changed else '(usual)'} | {ours:.0f} | {' | '.join(ratios)} |")
    about = rows[-1]
    usual = "; ".join(f"{op}: {' '.join(f'{k} {v}' for k, v in OPS[op][3].items())}" for op in OPS)
    where = ", ".join(
        (
            about["cpu"],
            f"{about['cores']} cores",
            about["isa"],
            f"torch {about['torch']}",
            about["date"],
            about["commit"],
        )
    )
    lines.append(f"\n{where}. In turn; ratios above 1: sage_ext is faster. Usual: {usual}.")
    return "\n".join(lines)


def compare(rows: list[dict[str, str]], base: str) -> str:
    """The last figures against those of the commit that begins so, on the same CPU; ratios above 1: slower now."""
    old = latest([row for row in rows if row["commit"].startswith(base)])
    if not old:
        known = ", ".join(sorted({row["commit"] for row in rows}))
        raise SystemExit(f"--compare: expected a commit that stands in the CSV ({known}), got {base}")
    lines = [f"| op | changed | {base}, us | now, us | now / then |", "| --- | --- | ---: | ---: | ---: |"]
    for key, by in latest(rows).items():
        if key in old and "sage_ext" in old[key] and by["sage_ext"]["cpu"] == old[key]["sage_ext"]["cpu"]:
            then, now = (float(x["sage_ext"]["in_turn_us"]) for x in (old[key], by))
            lines.append(f"| {key[0]} | {key[1]} {key[2]} | {then:.0f} | {now:.0f} | {now / then:.2f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """A panel an op: time over frames; and the bytes a second of the fusion and the CCC over their size."""
    from matplotlib.figure import Figure

    found = latest(rows)
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    marks = {"sage_ext": "o-", "eager": "s--", "compile": "^:", "torchmetrics": "d-."}
    for axis, op in zip(axes, OPS):
        for name, mark in marks.items():
            points = [
                (int(value) if changed == "frames" else OPS[op][3]["frames"], float(by[name]["in_turn_us"]))
                for (o, changed, value), by in found.items()
                if o == op and changed in ("", "frames") and name in by
            ]
            if points:
                x, y = zip(*sorted(points))
                axis.loglog(x, y, mark, label=name)
        axis.set(title=op, xlabel="frames a sequence", ylabel="us a call, in turn")
        if axis.lines:
            axis.legend(fontsize=8)
    for op in ("fusion", "ccc"):
        points = [(int(by["sage_ext"]["bytes"]) / 1e6, int(by["sage_ext"]["bytes"]) / 1e3 / float(by["sage_ext"]["alone_us"]))
                  for (o, _, _), by in found.items() if o == op]  # fmt: skip
        axes[-1].semilogx(*zip(*sorted(points)), "o", label=op)
    axes[-1].set(title="bytes read and written a second, alone", xlabel="MB a call", ylabel="GB/s")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds, each problem")
    parser.add_argument("--compiled", choices=("usual", "all", "none"), default="usual")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--compare", metavar="COMMIT")
    args = parser.parse_args()
    if args.table or args.plot or args.compare:
        rows = read(args.csv)
        if args.table:
            print(table(rows))
        if args.compare:
            print(compare(rows, args.compare))
        if args.plot:
            plot(rows, args.plot)
        return
    about = {**machine(), "commit": commit()}
    new = not args.csv.exists()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "a", newline="") as file:
        rows = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            rows.writeheader()
        for op in args.op:
            for row in sweep(op, args.seconds, args.compiled):
                rows.writerow({**{k: about[k] for k in about if k in FIELDS}, **row})
                file.flush()
                print(
                    f"{row['op']:14} {row['changed']:10} {row['value']!s:9} {row['implementation']:12} {row['in_turn_us']:>10} us"
                )


if __name__ == "__main__":
    main()
