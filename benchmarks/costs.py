"""What scale costs: unit costs measured on this machine, and their totals for many hours of video and many streams.

    python benchmarks/costs.py [--quick]

Measured in seconds of the processor (threads and processes added up), each unit at two sizes or more; where the cost is said to
grow in proportion, the ratio of the unit costs at the largest and the smallest size says how well it does. Totals are
units times hours or streams, and nothing else: no disk, network or idle time is in them. Extraction: a drawn person of 640 x 360
pixels and 25 pictures a second, default features at 30 frames a second; its fixed cost, loading libraries, is taken out as the
difference of two lengths. Training: the step of benchmarks/training_step.py; prediction and streams: the model of
benchmarks/stream.py. One thread. A window is 10 s, a new one every 6.7 s, so an hour has 540.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import stream
import torch
import training_step
import video
from bench import machine

from sage_ext.models import SAGE
from sage_ext.video.extraction import extract

FPS, HOUR, WINDOWS = 30, 3600, 540


def processor() -> float:
    """Seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def extraction(lengths: tuple[float, float, float]) -> tuple[list[float], list[float]]:
    """Processor seconds, and bytes written, of a second of video: between the first two lengths and between the last two."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = []
        for seconds in lengths:
            (folder / f"{seconds:g}").mkdir()
            clips.append(video.drawn(folder / f"{seconds:g}", seconds))
        extract(clips[0], folder / "warm", processes=1)
        for k, clip in enumerate(clips):
            began = processor()
            done = extract(clip, folder / f"data{k}", processes=1)
            took = processor() - began
            size = sum(path.stat().st_size for path in (folder / f"data{k}").rglob("*.npy"))
            found.append((done.seconds, took, size))
    pairs = list(itertools.pairwise(found))
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs], [(b[2] - a[2]) / (b[0] - a[0]) for a, b in pairs]


def predicting(model: SAGE, frames: int, rounds: int) -> float:
    """Processor seconds a frame of whole-sequence prediction, median."""
    features = {name: torch.randn(1, frames, dim) for name, dim in stream.DIMS.items()}

    def run() -> None:
        with torch.inference_mode():
            model(features)

    run()
    return sorted(_spent(run) for _ in range(rounds))[rounds // 2] / frames


def _spent(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def streaming(model: SAGE, rows: int, steps: int) -> float:
    """Processor seconds a frame of one stream, of `rows` in a step, median."""
    step = stream.session_step(model, rows, None)
    step()
    return sorted(_spent(step) for _ in range(steps))[steps // 2] / rows


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state(model: SAGE, rows: int) -> float:
    """Bytes of resident memory that a stream adds to a session, all of its rows touched; outputs and inputs are in it."""
    stream.session_step(model, 1, None)()
    before = resident()
    session = model.stream(rows)
    frames = {name: torch.zeros(rows, dim) for name, dim in stream.DIMS.items()}
    session.step(frames)
    return (resident() - before) / rows


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter videos and fewer rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    model = stream.build()
    work, written = extraction((2, 4, 8) if quick else (5, 15, 35))
    batches = {batch: training_step.step(1 if quick else 4, batch, time.process_time) / batch for batch in (4, 8, 16)}
    predicted = {frames: predicting(model, frames, 3 if quick else 9) for frames in (1500, 3000, 6000)}
    steps = {rows: streaming(model, rows, 20 if quick else 100) for rows in (1, 16, 64, 256, 1024)}
    states = {rows: state(model, rows) for rows in (1000, 4000)}
    by_state = sum(
        t.numel() * t.element_size() for t in model.stream(1).state_dict(rows=0).values() if torch.is_tensor(t)
    )

    a_video, a_disk = work[-1] * HOUR, written[-1] * HOUR
    a_window, an_hour, a_frame = batches[8], predicted[3000] * FPS * HOUR, steps[1024]
    grows = lambda of: f"{list(of)[-1] / next(iter(of)):.2f}"  # noqa: E731
    print("Measured:\n")
    print(table(["unit", "cost", "at", "the last over the first"], [
        ["extraction, an hour of video", f"{a_video:,.0f} CPU s", "two spans of a video's length", grows(work)],
        ["its features, an hour of video", size(a_disk), "the same", grows(written)],
        ["training, a window in a step", f"{a_window * 1e3:.1f} CPU ms", "batch 4, 8, 16 (stated: 8)", grows(batches.values())],
        ["prediction, an hour of video", f"{an_hour:.1f} CPU s", "1,500, 3,000, 6,000 frames (stated: 3,000)",
         grows(predicted.values())],
        *[["streaming, a frame of a stream", f"{cost * 1e6:.1f} CPU us", f"{rows:,} in a step", "-"]
          for rows, cost in steps.items()],
        ["resident memory of a stream", size(states[4000]), "1,000 and 4,000 streams", grows(states.values())],
        ["of that its state (`state_dict`)", size(by_state), "1 stream", "-"],
    ]))  # fmt: skip
    print("Multiplied, hours of video:\n")
    print(table(["hours", "extraction, CPU hours", "cores that extract it in a day", "features", "an epoch, CPU hours",
                 "prediction, CPU hours"],
                [[f"{hours:,}", number(hours * a_video / HOUR), number(hours * a_video / HOUR / 24), size(hours * a_disk),
                  number(hours * WINDOWS * a_window / HOUR), number(hours * an_hour / HOUR)]
                 for hours in (1, 100, 10_000)]))  # fmt: skip
    print(
        f"Multiplied, streams at {FPS} frames a second, at the cost of 1,024 in a step (their state is in no cache):\n"
    )
    print(table(["streams", "cores, all of their time", "memory", "features in, a second"],
                [[f"{count:,}", number(count * FPS * a_frame), size(count * states[4000]),
                  size(count * FPS * 4 * sum(stream.DIMS.values()))] for count in (100, 10_000, 100_000)]))  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
