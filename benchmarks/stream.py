"""Measures a streaming step and prints a Markdown table: p50, p99, ratios, targets met or missed.

    python benchmarks/stream.py [--device cuda | --dry-run] [--rounds 50] [--steps 20] [--cpu-time] [--no-compile] [--json FILE]

The default model (features 128 + 512, dim 128, 4 stages, 4 blocks), one frame of one stream on one thread, from float32
tensors in memory to the outputs in memory. The opponents run `SAGE.forward` on one frame with carried state, in inference
mode: eager, and under torch.compile. All take turns, round by round, in one process: 3 warm steps, then `steps` timed
ones. p50 and p99 are over all timed steps; a ratio is the median over the rounds of the ratio of the rounds' medians, so that
a machine whose speed drifts does not decide it. Many streams: 64 rows in one step with two threads against 64 steps of a
session of one row, in frames a second. Cold weights: the same step after 64 MB of other memory have been read. In a row: 5,000
steps without a break, and beside them a loop of plain arithmetic that takes as long, whose p99 over p50 is the machine's own.

With --device cuda: batch 1 and 256 on the GPU, from inputs in the host's (pageable) memory to the estimates there; the
opponents copy their inputs to the GPU and their prediction back. torch.compile's turn, which takes longest to begin, comes after
all figures without it are in FILE. --dry-run: the same lines on the CPU, a check of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

# A thread that spins while it waits takes its core from the one it waits for, where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import model as predictions
import torch
from bench import machine

from sage_ext.allocator import keep_freed_memory
from sage_ext.models import SAGE

DIMS = {"audio": 128, "visual": 512}
MANY, WARM = 64, 3
LIMIT = 1.5  # p99 over p50 on an idle machine


def build() -> SAGE:
    torch.manual_seed(0)
    model = SAGE(DIMS)
    model.fit_statistics([{"features": {k: torch.randn(4, 200, d) for k, d in DIMS.items()}}])
    return model.eval()


def moving(*lead: int) -> Iterator[dict[str, torch.Tensor]]:
    """Two frames in turn: one that stands still is stuck, and a stuck one is missing."""
    return itertools.cycle([{k: torch.randn(*lead, d) for k, d in DIMS.items()} for _ in range(2)])


def busy(seconds: float) -> Callable[[], object]:
    """A loop that takes about as long, in one core's registers and first cache."""
    count = 1000
    count = max(1, int(count * seconds / statistics.median(timed(lambda: sum(range(count)), 200))))
    return lambda: sum(range(count))


def offline_step(model: SAGE, call: Callable, rows: int = 1, device: str = "cpu") -> Callable[[], object]:
    """One frame through `call` (the model, or its compiled self), the state carried."""
    frames = moving(rows, 1)
    with torch.inference_mode():
        state = [model({k: v.to(device) for k, v in next(frames).items()}).state]

    def step() -> object:
        with torch.inference_mode():
            out = call({k: v.to(device) for k, v in next(frames).items()}, None, None, state[0])
            state[0] = out.state
            return out.prediction.cpu()

    return step


def session_step(model: SAGE, rows: int, dtype: torch.dtype | None, device: str = "cpu") -> Callable[[], object]:
    session, frames = model.stream(rows, dtype, device), moving(rows)
    return lambda: session.step(next(frames))


clock = time.perf_counter


def timed(step: Callable[[], object], steps: int, before: Callable[[], object] | None = None) -> list[float]:
    times = []
    for _ in range(steps):
        if before is not None:
            before()
        start = clock()
        step()
        times.append(clock() - start)
    return times


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def verdict(value: float, target: float, least: bool = True) -> str:
    met = value >= target if least else value <= target
    return f"{value:.2f} (target {'>=' if least else '<='} {target:g}: {'met' if met else 'MISSED'})"


def take_turns(runs: dict[str, Callable[[], object]], rounds: int, steps: int) -> dict[str, list[list[float]]]:
    """Each one's times, a list a round."""
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, step in runs.items():
            timed(step, WARM)
            times[name].append(timed(step, steps))
    return times


def save(path: str | None, result: dict) -> None:
    if path:
        with open(f"{path}.{os.getpid()}", "w") as f:
            json.dump(result, f, indent=1)
            f.write("\n")
        os.replace(f.name, path)


LIMITS = {1: 40e-6, 256: 150e-6}  # seconds a step of so many streams on a GPU


def on_gpu(rounds: int, steps: int, compiled: bool, keep: Callable[[dict], None], device: str, gpu: str) -> None:
    """The table of a GPU of that name; `keep` gets all rows after every few. p50 and its prediction in microseconds."""
    model, there, rows = build(), build().to(device), dict[str, dict]()
    predicted = predictions.by_case(gpu)
    print("| streams in a step | p50, us | predicted | p99, us | eager's time over it | torch.compile's |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for compiling in (False, True) if compiled else (False,):
        call = torch.compile(there, fullgraph=True, dynamic=False) if compiling else None
        for batch, limit in LIMITS.items():
            runs = {
                "float32": session_step(model, batch, None, device),
                "bfloat16": session_step(model, batch, torch.bfloat16, device),
                "eager": offline_step(there, there, batch, device),
            }
            if call is not None:
                runs["torch.compile"] = offline_step(there, call, batch, device)
            for step in runs.values():
                timed(step, steps)
            times = take_turns(runs, rounds, steps)
            medians = {name: [statistics.median(t) for t in of] for name, of in times.items()}
            for name, of in times.items():
                pooled = [t for r in of for t in r]
                p50, p99 = percentile(pooled, 0.5), percentile(pooled, 0.99)
                row = rows[f"{name}, {batch}"] = {"p50": p50, "p99": p99}
                shown, cells = f"{p50 * 1e6:.1f}", ["", "-", "-"]
                if name in ("float32", "bfloat16"):
                    shown = verdict(p50 * 1e6, limit * 1e6, False)
                    if found := predicted.get(predictions.streaming_case(name, batch)):
                        row["predicted"] = found["seconds"]
                        cells[0] = f"{found['value']:.3g}"
                    for i, slow in enumerate(("eager", "torch.compile"), 1):
                        if slow in runs:
                            row[f"over {slow}"] = gain = statistics.median(
                                a / b for a, b in zip(medians[slow], medians[name])
                            )
                            cells[i] = verdict(gain, 10.0) if slow == "eager" else f"{gain:.1f}"
                print(
                    f"| {name}, {batch} | {shown} | {cells[0]} | {p99 * 1e6:.1f} | {cells[1]} | {cells[2]} |",
                    flush=True,
                )
            keep(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" or options.dry_run:
        if options.cpu_time:
            parser.error("--cpu-time is of the CPU alone")
        device = "cpu" if options.dry_run else "cuda"
        about = {**machine(), "gpu": "none (dry run)" if options.dry_run else torch.cuda.get_device_name()}
        keep = lambda rows: save(options.json, {"machine": about, "steps": rows})  # noqa: E731
        compiled = not (options.no_compile or options.dry_run)
        on_gpu(options.rounds, options.steps, compiled, keep, device, about["gpu"])
        print("\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
        return
    global clock
    if options.cpu_time:
        clock = time.thread_time
    keep_freed_memory()
    torch.set_num_threads(1)
    model = build()
    single = session_step(model, 1, None)
    runs = {
        "float32": single,
        "bfloat16": session_step(model, 1, torch.bfloat16),
        "eager": offline_step(model, model),
    }
    if not options.no_compile:
        runs["torch.compile"] = offline_step(model, torch.compile(model, fullgraph=True, dynamic=False))
    for step in runs.values():
        timed(step, 30)

    times = take_turns(runs, options.rounds, options.steps)
    medians = {name: [statistics.median(t) for t in rounds] for name, rounds in times.items()}

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(medians[slow], medians[fast]))

    pooled = {name: [t for r in rounds for t in r] for name, rounds in times.items()}
    in_a_row = {name: timed(runs[name], 5000) for name in ("float32", "bfloat16")}
    in_a_row["a loop of arithmetic"] = timed(busy(statistics.median(in_a_row["float32"])), 5000)
    other = torch.zeros(16 << 20)
    cold = {name: timed(runs[name], 100, other.sum) for name in ("float32", "bfloat16")}
    clock = time.perf_counter  # threads' times do not add up on one thread's
    torch.set_num_threads(2)  # a session never uses more than there were when it was made
    many, throughput = session_step(model, MANY, None), []
    torch.set_num_threads(1)
    timed(many, 10)
    many_times = []
    for _ in range(options.rounds):
        singles = sum(timed(single, MANY))
        torch.set_num_threads(2)
        timed(many, 1)
        many_times.append(statistics.median(timed(many, 5)))
        torch.set_num_threads(1)
        throughput.append(singles / many_times[-1])

    kind = "CPU time of one frame" if options.cpu_time else "one frame"
    print(f"| {kind} of one stream, one thread | p50 | p99 | p99 / p50 | eager's time over it | torch.compile's |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = {}
    for name in runs:
        p50, p99 = percentile(pooled[name], 0.5), percentile(pooled[name], 0.99)
        rows[name] = {"p50": p50, "p99": p99}
        cells = ["-", "-"]
        for i, (slow, target) in enumerate((("eager", 8.0), ("torch.compile", 4.0))):
            if slow in runs and name != slow and name in ("float32", "bfloat16"):
                rows[name][f"over {slow}"] = value = ratio(slow, name)
                cells[i] = verdict(value, target)
        print(f"| {name} | {p50 * 1e6:.1f} us | {p99 * 1e6:.1f} us | {p99 / p50:.2f} | {cells[0]} | {cells[1]} |")
    half, gain = ratio("float32", "bfloat16"), statistics.median(throughput)
    many_p50 = statistics.median(many_times)
    print("\n| also | |\n| --- | --- |")
    print(f"| float32's time over bfloat16's | {verdict(half, 1.4)} |")
    print(f"| {MANY} streams in one step, 2 threads | {many_p50 * 1e6:.0f} us, {MANY / many_p50:,.0f} frames/s |")
    print(f"| its throughput over that of single steps | {verdict(gain, 3.0)} |")
    tails = {name: percentile(t, 0.99) / percentile(t, 0.5) for name, t in in_a_row.items()}
    for name, tail in tails.items():
        shown = verdict(tail, LIMIT, False) if name in runs else f"{tail:.2f}"
        print(f"| {name}, 5,000 in a row: p99 over p50 | {shown} |")
    for name, t in cold.items():
        print(f"| {name} step with cold weights, p50 | {statistics.median(t) * 1e6:.1f} us |")
    about = {**machine(), "load average": " ".join(f"{x:.1f}" for x in os.getloadavg())}
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    result = {
        "machine": about,
        "steps": rows,
        "bfloat16 gain": half,
        "many": many_p50,
        "many gain": gain,
        "tails": tails,
    }
    save(options.json, result)


if __name__ == "__main__":
    main()
