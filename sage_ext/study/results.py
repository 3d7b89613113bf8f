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
from ..data.synthetic import TruthClips, trusted_modalities
from ..data.targets import Targets, scores
from ..files import parsing, write_atomic
from .controls import CONTROLS
from .corruptions import Condition
from .methods import REFERENCES
from .plan import TRUTH, Part, Study, condition_name, evaluation_path, scored_data
from .statistics import additive, concordance

MOMENTS = "moments"  # in an evaluation file; of a control that and its name


def control_name(method: str, control: str) -> str:
    """The key of a control's moments among those of the methods."""
    return f"{method}, {control}"


class Trained(NamedTuple):
    """The methods whose trainings are all finished."""

    rates: dict[tuple[str, Part], float]  # the learning rate chosen for a method in a part
    results: dict[tuple[str, Part, int], dict[str, Any]]  # what result.json holds with a seed, see `run.train_one`

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.rates))

    def without(self, failed: Mapping[str, str]) -> Trained:
        return Trained(
            {key: rate for key, rate in self.rates.items() if key[0] not in failed},
            {key: result for key, result in self.results.items() if key[0] not in failed},
        )


@dataclasses.dataclass(frozen=True)
class Results:
    """All that was measured; `N` seeds, `K` conditions (the first is clean), `V` clips, `C` targets."""

    study: Study
    parts: list[Part]
    modalities: list[str]
    targets: Targets
    fps: float
    methods: list[str]  # those that are not trained last, where there are such
    conditions: list[Condition | None]
    clips: list[str]  # (V,)
    folds: list[str]  # (V,) the part that each is scored in
    groups: list[str]  # (V,) what the bootstrap draws: two persons of one video are not independent
    frames: int  # annotated ones, of all clips
    # method -> (N, K, V, C, 6), NaN where an oracle is blank; also of each control of SAGE, see `control_name`
    moments: dict[str, np.ndarray]
    trained: Trained
    # "sage" or "sage+q" -> (fit, condition) -> what `score` says of its confidence; a fit: a seed in a part
    confidence: dict[str, dict[tuple[int, int], dict[str, np.ndarray]]]
    trusts: list[frozenset[str]] | None  # of each true stage the modalities of low noise, where it is known

    @property
    def truth(self) -> bool:
        return self.parts[0].split == TRUTH

    @property
    def fits(self) -> int:
        return self.study.seeds * len(self.parts)


def read_evaluation(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{method: {"model": digest of its weights, "moments": (V, C, 6), and of SAGE what `score` says of its
    confidence, and the moments of its controls}}."""
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
    study: Study,
    out: Path,
    parts: Sequence[Part],
    conditions: Sequence[Condition | None],
    trained: Trained,
    untrained: Sequence[str] = (),
) -> Results:
    """Read the evaluation files of `trained`, and of what is `untrained`."""
    methods = [*trained.methods, *untrained]
    ours = [method for method in REFERENCES if method in methods]
    wanted = {method: (method, MOMENTS) for method in methods}
    wanted |= {control_name(method, c): (method, f"{MOMENTS} {c}") for method in ours for c in CONTROLS}
    found: dict[str, list[np.ndarray]] = {key: [] for key in wanted}  # (N, K, clips of the part, C, 6) a part
    confidence: dict[str, dict[tuple[int, int], dict[str, np.ndarray]]] = {method: {} for method in ours}
    names, folds, groups, frames = list[str](), list[str](), list[str](), 0
    for p, part in enumerate(parts):
        held = [
            [read_evaluation(evaluation_path(out, seed, condition, part)) for condition in conditions]
            for seed in range(study.seeds)
        ]
        for key, (method, name) in wanted.items():
            found[key].append(np.array([[file[method][name] for file in files] for files in held]))
        for method in ours:
            for seed, files in enumerate(held):
                for k, file in enumerate(files):
                    confidence[method][seed * len(parts) + p, k] = {
                        name: value
                        for name, value in file[method].items()
                        if name != "model" and not name.startswith(MOMENTS)
                    }
        data = scored_data(part, study.modalities)
        index = data.data if isinstance(data, TruthClips) else data
        names += index.names
        folds += [part.name] * len(index)
        groups += [index.group(name, study.group) for name in index.names]
        frames += int(sum(clip.valid.sum() for clip in data))
    return Results(
        study=study,
        parts=list(parts),
        modalities=list(index.modalities),
        targets=index.targets,
        fps=index.frame_rate,
        methods=methods,
        conditions=list(conditions),
        clips=names,
        folds=folds,
        groups=groups,
        frames=frames,
        moments={key: np.concatenate(arrays, 2) for key, arrays in found.items()},
        trained=trained,
        confidence=confidence,
        trusts=trusted_modalities(study.data) if parts[0].split == TRUTH else None,
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
    """One row a (method, seed, condition); blank where an oracle cannot be computed."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    columns = [*(target.score for target in results.targets), "P"]
    rows.writerow(("method", "seed", "condition", "corruption", "severity", "modalities", *columns))
    for method in results.methods:
        found = concordance(additive(results.moments[method]).sum(2))  # (N, K, C)
        for seed, by_condition in enumerate(found):
            for condition, values in zip(results.conditions, by_condition):
                what: tuple[Any, ...] = ("", "", "")
                if condition is not None:
                    what = (condition.corruption, condition.severity, "+".join(condition.modalities))
                said = ["" if np.isnan(v) else f"{v:.6f}" for v in scores(values, results.targets).values()]
                rows.writerow((method, seed, condition_name(condition), *what, *said))
    write_atomic(path, buffer.getvalue())
