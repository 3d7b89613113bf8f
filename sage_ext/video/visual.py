"""What is measured of a face, row by row: its features, and how far the picture of it can be relied on."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..extras import require
from .faces import Face, check_picture
from .plugins import Network, function_of, names_a_function

SIZE = 112  # pixels of an aligned crop, across and down
QUALITY = ("score", "size", "sharpness", "brightness", "contrast", "symmetry", "age", "blur")

# Rows and columns of an aligned crop, whose eyes are at height 52 and 35 pixels apart.
_BROWS = (slice(28, 46), slice(24, 88))
_MOUTH = (slice(80, 108), slice(36, 76))
_CELLS, _BINS = 8, 9  # of the histograms of gradients: cells across and down, directions from 0 to 180 degrees
_FASTEST = 5.0  # widths, heights or e-folds a second
_BLOCKS = 4  # of the motion, across and down
_MOTION = tuple(f"motion_{y}_{x}" for y in range(_BLOCKS) for x in range(_BLOCKS))
_GEOMETRY = ("velocity_x", "velocity_y", "growth", "tilt", "mouth_darkness", "mouth_edges", "brow_edges")


class Appearance(Protocol):
    """What describes a single crop by as many numbers as it has columns, at least one."""

    columns: tuple[str, ...]

    def __call__(self, crop: np.ndarray) -> np.ndarray:
        """(D,) of an RGB crop, uint8 (112, 112, 3); NaN where it finds nothing to describe."""


class VisualFeatures:
    """The rows of one video, each from an aligned crop and the face it was cut from.

    The columns are those of `appearance`, then motion and geometry, all of which are 0 where there is no row before to compare
    with (the first one, the first of another face, the first after a row without a crop):

        motion_Y_X                mean absolute difference to the row before, 0..1, of block (Y, X) of 4 x 4
        velocity_x, velocity_y    of the middle of the face, in its widths a second and its heights a second
        growth                    change of the natural logarithm of the face's size, a second; all three at most 5 either way,
                                  which heads stay below and cuts do not
        tilt                      angle of the line through the eyes in radians, above 0 if the right one is lower; 0 if unknown
        mouth_darkness            1 - (10 % quantile of the mouth's brightness / mean of the crop's): open mouths are dark inside
        mouth_edges, brow_edges   mean steepness of the brightness, 0..1 a pixel, from top to bottom, of mouth and brows

    Quality, NaN where unknown:

        score          of the face's last detection
        size           binary logarithm of the face's height in pixels
        sharpness      decimal logarithm of the variance of the Laplacian of the crop, whose brightness is 0..255
        brightness     mean of the crop, 0..1
        contrast       standard deviation of the crop, 0..1
        symmetry       correlation of the left half with the mirrored right one, without what is coarse (light from one side)
                       and what is fine: falls as the face turns
        age            decimal logarithm of 0.1 + the seconds since the face's track began
        blur           how fast the middle of the face moves, in face widths a second
    """

    def __init__(self, appearance: Appearance) -> None:
        self._cv2 = require("cv2", "video")
        self._appearance = appearance
        self.columns: tuple[str, ...] = (*appearance.columns, *_MOTION, *_GEOMETRY)
        self.quality: tuple[str, ...] = QUALITY
        self.mouth = math.nan  # mean absolute difference of the mouth to the row before, 0..1, NaN unknown
        self._grey: np.ndarray | None = None  # of the row before
        self._face: Face | None = None
        self._time = -math.inf

    def row(self, crop: np.ndarray | None, face: Face | None, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Features (D,) and quality (Q,), float32, of the face at `time` seconds, which rises.

        Without a crop, or where the appearance has NaN, all features are NaN. `face` may be unknown beside a crop.
        """
        if not (math.isfinite(time) and time > self._time):
            raise ValueError(f"time: expected a time after that of the last row, {self._time:g}, got {time}")
        elapsed, self._time = time - self._time, time
        before, self._face = self._face, face
        grey_before, self._grey = self._grey, None
        self.mouth = math.nan
        quality = dict.fromkeys(QUALITY, math.nan)
        same = face is None or before is None or face.age >= 0.99 * elapsed  # not a track that began since
        velocity = None
        if face is not None:
            quality |= {
                "score": face.score,
                "size": math.log2(max(face.box[3], 1e-3)),
                "age": math.log10(0.1 + face.age),
            }
            if before is not None and same:
                velocity = _velocity(before, face, elapsed)
                quality["blur"] = math.hypot(velocity[0], velocity[1] * face.box[3] / face.box[2])
        if crop is None:
            return np.full(len(self.columns), np.nan, np.float32), _floats(quality.values())

        check_picture("crop", crop)
        if crop.shape != (SIZE, SIZE, 3):
            raise ValueError(f"crop: expected shape {(SIZE, SIZE, 3)}, got {crop.shape}")
        cv2 = self._cv2
        grey = self._grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
        motion = np.zeros((_BLOCKS, _BLOCKS))
        if grey_before is not None and same:
            moved = cv2.absdiff(grey, grey_before)
            motion = moved.reshape(_BLOCKS, SIZE // _BLOCKS, _BLOCKS, -1).mean(axis=(1, 3)) / 255
            self.mouth = float(moved[_MOUTH].mean()) / 255
        mean, deviation = (float(x[0, 0]) for x in cv2.meanStdDev(grey))
        laplacian = float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0]) ** 2
        quality |= {
            "sharpness": math.log10(max(laplacian, 1e-2)),
            "brightness": mean / 255,
            "contrast": deviation / 255,
            "symmetry": self._symmetry(grey),
        }
        steep = np.abs(cv2.Sobel(grey, cv2.CV_16S, 0, 1)) / (8 * 255)
        geometry = (
            *(velocity or (0.0, 0.0, 0.0)),
            _tilt(face),
            1 - float(np.quantile(grey[_MOUTH], 0.1)) / max(mean, 1.0),
            float(steep[_MOUTH].mean()),
            float(steep[_BROWS].mean()),
        )
        features = np.concatenate([self._described(crop), motion.ravel(), geometry]).astype(np.float32)
        if np.isnan(features).any():
            features[:] = np.nan
        return features, _floats(quality.values())

    def _described(self, crop: np.ndarray) -> np.ndarray:
        found = np.asarray(self._appearance(crop))
        expected = (len(self._appearance.columns),)
        if found.shape != expected:
            raise ValueError(f"spec: expected features of shape {expected} of each crop, got {found.shape}")
        return found

    def _symmetry(self, grey: np.ndarray) -> float:
        cv2 = self._cv2
        small = cv2.resize(grey, (SIZE // 2, SIZE // 2), interpolation=cv2.INTER_AREA).astype(np.float32)
        band = cv2.GaussianBlur(small, (0, 0), 1.0) - cv2.GaussianBlur(small, (0, 0), 7.0)
        left, right = band[:, : SIZE // 4], band[:, : SIZE // 4 - 1 : -1]
        left, right = left - left.mean(), right - right.mean()
        power = math.sqrt(float((left * left).sum()) * float((right * right).sum()))
        return float((left * right).sum()) / power if power > 1.0 else math.nan


def _velocity(before: Face, face: Face, elapsed: float) -> tuple[float, float, float]:
    """Of the middle in widths and heights a second, and of the logarithm of the size a second."""
    (x0, y0, w0, h0), (x1, y1, w1, h1) = before.box, face.box
    across, down = x1 + w1 / 2 - x0 - w0 / 2, y1 + h1 / 2 - y0 - h0 / 2
    changes = across / w1, down / h1, math.log(w1 * h1 / (w0 * h0)) / 2
    first, second, third = (min(max(change / elapsed, -_FASTEST), _FASTEST) for change in changes)
    return first, second, third


def _tilt(face: Face | None) -> float:
    if face is None or face.eyes is None:
        return 0.0
    (x0, y0), (x1, y1) = face.eyes
    return math.atan2(y1 - y0, x1 - x0)


def _floats(values: Any) -> np.ndarray:
    return np.array(list(values), np.float32)


# ----------------------------------------------------------------------------------------------------------- appearances
class Hog:
    """Histograms of gradients of the grey crop: 8 x 8 cells of 14 pixels, 9 directions each, normalised by blocks of 2 x 2.

    hog_Y_X_B: cell (Y, X), directions from 20 B to 20 (B + 1) degrees of the gradient.
    """

    def __init__(self) -> None:
        self._cv2 = cv2 = require("cv2", "video")
        cell = SIZE // _CELLS
        block = (2 * cell, 2 * cell)
        self._hog = cv2.HOGDescriptor((SIZE, SIZE), block, block, (cell, cell), _BINS)
        self.columns = tuple(f"hog_{y}_{x}_{b}" for y in range(_CELLS) for x in range(_CELLS) for b in range(_BINS))

    def __call__(self, crop: np.ndarray) -> np.ndarray:
        found = self._hog.compute(self._cv2.cvtColor(crop, self._cv2.COLOR_RGB2GRAY))
        # OpenCV goes through the blocks, and through the cells of each, column by column
        half = _CELLS // 2
        return found.reshape(half, half, 2, 2, _BINS).transpose(1, 3, 0, 2, 4).reshape(-1)


class Onnx:
    """A network as an ONNX file, by onnxruntime on one core.

    It takes (1, 3, H, W) float32, RGB in 0..1; where it leaves H or W open, 112. Its first output, flattened, is the features.
    """

    def __init__(self, path: str | Path) -> None:
        self._cv2 = require("cv2", "video")
        self._network = Network(
            path,
            "(1, 3, H, W)",
            lambda sizes: len(sizes) == 4 and sizes[0] in (None, 1) and sizes[1] in (None, 3),
        )
        self._size = (self._network.sizes[3] or SIZE, self._network.sizes[2] or SIZE)
        self.columns = _numbered("onnx", self(_grey_crop()), "spec")

    def __call__(self, crop: np.ndarray) -> np.ndarray:
        if self._size != (SIZE, SIZE):
            shrinks = self._size[0] < SIZE
            crop = self._cv2.resize(
                crop, self._size, interpolation=self._cv2.INTER_AREA if shrinks else self._cv2.INTER_LINEAR
            )
        return self._network(np.ascontiguousarray(crop.transpose(2, 0, 1)[None], np.float32) / 255)


class Function:
    """A function of a module that can be imported: crop (112, 112, 3) uint8 RGB -> (D,) numbers.

    Its attribute `columns`, where it has one, names them.
    """

    def __init__(self, spec: str) -> None:
        function = function_of(spec)
        self._function: Callable[[np.ndarray], Any] = function
        self._spec = spec
        first = self(_grey_crop())
        named = getattr(function, "columns", None)
        if named is None:
            self.columns = _numbered(spec.partition(":")[2], first, spec)
        else:
            self.columns = tuple(map(str, named))
            if len(self.columns) != len(first):
                raise ValueError(f"{spec}.columns: expected {len(first)} names, as many as features, got {len(named)}")

    def __call__(self, crop: np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(self._function(crop), np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self._spec}: expected numbers, (D,), of a crop, got {type(error).__name__}: {error}"
            ) from error
        if found.ndim != 1:
            raise ValueError(f"{self._spec}: expected numbers of shape (D,), got shape {found.shape}")
        return found


class Mediapipe:
    """The landmarks of MediaPipe's FaceMesh, x and y in 0..1 of the crop and z on the scale of x; NaN where it sees no face."""

    LANDMARKS = 478  # with those of the irises

    def __init__(self) -> None:
        try:
            mesh = importlib.import_module("mediapipe").solutions.face_mesh
        except ImportError as error:
            raise ImportError("mediapipe is not installed; it comes with: pip install mediapipe") from error
        except AttributeError as error:
            raise ImportError(
                "mediapipe: expected a version with solutions.face_mesh, as 0.10.21 has, got one without"
            ) from error
        self._mesh = mesh.FaceMesh(static_image_mode=True, max_num_faces=1, refine_landmarks=True)
        self.columns = tuple(f"landmark_{i}_{axis}" for i in range(self.LANDMARKS) for axis in "xyz")

    def __call__(self, crop: np.ndarray) -> np.ndarray:
        faces = self._mesh.process(np.ascontiguousarray(crop)).multi_face_landmarks
        if not faces:
            return np.full(len(self.columns), np.nan, np.float32)
        return np.array([[one.x, one.y, one.z] for one in faces[0].landmark], np.float32).reshape(-1)


def _grey_crop() -> np.ndarray:
    return np.full((SIZE, SIZE, 3), 128, np.uint8)


def _numbered(name: str, features: np.ndarray, argument: str) -> tuple[str, ...]:
    if not len(features):
        raise ValueError(f"{argument}: expected at least one feature of a crop, got none")
    return tuple(f"{name}_{i}" for i in range(len(features)))


def make_visual(spec: str = "hog") -> VisualFeatures:
    """The features of a face in a video that has yet to begin.

    "hog" needs no weights; "onnx:FILE" is a network; "module:function" a function of yours that takes a crop, uint8
    (112, 112, 3) RGB, and returns (D,) numbers; "mediapipe" the landmarks of FaceMesh. Motion and geometry follow in each.
    """
    kind, _, rest = spec.partition(":")
    if spec == "hog":
        return VisualFeatures(Hog())
    if spec == "mediapipe":
        return VisualFeatures(Mediapipe())
    if kind == "onnx" and rest:
        return VisualFeatures(Onnx(rest))
    if kind != "onnx" and names_a_function(kind, rest):
        return VisualFeatures(Function(spec))
    raise ValueError(f"spec: expected hog, onnx:FILE, module:function or mediapipe, got {spec!r}")
