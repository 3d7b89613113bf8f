"""The face of one person in the pictures of a video: found, followed from picture to picture, and cut out upright."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.columns import Numbers, open_table
from ..extras import require

EYES = (
    (0.342, 0.461),
    (0.657, 0.461),
)  # of an aligned crop, in its size: where face recognisers of 112 x 112 want them
_BOX_EYES = ((0.325, 0.385), (0.665, 0.385))  # of a square box: where a frontal face has them on average
_SHORT_SIDE = 240  # pixels of the picture in which faces are looked for
_EVERY = 1 / 3  # seconds between two detections while a face is followed
_EVERY_WITHOUT = 0.1  # and while there is none
_LOST_AFTER = 0.5  # seconds for which a face that is not found stays where it was
_PATIENCE, _PATIENCE_ONCE = 3.0, 0.75  # seconds without the detector's word; of a face that it found a single time
_SMOOTHING = 0.4  # seconds in which box and eyes come nearer, by 63 %, to where the detector has them
_FOLLOWED, _LIKE_BEFORE = 0.6, 0.85  # correlation with the patch: least of a face, least at which the patch is kept
_LARGER, _LARGER_FOR = 1.25, 1.0  # by which another face must be higher, and for how many seconds, to be shown instead
_MOST_TRACKS = 8

Box = tuple[float, float, float, float]
Eyes = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Face:
    """A face in a picture.

    box     left, top, width, height in pixels of the picture
    eyes    (x, y) of the eye that is left in the picture, then of the right one; None where unknown
    score   of the last detection, on the detector's own scale, NaN where unknown
    age     seconds since its track began
    since   seconds since the detector last confirmed it, 0: in this picture
    """

    box: Box
    eyes: Eyes | None
    score: float
    age: float
    since: float


class FaceTracker(Protocol):
    """What finds the face of the person a video is about; stateful, one video."""

    def track(self, picture: np.ndarray, time: float) -> Face | None:
        """The face in `picture`, (H, W, 3) uint8 RGB, shown at `time` seconds, which rises; None without one."""


@dataclass(frozen=True)
class Found:
    """What a detector says of one face, in pixels of the picture."""

    box: Box
    eyes: Eyes | None
    score: float


Detector = Callable[[np.ndarray], Sequence[Found]]  # picture (H, W, 3) uint8 RGB -> all faces in it


# ------------------------------------------------------------------------------------------------------------- detectors
class HaarDetector:
    """OpenCV's own cascades: a frontal face, and the eyes in the upper part of it.

    The score is the weight of the last level that the face passed: about 9 for a sharp frontal face, 5 for a blurred, turned
    or partly hidden one. A picture with little contrast is equalised first.
    """

    def __init__(self) -> None:
        self._cv2 = cv2 = require("cv2", "video")
        folder = cv2.data.haarcascades
        self._faces = cv2.CascadeClassifier(os.path.join(folder, "haarcascade_frontalface_default.xml"))
        self._eyes = cv2.CascadeClassifier(os.path.join(folder, "haarcascade_eye.xml"))

    def __call__(self, picture: np.ndarray) -> list[Found]:
        cv2 = self._cv2
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        small, scale = _scaled(cv2, grey)
        if small.std() < 25:
            small = cv2.equalizeHist(small)
        boxes, _, weights = self._faces.detectMultiScale3(small, 1.2, 3, 0, (30, 30), outputRejectLevels=True)
        found = []
        for box, weight in zip(boxes, weights):
            left, top, width, height = (float(x) / scale for x in box)
            face = (left, top, width, height)
            found.append(Found(face, self._eyes_in(grey, face), float(weight)))
        return found

    def _eyes_in(self, grey: np.ndarray, box: Box) -> Eyes | None:
        """One eye in each half of the face; None where one of them is not found, or where they cannot both be right."""
        cv2, (left, top, width, height) = self._cv2, box
        size, high, below = 96, 48, 0.15  # the part that is searched, made 96 pixels wide
        scale = width / size
        begin = np.array([left, top + below * height])
        x, y = np.maximum(np.round(begin).astype(int), 0)
        part = grey[y : round(begin[1] + high * scale), x : round(left + width)]
        if min(part.shape) < 8:
            return None
        shrinks = scale > 1
        part = cv2.resize(part, (size, high), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        eyes = []
        for shift in (0, size // 2):
            half = part[:, shift : shift + size // 2]
            boxes, _, weights = self._eyes.detectMultiScale3(
                half, 1.1, 2, 0, (20, 20), (40, 40), outputRejectLevels=True
            )
            if not len(boxes):
                return None
            ex, ey, w, h = boxes[int(np.argmax(weights))]
            eyes.append((float(x + (shift + ex + w / 2) * scale), float(y + (ey + h / 2) * scale)))
        (x0, y0), (x1, y1) = eyes
        apart, slope = (x1 - x0) / width, abs(y1 - y0) / max(x1 - x0, 1e-9)
        return (eyes[0], eyes[1]) if 0.22 < apart < 0.6 and slope < 0.6 else None


class YuNetDetector:
    """OpenCV's FaceDetectorYN with a YuNet model, which also says where the eyes are. The score is 0..1."""

    def __init__(self, path: str | Path) -> None:
        self._cv2 = cv2 = require("cv2", "video")
        if not Path(path).is_file():
            raise ValueError(f"yunet: expected the ONNX file of a YuNet model, got {str(path)!r}, which is no file")
        try:
            self._net = cv2.FaceDetectorYN.create(str(path), "", (320, 320), score_threshold=0.6)
            self._net.detect(np.zeros((320, 320, 3), np.uint8))  # another network fails here
        except cv2.error as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"yunet: expected the ONNX file of a YuNet model, got {str(path)!r}: {why}") from None

    def __call__(self, picture: np.ndarray) -> list[Found]:
        small, scale = _scaled(self._cv2, self._cv2.cvtColor(picture, self._cv2.COLOR_RGB2BGR))
        self._net.setInputSize((small.shape[1], small.shape[0]))
        _, rows = self._net.detect(small)
        found = []
        for row in () if rows is None else rows:
            left, top, width, height, x0, y0, x1, y1 = (float(x) / scale for x in row[:8])
            if width > 0 and height > 0:
                first, second = sorted([(x0, y0), (x1, y1)])
                found.append(Found((left, top, width, height), (first, second), float(row[14])))
        return found


def _scaled(cv2: Any, picture: np.ndarray) -> tuple[np.ndarray, float]:
    """The picture with a shorter side of 240 pixels, at most doubled, and by how much it was scaled."""
    height, width = picture.shape[:2]
    scale = min(_SHORT_SIDE / min(height, width), 2.0)
    while min(picture.shape[:2]) >= 2 * _SHORT_SIDE:  # in halves: ten times as fast as at once
        down, across = picture.shape[0] // 2, picture.shape[1] // 2
        picture = cv2.resize(picture[: 2 * down, : 2 * across], (across, down), interpolation=cv2.INTER_AREA)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR), scale


# ---------------------------------------------------------------------------------------------------------------- tracks
class _Levels:
    """The grey picture at the size faces are looked for in, and its halves, made as they are asked for."""

    def __init__(self, cv2: Any, picture: np.ndarray) -> None:
        self._cv2 = cv2
        small, self.scale = _scaled(cv2, cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
        self._all = [small]

    def __getitem__(self, level: int) -> np.ndarray:
        while len(self._all) <= level:
            self._all.append(self._cv2.pyrDown(self._all[-1]))
        return self._all[level]

    def around(self, level: int, point: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """`size` pixels of a level around a point of the whole picture, between pixels too; beyond the border its last ones."""
        x, y = (point + 0.5) * self.scale / 2**level - 0.5
        return self._cv2.getRectSubPix(self[level], size, (float(x), float(y)))


class _Track:
    """One face: a point that a patch of the picture follows, and where box and eyes are relative to it."""

    def __init__(self, cv2: Any, found: Found, levels: _Levels, time: float, known: bool) -> None:
        self._cv2 = cv2
        self.born, self.hits = time, 0
        self.known = known  # not just a first sighting beside others
        self.place(found, levels, time)

    @property
    def box(self) -> np.ndarray:
        """Left, top, width, height."""
        return np.concatenate([self.point + self.offset[:2], self.offset[2:]])

    @property
    def eyes(self) -> np.ndarray | None:
        return None if self.eye_offset is None else self.point + self.eye_offset

    def face(self, time: float) -> Face:
        left, top, width, height = map(float, self.box)
        eyes = None if self.eyes is None else self.eyes.tolist()
        both = None if eyes is None else (tuple(eyes[0]), tuple(eyes[1]))
        return Face((left, top, width, height), both, self.score, time - self.born, time - self.confirmed)

    def place(self, found: Found, levels: _Levels, time: float) -> None:
        """Be where the detector says, whatever was known before."""
        box = np.array(found.box)
        self.point = box[:2] + box[2:] / 2
        self.offset = self.offset_goal = np.concatenate([box[:2] - self.point, box[2:]])
        self.eye_offset = self.eye_goal = None if found.eyes is None else np.array(found.eyes) - self.point
        self._said(found, levels, time)

    def confirm(self, found: Found, levels: _Levels, time: float) -> None:
        """Take the detector's word on a face that was followed to this picture: a goal that box and eyes go towards."""
        if not self.located or _overlap(self.box, np.array(found.box)) < 0.5:
            self.place(found, levels, time)
            return
        box = np.array(found.box)
        shift = box[:2] + box[2:] / 2 - self.point  # the patch is taken anew, where the face is now
        self.point = self.point + shift
        by = np.concatenate([shift, [0.0, 0.0]])
        self.offset = self.offset - by
        measured = np.concatenate([box[:2] - self.point, box[2:]])
        self.offset_goal = _between(self.offset_goal - by, measured, box[2])
        if self.eye_offset is not None and self.eye_goal is not None:
            self.eye_offset, self.eye_goal = self.eye_offset - shift, self.eye_goal - shift
        if found.eyes is not None:
            eyes = np.array(found.eyes) - self.point
            if self.eye_offset is None or self.eye_goal is None:
                self.eye_offset = self.eye_goal = eyes
            else:
                self.eye_goal = _between(self.eye_goal, eyes, box[2])
        self._said(found, levels, time)

    def _said(self, found: Found, levels: _Levels, time: float) -> None:
        self.score, self.confirmed, self.seen, self.now = found.score, time, time, time
        self.located = True
        self.hits += 1
        if found.eyes is not None:
            self.eyes_seen = time
        self._take(levels)

    def _take(self, levels: _Levels) -> None:
        """Remember the inner part of the face as it looks now, 26 to 51 pixels wide where the picture has as many."""
        width, height = self.offset[2:] * levels.scale
        self.level = max(int(math.log2(max(min(width, height), 1.0) / 32)), 0)
        across, down = (max(round(0.8 * float(x) / 2**self.level), 6) for x in (width, height))
        self.margin = max(round(0.3 * max(across, down)), 3)
        self.patch = levels.around(self.level, self.point, (across, down))

    def follow(self, levels: _Levels, time: float) -> None:
        """Go where the patch fits best near the last place; stay, as not located, where it fits nowhere."""
        cv2, margin = self._cv2, self.margin
        size = (self.patch.shape[1] + 2 * margin, self.patch.shape[0] + 2 * margin)
        window = levels.around(self.level, self.point, size)
        fit = np.nan_to_num(cv2.matchTemplate(window, self.patch, cv2.TM_CCOEFF_NORMED), posinf=0.0, neginf=0.0)
        _, best, _, (x, y) = cv2.minMaxLoc(fit)
        step = np.array([x + _peak(fit[y], x), y + _peak(fit[:, x], y)]) - margin
        point = self.point + step * 2**self.level / levels.scale
        high, wide = levels[0].shape
        inside = bool((point >= 0).all()) and point[0] * levels.scale < wide and point[1] * levels.scale < high
        self.located = best >= _FOLLOWED and inside
        if self.located:
            self.point, self.seen = point, time
            if best < _LIKE_BEFORE:
                self._take(levels)
        nearer = 1 - math.exp(-(time - self.now) / _SMOOTHING)
        self.now = time
        self.offset = self.offset + nearer * (self.offset_goal - self.offset)
        if self.eye_offset is not None and self.eye_goal is not None:
            self.eye_offset = self.eye_offset + nearer * (self.eye_goal - self.eye_offset)
            if time - self.eyes_seen > _PATIENCE:
                self.eye_offset = self.eye_goal = None

    def is_over(self, time: float) -> bool:
        patience = _PATIENCE if self.hits > 1 else _PATIENCE_ONCE
        return time - self.seen > _LOST_AFTER or time - self.confirmed > patience


def _between(goal: np.ndarray, measured: np.ndarray, width: float) -> np.ndarray:
    """Half way from the goal that was to what is measured; all the way where that is too far for chance."""
    return measured if np.abs(measured - goal).max() > 0.12 * width else (goal + measured) / 2


def _peak(row: np.ndarray, i: int) -> float:
    """Where between its neighbours the maximum at i lies: that of the parabola through the three, -0.5 .. 0.5."""
    if not 0 < i < len(row) - 1:
        return 0.0
    before, at, after = map(float, row[i - 1 : i + 2])
    bend = before - 2 * at + after
    return 0.0 if bend >= 0 else min(max((before - after) / (2 * bend), -0.5), 0.5)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    across, down = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    common = max(float(across), 0.0) * max(float(down), 0.0)
    return common / (float(a[2] * a[3] + b[2] * b[3]) - common)


def _middle(track: _Track) -> float:
    return float(track.box[0] + track.box[2] / 2)


class OpenCVTracker(FaceTracker):
    """Finds faces about three times a second and follows them in between; shows that of one person.

    person     whom to show where several are seen: "largest", who stays until somebody else has been a quarter larger for a
               second; "left" or "right", who is the outermost there; or a number from 1, counted from the left
    yunet      a YuNet model for cv2.FaceDetectorYN; without one OpenCV's Haar cascades are the detector
    detector   another detector instead: picture (H, W, 3) uint8 RGB -> the faces in it
    """

    def __init__(
        self, person: str | int = "largest", yunet: str | Path | None = None, detector: Detector | None = None
    ) -> None:
        self._cv2 = require("cv2", "video")
        number = int(person) if isinstance(person, str) and person.isascii() and person.isdecimal() else person
        if not (number in ("largest", "left", "right") or (type(number) is int and number >= 1)):
            raise ValueError(f"person: expected largest, left, right or a number from 1, got {person!r}")
        if yunet is not None and detector is not None:
            raise ValueError(f"yunet: expected None where a detector is given, got {str(yunet)!r}")
        self._person = number
        self._detect = detector or (HaarDetector() if yunet is None else YuNetDetector(yunet))
        self._tracks: list[_Track] = []  # from left to right
        self._shown: _Track | None = None
        self._rival: _Track | None = None  # who is larger than the one that is shown, and since when
        self._rival_since = 0.0
        self._size: tuple[int, ...] = ()
        self._detected = self._time = -math.inf

    def track(self, picture: np.ndarray, time: float) -> Face | None:
        check_picture("picture", picture)
        if not (math.isfinite(time) and time > self._time):
            raise ValueError(f"time: expected a time after that of the last picture, {self._time:g}, got {time}")
        if picture.shape != self._size:
            self._tracks, self._shown, self._rival = [], None, None
            self._size, self._detected = picture.shape, -math.inf
        self._time = time
        levels = _Levels(self._cv2, picture)
        for track in self._tracks:
            track.follow(levels, time)
        wait = _EVERY if self._tracks else _EVERY_WITHOUT
        if time - self._detected > wait - 1e-3 or not all(track.located for track in self._tracks):
            self._detected = time
            self._match(self._detect(picture), levels, time)
        self._tracks = [track for track in self._tracks if not track.is_over(time)]
        self._drop_doubles()
        self._order()
        self._shown = self._largest(time) if self._person == "largest" else self._in_place()
        return None if self._shown is None else self._shown.face(time)

    def _match(self, found: Sequence[Found], levels: _Levels, time: float) -> None:
        """Give each track the detection that overlaps it most; a lost one a near one of its size; the rest are new."""
        boxes = [np.array(one.box) for one in found]
        pairs = []
        for t, track in enumerate(self._tracks):
            for f, box in enumerate(boxes):
                near = _overlap(track.box, box)
                if near < 0.3:
                    away = np.abs(track.box[:2] + track.box[2:] / 2 - box[:2] - box[2:] / 2) / track.box[2:]
                    like = max(track.box[2] / box[2], box[2] / track.box[2]) < 1.5
                    near = -float(away.max()) if not track.located and like and away.max() < 1.5 else -math.inf
                if near > -math.inf:
                    pairs.append((-near, t, f))
        tracks, taken = set[int](), set[int]()
        for _, t, f in sorted(pairs):
            if t not in tracks and f not in taken:
                tracks.add(t)
                taken.add(f)
                self._tracks[t].confirm(found[f], levels, time)
        first = not self._tracks
        for f in sorted(range(len(found)), key=lambda f: -boxes[f][3]):
            box = boxes[f]
            overlapping = any(_overlap(track.box, box) > 0.3 for track in self._tracks)
            if f not in taken and not overlapping and len(self._tracks) < _MOST_TRACKS:
                self._tracks.append(_Track(self._cv2, found[f], levels, time, known=first))

    def _drop_doubles(self) -> None:
        """Of two tracks that came to the same face, the one that was confirmed more often stays."""
        kept: list[_Track] = []
        for track in sorted(self._tracks, key=lambda track: (-track.hits, track.born)):
            double = next((other for other in kept if _overlap(track.box, other.box) > 0.5), None)
            if double is None:
                kept.append(track)
            elif track is self._shown:
                self._shown = double
        self._tracks = [track for track in self._tracks if track in kept]

    def _order(self) -> None:
        """From left to right; two swap places only when they clearly have."""
        ordered: list[_Track] = []
        for track in self._tracks:
            place = len(ordered)
            new = track.hits == 1 and track.born == self._time
            while place:
                margin = 0.0 if new else 0.25 * min(track.box[2], ordered[place - 1].box[2])
                if _middle(track) >= _middle(ordered[place - 1]) - margin:
                    break
                place -= 1
            ordered.insert(place, track)
        self._tracks = ordered

    def _candidates(self) -> list[_Track]:
        return [track for track in self._tracks if track.known or track.hits > 1]

    def _in_place(self) -> _Track | None:
        people = self._candidates()
        index = {"left": 0, "right": len(people) - 1}.get(str(self._person))
        if index is None:
            index = int(self._person) - 1
        return people[index] if 0 <= index < len(people) else None

    def _largest(self, time: float) -> _Track | None:
        """The one that was shown, unless somebody has been larger for a while; at first the largest and longest-lived."""
        people = self._candidates()
        if self._shown not in people:
            self._rival = None
            return max(people, key=lambda track: track.box[3] * (1 + min(time - track.born, 2.0)), default=None)
        shown = self._shown
        rival = max((track for track in people if track is not shown), key=lambda track: track.box[3], default=None)
        if rival is None or shown is None or rival.box[3] < _LARGER * shown.box[3]:
            self._rival = None
            return shown
        if rival is not self._rival:
            self._rival, self._rival_since = rival, time
        if time - self._rival_since < _LARGER_FOR:
            return shown
        self._rival = None
        return rival


class ToldTracker(FaceTracker):
    """Boxes from a table with the columns time, left, top, width and height (CSV, TSV or Parquet; others are ignored).

    A picture has the box of the row that is nearest in time, at most half the usual step between rows away; a row whose
    cells are empty says that there is no face. The age counts from the first of the rows without a gap.
    """

    def __init__(self, path: str | Path) -> None:
        source = open_table(Path(path))
        names = ("time", "left", "top", "width", "height")
        missing = [name for name in names if name not in source.names]
        if missing:
            have = ", ".join(source.names[:12])
            raise ValueError(f"{path}: expected the columns {', '.join(names)}, got {have}: no {', '.join(missing)}")
        columns = [Numbers(source, source.names.index(name), "d", strict=True) for name in names]
        lines: list[int] = []
        for chunk in source.chunks():
            lines += chunk.lines
            for column in columns:
                column.add(chunk)
        self._times = columns[0].values
        self._boxes = np.stack([column.values for column in columns[1:]], axis=1)
        steps = np.diff(self._times)
        unknown = np.isnan(self._boxes)
        for wrong, what in (
            (np.isnan(self._times), "a time"),
            (np.concatenate([[False], steps <= 0]), "a time after that of the row before"),
            (unknown.any(axis=1) & ~unknown.all(axis=1), "left, top, width and height, or none of them"),
            ((self._boxes[:, 2:] <= 0).any(axis=1), "a width and a height above 0"),
        ):
            if wrong.any():
                row = int(np.argmax(wrong))
                came = ", ".join(f"{x:g}" for x in (self._times[row], *self._boxes[row]))
                raise ValueError(f"{source.where(lines[row])}: expected {what}, got {came}")
        if not len(self._times):
            raise ValueError(f"{path}: expected rows below the header, got none")
        step = float(np.median(steps)) if len(steps) else math.inf
        self._reach = step / 2 * (1 + 1e-6)
        known = ~unknown.any(axis=1)
        begins = known & ~np.concatenate([[False], known[:-1] & (steps <= 1.5 * step)])
        self._begins = np.maximum.accumulate(np.where(begins, np.arange(len(known)), 0))

    def track(self, picture: np.ndarray, time: float) -> Face | None:
        after = int(np.searchsorted(self._times, time))
        near = [row for row in (after - 1, after) if 0 <= row < len(self._times)]
        row = min(near, key=lambda row: abs(self._times[row] - time))
        if abs(self._times[row] - time) > self._reach or np.isnan(self._boxes[row, 0]):
            return None
        left, top, width, height = map(float, self._boxes[row])
        age = max(time - float(self._times[self._begins[row]]), 0.0)
        return Face((left, top, width, height), None, math.nan, age, 0.0)


# ------------------------------------------------------------------------------------------------------------- the crop
def check_picture(name: str, picture: object) -> None:
    """ValueError unless it is (H, W, 3) uint8."""
    what = type(picture).__name__
    if isinstance(picture, np.ndarray):
        if picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size:
            return
        what = f"{picture.dtype} of shape {picture.shape}"
    raise ValueError(f"{name}: expected RGB, uint8 of shape (height, width, 3), got {what}")


def aligned(picture: np.ndarray, face: Face, size: int = 112) -> np.ndarray:
    """The face upright, (size, size, 3) uint8 RGB: turned, scaled and moved so that the eyes are at `EYES` of it.

    Where they are unknown, as if the square around the box had them where a frontal face has. What lies beyond the picture
    repeats its border.
    """
    cv2 = require("cv2", "video")
    check_picture("picture", picture)
    if face.eyes is not None:
        (x0, y0), (x1, y1) = face.eyes
    else:
        left, top, width, height = face.box
        side = max(width, height)
        left, top = left + (width - side) / 2, top + (height - side) / 2
        (x0, y0), (x1, y1) = ((left + side * x, top + side * y) for x, y in _BOX_EYES)
    if not math.hypot(x1 - x0, y1 - y0) > 0:
        raise ValueError(f"face: expected eyes apart, or a box with a size, got {face}")
    (u0, v0), (u1, v1) = EYES
    # as complex numbers a turn with a scale is one factor: crop = factor * picture + move
    factor = complex(u1 - u0, v1 - v0) * size / complex(x1 - x0, y1 - y0)
    move = complex(u0, v0) * size - factor * complex(x0, y0)
    high, wide = picture.shape[:2]
    shrink = max(min(int(1 / abs(factor)), high, wide), 1)
    x = y = 0
    if shrink > 1:  # averaged first: taking single pixels of many would alias
        corners = [(complex(u, v) - move) / factor for u in (0, size) for v in (0, size)]
        across, down = [one.real for one in corners], [one.imag for one in corners]
        x, right = _span(min(across), max(across), wide, shrink)
        y, bottom = _span(min(down), max(down), high, shrink)
        new = ((right - x) // shrink, (bottom - y) // shrink)
        picture = cv2.resize(picture[y:bottom, x:right], new, interpolation=cv2.INTER_AREA)
    # from pixels of the crop to those of `picture`, as WARP_INVERSE_MAP takes it; the middle of pixel 0 is at 0.5
    back = 1 / factor / shrink
    origin = back * (complex(0.5, 0.5) - move) - complex(x, y) / shrink - complex(0.5, 0.5)
    matrix = np.array([[back.real, -back.imag, origin.real], [back.imag, back.real, origin.imag]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _span(low: float, high: float, end: int, step: int) -> tuple[int, int]:
    """Pixels from `low` to `high` and some more, within 0 .. `end`: a multiple of `step`, at least one."""
    first = min(max(math.floor(low) - 2 * step, 0), end - step)
    last = min(max(math.ceil(high) + 2 * step, first + step), end)
    return first, last - (last - first) % step
