"""Picture and sound of a media file on one clock, as they come out of PyAV: bounded memory, whatever the file's length.

Time 0 is the moment at which the first picture is shown, or, without pictures, the first sound is heard. Times are
presentation timestamps, never counts: variable frame rates, a sound track that begins late or has holes, and dropped
pictures keep their place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..extras import require
from ..files import one_line

RATE = 16_000  # samples a second of the sound that is given out
LONGEST_SIDE = 960  # pixels of a picture that is given out; larger ones are reduced
SLACK = 0.03  # seconds by which a sound's timestamps may stray from its count of samples before they are believed
TRIES = 1000  # packets among which a track's first picture, or sound, has to be


@dataclass(frozen=True)
class Picture:
    """A picture, shown from `time` (s) on until the next one, the last for `duration` (s). `frame`: PyAV's; `aspect`: width of
    its pixels by their height; `reformatter`: PyAV's, one for all pictures, for each has to be set up."""

    time: float
    duration: float
    frame: Any
    aspect: float
    reformatter: Any

    @cached_property
    def rgb(self) -> np.ndarray:
        """(H, W, 3) uint8, upright, with square pixels, its longer side at most LONGEST_SIDE. Made when it is asked for."""
        width, height = self.frame.width * self.aspect, self.frame.height
        scale = min(LONGEST_SIDE / max(width, height), 1.0)
        width, height = max(round(width * scale), 1), max(round(height * scale), 1)
        rgb = self.reformatter.reformat(self.frame, width=width, height=height, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, round(self.frame.rotation / 90)))


@dataclass(frozen=True)
class Sound:
    """Samples (n,) float32, mono at RATE, the first one heard at `time` (s). They follow the Sound before without a gap, NaN
    where the file has none."""

    time: float
    samples: np.ndarray


class Media:
    """A media file to be read once from its beginning; a context manager.

    path         str or path; whatever FFmpeg reads
    picture      whether it has pictures; still images (a cover) do not count
    sound        whether it has sound
    rate         pictures a second on average, as far as the file says; 0 without pictures
    duration     seconds, as far as the file says; 0 where it does not
    damage       what was wrong with the file so far, a sentence each

    Raises FileNotFoundError, and ValueError for a file that is no media file or of which nothing can be decoded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.damage: list[str] = []
        if not self.path.is_file():
            raise FileNotFoundError(f"path: expected a media file, got {self.path}, which is none")
        self._av = require("av", "video")
        first = {kind: self._first(kind) for kind in ("video", "audio")}
        self.picture, self.sound = first["video"] is not None, first["audio"] is not None
        if not (self.picture or self.sound):
            raise ValueError(
                f"path: expected a media file with pictures or sound, got {self.path}, of which none can be decoded"
            )
        self._zero = next(time for time in first.values() if time is not None)
        self._container = self._open()
        video = self._stream(self._container, "video") if self.picture else None
        self.rate = float(video.average_rate or video.guessed_rate or 0) if video is not None else 0.0
        self.duration = float(self._container.duration or 0) / self._av.time_base

    def __enter__(self) -> Media:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def _open(self) -> Any:
        try:
            return opened(self.path)
        except (self._av.error.FFmpegError, OSError) as error:
            if isinstance(error, (PermissionError, IsADirectoryError)):
                raise
            raise ValueError(
                f"path: expected a media file, got {self.path}, which FFmpeg cannot open ({one_line(error)})"
            ) from None

    def _stream(self, container: Any, kind: str) -> Any:
        """The track of the kind that players choose; none that is a still image."""
        stream = container.streams.best(kind)
        if stream is None or stream.disposition & self._av.stream.Disposition.attached_pic:
            return None
        stream.codec_context.thread_count = 1  # several files are read at once, and few are large
        return stream

    def _first(self, kind: str) -> float | None:
        """Seconds on the file's clock of the first frame of a track; None where there is none that can be decoded."""
        with self._open() as container:
            stream = self._stream(container, kind)
            if stream is None:
                return None
            for tried, packet in enumerate(self._packets(container, [stream])):
                for frame in self._frames(packet):
                    return self._time(frame, packet)
                if tried > TRIES:
                    break
        return None

    def _packets(self, container: Any, streams: list[Any]) -> Iterator[Any]:
        """What can be read: a file that breaks off, or is damaged, ends there."""
        packets = container.demux(streams)
        while True:
            try:
                packet = next(packets, None)
            except self._av.error.FFmpegError as error:
                self._complain(f"{self.path}: cannot be read to its end ({one_line(error)})")
                return
            if packet is None:
                return
            yield packet

    def _frames(self, packet: Any) -> list[Any]:
        try:
            return packet.decode()
        except self._av.error.FFmpegError as error:
            self._complain(f"{self.path}: parts of its {packet.stream.type} cannot be decoded ({one_line(error)})")
            return []

    def _complain(self, text: str) -> None:
        if text not in self.damage:
            self.damage.append(text)

    @staticmethod
    def _time(frame: Any, packet: Any) -> float:
        """Of a frame without a timestamp, its packet's."""
        if frame.time is not None:
            return float(frame.time)
        stamp = packet.pts if packet.pts is not None else packet.dts
        return 0.0 if stamp is None else float(stamp * packet.time_base)

    def play(self, sound: bool = True) -> Iterator[Picture | Sound]:
        """Pictures in rising order of time, and sound likewise (unless it is not wanted), as the file has them side by side."""
        kinds = (("video", self.picture), ("audio", self.sound and sound))
        streams = [self._stream(self._container, kind) for kind, there in kinds if there]
        step = 1 / self.rate if self.rate else 0.0
        shown = -1.0
        track = _SoundTrack(self._av)
        reformatter = self._av.video.reformatter.VideoReformatter()
        for packet in self._packets(self._container, streams):
            for frame in self._frames(packet):
                time = self._time(frame, packet) - self._zero
                if packet.stream.type == "audio":
                    yield from track.take(frame, time)
                elif time > shown:  # times that repeat or go back are a damaged file's
                    shown = time
                    duration = float(frame.duration * frame.time_base) if frame.duration else step
                    ratio = packet.stream.sample_aspect_ratio
                    yield Picture(time, duration, frame, float(ratio) if ratio else 1.0, reformatter)
        yield from track.end()


class _SoundTrack:
    """Decoded sound of any rate and layout to one gapless run of samples at RATE, from time 0 on."""

    def __init__(self, av: Any) -> None:
        self._av = av
        self._graph: Any = None
        self._form: tuple[str, str, int] | None = None
        self._given = 0  # samples given out so far: the next one is heard at _given / RATE
        self._expected: float | None = None  # seconds at which the next frame should begin

    def take(self, frame: Any, time: float) -> Iterator[Sound]:
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._expected is None or form != self._form or abs(time - self._expected) > SLACK:
            yield from self._flush()
            self._form = form
            self._graph = self._resampler(frame)
            self._expected = time
            missing = round(time * RATE) - self._given
            self._surplus = max(-missing, 0)  # sound before time 0, or heard twice
            if missing > 0:
                yield from self._give(np.full(missing, np.nan, np.float32))
        self._expected += frame.samples / frame.sample_rate
        frame.pts = None  # the resampler would fill gaps by its own rules
        self._graph.push(frame)
        yield from self._pull()

    def _resampler(self, frame: Any) -> Any:
        """A filter graph to mono float32 at RATE. (PyAV's own AudioResampler takes no options before PyAV 18.)"""
        graph = self._av.filter.Graph()
        source = {
            "sample_rate": str(frame.sample_rate),
            "sample_fmt": frame.format.name,
            "channel_layout": frame.layout.name,
        }
        if frame.time_base is not None:
            source["time_base"] = str(frame.time_base)
        filters = (
            graph.add("abuffer", **source),
            graph.add("aresample", rematrix_maxval="1"),  # a mean of the channels, not a sum
            graph.add("aformat", sample_rates=str(RATE), sample_fmts="flt", channel_layouts="mono"),
            graph.add("abuffersink"),
        )
        for one, following in pairwise(filters):
            one.link_to(following)
        graph.configure()
        return graph

    def _pull(self) -> Iterator[Sound]:
        while True:
            try:
                out = self._graph.pull()
            except (EOFError, BlockingIOError):  # at its end, or in want of more
                return
            yield from self._cut(out)

    def _flush(self) -> Iterator[Sound]:
        if self._graph is not None:
            self._graph.push(None)
            yield from self._pull()
            self._graph = None

    end = _flush

    def _cut(self, out: Any) -> Iterator[Sound]:
        samples = out.to_ndarray().reshape(-1)
        cut = min(self._surplus, len(samples))
        self._surplus -= cut
        yield from self._give(samples[cut:])

    def _give(self, samples: np.ndarray) -> Iterator[Sound]:
        if len(samples):
            yield Sound(self._given / RATE, samples.astype(np.float32, copy=False))
            self._given += len(samples)


def jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """A picture (H, W, 3) uint8 as a JPEG file, of quality 0 to 100."""
    cv2 = require("cv2", "video")
    good, data = cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert good
    return data.tobytes()


def opened(path: str | os.PathLike[str]) -> Any:
    """PyAV's container of a file, whose titles may be in any encoding."""
    av = require("av", "video")
    # PyAV 19 reads whatever titles there are, and no longer knows the argument.
    lenient = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
    return av.open(str(path), **lenient)


def duration(path: str | os.PathLike[str]) -> float:
    """Seconds, as far as the file says; 0 where it does not."""
    av = require("av", "video")
    try:
        with opened(path) as container:
            return float(container.duration or 0) / av.time_base
    except av.error.FFmpegError:
        return 0.0
