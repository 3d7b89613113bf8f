"""What a study measured: the files of its evaluations, read into one place, and results.csv."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..calibration import ReliabilityDiagram, expected_calibration_error
from ..data.affwild2 import bare_name
from ..files import parsing, write_atomic
from .corruptions import Condition
from .methods import ORACLE, REFERENCE
from .plan import Study, condition_name, evaluation_path, scored_clips
from .statistics import additive, concordance


class Trained(NamedTuple):
    """The methods whose trainings are all finished."""

    rates: dict[str, float]  # method -> the learning rate chosen for it
    results: dict[tuple[str, int], dict[str, Any]]  # (method, seed) -> what result.json holds, see `run.train_one`

    def without(self, failed: Mapping[str, str]) -> Trained:
        return Trained(
            {method: rate for method, rate in self.rates.items() if method not in failed},
            {key: result for key, result in self.results.items() if key[0] not in failed},
        )


@dataclasses.dataclass(frozen=True)
class Results:
    """All that was measured; `N` seeds, `K` conditions (the first is clean), `V` clips."""

    study: Study
    truth: bool
    modalities: list[str]
    methods: list[str]  # the oracle last, where there is one
    conditions: list[Condition | None]
    clips: list[str]  # (V,)
    frames: int  # annotated ones, of all clips
    moments: dict[str, np.ndarray]  # method -> (N, K, V, 2, 6), NaN where the oracle is blank
    trained: Trained
    confidence: dict[tuple[int, int], dict[str, np.ndarray]]  # (seed, condition) -> of SAGE

    @property
    def videos(self) -> list[str]:
        """(V,) the video of each clip: two persons of one are not independent."""
        return [bare_name(name) for name in self.clips]


def read_evaluation(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{method: {"model": digest of its weights, "moments": (V, 2, 6), and of SAGE what `score` says of its
    confidence}}."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with parsing(path), np.load(path) as file:
        for key in file.files:
            method, _, name = key.partition("/")
            found.setdefault(method, {})[name] = file[key]
    return found


def write_evaluation(path: Path, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """The file that `read_evaluation` reads."""
    flat = {f"{method}/{name}": value for method, arrays in found.items() for name, value in arrays.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **flat)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def gather(
    study: Study, out: Path, conditions: Sequence[Condition | None], trained: Trained, *, truth: bool, oracle: bool
) -> Results:
    """Read the evaluation files of `trained`; `truth`: of synthetic data; `oracle`: it is there."""
    methods = [*trained.rates, *([ORACLE] if oracle else [])]
    clips = scored_clips(study.data, truth)
    moments = {m: np.zeros((study.seeds, len(conditions), len(clips), 2, 6)) for m in methods}
    confidence: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for seed in range(study.seeds):
        for k, condition in enumerate(conditions):
            held = read_evaluation(evaluation_path(out, seed, condition))
            for method in methods:
                moments[method][seed, k] = held[method]["moments"]
            if REFERENCE in methods:
                confidence[seed, k] = {
                    name: value for name, value in held[REFERENCE].items() if name not in ("model", "moments")
                }
    return Results(
        study=study,
        truth=truth,
        modalities=list(clips[0].features),
        methods=methods,
        conditions=list(conditions),
        clips=[clip.name for clip in clips],
        frames=int(sum(clip.valid.sum() for clip in clips)),
        moments=moments,
        trained=trained,
        confidence=confidence,
    )


def calibration_error(diagrams: np.ndarray) -> np.ndarray:
    """(..., 3, K) as in the evaluation files -> (...) expected calibration error; NaN where no frame was counted."""
    flat = torch.from_numpy(diagrams).reshape(-1, *diagrams.shape[-2:])
    return np.array([_error(diagram) for diagram in flat]).reshape(diagrams.shape[:-2])


def _error(diagram: torch.Tensor) -> float:
    predicted, observed, frames = diagram[:, ~diagram[2].isnan()]
    if not len(frames):
        return float("nan")
    none = frames[:0]  # the bins' borders, which the files do not hold
    return expected_calibration_error(ReliabilityDiagram(predicted, observed, frames, none, none))


def write_results(results: Results, path: Path) -> None:
    """One row a (method, seed, condition); blank where the oracle cannot be computed."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(("method", "seed", "condition", "corruption", "severity", "modalities", "CCC_V", "CCC_A", "P"))
    for method in results.methods:
        scores = concordance(additive(results.moments[method]).sum(2))  # (N, K, 2)
        for seed, by_condition in enumerate(scores):
            for condition, (valence, arousal) in zip(results.conditions, by_condition):
                what: tuple[Any, ...] = ("", "", "")
                if condition is not None:
                    what = (condition.corruption, condition.severity, "+".join(condition.modalities))
                values = (valence, arousal, (valence + arousal) / 2)
                said = ["" if np.isnan(v) else f"{v:.6f}" for v in values]
                rows.writerow((method, seed, condition_name(condition), *what, *said))
    write_atomic(path, buffer.getvalue())
