"""A camera, a microphone, a file played in real time, or a browser's camera, to frames of features for the estimator.

Sources deliver pictures and sound into an `Inbox`, each with its time on one clock, the newest picture winning. `Extraction`,
in a thread of its own, makes a frame of the grid of them as soon as the frame is over, by the very code that `sage-ext extract`
reads files with: the same file gives the same features.
"""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.affwild2 import Quality, Resampled
from ..extras import require
from ..files import one_line
from ..training.runs import Run
from ..video.analysis import parameters_of
from ..video.decode import RATE, Media, Picture, jpeg
from ..video.extraction import Parameters, end_of
from ..video.faces import FaceTracker, OpenCVTracker
from ..video.sound import ROWS
from ..video.tracks import PictureRows, VoiceMatch
from .frames import Frame

PATIENCE = 0.08  # seconds that a frame waits for sound that is late; then it has none
BACKLOG = 64  # frames that may wait for the estimator
PICTURES_A_SECOND, PICTURE_SIDE = 12.0, 480  # that the page is shown, and the pixels of their longer side


class Inbox:
    """Pictures and sound of one moment after another, from sources that run in threads of their own.

    Times are seconds since the stream began. Sound is a run of samples at RATE without gaps, NaN where there is none.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.begun: float | None = None  # on time.monotonic
        self.changed = threading.Condition()
        self.pictures: deque[tuple[float, float, Callable[[], np.ndarray]]] = deque(maxlen=8 if source.live else None)
        self.newest = self.picture_end = -math.inf  # when the last picture that came begins, and ends
        self.sound: deque[np.ndarray] = deque()
        self.heard = 0  # samples that came
        self.ended = False
        self.why = "the source ended"

    def begin(self) -> None:
        """Time 0 is now."""
        with self.changed:
            self.begun = time.monotonic()
            self.changed.notify_all()

    def clock(self) -> float:
        """Seconds since the stream began; 0 before."""
        return 0.0 if self.begun is None else time.monotonic() - self.begun

    def picture(self, at: float, rgb: Callable[[], np.ndarray], duration: float = 0.0) -> None:
        with self.changed:
            self.pictures.append((at, duration, rgb))
            self.newest, self.picture_end = at, at + duration
            self.changed.notify_all()

    def samples(self, at: float, samples: np.ndarray) -> None:
        """Sound whose first sample was heard at `at`. What is missing before it becomes NaN; what was there is dropped."""
        with self.changed:
            gap = round(at * RATE) - self.heard
            if gap > 0:
                self.sound.append(np.full(gap, np.nan, np.float32))
                self.heard += gap
            samples = samples[max(-gap, 0) :]
            if len(samples):
                self.sound.append(samples)
                self.heard += len(samples)
            self.changed.notify_all()

    def end(self, why: str) -> None:
        with self.changed:
            if not self.ended:
                self.ended, self.why = True, why
            self.changed.notify_all()


class _Tail:
    """The last rows of a track, under their numbers since its beginning; what `Resampled` and `Quality` slice."""

    def __init__(self, columns: int, keep: int) -> None:
        self.rows, self.first, self.keep = np.zeros((0, columns), np.float32), 0, keep
        self.dtype = self.rows.dtype

    def append(self, rows: np.ndarray) -> None:
        self.rows = np.concatenate([self.rows, rows])
        surplus = len(self.rows) - self.keep
        if surplus > self.keep:  # now and then, not with every row
            self.rows, self.first = self.rows[surplus:], self.first + surplus

    @property
    def shape(self) -> tuple[int, int]:
        return self.first + len(self.rows), self.rows.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> np.ndarray:
        if isinstance(at, slice):
            return self.rows[at.start - self.first : at.stop - self.first]
        return self.rows[np.asarray(at) - self.first]


@dataclass(frozen=True)
class Seen:
    """What the page shows of a frame: the picture (H, W, 3) uint8 RGB and the face's box in its pixels."""

    rgb: np.ndarray
    face: tuple[float, float, float, float] | None

    def small(self) -> tuple[bytes, tuple[float, float, float, float] | None, tuple[int, int]]:
        """A JPEG, the face's box and the picture's width and height, both in the JPEG's pixels."""
        cv2 = require("cv2", "video")
        height, width = self.rgb.shape[:2]
        scale = min(PICTURE_SIDE / max(height, width), 1.0)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        picture = cv2.resize(self.rgb, size, interpolation=cv2.INTER_AREA) if scale < 1 else self.rgb
        left, top, wide, high = self.face or (0.0, 0.0, 0.0, 0.0)
        box = None if self.face is None else (left * scale, top * scale, wide * scale, high * scale)
        return jpeg(picture, 70), box, size


class FrameMaker:
    """Pictures and sound as they come -> the estimator's frames. `names`: the model's modalities, in order."""

    def __init__(self, names: tuple[str, ...], parameters: Parameters, tracker: FaceTracker, fps: float) -> None:
        self.names, self.fps, self.frame = names, fps, 0
        visual, sound = parameters.features()
        self.seen: Seen | None = None
        self._pictures = None if visual is None else PictureRows(fps, _Watched(tracker, self), visual)
        self._sound, self._match = sound, VoiceMatch(fps)
        if sound is not None:
            keep = 4 * math.ceil(ROWS / fps) + 2 * ROWS
            self._rows, self._quality = _Tail(len(sound.columns), keep), _Tail(len(sound.quality), keep)

    @property
    def wanted(self) -> int:
        """Samples of sound that the next frame needs to have been pushed."""
        return 0 if self._sound is None else math.ceil((self.frame + 1) * ROWS / self.fps - 1e-6) * (RATE // ROWS)

    def picture(self, at: float, rgb: Callable[[], np.ndarray], duration: float = 0.0) -> None:
        """One that is shown from `at` (s) on, which is no later than the middle of the next frame."""
        if self._pictures is not None:
            for _ in self._pictures.push(at, rgb, duration):
                raise AssertionError("a picture of a frame that is over")

    def samples(self, samples: np.ndarray) -> None:
        if self._sound is not None and len(samples):
            rows, quality = self._sound.push(samples)
            self._rows.append(rows)
            self._quality.append(quality)

    def make(self) -> Frame:
        """The next frame; `picture` and `samples` have had all that belongs to it."""
        t, self.frame = self.frame, self.frame + 1
        features: dict[str, np.ndarray] = {}
        quality: dict[str, np.ndarray] = {}
        mouth = level = math.nan
        if self._pictures is not None:
            (row,) = self._pictures.until((t + 0.5) / self.fps + 1e-9)
            features["visual"], quality["visual"], mouth = row.features[None], row.quality[None], row.mouth
        if self._sound is not None:
            features["audio"] = Resampled(self._rows, ROWS, self.fps)[t : t + 1]  # type: ignore[arg-type]
            quality["audio"] = Quality(self._quality, ROWS, self.fps)[t : t + 1]  # type: ignore[arg-type]
            level = float(quality["audio"][0, 0])
        match = np.float32(self._match.push(mouth, level))
        if self._pictures is None or self._sound is None:
            match = np.float32(np.nan)
        quality = {name: np.append(x, [[match]], 1).astype(np.float32) for name, x in quality.items()}
        present = np.array([[bool(np.isfinite(features[name]).all()) for name in self.names]])
        return Frame(
            [np.nan_to_num(features[name]) for name in self.names], present, {"t": round(t / self.fps, 6)},
            {name: quality[name] for name in self.names},
        )  # fmt: skip


class _Watched(FaceTracker):
    """A tracker that leaves the last picture and face with the maker, for the page."""

    def __init__(self, tracker: FaceTracker, maker: FrameMaker) -> None:
        self.tracker, self.maker = tracker, maker

    def track(self, picture: np.ndarray, time: float) -> Any:
        face = self.tracker.track(picture, time)
        self.maker.seen = Seen(picture, None if face is None else face.box)
        return face


class Extraction:
    """Frames from an inbox, made in a thread; iterate over it. Of a live source a frame is due when the clock says so, with its
    sound or, after PATIENCE, without; of another one when the inbox has all of it."""

    def __init__(self, inbox: Inbox, maker: FrameMaker) -> None:
        self.inbox, self.maker = inbox, maker
        self.over = False
        self.error: BaseException | None = None
        self._out: queue.Queue[tuple[Frame, Seen | None] | None] = queue.Queue(BACKLOG)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Frame, Seen | None]]:
        while not self.over:
            item = self.next()
            if item is not None:
                yield item

    def next(self, seconds: float | None = None) -> tuple[Frame, Seen | None] | None:
        """The next frame; None if none came in so many seconds, or, then `over` is True, none will. What went wrong in the thread
        is raised here."""
        try:
            item = self._out.get(timeout=seconds)
        except queue.Empty:
            return None
        if item is None:
            self.over = True
            if self.error is not None:
                raise self.error
        return item

    def _run(self) -> None:
        try:
            while self._wait():
                frame = self.maker.make()
                seen, self.maker.seen = self.maker.seen, None
                self._out.put((frame, seen))
        except BaseException as error:
            self.error = error
        finally:
            self._out.put(None)

    def _wait(self) -> bool:
        """Until the next frame has all that it will have, which the maker is then given. False: the inbox ended before."""
        maker, inbox = self.maker, self.inbox
        end, middle = (maker.frame + 1) / maker.fps, (maker.frame + 0.5) / maker.fps
        with inbox.changed:
            while True:
                late = inbox.clock() - end
                heard = inbox.heard >= maker.wanted or not inbox.source.sound
                if inbox.ended:
                    if middle >= end_of(inbox.picture_end, inbox.heard / RATE) - 1e-6:
                        return False
                    break
                if (
                    late >= (0 if heard else PATIENCE)
                    if inbox.source.live
                    else heard and (inbox.newest > middle or not inbox.source.picture)
                ):
                    break
                inbox.changed.wait((-late if late < 0 else PATIENCE - late) if inbox.source.live else None)
            pictures = [inbox.pictures.popleft() for _ in range(sum(p[0] <= middle for p in inbox.pictures))]
            sound = list(inbox.sound)
            inbox.sound.clear()
            missing = maker.wanted - inbox.heard
            if missing > 0:  # what comes of it later is dropped
                sound.append(np.full(missing, np.nan, np.float32))
                inbox.heard += missing
        for at, duration, rgb in pictures:
            maker.picture(at, rgb, duration)
        for samples in sound:
            maker.samples(samples)
        return True


# ------------------------------------------------------------------------------------------------------------- sources
class Source:
    """Delivers into an inbox from `start` until `stop`. `live`: what is not taken in time is over; `picture`, `sound`: what
    comes."""

    live = picture = sound = True
    said: str  # what it is, for people

    def start(self, inbox: Inbox) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Returns at once."""


class _Threaded(Source):
    """A source whose `_run` delivers in a thread of its own, until `_stop` is set."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def start(self, inbox: Inbox) -> None:
        threading.Thread(target=self._run, args=(inbox,), daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self, inbox: Inbox) -> None:
        raise NotImplementedError


def _rgb(bgr: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bgr[:, :, ::-1])


class Camera(_Threaded):
    """A camera of this machine by its number, through OpenCV. OSError where there is none."""

    sound = False

    def __init__(self, number: int) -> None:
        super().__init__()
        cv2 = require("cv2", "video")
        self.said = f"camera {number}"
        with _quiet():
            self.capture = cv2.VideoCapture(number)
        if not self.capture.isOpened():
            raise OSError(
                f"--camera: expected the number of a camera of this machine, got {number}, which cannot be opened"
            )

    def _run(self, inbox: Inbox) -> None:
        while not self._stop.is_set():
            good, bgr = self.capture.read()
            if not good:
                inbox.end("the camera has gone")
                break
            inbox.picture(inbox.clock(), functools.partial(_rgb, bgr))
        self.capture.release()


class Microphone(_Threaded):
    """A microphone of this machine, through FFmpeg's devices. `name`: as the system calls it; "": its default one. OSError where
    there is none."""

    picture = False

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.av = require("av", "video")
        self.said = f"microphone {name}" if name else "the microphone"
        form, usual = {"darwin": ("avfoundation", ":0"), "win32": ("dshow", "audio=default")}.get(
            sys.platform, ("alsa", "default")
        )
        try:
            self.container = self.av.open(name or usual, format=form)
        except (self.av.error.FFmpegError, OSError, ValueError) as error:
            raise OSError(
                f"--microphone: expected a microphone of this machine, got {name or usual!r}, which {form} cannot open "
                f"({one_line(error)})"
            ) from None

    def _run(self, inbox: Inbox) -> None:
        resampler = self.av.AudioResampler(format="flt", layout="mono", rate=RATE)
        begins: float | None = None
        given = 0
        try:
            for frame in self.container.decode(audio=0):
                if self._stop.is_set():
                    break
                for out in resampler.resample(frame):
                    samples = out.to_ndarray().reshape(-1)
                    if begins is None:
                        begins = max(inbox.clock() - len(samples) / RATE, 0.0)
                    inbox.samples(begins + given / RATE, samples)
                    given += len(samples)
        except (self.av.error.FFmpegError, OSError):
            inbox.end("the microphone has gone")
        self.container.close()


class Played(_Threaded):
    """A file, its pictures and sound delivered at the time when they are seen and heard; `paced` False: all at once."""

    def __init__(self, path: str | Path, *, paced: bool = True) -> None:
        super().__init__()
        self.media, self.live = Media(path), paced
        self.said = f"{path} in real time"
        self.picture, self.sound = self.media.picture, self.media.sound

    def _run(self, inbox: Inbox) -> None:
        why = "the video is over"
        try:
            with self.media:
                for item in self.media.play():
                    due = item.time if isinstance(item, Picture) else item.time + len(item.samples) / RATE
                    if not self._until(inbox, due):
                        return
                    if isinstance(item, Picture):
                        inbox.picture(item.time, functools.partial(getattr, item, "rgb"), item.duration)
                    else:
                        inbox.samples(item.time, item.samples)
        except Exception as error:
            why = one_line(error)
        inbox.end(why)

    def _until(self, inbox: Inbox, due: float) -> bool:
        """False: stop."""
        return not self._stop.wait(max(due - inbox.clock(), 0) if self.live else 0)


class Browser(Source):
    """What the page sends of a browser's camera and microphone, on the browser's clock. `take` is the page's `on_media`."""

    said = "the camera and the microphone of the page"

    def __init__(self) -> None:
        self.cv2 = require("cv2", "video")
        self._inbox: Inbox | None = None
        self._shift: float | None = None

    def start(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def take(self, kind: str, seconds: float, payload: bytes) -> None:
        """`kind` "picture": a JPEG; "sound": float32 at RATE, little-endian; seen or first heard at `seconds`."""
        inbox = self._inbox
        if inbox is None:
            return
        samples = np.frombuffer(payload, "<f4") if kind == "sound" else None
        if self._shift is None:  # what comes first has just ended
            inbox.begin()
            self._shift = inbox.clock() - seconds - (0 if samples is None else len(samples) / RATE)
        at = seconds + self._shift
        if samples is not None:
            inbox.samples(at, samples)
        else:
            inbox.picture(at, lambda: self._decode(payload))

    def _decode(self, jpeg: bytes) -> np.ndarray:
        bgr = self.cv2.imdecode(np.frombuffer(jpeg, np.uint8), self.cv2.IMREAD_COLOR)
        return np.zeros((16, 16, 3), np.uint8) if bgr is None else _rgb(bgr)


class Together(Source):
    """Several sources on one clock."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources
        self.said = " and ".join(source.said for source in sources)
        self.picture, self.sound = (any(getattr(source, kind) for source in sources) for kind in ("picture", "sound"))

    def start(self, inbox: Inbox) -> None:
        for source in self.sources:
            source.start(inbox)

    def stop(self) -> None:
        for source in self.sources:
            source.stop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """OpenCV writes warnings about devices that are not there."""
    cv2 = require("cv2", "video")
    level = cv2.utils.logging.getLogLevel() if hasattr(cv2, "utils") else None
    if level is not None:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        if level is not None:
            cv2.utils.logging.setLogLevel(level)


def maker_for(run: Run, person: str = "largest") -> FrameMaker:
    """Frames for the model of `run`. ValueError where it learnt from features that `sage-ext extract` does not make."""
    parameters = parameters_of(run)
    visual, sound = parameters.features()
    have = {"visual": visual, "audio": sound}
    for name, dim in zip(run.names, run.model.in_dims):
        made = have.get(name)
        if made is None or len(made.columns) != dim or run.columns.get(name, list(made.columns)) != list(made.columns):
            raise ValueError(
                f"--run: expected a run that was trained on features of sage-ext extract, got {run.path} with {name} of {dim} "
                f"numbers ({'not made by it' if made is None else f'it makes {len(made.columns)}'})"
            )
    fps = parameters.fps or run.fps
    return FrameMaker(tuple(run.names), parameters, OpenCVTracker(person, parameters.yunet), fps)
