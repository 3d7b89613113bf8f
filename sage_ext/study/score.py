"""Finished runs scored under one condition: the moments of every video, and what SAGE's confidence is worth.

It predicts with `training.evaluate` and measures confidence with `calibration`, as `sage-ext evaluate` does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..calibration import Evidence, calibrated_confidence, collect, diagrams, spearman
from ..data.affwild2 import Clip
from ..data.synthetic import Oracle, TruthClips, meter, read_truth
from ..data.windows import whole_clips
from ..nn import ReliabilityFusion
from ..training.evaluate import alike, clip_moments
from ..training.runs import Run, join
from .corruptions import Condition, corrupted
from .methods import ORACLE, REFERENCE
from .plan import TRUTH, Part, donor_clips, scored_clips
from .results import read_evaluation, write_evaluation

BINS = 15  # of a reliability diagram
# Share of the frames that a corruption leaves without a sound modality beyond which the oracle is left blank: what is
# still in spoilt ones it cannot tell, and nothing would no longer be the upper line.
LOST = 0.1


class Scored(NamedTuple):
    """A finished run that is to be scored."""

    method: str
    run: str  # its directory
    model: str  # digest of its weights


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The evaluation of all methods under one condition with one seed."""

    part: Part
    modalities: tuple[str, ...] | None
    runs: tuple[Scored, ...]
    condition: Condition | None  # None: clean
    span: float | None  # of corruptions, in seconds
    seed: int
    device: str
    out: str  # the evaluation file

    @property
    def truth(self) -> bool:
        """Of synthetic data."""
        return self.part.split == TRUTH

    @property
    def data(self) -> str:
        return self.part.scored


def missing(sweep: Sweep, found: Mapping[str, Mapping[str, np.ndarray]]) -> list[Scored]:
    """What is not in `found`, or is there of other weights."""
    wanted = list(sweep.runs) + ([Scored(ORACLE, "", "")] if sweep.truth else [])
    return [run for run in wanted if run.method not in found or str(found[run.method]["model"]) != run.model]


def evaluate_sweep(sweep: Sweep) -> dict[str, str]:
    """In a process of its own: write what `sweep.out` lacks of `sweep.runs`. Returns {method: what went wrong}."""
    path = Path(sweep.out)
    found = read_evaluation(path) if path.exists() else {}
    clean = scored_clips(sweep.part, sweep.modalities)
    seen: Sequence[Clip] = clean
    if sweep.condition is not None:
        stages = {name: truth["stage"] for name, truth in _truth(sweep.data).items()} if sweep.truth else None
        donors = donor_clips(sweep.part, sweep.modalities)
        measure = meter if sweep.truth else None
        seen = corrupted(
            clean, sweep.condition, sweep.seed, stages=stages, span=sweep.span, donors=donors, meter=measure
        )
    errors: dict[str, str] = {}
    found.update(_score(sweep, clean, seen, missing(sweep, found), errors))
    write_evaluation(path, found)
    return errors


@functools.lru_cache(maxsize=1)
def _truth(data: str) -> dict[str, dict[str, np.ndarray]]:
    """{clip name: stage (T,), reliability (T, M)}, modalities in the order of the clips."""
    found = {}
    for clip in TruthClips(data):
        truth = read_truth(data, clip.name)
        order = [list(truth["modalities"]).index(name) for name in clip.features]
        found[clip.name] = {"stage": truth["stage"].astype(np.int64), "reliability": truth["reliability"][:, order]}
    return found


@functools.lru_cache(maxsize=1)
def _oracle(data: str) -> Oracle:
    return Oracle(data)


@functools.lru_cache(maxsize=1)
def _models(runs: tuple[Scored, ...], device: str) -> dict[str, Run]:
    """All of one seed: kept while that seed's conditions are gone through."""
    return {run.method: Run.load(run.run, device) for run in runs}


def _score(
    sweep: Sweep, clean: Sequence[Clip], seen: Sequence[Clip], todo: Sequence[Scored], errors: dict[str, str]
) -> dict[str, dict[str, np.ndarray]]:
    """{method: what the evaluation file holds of it}; `seen` are the `clean` clips under the condition."""
    models = _models(sweep.runs, sweep.device)
    moments = {run.method: np.zeros((len(clean), len(clean[0].targets), 6)) for run in todo}
    evidence: list[Evidence] = []
    order: list[int] = []  # of the clips in `evidence`
    lost = 0  # frames without a sound modality
    for places in alike([clip.num_frames for clip in clean]):
        clips = [seen[i] for i in places]  # once: a corrupted clip is computed when it is asked for
        order += places
        for method in [method for method in moments if method not in errors]:
            try:
                if method == ORACLE:
                    answers = [_oracle_predicts(sweep, clean[i], clip) for i, clip in zip(places, clips)]
                    predictions, lost = [said for said, _ in answers], lost + sum(gone for _, gone in answers)
                else:
                    predictions = [said.prediction for said in models[method].predict_together(clips)]
                for i, clip, prediction in zip(places, clips, predictions):
                    moments[method][i] = clip_moments(prediction, clip).numpy()
                if method == REFERENCE:
                    evidence.append(_evidence(models[method], clips))
            except Exception as error:  # one method's fault must not cost the others
                errors[method] = f"{type(error).__name__}: {error}"
    found = {
        run.method: {"model": np.array(run.model), "moments": moments[run.method]}
        for run in todo
        if run.method not in errors
    }
    if ORACLE in found and lost > LOST * sum(clip.num_frames for clip in clean):
        found[ORACLE]["moments"][:] = np.nan
    if REFERENCE in found:
        truth = None
        if sweep.truth and sweep.condition is None:
            truth = [_truth(sweep.data)[clean[i].name] for i in order]
        confidence = _confidence(models[REFERENCE], join(evidence), truth, clean=sweep.condition is None)
        found[REFERENCE].update(confidence)
    return found


# ------------------------------------------------------------------------------------------------------------- oracle
def spoilt(clean: Clip, seen: Clip) -> np.ndarray:
    """(T, M) bool: frames of a modality that are not what they were, features or presence."""
    columns = []
    for name in clean.features:
        before, after = (_rows(clip, name) for clip in (clean, seen))
        same = (before == after) | (np.isnan(before) & np.isnan(after))
        columns.append(~same.all(1) | (np.asarray(clean.present[name]) != np.asarray(seen.present[name])))
    return np.stack(columns, 1)


def _rows(clip: Clip, name: str) -> np.ndarray:
    """(T, D), NaN where absent."""
    rows = np.asarray(clip.features[name][: clip.num_frames], np.float32)
    full = np.full((clip.num_frames, rows.shape[1]), np.nan, np.float32)
    full[: len(rows)] = rows
    full[~np.asarray(clip.present[name])] = np.nan
    return full


def _oracle_predicts(sweep: Sweep, clean: Clip, seen: Clip) -> tuple[np.ndarray, int]:
    """(T, 2), and in how many frames nothing is left. It is told what was spoilt, and uses the rest."""
    oracle = _oracle(sweep.data)
    if sweep.condition is None:
        return oracle.predict(clean.name), 0
    bad = spoilt(clean, seen)
    had = np.stack([np.asarray(clean.present[name]) for name in clean.features], 1)
    order = [list(clean.features).index(name) for name in read_truth(sweep.data, clean.name)["modalities"]]
    return oracle.predict(clean.name, bad[:, order]), int((had.any(1) & ~(had & ~bad).any(1)).sum())


# --------------------------------------------------------------------------------------------------------- confidence
def _evidence(run: Run, clips: Sequence[Clip]) -> Evidence:
    """Of the clips' frames, one clip after another; the error is the mean over targets, (N, M)."""
    batch = whole_clips(clips, run.names)
    found = collect(run.model, [batch])
    frame = batch["frame"].flatten()  # without the padding
    return Evidence(
        found.reliability[frame], found.stage[frame], found.squared_error[frame].mean(-1), found.mask[frame]
    )


def _confidence(
    run: Run, evidence: Evidence, truth: Sequence[Mapping[str, np.ndarray]] | None, *, clean: bool
) -> dict[str, np.ndarray]:
    """What the evaluation file holds of the confidence of the model with the stages `S` and modalities `M`.

    `truth`: of the clips in `evidence`, in its order, where it is known.

    diagram (2, M, 3, K): before and after post-hoc fitting; mean confidence, observed reliability and frames of each
    bin, NaN where there are fewer. Clean only: stage_diagram (stages, 2, M, 3, K), by the true stage where there is a
    truth, else by the most probable; with a truth: contingency (S, true stages) in frames, spearman (M + 1,) of
    confidence after fitting with true reliability, each modality and all together.
    """
    fusion = run.model.fusion
    assert isinstance(fusion, ReliabilityFusion)
    temperature, bias = fusion.log_temperature.detach().cpu(), fusion.bias.detach().cpu()
    identity = torch.zeros_like(bias)

    def measured(chosen: Tensor | None = None) -> np.ndarray:
        """(2, M, 3, K) of all frames, or of the `chosen` (N,)."""
        mask = evidence.mask if chosen is None else evidence.mask & chosen[:, None]
        counted = evidence._replace(mask=mask)
        both = ((identity, identity), (temperature, bias))
        return np.stack([_diagrams(counted, *calibration, run.model.kappa) for calibration in both])

    found = {"diagram": measured()}
    if not clean:
        return found
    mask, learnt = evidence.mask, evidence.stage.argmax(1)
    if truth is None:
        labels, count = learnt, evidence.stage.shape[1]
    else:
        labels = torch.from_numpy(np.concatenate([known["stage"] for known in truth]))
        count = int(labels.max()) + 1
        table = torch.bincount(learnt * count + labels, minlength=evidence.stage.shape[1] * count)
        found["contingency"] = table.reshape(-1, count).numpy()
        true = torch.from_numpy(np.concatenate([known["reliability"] for known in truth])).double()
        confidence = calibrated_confidence(
            evidence.reliability.double(), evidence.stage.double(), temperature.double(), bias.double()
        )
        pairs = [(confidence[mask[:, m], m], true[mask[:, m], m]) for m in range(mask.shape[1])]
        found["spearman"] = np.array([spearman(*pair) for pair in [*pairs, (confidence[mask], true[mask])]])
    found["stage_diagram"] = np.stack([measured(labels == s) for s in range(count)])
    return found


def _diagrams(evidence: Evidence, log_temperature: Tensor, bias: Tensor, kappa: float) -> np.ndarray:
    """(M, 3, K) reliability diagrams under a calibration; NaN for a modality without a frame that counts."""
    out = np.full((evidence.mask.shape[1], 3, BINS), np.nan)
    for m, diagram in enumerate(diagrams(evidence, log_temperature, bias, kappa=kappa, bins=BINS)):
        bins = torch.stack([diagram.predicted, diagram.observed, diagram.frames.double()])
        out[m, :, : bins.shape[1]] = bins.numpy()
    return out
