"""From pictures to a row a frame, on a grid of constant rate, and whether the voice belongs to the face.

Frame t (0-based) covers [t/fps, (t+1)/fps) s. It shows the picture that is on show in its middle, as a player would: timestamps
that are rounded to milliseconds then fall on the frame that they mean. Everything is causal: a file that is read at once and the
same pictures as they come give the same rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..extras import require
from .faces import Face, FaceTracker, aligned
from .visual import VisualFeatures

HOLD = 1.0  # seconds for which a picture is still on show where the next one does not come
MATCH = "voice_match"  # the column of quality, of both modalities


@dataclass(frozen=True)
class Row:
    """What is known of one frame of the grid. `features` (D,), all NaN without a face; `quality` (Q,), NaN where unknown;
    `mouth`: how much the mouth moved, NaN unknown; `crop`: the aligned face."""

    features: np.ndarray
    quality: np.ndarray
    mouth: float
    face: Face | None = None
    crop: np.ndarray | None = None


class PictureRows:
    """Pictures in order of time to a row a frame.

    A picture that no frame shows costs nothing; one that several show is looked at once, and its row repeated.
    """

    def __init__(self, fps: float, tracker: FaceTracker, visual: VisualFeatures) -> None:
        self.fps, self.tracker, self.visual = fps, tracker, visual
        self.frames = 0  # decided so far
        self._shown: tuple[float, float, Callable[[], np.ndarray]] | None = None  # from when, until when, the picture
        self._duration = 0.0  # that the file gives the picture on show
        self._row: Row | None = None  # of the picture on show, once a frame wants it
        nothing = np.full(len(visual.columns), np.nan, np.float32)
        self._nobody = Row(nothing, np.full(len(visual.quality), np.nan, np.float32), math.nan)

    def push(self, time: float, rgb: Callable[[], np.ndarray], duration: float = 0.0) -> Iterator[Row]:
        """A picture on show from `time` (s) on -> rows of the frames that end before it."""
        yield from self.until(time)
        self._shown, self._duration, self._row = (time, time + max(duration, HOLD), rgb), duration, None

    def until(self, time: float) -> Iterator[Row]:
        """No picture that begins before `time` will come: rows of the frames whose middle is before it."""
        while (middle := (self.frames + 0.5) / self.fps) < time:
            self.frames += 1
            yield self._at(middle)

    def end(self, time: float) -> Iterator[Row]:
        """No picture comes any more: rows of the frames whose middle is before `time`."""
        if self._shown is not None:
            began, _, rgb = self._shown
            self._shown = (began, began + self._duration, rgb)
        return self.until(time)

    def _at(self, middle: float) -> Row:
        if self._shown is None or not self._shown[0] <= middle < self._shown[1]:
            return self._nobody
        if self._row is None:
            self._row = self._look(self._shown[0], self._shown[2]())
        return self._row

    def _look(self, time: float, rgb: np.ndarray) -> Row:
        face = self.tracker.track(rgb, time)
        crop = None if face is None else aligned(rgb, face)
        features, quality = self.visual.row(crop, face, time)
        return Row(features, quality, self.visual.mouth, face, crop)


class CroppedRows:
    """Rows of face crops that were made before: `folder`/00001.jpg is frame 1; a frame without a file has no face."""

    def __init__(self, fps: float, folder: Path, visual: VisualFeatures) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"cropped: expected a folder of face crops, got {folder}, which is none")
        self.fps, self.folder, self.visual, self.frames = fps, folder, visual, 0
        self._cv2 = require("cv2", "video")

    def push(self, time: float, rgb: Callable[[], np.ndarray], duration: float = 0.0) -> Iterator[Row]:
        """A frame for each picture that is pushed before `time`."""
        return self.until(time)

    def until(self, time: float) -> Iterator[Row]:
        while (self.frames + 0.5) / self.fps < time:
            self.frames += 1
            yield self._read(self.folder / f"{self.frames:05d}.jpg")

    end = until

    def _read(self, path: Path) -> Row:
        crop = None
        if path.exists():
            bgr = (
                self._cv2.imdecode(np.fromfile(path, np.uint8), self._cv2.IMREAD_COLOR) if path.stat().st_size else None
            )
            if bgr is None:
                raise ValueError(f"{path}: expected a JPEG picture, got a damaged file")
            crop = np.ascontiguousarray(bgr[:, :, ::-1])
        features, quality = self.visual.row(crop, None, (self.frames - 1) / self.fps)
        return Row(features, quality, self.visual.mouth, None, crop)


class VoiceMatch:
    """How well the movement of the mouth goes with the loudness of the sound, over the last `SPAN` seconds: the greatest of their
    correlations at delays of up to `DELAY` seconds either way, -1 to 1, of frames in order.

    NaN where less than half of the span's frames have both, or one of them does not vary: nobody speaks, nothing moves. A voice
    from off the screen, a dubbed one, or the face of somebody who listens has values about 0.
    """

    SPAN, DELAY = 2.0, 0.15
    LEAST = (1e-6, 1.0)  # standard deviations of mouth movement, and of loudness in dB, that count as varying

    def __init__(self, fps: float) -> None:
        self.delay = max(round(self.DELAY * fps), 1)
        self.span = max(round(self.SPAN * fps), 4)
        self._pairs: deque[tuple[float, float]] = deque(
            [(math.nan, math.nan)] * (self.span + self.delay), self.span + self.delay
        )

    def push(self, mouth: float, level: float) -> float:
        """Of the next frame: the movement of the mouth, the level of the sound in dB; NaN unknown."""
        self._pairs.append((math.sqrt(mouth) if mouth >= 0 else math.nan, max(level, -60.0)))
        pairs = np.array(self._pairs)
        found = [
            self._correlation(pairs[lag:, 0], pairs[: len(pairs) - lag, 1]) if lag >= 0 else
            self._correlation(pairs[:lag, 0], pairs[-lag:, 1])
            for lag in range(-self.delay, self.delay + 1)
        ]  # fmt: skip
        known = [r for r in found if not math.isnan(r)]
        return max(known, default=math.nan)

    def _correlation(self, mouth: np.ndarray, level: np.ndarray) -> float:
        both = ~(np.isnan(mouth) | np.isnan(level))
        if 2 * both.sum() < self.span:
            return math.nan
        x, y = mouth[both] - mouth[both].mean(), level[both] - level[both].mean()
        sx, sy = math.sqrt(float(np.mean(x * x))), math.sqrt(float(np.mean(y * y)))
        return float(np.mean(x * y)) / (sx * sy) if sx > self.LEAST[0] and sy > self.LEAST[1] else math.nan
