"""One table (CSV, TSV or Parquet), a row a frame, becomes a data set in the layout that `affwild2` reads.

docs/data.md says what the columns mean. The table is read once, in chunks of rows; numbers are kept as arrays, features
in float32, targets and times in float64, so a table takes about 4 bytes a cell that is used. The data set is written
whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import fnmatch
import glob
import hashlib
import json
import math
import os
import shlex
import shutil
import textwrap
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .._arguments import MAX_MODALITIES, check_int, check_number
from ..files import one_line, replacing_folder
from ..models.sage import DEAD
from .affwild2 import INVALID, SPLITS, bare_name
from .columns import Numbers, PerVideo, Source, Times, Videos, counted, first_few, open_table, shown
from .rates import FPS
from .targets import Target, Targets, header_targets, make_targets

MARK = "import.json"  # says that an import wrote the folder, from what, and which files
SEPARATORS = "_.:"
TIMES = ("time", "time_s", "t_s", "seconds", "datetime")  # the first of them that is a column
USUAL = {"valence": (-1.0, 1.0), "arousal": (-1.0, 1.0)}
SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "val": "validation", "valid": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip
HELD_OUT = 5  # one group in so many validates
MOST_GAPS = 10_000_000  # frames without a row, in a table
MOST_PIECES = 1000
TOLERANCE = 0.25  # frames that a time may lie beside the grid
LEAK = 0.999  # correlation of a feature with a target

_CUT = "cut"  # a split of our own: the video's first four fifths train, the rest validates
_BLOCK = 1 << 18  # numbers that are written at once
_RATES = (1e-6, 1e6)  # frames a second, as the reader wants them


# ---------------------------------------------------------------------------------------------------------- the report
@dataclass(frozen=True)
class ImportedModality:
    """What became of a modality's columns."""

    columns: list[str]
    missing: int  # frames in which a column or more is missing, those without a row among them
    partial: int  # of these, frames in which only some of the columns are missing
    worst: str | None  # the column that is missing in the most of `partial`
    worst_missing: int  # in how many


@dataclass(frozen=True)
class ImportedTarget:
    """A target: its range in its own units, who says so, and in how many frames it is annotated."""

    low: float
    high: float
    source: str  # "asked for", "usual" (of valence and arousal), "of the table", or "the model's"
    annotated: int


@dataclass(frozen=True)
class ImportedSplit:
    videos: int
    frames: int
    annotated: int  # frames, with all targets


@dataclass
class ImportReport:
    """What `import_table` read and wrote; `text()` is what the command prints."""

    out: Path
    source: str
    rows: int
    frames: int
    fps: float
    splits: dict[str, ImportedSplit]
    modalities: dict[str, ImportedModality]
    targets: dict[str, ImportedTarget]
    groupings: dict[str, int]  # name -> number of groups
    ignored: dict[str, str]  # column -> why
    notes: list[str] = field(default_factory=list)
    quality: dict[str, list[str]] = field(default_factory=dict)  # modality -> columns

    def text(self) -> str:
        videos = sum(split.videos for split in self.splits.values())
        hours, out = self.frames / self.fps / 3600, shlex.quote(str(self.out))
        lines = [
            f"{self.out}: {counted(videos, 'video')}, {counted(self.frames, 'frame')}, "
            f"{hours:{',.2f' if hours > 0.1 else '.3g'}} hours at {_rate(self.fps)}, from {counted(self.rows, 'row')} of "
            f"{self.source}",
            "",
        ]
        splits = [
            (name, f"{split.videos:,}", f"{split.frames:,}", _share(split.annotated, split.frames))
            for name, split in self.splits.items()
        ]
        modalities = [
            (name, f"{len(m.columns):,}", _share(m.missing, self.frames), first_few(m.columns, 3))
            for name, m in self.modalities.items()
        ]
        ranges = {
            "asked for": "as asked for",
            "usual": "the usual one",
            "of the table": "the table's least and greatest",
            "the model's": "the model's",
        }
        targets = [
            (name, f"[{t.low:g}, {t.high:g}]", _share(t.annotated, self.frames), ranges[t.source])
            for name, t in self.targets.items()
        ]
        lines += [*_grid(("split", "videos", "frames", "annotated"), splits, "lrrr"), ""]
        lines += [*_grid(("modality", "columns", "missing", "which"), modalities, "lrrl"), ""]
        lines += [*_grid(("target", "range", "annotated", "range is"), targets, "lrrl"), ""]
        for name, columns in self.quality.items():
            lines += _wrapped(f"quality of {name}: {first_few(columns, 12)}")
        if self.groupings:
            said = ", ".join(f"{name} ({counted(count, 'group')})" for name, count in self.groupings.items())
            lines += _wrapped(f"groupings: {said}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            lines += _wrapped(f"ignored, {reason}: {first_few(names, 40)}")
        for note in self.notes:
            lines += _wrapped(f"note: {note}")
        after = f"train --data {out} --run RUN"
        if list(self.splits) == ["test"]:
            after = f"predict --run RUN --data {out} --out predictions.csv"
        lines.append(f"next: sage-ext check {out}, then sage-ext {after}")
        return "\n".join(lines)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width) for cell, width, side in zip(row, widths, sides)
        ).rstrip()
        for row in (head, *rows)
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _share(part: int, whole: int) -> str:
    """A share that is not 0 does not look like 0, nor one that is not all like all."""
    if 0 < part < whole:
        return f"{min(max(100 * part / whole, 0.1), 99.9):.1f}%"
    return f"{100 * part / max(whole, 1):.0f}%"


def _rate(fps: float) -> str:
    if fps >= 1 or fps < 1 / 1e7:
        return f"{fps:.6g} {'frame' if fps == 1 else 'frames'} a second"
    return f"one frame in {1 / fps:.6g} seconds"


# ------------------------------------------------------------------------------------------------------------ the call
def import_table(
    table: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    video: str | None = None,
    time: str | None = None,
    frame: str | None = None,
    targets: Sequence[str] | None = None,
    modalities: Mapping[str, str | Sequence[str]] | Sequence[str] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    quality: Mapping[str, str | Sequence[str]] | None = None,
    group: str | Sequence[str] | None = None,
    split: str | None = None,
    ranges: Mapping[str, Sequence[float]] | None = None,
    fps: float | None = None,
    pieces: int = 1,
    unlabelled: Targets | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Writes a data set in the layout that `AffWild2` reads from one table, a row a frame.

    table       CSV, TSV or Parquet
    out         a folder that does not exist or is empty; with `overwrite`, one that an import wrote is replaced
    video       the column that names each row's video; default "video"; without one the table is one video
    time        the column of times: seconds, or ISO 8601 date-times; default the first of TIMES that is there
    frame       the column of frame numbers, in place of times; default "frame"
    targets     the columns to be estimated; default "valence" and "arousal", those that are there
    modalities  name -> the beginning of its columns' names, or several; or names alone: the columns that begin with the
                name and a separator (one of SEPARATORS). Default: all numeric columns whose names have a separator,
                each a part of the modality that its name says before the first one
    columns     name -> columns or shell patterns of them, in place of `modalities`
    quality     modality -> the beginning of the names of the columns that say how good its signal is, or several: these are its
                quality and nobody's features
    group       columns of groups that a split must not tear apart, the first one here; default "group"
    split       the column that says train, validation or test; default "split"
    ranges      target -> (low, high) in its own units; default [-1, 1] for valence and arousal if that holds them, else
                the least and the greatest value of the table
    fps         frames a second; default: from the times, else 30 with frame numbers
    pieces      cut each video into so many pieces of consecutive time, each a video of its own
    unlabelled  the targets of a model that is to predict from this table, in place of `targets` and `ranges`: columns of
                these names are read where they are there, and all videos are the test split

    Raises ValueError for a table or arguments that cannot be right, naming file, line and column; FileExistsError where
    `out` holds what an import did not write; ImportError for Parquet without pyarrow.
    """
    check_int("pieces", pieces, 1, MOST_PIECES)
    if fps is not None:
        check_number(
            "fps", fps, f"of {_RATES[0]:g} to {_RATES[1]:g} frames a second", lambda v: _RATES[0] <= v <= _RATES[1]
        )
    groups = [group] if isinstance(group, str) else None if group is None else list(group)
    if isinstance(targets, str):
        raise TypeError(f"targets: expected a sequence of names, got the string {targets!r}")
    if modalities is not None and columns is not None:
        raise ValueError("modalities, columns: expected at most one of the two (--modalities, --map), got both")
    if unlabelled is not None and (targets is not None or ranges is not None):
        raise ValueError("unlabelled: expected neither targets nor ranges with it (they are the model's), got them too")
    if targets is not None:
        make_targets([(name, (-1.0, 1.0)) for name in targets], "targets")
    options = {
        "video": video, "time": time, "frame": frame, "targets": None if targets is None else list(targets),
        "modalities": dict(modalities) if isinstance(modalities, Mapping) else modalities and list(modalities),
        "columns": columns and {name: list(patterns) for name, patterns in columns.items()}, "group": groups,
        "split": split, "ranges": ranges and {name: list(ends) for name, ends in ranges.items()}, "fps": fps,
        "pieces": pieces, "quality": quality and {name: _beginnings(begin) for name, begin in quality.items()},
    }  # fmt: skip
    path, root = Path(table), Path(os.path.realpath(out))
    _check_out(root, overwrite)
    source = open_table(path)
    if unlabelled is not None:
        targets = [target.name for target in unlabelled if target.name in source.names]
    roles = _roles(source, video=video, time=time, frame=frame, targets=targets, groups=groups, split=split, fps=fps)
    _take_quality(source, roles, quality or {})
    wanted = _wanted(source, roles, modalities, columns)
    work = _Import(source, roles, wanted, _read(source, roles, wanted))
    work.make(ranges or {}, pieces, unlabelled)
    report = work.report(Path(out))
    with _taking_the_place_of(root, overwrite) as part:
        files = work.write(part)
        record = {
            "what": "sage-ext import", "version": __version__, "source": path.name, "bytes": path.stat().st_size,
            "columns": {name: m.columns for name, m in report.modalities.items()}, "ignored": report.ignored,
            "targets": {name: [t.low, t.high] for name, t in report.targets.items()}, "options": options, "files": files,
        }  # fmt: skip
        (part / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return report


# -------------------------------------------------------------------------------------------------------- what columns are
@dataclass
class _Roles:
    """Numbers of the columns that are not features, and what each of these is, in words."""

    video: int | None
    time: int | None
    frame: int | None
    targets: list[int]
    groups: list[int]
    split: int | None
    fps: float | None
    of: dict[int, str]
    quality: dict[str, list[int]] = field(default_factory=dict)  # by modality


def _find(source: Source, option: str, name: str) -> int:
    if name and name in source.names:
        return source.names.index(name)
    near = difflib.get_close_matches(name, source.names, 3)
    hint = f"did you mean {', '.join(map(shown, near))}?" if near else f"it has {first_few(source.names, 12)}"
    raise ValueError(f"{option}: expected a column of {source.path}, got {name[:60]!r}; {hint}")


def _roles(
    source: Source,
    *,
    video: str | None,
    time: str | None,
    frame: str | None,
    targets: Sequence[str] | None,
    groups: Sequence[str] | None,
    split: str | None,
    fps: float | None,
) -> _Roles:
    def one(option: str, name: str | None, *usual: str) -> int | None:
        if name is not None:
            return _find(source, option, name)
        return next((source.names.index(default) for default in usual if default in source.names), None)

    if time is not None and frame is not None:
        raise ValueError(f"time, frame: expected at most one of the two, got {time!r} and {frame!r}")
    times = one("time", time, *TIMES) if frame is None else None
    frames = one("frame", frame, "frame") if times is None else None
    if times is None and frames is None and fps is None:
        raise ValueError(
            f"{source.path}: expected a column of times ({', '.join(TIMES)}; --time NAME) or of frame numbers (frame; "
            f"--frame NAME), or the rate of the rows (--fps), got none; its columns are {first_few(source.names, 12)}"
        )
    if targets is None:
        targets = [name for name in USUAL if name in source.names]
        if not targets:
            raise ValueError(
                "targets: expected the columns to be estimated (--targets NAME,NAME), got none, nor columns valence and arousal; "
                f"{source.path} has {first_few(source.names, 12)}"
            )
    if targets:
        make_targets([(name, (-1.0, 1.0)) for name in targets], "targets")
        header_targets(",".join(targets), "targets: expected names that are no")
    if groups is None:
        groups = ["group"] if "group" in source.names else []
    roles = _Roles(
        one("video", video, "video"), times, frames, [_find(source, "targets", name) for name in targets],
        [_find(source, "group", name) for name in groups], one("split", split, "split"),
        None if fps is None else float(fps), {},
    )  # fmt: skip
    singles = (("time", roles.time), ("frame", roles.frame), ("split", roles.split), ("video", roles.video))
    several = [("target", k) for k in roles.targets] + [("group", k) for k in roles.groups if k != roles.video]
    for what, number in (*singles, *several):
        if number is not None and roles.of.setdefault(number, what) != what:
            name = shown(source.names[number])
            raise ValueError(f"{what}: expected a column that is nothing else, got {name}, the {roles.of[number]} too")
    if len(set(roles.groups)) != len(roles.groups):
        raise ValueError(f"group: expected different columns, got {', '.join(map(shown, groups))}")
    return roles


def _beginnings(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _take_quality(source: Source, roles: _Roles, quality: Mapping[str, str | Sequence[str]]) -> None:
    """Gives the columns that begin so, and are nothing else yet, to a modality as its quality."""
    free = {k: name for k, name in enumerate(source.names) if name and k not in roles.of}
    for modality, words in quality.items():
        begin = _beginnings(words)
        numbers = [k for k, name in free.items() if name.startswith(tuple(begin))] if all(begin) else []
        if not numbers:
            said, others = " or ".join(map(repr, begin)), first_few(list(free.values()), 12)
            raise ValueError(
                f"quality: {modality!r:.60}: expected columns that begin with {said}, got none among {others}"
            )
        for k in numbers:
            if roles.of.setdefault(k, f"quality of {modality}") != f"quality of {modality}":
                name = shown(source.names[k])
                raise ValueError(
                    f"quality: expected a column of one modality, got {name} in {modality}, the {roles.of[k]} too"
                )
        roles.quality[modality] = numbers


@dataclass
class _Wanted:
    """The columns that may be features."""

    modalities: dict[str, list[int]]
    exact: set[int]  # named one by one: they must be numbers
    words: Mapping[
        str, Sequence[str]
    ]  # modality -> what the caller named its columns by; empty: the columns' own names say

    @property
    def chosen(self) -> bool:
        return bool(self.words)


def _wanted(
    source: Source,
    roles: _Roles,
    modalities: Mapping[str, str | Sequence[str]] | Sequence[str] | None,
    columns: Mapping[str, Sequence[str]] | None,
) -> _Wanted:
    free = {k: name for k, name in enumerate(source.names) if name and k not in roles.of}
    found: dict[str, list[int]] = {}
    if modalities is None and columns is None:
        for k, name in free.items():
            part = _part(name)
            if part is not None:
                found.setdefault(part, []).append(k)
        return _Wanted(found, set(), {})
    if isinstance(modalities, str):
        raise TypeError(f"modalities: expected a mapping or a sequence of names, got the string {modalities!r}")
    what = "modalities" if columns is None else "columns"
    given: Mapping[str, str | Sequence[str]] = columns or {}
    if isinstance(modalities, Mapping):
        given = modalities
    elif modalities is not None:
        given = {name: [name + mark for mark in SEPARATORS] for name in modalities}
    if not 1 <= len(given) <= MAX_MODALITIES:
        raise ValueError(f"{what}: expected 1 to {MAX_MODALITIES} modalities, got {len(given)}")
    exact: set[int] = set()
    home: dict[int, str] = {}
    asked: dict[str, Sequence[str]] = {}
    for modality, words in given.items():
        _check_modality(modality)
        words = (words,) if isinstance(words, str) and columns is None else words
        if isinstance(words, str) or not words or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"{what}: {modality!r:.60}: expected a list of names, got {words!r:.60}")
        numbers: list[int] = []
        asked[modality] = words
        for word in words:
            if columns is not None and word in source.names:
                number = source.names.index(word)
                if number in roles.of:
                    raise ValueError(
                        f"columns: {modality!r:.60}: expected features, got {shown(word)}, the {roles.of[number]}"
                    )
                exact.add(number)
                numbers.append(number)
                continue
            pattern = word if columns is not None else glob.escape(word) + "*"
            matching = [k for k, name in free.items() if fnmatch.fnmatchcase(name, pattern)]
            if columns is not None and not matching:
                _find(source, f"columns: {modality!r:.60}", word)
            numbers += matching
        if not numbers:
            said, others = " or ".join(map(repr, words)), first_few(list(free.values()), 12)
            raise ValueError(
                f"modalities: {modality!r:.60}: expected columns that begin with {said}, got none among {others}"
            )
        found[modality] = list(dict.fromkeys(numbers))
        for number in found[modality]:
            if home.setdefault(number, modality) != modality:
                name = shown(source.names[number])
                raise ValueError(
                    f"{what}: expected a column in one modality, got {name} in {home[number]} and {modality}"
                )
    return _Wanted(found, exact, asked)


def _part(name: str) -> str | None:
    """Of a column's name, what comes before the first separator."""
    ends = [at for mark in SEPARATORS if (at := name.find(mark)) >= 0]
    return name[: min(ends)] if ends and min(ends) > 0 else None


def _check_file_name(what: str, name: str) -> None:
    """What becomes the name of a file, and what the reader must not take for something else."""
    safe = name.isprintable() and name == name.strip() and name and not set(name) & set('/\\,"') and name[0] != "."
    if not safe or len(name.encode()) > 180:
        raise ValueError(
            f"{what}: expected a name that a file can have (printable, without slash, comma and double quote, not beginning "
            f"with a point, at most 180 bytes), got {name[:60]!r}"
        )


def _check_video(name: str, source: Source, column: int | None) -> None:
    where = f"{source.path}: {'its name' if column is None else shown(source.names[column])}"
    _check_file_name(where, name)
    if bare_name(name) != name or name.endswith((".mask", ".quality")):
        raise ValueError(
            f"{where}: expected names of videos that end neither in _left or _right (persons of one video, to the reader) nor in "
            f".mask or .quality, got {name!r:.60}: rename it"
        )


def _check_modality(name: str) -> None:
    _check_file_name("modalities", name)
    if name.startswith("__"):
        raise ValueError(
            f"modalities: expected names that do not begin with __ (the reader passes such folders by), got {name!r:.60}"
        )


# ------------------------------------------------------------------------------------------------------------- one pass
@dataclass
class _Read:
    """The table in memory."""

    lines: np.ndarray  # of the file, one a row
    videos: Videos
    clock: Times | None
    targets: list[Numbers]
    features: dict[int, Numbers]  # and quality
    groups: list[PerVideo]
    split: PerVideo | None
    others: list[PerVideo]  # columns without another role that say one thing of each video

    def __len__(self) -> int:
        return len(self.lines)

    def says(self, column: PerVideo, video: str) -> str:
        return column.said[self.videos.names[video]]


def _read(source: Source, roles: _Roles, wanted: _Wanted) -> _Read:
    videos = Videos(source, roles.video)
    clock_column = roles.time if roles.time is not None else roles.frame
    clock = None if clock_column is None else Times(source, clock_column, whole=roles.frame is not None)
    targets = [Numbers(source, k, "d", strict=True) for k in roles.targets]
    features = {
        k: Numbers(source, k, "f", strict=k in wanted.exact) for numbers in wanted.modalities.values() for k in numbers
    }
    features |= {k: Numbers(source, k, "f", strict=True) for numbers in roles.quality.values() for k in numbers}
    groups = [PerVideo(source, k, "group") for k in roles.groups]
    split = None if roles.split is None else PerVideo(source, roles.split, "split")
    others = [
        PerVideo(source, k, None)
        for k, name in enumerate(source.names)
        if name and k not in roles.of and not (wanted.chosen and k in features)
    ]
    numbers = [*targets, *features.values(), *([] if clock is None else [clock])]
    lines = array("q")
    for chunk in source.chunks():
        lines.extend(chunk.lines)
        codes = videos.add(chunk)
        for column in numbers:
            column.add(chunk)
        for constant in (*groups, *others, *([] if split is None else [split])):
            constant.add(chunk, codes)
        others = [column for column in others if not column.dropped]
        numbers = [column for column in numbers if not column.is_text]
    if not lines:
        raise ValueError(f"{source.path}: expected rows below the header, got none")
    return _Read(np.frombuffer(lines, np.int64), videos, clock, targets, features, groups, split, others)


# ----------------------------------------------------------------------------------------------------------- what is made
@dataclass
class _Video:
    """A video of the table on its grid of frames."""

    name: str
    rows: np.ndarray  # of the table, in order
    frames: np.ndarray  # (0-based) of each of these rows

    @property
    def length(self) -> int:
        return int(self.frames[-1]) + 1


@dataclass
class _Part:
    """A video of the data set: frames `start` to `stop` - 1 of a video of the table."""

    name: str
    split: str
    video: _Video
    start: int
    stop: int

    def __post_init__(self) -> None:
        first, last = np.searchsorted(self.video.frames, (self.start, self.stop))
        self.rows = self.video.rows[first:last]  # of the table, in order
        self.frames = self.video.frames[first:last] - self.start

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class _Target:
    name: str
    values: np.ndarray  # float64, a number a row of the table
    low: float
    high: float
    source: str  # of the range, as in ImportedTarget


class _Import:
    """The table read, and step by step what the data set will hold."""

    def __init__(self, source: Source, roles: _Roles, wanted: _Wanted, read: _Read) -> None:
        self.source, self.roles, self.wanted, self.read = source, roles, wanted, read
        self.notes: list[str] = []
        self.ignored: dict[str, str] = {}

    def make(self, ranges: Mapping[str, Sequence[float]], pieces: int, unlabelled: Targets | None) -> None:
        self.unlabelled = unlabelled is not None
        self.modalities = self._kept()
        self.targets = self._ranged(ranges) if unlabelled is None else [self._of_model(target) for target in unlabelled]
        self.valid = np.all([~np.isnan(target.values) for target in self.targets], axis=0)
        self.videos, self.fps = self._on_the_grid()
        self.parts = self._split_up(pieces)
        self.groupings = self._grouped(pieces)
        for name in self.groupings:
            self.ignored.pop(name, None)

    def name(self, column: int) -> str:
        return self.source.names[column]

    def where(self, row: int, column: str) -> str:
        return f"{self.source.where(int(self.read.lines[row]))}: {shown(column)}"

    # --------------------------------------------------------------------------------------------------- modalities
    def _kept(self) -> dict[str, list[int]]:
        """Modalities of the columns that are numbers; why each other column is ignored goes to `ignored`."""
        chosen, found = self.wanted.chosen, dict[str, list[int]]()
        identities = {c.column for c in self.read.others if c.column in self.read.features and self._tells_apart(c)}
        if identities:
            said = first_few([self.name(k) for k in sorted(identities)], 12)
            self.notes.append(f"one value in every video and not the same in all, so groupings and no inputs: {said}")
        for modality, numbers in self.wanted.modalities.items():
            for k in numbers:
                column = self.read.features[k]
                if column.found and not column.is_text:
                    if k not in identities:
                        found.setdefault(modality, []).append(k)
                    continue
                self.ignored[column.name] = why = "not numbers" if column.is_text else "without any number"
                if k in self.wanted.exact:
                    where = f"{self.source.path}: {shown(column.name)}"
                    raise ValueError(f"{where}: expected a column of numbers, got one {why}")
            if chosen and modality not in found:
                raise ValueError(f"modalities: {modality!r:.60}: expected columns of numbers, got none")
        if not 1 <= len(found) <= MAX_MODALITIES:
            counts = [f"{name} ({counted(len(numbers), 'column')})" for name, numbers in found.items()]
            raise ValueError(
                f"modalities: expected 1 to {MAX_MODALITIES} in {self.source.path}, got {len(found)}"
                f"{': ' if counts else ''}{first_few(counts, 12)}. A column's modality is what its name says before the first _, "
                ". or :. Choose with --modalities NAME,NAME, join with --modalities NAME=PREFIX+PREFIX, or list with --map FILE"
            )
        taken = {k for numbers in found.values() for k in numbers} | identities
        for k, name in enumerate(self.source.names):
            if k not in taken and k not in self.roles.of and name not in self.ignored:
                plain = "without _, . or : in the name" if name else "without a name"
                self.ignored[name] = "in no modality" if chosen else plain
        if not chosen:
            self.notes.append(
                "modalities are what the names of the columns say before the first _, . or :; --modalities chooses"
            )
        for modality, numbers in found.items():
            _check_modality(modality)
            words = sorted({part for k in numbers if (part := _part(self.name(k))) is not None})
            if chosen and not self.wanted.exact and len(words) > len(self.wanted.words[modality]):
                self.notes.append(f"{modality}: its columns begin with {first_few(words, 8)}: is that meant?")
        for modality in self.roles.quality:
            if modality not in found:
                raise ValueError(f"quality: expected modalities ({first_few(list(found), 12)}), got {modality!r:.60}")
        return found

    def _tells_apart(self, column: PerVideo) -> bool:
        """It says one thing of each video and not the same of all: it names something of them, and measures nothing."""
        return len(set(column.said.values())) > 1

    # ------------------------------------------------------------------------------------------------------ targets
    def _ranged(self, asked: Mapping[str, Sequence[float]]) -> list[_Target]:
        names = [column.name for column in self.read.targets]
        for name in asked:
            if name not in names:
                raise ValueError(f"ranges: expected targets ({', '.join(names)}), got {name[:60]!r}")
        return [self._with_range(column, asked.get(column.name)) for column in self.read.targets]

    def _of_model(self, target: Target) -> _Target:
        """A target of a model that is to predict: its labels where the table has them."""
        column = next((column for column in self.read.targets if column.name == target.name), None)
        if column is not None and not np.isnan(column.values).all():
            return self._with_range(column, (target.low, target.high))
        return _Target(target.name, np.full(len(self.read), np.nan), target.low, target.high, "the model's")

    def _with_range(self, column: Numbers, asked: Sequence[float] | None) -> _Target:
        name, values, source = column.name, column.values, "of the table" if asked is None else "asked for"
        where = f"{self.source.path}: {shown(name)}"
        ends = None if asked is None else make_targets([(name, list(asked))], "ranges")[0][1:]
        usual = ends or USUAL.get(name)
        if name in USUAL and usual is not None and not usual[0] <= INVALID <= usual[1]:
            marked = values == INVALID
            rest = values[~marked & ~np.isnan(values)]
            if marked.any() and len(rest) and usual[0] <= rest.min() and rest.max() <= usual[1]:
                rows = counted(int(marked.sum()), "row")
                self.notes.append(f"{name}: {rows} of -5, Aff-Wild2's mark: taken as not annotated")
                values = np.where(marked, np.nan, values)
        known = values[~np.isnan(values)]
        if not len(known):
            raise ValueError(f"{where}: expected rows that are annotated, got none")
        least, most = float(known.min()), float(known.max())
        if ends is None and usual is not None and usual[0] <= least and most <= usual[1]:
            ends, source = usual, "usual"
        if ends is None and least == most:
            raise ValueError(
                f"{where}: expected a target that varies, or its range (--range {name}=LOW:HIGH), got {least:g} in all rows"
            )
        low, high = ends or (least, most)
        if least < low or most > high:
            row = int(np.argmax((values < low) | (values > high)))
            raise ValueError(
                f"{self.where(row, name)}: expected a value in [{low:g}, {high:g}], got {values[row]:g}; "
                f"--range {name}=LOW:HIGH says another"
            )
        return _Target(name, values, low, high, source)

    # ---------------------------------------------------------------------------------------------------- time grid
    def _on_the_grid(self) -> tuple[list[_Video], float]:
        codes, names = np.frombuffer(self.read.videos.codes, np.int32), self.read.videos.names
        order = np.argsort(codes, kind="stable")
        borders = np.searchsorted(codes[order], np.arange(len(names) + 1))
        rows = {name: order[borders[code] : borders[code + 1]] for name, code in names.items()}
        clock, fps = self.read.clock, self.roles.fps
        if clock is None:
            assert fps is not None
            return [_Video(name, at, np.arange(len(at))) for name, at in rows.items()], fps
        steps = np.concatenate([self._steps(clock, name, at) for name, at in rows.items()])
        if clock.whole:
            if fps is None:
                fps = FPS
                self.notes.append("frames are numbered, not timed: taken as 30 a second; --fps says another rate")
            begun = {name: clock.values[at] - clock.values[at[0]] for name, at in rows.items()}
            videos = [_Video(name, at, begun[name].astype(np.int64)) for name, at in rows.items()]
        else:
            if fps is None and not len(steps):
                raise ValueError(f"fps: expected the rate, as no video of {self.source.path} has two rows, got none")
            fps, videos = self._fitted(clock, self._rates(clock, steps) if fps is None else [fps], rows)
        self._note_gaps(clock, videos, fps)
        return videos, fps

    def _steps(self, clock: Times, name: str, at: np.ndarray) -> np.ndarray:
        """From each row of a video to its next, all positive."""
        with np.errstate(over="ignore"):
            step = np.diff(clock.values[at])
        if (step <= 0).any():
            index, noun = int(np.argmax(step <= 0)), "frame" if clock.whole else "time"
            before = self.source.where(int(self.read.lines[at[index]]))
            back = f"{counted(int(-step[index]), 'frame')}" if clock.whole else f"{-step[index]:.6g} s"
            hint = "; does the table hold several videos (--video NAME)?" if self.roles.video is None else ""
            raise ValueError(
                f"{self.where(at[index + 1], clock.name)}: expected a later {noun} than that of the row before it in video "
                f"{name[:60]!r} ({before}), got {'the same' if step[index] == 0 else f'one {back} earlier'}{hint}"
            )
        return step

    def _rates(self, clock: Times, steps: np.ndarray) -> list[float]:
        """What the rate may be, the likeliest first. The median step says which steps are of one frame; their mean is finer
        than it where times are rounded (0.033, 0.067, 0.1). A rate, or a frame's length, that is nearly whole is whole, as
        is 1.001 times a rate of television."""
        median = float(np.median(steps))
        if not _RATES[0] <= 1 / median <= _RATES[1]:
            where = f"{self.source.path}: {shown(clock.name)}"
            raise ValueError(f"{where}: expected {_RATES[0]:g} to {_RATES[1]:g} frames a second, got {1 / median:g}")
        fine = 1 / float(steps[(steps > median / 2) & (steps < 1.5 * median)].mean())
        likely = (round(fine), 1 / max(round(1 / fine), 1), round(fine * 1.001) * 1000 / 1001 if fine < 200 else 0)
        whole = [float(rate) for rate in likely if rate > 0 and abs(rate / fine - 1) < 1e-4]
        return [*whole, fine, 1 / median]

    def _fitted(
        self, clock: Times, rates: Sequence[float], rows: Mapping[str, np.ndarray]
    ) -> tuple[float, list[_Video]]:
        """The first rate on whose grid every time lies. ValueError for the first line beside that of the first rate."""
        faults: list[str] = []
        for fps in rates:
            videos: list[_Video] = []
            for name, at in rows.items():
                with np.errstate(over="ignore", invalid="ignore"):
                    place = (clock.values[at] - clock.values[at[0]]) * fps
                    frames = np.rint(place)
                    beside = ~((np.abs(place - frames) <= TOLERANCE) & (place < 2**52))
                    twice = np.concatenate([[False], np.diff(frames) < 1])
                if (beside | twice).any():
                    index = int(np.argmax(beside | twice))
                    where, grid = self.where(at[index], clock.name), f"a grid of {_rate(fps)}"
                    got = f"{place[index]:.6g} frames after it"
                    if not beside[index]:
                        got += f", where {self.source.where(int(self.read.lines[at[index - 1]]))} is already"
                    faults.append(
                        f"{where}: expected a time within a quarter of a frame of {grid} from the first row of video "
                        f"{name[:60]!r}, got {got}; say the rate with --fps, or resample the table to one"
                    )
                    break
                videos.append(_Video(name, at, frames.astype(np.int64)))
            else:
                return fps, videos
        raise ValueError(faults[0])

    def _note_gaps(self, clock: Times, videos: Sequence[_Video], fps: float) -> None:
        frames = places = total = 0
        for video in videos:
            gaps = np.diff(video.frames) - 1
            frames, places, total = frames + int(gaps.sum()), places + int((gaps > 0).sum()), total + video.length
            if frames > MOST_GAPS:
                index = int(np.argmax(gaps))
                where = self.where(video.rows[index + 1], clock.name)
                raise ValueError(
                    f"{where}: expected gaps of together at most {MOST_GAPS:,} frames, got {gaps[index]:,} after the row "
                    f"before it of video {video.name[:60]!r}, at {_rate(fps)}"
                )
        if frames:
            doubt = "; that is more than there are rows: is the rate right?" if 2 * frames > total else ""
            self.notes.append(
                f"{counted(places, 'gap')} between rows, of {counted(frames, 'frame')} ({_share(frames, total)}), which are "
                f"missing and not annotated{doubt}"
            )

    # ------------------------------------------------------------------------------------- splits, pieces, groupings
    def _split_up(self, pieces: int) -> list[_Part]:
        first = self.read.groups[0] if self.read.groups else None
        group = {v.name: v.name if first is None else self.read.says(first, v.name) for v in self.videos}
        if self.unlabelled:
            split = {video.name: "test" for video in self.videos}
        elif self.read.split is None:
            split = self._divided(self.videos, group, "no column of splits")
        else:
            split = self._said_splits(self.read.split, group)
            if "validation" not in split.values():
                train = [video for video in self.videos if split[video.name] == "train"]
                split |= self._divided(train, group, "no validation in the column of splits")
        parts = [part for video in self.videos for part in self._parts(video, split[video.name], pieces)]
        self.cut = _CUT in split.values()
        if self.cut:
            first_part = f"{_first_pieces(pieces)} of {pieces} pieces" if pieces > 1 else "four fifths"
            self.notes.append(
                f"one group only, so its videos are cut in time: of each the first {first_part} train, the rest validates. "
                "Frames on the two sides of a cut resemble each other: the validation score flatters"
            )
        if pieces > 1:
            self.notes.append(
                "neighbouring pieces of a video resemble each other: to train on one and be scored on the next flatters"
            )
        names: set[str] = set()
        for part in parts:
            if part.name in names:
                raise ValueError(
                    f"{self.source.path}: expected videos and parts of different names, got {part.name[:60]!r} twice"
                )
            names.add(part.name)
        for wanted in () if self.unlabelled else ("train", "validation"):
            if not any(bool(self.valid[part.rows].any()) for part in parts if part.split == wanted):
                raise ValueError(
                    f"{self.source.path}: expected frames in the {wanted} split that are annotated with all targets, got none: "
                    "--split or --group says how to divide the videos"
                )
        return parts

    def _said_splits(self, column: PerVideo, group: Mapping[str, str]) -> dict[str, str]:
        split: dict[str, str] = {}
        of_group: dict[str, tuple[str, int]] = {}
        for video in self.videos:
            code = self.read.videos.names[video.name]
            word, line = column.said[code], column.lines[code]
            where = f"{self.source.where(line)}: {shown(column.name)}"
            if word.lower() not in SPLIT_WORDS:
                raise ValueError(f"{where}: expected train, validation (val, valid, dev) or test, got {word[:60]!r}")
            split[video.name] = SPLIT_WORDS[word.lower()]
            other, before = of_group.setdefault(group[video.name], (split[video.name], line))
            if other != split[video.name]:
                raise ValueError(
                    f"{where}: expected the group {group[video.name][:60]!r} in one split, {other} as in "
                    f"{self.source.where(before)}, got {split[video.name]}"
                )
        if "train" not in split.values():
            raise ValueError(f"{self.source.path}: {shown(column.name)}: expected rows of the train split, got none")
        return split

    def _divided(self, videos: Sequence[_Video], group: Mapping[str, str], why: str) -> dict[str, str]:
        """About a fifth of the groups validates, chosen by a hash of their names; of one group, the end of each video."""
        annotated = {group[video.name] for video in videos if self.valid[video.rows].any()}
        ranked = sorted(annotated, key=lambda name: hashlib.sha256(name.encode()).digest())
        if len(ranked) < 2:
            return {video.name: _CUT if self.valid[video.rows].any() else "train" for video in videos}
        held_out = set(ranked[: max(round(len(ranked) / HELD_OUT), 1)])
        self.notes.append(f"{why}: for validation {len(held_out)} of {len(ranked)} groups, by a hash of their names")
        return {video.name: "validation" if group[video.name] in held_out else "train" for video in videos}

    def _parts(self, video: _Video, split: str, pieces: int) -> list[_Part]:
        name, length = video.name, video.length
        _check_video(name, self.source, self.roles.video)
        if pieces > length:
            raise ValueError(f"pieces: expected at most {length}, the frames of video {name[:60]!r}, got {pieces}")
        if pieces > 1:
            borders = [length * k // pieces for k in range(pieces + 1)]
            names = [f"{name}-p{k + 1:0{max(2, len(str(pieces)))}}" for k in range(pieces)]
            train = _first_pieces(pieces)
        elif split != _CUT:
            return [_Part(name, split, video, 0, length)]
        elif length == 1:
            return [_Part(name, "train", video, 0, length)]
        else:
            borders = [0, min(max(length * (HELD_OUT - 1) // HELD_OUT, 1), length - 1), length]
            names, train = [f"{name}-train", f"{name}-validation"], 1
        splits = (
            ["train" if k < train else "validation" for k in range(len(names))] if split == _CUT else [split] * pieces
        )
        return [_Part(*part) for part in zip(names, splits, [video] * len(names), borders, borders[1:])]

    def _grouped(self, pieces: int) -> dict[str, dict[str, str]]:
        """{grouping: {video: group}} of all that groups the videos into two or more. "group", which is what commands take
        where none is named, is the first one asked for; without one, the video of the table, if several were cut up."""
        found: dict[str, dict[str, str]] = {}

        def add(name: str, group: Callable[[_Part], str]) -> None:
            groups = {part.name: group(part) for part in self.parts}
            sides = {(group, part.split) for group, part in zip(groups.values(), self.parts)}
            torn = self.cut and len(sides) > len(set(groups.values()))  # by us: no grouping to go by
            if name not in found and len(set(groups.values())) > 1 and not torn:
                found[name] = groups

        def says(column: PerVideo) -> Callable[[_Part], str]:
            return lambda part: self.read.says(column, part.video.name)

        if pieces > 1:
            add("piece", lambda part: part.name)
        for column in self.read.groups:
            add(column.name, says(column))
        if self.read.groups:
            add("group", says(self.read.groups[0]))
        for column in self.read.others:
            add(column.name, says(column))
        if self.roles.video is not None:
            add(self.name(self.roles.video), lambda part: part.video.name)
        if len(self.parts) > len(self.videos) > 1:
            add("group", lambda part: part.video.name)
        return found

    # ------------------------------------------------------------------------------------------------------- report
    def report(self, out: Path) -> ImportReport:
        frames = sum(len(part) for part in self.parts)
        modalities = {
            modality: self._counted(modality, numbers, frames) for modality, numbers in self.modalities.items()
        }
        for modality, numbers in self.modalities.items():
            self.notes += self._doubts(modality, numbers)
        splits = {}
        for name in SPLITS:
            parts = [part for part in self.parts if part.split == name]
            if parts:
                annotated = sum(int(self.valid[part.rows].sum()) for part in parts)
                splits[name] = ImportedSplit(len(parts), sum(map(len, parts)), annotated)
        targets = {
            t.name: ImportedTarget(t.low, t.high, t.source, int((~np.isnan(t.values)).sum())) for t in self.targets
        }
        groups = {name: len(set(groups.values())) for name, groups in self.groupings.items()}
        return ImportReport(
            out, self.source.path.name, len(self.read), frames, self.fps, splits, modalities, targets, groups, self.ignored,
            self.notes, {name: [self.name(k) for k in numbers] for name, numbers in self.roles.quality.items()},
        )  # fmt: skip

    def column(self, number: int) -> np.ndarray:
        return self.read.features[number].values

    def _counted(self, modality: str, numbers: Sequence[int], frames: int) -> ImportedModality:
        rows = len(self.read)
        some, every = np.zeros(rows, bool), np.ones(rows, bool)
        for k in numbers:
            absent = np.isnan(self.column(k))
            some |= absent
            every &= absent
        partial = some & ~every
        lost = {k: int((np.isnan(self.column(k)) & partial).sum()) for k in numbers} if partial.any() else {}
        worst = max(lost, key=lost.__getitem__) if lost else None
        if worst is not None:
            said = f"{shown(self.name(worst))} is missing in {lost[worst]:,} of them"
            if some.all():
                raise ValueError(
                    f"{self.source.path}: expected rows with all columns of {modality}, got none, for {said}: leave it out, or "
                    "put it into a modality of its own (--map)"
                )
            self.notes.append(
                f"{modality}: {counted(int(partial.sum()), 'frame')} without it for want of some of its columns only; {said}: in "
                "a modality of its own it would cost less"
            )
        return ImportedModality(
            [self.name(k) for k in numbers], int(some.sum()) + frames - rows, int(partial.sum()),
            None if worst is None else self.name(worst), 0 if worst is None else lost[worst],
        )  # fmt: skip

    def _doubts(self, modality: str, numbers: Sequence[int]) -> Iterator[str]:
        """What can be right and seldom is."""
        spread = {}
        for k in numbers:
            values = self.column(k).astype(np.float64)
            known = ~np.isnan(values)
            spread[k] = float(values[known].std())
            for target in self.targets:
                alike = _correlation(values, target.values, known & ~np.isnan(target.values))
                if abs(alike) > LEAK:
                    yield (
                        f"{modality}: {shown(self.name(k))} is the target {target.name}, or nearly (correlation "
                        f"{alike:.4f}): leave it out if it is not known when the model runs"
                    )
        constant = [self.name(k) for k, value in spread.items() if value == 0]
        if constant:
            yield f"{modality}: constant, so nothing is learnt from: {first_few(constant, 12)}"
        average = sum(spread.values()) / len(spread)
        dead = [self.name(k) for k, value in spread.items() if 0 < value <= DEAD * average]
        if dead:
            yield (
                f"{modality}: a column whose spread is below {DEAD:g} of the modality's mean spread is dead to the model: "
                f"{first_few(dead, 12)}; give it another unit, or a modality of its own"
            )

    # ------------------------------------------------------------------------------------------------------ writing
    def write(self, root: Path) -> list[str]:
        """Writes the data set below `root`; the files' names, in the order of writing."""
        files: list[str] = []

        def place(*names: str) -> Path:
            path = root.joinpath(*names)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append("/".join(names))
            return path

        def save(value: Any, *names: str) -> None:
            place(*names).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

        ranges = {t.name: [_whole(t.low), _whole(t.high)] for t in self.targets}
        save(ranges, "targets.json")
        save(self.fps, "fps.json")
        if self.groupings:
            save(self.groupings, "groups.json")
        header = ",".join(ranges)
        for part in self.parts:
            with open(place("annotations", SPLITS[part.split][0], f"{part.name}.txt"), "x", encoding="utf-8") as text:
                text.write(header + "\n")
                for frames, rows, length in _blocks(part, len(self.targets)):
                    columns = []
                    for target in self.targets:
                        column = np.full(length, np.nan)
                        column[frames] = target.values[rows]
                        columns.append(map(repr, column.tolist()))
                    text.write("".join(f"{row}\n" for row in map(",".join, zip(*columns))))
        for modality, numbers in self.modalities.items():
            quality = self.roles.quality.get(modality, [])
            meta: dict[str, Any] = {"columns": [self.name(k) for k in numbers]}
            if quality:
                meta["quality"] = [self.name(k) for k in quality]
            save({**meta, "about": {"source": self.source.path.name}}, "features", modality, "meta.json")
            for part in self.parts:
                self._write_rows(place("features", modality, f"{part.name}.npy"), part, numbers)
                if quality:
                    self._write_rows(place("features", modality, f"{part.name}.quality.npy"), part, quality)
        return files

    def _write_rows(self, path: Path, part: _Part, numbers: Sequence[int]) -> None:
        """(frames, columns) float32, NaN where the table has no row or no number."""
        with open(path, "xb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(part), len(numbers))}
            np.lib.format.write_array_header_1_0(file, header)
            for frames, rows, length in _blocks(part, len(numbers)):
                block = np.full((length, len(numbers)), np.nan, "<f4")
                for d, k in enumerate(numbers):
                    block[frames, d] = self.column(k)[rows]
                file.write(block.data)


def _first_pieces(pieces: int) -> int:
    """How many train, where the last about a fifth of them validates."""
    return pieces - max(round(pieces / HELD_OUT), 1)


def _correlation(x: np.ndarray, y: np.ndarray, known: np.ndarray) -> float:
    """Pearson's, 0 where it is not defined."""
    if int(known.sum()) < 20:  # fewer may well be on a line
        return 0.0
    x, y = x[known] - x[known].mean(), y[known] - y[known].mean()
    x, y = x / (np.abs(x).max() or 1.0), y / (np.abs(y).max() or 1.0)
    return float((x * y).sum() / (math.sqrt(float((x * x).sum()) * float((y * y).sum())) or 1.0))


# ------------------------------------------------------------------------------------------------------------ the folder
def _blocks(part: _Part, width: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Spans of a part that are written at once: the frames of the rows within (from the span's first one), these rows of
    the table, and the span's length."""
    most = max(_BLOCK // width, 1)
    for start in range(0, len(part), most):
        length = min(most, len(part) - start)
        first, last = np.searchsorted(part.frames, (start, start + length))
        yield part.frames[first:last] - start, part.rows[first:last], length


def _whole(value: float) -> float | int:
    """-1, not -1.0, for people to read."""
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _check_out(root: Path, overwrite: bool) -> None:
    """FileExistsError where `root` holds what must not be lost."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not root.is_dir() or not overwrite:
        hint = "; --overwrite replaces a data set that an import wrote" if (root / MARK).is_file() else ""
        raise FileExistsError(f"out: expected a folder that is empty or new, got {root}, which holds something{hint}")
    try:
        record = json.loads((root / MARK).read_text(encoding="utf-8"))
        ours = {MARK, *record["files"]} if record["what"] == "sage-ext import" else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if not ours:
        raise FileExistsError(
            f"out: expected a folder that an import wrote (--overwrite), got {root}, which has no {MARK} of one"
        )
    folders = {parent.as_posix() for name in ours for parent in Path(name).parents}
    for path in _entries(root):
        name = path.relative_to(root).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if name not in (folders if is_folder else ours) or path.is_symlink():
            raise FileExistsError(
                f"out: expected a folder that holds what an import wrote (--overwrite), got {path} besides"
            )


def _entries(folder: Path) -> Iterable[Path]:
    """All below a folder; links are not followed."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _entries(path)


@contextlib.contextmanager
def _taking_the_place_of(root: Path, overwrite: bool) -> Iterator[Path]:
    """`replacing_folder` that can replace what an import wrote; whatever goes wrong, the old one stands again."""
    old, refused = root.with_name(f".{root.name}.{os.getpid()}.old"), None
    try:
        with replacing_folder(root) as part:
            yield part
            if overwrite and root.exists():
                try:
                    _check_out(root, overwrite)  # once more: reading took a while
                except FileExistsError as error:
                    refused = error
                    raise
                os.rename(root, old)
    except BaseException:
        if old.exists() and not root.exists():
            os.rename(old, root)
        if refused is not None:
            raise refused from None  # `replacing_folder` takes an error without a number for the disk's
        raise
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- the command line
def _words(text: str) -> list[str]:
    """Names separated by commas; one that holds a comma stands in double quotes."""
    names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), []) if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return names


def _modality_words(text: str) -> dict[str, list[str]] | list[str]:
    words = _words(text)
    pairs = [word.partition("=") for word in words]
    if not any(mark for _, mark, _ in pairs):
        return words
    found: dict[str, list[str]] = {}
    for name, mark, begin in pairs:
        prefixes = begin.split("+") if mark else [name + separator for separator in SEPARATORS]
        if not name or not all(prefixes) or name in found:
            raise argparse.ArgumentTypeError(
                f"expected NAME=PREFIX or NAME=PREFIX+PREFIX, each once, separated by commas, got {text!r}"
            )
        found[name] = prefixes
    return found


def _quality_words(text: str) -> dict[str, list[str]]:
    found = _modality_words(text)
    if isinstance(found, list) or not all("=" in word for word in _words(text)):
        raise argparse.ArgumentTypeError(
            f"expected NAME=PREFIX or NAME=PREFIX+PREFIX, each once, separated by commas, got {text!r}"
        )
    return found


def _range_words(text: str) -> tuple[str, tuple[float, float]]:
    name, mark, ends = text.rpartition("=")
    low, _, high = ends.partition(":")
    try:
        if mark and name:
            return name.strip(), (float(low), float(high))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected NAME=LOW:HIGH, got {text!r}")


def _fps_word(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"expected a number of frames a second, as 25, 29.97 or 1/3600, got {text!r}"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sage-ext import`. One that is not given is absent; `run` takes `import_table`'s default."""
    absent = argparse.SUPPRESS
    parser.add_argument("table", metavar="TABLE", help="CSV, TSV or Parquet; a row a frame")
    parser.add_argument("--out", required=True, metavar="DATA", help="a directory that does not exist or is empty")
    parser.add_argument("--targets", type=_words, metavar="A,B", default=absent,
                        help="columns to be estimated (default: valence and arousal, where they are)")  # fmt: skip
    parser.add_argument("--range", type=_range_words, action="append", dest="ranges", metavar="NAME=LOW:HIGH", default=absent,
                        help="range of a target in its own units; once a target (default: -1:1 for valence and arousal, else "
                        "the least and the greatest value)")  # fmt: skip
    parser.add_argument("--modalities", type=_modality_words, metavar="NAME=PREFIX,...", default=absent,
                        help="each modality's columns by the beginning of their names, several joined by +; a NAME alone: those "
                        "that begin with NAME_, NAME. or NAME: (default: every name before the first _ . or :)")  # fmt: skip
    parser.add_argument("--map", metavar="FILE", default=absent,
                        help='JSON {"modality": ["column", ...]}, names or patterns (* ? []), not with --modalities')  # fmt: skip
    parser.add_argument("--quality", type=_quality_words, metavar="NAME=PREFIX,...", default=absent,
                        help="columns that say how good a modality's signal is, by the beginning of their names: its quality, "
                        "no features")  # fmt: skip
    parser.add_argument(
        "--video", metavar="NAME", default=absent, help="column that names each row's video (default: video)"
    )
    parser.add_argument("--time", metavar="NAME", default=absent,
                        help=f"column of times, in seconds or ISO 8601 (default: {', '.join(TIMES)})")  # fmt: skip
    parser.add_argument("--frame", metavar="NAME", default=absent,
                        help="column of frame numbers, where there are no times (default: frame)")  # fmt: skip
    parser.add_argument("--fps", type=_fps_word, metavar="RATE", default=absent,
                        help="frames a second, as 25 or 1/3600 (default: from the times)")  # fmt: skip
    parser.add_argument("--group", type=_words, metavar="A,B", default=absent,
                        help="columns of groups (persons, places); the first one is never split (default: group)")  # fmt: skip
    parser.add_argument("--split", metavar="NAME", default=absent,
                        help="column of train, validation, test (default: split; without, a hash chooses)")  # fmt: skip
    parser.add_argument("--pieces", type=int, metavar="K", default=absent,
                        help="cut each video into K pieces of consecutive time, each a video of its own")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in DATA, if an import wrote it")


def run(args: argparse.Namespace, **more: Any) -> str:
    """The command `sage-ext import`: what it prints. `more`: arguments of `import_table` that are not on the command line."""
    given = {
        name: getattr(args, name)
        for name in (
            "targets",
            "modalities",
            "quality",
            "video",
            "time",
            "frame",
            "fps",
            "group",
            "split",
            "pieces",
            "overwrite",
        )
        if hasattr(args, name)
    }
    if hasattr(args, "ranges"):
        given["ranges"] = dict(args.ranges)
        if len(given["ranges"]) != len(args.ranges):
            raise ValueError(f"--range: expected one a target, got {', '.join(name for name, _ in args.ranges)}")
    if hasattr(args, "map"):
        given["columns"] = read_map(args.map)
    given.update(more)
    return import_table(args.table, args.out, **given).text()


def read_map(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The modalities of a file of --map. ValueError that names it where it is not {"modality": ["column", ...]}."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON, got something else: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON in UTF-8, got what cannot be read: {one_line(error)}") from None
    lists = isinstance(found, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
    )
    if not lists:
        raise ValueError(f'{path}: expected {{"modality": ["column", ...]}}, got {one_line(json.dumps(found), 60)}')
    return found


__all__ = ["ImportReport", "ImportedModality", "ImportedSplit", "ImportedTarget", "import_table"]
