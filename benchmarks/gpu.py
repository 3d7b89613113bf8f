"""The GPU table: each case's time, bandwidth or ratio against its target, on the present GPU.

    python benchmarks/gpu.py --json FILE [--rounds N] [--quick | --dry-run]

Times are medians over CUDA events of captured graphs (`in a graph`) or of single calls, or of wall-clock batches of eager calls
(`wall`). The GPU sleeps while the host enqueues, so that an event pair does not time the host. Bytes are counted from the
contract: each input read once, each output written once. Before every timed run of a bandwidth case other memory is read until it
fills the L2: written, it would be dirty there, and its way back to memory (50 MB, as long as a tenth of the shortest case) timed.
Opponents: the PyTorch reference (eager) and torch.compile of it. The kernels' own figures come first; every figure is in FILE as
soon as it is measured, beside what benchmarks/model.py predicted. --quick: smaller problems; --dry-run: tiny ones on the CPU, a
check of every line of this script that says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import model as predictions
import torch
from problems import einsum_leaky_average
from torch import Tensor

import sage_ext
from sage_ext import functional, reference
from sage_ext._ops import _door
from sage_ext.models.sage import SAGE
from sage_ext.nn import CCCLoss

Run = Callable[[], object]


class OnGpu:
    """Times on the GPU."""

    device = "cuda"
    sleep = 1_000_000  # cycles, about half a millisecond: longer than the host takes for one call and its backward

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name, self.l2 = properties.name, properties.L2_cache_size

    def event_seconds(self, run: Run, rounds: int, flush: Tensor | None) -> float:
        for _ in range(3):
            run()
        times = []
        for _ in range(rounds):
            if flush is not None:
                flush.sum()
            torch.cuda._sleep(self.sleep)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e-3)
        return statistics.median(times)

    def graph_seconds(self, run: Run, rounds: int, calls: int = 20) -> float:
        """Of one call among `calls` in a captured graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return self.event_seconds(graph.replay, rounds, None) / calls

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class DryRun:
    """Stands in for the GPU where there is none: the same calls on the CPU."""

    device = "cpu"
    name, l2 = "no GPU (dry run)", 1 << 10

    def event_seconds(self, run: Run, rounds: int, flush: Tensor | None) -> float:
        if flush is not None:
            flush.sum()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def graph_seconds(self, run: Run, rounds: int, calls: int = 20) -> float:
        return self.event_seconds(run, rounds, None)

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, run: Run) -> int:
        run()
        return 1


on: OnGpu | DryRun = DryRun()  # main() decides


def wall_seconds(run: Run, rounds: int, calls: int = 50) -> float:
    if on.device == "cpu":
        rounds = calls = 1
    for _ in range(min(5, calls)):
        run()
    times = []
    for _ in range(rounds):
        on.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        on.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def copy_bandwidth(size: int, rounds: int, flush: Tensor) -> float:
    """Bytes a second, read and written."""
    # Random: zeros can be faster.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=on.device)
    copied = torch.empty_like(source)
    bandwidth = 2 * size / on.event_seconds(lambda: copied.copy_(source), rounds, flush)
    print(f"| copy of {size >> 20} MiB | {bandwidth / 1e12:.3g} TB/s | | | |")
    return bandwidth


# ---------------------------------------------------------------------------------------------------------- problems
def fusion(
    rows: tuple[int, ...], dtype: torch.dtype, grad: bool, m: int = 2, d: int = 256, s: int = 4
) -> Callable[[Callable], Run]:
    g = torch.Generator(device=on.device).manual_seed(0)
    randn = lambda *shape, dtype=torch.float32: torch.randn(shape, generator=g, device=on.device, dtype=dtype)  # noqa: E731
    values = [randn(*rows, d, dtype=dtype) for _ in range(m)]
    gate = [
        randn(*rows, m, s),
        torch.softmax(randn(*rows, s), -1),
        randn(m, s) * 0.1,
        randn(m, s),
        randn(m).abs() + 0.5,
    ]
    gate += [randn(m, d).abs() + 0.5, randn(m, d)]
    leaves = [x.requires_grad_(grad) for x in (*values, *gate)]
    cotangent = randn(*rows, d, dtype=dtype)

    def make(op: Callable) -> Run:
        def forward() -> Tensor:
            r, p, lt, bias, sharp, w, b = leaves[m:]
            return op(
                leaves[:m], r, p, log_temperature=lt, bias=bias, sharpness=sharp, norm_weight=w, norm_bias=b
            )[0]  # fmt: skip

        return (lambda: torch.autograd.grad(forward(), leaves, cotangent)) if grad else forward

    return make


def pair(shape: tuple[int, ...], grad: bool, call: Callable) -> Callable[[Callable], Run]:
    g = torch.Generator(device=on.device).manual_seed(1)
    target = torch.randn(shape, generator=g, device=on.device)
    pred = (0.7 * target + 0.5 * torch.randn(shape, generator=g, device=on.device)).requires_grad_(grad)

    def make(op: Callable) -> Run:
        if not grad:
            return lambda: call(op, pred, target)

        def step() -> object:
            out = call(op, pred, target)
            return torch.autograd.grad(out, pred, torch.ones_like(out))

        return step

    return make


def stage_filter(batch: int, frames: int, grad: bool) -> Callable[[Callable], Run]:
    g = torch.Generator(device=on.device).manual_seed(2)
    emission = torch.randn(batch, frames, 4, generator=g, device=on.device).requires_grad_(grad)
    transition = torch.randn(4, 4, generator=g, device=on.device).requires_grad_(grad)
    ones = torch.randn(batch, frames, 4, generator=g, device=on.device)

    def make(op: Callable) -> Run:
        if not grad:
            return lambda: op(emission, transition)[0]
        return lambda: torch.autograd.grad(op(emission, transition)[0], [emission, transition], ones)

    return make


def training_seconds(rounds: int) -> float:
    """One step of SAGE: forward under bf16 autocast, CCC loss, backward, Adam."""
    torch.manual_seed(0)
    model = SAGE({"audio": 128, "visual": 256}, dim=128).to(on.device)
    optimizer = torch.optim.Adam(model.parameters())
    batch, frames = (32, 300) if on.device == "cuda" else (2, 20)
    features = {name: torch.randn(batch, frames, d, device=on.device) for name, d in (("audio", 128), ("visual", 256))}
    target = torch.rand(batch, frames, 2, device=on.device) * 2 - 1
    loss_of = CCCLoss()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(on.device, torch.bfloat16):
            prediction = model(features).prediction
        loss_of(prediction.float(), target).backward()
        optimizer.step()

    return wall_seconds(step, max(5, rounds // 2), calls=5)


# ------------------------------------------------------------------------------------------------------------- table
def leaky_average(batch: int, frames: int, grad: bool, d: int = 128) -> Callable[[Callable], Run]:
    g = torch.Generator(device=on.device).manual_seed(3)
    x = torch.randn(batch, frames, d, generator=g, device=on.device).requires_grad_(grad)
    precision = (3 * torch.rand(batch, frames, generator=g, device=on.device)).requires_grad_(grad)
    halflife, prior = (
        torch.tensor([8.0, 32.0, 128.0], device=on.device),
        torch.ones(3, device=on.device, requires_grad=grad),
    )
    cotangent = torch.randn(batch, frames, 3, d, generator=g, device=on.device)

    def make(op: Callable) -> Run:
        def forward() -> Tensor:
            return op(x, precision, halflife, prior)[0]

        return (lambda: torch.autograd.grad(forward(), [x, precision, prior], cotangent)) if grad else forward

    return make


class Table:
    """The figures, printed and kept in a file as they come."""

    def __init__(self, file: str, about: dict) -> None:
        self.rows: list[dict] = []
        self.file, self.about = file, about
        self.predicted = predictions.by_case(on.name)
        print("| case | measured | predicted | target | |\n| --- | --- | --- | --- | --- |")

    def add(self, case: str, value: float, unit: str, target: float, at_most: bool = False, **more: object) -> None:
        met = value <= target if at_most else value >= target
        predicted = self.predicted.get(case, {}).get("value")
        self.keep(
            case=case, value=value, unit=unit, target=target, at_most=at_most, met=met, predicted=predicted, **more
        )  # fmt: skip
        sign = "<=" if at_most else ">="
        said = "" if predicted is None else f"{predicted:.3g} {unit}"
        verdict = "met" if met else "MISSED"
        print(f"| {case} | {value:.3g} {unit} | {said} | {sign} {target:g} {unit} | {verdict} |", flush=True)

    def keep(self, **row: object) -> None:
        self.rows.append(row)
        temporary = f"{self.file}.{os.getpid()}"
        with open(temporary, "w") as f:
            json.dump({"machine": self.about, "results": self.rows}, f, indent=1)
            f.write("\n")
        os.replace(temporary, self.file)

    def guarded(self, case: str, measure: Callable[[], None]) -> None:
        """One failing case does not cost the rest of the session; it is recorded as such."""
        try:
            measure()
        except Exception as error:
            self.keep(case=case, error=f"{type(error).__name__}: {error}"[:500], met=False)
            print(f"| {case} | FAILED: {type(error).__name__} | | | |", flush=True)
        if on.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    os.environ["SAGE_EXT_STRICT"] = "1"  # the reference standing in for a kernel would be measured against itself
    global on
    on = DryRun() if options.dry_run else OnGpu()
    dry = options.dry_run
    rounds, million = options.rounds, (1 << 8 if dry else 1 << 16 if options.quick else 1 << 20)
    flush = torch.zeros(max(on.l2 * 2, 1 << (10 if dry else 26)), dtype=torch.uint8, device=on.device)
    about = {
        "gpu": on.name, "torch": torch.__version__, "cuda": torch.version.cuda, "sage_ext": sage_ext.__version__,
        "quick": options.quick, "dry_run": dry, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    table = Table(options.json, about)

    bandwidth = about["copy_bytes_per_second"] = copy_bandwidth(million * 1024, rounds, flush)
    alone: dict[str, float] = {}  # forward and backward of a fusion, in seconds
    gate = (2 * 4 + 4 + 2 * 2) * 4
    dtypes = ((torch.bfloat16, 2), (torch.float32, 4))

    def compiled(op: Callable) -> Callable:
        return op if dry else torch.compile(op, dynamic=False)

    for dtype, size in dtypes:

        def big_fusion(dtype: torch.dtype = dtype, size: int = size, name: str = str(dtype)[6:]) -> None:
            with torch.no_grad():
                forward = on.event_seconds(
                    fusion((million,), dtype, False)(functional.reliability_fusion), rounds, flush
                )
            moved = million * (3 * 256 * size + gate)
            table.add(
                f"fusion forward {million} rows {name}", moved / forward / bandwidth, "of copy", 0.9, seconds=forward
            )
            both = on.event_seconds(fusion((million,), dtype, True)(functional.reliability_fusion), rounds, flush)
            alone[name] = both
            # The forward that autograd runs also saves (N, M, 2) statistics.
            backward = max(both - forward, 1e-9)
            moved = million * (5 * 256 * size + 2 * gate + 16)
            case = f"fusion backward {name} (both less forward)"
            table.add(case, moved / backward / bandwidth, "of copy", 0.8, seconds=backward)

        table.guarded(f"fusion {million} rows {str(dtype)[6:]}", big_fusion)

    def big_ccc() -> None:
        frames = 32 * million  # 64 M pairs at two channels
        call = lambda op, p, t: op(p, t)  # noqa: E731
        forward = on.event_seconds(pair((frames, 2), False, call)(functional.ccc), rounds, flush)
        table.add(
            "ccc pooled forward, 64 M pairs", frames * 2 * 8 / forward / bandwidth, "of copy", 0.9, seconds=forward
        )
        both = on.event_seconds(pair((frames, 2), True, call)(functional.ccc), rounds, flush)
        backward = max(both - forward, 1e-9)
        table.add(
            "ccc pooled backward (both less forward)", frames * 2 * 12 / backward / bandwidth, "of copy", 0.85,
            seconds=backward,
        )  # fmt: skip

    table.guarded("ccc 64 M pairs", big_ccc)

    frames = 20 if dry else 300
    problems: dict[str, tuple] = {
        "fusion": (fusion, ((8, frames), torch.float32), "reliability_fusion", 5e-6),
        "ccc": (pair, ((8, frames, 2),), "ccc", 6e-6),
        "stage_filter": (stage_filter, (8, frames), "stage_filter", 20e-6),
    }

    def extra(problem: Callable) -> tuple:
        return (lambda op, p, t: op(p, t),) if problem is pair else ()

    def small_in_a_graph() -> None:
        for name, (problem, sizes, op, target) in problems.items():
            with torch.no_grad():
                run = problem(*sizes, False, *extra(problem))(getattr(functional, op))
                seconds = on.graph_seconds(run, rounds)
            table.add(f"{name} forward, B 8, T 300, in a graph", seconds * 1e6, "us", target * 1e6, True)

    table.guarded("B 8, T 300, in a graph", small_in_a_graph)

    def long_filter() -> None:
        with torch.no_grad():
            short = on.event_seconds(stage_filter(166, frames, False)(functional.stage_filter), rounds, None)
            long = on.event_seconds(
                stage_filter(1, 2000 if dry else 50000, False)(functional.stage_filter), rounds, None
            )
        table.add("stage_filter B 1, T 50,000 over B 166, T 300", long / short, "x", 20, True, seconds=[short, long])

    table.guarded("stage_filter B 1, T 50,000", long_filter)

    def temporal() -> None:
        made = pair((8, 400 if dry else 3000, 2), True, lambda op, p, t: op(p, t, window=300)[0])
        kernel = on.event_seconds(made(functional.temporal_ccc), rounds, None)
        eager = on.event_seconds(made(reference.temporal_ccc), 5, None)
        table.add(
            "temporal_ccc 8 x 3000, window 300, forward + backward",
            eager / kernel,
            "x eager unfold",
            50,
            seconds=[kernel, eager],
        )

    table.guarded("temporal_ccc", temporal)

    def leaky() -> None:
        with torch.no_grad():
            batch = 8 if dry else 768
            seconds = on.event_seconds(leaky_average(batch, 300, False)(functional.leaky_average), rounds, flush)
        moved = batch * 300 * 128 * 4 * 4  # x in, three averages out
        table.add(
            "leaky_average forward, B 768, T 300, D 128, R 3",
            moved / seconds / bandwidth,
            "of copy",
            0.7,
            seconds=seconds,
        )
        made = leaky_average(24, 300, True)
        kernel = wall_seconds(made(functional.leaky_average), rounds)
        eager = wall_seconds(made(lambda *a: (einsum_leaky_average(*a),)), rounds)
        table.add("leaky_average 24 x 300 x 128, forward + backward, wall", eager / kernel, "x einsum", 3)

    table.guarded("leaky_average", leaky)

    # From here on other people's code runs too, and compiles.
    def small_against_others() -> None:
        for name, (problem, sizes, op, _) in problems.items():
            made = problem(*sizes, True, *extra(problem))
            runs = {"kernel": made(getattr(functional, op)), "eager": made(getattr(reference, op))}
            if op != "stage_filter":  # 300 unrolled frames: minutes of compiling
                runs["compile"] = made(compiled(getattr(reference, op)))
            calls = {k: 2 if (op, k) == ("stage_filter", "eager") else 50 for k in runs}
            times = {k: wall_seconds(run, max(5, rounds // 2), calls[k]) for k, run in runs.items()}
            table.add(f"{name} forward + backward, wall", times["eager"] / times["kernel"], "x eager", 4, all=times)
            if "compile" in times:
                table.add(f"{name} forward + backward, wall", times["compile"] / times["kernel"], "x compile", 2)

    table.guarded("B 8, T 300, against others", small_against_others)

    for dtype, _ in dtypes:

        def big_against_others(dtype: torch.dtype = dtype, name: str = str(dtype)[6:]) -> None:
            problem = fusion((million,), dtype, True)
            runs = {
                "kernel": problem(functional.reliability_fusion), "eager": problem(reference.reliability_fusion),
                "compile": problem(compiled(reference.reliability_fusion)),
            }  # fmt: skip
            seconds = {k: on.event_seconds(run, max(5, rounds // 2), flush) for k, run in runs.items()}
            peaks = {k: on.peak_bytes(run) for k, run in runs.items()}
            case = f"fusion forward + backward {name}"
            table.add(case, seconds["compile"] / seconds["kernel"], "x compile", 1.5, all=seconds)
            table.add(case, seconds["eager"] / seconds["kernel"], "x eager", 5)
            least = min(peaks["eager"], peaks["compile"])
            table.add(f"fusion peak memory {name}", peaks["kernel"] / least, "of the least other", 1, True, bytes=peaks)

        table.guarded(f"fusion {million} rows {str(dtype)[6:]}, against others", big_against_others)

    def training() -> None:
        kernel = training_seconds(rounds)
        kernels = _door.kernels[on.device]
        os.environ.pop("SAGE_EXT_STRICT")
        # stage_filter stays eager: its loop over frames takes minutes to compile.
        compiles = ("reliability_fusion", "ccc")
        plain = {name: (getattr(reference, name), getattr(functional, name)) for name in compiles}

        def without_kernels(op: Callable) -> Callable:
            def call(*given: object, **named: object) -> object:
                _door.kernels.pop(on.device)
                try:
                    return op(*given, **named)
                finally:
                    _door.kernels[on.device] = kernels

            return call

        try:
            for name, (op, door) in plain.items():
                setattr(reference, name, compiled(op))
                setattr(functional, name, without_kernels(door))
            two = training_seconds(rounds)
            for name, (_, door) in plain.items():
                setattr(functional, name, door)
            _door.kernels.pop(on.device)
            others = training_seconds(rounds)
        finally:
            _door.kernels[on.device] = kernels
            os.environ["SAGE_EXT_STRICT"] = "1"
            for name, (op, door) in plain.items():
                setattr(reference, name, op)
                setattr(functional, name, door)
        seconds = {"kernels": kernel, "fusion and ccc by torch.compile": two, "none": others}
        step = "SAGE step, B 32, T 300, D 128, bf16"
        table.add(step, others / kernel, "x compile", 1.5, seconds=seconds)
        # Most of that may be the filter's loop. This is what the kernels of fusion and ccc save.
        table.add(f"{step}, the filter a kernel in both", two / kernel, "x compile", 1, seconds=seconds)

    table.guarded("SAGE step", training)
    print(f"\n{sum(r['met'] for r in table.rows)} of {len(table.rows)} targets met on {on.name}")


if __name__ == "__main__":
    main()
