"""What a finished study of real data shows: the methods beside a baseline, and what SAGE's weights and confidence are worth on
videos that it has not seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from sage_ext.calibration import (
    calibrated_confidence,
    collect,
    expected_calibration_error,
    reliability_diagram,
    spearman,
)
from sage_ext.data.windows import whole_clips
from sage_ext.nn import ReliabilityFusion
from sage_ext.report import Table
from sage_ext.study.methods import REFERENCE, title
from sage_ext.study.plan import CLEAN, Study, parts, run_path, scored_clips
from sage_ext.study.report import score
from sage_ext.study.results import Results, Trained, gather
from sage_ext.study.run import RESULT
from sage_ext.study.statistics import interval, pooled_score, resampled
from sage_ext.training.evaluate import clip_moments
from sage_ext.training.runs import Run


def finished(study: Study, out: Path, baselines: Mapping[str, Mapping[str, np.ndarray]]) -> Results:
    """The scores of the finished study in `out` without corruption, and beside its methods `baselines`: {name: {clip: (T, C)
    predictions on [-1, 1]}}, the same with every seed."""
    found, rates, results = parts(study, out), {}, {}
    for part in found:
        for method in study.methods:

            def result(seed: int, rate: float) -> dict:
                return json.loads((run_path(out, method, seed, rate, part) / RESULT).read_text())  # noqa: B023

            # The rule by which `compare` chooses: the best mean validation P, the first of equals.
            tuned = [np.mean([result(s, rate)["P"] for s in range(study.tuning_seeds)]) for rate in study.rates]
            rate = rates[method, part] = study.rates[int(np.argmax(tuned))]
            results.update({(method, part, s): result(s, rate) for s in range(study.seeds)})
    held = gather(study, out, found, [None], Trained(rates, results))
    clips = [clip for part in found for clip in scored_clips(part, study.modalities)]
    moments = dict(held.moments)
    for name, predicted in baselines.items():
        each = np.stack([clip_moments(predicted[clip.name], clip).numpy() for clip in clips])  # (V, C, 6)
        moments[name] = np.broadcast_to(each, (study.seeds, 1, *each.shape))
    return dataclasses.replace(held, methods=[*held.methods, *baselines], moments=moments)


# -------------------------------------------------------------------------------------------------------------- methods
def by_fold(results: Results, method: str) -> np.ndarray:
    """(N, F): P of each fold's frames by themselves, with each seed."""
    moments, folds = np.moveaxis(results.moments[method][:, 0], 1, 0), np.array(results.folds)
    return np.stack(
        [
            pooled_score(moments[folds == part.name], np.ones((1, int((folds == part.name).sum()))))[0]
            for part in results.parts
        ],
        1,
    )


def methods(results: Results, draws: int = 2000) -> Table:
    scores, folds = score(results, draws), {method: by_fold(results, method) for method in results.methods}
    group, rng = scores.groups[CLEAN], np.random.default_rng(0)
    seeds, count = folds[results.methods[0]].shape
    weights = resampled([str(k) for k in range(count)], draws, rng) / count
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds

    def mean_difference(method: str) -> str:
        each = folds[REFERENCE] - folds[method]
        low, high = interval(np.einsum("rn,nf,rf->r", of_seeds, each, weights))
        return f"{each.mean():+.3f} [{low:+.3f}, {high:+.3f}]"

    rows = []
    for method in sorted(results.methods, key=lambda method: -folds[method].mean()):
        pooled = scores.measured[method][:, 0]
        spread = f" ± {np.std(pooled, ddof=1):.3f}" if seeds > 1 and np.ptp(pooled) > 0 else ""
        mean = folds[method].mean(0)
        row = [title(method), f"{pooled.mean():.3f}{spread}", f"{mean.mean():.3f} ± {np.std(mean, ddof=1):.3f}"]
        row.append(f"{folds[method].mean(1).min():.3f}")
        if REFERENCE in results.methods:
            there = method != REFERENCE
            found = scores.difference(REFERENCE, method, group)
            row += ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*found), mean_difference(method)] if there else ["", ""]
        rows.append(row)
    header = ["", "P, all frames", "P, mean of the folds", "its worst seed"]
    if REFERENCE in results.methods:
        header += ["SAGE less this, all frames", "SAGE less this, mean of the folds"]
    note = (
        f"Nothing corrupted; {results.frames:,} frames of {len(results.clips)} videos in {count} folds, each predicted by "
        f"models of the others; seeds: {seeds}. All frames: mean ± standard deviation over seeds. Folds: P of each by "
        "itself, mean ± standard deviation over folds. In brackets: 95 % intervals of the bootstrap over groups of videos "
        "(folds, in the last column) and seeds."
    )
    return Table("Methods", header, rows, note)


# ----------------------------------------------------------------------------------------------------------- confidence
def confidence(results: Results, out: Path) -> Table:
    """Of the study's SAGE, on the videos of the folds that it was not trained on."""
    study = results.study
    found: dict[str, dict[str, list]] = {}
    for seed in range(study.seeds):
        frames: dict[str, list[torch.Tensor]] = {}
        for part in results.parts:
            run = Run.load(run_path(out, REFERENCE, seed, results.trained.rates[REFERENCE, part], part))
            for clip in scored_clips(part, study.modalities):
                said, evidence = run.predict(clip), collect(run.model, [whole_clips([clip], run.names)])
                fusion = run.model.fusion
                assert isinstance(fusion, ReliabilityFusion)
                fitted = fusion.log_temperature.double(), fusion.bias.double()
                stated = calibrated_confidence(evidence.reliability.double(), evidence.stage.double(), *fitted)
                error = evidence.squared_error.double().mean(-1)  # of the estimate, put to scale on the tuning split
                for k, name in enumerate(run.experts):
                    told = evidence.mask[:, k]
                    if not bool(told.any()):
                        continue
                    column = found.setdefault(name, {key: [] for key in ("weight", "share", "rho", "error", "best")})
                    if name in run.names:
                        column["weight"].append(said.weights[clip.valid, run.names.index(name)].mean())
                    column["share"].append(said.shares[clip.valid, k].mean())
                    pair = torch.stack([stated[told, k], error[told, k]])
                    frames.setdefault(name, []).append(pair)
                    column["best"].append(_at_best(said.experts[clip.valid, k], np.asarray(clip.labels)[clip.valid]))
                    column["rho"].append(spearman(pair[0], -pair[1]))
                    column["error"].append(_calibration_error(pair))
        for name, pairs in frames.items():
            pair = torch.cat(pairs, 1)
            whole = (float(pair[0].mean()), float(1 - pair[1].mean()), _calibration_error(pair))
            found[name].setdefault("whole", []).append(whole)
    rows = []
    for name, column in found.items():
        stated, observed, error = np.mean(column["whole"], 0)
        rho = np.array(column["rho"])
        rho = rho[np.isfinite(rho)]  # where the confidence does not move there is none
        weight = float(np.mean(column["weight"])) if column["weight"] else "-"
        rows.append(
            [name, weight, float(np.mean(column["share"])), stated, observed, float(np.mean(column["best"])), error]
        )
        rows[-1].append(float(np.mean(column["error"])))
        rows[-1] += [f"{rho.mean():+.3f}", float(np.abs(rho).mean())] if len(rho) else ["-", "-"]
    header = [
        "", "weight", "share", "confidence stated", "observed", "at best", "calibration error", "the same within a video",
        "rank correlation", "its size",
    ]  # fmt: skip
    note = (
        "On held-out videos, mean over seeds. Weight: among the modalities. Share: of the expert in the estimate. Observed: "
        "the share of the targets' variance that the expert's own estimate explains, put to scale on the tuning split; below "
        "0 where their mean would be better. At best: put to scale on the held-out video itself, mean over videos. "
        "Calibration error: of all frames together, and of each video by itself (15 groups of equally many frames). Rank "
        "correlation: of the confidence with minus the frame's squared error, within a video, mean over videos; its size: "
        "the mean of its absolute value."
    )
    return Table("SAGE's weights and confidence", header, rows, note)


def _at_best(estimate: np.ndarray, labels: np.ndarray) -> float:
    """The share of the labels' variance that estimates (T, C) explain after the best line of no falling slope: the squared
    correlation, mean over targets."""
    found = [np.corrcoef(p, y)[0, 1] if min(np.ptp(p), np.ptp(y)) > 0 else 0.0 for p, y in zip(estimate.T, labels.T)]
    return float(np.mean(np.maximum(found, 0) ** 2))


def _calibration_error(pair: torch.Tensor) -> float:
    return expected_calibration_error(reliability_diagram(pair[0], pair[1], kappa=None))
