"""What a study is asked for, which data answer it, and where its files lie.

OUT/study.json                                what was asked for; a study is continued only with the same
OUT/data/                                     synthetic data made here, or a view of other data (see `Study`)
OUT/fold-<k>/                                 with folds: the view of the data that fold k is trained on and scored with
OUT/runs/<method>/seed-<s>-lr-<rate>/         an ordinary run directory each, and result.json when it is finished
OUT/evaluations/seed-<s>/<condition>.npz      moments of every video under one condition, all methods
OUT/results.csv, report.md, report.html, *.png

With folds the directories of runs and evaluations are named fold-<k>-seed-<s>...
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._arguments import check_int
from ..data.affwild2 import SAMPLE, SPLITS, AffWild2, Clip, annotation_folder, disagreements
from ..data.synthetic import TruthClips, has_truth, write_dataset
from ..files import replacing_folder
from ..training.trainer import RunError, TrainConfig, data_shape
from .corruptions import Condition
from .methods import find

CLEAN = "clean"  # the condition in which nothing fails
TRUTH = "truth"  # for the split of a `Part`
VIEW = "view.txt"  # marks a data set of links that a study made
TRAIN, VALIDATION, TEST = (SPLITS[split][0] for split in ("train", "validation", "test"))
DATA = {"seed": 1, "train": 160, "validation": 32, "test": 48, "frames": (250, 900)}  # synthesised where none are given
HELD_OUT = 5  # of data without truth, one training video in so many is the validation split


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how.

    On synthetic data (root has truth/ and a test split) the score is on the test split with the labels that only the
    synthesiser knows, choices are made on the validation split. On any other data in the Aff-Wild2 layout the score is
    on the validation split, and a fifth of the training *videos*, chosen by a hash of their names, takes its place in
    all choices: OUT/data is that view of the data set, made of links.

    With `folds` the groups of all annotated videos are dealt into so many folds, of about as many frames. Every fold is
    scored once, by models that were trained on the others, of whose groups a fifth, chosen by a hash, takes the
    place of the validation split. Groups are those of the `group`ing of groups.json (default: "group"), or the videos.
    They are what the bootstrap draws, and no split ever tears one apart.
    """

    data: str  # root of the data set
    methods: tuple[str, ...]  # names of `methods.default_methods`
    modalities: tuple[str, ...] | None = None  # None: all the data set has
    folds: int | None = None
    group: str | None = None
    seeds: int = 5  # seeds 0 .. seeds - 1 of weights, order, rehearsal and corruption
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)  # the grid of peak learning rates
    tuning_seeds: int = 1
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    corruptions: tuple[str, ...] | None = None  # None: the whole protocol; none at all: clean data alone
    span: float | None = None  # seconds of a corruption's spans, see `corruptions.apply`; None: 2, as the protocol says
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of TrainConfig, the same for all

    def __post_init__(self) -> None:
        check_int("seeds", self.seeds, 1)
        check_int("tuning_seeds", self.tuning_seeds, 1)
        if self.tuning_seeds > self.seeds:
            raise ValueError(f"tuning_seeds: expected at most seeds ({self.seeds}), got {self.tuning_seeds}")
        if self.folds is not None:
            check_int("folds", self.folds, 2)
        for name in ("methods", "rates", "severities", "modalities"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) != len(values)):
                raise ValueError(f"{name}: expected one or more, all different, got {list(values)}")
        self.base()  # what is wrong with it shows here

    def base(self) -> TrainConfig:
        """What all methods share; `seed` and `lr` are set by the study."""
        fixed = {"data", "seed", "lr", "fusion", "modalities", "quality", "told"} & set(self.train)
        if fixed:
            raise ValueError(f"train: expected none of what the study itself sets, got {', '.join(sorted(fixed))}")
        fixed_here = {"data": self.data, "modalities": self.modalities, "threads": 1, "patience": 10**9}
        return TrainConfig.from_json({**fixed_here, **self.train})

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({**dataclasses.asdict(self), "train": self.base().to_json()}))


def configuration(study: Study, part: Part, method: str, seed: int, rate: float) -> TrainConfig:
    """Of one training."""
    return dataclasses.replace(study.base(), data=part.data, seed=seed, lr=rate, **find(method).overrides)


# --------------------------------------------------------------------------------------------------------------- files
def _folder(part: Part, seed: int) -> str:
    return f"{part.name}-seed-{seed}" if part.name else f"seed-{seed}"


def run_path(out: Path, method: str, seed: int, rate: float, part: Part | None = None) -> Path:
    return out / "runs" / method / f"{_folder(part or WHOLE, seed)}-lr-{rate:g}"


def condition_name(condition: Condition | None) -> str:
    return CLEAN if condition is None else condition.name


def evaluation_path(out: Path, seed: int, condition: Condition | None, part: Part | None = None) -> Path:
    return out / "evaluations" / _folder(part or WHOLE, seed) / f"{condition_name(condition)}.npz"


# ---------------------------------------------------------------------------------------------------------------- data
def has_quality(data: AffWild2) -> bool:
    """There is quality evidence of one of its modalities or more."""
    return any(data.quality_dims.values())


class Part(NamedTuple):
    """What a model is trained on, and the clips that it is scored on: the whole study, or a fold."""

    name: str  # "" or "fold-1" ...
    data: str  # root of the data set whose training and validation splits are used
    scored: str  # root of the one that is scored,
    split: str  # and which split of it; "truth": the test split with the synthesiser's labels


WHOLE = Part("", "", "", "")


@functools.lru_cache(maxsize=1)
def scored_clips(part: Part, modalities: tuple[str, ...] | None = None) -> list[Clip]:
    """What is scored, in the order of its names."""
    return list(scored_data(part, modalities))


def scored_data(part: Part, modalities: tuple[str, ...] | None = None) -> TruthClips | AffWild2:
    if part.split == TRUTH:
        return TruthClips(part.scored)
    return AffWild2(part.scored, part.split, modalities=modalities)


@functools.lru_cache(maxsize=1)
def donor_clips(part: Part, modalities: tuple[str, ...] | None = None) -> list[Clip]:
    """Where a corruption puts another video in place of one, the videos that it may take beside those scored: of a fold, which
    may be one video, all others."""
    if not part.name:
        return []
    return [clip for split in ("train", "validation") for clip in AffWild2(part.data, split, modalities=modalities)]


def synthesise(out: str | os.PathLike[str]) -> str:
    """The study's own data set in OUT/data, made where it is not there yet; returns its root."""
    root = Path(out) / "data"
    if not root.exists():
        write_dataset(root, **DATA)  # type: ignore[arg-type]
    return str(root)


def parts(study: Study, out: Path) -> list[Part]:
    """What is trained and scored; the views of the data are those that `make_parts` left."""
    if study.folds is not None:
        views = [(f"fold-{k}", str(out / f"fold-{k}")) for k in range(1, study.folds + 1)]
        return [Part(name, view, view, "test") for name, view in views]
    if has_truth(study.data):
        return [Part("", study.data, study.data, TRUTH)]
    return [Part("", str(out / "data"), study.data, "validation")]


def make_parts(study: Study, out: Path, say: Callable[[str], None] = lambda text: None) -> list[Part]:
    """What is trained and scored, its views of the data made anew."""
    if study.folds is not None:
        fold_views(study, out)
    elif not has_truth(study.data):
        tuning_view(study.data, out / "data", study.group, study.modalities, say)
    return parts(study, out)


def tuning_view(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    group: str | None = None,
    modalities: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """A data set at `out`, made of links to the one at `root`, whose validation split is a fifth of the groups of root's
    training videos (all persons of a video together) and whose training split is the rest. What is of a group that root's
    own validation split has is in neither; `say` is told."""
    root, data = Path(root).resolve(), AffWild2(root, "train", modalities=modalities)
    scored = AffWild2(root, "validation", modalities=modalities)
    elsewhere = {scored.group(name, group) for name in scored.names}
    groups = {name: data.group(name, group) for name in data.names}
    torn = [name for name, of in groups.items() if of in elsewhere]
    groups = {name: of for name, of in groups.items() if of not in elsewhere}
    if torn:
        say(
            f"not trained on, for their groups are scored: {', '.join(torn[:3])}"
            + ("" if len(torn) <= 3 else " and others")
        )
    held_out = _held_out(set(groups.values()), "training ")
    source = annotation_folder(root, None, SPLITS["train"])
    folders = {name: VALIDATION if groups[name] in held_out else TRAIN for name in groups}
    return _view(root, Path(out), {name: source / f"{name}.txt" for name in groups}, folders)


def _held_out(groups: set[str], what: str = "") -> set[str]:
    """A fifth of the groups, chosen by a hash of their names."""
    if len(groups) < 2:
        raise ValueError(
            f"data: expected two {what}videos or groups or more, to tune on some of them, got {len(groups)}"
        )
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(order[: max(round(len(order) / HELD_OUT), 1)])


def annotated_splits(study: Study) -> dict[str, AffWild2]:
    """The splits that have labels: what is dealt into folds."""
    found = {}
    for split, folders in SPLITS.items():
        if split == "test" and (Path(study.data) / SAMPLE).exists():
            continue
        if split != "train":
            try:
                annotation_folder(Path(study.data), None, folders)
            except FileNotFoundError:
                continue
        found[split] = AffWild2(study.data, split, modalities=study.modalities)
    return found


def fold_views(study: Study, out: Path) -> list[Part]:
    """Makes a view of the data a fold: its own videos are the test split, a fifth of the other groups the validation split."""
    assert study.folds is not None
    root = Path(study.data).resolve()
    splits = annotated_splits(study)
    for text in disagreements(splits):
        raise ValueError(text)
    groups, frames, sources = dict[str, str](), Counter[str](), dict[str, Path]()
    for split, data in splits.items():
        folder = annotation_folder(root, None, SPLITS[split])
        for clip in data:
            if clip.name in sources:
                raise ValueError(f"data: expected one annotation of {clip.name}, got another in {folder}")
            groups[clip.name] = data.group(clip.name, study.group)
            sources[clip.name] = folder / f"{clip.name}.txt"
            if clip.valid.any():  # a group without an annotated frame is trained on only
                frames[groups[clip.name]] += int(clip.valid.sum())
    if not study.folds <= len(frames) or len(frames) < 3:
        raise ValueError(
            f"folds: expected at most as many as there are groups of videos, three groups at least, got {study.folds} folds "
            f"of {len(frames)} annotated groups in {root}"
        )
    dealt: list[set[str]] = [set() for _ in range(study.folds)]
    for name, _ in sorted(frames.items(), key=lambda item: (-item[1], item[0])):
        min(dealt, key=lambda fold: sum(frames[group] for group in fold)).add(name)
    found = parts(study, out)
    for part, fold in zip(found, dealt):
        validation = _held_out(set(frames) - fold)
        folders = {
            name: TEST if group in fold else VALIDATION if group in validation else TRAIN
            for name, group in groups.items()
        }
        _view(root, Path(part.data), sources, folders)
    return found


def check_place(root: Path, out: Path) -> None:
    """RunError for a study that would read its own files as data, or write over them."""
    data, study = root.resolve(), out.resolve()
    if data == study or study.is_relative_to(data / "features"):
        raise RunError(f"{out}: expected a directory that is neither the data set nor among its features ({root})")


def check_view(out: Path) -> None:
    """RunError where there is something at `out` that is no view."""
    if out.is_symlink() or (out.exists() and not (out / VIEW).exists()):
        raise RunError(
            f"{out}: expected nothing there, or a view of the data that an earlier study made, got something else"
        )


def dealing(found: Sequence[Part]) -> str:
    """A digest of which annotations each part trains on, tunes on and is scored on."""
    digest = hashlib.sha256()
    for part in found:
        splits = {split: AffWild2(part.data, split) for split in ("train", "validation")}
        scored = scored_data(part)
        names = (scored.data if isinstance(scored, TruthClips) else scored).names
        digest.update(json.dumps([part.name, data_shape(splits), names]).encode())
    return digest.hexdigest()[:16]


def _view(root: Path, out: Path, sources: Mapping[str, Path], folders: Mapping[str, str]) -> Path:
    """A data set at `out`, made of links to the one at `root`, with the annotations `sources` in the split folders given. An
    earlier view there is replaced; RunError for anything else."""
    check_view(out)
    with replacing_folder(out) as part:
        (part / VIEW).write_text("made by sage-ext compare, of links; it is made anew\n")
        task = part / "annotations"
        for folder in set(folders.values()):
            (task / folder).mkdir(parents=True)
        for name, folder in folders.items():
            (task / folder / f"{name}.txt").symlink_to(sources[name])
        tops = {source.relative_to(root).parts[0] for source in sources.values()}
        for entry in root.iterdir():
            inside = out.resolve().is_relative_to(entry.resolve())  # the study itself, within the data set
            own = entry.name in tops or (entry.name == SAMPLE and TEST in folders.values())
            if not (own or entry.name.startswith(".") or inside):
                (part / entry.name).symlink_to(entry)
        shutil.rmtree(out, ignore_errors=True)  # an earlier view
    return out
