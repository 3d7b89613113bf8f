"""Finished runs scored under one condition: the moments of every video, and what SAGE's confidence and stages are worth.

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
from ..data.synthetic import CausalOracle, Oracle, TruthClips, meter, read_truth, told
from ..data.windows import whole_clips
from ..nn import ReliabilityFusion
from ..training.evaluate import ClipPrediction, alike, clip_moments
from ..training.runs import Run, join
from .controls import control_predictions
from .corruptions import Condition, corrupted
from .methods import ORACLE, REFERENCES, UNTRAINED
from .plan import TRUTH, Part, donor_clips, scored_clips
from .results import MOMENTS, read_evaluation, write_evaluation

BINS = 15  # of a reliability diagram
# Share of the frames that a corruption leaves without a sound modality beyond which the oracles are left blank: what is
# still in spoilt ones they cannot tell, and nothing would no longer be the upper line.
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
    wanted = list(sweep.runs) + [Scored(name, "", "") for name in UNTRAINED if sweep.truth]
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
    """{clip name: stage (T,), reliability (T, M)}, modalities in the order of the clips; NaN for one that was added."""
    found = {}
    for clip in TruthClips(data):
        truth = read_truth(data, clip.name)
        known = {name: truth["reliability"][:, m] for m, name in enumerate(truth["modalities"].tolist())}
        blank = np.full(clip.num_frames, np.nan, np.float32)
        reliability = np.stack([known.get(name, blank) for name in clip.features], 1)
        found[clip.name] = {"stage": truth["stage"].astype(np.int64), "reliability": reliability}
    return found


@functools.lru_cache(maxsize=2)
def _oracle(name: str, data: str) -> Oracle | CausalOracle:
    return Oracle(data) if name == ORACLE else CausalOracle(data)


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
    ours = [method for method in moments if method in REFERENCES]
    evidence: dict[str, list[Evidence]] = {method: [] for method in ours}
    answers: dict[str, dict[int, ClipPrediction]] = {method: {} for method in ours}
    order: list[int] = []  # of the clips in `evidence`
    lost = 0  # frames without a sound modality
    for places in alike([clip.num_frames for clip in clean]):
        clips = [seen[i] for i in places]  # once: a corrupted clip is computed when it is asked for
        order += places
        spoilt_frames = None
        if sweep.condition is not None and any(name in moments for name in UNTRAINED):
            spoilt_frames = [_spoilt(sweep, clean[i], clip) for i, clip in zip(places, clips)]
            lost += sum(gone for _, gone in spoilt_frames)
        for method in [method for method in moments if method not in errors]:
            try:
                if method in UNTRAINED:
                    useless = None if spoilt_frames is None else [bad for bad, _ in spoilt_frames]
                    predictions = _oracle(method, sweep.data).predict_together([clean[i].name for i in places], useless)
                else:
                    given = clips
                    if models[method].told:
                        given = [told(sweep.data, clean[i], clip) for i, clip in zip(places, clips)]
                    said = models[method].predict_together(given)
                    predictions = [one.prediction for one in said]
                for i, clip, prediction in zip(places, clips, predictions):
                    moments[method][i] = clip_moments(prediction, clip).numpy()
                if method in ours:
                    evidence[method].append(_evidence(models[method], clips))
                    answers[method].update(zip(places, said))
            except Exception as error:  # one method's fault must not cost the others
                errors[method] = f"{type(error).__name__}: {error}"
    found = {
        run.method: {"model": np.array(run.model), MOMENTS: moments[run.method]}
        for run in todo
        if run.method not in errors
    }
    for name in UNTRAINED:
        if name in found and lost > LOST * sum(clip.num_frames for clip in clean):
            found[name][MOMENTS][:] = np.nan
    for method in [method for method in ours if method in found]:
        truth = None
        if sweep.truth and sweep.condition is None:
            truth = [_truth(sweep.data)[clean[i].name] for i in order]
        clear = sweep.condition is None
        found[method].update(_confidence(models[method], join(evidence[method]), truth, clean=clear))
        said = [answers[method][i] for i in range(len(clean))]
        found[method].update(_controls(said, clean, sweep.seed))
        if clear:
            found[method]["trust"] = _trust(said)
    return found


def _controls(said: Sequence[ClipPrediction], clips: Sequence[Clip], seed: int) -> dict[str, np.ndarray]:
    """{the moments of each control's predictions: (V, C, 6)}, NaN where there is none; see `controls`."""
    predictions = control_predictions(said, [clip.name for clip in clips], [clip.fps for clip in clips], seed)
    found = {}
    for control, of_clips in predictions.items():
        moments = np.full((len(clips), len(clips[0].targets), 6), np.nan)
        for i, (clip, prediction) in enumerate(zip(clips, of_clips)):
            if prediction is not None:
                moments[i] = clip_moments(prediction, clip).numpy()
        found[f"{MOMENTS} {control}"] = moments
    return found


def _trust(said: Sequence[ClipPrediction]) -> np.ndarray:
    """(S, 2 + M): the frames in which each stage is the most probable, those of them in which every modality has a weight,
    and the sum of each modality's weights in these."""
    stage = np.concatenate([one.stage.argmax(1) for one in said])
    weights = np.concatenate([one.weights for one in said]).astype(np.float64)
    whole = (weights > 0).all(1)
    found = np.zeros((said[0].stage.shape[1], 2 + weights.shape[1]))
    for s in range(len(found)):
        here = stage == s
        found[s] = [here.sum(), (here & whole).sum(), *weights[here & whole].sum(0)]
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


def _spoilt(sweep: Sweep, clean: Clip, seen: Clip) -> tuple[np.ndarray, int]:
    """What an oracle is told was spoilt and takes as absent, (T, M) in the order of truth/, and in how many frames that
    leaves nothing."""
    bad = spoilt(clean, seen)
    had = np.stack([np.asarray(clean.present[name]) for name in clean.features], 1)
    order = [list(clean.features).index(name) for name in read_truth(sweep.data, clean.name)["modalities"]]
    bad, had = bad[:, order], had[:, order]
    return bad, int((had.any(1) & ~(had & ~bad).any(1)).sum())


# --------------------------------------------------------------------------------------------------------- confidence
def _evidence(run: Run, clips: Sequence[Clip]) -> Evidence:
    """Of the clips' frames, one clip after another; the error is the mean over targets, (N, M)."""
    batch = whole_clips(clips, run.names)
    found = collect(run.model, [batch])
    frame = batch["frame"].flatten()  # without the padding
    own = slice(-len(run.names), None)  # without the joint expert
    return Evidence(
        found.reliability[frame][:, own],
        found.stage[frame],
        found.squared_error[frame][:, own].mean(-1),
        found.mask[frame][:, own],
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
    own = slice(-len(run.names), None)
    temperature, bias = fusion.log_temperature.detach().cpu()[own], fusion.bias.detach().cpu()[own]
    identity = torch.zeros_like(bias)

    def measured(chosen: Tensor | None = None) -> np.ndarray:
        """(2, M, 3, K) of all frames, or of the `chosen` (N,)."""
        mask = evidence.mask if chosen is None else evidence.mask & chosen[:, None]
        counted = evidence._replace(mask=mask)
        both = ((identity, identity), (temperature, bias))
        return np.stack([_diagrams(counted, *calibration) for calibration in both])

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
        known = mask & ~true.isnan()
        columns = [known & (torch.arange(mask.shape[1]) == m) for m in range(mask.shape[1])]
        ranks = [spearman(confidence[c], true[c]) if c.any() else float("nan") for c in [*columns, known]]
        found["spearman"] = np.array(ranks)
    found["stage_diagram"] = np.stack([measured(labels == s) for s in range(count)])
    return found


def _diagrams(evidence: Evidence, log_temperature: Tensor, bias: Tensor) -> np.ndarray:
    """(M, 3, K) reliability diagrams under a calibration; NaN for a modality without a frame that counts."""
    out = np.full((evidence.mask.shape[1], 3, BINS), np.nan)
    for m, diagram in enumerate(diagrams(evidence, log_temperature, bias, kappa=None, bins=BINS)):
        bins = torch.stack([diagram.predicted, diagram.observed, diagram.frames.double()])
        out[m, :, : bins.shape[1]] = bins.numpy()
    return out
