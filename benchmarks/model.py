"""What a GPU should need for each kernel, predicted from the compiled code before one has been seen.

    python benchmarks/model.py [--write]       prints the table; writes benchmarks/results/gpu-predictions.{md,json} and the
                                               table of docs/benchmarks.md

A kernel that streams through memory takes the longest of three times, and somewhat more where they are close: its bytes at the
bandwidth of a copy; its bytes at the bandwidth that the bytes in flight can ask for (Little's law); its instructions at the rate
at which a multiprocessor issues them. Launches and what comes before the first and after the last byte are added. A kernel that
waits for itself (stage_filter, everything small) takes its chain of latencies. Instructions, registers and bytes in flight are
read from the machine code by tests/cuda/sass.py (nvcc and nvdisasm are needed); the constants below are published or assumed, and
say which. benchmarks/gpu.py puts these figures beside what it measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cuda"))
import sass  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "gpu-predictions"


@dataclass(frozen=True)
class Gpu:
    name: str
    copy: float  # bytes a second of a large copy, read and written; assumed: .9 of the data sheet's 3.35 and 4.8 TB/s
    clock: float = 1.755e9  # Hz, under load; data sheet: up to 1.98
    multiprocessors: int = 132  # data sheet


GPUS = [Gpu("H100 SXM", 3.0e12), Gpu("H200", 4.3e12)]

# Cycles. "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking" (arXiv 2402.13499) has memory latencies of
# 480 to 700 cycles without load and 260 for L2; the rest is assumed from such measurements of earlier architectures.
MEMORY = 900  # from a load to its use, with the memory system busy
L2 = 270
SHUFFLE, ARITHMETIC, RECIPROCAL, DOUBLE_DIVISION = 23, 4, 40, 120
ISSUE = 0.8  # instructions a cycle and scheduler that a kernel with enough warps issues; four schedulers
ALONE = 1.25  # cycles an instruction, of a warp that has a scheduler to itself
RARE = 0.4  # the share of the code around a hot loop that runs: the rest is for numbers near the ends of the range
OVERLAP = 4  # times that hide behind each other add up as their fourth powers do
LAUNCH = 2.0e-6  # s, of a kernel in a graph, from the end of the one before
START = 1.5e-6  # s, from a kernel's start to its first bytes and from its last ones to its end

# A step of streams, whose weights lie in L2. Numbers are of the default model of benchmarks/stream.py, by its shapes: weights of
# matrices before the fusion, a row a stream, and after it, three. Times of what is no product are those of docs/kernels.md.
WEIGHTS, WEIGHTS_AFTER = 282_624, 98_560
PHASES, REST = 11, (3.5 + 4.3 + 1.0) * 1e-6  # phases that multiply; LayerNorms, what happens to a row, barriers: s
PHASE = 0.5e-6  # s, to the first weight of a phase, and from the last one to its activations
L2_PORT, L2_ALL = 64, 6.3e12  # bytes a cycle to one multiprocessor, bytes a second to all; assumed
PCIE, PCIE_TRIP = 33e9, 1.5e-6  # bytes a second that a kernel reads of the host's memory, s before the first; assumed
HOST_COPY = 20e9  # bytes a second of one thread's copy to pinned memory; assumed
CALL = 11e-6  # s: Python, the launch and the wait for it; assumed

MILLION = 1 << 20


@dataclass(frozen=True)
class Prediction:
    case: str
    gpu: str
    seconds: float
    bound: str  # what the time is made of
    value: float  # in the unit of the target
    unit: str
    target: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target


def asked(title: str) -> sass.Hot:
    return next(h for h in sass.HOT if h.title == title)


def hot(title: str) -> sass.Compiled:
    return sass.look(asked(title))


def overlapped(times: dict[str, float]) -> tuple[float, str]:
    """Seconds that times take which hide behind each other, and the longest one's name."""
    return sum(t**OVERLAP for t in times.values()) ** (1 / OVERLAP), max(times, key=lambda k: times[k])


def around(found: sass.Compiled) -> int:
    """Instructions of the loop around the hot one that are not in it."""
    inner = found.hot_loop
    outer = [l for l in found.kernel.loops if l.start <= inner.start and l.stop >= inner.stop and len(l) > len(inner)]
    return min((len(l) for l in outer), default=len(inner)) - len(inner)


def streamed(gpu: Gpu, title: str, moved: float, reads: float, turns: float, rounds: float = 0) -> tuple[float, str]:
    """Seconds, and what decides them, of a kernel that moves so many bytes, of which it reads so many; whose warps go through
    the hot loop `turns` times in all, and `rounds` times through the one around it."""
    found = hot(title)
    instructions = turns * len(found.hot_loop) + rounds * RARE * around(found)
    if found.hot.holds == "nothing":  # no loop: the code once, without its slow paths
        instructions *= RARE
    in_flight = found.flight * 32 * found.warps * gpu.multiprocessors
    times = {
        "bandwidth": moved / gpu.copy,
        "bytes in flight": reads / (in_flight / (MEMORY / gpu.clock)),
        "instructions": instructions / (4 * ISSUE * gpu.clock * gpu.multiprocessors),
    }
    together, bound = overlapped(times)
    return together + LAUNCH + START, bound


def fusion(gpu: Gpu, name: str, size: int) -> list[Prediction]:
    rows, gate = MILLION, (2 * 4 + 4 + 2 * 2) * 4
    side = {4: 2, 2: 4}[size]  # rows that a warp has side by side
    moved = rows * (3 * 256 * size + gate)
    forward, bound = streamed(gpu, f"fusion, {name}, D 256", moved, rows * 512 * size, rows / side, rows / 4)
    found = [
        Prediction(
            f"fusion forward {rows} rows {name}", gpu.name, forward, bound, moved / forward / gpu.copy, "of copy", 0.9
        )
    ]
    moved = rows * (5 * 256 * size + 2 * gate + 16)
    turn = {4: 1, 2: 0.5}[size]  # halves take two rows a turn
    main, bound = streamed(gpu, f"fusion backward, {name}, D 256", moved, rows * 768 * size, rows * turn, rows / 4)
    parameters = 1024 * (4 * 256 + 2 * 9) * 8  # bytes of the chunks' sums, which lie in L2
    backward = main + LAUNCH + START + parameters / (2 * gpu.copy)
    case = f"fusion backward {name} (both less forward)"
    found.append(Prediction(case, gpu.name, backward, bound, moved / backward / gpu.copy, "of copy", 0.8))
    return found


def ccc(gpu: Gpu) -> list[Prediction]:
    pairs = 64 * MILLION
    merge = LAUNCH + (2 * L2 + (3 + 5 + 3) * (DOUBLE_DIVISION + 3 * SHUFFLE)) / gpu.clock
    forward, bound = streamed(gpu, "ccc, float32, 2 channels", pairs * 8, pairs * 8, pairs / (16 * 32))
    forward += merge
    backward, bound_back = streamed(gpu, "ccc backward", pairs * 12, pairs * 8, pairs / (16 * 32))
    return [
        Prediction("ccc pooled forward, 64 M pairs", gpu.name, forward, bound, pairs * 8 / forward / gpu.copy, "of copy", 0.9),
        Prediction("ccc pooled backward (both less forward)", gpu.name, backward, bound_back,
                   pairs * 12 / backward / gpu.copy, "of copy", 0.85),
    ]  # fmt: skip


def small(gpu: Gpu) -> list[Prediction]:
    """B 8, T 300, in a graph whose data lie in L2."""

    def case(name: str, cycles: float, target: float) -> Prediction:
        seconds = LAUNCH + cycles / gpu.clock
        return Prediction(
            f"{name} forward, B 8, T 300, in a graph", gpu.name, seconds, "latency", seconds * 1e6, "us", target, True
        )

    # A warp has one round of two rows: the tables and their exponentials, the gate's numbers and the gate, one turn of the loop.
    found = hot("fusion, float32, D 256")
    turn = len(found.hot_loop) * ALONE * 2  # two warps a scheduler
    fusion_cycles = 2 * L2 + 300 + RARE * around(found) * ALONE + turn + L2
    # 4,800 numbers are one block: two rounds of loads, then five merges in a warp and three between warps.
    ccc_cycles = (
        3 * L2 + 1.5 * len(hot("ccc, float32, 2 channels").hot_loop) * 2 + 8 * (DOUBLE_DIVISION + 4 * SHUFFLE) + L2
    )
    # One warp has all eight sequences: the chain of a frame or the warp's instructions, whichever is longer.
    filter_ = hot("stage_filter, S 4")
    inner = {
        at
        for l in filter_.kernel.loops
        for at in l
        if len(l) < len(filter_.hot_loop) and l.start >= filter_.hot_loop.start
    }
    issue = (len(filter_.hot_loop) - len(inner & set(filter_.hot_loop))) / 8 * ALONE
    chain = SHUFFLE + 6 + (4 + 1) * ARITHMETIC + (SHUFFLE + 3 * ARITHMETIC + RECIPROCAL) / 8
    start = 2 * L2 + 9 * 250  # log_softmax of the transition's rows, in double
    filter_cycles = start + 300 * max(issue, chain)
    return [case("fusion", fusion_cycles, 5), case("ccc", ccc_cycles, 6), case("stage_filter", filter_cycles, 20)]


def streaming_case(name: str, batch: int) -> str:
    return f"streaming step, {name}, batch {batch}"


def products(name: str, streams: int) -> float:
    """Instructions of the products' inner loops, of a block that has so many streams."""
    one = asked(f"streaming, one stream, {name}")
    kernel = sass.look(replace(one, pattern=one.pattern.replace("Li1E", f"Li{streams}E"))).kernel

    def instructions(weights: int, rows: int) -> float:
        passes, rows = (1, rows) if rows <= 6 else (rows / 6, 6)
        held = 32 if rows <= 3 else 16  # weights of a lane and turn: product.cuh's kTiles
        loops = [
            len(l)
            for l in kernel.loops
            if sum(i.op.startswith("FFMA") for i in kernel.part(l)) == held * rows
            and any(i.bytes for i in kernel.part(l))
        ]
        return passes * weights / (held * 32) * min(loops)

    return instructions(WEIGHTS, streams) + instructions(WEIGHTS_AFTER, 3 * streams)


def streaming(gpu: Gpu) -> list[Prediction]:
    """From inputs in the host's pageable memory to estimates there: 40 us for a stream, 150 us for 256."""
    found = []
    for batch, target in ((1, 40), (256, 150)):
        streams = next(r for r in (1, 2, 4) if batch <= r * gpu.multiprocessors or r == 4)
        blocks = -(-batch // streams)
        for name, size in (("float32", 4), ("bfloat16", 2)):
            matrices, inputs = (WEIGHTS + WEIGHTS_AFTER) * size, batch * (128 + 512) * 4
            times = {
                "L2 to a multiprocessor": matrices / (L2_PORT * gpu.clock),
                "L2": blocks * matrices / L2_ALL,
                "instructions": products(name, streams) / (4 * ISSUE * gpu.clock),
            }
            together, longest = overlapped(times)
            rest = PHASES * PHASE + REST + PCIE_TRIP + inputs / PCIE
            seconds = together + rest + inputs / HOST_COPY + CALL
            bound = f"{longest}: {together * 1e6:.0f} us of it"
            case = streaming_case(name, batch)
            found.append(Prediction(case, gpu.name, seconds, bound, seconds * 1e6, "us", target, True))
    return found


def all_predictions() -> list[Prediction]:
    found = []
    for gpu in GPUS:
        found += fusion(gpu, "float32", 4) + fusion(gpu, "bfloat16", 2) + ccc(gpu) + small(gpu) + streaming(gpu)
    return found


def by_case(gpu_name: str) -> dict[str, dict]:
    """The committed predictions for the GPU of that name (as torch gives it), by benchmarks/gpu.py's case; {} for others."""
    kept = RESULT.with_suffix(".json")
    if not kept.exists():
        return {}
    short = next((g.name for g in GPUS if g.name.split()[0] in gpu_name), None)
    return {p["case"]: p for p in json.loads(kept.read_text())["predictions"] if p["gpu"] == short}


def table(found: list[Prediction]) -> str:
    lines = [
        "| case | GPU | time | what decides | predicted | target | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in found:
        sign = "<=" if p.at_most else ">="
        lines.append(
            f"| {p.case} | {p.gpu} | {p.seconds * 1e6:.3g} us | {p.bound} | {p.value:.3g} {p.unit} | {sign} {p.target:g} | "
            f"{'met' if p.met else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- made by benchmarks/model.py -->\n", "<!-- end -->"


def documented(found: list[Prediction]) -> str:
    """The table of docs/benchmarks.md: predictions for each GPU beside what has been measured, which is nothing."""
    lines = [
        f"| case | target | {' | '.join(f'predicted, {g.name}' for g in GPUS)} | measured |",
        "| --- " * (3 + len(GPUS)) + "|",
    ]
    for case in dict.fromkeys(p.case for p in found):
        of = [p for p in found if p.case == case]
        cells = [f"{p.value:.3g}{'' if p.met else ': **missed**'} ({p.bound})" for p in of]
        target = f"{'<=' if of[0].at_most else '>='} {of[0].target:g} {of[0].unit}"
        lines.append(f"| {case} | {target} | {' | '.join(cells)} | not measured |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    found = all_predictions()
    print(table(found), end="")
    if parser.parse_args().write:
        head = (
            f"# Predictions for GPUs, {date.today()}\n\nMade by `python benchmarks/model.py --write` from the machine code of "
            "nvcc 13 for sm_90,\nbefore any kernel had run on a GPU. Nothing here is measured.\n\n"
        )
        RESULT.with_suffix(".md").write_text(head + table(found))
        page = ROOT / "docs" / "benchmarks.md"
        before, rest = page.read_text().split(BEGIN)
        page.write_text(before + BEGIN + documented(found) + END + rest.split(END, 1)[1])
        kept = {"date": str(date.today()), "predictions": [{**vars(p), "met": p.met} for p in found]}
        RESULT.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
