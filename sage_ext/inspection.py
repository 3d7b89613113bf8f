"""`sage-ext check`: what is in a data set, and what is wrong with it. All features are read once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .data.affwild2 import SPLITS, AffWild2, Clip, bare_name, blocks, disagreements, usable_rows
from .data.targets import Targets, unscaled
from .models.sage import DEAD
from .report import BLUE, GREEN, VERMILLION, Picture, Table, new_figure, printable, styled, write_report

BINS = 120  # parts of a video in the picture
SHOWN = 40  # videos in the picture
MOST = 20  # sentences of a kind that are printed


@dataclass
class _Columns:
    """What the present rows of a modality hold, column by column."""

    rows: int = 0
    low: np.ndarray | None = None  # (D,) least and greatest value
    high: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        low, high = rows.min(0).astype(np.float64), rows.max(0).astype(np.float64)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.rows += len(rows)

    @property
    def constant(self) -> int:
        """How many columns never change."""
        return 0 if self.low is None else int((self.low == self.high).sum())

    @property
    def faint(self) -> int:
        """How many change so little beside the others that the model takes them for dead."""
        if self.low is None or self.high is None:
            return 0
        reach = self.high - self.low
        return int(((reach > 0) & (reach <= DEAD * reach.mean())).sum())


@dataclass
class _Known:
    """What the quality of a modality holds in the frames that have the modality, column by column."""

    known: np.ndarray  # (Q,) frames
    low: np.ndarray  # (Q,) least and greatest value, infinite where none is known
    high: np.ndarray
    frames: int = 0

    @classmethod
    def of(cls, columns: int) -> _Known:
        return cls(np.zeros(columns, np.int64), np.full(columns, np.inf), np.full(columns, -np.inf))

    def add(self, clip: Clip, name: str, present: np.ndarray) -> None:
        self.frames += int(present.sum())
        for start, block in blocks(clip.quality[name], clip.num_frames):
            rows = block[present[start : start + len(block)]]
            known = np.isfinite(rows)
            self.known += known.sum(0)
            self.low = np.minimum(self.low, np.where(known, rows, np.inf).min(0, initial=np.inf))
            self.high = np.maximum(self.high, np.where(known, rows, -np.inf).max(0, initial=-np.inf))


@dataclass
class Inspection:
    """What was found."""

    root: Path
    wrong: list[str] = field(default_factory=list)  # costs data or spoils results: exit code 1
    notes: list[str] = field(default_factory=list)  # to look at once
    tables: list[Table] = field(default_factory=list)
    targets: Targets = ()
    modalities: list[str] = field(default_factory=list)
    coverage: list[tuple[str, str, np.ndarray]] = field(default_factory=list)  # (split, video, (M, BINS) share present)
    labels: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # split -> (N, C) annotated frames, in the targets' own units

    def text(self) -> str:
        """For a terminal."""
        parts = [table.text() for table in self.tables]
        for title, found in (("Wrong", self.wrong), ("To look at", self.notes)):
            if found:
                lines = [f"  {printable(text)}" for text in found[:MOST]]
                more = [f"  and {len(found) - MOST} more"] if len(found) > MOST else []
                parts.append("\n".join([f"{title}: {len(found)}", *lines, *more]))
        parts.append(f"{printable(self.root)}: {'something is wrong' if self.wrong else 'nothing is wrong'}")
        return "\n\n".join(parts)


def inspect(root: str | os.PathLike[str], modalities: Sequence[str] | None = None) -> Inspection:
    """Read the whole data set at `root`, whatever is wrong with it. FileNotFoundError where there is none."""
    found = Inspection(Path(root))
    if not found.root.is_dir():
        raise FileNotFoundError(f"data: expected a folder, got {root}")
    splits: dict[str, AffWild2] = {}
    absent = []
    for split in SPLITS:
        try:
            splits[split] = AffWild2(root, split, modalities=modalities, faults=found.wrong)
        except FileNotFoundError as error:
            if split != "test":
                absent.append(f"{split}: {error}")
        except (ValueError, OSError) as error:
            found.wrong.append(f"{split}: {error}")
    if list(splits) == ["test"]:
        found.notes.append("there is a test split alone: data to predict from, not to train on")
    else:
        found.wrong += absent
    columns: dict[tuple[str, str], _Columns] = {}  # (split, modality)
    quality: dict[tuple[str, str], _Known] = {}
    rows = []
    if splits:
        found.targets = next(iter(splits.values())).targets
        found.modalities = list(dict.fromkeys(name for data in splits.values() for name in data.modalities))
        found.wrong += disagreements(splits)
    for split, data in splits.items():
        rows.append(_walk(found, split, data, columns, quality))
        found.wrong += [text for text in data.mismatches if text not in data.slight]
        found.notes += data.slight
    if splits:
        missing = [f"{name} missing" for name in found.modalities]
        header = ("", "videos", "frames", "hours", "frames a second", "annotated", *missing)
        found.tables.append(Table(f"Data set {root}", header, rows))
        found.tables.append(_features(found, columns))
        found.tables += _quality(found, splits, quality)
        found.tables += _targets(found)
        _across(found, splits)
    found.wrong, found.notes = (list(dict.fromkeys(texts)) for texts in (found.wrong, found.notes))
    return found


def _walk(
    found: Inspection,
    split: str,
    data: AffWild2,
    columns: dict[tuple[str, str], _Columns],
    quality: dict[tuple[str, str], _Known],
) -> list[Any]:
    """Every clip of a split; the split's row of the table."""
    names = found.modalities
    comparable = data.targets == found.targets or data.sample_file is not None
    frames = annotated = 0
    seconds, missing, labels = 0.0, np.zeros(len(names)), []
    for clip in data:
        frames, seconds = frames + clip.num_frames, seconds + clip.num_frames / clip.fps
        annotated += int(clip.valid.sum())
        if clip.labels is not None and comparable:
            labels.append(unscaled(clip.labels[clip.valid].astype(np.float64), data.targets))
        if clip.labels is not None and not clip.valid.any():
            found.notes.append(f"{clip.name}: no frame is annotated")
        cover = np.zeros((len(names), BINS))
        for m, name in enumerate(names):
            present = np.zeros(clip.num_frames, bool)
            if name in clip.features:
                present = _modality(found, clip, name, columns.setdefault((split, name), _Columns()))
            if name in clip.quality:
                quality.setdefault((split, name), _Known.of(data.quality_dims[name])).add(clip, name, present)
            missing[m] += (~present).sum()
            edges = np.linspace(0, clip.num_frames, BINS + 1).astype(int)
            low, high = edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)  # a frame at least
            total = np.concatenate([[0], np.cumsum(present)])
            cover[m] = (total[high] - total[low]) / (high - low)
        found.coverage.append((split, clip.name, cover))
    if labels:
        found.labels[split] = np.concatenate(labels)
    if len(data) and split != "test" and not annotated:
        found.wrong.append(f"{split}: no frame is annotated with all targets")
    rates = sorted({data.fps(name) for name in data.names})
    if rates and rates[-1] > 1.2 * rates[0]:
        found.notes.append(
            f"{split}: frames a second from {rates[0]:g} to {rates[-1]:g}: spans of time are those of {data.frame_rate:g}"
        )
    rate = "-" if not rates else f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    share = "-" if split == "test" and not annotated else f"{annotated / max(frames, 1):.1%}"
    gone = [f"{count / max(frames, 1):.1%}" for count in missing]
    return [split, len(data), f"{frames:,}", f"{seconds / 3600:.2f}", rate, share, *gone]


def _modality(found: Inspection, clip: Clip, name: str, columns: _Columns) -> np.ndarray:
    """(T,) bool: where the clip has the modality. What its rows hold goes into `columns`."""
    declared = getattr(clip.present, "declared", clip.present)[name]
    present = np.zeros(clip.num_frames, bool)
    infinite: int | None = None
    own = _Columns()
    for start, block in blocks(clip.features[name], clip.num_frames):
        here, bad = usable_rows(block, declared[start : start + len(block)])
        if bad.any() and infinite is None:
            infinite = start + int(np.argmax(bad))
        present[start : start + len(block)] = here
        own.add(block[here])
    if infinite is not None:
        found.wrong.append(
            f"{clip.name}: {name}: infinity in row {infinite} (0-based): such rows count as missing; write NaN"
        )
    if own.low is not None and own.high is not None:
        columns.add(own.low[None])
        columns.add(own.high[None])
        columns.rows += own.rows - 2
        if own.rows > 1 and own.constant == len(own.low):
            what = "zeros" if not own.low.any() else "the same numbers"
            found.wrong.append(f"{clip.name}: {name}: {what} in all {own.rows} frames; write NaN where it is missing")
    return present


def _features(found: Inspection, columns: dict[tuple[str, str], _Columns]) -> Table:
    rows = []
    for name in found.modalities:
        train = columns.get(("train", name), _Columns())
        size = 0 if train.low is None else len(train.low)
        ends = "-" if train.low is None or train.high is None else f"{train.low.min():.4g} to {train.high.max():.4g}"
        rows.append([name, size, train.constant, f"{train.rows:,}", ends])
        if size and train.constant == size:
            found.wrong.append(f"{name}: none of its {size} features ever changes in the training split")
        elif train.constant:
            found.notes.append(
                f"{name}: {train.constant} of {size} features never change in the training split: they are not used"
            )
        if train.faint:
            found.notes.append(
                f"{name}: {train.faint} of {size} features move less than {DEAD:g} of what the others do on average: the model "
                "takes them for dead; write them in units in which they move as much"
            )
    header = ("", "features", "constant", "frames with it", "values from to")
    return Table("Features of the training split", header, rows)


def _quality(found: Inspection, splits: dict[str, AffWild2], quality: dict[tuple[str, str], _Known]) -> list[Table]:
    """How much of the quality is known where the modality is, a row a column of it."""
    rows = []
    for name in found.modalities:
        for split, data in splits.items():
            if (split, name) not in quality:
                continue
            columns = data.quality_columns.get(name) or [f"column {q}" for q in range(data.quality_dims[name])]
            seen = quality[split, name]
            still, unknown = [], []
            for q, column in enumerate(columns):
                known, low, high = seen.known[q], seen.low[q], seen.high[q]
                ends = f"{low:.4g} to {high:.4g}" if known else "-"
                rows.append([f"{name}: {column}, {split}", f"{known / max(seen.frames, 1):.1%}", ends])
                if not known:
                    unknown.append(column)
                elif low == high:
                    still.append(column)
            if split == "train" and still:
                found.notes.append(f"{name}: quality that never varies in the training split: {', '.join(still)}")
            if split == "train" and unknown:
                found.notes.append(f"{name}: quality that is unknown in the whole training split: {', '.join(unknown)}")
    header = ("", "known", "values from to")
    return [Table("Quality, frames that have the modality", header, rows)] if rows else []


def _targets(found: Inspection) -> list[Table]:
    rows = []
    for c, target in enumerate(found.targets):
        for split, values in found.labels.items():
            column = values[:, c]
            if not len(column):
                continue
            low, high = float(column.min()), float(column.max())
            rows.append([
                f"{target.name}, {split}", f"{target.low:g} to {target.high:g}", f"{low:.4g} to {high:.4g}",
                f"{column.mean():.4g}", f"{column.std():.4g}",
            ])  # fmt: skip
            if low == high:
                found.wrong.append(f"{target.name}: {low:g} in every annotated frame of the {split} split")
            elif high - low < 0.1 * (target.high - target.low):
                found.notes.append(
                    f"{target.name}: the {split} split uses {low:.4g} to {high:.4g} of the range [{target.low:g}, "
                    f"{target.high:g}]: state a range of about what occurs (targets.json)"
                )
    return (
        [Table("Targets, annotated frames", ("", "range", "values from to", "mean", "deviation"), rows)] if rows else []
    )


def _across(found: Inspection, splits: dict[str, AffWild2]) -> None:
    """What is on more than one side of the splits."""
    groupings = {"video": {name: bare_name(name) for data in splits.values() for name in data.names}}
    first = next(iter(splits.values()))
    for grouping in first.groupings:
        groupings[grouping] = {name: data.group(name, grouping) for data in splits.values() for name in data.names}
    for grouping, groups in groupings.items():
        sides: dict[str, set[str]] = {}
        for split, data in splits.items():
            for name in data.names:
                sides.setdefault(groups[name], set()).add(split)
        torn = sorted(group for group, where in sides.items() if len(where) > 1)
        if torn:
            text = f"{grouping}: {len(torn)} in more than one split, the first is {torn[0]}"
            serious = grouping in ("video", "group")
            (found.wrong if serious else found.notes).append(text + (": the score flatters" if serious else ""))


# ------------------------------------------------------------------------------------------------------------- picture
def write_inspection(found: Inspection, folder: str | os.PathLike[str]) -> Path:
    """report.html and its picture into `folder`; returns the page's path."""
    texts = [
        Table(title, ("",), [[text] for text in texts], f"{len(texts)} in all.")
        for title, texts in (("Wrong", found.wrong), ("To look at", found.notes))
        if texts
    ]
    pictures = []
    if found.coverage:
        caption = (
            "Each row is a video from its beginning to its end, and dark where a modality is there; below, the values of "
            "the targets."
        )
        pictures = [Picture("check", caption, plot_inspection(found))]
    return write_report(folder, f"Data set {found.root}", pictures, [*texts, *found.tables])


@styled
def plot_inspection(found: Inspection) -> Any:
    """Where each modality is there, a row a video, and how the targets are distributed."""
    shown = found.coverage
    if len(shown) > SHOWN:  # evenly of all
        shown = [shown[i] for i in np.linspace(0, len(shown) - 1, SHOWN).astype(int)]
    columns = max(len(found.modalities), min(len(found.targets), 4), 1)
    figure, axes = new_figure(
        3.2 * columns + 1.2, 0.16 * len(shown) + 4, 2, columns,
        gridspec_kw={"height_ratios": [0.16 * len(shown) + 1, 2.2]},
    )  # fmt: skip
    for m, axis in enumerate(axes[0]):
        if m >= len(found.modalities):
            axis.set_visible(False)
            continue
        axis.imshow(np.stack([cover[m] for _, _, cover in shown]), aspect="auto", cmap="Blues", vmin=-0.15, vmax=1,
                    interpolation="nearest", extent=(0, 1, len(shown), 0))  # fmt: skip
        axis.set(title=printable(found.modalities[m]), xlabel="from a video's beginning to its end", xticks=(0, 0.5, 1))
        names = [f"{printable(name)} ({split[:5]})" for split, name, _ in shown] if m == 0 else []
        axis.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6)
        axis.grid(False)
    colors = {"train": BLUE, "validation": VERMILLION, "test": GREEN}
    for c, axis in enumerate(axes[1]):
        if c >= len(found.targets):
            axis.set_visible(False)
            continue
        target = found.targets[c]
        edges = np.linspace(target.low, target.high, 41)
        for split, values in found.labels.items():
            if len(values):
                share = np.histogram(values[:, c], edges)[0] / len(values)
                axis.stairs(share, edges, color=colors[split], label=split, linewidth=1.5)
        axis.set(
            title=printable(target.name), ylabel="share of frames" if c == 0 else "", xlim=(target.low, target.high)
        )
        if c == 0 and found.labels:
            axis.legend()
    return figure


__all__ = ["Inspection", "inspect", "plot_inspection", "write_inspection"]
