"""Times each op and the model against eager PyTorch, torch.compile and torchmetrics, over sizes, dtypes and threads.

    python benchmarks/bench.py [--only TEXT ...] [--runs 3] [--allocator both] [--seconds 1] [--compiled all]     measures
    python benchmarks/bench.py --targets | --table | --plot FILE | --compare COMMIT       of what stands in the CSV file
    python benchmarks/bench.py --write          puts these into README.md and docs/ (`make bench` measures, then does this)

Every problem of problems.py runs in a process of its own. Before anything is timed, the outputs and gradients of each
implementation are compared with the reference in float64: no time is taken of a wrong answer. Then one call of each in turn, in
an order drawn anew each round: an implementation finds the caches as other code left them and the threads asleep or not, as in a
program that does more than call it ("in turn"). Then each alone in a loop, its data and code in the caches ("alone"). A ratio is
the median of the rounds' ratios in turn, with their quartiles, so that a machine whose speed drifts does not decide it. "copy" is
a copy that moves as many bytes as the op reads and writes once.

Allocators: `default` is glibc's, which hands large blocks back to the system and takes their pages anew; `keep` tells it to
keep freed memory (MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_), for every implementation alike.

Rows are appended to the CSV file with machine, versions and commit; nothing in it is ever changed. Of several runs the middle
one counts: the one with the median time of ours. torch.compile takes a minute a problem, so by default it runs on those that
have a target against it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from problems import OPS, TOLERANCE, Run

import sage_ext
from sage_ext import _C

ROOT = Path(__file__).parents[1]
CSV, PLOT = ROOT / "benchmarks" / "results" / "bench.csv", ROOT / "docs" / "bench.png"
PAGES = {"targets": ROOT / "README.md", "table": ROOT / "docs" / "benchmarks.md"}
FIELDS = ("date", "cpu", "cores", "isa", "python", "torch", "sage_ext", "commit", "allocator", "run", "op", "problem",
          "implementation", "error", "rounds", "in_turn_us", "alone_us", "ratio_low", "ratio", "ratio_high", "bytes")  # fmt: skip
Row = dict[str, str]
OPPONENTS = ("eager", "compile", "torchmetrics")
ALLOCATORS = {
    "default": {},
    "keep": {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)},
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


def commit() -> str:
    """Of the code that is measured; "-dirty" where it differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


# ----------------------------------------------------------------------------------------------------------- measuring
def _clocked(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def times(runs: dict[str, Run], seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each call: in turn with the others, and alone."""
    for run in runs.values():
        for _ in range(3):
            run()
    turns: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffled, end = list(runs), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns[order[0]]) < 5:
        shuffled.shuffle(order)
        for name in order:
            turns[name].append(_clocked(runs[name]))
    alone: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        end = time.perf_counter() + seconds / 4
        while time.perf_counter() < end or len(alone[name]) < 5:
            alone[name].append(_clocked(run))
    return {name: (turns[name], alone[name]) for name in runs}


def measure(name: str, label: str, seconds: float, compiled: bool) -> list[dict]:
    """The rows of one problem, in this process."""
    op = OPS[name]
    problem = dict(op.problems())[label]
    torch.set_num_threads(problem["threads"])
    runs, errors = op.runs(problem, compiled)
    right = {n: run for n, run in runs.items() if errors[n] <= TOLERANCE[getattr(torch, problem["dtype"])]}
    size = op.moved(problem) if op.moved else 0
    if size:
        source, target = torch.randn(size // 8), torch.empty(size // 8)
        right["copy"] = lambda: (target.copy_(source),)
    found = times(right, seconds)
    rows = []
    for way in [*runs, *(["copy"] if size else [])]:
        row = {"op": name, "problem": label, "implementation": way, "bytes": size or ""}
        if way in errors:
            row["error"] = f"{errors[way]:.1g}"
        if way in found:
            turn, alone = found[way]
            ratios = [theirs / ours for theirs, ours in zip(turn, found["sage_ext"][0])]
            quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
            row |= {"rounds": len(turn), "in_turn_us": f"{1e6 * statistics.median(turn):.1f}",
                    "alone_us": f"{1e6 * statistics.median(alone):.1f}"}  # fmt: skip
            row |= dict(zip(("ratio_low", "ratio", "ratio_high"), (f"{q:.3f}" for q in quartiles)))
        rows.append(row)
    return rows


def measure_all(only: list[str], allocators: list[str], runs: int, seconds: float, compiled: str, path: Path) -> None:
    """Appends the rows of the problems whose name contains one of `only` to the file."""
    about = {k: v for k, v in {**machine(), "commit": commit()}.items() if k in FIELDS}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(",".join(FIELDS) + "\n")
    for name, op in OPS.items():
        for label, _ in op.problems():
            if not any(text in f"{name} {label}" for text in only):
                continue
            compile_it = compiled == "all" or (compiled == "targets" and "compile" in op.targets.get(label, {}))
            for allocator in allocators if label in op.targets else allocators[:1]:
                for run in range(1, (runs if label in op.targets else 1) + 1):
                    command = [sys.executable, __file__, "--problem", name, label, "--seconds", str(seconds)]
                    command += ["--compiled", "all" if compile_it else "none"]
                    done = subprocess.run(
                        command, env={**os.environ, **ALLOCATORS[allocator]}, stdout=subprocess.PIPE, check=True
                    )
                    rows = [{**about, "allocator": allocator, "run": run, **row} for row in json.loads(done.stdout)]
                    with open(path, "a", newline="") as file:
                        csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(rows)
                    said = ", ".join(f"{r['implementation']} {r.get('in_turn_us', 'wrong')}" for r in rows)
                    print(f"{name}, {label} ({allocator}, run {run}): {said} us", flush=True)


# ---------------------------------------------------------------------------------------------------------- of the file
def read(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: list[Row], allocator: str = "keep") -> dict[tuple[str, str], dict[str, Row]]:
    """(op, problem) -> implementation -> its row: of the last sitting that has ours, the run with the median time of it."""
    sittings: dict[tuple[str, str], dict[tuple[str, ...], dict[str, dict[str, Row]]]] = {}
    for row in rows:
        if row["allocator"] == allocator:
            sitting = sittings.setdefault((row["op"], row["problem"]), {})
            runs = sitting.setdefault((row["date"], row["cpu"], row["commit"]), {})
            runs.setdefault(row["run"], {})[row["implementation"]] = row
    found = {}
    for key, sitting in sittings.items():
        runs = sorted(list(sitting.values())[-1].values(), key=lambda run: float(run["sage_ext"]["in_turn_us"]))
        found[key] = runs[(len(runs) - 1) // 2]
    return {(op, label): found[op, label] for op in OPS for label, _ in OPS[op].problems() if (op, label) in found}


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{float(row['in_turn_us']):,.0f} us" if row["in_turn_us"] else f"off by {row['error']}"


def _ratio(row: Row | None, target: float | None = None) -> str:
    if row is None or not row["ratio"]:
        return _time(row)
    said = f"{float(row['ratio']):.1f}x"
    if target is not None:
        said += f" ({target:g}: {'met' if float(row['ratio']) >= target else '**missed**'})"
    return said


def _where(by: list[dict[str, Row]]) -> str:
    """The machine and versions of these rows, each that there is."""
    places = {}
    for row in (implementations["sage_ext"] for implementations in by):
        place = f"{row['cpu']}, {row['isa']}, {row['cores']} cores; Python {row['python']}, torch {row['torch']}"
        places.setdefault(f"{place}; {row['date']}, commit {row['commit']}", None)
    return ". ".join(places)


def _usual(name: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in OPS[name].usual.items())


def targets(rows: list[Row]) -> str:
    """The problems that have a target, under both allocators."""
    lines = [
        "| op | allocator | sage_ext | eager (target) | torch.compile (target) | a copy of its bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    shown = []
    for name, op in OPS.items():
        for label, target in op.targets.items():
            for allocator in ALLOCATORS:
                by = latest(rows, allocator).get((name, label))
                if by is None:
                    continue
                shown.append(by)
                eager, compiled = (_ratio(by.get(n), target.get(n)) for n in ("eager", "compile"))
                what = name if label == "usual" else f"{name}, {label}"
                lines.append(
                    f"| {what} | {allocator} | {_time(by['sage_ext'])} | {eager} | {compiled} | {_time(by.get('copy'))} |"
                )
    return "\n".join(lines) + f"\n\n{_where(shown)}."


def table(rows: list[Row]) -> str:
    """All problems, with freed memory kept."""
    found = latest(rows)
    lines = [
        "| op | changed | sage_ext in turn | alone | eager | torch.compile | torchmetrics |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, label), by in found.items():
        ratios = " | ".join(_ratio(by.get(opponent)) for opponent in OPPONENTS)
        alone = f"{float(by['sage_ext']['alone_us']):,.0f} us"
        lines.append(f"| {name} | {label} | {_time(by['sage_ext'])} | {alone} | {ratios} |")
    usual = "\n".join(f"- {name}: {_usual(name)}" for name in dict.fromkeys(name for name, _ in found))
    return "\n".join(lines) + f"\n\n{_where(list(found.values()))}.\n\nThe usual problems:\n\n{usual}"


def compare(rows: list[Row], base: str) -> str:
    """The last figures against those of the commit that begins so, on the same processor; ratios above 1: slower now."""
    known = sorted({row["commit"] for row in rows})
    old = latest([row for row in rows if row["commit"].startswith(base)])
    if not old:
        raise SystemExit(f"--compare: expected a commit that stands in the file ({', '.join(known)}), got {base}")
    lines = [f"| op | changed | at {base} | now | now / then |", "| --- | --- | ---: | ---: | ---: |"]
    for key, by in latest(rows).items():
        if key in old and by["sage_ext"]["cpu"] == old[key]["sage_ext"]["cpu"]:
            then, now = old[key]["sage_ext"], by["sage_ext"]
            change = float(now["in_turn_us"]) / float(then["in_turn_us"])
            lines.append(f"| {key[0]} | {key[1]} | {_time(then)} | {_time(now)} | {change:.2f} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """A panel an op: time over frames in turn. The last: bytes a second of the ops alone, and of a copy of as many, the roof."""
    from matplotlib.figure import Figure

    found = latest(rows)
    names = [name for name in OPS if any(op == name for op, _ in found)]
    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    marks = {"sage_ext": "o-", "eager": "s--", "compile": "^:", "torchmetrics": "d-."}
    for axis, name in zip(axes, names):
        for way, mark in marks.items():
            points = []
            for (op, label), by in found.items():
                changed = re.fullmatch(r"frames (\d+)", label)
                if op == name and (changed or label == "usual") and way in by and by[way]["in_turn_us"]:
                    frames = int(changed[1]) if changed else OPS[name].usual["frames"]
                    points.append((frames, float(by[way]["in_turn_us"])))
            if points:
                axis.loglog(*zip(*sorted(points)), mark, label=way)
        axis.set(
            title=f"{name}, {OPS[name].usual['batch']} sequences", xlabel="frames a sequence", ylabel="us, in turn"
        )
        if axis.lines:
            axis.legend(fontsize=8)
    roof = axes[len(names)]
    for name in names:
        for way, mark in (("sage_ext", "o"), ("copy", "+")):
            points = [
                (int(by[way]["bytes"]) / 1e6, int(by[way]["bytes"]) / 1e3 / float(by[way]["alone_us"]))
                for (op, _), by in found.items()
                if op == name and way in by and by[way]["bytes"]
            ]
            if points:
                label = f"{name}" if way == "sage_ext" else f"a copy, sizes of {name}"
                roof.loglog(*zip(*sorted(points)), mark, label=label)
    roof.set(title="the roof: bytes read and written a second, alone", xlabel="MB a call", ylabel="GB/s")
    if roof.lines:
        roof.legend(fontsize=8)
    for axis in axes[len(names) + 1 :]:
        axis.remove()
    figure.savefig(path, dpi=100)


def put(text: str, name: str, made: str) -> str:
    """`text` with what stands between its marks for `name` replaced. ValueError where it has no such marks."""
    begin, end = f"<!-- made by benchmarks/bench.py --{name} -->\n", "\n<!-- end -->"
    before, mark, rest = text.partition(begin)
    _, close, after = rest.partition(end)
    if not mark or not close:
        raise ValueError(f"expected the marks {begin.strip()} and {end.strip()}, got a page without")
    return f"{before}{begin}\n{made}\n{close}{after}"


def pages(rows: list[Row]) -> dict[Path, str]:
    """The pages as they should be."""
    return {
        page: put(page.read_text(), name, {"targets": targets, "table": table}[name](rows))
        for name, page in PAGES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="problems that contain one of these")
    parser.add_argument("--runs", type=int, default=1, help="of each problem that has a target")
    parser.add_argument(
        "--allocator", choices=[*ALLOCATORS, "both"], default="keep", help="both: of those with a target"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds, each problem and run")
    parser.add_argument("--compiled", choices=("targets", "all", "none"), default="targets")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--targets", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--compare", metavar="COMMIT")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--problem", nargs=2, help=argparse.SUPPRESS)  # this one alone, here, as JSON
    args = parser.parse_args()
    if args.problem:
        print(json.dumps(measure(*args.problem, args.seconds, args.compiled == "all")))
        return
    if not (args.targets or args.table or args.plot or args.compare or args.write):
        allocators = ["keep", "default"] if args.allocator == "both" else [args.allocator]
        measure_all(args.only, allocators, args.runs, args.seconds, args.compiled, args.csv)
        return
    rows = read(args.csv)
    if args.targets:
        print(targets(rows))
    if args.table:
        print(table(rows))
    if args.compare:
        print(compare(rows, args.compare))
    if args.plot:
        plot(rows, args.plot)
    if args.write:
        for page, text in pages(rows).items():
            page.write_text(text)
        plot(rows, PLOT)


if __name__ == "__main__":
    main()
