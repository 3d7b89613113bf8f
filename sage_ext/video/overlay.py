"""The video with what was estimated drawn onto it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..data.targets import Target
from ..extras import require
from ..files import replacing
from ..report import MODALITY, STAGE, printable
from .decode import SLACK, Media, Picture, opened
from .report import TARGET
from .result import Result

LEAST, MOST = 480, 1920  # pixels: the shorter side at least, so that writing can be read, and the longer one at most
CLOCK = 90_000  # ticks a second of the pictures' times: 24, 25, 30 and 29.97 a second fall on whole ones
TRAIL = 4.0  # seconds of the point's past
RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)  # of the sound, that AAC has
INK, SOFT, PANEL = (245, 245, 245), (150, 156, 166), (20, 23, 30)  # of writing, of lines, of panels

Color = tuple[int, int, int]


def write_overlay(result: Result, path: str | Path) -> Path:
    """Write the video of `result` to `path`, an mp4 (H.264, AAC), with the estimates drawn onto it; whole or not at all.

    Pictures keep their times, and the sound is kept. Pictures whose shorter side has under 480 pixels are enlarged, those whose
    longer one has over 1920 reduced. Without a run, the face's box and what is present are drawn. ValueError where
    `result.source` has no pictures, or is `path`.
    """
    path = Path(path)
    av = require("av", "video")
    if path.exists() and path.samefile(result.source):
        raise ValueError(f"path: expected another file than the video itself, got {path}")
    if not len(result.present):
        raise ValueError("result: expected at least one frame, got none")
    with Media(result.source) as media:
        pictures = (item for item in media.play(sound=False) if isinstance(item, Picture))
        first = next(pictures, None) if media.picture else None
        if first is None:
            raise ValueError(f"result.source: expected a video with pictures, got {result.source}, which has none")
        with replacing(path) as file, av.open(file, "w", format="mp4") as container:
            _write(av, container, result, media.rate, first, pictures)
    return path


# --------------------------------------------------------------------------------------------------------------- files
def _write(av: Any, container: Any, result: Result, rate: float, first: Picture, rest: Iterator[Picture]) -> None:
    """Picture by picture, with the source's sound in step: the container holds back what has nothing beside it."""
    canvas = _Canvas(result, first)
    pace = Fraction(rate if 1 <= rate <= 1000 else result.fps).limit_denominator(100_000)
    usual = "libx264" in av.codecs_available
    video = container.add_stream(
        "libx264" if usual else "h264", rate=pace, options={"crf": "20", "preset": "veryfast"} if usual else {}
    )
    video.width, video.height = canvas.size
    video.pix_fmt = "yuv420p"
    video.codec_context.time_base = Fraction(1, CLOCK)
    video.codec_context.colorspace = video.codec_context.color_primaries = video.codec_context.color_trc = 1  # BT.709
    video.codec_context.color_range = 1  # 16 to 235
    sound = _sound(av, result.source, float(first.frame.time or 0) - first.time, container)
    heard, stamp = next(sound, math.inf), -1
    for picture in chain([first], rest):
        frame = av.VideoFrame.from_ndarray(canvas.drawn(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts = stamp = max(round(picture.time * CLOCK), stamp + 1)
        frame.time_base = Fraction(1, CLOCK)
        frame.duration = round((picture.duration or 1 / pace) * CLOCK)
        container.mux(video.encode(frame))
        while heard <= picture.time:
            heard = next(sound, math.inf)
    container.mux(video.encode(None))
    for _ in sound:
        pass


def _sound(av: Any, source: Path, zero: float, into: Any) -> Iterator[float]:
    """Moves the source's sound into the container, a little at each step, and gives the seconds it has come to. The first step
    adds the track. `zero`: where the pictures begin on the file's clock."""
    with opened(source) as container:
        track = container.streams.best("audio")
        if track is None or not track.rate or not track.channels:
            return
        rate = track.rate if track.rate in RATES else RATES[0]
        channels = min(track.channels, 2)
        layout = "stereo" if channels == 2 else "mono"
        out = into.add_stream("aac", rate=rate, layout=layout, bit_rate=96_000 * channels)
        yield -math.inf
        given = surplus = 0  # samples: that were given, that are to be dropped
        expected, form = math.nan, None
        resampler: Any = None

        def give(samples: np.ndarray) -> None:
            nonlocal given
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, given, Fraction(1, rate)
            given += samples.shape[1]
            into.mux(out.encode(frame))

        for frame in _frames(av, container, track):
            begins = expected if frame.time is None else frame.time - zero
            if math.isnan(begins):
                begins = 0.0
            if not abs(begins - expected) <= SLACK:  # the first one, or after a gap
                missing = round(begins * rate) - given
                for done in range(0, missing, rate):
                    give(np.zeros((channels, min(rate, missing - done))))
                surplus, expected = max(-missing, 0), begins
            if form != (form := (frame.format.name, frame.layout.name, frame.sample_rate)):
                resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            expected += frame.samples / frame.sample_rate
            frame.pts = None  # the resampler would fill gaps by its own rules
            for part in resampler.resample(frame):
                samples = part.to_ndarray()
                cut = min(surplus, samples.shape[1])
                surplus -= cut
                if samples.shape[1] > cut:
                    give(samples[:, cut:])
            yield given / rate
        into.mux(out.encode(None))


def _frames(av: Any, container: Any, track: Any) -> Iterator[Any]:
    """What can be decoded: damaged packets are left out, and a file that breaks off ends there."""
    packets = container.demux(track)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            continue


# ------------------------------------------------------------------------------------------------------------- drawing
def _rgb(color: str) -> Color:
    """Of #RRGGBB, a little lighter: panels are dark."""
    if not color.startswith("#"):
        return INK
    red, green, blue = (round(0.75 * int(color[i : i + 2], 16) + 0.25 * 255) for i in (1, 3, 5))
    return red, green, blue


def frame_of(time: float, fps: float, frames: int) -> int:
    """The first frame that shows a picture of that time."""
    return min(max(math.floor(time * fps + 0.5 - 1e-6), 0), frames - 1)


class _Canvas:
    """Draws onto the pictures of one video. `size`: width and height of what it draws, even numbers."""

    def __init__(self, result: Result, first: Picture) -> None:
        self.cv2 = require("cv2", "video")
        self.result = result
        width, height = first.frame.width * first.aspect, first.frame.height
        if round(first.frame.rotation / 90) % 2:
            width, height = height, width
        scale = min(max(1.0, LEAST / min(width, height)), MOST / max(width, height))
        self.size = (max(round(width * scale / 2), 1) * 2, max(round(height * scale / 2), 1) * 2)
        self.unit = min(self.size) / LEAST  # all lengths below are in it
        self.plane: tuple[int, int] | None = None  # columns of valence and arousal
        names = [target.name for target in result.targets]
        if result.prediction is not None and {"valence", "arousal"} <= set(names):
            self.plane = (names.index("valence"), names.index("arousal"))
        self.bars = [c for c in range(len(names)) if result.prediction is not None and c not in (self.plane or ())]

    def drawn(self, picture: Picture) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        turns = round(picture.frame.rotation / 90)
        width, height = self.size if turns % 2 == 0 else self.size[::-1]
        image = picture.frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        image = np.ascontiguousarray(np.rot90(image, turns))
        t = frame_of(picture.time, self.result.fps, len(self.result.present))
        self._face(image, t)
        left, bottom = self._x(10), self.size[1] - self._x(10)
        if self.plane is not None:
            bottom = self._plane(image, t, left, bottom) - self._x(8)
        if self.bars:
            self._bars(image, t, left, bottom)
        self._modalities(image, t)
        return image

    def _x(self, units: float) -> int:
        return round(units * self.unit)

    def _panel(self, image: np.ndarray, left: int, top: int, right: int, bottom: int) -> None:
        part = image[max(top, 0) : bottom, max(left, 0) : right]
        if part.size:
            part[:] = self.cv2.addWeighted(part, 0.3, np.full_like(part, PANEL), 0.7, 0)

    def _line(
        self, image: np.ndarray, start: tuple[int, int], stop: tuple[int, int], color: Color, thick: float = 1
    ) -> None:
        self.cv2.line(image, start, stop, color, max(round(thick * self.unit), 1), self.cv2.LINE_AA)

    def _write(
        self,
        image: np.ndarray,
        text: str,
        left: int,
        base: int,
        color: Color = INK,
        *,
        most: int | None = None,
        right: bool = False,
    ) -> None:
        """A line of text on `base`, shortened to `most` pixels; `right`: it ends at `left`. The font has ASCII alone."""
        font, scale, thick = self.cv2.FONT_HERSHEY_SIMPLEX, 0.42 * self.unit, max(round(self.unit), 1)
        text = printable(text).encode("ascii", "replace").decode()
        while most is not None and len(text) > 3 and self.cv2.getTextSize(text, font, scale, thick)[0][0] > most:
            text = text.rstrip(".")[:-1] + ".."
        if right:
            left -= self.cv2.getTextSize(text, font, scale, thick)[0][0]
        self.cv2.putText(image, text, (left, base), font, scale, color, thick, self.cv2.LINE_AA)

    def _face(self, image: np.ndarray, t: int) -> None:
        result = self.result
        if not all(result.size) or np.isnan(result.faces[t]).any():
            return
        across, down = self.size[0] / result.size[0], self.size[1] / result.size[1]
        left, top, width, height = result.faces[t].astype(float)
        corners = (
            (round(left * across), round(top * down)),
            (round((left + width) * across), round((top + height) * down)),
        )
        m = result.modalities.index("visual") if "visual" in result.modalities else 0
        self.cv2.rectangle(image, *corners, _rgb(MODALITY[m % len(MODALITY)]), max(self._x(2), 1), self.cv2.LINE_AA)

    def _plane(self, image: np.ndarray, t: int, left: int, bottom: int) -> int:
        """The point of valence (to the right) and arousal (upwards), its deviation and its past; the top of the panel."""
        result, cv2 = self.result, self.cv2
        assert self.plane is not None
        assert result.prediction is not None
        side = self._x(150)
        top, right, inset = bottom - side, left + side, self._x(12)
        self._panel(image, left, top, right, bottom)
        half = side // 2 - inset
        x0, y0 = left + side // 2, top + side // 2
        self._line(image, (x0 - half, y0), (x0 + half, y0), SOFT)
        self._line(image, (x0, y0 - half), (x0, y0 + half), SOFT)
        cv2.circle(image, (x0, y0), half, SOFT, max(round(self.unit), 1), cv2.LINE_AA)
        self._write(image, "arousal", left + self._x(5), top + self._x(12), SOFT)
        self._write(image, "valence", right - self._x(5), bottom - self._x(5), SOFT, right=True)
        ends = [result.targets[c] for c in self.plane]
        since = max(t - round(TRAIL * result.fps), 0)
        past = np.stack([target.scaled(result.prediction[since : t + 1, c]) for c, target in zip(self.plane, ends)], 1)
        past = past[~np.isnan(past).any(1)]
        if np.isnan(result.prediction[t, list(self.plane)]).any() or not len(past):
            return top
        places = np.rint(np.clip(past, -1, 1) * (half, -half) + (x0, y0)).astype(int)
        color, base = np.array(_rgb(TARGET[0])), np.array(PANEL)
        chosen = places[np.unique(np.linspace(0, len(places) - 1, 48).astype(int))]
        for i in range(1, len(chosen)):
            faded = base + (color - base) * (i / len(chosen))
            self._line(image, tuple(map(int, chosen[i - 1])), tuple(map(int, chosen[i])), tuple(map(int, faded)), 2)  # type: ignore[arg-type]
        point = (int(places[-1][0]), int(places[-1][1]))
        if result.deviation is not None and not np.isnan(result.deviation[t, list(self.plane)]).any():
            radii = [
                result.deviation[t, c] * 2 / (target.high - target.low) * half for c, target in zip(self.plane, ends)
            ]
            part = image[top:bottom, left:right].copy()
            middle = (point[0] - left, point[1] - top)
            cv2.ellipse(part, middle, (round(radii[0]), round(radii[1])), 0, 0, 360, _rgb(TARGET[0]), -1, cv2.LINE_AA)
            image[top:bottom, left:right] = cv2.addWeighted(image[top:bottom, left:right], 0.75, part, 0.25, 0)
        cv2.circle(image, point, self._x(5), INK, -1, cv2.LINE_AA)
        cv2.circle(image, point, self._x(4), _rgb(TARGET[0]), -1, cv2.LINE_AA)
        return top

    def _bars(self, image: np.ndarray, t: int, left: int, bottom: int) -> None:
        """A row for each other target: its name, its value, and where that is in its range."""
        result = self.result
        assert result.prediction is not None
        row, width = self._x(28), self._x(190)
        shown = self.bars[: max((bottom - self._x(10)) // row, 1)]
        top = bottom - row * len(shown) - self._x(8)
        self._panel(image, left, top, left + width, bottom)
        start, stop = left + self._x(10), left + width - self._x(10)
        for i, c in enumerate(shown):
            target, value = result.targets[c], float(result.prediction[t, c])
            base = top + self._x(16) + i * row
            self._write(image, target.name, start, base, most=self._x(115))
            self._write(image, "-" if math.isnan(value) else f"{value:.3g}", stop, base, right=True)
            self._track(image, start, stop, base + self._x(7))
            if not math.isnan(value):
                self._estimate(image, target, value, result, t, c, start, stop, base + self._x(7))

    def _track(self, image: np.ndarray, start: int, stop: int, y: int) -> None:
        self._line(image, (start, y), (stop, y), (70, 76, 88), 4)

    def _estimate(
        self,
        image: np.ndarray,
        target: Target,
        value: float,
        result: Result,
        t: int,
        c: int,
        start: int,
        stop: int,
        y: int,
    ) -> None:
        def place(x: float) -> int:
            return round(start + float(np.clip((x - target.low) / (target.high - target.low), 0, 1)) * (stop - start))

        color = _rgb(TARGET[c % len(TARGET)])
        if result.deviation is not None and not math.isnan(deviation := float(result.deviation[t, c])):
            faint = tuple((a + b) // 2 for a, b in zip(color, PANEL))
            self._line(image, (place(value - deviation), y), (place(value + deviation), y), faint, 4)  # type: ignore[arg-type]
        self.cv2.circle(image, (place(value), y), self._x(5), color, -1, self.cv2.LINE_AA)

    def _modalities(self, image: np.ndarray, t: int) -> None:
        """A row for each modality: its weight, a mark at its confidence, or that it is absent; and the stage."""
        result = self.result
        row, width = self._x(28), self._x(190)
        right, bottom = self.size[0] - self._x(10), self.size[1] - self._x(10)
        staged = result.stage is not None and result.stage.shape[1] > 0
        shown = min(len(result.modalities), max(bottom // row - 2, 1))
        top, left = bottom - row * (shown + staged) - self._x(8), right - width
        self._panel(image, left, top, right, bottom)
        start, stop = left + self._x(10), right - self._x(10)
        for m in range(shown):
            base, color = top + self._x(16) + m * row, _rgb(MODALITY[m % len(MODALITY)])
            present = bool(result.present[t, m])
            self._write(image, result.modalities[m], start, base, INK if present else SOFT, most=self._x(105))
            y = base + self._x(7)
            if result.weights is None:
                self._write(
                    image, "present" if present else "absent", stop, base, color if present else SOFT, right=True
                )
                self._line(image, (start, y), (stop, y), color if present else (70, 76, 88), 4)
                continue
            weight = float(result.weights[t, m])
            self._write(
                image,
                f"{100 * weight:.0f} %" if present else "absent",
                stop,
                base,
                color if present else SOFT,
                right=True,
            )
            self._track(image, start, stop, y)
            if weight > 0.005:
                self._line(image, (start, y), (round(start + weight * (stop - start)), y), color, 4)
            if result.confidence is not None and present and not math.isnan(sure := float(result.confidence[t, m])):
                x = round(start + min(max(sure, 0), 1) * (stop - start))
                self._line(image, (x, y - self._x(5)), (x, y + self._x(5)), INK, 2)
        if staged:
            self._stage(image, t, start, stop, top + self._x(16) + shown * row)

    def _stage(self, image: np.ndarray, t: int, start: int, stop: int, base: int) -> None:
        assert self.result.stage is not None
        posterior = np.nan_to_num(self.result.stage[t].astype(float))
        likely = int(posterior.argmax())
        self._write(image, f"stage {likely + 1}", start, base, _rgb(STAGE[likely % len(STAGE)]))
        self._write(image, f"{100 * posterior[likely]:.0f} %", stop, base, SOFT, right=True)
        edges = np.rint(start + np.append(0, np.cumsum(posterior)).clip(0, 1) * (stop - start)).astype(int)
        top, bottom = base + self._x(5), base + self._x(9)
        for s in range(len(posterior)):
            image[top:bottom, edges[s] : edges[s + 1]] = _rgb(STAGE[s % len(STAGE)])
