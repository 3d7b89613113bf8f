"""`sage-ext stream`: frames from a pipe or a growing file through a run, a JSON line each."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import select
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ..data.affwild2 import read_annotation
from ..data.rates import FPS, SLOW, default_frames
from ..extras import require
from ..report import Picture, Table, plot_clip, plot_latency, printable, write_report
from ..training.runs import Run
from .camera import (
    PICTURES_A_SECOND,
    Browser,
    Camera,
    Extraction,
    FrameMaker,
    Inbox,
    Microphone,
    Played,
    Source,
    Together,
    maker_for,
)
from .estimator import RECENT, Estimator, Latency, Quality, Recording
from .frames import Block, Format, MalformedFrame, make_format
from .page import Page

BLOCK = 1 << 16  # bytes of a read
POLL = 0.05  # seconds between looks at a file that grows
GRACE = 2.0  # seconds that answers may take to be read by others after a signal
SHOWN = 5  # malformed records of one kind that are reported, before only powers of ten are
KEEP = 108_000  # frames in a report: the last hour at 30 a second


class Stop:
    """Turns SIGINT and SIGTERM into a request to stop, once: a second one acts as it did before. A context manager."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.output_gone = False

    def __enter__(self) -> Stop:
        self.reader, self.writer = os.pipe()
        for end in (self.reader, self.writer):
            os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        both = (signal.SIGINT, signal.SIGTERM)  # unless whoever started this wants them ignored
        heeded = [number for number in both if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.reader)
        os.close(self.writer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal is not None or self.output_gone

    def wait(self, fd: int | None, output: int | None, seconds: float | None = None) -> bool:
        """Until `fd` can be read, a stop is requested, the other end of `output` is closed, or `seconds` have passed.

        True: `fd` can be read, and no stop is requested.
        """
        poll = select.poll()
        poll.register(self.reader, select.POLLIN)
        if fd is not None:
            poll.register(fd, select.POLLIN)
        if output is not None:
            poll.register(output, 0)  # errors and hang-ups alone
        ready = dict(poll.poll(None if seconds is None else 1e3 * seconds))
        self.drain(ready)
        self.output_gone |= output in ready
        return fd in ready and not self.requested

    def drain(self, ready: dict[int, int]) -> None:
        """Empties the pipe after a signal that asks for nothing here."""
        if self.reader in ready and not self.requested:
            os.read(self.reader, 1024)


class OutputError(OSError):
    """What is written to cannot take it, as a full disk; its strerror says why."""


class Output:
    """Lines to a file descriptor, each written at once."""

    def __init__(self, fd: int, stop: Stop) -> None:
        self.fd, self.stop = fd, stop
        self.until: float | None = None  # after a request to stop: when to give up

    def write(self, line: str) -> None:
        """BrokenPipeError: nobody reads any more, or not within GRACE seconds after a request to stop. OutputError."""
        data = line.encode()
        while data:
            poll = select.poll()
            poll.register(self.fd, select.POLLOUT)
            if not self.stop.requested:
                poll.register(self.stop.reader, select.POLLIN)
                left = None
            else:
                self.until = self.until or time.monotonic() + GRACE
                left = max(self.until - time.monotonic(), 0)
            ready = dict(poll.poll(None if left is None else 1e3 * left))
            self.stop.drain(ready)
            if self.fd in ready:
                try:
                    data = data[os.write(self.fd, data[: select.PIPE_BUF]) :]  # so much a pipe takes without blocking
                except BrokenPipeError:
                    raise
                except OSError as error:
                    raise OutputError(error.errno, error.strerror, "standard output") from None
            elif left is not None:
                raise BrokenPipeError(errno.EPIPE, "the output was not read in time")


def note(text: str, prefix: str = "sage-ext stream: ") -> None:
    """A line on stderr; where nobody reads it, nothing."""
    try:
        print(prefix + printable(text, "\n"), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (else the interpreter fails again when it exits)


class Complaints:
    """Malformed records: all are counted by kind; of a kind the first SHOWN are reported, then the 10th, 100th ..."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.counts: Counter[str] = Counter()

    def add(self, number: int, error: MalformedFrame) -> None:
        self.counts[error.kind] += 1
        count = self.counts[error.kind]
        power_of_ten = str(count).strip("0") == "1"
        if count <= SHOWN or power_of_ten:
            so_far = f" ({count} of this kind so far)" if count > SHOWN else ""
            quiet = " (more of this kind: only the 10th, 100th ... are shown)" if count == SHOWN else ""
            note(f"{self.unit} {number}: {error}{so_far}{quiet}")

    def text(self) -> str:
        if not self.counts:
            return "0"
        return f"{self.counts.total()}: " + ", ".join(f"{n} {kind}" for kind, n in self.counts.most_common())


def blocks(fd: int, stop: Stop, output: int, follow: bool) -> Iterator[Block]:
    """The bytes that `fd` brings, in pieces, until its end or a request to stop.

    None says that a record of which a part has come will not be completed: the file was cut short and is read from its
    start again, or a stop was requested.
    """
    regular = stat.S_ISREG(os.fstat(fd).st_mode)
    while not stop.requested:
        if not stop.wait(fd, output):
            continue
        block = os.read(fd, BLOCK)
        if block:
            yield block
        elif not follow:
            return
        elif regular and os.fstat(fd).st_size < os.lseek(fd, 0, os.SEEK_CUR):
            note("the input was cut short: reading it from its start again")
            os.lseek(fd, 0, os.SEEK_SET)
            yield None
        else:
            stop.wait(None, output, POLL)
    yield None


class Pace:
    """Delays frames so that no more than `fps` a second go on; with None it delays none.

    A frame that comes later than the next one was due starts the count anew: the frames after it are not hurried.
    """

    def __init__(self, fps: float | None, stop: Stop, output: int) -> None:
        self.step, self.stop, self.output = 0.0 if fps is None else 1 / fps, stop, output
        self.due = 0.0

    def wait(self) -> None:
        if not self.step:
            return
        while not self.stop.requested and (left := self.due - time.monotonic()) > 0:
            self.stop.wait(None, self.output, left)
        now = time.monotonic()
        self.due = (self.due if now < self.due + self.step else now) + self.step


def stream(args: argparse.Namespace) -> int:
    """The command. 0: the input ended, or nobody reads the output; 128 + the signal that stopped it."""
    if sys.stdout is None:
        raise ValueError("standard output: expected it open, got it closed")
    if sys.stdin is None and args.input == "-":
        raise ValueError("--input: expected standard input open, got it closed")
    if args.pace is not None and not 0 < args.pace < float("inf"):
        raise ValueError(f"--pace: expected frames a second above 0, got {args.pace}")
    if args.follow and args.input == "-":
        raise ValueError("--follow: expected --input FILE with it (a pipe is waited for anyway), got --input -")
    if args.serve is not None and not 0 <= args.serve < 1 << 16:
        raise ValueError(f"--serve: expected a port from 0 to 65535, got {args.serve}")
    if args.report is not None:  # what would fail at the end should fail now
        require("matplotlib", "train")
    devices = _devices(args)
    run = Run.load(args.run, trust=args.trust)
    recent = max(round(default_frames(RECENT, run.fps)), 2)
    quality = None
    if args.labels is not None:
        quality = Quality(*read_annotation(args.labels, run.targets), run.targets, recent)
    keep = KEEP if args.report is not None else 0
    estimator = Estimator(
        run.model, run.names, targets=run.targets, device=args.device, quality=quality, keep=keep, recent=recent
    )
    maker = None if not devices else maker_for(run, args.person)
    raw = make_source(args)
    form = make_format(args.format, run.names, estimator.session.in_dims, estimator.quality_dims)
    if args.report is not None:
        Path(args.report).mkdir(parents=True, exist_ok=True)
    output = sys.stdout.fileno()
    with contextlib.ExitStack() as stack:
        fd = 0
        if raw is not None:
            stack.callback(raw.stop)
        elif args.input != "-":
            fd = os.open(args.input, os.O_RDONLY)
            stack.callback(os.close, fd)
        pace = args.pace
        page = None
        if args.serve is not None:
            if pace is None and raw is None and stat.S_ISREG(os.fstat(fd).st_mode) and not args.follow:
                pace = run.fps if run.fps >= SLOW else FPS  # nobody waits an hour for a frame
            browser = raw.take if isinstance(raw, Browser) else None
            page = stack.enter_context(
                Page(
                    args.host,
                    args.serve,
                    run.path.resolve().name,
                    estimator,
                    note,
                    browser_camera=browser is not None,
                    on_media=browser,
                )
            )
            note(f"live at {page.url}" + ("" if page.loopback else " (anyone who can reach this address can watch)"))
        sizes = ", ".join(f"{dim} {name}" for name, dim in zip(run.names, estimator.session.in_dims))
        note(f"ready; a frame has {sizes} numbers" if raw is None else f"ready; {raw.said}")
        described = [*run.columns.items(), *((f"quality of {m}", x) for m, x in run.quality_columns.items())]
        for name, columns in described if raw is None else []:
            note(f"{name}: {', '.join(columns[:8])}{' ...' if len(columns) > 8 else ''}")
        stop = stack.enter_context(Stop())
        lines = Output(output, stop)
        complaints, began = Complaints(form.unit), time.monotonic()
        failure: OSError | None = None
        delay: Latency | None = None
        why = "end of input"
        try:
            if raw is not None and maker is not None:
                delay = Latency()
                why = _watch(raw, maker, estimator, delay, stop, output, page, not args.no_picture, lines.write)
            else:
                source = blocks(fd, stop, output, args.follow)
                _answer(form, source, estimator, complaints, Pace(pace, stop, output), page, lines.write)
        except BrokenPipeError:
            stop.output_gone = True
        except OSError as error:
            failure = error
        seconds = time.monotonic() - began
        if stop.signal is not None:
            why = f"stopped by {signal.Signals(stop.signal).name}"
        elif stop.output_gone:
            why = "the output is closed"
        elif failure is not None:
            what = "output" if isinstance(failure, OutputError) else "input"
            why = f"the {what} failed ({failure.strerror})"
        if page is not None:
            page.end(why)
    table = summary(why, seconds, estimator, complaints, delay)
    print_summary(table, estimator)
    if args.report is not None:
        note(f"report: {write_session(args.report, run, estimator, table, args.labels, run.fps)}")
    if failure is not None:
        raise failure
    if stop.signal is not None:
        return 128 + stop.signal
    if complaints.counts and not estimator.latency.frames:
        raise ValueError(
            f"--input: expected frames (--format {args.format}), got none in {complaints.counts.total()} {form.unit}s"
        )
    return 0


def _answer(
    form: Format,
    source: Iterator[Block],
    estimator: Estimator,
    complaints: Complaints,
    pace: Pace,
    page: Page | None,
    write: Callable[[str], None],
) -> None:
    number = line = 0  # number: frames from 1, malformed ones among them; line: as an editor counts, blank ones too
    for record in form.records(source):
        line += 1
        began = time.perf_counter()
        try:
            if isinstance(record, MalformedFrame):
                raise record
            frame = form.read(record)
        except MalformedFrame as error:
            number += 1
            complaints.add(line, error)
            continue
        if frame is None:
            continue
        number += 1
        parsed = time.perf_counter() - began
        pace.wait()
        answer = estimator.take(number, frame, time.perf_counter() - parsed)
        write(json.dumps(answer, allow_nan=False, separators=(",", ":")) + "\n")
        if page is not None:
            page.publish(answer, complaints.counts.total())


# --------------------------------------------------------------------------------------------------- camera, microphone
def _devices(args: argparse.Namespace) -> list[str]:
    """The flags that name where pictures and sound come from. ValueError where they contradict each other."""
    there = {"camera": args.camera is not None, "video": args.video is not None, "browser_camera": args.browser_camera}
    given = [flag for flag, asked in there.items() if asked]
    if len(given) > 1:
        raise ValueError(
            f"--{given[1].replace('_', '-')}: expected one of --camera, --video and --browser-camera, got --{given[0]} too"
        )
    if args.microphone is not None and given not in ([], ["camera"]):
        raise ValueError(
            f"--microphone: expected --camera with it, or nothing, got --{given[0].replace('_', '-')}, which brings its sound"
        )
    if args.browser_camera and args.serve is None:
        raise ValueError("--browser-camera: expected --serve PORT with it (the page's camera is meant), got none")
    if (given or args.microphone is not None) and (args.input != "-" or args.follow or args.pace is not None):
        raise ValueError(
            "--input, --follow, --pace: expected none of them beside a camera, a microphone or a video, got one"
        )
    return given if args.microphone is None else [*given, "microphone"]


def make_source(args: argparse.Namespace) -> Source | None:
    """Where pictures and sound come from; None: frames of features are read."""
    if args.video is not None:
        return Played(args.video)
    if args.browser_camera:
        return Browser()
    sources: list[Source] = [] if args.camera is None else [Camera(args.camera)]
    if args.microphone is not None:
        sources.append(Microphone(args.microphone))
    return None if not sources else sources[0] if len(sources) == 1 else Together(*sources)


def _watch(
    source: Source,
    maker: FrameMaker,
    estimator: Estimator,
    delay: Latency,
    stop: Stop,
    output: int,
    page: Page | None,
    pictures: bool,
    write: Callable[[str], None],
) -> str:
    """Estimates of what the source shows until it ends or a stop is requested; why it ended."""
    inbox = Inbox(source)
    source.start(inbox)
    if isinstance(source, Browser):
        note("waiting for the page's camera")
    else:
        inbox.begin()
    shown = -math.inf
    frames = Extraction(inbox, maker)
    try:
        while not stop.requested:
            item = frames.next(POLL)
            if item is None:
                if frames.over:
                    break
                stop.wait(None, output, 0)
                continue
            frame, seen = item
            number = round(frame.echo["t"] * maker.fps) + 1
            answer = estimator.take(number, frame)
            delay.add(1e6 * (inbox.clock() - frame.echo["t"]))
            answer["delay_ms"] = round(delay.last / 1e3, 1)
            write(json.dumps(answer, allow_nan=False, separators=(",", ":")) + "\n")
            if page is not None:
                page.publish(answer, 0)
                if pictures and seen is not None and frame.echo["t"] - shown >= 1 / PICTURES_A_SECOND - 1e-6:
                    shown = frame.echo["t"]
                    page.picture(*seen.small())
    finally:
        source.stop()
        inbox.end("stopped")
    return inbox.why


# ------------------------------------------------------------------------------------------------------------- at exit
def summary(
    why: str, seconds: float, estimator: Estimator, complaints: Complaints, delay: Latency | None = None
) -> Table:
    """What there is to say of the session, a row each. `delay`: of pictures and sound, from a frame's beginning to its
    estimate."""
    stats, quality = estimator.session.stats, estimator.quality
    rows: list[tuple[str, Any]] = [
        ("frames", f"{stats.frames} in {seconds:.1f} s ({stats.frames / max(seconds, 1e-9):.1f} a second)"),
        ("malformed", complaints.text()),
    ]
    for name, label in zip(estimator.names, stats.absent):
        refused = f", of these not finite {stats.nonfinite[label]}" if stats.nonfinite[label] else ""
        rows.append((f"{name} absent", f"{stats.absent[label]}{refused}"))
    if stats.frames:
        if delay is not None:
            rows.append(("end to end", delay.line()))
        rows += [("latency", estimator.latency.line()), ("its part in the model", estimator.step.line())]
    if quality is not None:
        whole, recent = quality.scores(), quality.recent.compute().tolist()
        for title, scores, count in (
            ("CCC", whole, quality.counted),
            (f"CCC, last {estimator.recent}", recent, sum(quality.window)),
        ):
            values = "  ".join(f"{target.name} {value:.4f}" for target, value in zip(quality.targets, scores))
            rows.append((title, f"{values}  P {sum(scores) / len(scores):.4f}  ({count} annotated frames)"))
    if delay is not None:
        note_ = "End to end: from the beginning of a frame, which lasts itself, to its estimate; latency: from its features."
        return Table(f"Stream: {why}", ("", ""), rows, note_ if stats.frames else "")
    note_ = "Latency: from a frame's bytes being there to its estimate; waiting in a pipe or for --pace is not in it."
    return Table(f"Stream: {why}", ("", ""), rows, note_ if stats.frames else "")


def print_summary(table: Table, estimator: Estimator) -> None:
    note(table.title.removeprefix("Stream: "))
    width = max(len(name) for name, _ in table.rows)
    lines = [f"{name:{width}}  {value}" for name, value in table.rows]
    bars = estimator.latency.text()
    note("\n".join([*lines, *([""] if bars else []), *bars]), prefix="")


def write_session(folder: str, run: Run, estimator: Estimator, table: Table, labels: str | None, fps: float) -> Path:
    """report.html and its pictures."""
    assert estimator.trace is not None
    pictures = []
    if estimator.trace.taken:
        kept: Recording = estimator.trace.recording()
        truth, valid = None, None
        if estimator.quality is not None:
            truth, valid = estimator.quality.at(kept.number)
        figure = plot_clip(
            f"{run.path.name}, live", kept.prediction, truth, valid, kept.weights, kept.confidence, kept.stage, run.names,
            present=kept.present, fps=fps, targets=run.targets,
        )  # fmt: skip
        text = (
            f"The last {len(kept.number):,} of {estimator.trace.taken:,} frames, {fps:g} to a second: prediction"
            f"{' and annotation' if labels else ''}, each modality's weight and confidence (bars: missing), and the "
            "posterior of the interaction stage."
        )
        pictures = [
            Picture("session", text, figure),
            Picture("latency", "Latency of every frame of the session.", plot_latency(*estimator.latency.bars())),
        ]
    return write_report(folder, f"{run.path.name}, live", pictures, [table])
