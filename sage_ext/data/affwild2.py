"""Reader and submission writer for data in the Aff-Wild2 (ABAW challenge) layout, and for anybody's in the same folders.

    root/
      <N>th ABAW Annotations/VA_Estimation_Challenge/{Train_Set,Validation_Set}/<video>.txt  (older releases: VA_Set)
      annotations/{Train_Set,Validation_Set,Test_Set}/<video>.txt     the same of other data
      features/<modality>/<video>.npy         (rows, D) floating point: row i is frame i + 1, see `rate`
      features/<modality>/<video>.mask.npy    optional (rows,) bool: False where the row means nothing
      features/<modality>/<video>.quality.npy optional (rows, Q) floating point: what was measured of each row's signal, NaN
                                              where that is unknown
      features/<modality>/meta.json           optional, see below
      cropped_aligned/<video>/00001.jpg       optional: the face crops; a frame without a face has no file
      sample_submission.txt                   the organisers' sample file: where it is, it says what the test split is
      index.json                              optional: {"videos": {"<video>": {"frames": T}}}, as `sage-ext extract` writes
                                              it: videos that no annotation names are the test split, where nothing else
                                              says what it is
      fps.json                                optional: frames a second, one number for all videos, or {"<video>": number}
                                              with 30 where a video is not listed
      targets.json                            optional {"<target>": [low, high]}: the columns of the annotations that are
                                              estimated, in order, and the range of each
      groups.json                             optional {"<grouping>": {"<video>": "<group>"}}, or {"<video>": "<group>"},
                                              which is the grouping "group": what must not be torn apart by a split

An annotation has a header and a row a frame. `valence,arousal` without a targets.json is Aff-Wild2's: both in [-1, 1], -5
in a frame that is not annotated. Any other names any columns, each with its range behind it where that is not
[-1, 1], as in `stress[0:100],valence`; an empty cell or NaN says that the frame is not annotated. With a targets.json the
columns that it does not name are left, whatever they hold.

`meta.json` of a modality, every key optional:

    rate    rows per second. Without it a row is a video frame. With it the rows are averaged onto frames by time: row
            j (0-based) covers [j/rate, (j+1)/rate) s, frame i (1-based) covers [(i-1)/fps, i/fps) s, and a frame is
            the mean of the rows it overlaps, weighted by the overlap, absent rows left out.
    shared  true for a track that all persons of a video share (audio): where `<video>_left.npy` does not exist,
            `<video>.npy` is read. Without it the suffix is never stripped: `<video>.npy` may be another person.
    images  a folder below root (`"cropped_aligned"`): frames without `<folder>/<video>/<frame:05d>.jpg` have no such
            modality.
    columns names of the D features, in order. A run remembers them, and refuses features in another order.
    quality names of the Q columns of quality, in order. All files of a modality have these, or else as many as each other.
    about   anything. A run remembers what `sage-ext extract` wrote there, and nothing else reads it.

Row i of an annotation is frame i is row i of the features, whatever the lengths: nothing is ever shifted or cut out.
Features that end early leave the modality absent in the last frames; surplus rows are ignored; both are listed in
`mismatches`, with files that nothing reads and videos that lack something. Features are memory-mapped and resampled span by
span, so a data set may be larger than the memory.

Quality is evidence of how good a row's signal is, taken from the signal itself: a face detector's score, the loudness, a
blur. It has a row for each row of the features, on their clock; a frame has that of the row in its middle. NaN and infinity
say that it is unknown; without the file it is unknown in the whole video. It makes no row present or absent.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._arguments import MAX_MODALITIES
from ..files import one_line, parsing, replacing
from .rates import FPS
from .targets import (
    VALENCE_AROUSAL,
    Targets,
    described,
    header_columns,
    header_range,
    header_targets,
    make_targets,
    scaled,
)

SPLITS = {"train": ("Train_Set", "Training_Set"), "validation": ("Validation_Set",), "test": ("Test_Set",)}
ANNOTATION_HEADER = "valence,arousal"
SUBMISSION_HEADER = "image_location,valence,arousal"
INVALID = -5.0
SAMPLE = "sample_submission.txt"
INDEX = "index.json"
HINT = " (docs/data.md shows the folders; sage-ext import makes them of a table)"

_TASK_FOLDERS = ("VA_Estimation_Challenge", "VA_Set")
_META_KEYS = ("rate", "shared", "images", "columns", "quality", "about")
_COMPANIONS = (".mask", ".quality")  # of a video's features, before the .npy
_LOCATION = re.compile(r"(?P<video>[^,]+)/(?P<frame>[0-9]+)\.(?:jpg|png)")
_MOST_FRAMES = 10_000_000  # of a video that a sample file may name: 92 hours at 30 a second
_RATES = (1e-6, 1e6)  # rows, or frames, a second
_MOST_ROWS = 10_000  # of features, a frame
_ROWS = 4096  # of features that are looked at together
_BLOCK = 1 << 20  # overlaps of rows and frames that are weighed at once


# -------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Clip:
    """One annotated or test video of T frames. Arrays may be memory-mapped or computed when sliced.

    name        the annotation's stem: `video`, `video_left` or `video_right`; rows of a submission use it
    labels      (T, C) float32, each target on [-1, 1] (mapped there from its range, see `targets`), NaN in invalid rows;
                None for a test video
    valid       (T,) bool: the frame is annotated, with all targets
    features    modality -> (T_m, D_m) floating point, row t is frame t (0-based); T_m may be shorter or longer than
                T. Slice it (`features[m][a:b]`) rather than read it whole. Rows of absent frames hold anything, NaN
                included; a row that holds NaN or infinity is absent
    present     modality -> (T,) bool: the frame has that modality
    num_frames  T
    fps         frames a second
    targets     names and ranges of the C targets
    quality     modality -> (T_m, Q_m) floating point, for the modalities of which the data set has quality: row t is frame t,
                NaN where it is unknown. Slice it like `features`
    """

    name: str
    labels: np.ndarray | None
    valid: np.ndarray
    features: Mapping[str, Any]
    present: Mapping[str, np.ndarray]
    num_frames: int
    fps: float = FPS
    targets: Targets = VALENCE_AROUSAL
    quality: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {rows.shape[1]}" for name, rows in self.features.items())
        known = "no labels" if self.labels is None else f"{int(self.valid.sum())} annotated"
        return f"<Clip {self.name}: {self.num_frames} frames at {self.fps:g} a second, {known}; {sizes}>"


class _OnFrameClock:
    """Rows, `step` of them a frame, read for the span of frames that is sliced; (frames, columns) float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, rows: np.ndarray, step: float) -> None:
        self.rows, self.step = rows, step
        self.shape = (math.ceil(_snap(len(rows) / step)), rows.shape[1])  # frames that overlap a row at all

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, span: slice) -> np.ndarray:
        if not isinstance(span, slice) or span.step not in (None, 1):
            raise TypeError(f"span: expected a slice of step 1, got {span!r}")
        start, stop, _ = span.indices(len(self))
        return self._read(start, stop) if start < stop else np.zeros((0, self.shape[1]), np.float32)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Of frames start < stop."""
        raise NotImplementedError


class Resampled(_OnFrameClock):
    """Features of another rate on the frame clock, computed for the span that is sliced.

    `rows` is (N, D) at `rate` rows a second, `mask` (N,) bool or None says which rows count; rows that hold NaN or
    infinity do not. `resampled[a:b]` is (b - a, D) float32: frame t (0-based) is the mean of the rows that overlap [t/fps,
    (t+1)/fps) s, weighted by the overlap; NaN where none of them counts. A row of the result does not depend on the
    span.
    """

    def __init__(self, rows: np.ndarray, rate: float, fps: float = FPS, mask: np.ndarray | None = None):
        super().__init__(rows, rate / fps)
        self.mask = mask

    def _read(self, start: int, stop: int) -> np.ndarray:
        most = max(_BLOCK // (math.ceil(self.step) + 1), 1)
        parts = [self._span(a, min(a + most, stop)) for a in range(start, stop, most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _span(self, start: int, stop: int) -> np.ndarray:
        edges = _snap(np.arange(start, stop + 1) * self.step)  # frame borders, in rows
        low, high = edges[:-1, None], np.minimum(edges[1:, None], len(self.rows))
        row = np.floor(low).astype(np.int64) + np.arange(
            math.ceil(self.step) + 1
        )  # (n, K): all that a frame can overlap
        weight: np.ndarray = np.maximum(np.minimum(row + 1, high) - np.maximum(row, low), 0)
        row = np.minimum(row, len(self.rows) - 1)  # beyond the end the weight is 0
        first, last = int(row[0, 0]), int(row.max()) + 1
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32: infinite; a NaN that signals
            block = np.asarray(self.rows[first:last], dtype=np.float32)  # the only read of the file
        counts = finite_rows(block)
        if self.mask is not None:
            counts &= self.mask[first:last]
        weight = weight * counts[row - first]
        total = np.zeros((len(row), self.shape[1]))
        with np.errstate(invalid="ignore"):  # 0 times infinity, where it does not count
            for k in range(row.shape[1]):
                part = weight[:, k, None] * block[row[:, k] - first]
                np.add(total, part, out=total, where=weight[:, k, None] > 0)
        mass = weight.sum(axis=1, keepdims=True)
        return np.divide(total, mass, out=np.full_like(total, np.nan), where=mass > 0).astype(np.float32)


class Quality(_OnFrameClock):
    """Quality on the frame clock, read for the span that is sliced.

    `rows` is (N, Q), at `rate` rows a second or, without one, a row a frame. `quality[a:b]` is (b - a, Q) float32: frame t
    (0-based) has the row that covers its middle, (t + 1/2)/fps s, or the last one where that is beyond the end; NaN for what
    is no finite number. It has the frames that `Resampled` makes of as many rows.
    """

    def __init__(self, rows: np.ndarray, rate: float | None = None, fps: float = FPS):
        super().__init__(rows, 1.0 if rate is None else rate / fps)

    def _read(self, start: int, stop: int) -> np.ndarray:
        row = np.floor(_snap((np.arange(start, stop) + 0.5) * self.step)).astype(np.int64)
        row = np.minimum(row, len(self.rows) - 1)
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32: infinite; a NaN that signals
            found = np.array(self.rows[row], dtype=np.float32)
        found[~np.isfinite(found)] = np.nan
        return found


def finite_rows(rows: np.ndarray) -> np.ndarray:
    """(N,) bool of (N, D) floating point: all numbers of the row are finite, as float32."""
    if rows.dtype.itemsize > 4:
        with np.errstate(over="ignore", invalid="ignore"):  # infinite; a NaN that signals
            rows = rows.astype(np.float32)
    return np.isfinite(rows).all(axis=1)


def usable_rows(rows: np.ndarray, declared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (N, D) rows that the files declare present, (N,) bool: those that are usable, and those that hold infinity (and no
    NaN, which is how a file says that a row is missing)."""
    finite = finite_rows(rows)
    infinite = declared & ~finite
    infinite[infinite] = ~np.isnan(rows[infinite]).any(axis=1)  # few rows, where all is well none
    return declared & finite, infinite


def blocks(rows: Any, frames: int) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a clip's frames, some thousands at a time, each block with the frame that it begins with."""
    for start in range(0, min(frames, len(rows)), _ROWS):
        yield start, np.asarray(rows[start : min(start + _ROWS, frames)])


class Presence(Mapping[str, np.ndarray]):
    """modality -> (T,) bool. `declared` is what the files say (rows, mask, images); rows that hold NaN or infinity
    are absent too, which takes a pass over the features and is found out only for the modality that is asked for."""

    def __init__(self, declared: Mapping[str, np.ndarray], features: Mapping[str, Any]):
        self.declared, self._features, self._full = declared, features, dict[str, np.ndarray]()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._full:
            full = self.declared[name].copy()
            for start, block in blocks(self._features[name], len(full)):
                full[start : start + len(block)] &= finite_rows(block)
            self._full[name] = full
        return self._full[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.declared)

    def __len__(self) -> int:
        return len(self.declared)


# -------------------------------------------------------------------------------------------------------- annotations


def read_annotation(path: str | os.PathLike, targets: Targets | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads an annotation, a row a frame -> labels (T, C) float32 on [-1, 1], NaN in invalid rows, valid (T,) bool.

    targets: the columns to read, in this order, each with its range; others are left. Default: what the header says.
    A row is invalid where one of them is empty or NaN. In a file with the header `valence,arousal` it is invalid where
    either is -5, and without `targets` every cell has to be a number there, as in Aff-Wild2.

    Raises ValueError naming file and line for a wrong header, a wrong number of columns, a blank line between rows,
    something that is not a number, or a value outside its range.
    """
    return _read_annotation(Path(path), targets)[:2]


def _read_annotation(path: Path, targets: Targets | None) -> tuple[np.ndarray, np.ndarray, Targets]:
    lines = _read_text(path).split("\n")
    header = lines[0].strip()
    names = [name for name, _ in header_columns(header)]
    affwild2 = header == ANNOTATION_HEADER
    strict = affwild2 and targets is None
    if targets is None:
        targets = header_targets(header, f"{path}:1: expected a header of targets, as in {ANNOTATION_HEADER!r}, got")
    else:
        _check_header(path, header, targets)
    places = [names.index(target.name) for target in targets]
    while lines and not lines[-1].strip():
        lines.pop()
    rows = lines[1:]
    if not rows:
        raise ValueError(f"{path}:2: expected rows of {header!r:.60}, got the end of the file")
    values = _numbers(path, rows, names, places, strict)
    low, high = np.array([(target.low, target.high) for target in targets]).T
    inside = (values >= low) & (values <= high)
    unknown = np.zeros(values.shape, bool) if strict else np.isnan(values)
    if affwild2:
        unknown |= (values == INVALID) & ~inside
    outside = ~(unknown | inside)
    if outside.any():
        row, c = np.argwhere(outside)[0].tolist()
        cell = rows[row].split(",")[places[c]].strip()
        nothing = "-5 (invalid)" if affwild2 else "nothing (not annotated)"
        raise ValueError(
            f"{path}:{row + 2}: {targets[c].name}: expected a value in [{low[c]:g}, {high[c]:g}] or {nothing}, got {cell[:60]}"
        )
    valid = np.asarray(~unknown.any(axis=1))
    labels = scaled(values, targets).astype(np.float32)
    labels[~valid] = np.nan
    return labels, valid, targets


def _check_header(path: Path, header: str, targets: Targets) -> None:
    """That it has these columns, and says no other range of them."""
    said = header_columns(header)
    ranges = dict(said)
    missing = [target.name for target in targets if target.name not in ranges]
    if missing:
        raise ValueError(f"{path}:1: expected the columns {', '.join(missing)}, got the header {_short(header)}")
    for target in targets:
        if [name for name, _ in said].count(target.name) > 1:
            raise ValueError(f"{path}:1: expected one column {target.name}, got the header {_short(header)}")
        if ranges[target.name] is not None and header_range(ranges[target.name]) != (target.low, target.high):
            wanted = f"the range [{target.low:g}, {target.high:g}] that is stated elsewhere (targets.json)"
            raise ValueError(f"{path}:1: {target.name}: expected {wanted}, got the header {_short(header)}")


def _numbers(path: Path, rows: list[str], names: list[str], places: list[int], strict: bool) -> np.ndarray:
    """(T, len(places)) float64 of these columns, NaN where a cell is empty. `strict`: an empty cell is an error."""
    for number, row in enumerate(rows, start=2):
        if not row.strip():
            raise ValueError(f"{path}:{number}: expected a row, got a blank line, which would shift every later frame")
        if row.count(",") != len(names) - 1:
            many = f"{len(names)} columns" if len(names) > 1 else "1 column"
            got = f"{row.count(',') + 1}: {_short(row.strip())}"
            raise ValueError(f"{path}:{number}: expected {many} ({','.join(names):.60}), got {got}")
    with contextlib.suppress(ValueError):
        return np.loadtxt(rows, delimiter=",", comments=None, ndmin=2, usecols=places)
    values = np.empty((len(rows), len(places)))
    for r, row in enumerate(rows):
        cells = row.split(",")
        for c, place in enumerate(places):
            cell = cells[place].strip()
            try:
                values[r, c] = math.nan if not (cell or strict) else float(cell if "_" not in cell else "_")
            except ValueError:
                wanted = "a number" if strict else "a number or nothing"
                raise ValueError(f"{path}:{r + 2}: {names[place]}: expected {wanted}, got {_short(cell)}") from None
    return values


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path}:1: expected text, got an empty file")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        read: bytes = error.object  # without the mark at its beginning that `data` may have
        line = read.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: expected text in UTF-8, got the byte {read[error.start]:#04x}") from None


# ----------------------------------------------------------------------------------------------------------- data set


@dataclass(frozen=True)
class _Meta:
    rate: float | None = None
    shared: bool = False
    images: str | None = None
    columns: tuple[str, ...] | None = None
    quality: tuple[str, ...] | None = None
    about: Any = None


@dataclass(frozen=True)
class _Source:
    path: Path
    rows: int
    dim: int
    mask: Path | None
    quality: Path | None
    quality_dim: int


@dataclass(frozen=True)
class _Video:
    name: str
    labels: np.ndarray | None
    valid: np.ndarray
    sources: dict[str, _Source | None]  # None: the video has no features of that modality


class AffWild2(Sequence[Clip]):
    """The clips of one split, in the order of their names (test: of the sample file, where there is one).

    root         the folder above (str or path)
    split        "train", "validation" or "test". The test split is what the sample file names, without labels; where there
                 is no sample file it is the annotations in Test_Set, and without these the videos of index.json that are
                 not annotated
    modalities   which folders of `features`, in this order; default: all, by name; 8 at most
    annotations  the folder that holds Train_Set and Validation_Set, where it is not found below root
    features     the folder that holds the modality folders; default root/features
    sample_file  the organisers' sample submission; default root/sample_submission.txt (read for the test split only)
    faults       a list that takes what is wrong with single files, a sentence each, in place of the error: such a file
                 is left out

    `names`: the clips' names. `modalities`: name -> D, in order. `targets`: names and ranges. `frame_rate`: the frames a
    second of most frames. `unlabelled`: whether the videos are those of index.json that
    are not annotated. `groupings`: what groups.json holds. `quality_dims`: name -> Q, of the modalities that have quality in
    this split or names of it in meta.json. `mismatches`: what does not fit, a sentence each that
    begins with the video's name or the folder: nothing in it stops training, everything in it should be looked at once.
    `slight`: those among them about a second or less at a video's end.
    Annotations and the headers of all feature files are read and checked here; the features themselves when a clip is
    sliced.

    Raises ValueError for malformed files, naming file and line or row, FileNotFoundError for what is not there.
    """

    names: list[str]
    modalities: dict[str, int]
    quality_dims: dict[str, int]
    targets: Targets
    mismatches: list[str]

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        modalities: Sequence[str] | None = None,
        annotations: str | os.PathLike | None = None,
        features: str | os.PathLike | None = None,
        sample_file: str | os.PathLike | None = None,
        faults: list[str] | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        self.root, self.split, self._faults = Path(root), split, faults
        if not self.root.is_dir():
            hint = " (sage-ext import makes a data set of a table)" if self.root.is_file() else ""
            raise FileNotFoundError(f"root: expected a folder, got {self.root}{hint}")
        folder = self.root / "features" if features is None else Path(features)
        self._folders = _modality_folders(folder, modalities)
        self._meta = {name: _read_meta(path / "meta.json", self.root) for name, path in self._folders.items()}
        self._fps = _read_fps(self.root / "fps.json")
        self._declared = _read_targets(self.root / "targets.json")
        self.groupings = _read_groups(self.root / "groups.json")
        self.sample_file: Path | None = None  # that the test split is from
        self.unlabelled = False  # it is from index.json
        self._images: dict[tuple[str, str], np.ndarray] = {}
        self.modalities, self.mismatches, self.targets = {}, [], self._declared or VALENCE_AROUSAL
        self.slight: list[str] = []
        self._videos: list[_Video] = []
        bare: list[str] = []  # annotated videos without any features
        for name, labels, valid in self._annotated(annotations, sample_file):
            sources = {m: self._source(m, name) for m in self._folders}
            if any(sources.values()):
                self._videos.append(_Video(name, labels, valid, sources))
            else:
                bare.append(name)
        if bare and (split == "test" or not self._videos) and faults is None:
            where = ", ".join(str(path / f"{bare[0]}.npy") for path in self._folders.values())
            raise FileNotFoundError(
                f"{bare[0]}: expected features of a modality or more, got none (looked for {where})"
            )
        self.mismatches += [f"{name}: annotated, but without features of any modality: left out" for name in bare]
        for m, path in self._folders.items():
            with self._lenient():
                self._settle_dim(m)
            if m not in self.modalities:
                error = FileNotFoundError(
                    f"modalities: expected features of {m!r} for the {split} split, got none in {path}"
                )
                if faults is None:
                    raise error
                faults.append(str(error))
                self.modalities[m] = 0
        for video in self._videos:
            self._report(video)
        for m in self._folders:
            self._report_rate(m)
        self.modalities = {m: self.modalities[m] for m in self._folders if self.modalities[m]}
        self.quality_dims = {m: dim for m in self.modalities if (dim := self._settle_quality(m))}
        self.names = [video.name for video in self._videos]
        self._report_strangers(annotations, sample_file)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {dim}" for name, dim in self.modalities.items())
        return f"<AffWild2 {self.root}, {self.split}: {len(self)} clips; {sizes}; {described(self.targets)}>"

    @property
    def frame_rate(self) -> float:
        """Frames a second: of one half of all frames no more, of the other no less."""
        rates = sorted((self.fps(video.name), len(video.valid)) for video in self._videos)
        half = sum(frames for _, frames in rates) / 2
        for rate, frames in rates:
            half -= frames
            if half <= 0:
                return rate
        return FPS

    def group(self, name: str, grouping: str | None = None) -> str:
        """The group that clip `name` is in: by `grouping`, by default the one named "group". Where that grouping does not
        hold the clip, its video. ValueError for a grouping that groups.json does not have."""
        if grouping is not None and grouping not in self.groupings:
            have = ", ".join(self.groupings) or "none"
            raise ValueError(f"group: expected a grouping of {self.root / 'groups.json'} ({have}), got {grouping!r}")
        known, video = self.groupings.get("group" if grouping is None else grouping, {}), bare_name(name)
        persons = (name, video, f"{video}_left", f"{video}_right")  # of one video, who are never torn apart
        return next((known[key] for key in persons if key in known), video)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The names of a modality's features, for those whose meta.json says them."""
        return {m: names for m in self.modalities if (names := self._meta[m].columns) is not None}

    @property
    def quality_columns(self) -> dict[str, tuple[str, ...]]:
        """The names of a modality's quality, for those whose meta.json says them."""
        return {m: names for m in self.quality_dims if (names := self._meta[m].quality) is not None}

    @property
    def about(self) -> dict[str, Any]:
        """What a modality's meta.json says below "about", for those where it says something."""
        return {m: about for m in self.modalities if (about := self._meta[m].about) is not None}

    @property
    def annotated(self) -> int:
        """How many frames are, with all targets."""
        return int(sum(video.valid.sum() for video in self._videos))

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override]
        video = self._videos[operator.index(index)]
        frames = len(video.valid)
        features: dict[str, Any] = {}
        declared: dict[str, np.ndarray] = {}
        quality: dict[str, Any] = {}
        for m, dim in self.modalities.items():
            source, meta = video.sources[m], self._meta[m]
            if source is None:
                features[m], declared[m] = np.zeros((0, dim), np.float32), np.zeros(frames, bool)
                if m in self.quality_dims:
                    quality[m] = np.zeros((0, self.quality_dims[m]), np.float32)
                continue
            rows = _open_rows(source.path)
            mask = None if source.mask is None else np.array(_open_array(source.mask))
            present = np.zeros(frames, bool)
            if meta.rate is None:
                features[m] = rows
                present[: len(rows)] = True if mask is None else mask[:frames]
            else:
                features[m] = Resampled(rows, meta.rate, self.fps(video.name), mask)
                present[: len(features[m])] = True
            if meta.images is not None:
                present &= self._with_image(meta.images, video.name, frames)
            declared[m] = present
            if m in self.quality_dims and source.quality is not None:
                quality[m] = Quality(_open_rows(source.quality, "Q"), meta.rate, self.fps(video.name))
            elif m in self.quality_dims:
                quality[m] = np.broadcast_to(np.float32(np.nan), (len(features[m]), self.quality_dims[m]))
        present_, fps = Presence(declared, features), self.fps(video.name)
        return Clip(video.name, video.labels, video.valid, features, present_, frames, fps, self.targets, quality)

    def fps(self, name: str) -> float:
        """Frames a second of the video that clip `name` is from."""
        if isinstance(self._fps, float):
            return self._fps
        return self._fps.get(name, self._fps.get(bare_name(name), FPS))

    def _sample(self, sample_file: str | os.PathLike | None) -> Path:
        return self.root / SAMPLE if sample_file is None else Path(sample_file)

    def _annotated(self, annotations, sample_file) -> Iterator[tuple[str, np.ndarray | None, np.ndarray]]:
        sample = self._sample(sample_file)
        if self.split == "test" and (sample.exists() or sample_file is not None):
            self.sample_file = sample
            for name, frames in read_sample(sample).items():
                yield name, None, np.zeros(frames, bool)
            return
        try:
            folder = annotation_folder(self.root, annotations, SPLITS[self.split])
        except FileNotFoundError as error:
            if self.split != "test":
                raise
            known = self._known(annotations)
            found = {name: frames for name, frames in read_index(self.root / INDEX).items() if name not in known}
            if not found:
                raise FileNotFoundError(
                    f"{sample}: expected a sample file, annotations in Test_Set, or an {INDEX} with videos that are not "
                    "annotated, got none: there is no test split, and --split names another"
                ) from error
            self.unlabelled = True
            for name, frames in sorted(found.items()):
                yield name, None, np.zeros(frames, bool)
            return
        paths = sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))
        if not paths:
            raise FileNotFoundError(f"{folder}: expected annotations (*.txt), got none")
        others = sorted(path.name for path in folder.iterdir() if path.suffix != ".txt" and path.name[0] != ".")
        if others:
            self.mismatches.append(f"{folder}: not read, for they do not end in .txt: {_some(others)}")
        read: dict[Path, tuple[np.ndarray, np.ndarray, Targets]] = {}
        for path in paths:
            with self._lenient():
                read[path] = _read_annotation(path, self._declared)
        if not read:
            return
        count = Counter(targets for _, _, targets in read.values())
        self.targets = max(count, key=count.__getitem__)  # those of most files; others are wrong, each by its own name
        like = next(path for path, (_, _, targets) in read.items() if targets == self.targets)
        for path, (labels, valid, targets) in read.items():
            with self._lenient():
                if targets != self.targets:
                    raise ValueError(
                        f"{path}:1: expected the targets {described(self.targets)}, as in {like}, got {described(targets)}"
                    )
                yield path.stem, labels, valid

    @contextlib.contextmanager
    def _lenient(self) -> Iterator[None]:
        """What goes wrong with a file in this block is noted, if the caller asked for that."""
        try:
            yield
        except (ValueError, OSError) as error:
            if self._faults is None:
                raise
            self._faults.append(str(error))

    def _source(self, m: str, name: str) -> _Source | None:
        """The file of a modality's features for clip `name`, its header read."""
        folder = self._folders[m]
        path, bare = folder / f"{name}.npy", folder / f"{bare_name(name)}.npy"
        if _bare_stem(name) != name and (folder / f"{_bare_stem(name)}.npy").exists():
            return None  # the mask or quality of that video
        if not path.exists():
            if not (bare.exists() and self._meta[m].shared):
                return None
            path = bare
        with self._lenient():
            rows = _open_rows(path)
            count, dim = rows.shape
            mask: Path | None = path.with_suffix(".mask.npy")
            if mask is not None and mask.exists():
                _check_mask(mask, path, count)
            else:
                mask = None
            quality, quality_dim = self._quality(path, count)
            return _Source(path, count, dim, mask, quality, quality_dim)
        return None

    def _quality(self, features: Path, count: int) -> tuple[Path | None, int]:
        """The file of quality beside a file of features, and its Q, its header read."""
        path = features.with_suffix(".quality.npy")
        if path.exists():
            with self._lenient():
                rows = _open_rows(path, "Q")
                if len(rows) != count:
                    raise ValueError(f"{path}: expected {count} rows, as many as {features.name}, got {len(rows)}")
                return path, rows.shape[1]
        return None, 0

    def _settle_quality(self, m: str) -> int:
        """The Q of a modality is how many names meta.json has, or that of most files; 0 without quality. Files of another
        are wrong, each by its own name."""
        sources = {video.name: source for video in self._videos if (source := video.sources[m]) is not None}
        having = [source for source in sources.values() if source.quality is not None]
        names = self._meta[m].quality
        if names is not None:
            dim, like = len(names), self._folders[m] / "meta.json"
        elif having:
            count = Counter(source.quality_dim for source in having)
            dim = max(count, key=count.__getitem__)
            like = next(source.quality for source in having if source.quality_dim == dim) or self._folders[m]
        else:
            return 0
        for video in self._videos:
            source = sources.get(video.name)
            if source is not None and source.quality is not None and source.quality_dim != dim:
                with self._lenient():
                    raise ValueError(f"{source.quality}: expected Q = {dim}, as in {like}, got {source.quality_dim}")
                video.sources[m] = replace(source, quality=None)
        return dim

    def _settle_dim(self, m: str) -> None:
        """The D of a modality is that of most of its files. Others are wrong, each blamed by its own name."""
        sources = {video.name: source for video in self._videos if (source := video.sources[m]) is not None}
        columns = self._meta[m].columns
        if not sources:
            if columns and self.split == "test":  # a video without sound is one whose sound is missing
                self.modalities[m] = len(columns)
            return
        shapes = [(source.rows, source.dim) for source in sources.values()]
        count = Counter(dim for _, dim in shapes)
        dim = max(count, key=count.__getitem__)  # the first one of those that are as frequent
        if len(shapes) > 2 and len(set(shapes)) > 1 and count[dim] == 1 and len({rows for rows, _ in shapes}) == 1:
            rows = shapes[0][0]
            raise ValueError(
                f"{self._folders[m]}: expected arrays (rows, D) of one D, got {rows} rows in every file and another D in "
                "each: transposed?"
            )
        like = next(source.path for source in sources.values() if source.dim == dim)
        for name, source in sources.items():
            if source.dim != dim:
                with self._lenient():
                    hint = f" rows of {source.dim}: transposed?" if source.rows == dim else ""
                    got = f"{source.rows}{hint}" if hint else str(source.dim)
                    raise ValueError(f"{source.path}: expected D = {dim}, as in {like}, got {got}")
                next(video for video in self._videos if video.name == name).sources[m] = None
        self.modalities[m] = dim
        if columns is not None and len(columns) != dim:
            where = self._folders[m] / "meta.json"
            raise ValueError(f"{where}: columns: expected {dim} names, as many as features, got {len(columns)}")

    def _report(self, video: _Video) -> None:
        """What does not fit between a video's annotation and its features."""
        name, frames = video.name, len(video.valid)
        for m, source in video.sources.items():
            folder, meta = self._folders[m], self._meta[m]
            if source is None:
                bare = folder / f"{bare_name(name)}.npy"
                wanted = folder / f"{name}.npy"
                hint = f'; if {bare} is a track that all persons share, say "shared": true in meta.json'
                if not wanted.exists():
                    self.mismatches.append(
                        f"{name}: no {wanted}: {m} is absent in the whole clip" + (hint if bare.exists() else "")
                    )
                continue
            with self._lenient():
                self._report_lengths(m, name, frames, source.rows, meta.rate)
            if meta.images is not None and not (self.root / meta.images / name).is_dir():
                images = self.root / meta.images / name
                self.mismatches.append(f"{name}: no folder {images}: {m} is absent in the whole clip")

    def _known(self, annotations: str | os.PathLike | None) -> set[str]:
        """The names of all annotated videos, of whatever split."""
        known: set[str] = set()
        for names in SPLITS.values():
            with contextlib.suppress(FileNotFoundError, ValueError):
                known |= {path.stem for path in annotation_folder(self.root, annotations, names).glob("*.txt")}
        return known

    def _report_strangers(self, annotations: str | os.PathLike | None, sample_file: str | os.PathLike | None) -> None:
        """Features of videos that no split has."""
        known = set(self.names) | self._known(annotations)
        with contextlib.suppress(OSError, ValueError):
            known |= set(read_index(self.root / INDEX))
        with contextlib.suppress(OSError, ValueError):
            known |= set(read_sample(self._sample(sample_file)))
        for m, folder in self._folders.items():
            read = known | {bare_name(name) for name in known} if self._meta[m].shared else known
            files = {path.name.removesuffix(".npy") for path in folder.glob("*.npy")}
            others = sorted(name for name in files - read if _bare_stem(name) not in read)
            if others:
                self.mismatches.append(f"{folder}: features without an annotation: {_some(others)}")
            strange = sorted(
                path.name for path in folder.iterdir()
                if path.suffix != ".npy" and path.name != "meta.json" and path.name[0] != "."
            )  # fmt: skip
            if strange:
                self.mismatches.append(f"{folder}: not read, for they do not end in .npy: {_some(strange)}")

    def _report_lengths(self, m: str, name: str, frames: int, count: int, rate: float | None) -> None:
        step = 1.0 if rate is None else rate / self.fps(name)  # rows a frame
        if not 1e-6 <= step <= _MOST_ROWS:
            raise ValueError(
                f"{self._folders[m] / 'meta.json'}: rate: expected 1e-6 to {_MOST_ROWS} rows a frame, got {rate:g} Hz for "
                f"{self.fps(name):g} frames a second of {name}"
            )
        covered, needed = math.ceil(_snap(count / step)), math.ceil(_snap(frames * step))
        rows = f"{count} rows"
        if rate is not None:
            rows += f" at {rate:g} Hz ({covered} frames at {self.fps(name):g} fps)"
        if covered < frames:
            tail = f"{m} is absent in the last {frames - covered}"
        elif count > needed:
            tail = f"the last {count - needed} are ignored"
        else:
            return
        self.mismatches.append(f"{name}: {m} has {rows} for {frames} frames: {tail}")
        if abs(covered - frames) <= max(self.fps(name), 2):
            self.slight.append(self.mismatches[-1])

    def _report_rate(self, m: str) -> None:
        """Rows that are a like share of the frames in most videos: their rate is another one than is said."""
        rate = self._meta[m].rate
        shares = [
            source.rows / len(video.valid) / (1.0 if rate is None else rate / self.fps(video.name))
            for video in self._videos
            if (source := video.sources[m]) is not None and len(video.valid) >= 20
        ]
        if len(shares) < 2:
            return
        share = sorted(shares)[len(shares) // 2]
        alike = sum(abs(other / share - 1) < 0.02 for other in shares)
        if abs(share - 1) > 0.04 and 2 * alike > len(shares):
            said = f"{self.frame_rate:g} (a frame each)" if rate is None else f"{rate:g}"
            real = share * (self.frame_rate if rate is None else rate)
            self.mismatches.append(
                f"{self._folders[m]}: in most videos there are {share:.3g} times the rows that {said} a second would give: is "
                f"their rate {real:.3g}? say so in meta.json"
            )

    def _with_image(self, images: str, name: str, frames: int) -> np.ndarray:
        """(T,) bool: the frame's image exists. One listing a video, kept."""
        if (images, name) not in self._images:
            exists = np.zeros(frames, bool)
            with contextlib.suppress(FileNotFoundError):
                files = set(os.listdir(self.root / images / name))
                exists[:] = [f"{i:05d}.jpg" in files for i in range(1, frames + 1)]
            self._images[images, name] = exists
        return self._images[images, name]


def disagreements(splits: Mapping[str, AffWild2]) -> list[str]:
    """What keeps the splits of one data set from being used together, a sentence each."""
    found = []
    (first, data), *others = splits.items()
    for split, other in others:
        if dict(other.modalities) != dict(data.modalities):
            found.append(
                f"{data.root}: expected the same modalities in both splits, got {dict(data.modalities)} in {first} and "
                f"{dict(other.modalities)} in {split}"
            )
        for m in data.quality_dims.keys() & other.quality_dims.keys():
            if data.quality_dims[m] != other.quality_dims[m]:
                found.append(
                    f"{data.root}: {m}: expected as many columns of quality in both splits, got {data.quality_dims[m]} in "
                    f"{first} and {other.quality_dims[m]} in {split}"
                )
        if other.targets != data.targets and other.sample_file is None:
            found.append(
                f"{data.root}: expected the same targets in both splits, got {described(data.targets)} in {first} and "
                f"{described(other.targets)} in {split}"
            )
    return found


def _bare_stem(name: str) -> str:
    """Of a file's name without its .npy, the video that it is a mask or quality of, if it is one."""
    return next((name.removesuffix(mark) for mark in _COMPANIONS if name.endswith(mark)), name)


def bare_name(name: str) -> str:
    """The video's name: `name` without the `_left` or `_right` of one of two annotated persons."""
    return re.sub(r"_(left|right)$", "", name)


def annotation_folder(root: Path, annotations: str | os.PathLike | None, split_names: Sequence[str]) -> Path:
    if annotations is not None:
        tasks = [Path(annotations)]
    else:
        tasks = [root / "annotations"]
        tasks += [
            path
            for depth in ("", "*/", "*/*/")
            for task in _TASK_FOLDERS
            for path in sorted(root.glob(depth + task))
            if "__MACOSX" not in path.parts
        ]
    found = [task / name for task in tasks for name in split_names if (task / name).is_dir()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"root: expected one annotation folder, got {', '.join(map(str, found))}; say which with annotations="
        )
    where = (
        str(annotations) if annotations is not None else f"{root}/annotations or {root}/*/{{{','.join(_TASK_FOLDERS)}}}"
    )
    raise FileNotFoundError(f"annotations: expected a folder {where}/{' or '.join(split_names)}, got none{HINT}")


def modality_names(folder: Path) -> list[str]:
    """Of the folders in `folder`, root/features, in the order of the names."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _modality_folders(folder: Path, modalities: Sequence[str] | None) -> dict[str, Path]:
    if isinstance(modalities, str):
        raise TypeError(f"modalities: expected a sequence of names, got the string {modalities!r}")
    if not folder.is_dir():
        raise FileNotFoundError(f"features: expected a folder, got {folder}{HINT}")
    there = modality_names(folder)
    names = there if modalities is None else list(modalities)
    if not names:
        raise FileNotFoundError(f"features: expected folders of modalities in {folder}, got none")
    if "fused" in names:
        raise ValueError(
            f"modalities: expected names other than 'fused', which is what all together are, got {folder / 'fused'}"
        )
    if len(names) > MAX_MODALITIES:
        raise ValueError(
            f"modalities: expected 1 to {MAX_MODALITIES} folders in {folder}, got {len(names)} ({', '.join(names)}); choose "
            "among them with modalities="
        )
    for name in names:
        if name not in there:
            raise FileNotFoundError(
                f"modalities: expected folders of {folder} ({', '.join(there) or 'none'}), got {name!r}"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"modalities: expected different names, got {names}")
    return {name: folder / name for name in names}


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON, got something else: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise ValueError(f"{path}: expected JSON, got what cannot be read: {str(error)[:100]}") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_meta(path: Path, root: Path) -> _Meta:
    if not path.exists():
        return _Meta()
    meta = _read_object(path)
    for key in meta:
        if key not in _META_KEYS:
            raise ValueError(
                f"{path}: expected the keys {', '.join(_META_KEYS)} (notes go below 'about'), got {_short(key)}"
            )
    rate, shared, images = meta.get("rate"), meta.get("shared", False), meta.get("images")
    if rate is not None:
        _check_rate(rate, f"{path}: rate", "Hz")
    if not isinstance(shared, bool):
        raise ValueError(f"{path}: shared: expected true or false, got {_short(shared)}")
    if images is not None and not (isinstance(images, str) and _stays_below(images) and (root / images).is_dir()):
        raise ValueError(f"{path}: images: expected a folder below {root}, got {_short(images)}")
    columns = meta.get("columns")
    if columns is not None and not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
        raise ValueError(f"{path}: columns: expected a list of names, got {_short(columns)}")
    quality = meta.get("quality")
    if quality is not None and not (
        isinstance(quality, list) and quality and all(isinstance(name, str) for name in quality)
    ):
        raise ValueError(f"{path}: quality: expected a list of one name or more, got {_short(quality)}")
    names, quality_names = (None if given is None else tuple(given) for given in (columns, quality))
    return _Meta(None if rate is None else float(rate), shared, images, names, quality_names, meta.get("about"))


def _read_fps(path: Path) -> float | dict[str, float]:
    if not path.exists():
        return {}
    rates = _read_json(path)
    if not isinstance(rates, dict):
        _check_rate(rates, f"{path}", "frames a second")
        return float(rates)
    for name, fps in rates.items():
        _check_rate(fps, f"{path}: {_printed(name)}", "frames a second")
    return {name: float(fps) for name, fps in rates.items()}


def _read_targets(path: Path) -> Targets | None:
    return make_targets(_read_object(path).items(), str(path)) if path.exists() else None


def _read_groups(path: Path) -> dict[str, dict[str, str]]:
    """{grouping: {video: group}}."""
    if not path.exists():
        return {}
    found = _read_object(path)
    if found and not any(isinstance(value, dict) for value in found.values()):
        found = {"group": found}
    for grouping, groups in found.items():
        if not isinstance(groups, dict):
            raise ValueError(
                f"{path}: {_printed(grouping)}: expected an object of video and group, got {_short(groups)}"
            )
        for video, group in groups.items():
            if isinstance(group, bool) or not isinstance(group, (str, int)):
                where = f"{path}: {_printed(grouping)}: {_printed(video)}"
                raise ValueError(f"{where}: expected a name or a whole number, got {_short(group)}")
            if not str(group).isprintable():
                where = f"{path}: {_printed(grouping)}: {_printed(video)}"
                raise ValueError(f"{where}: expected a name of characters that print, got {_short(group)}")
    return {grouping: {video: str(group) for video, group in groups.items()} for grouping, groups in found.items()}


def _printed(name: str) -> str:
    return name[:60] if name.isprintable() else _short(name)


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first few of them, and how many there are."""
    first = ", ".join(_printed(name) for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"


def _check_rate(value: Any, what: str, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{what}: expected a positive number of {unit}, got {_short(value)}")
    if not _RATES[0] <= value <= _RATES[1]:
        raise ValueError(f"{what}: expected {_RATES[0]:g} to {_RATES[1]:g} {unit}, got {_short(value)}")


def _short(value: Any) -> str:
    """Of a value from a file, little."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _stays_below(name: str) -> bool:
    """Whether a path from a file, joined to a folder, can only lead below it, as far as its text says, and can be one."""
    parts = name.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") for part in parts) and name.isprintable() and len(name.encode()) <= 200


def _open_rows(path: Path, width: str = "D") -> np.ndarray:
    """The (rows, D) array of a .npy file, or (rows, Q) of quality, memory-mapped."""
    rows = _open_array(path)
    if rows.ndim != 2:
        raise ValueError(f"{path}: expected an array (rows, {width}), got {rows.shape}")
    if rows.dtype.kind != "f":
        raise ValueError(f"{path}: expected floating point, got {rows.dtype}")
    if 0 in rows.shape:
        what = "features" if width == "D" else "quality"
        raise ValueError(f"{path}: expected rows of {what}, got the shape {rows.shape}")
    return rows


def _open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped; whatever the file holds, at worst a ValueError that names it.

    The header is checked before it is believed: NumPy maps a shape of booleans, and allocates what a header of 100 bytes
    asks for."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, of the header as a literal
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("it is empty")
            version = np.lib.format.read_magic(file)
            if version not in _NPY_HEADERS:
                raise ValueError(f"version {version} of the format")
            shape, by_column, dtype = _NPY_HEADERS[version](file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python: whatever that raises
        raise ValueError(f"{path}: expected a .npy file, got one that cannot be read: {one_line(error)}") from None
    if not all(type(size) is int and size >= 0 for size in shape) or dtype.hasobject:
        raise ValueError(f"{path}: expected a .npy file of numbers, got the shape {_short(shape)} of {dtype}")
    size, there = math.prod(shape) * dtype.itemsize, path.stat().st_size - offset
    if size > there:
        raise ValueError(f"{path}: expected {_short(size)} bytes for the shape {_short(shape)} of {dtype}, got {there}")
    try:
        if size == 0:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape, "F" if by_column else "C")
    except (ValueError, OverflowError, MemoryError) as error:  # empty, and of dimensions that no array has
        raise ValueError(f"{path}: expected a .npy file of numbers, got the shape {_short(shape)} ({error})") from None


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _check_mask(path: Path, features: Path, count: int) -> None:
    mask = _open_array(path)
    if mask.dtype != bool:
        raise ValueError(f"{path}: expected bool, got {mask.dtype}")
    if mask.shape != (count,):
        raise ValueError(f"{path}: expected the shape ({count},), one value a row of {features.name}, got {mask.shape}")


def _snap(position: Any) -> Any:
    """Rounds what is within 1e-12 (relative) of a whole number, so that i * rate / fps does not fall short of its border."""
    whole = np.round(position)
    return np.where(np.abs(position - whole) < 1e-12 * np.maximum(1, np.abs(whole)), whole, position)


# --------------------------------------------------------------------------------------------------------- submission


def read_index(path: Path) -> dict[str, int]:
    """The videos of an index.json and how many frames each has; none where there is no such file."""
    if not path.exists():
        return {}
    with parsing(path):
        found = {
            str(name): operator.index(video["frames"])
            for name, video in json.loads(path.read_text("utf-8"))["videos"].items()
        }
    wrong = next((name for name, frames in found.items() if not 1 <= frames <= _MOST_FRAMES), None)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong!r:.60}: expected 1 to {_MOST_FRAMES:,} frames, got {found[wrong]:,}")
    return found


def read_sample(path: str | os.PathLike) -> dict[str, int]:
    """The test videos of a sample submission file, in its order: name -> number of frames (its largest frame number).

    Raises ValueError naming file and line for a wrong header or a row that does not begin with `<video>/<frame>.jpg`.
    """
    frames: dict[str, int] = {}
    for _, video, frame in _sample_rows(Path(path)):
        frames[video] = max(frames.get(video, 0), frame)
    return frames


def write_submission(
    path: str | os.PathLike, sample_file: str | os.PathLike, predictions: Mapping[str, np.ndarray]
) -> None:
    """Writes `image_location,valence,arousal` with exactly the rows of the sample file, in its order.

    predictions: clip name -> (T, 2) valence and arousal of frames 1..T, clipped to [-1, 1] here and written with six
    decimals. Frames and videos that the sample file does not name are left out. The file is there whole or not at
    all. Raises ValueError where a video of the sample file has no prediction, too few rows, a wrong shape, or NaN in
    a row needed.
    """
    sample, path = Path(sample_file), Path(path)
    rows: dict[str, list[list[float]]] = {}
    for video, frames in read_sample(sample).items():
        if video not in predictions:
            raise ValueError(f"predictions: expected one for every video that {sample} names, got none for {video!r}")
        values = np.asarray(predictions[video])
        if values.ndim != 2 or values.shape[1] != 2:
            raise ValueError(f"predictions[{video!r}]: expected the shape (T, 2), got {values.shape}")
        if len(values) < frames:
            raise ValueError(f"predictions[{video!r}]: expected {frames} frames, as {sample} names, got {len(values)}")
        rows[video] = values[:frames].tolist()
    with replacing(path) as file:
        file.write(f"{SUBMISSION_HEADER}\n".encode())
        for location, video, frame in _sample_rows(sample):
            valence, arousal = rows[video][frame - 1]
            if not (math.isfinite(valence) and math.isfinite(arousal)):
                raise ValueError(f"predictions[{video!r}]: frame {frame}: expected numbers, got {valence}, {arousal}")
            row = f"{location},{min(max(valence, -1.0), 1.0):.6f},{min(max(arousal, -1.0), 1.0):.6f}\n"
            file.write(row.encode())


def _sample_rows(path: Path) -> Iterator[tuple[str, str, int]]:
    """(image location, video, frame number from 1) of each row."""
    lines = _read_text(path).split("\n")
    if lines[0].strip() != SUBMISSION_HEADER:
        raise ValueError(f"{path}:1: expected the header {SUBMISSION_HEADER!r}, got {_short(lines[0].strip())}")
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) < 2:
        raise ValueError(f"{path}:2: expected rows of {SUBMISSION_HEADER!r}, got the end of the file")
    videos: dict[str, str] = {}  # one string a video, not one a row
    for number, line in enumerate(lines[1:], start=2):
        location = line.split(",", 1)[0].strip()
        match = _LOCATION.fullmatch(location)
        frame = match["frame"].lstrip("0") if match is not None else ""
        if match is None or not frame:
            raise ValueError(
                f"{path}:{number}: expected <video>/<frame>.jpg,valence,arousal, got {_short(line.strip())}"
            )
        if not _stays_below(match["video"]):
            raise ValueError(f"{path}:{number}: expected the name of a video, got {_short(match['video'])}")
        if len(frame) > len(str(_MOST_FRAMES)) or int(frame) > _MOST_FRAMES:
            raise ValueError(f"{path}:{number}: expected a frame of at most {_MOST_FRAMES:,}, got {_short(frame)}")
        yield location, videos.setdefault(match["video"], match["video"]), int(frame)
