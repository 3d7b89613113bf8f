"""What a study is asked for, which data answer it, and where its files lie.

OUT/study.json                                what was asked for; a study is continued only with the same
OUT/data/                                     synthetic data made here, or a view of licensed data (see `Study`)
OUT/runs/<method>/seed-<s>-lr-<rate>/         an ordinary run directory each, and result.json when it is finished
OUT/evaluations/seed-<s>/<condition>.npz      moments of every video under one condition, all methods
OUT/results.csv, report.md, report.html, *.png
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._arguments import check_int
from ..data.affwild2 import SPLITS, AffWild2, Clip, annotation_folder, bare_name
from ..data.synthetic import TruthClips, write_dataset
from ..files import replacing_folder
from ..training.trainer import TrainConfig
from .corruptions import Condition
from .methods import find

CLEAN = "clean"  # the condition in which nothing fails
DATA = {"seed": 1, "train": 160, "validation": 32, "test": 48, "frames": (250, 900)}  # synthesised where none are given
HELD_OUT = 5  # of data without truth, one training video in so many is the validation split


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how.

    On synthetic data (root has truth/ and a test split) the score is on the test split with the labels that only the
    synthesiser knows, choices are made on the validation split. On any other data in the Aff-Wild2 layout the score is
    on the validation split, and a fifth of the training *videos*, chosen by a hash of their names, takes its place in
    all choices: OUT/data is that view of the data set, made of links.
    """

    data: str  # root of the data set
    methods: tuple[str, ...]  # names of `methods.default_methods`
    seeds: int = 5  # seeds 0 .. seeds - 1 of weights, order, rehearsal and corruption
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)  # the grid of peak learning rates
    tuning_seeds: int = 1
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    corruptions: tuple[str, ...] | None = None  # None: the whole protocol
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of TrainConfig, the same for all

    def __post_init__(self) -> None:
        check_int("seeds", self.seeds, 1)
        check_int("tuning_seeds", self.tuning_seeds, 1)
        if self.tuning_seeds > self.seeds:
            raise ValueError(f"tuning_seeds: expected at most seeds ({self.seeds}), got {self.tuning_seeds}")
        for name in ("methods", "rates", "severities"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected one or more, all different, got {list(values)}")
        self.base()  # what is wrong with it shows here

    def base(self) -> TrainConfig:
        """What all methods share; `seed` and `lr` are set by the study."""
        fixed = {"data", "seed", "lr", "fusion", "modalities"} & set(self.train)
        if fixed:
            raise ValueError(f"train: expected none of what the study itself sets, got {', '.join(sorted(fixed))}")
        return TrainConfig.from_json({"data": self.data, "threads": 1, "patience": 10**9, **self.train})

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({**dataclasses.asdict(self), "train": self.base().to_json()}))


def configuration(study: Study, data: Path, method: str, seed: int, rate: float) -> TrainConfig:
    """Of one training."""
    return dataclasses.replace(study.base(), data=str(data), seed=seed, lr=rate, **find(method).overrides)


# --------------------------------------------------------------------------------------------------------------- files
def run_path(out: Path, method: str, seed: int, rate: float) -> Path:
    return out / "runs" / method / f"seed-{seed}-lr-{rate:g}"


def condition_name(condition: Condition | None) -> str:
    return CLEAN if condition is None else condition.name


def evaluation_path(out: Path, seed: int, condition: Condition | None) -> Path:
    return out / "evaluations" / f"seed-{seed}" / f"{condition_name(condition)}.npz"


# ---------------------------------------------------------------------------------------------------------------- data
@functools.lru_cache(maxsize=1)
def scored_clips(data: str, truth: bool) -> list[Clip]:
    """What is scored, in the order of its names."""
    return list(TruthClips(data)) if truth else list(AffWild2(data, "validation"))


def synthesise(out: str | os.PathLike[str]) -> str:
    """The study's own data set in OUT/data, made where it is not there yet; returns its root."""
    root = Path(out) / "data"
    if not root.exists():
        write_dataset(root, **DATA)  # type: ignore[arg-type]
    return str(root)


def tuning_view(root: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """A data set at `out`, made of links to the one at `root`, whose validation split is a fifth of root's training
    videos (all persons of a video together) and whose training split is the rest."""
    root, out = Path(root).resolve(), Path(out)
    names = AffWild2(root, "train").names
    videos = sorted({bare_name(name) for name in names}, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(videos) < 2:
        raise ValueError(f"{root}: expected two training videos or more, to tune on some of them, got {len(videos)}")
    held_out = set(videos[: max(round(len(videos) / HELD_OUT), 1)])
    source = annotation_folder(root, None, SPLITS["train"])
    folders = {False: "Train_Set", True: "Validation_Set"}
    with replacing_folder(out) as part:
        task = part / "Annotations" / "VA_Estimation_Challenge"
        for folder in folders.values():
            (task / folder).mkdir(parents=True)
        for name in names:
            (task / folders[bare_name(name) in held_out] / f"{name}.txt").symlink_to(source / f"{name}.txt")
        annotations = source.relative_to(root).parts[0]
        for entry in root.iterdir():
            inside = out.resolve().is_relative_to(entry.resolve())  # the study itself, within the data set
            if not (entry.name == annotations or entry.name.startswith(".") or inside):
                (part / entry.name).symlink_to(entry)
        shutil.rmtree(out, ignore_errors=True)  # an earlier view
    return out
