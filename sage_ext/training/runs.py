"""What is done with a finished run: calibrate its confidence, score it, predict with it, report on it."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration import (
    Evidence,
    ReliabilityDiagram,
    calibrated_confidence,
    collect,
    diagrams,
    expected_calibration_error,
    fit_calibration,
    reliability_diagram,
)
from ..data.affwild2 import AffWild2, Clip, write_submission
from ..data.rates import default_frames
from ..data.synthetic import ToldClips
from ..data.targets import VALENCE_AROUSAL, Targets, described, make_targets, unscaled
from ..data.windows import whole_clips
from ..files import alone, replacing, write_atomic
from ..models.sage import DWELL, PACE, SAGE, Trust
from ..nn import ReliabilityFusion
from ..report import Picture, Table, plot_clip, plot_reliability, plot_training, read_log, write_report
from .checkpoint import load_checkpoint, reading, save_checkpoint
from .evaluate import ClipPrediction, evaluate, mean_filter, predict_clips
from .trainer import BEST, LOG, RunError, read_config


@dataclass(frozen=True)
class Run:
    """The best model of a run directory, ready to predict."""

    path: Path
    model: SAGE  # in evaluation mode, on `device`, calibrated if the run is
    names: list[str]  # its modalities in order
    targets: Targets
    fps: float  # frames a second of the data it was trained on
    columns: dict[str, list[str]]  # names of the features of the modalities whose meta.json said them
    data: str  # root of those data
    window: int  # frames; for a model that is not causal
    hop: int
    epoch: int  # counted from 0
    step: int
    calibration: dict[str, Any] | None
    quality_columns: dict[str, list[str]]  # likewise of its quality
    told: bool  # its quality is the truth of synthetic data
    device: str
    about: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # what the data said of modalities: how they were extracted

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu", trust: Trust | None = None) -> Run:
        """`trust`: see `SAGE.set_trust`. RunError where there is no run or it has no finished epoch; CheckpointError where a file
        is damaged."""
        path = Path(path)
        config = read_config(path)
        if not (path / BEST).exists():
            raise RunError(f"{path}: expected a run with {BEST}, got one of which no epoch is finished yet")
        state = load_checkpoint(path / BEST)
        with reading(path / BEST, "the weights of a model"):
            with torch.device("meta"):  # a damaged configuration may ask for more memory than there is
                wanted = {name: x.shape for name, x in SAGE.from_config(state["model_config"]).state_dict().items()}
            shapes = {name: x.shape for name, x in state["model"].items()}
            shapes.setdefault("stuck_limit", wanted["stuck_limit"])  # not in runs from before it was learnt
            if shapes != wanted:
                raise ValueError("weights of other names or shapes than its configuration says")
            model = SAGE.from_config(state["model_config"])
            model.load_state_dict(state["model"])
            names = list(model.names or state["modalities"])
            if names != state["modalities"]:
                raise ValueError(f"the modalities {state['modalities']!r} for a model of {names!r}")
            targets = make_targets([(name, ends) for name, *ends in state["targets"]], "targets")
            if len(targets) != model.num_targets:
                raise ValueError(f"{len(targets)} targets for a model of {model.num_targets}")
            fps = float(state["fps"])
            spans = config.spans(fps)
            parts = (
                names,
                targets,
                fps,
                {name: [str(x) for x in columns] for name, columns in state["columns"].items()},
                config.data,
                spans.window,
                spans.hop,
                int(state["epoch"]),
                int(state["step"]),
                state["calibration"],
                {name: [str(x) for x in columns] for name, columns in state["quality_columns"].items()},
                config.told,
            )
        if trust is not None:
            model.set_trust(trust, *(default_frames(frames, fps) for frames in (PACE, DWELL)))
        return cls(path, model.to(device).eval(), *parts, device, state.get("about", {}))

    def open(
        self, root: str | os.PathLike[str] | None, split: str, sample: str | os.PathLike[str] | None = None
    ) -> AffWild2 | ToldClips:
        """A split of the data set at `root` (default: the one trained on) with the model's modalities. Quality that the model
        reads and the data have not is unknown."""
        data = AffWild2(self.data if root is None else root, split, modalities=self.names, sample_file=sample)
        want = dict(zip(self.names, self.model.in_dims))
        if dict(data.modalities) != want:
            raise ValueError(
                f"root: expected features {want} for the model of {self.path}, got {dict(data.modalities)} in {data.root}"
            )
        known = [("columns", data.columns, self.columns), ("quality", data.quality_columns, self.quality_columns)]
        for what, name, columns, learnt in (
            (what, name, columns, ours.get(name, list(columns)))
            for what, theirs, ours in known
            for name, columns in theirs.items()
        ):
            if list(columns) != learnt and (what == "columns" or self.model.reads_quality(name)):
                place = next(
                    (i for i, (a, b) in enumerate(zip(columns, learnt)) if a != b), min(len(columns), len(learnt))
                )
                theirs, ours = ([*names, "nothing"][min(place, len(names))] for names in (columns, learnt))
                raise ValueError(
                    f"root: expected the {what} of {name} that {self.path} was trained on, in their order, got {theirs!r} in "
                    f"place of {ours!r} (column {place + 1}) in {data.root}"
                )
        if data.targets != self.targets and data.sample_file is None and not data.unlabelled:
            raise ValueError(
                f"root: expected the targets {described(self.targets)} of {self.path}, got {described(data.targets)} in "
                f"{data.root}"
            )
        if not 0.95 <= data.frame_rate / self.fps <= 1.05:
            data.mismatches.append(
                f"{data.root}: frames come at {data.frame_rate:g} a second, and {self.path} learnt from {self.fps:g}: what "
                "it knows of time does not fit"
            )
        wanted = {name: q for name, q in zip(self.names, self.model.quality_dims) if q and not self.told}
        for name, q in wanted.items():
            if data.quality_dims.get(name, q) != q:
                raise ValueError(
                    f"root: expected {q} columns of quality of {name} for the model of {self.path}, got "
                    f"{data.quality_dims[name]} in {data.root}"
                )
        return ToldClips(data) if self.told else data

    @property
    def experts(self) -> list[str]:
        """Whose confidence there is: the joint expert, where the model has one, then the modalities."""
        return ["joint", *self.names] if self.model.config["joint"] else self.names

    def widths(self, smooth: Sequence[int]) -> tuple[int, ...]:
        """Frames of the mean filter a target: as many as given, or the one given for all. ValueError for others."""
        if len(smooth) not in (1, len(self.targets)) or min(smooth) < 1:
            raise ValueError(
                f"smooth: expected frames >= 1, one number or {len(self.targets)} "
                f"({', '.join(target.name for target in self.targets)}), got {', '.join(map(str, smooth))}"
            )
        return tuple(smooth) * len(self.targets) if len(smooth) == 1 else tuple(smooth)

    def put_to_scale(self, said: ClipPrediction) -> ClipPrediction:
        """`said` with each modality's own estimates as its confidence means them: see `SAGE.own_gain`."""
        model, own = self.model, slice(-len(self.names), None)
        gain, shift = model.own_gain[own].cpu().numpy(), model.own_shift[own].cpu().numpy()
        return dataclasses.replace(said, unimodal=gain * said.unimodal + shift)

    def predict(self, clip: Clip, *, smooth: Sequence[int] = (1,), chunk: int = 3000) -> ClipPrediction:
        """`predict_clip`, then a centred mean filter of `smooth` frames on each target. On [-1, 1], see `data.targets`."""
        widths = self.widths(smooth)
        (said,) = self.predict_together([clip], chunk=chunk)
        if max(widths) == 1:
            return said
        return dataclasses.replace(said, prediction=mean_filter(said.prediction, widths))

    def predict_together(self, clips: Sequence[Clip], *, chunk: int = 3000) -> list[ClipPrediction]:
        """`predict_clips`: faster than one by one where they are short and of like length."""
        return predict_clips(
            self.model, clips, self.names, chunk=chunk, window=self.window, hop=self.hop, device=self.device
        )


# -------------------------------------------------------------------------------------------------------- calibration
def calibrate_run(path: str | os.PathLike[str], *, device: str = "cpu") -> dict[str, Any] | None:
    """Fit the calibration of the run's best model on its validation split, and store it with the weights.

    Returns {"log_temperature", "bias" (M, S), "kappa", "error_before", "error_after", "error_held_out": {modality:
    expected calibration error}}; None for a fusion without learnt confidence. "error_after" is measured on the frames
    that were fitted; "error_held_out" on each half of the videos (every other one) with the calibration fitted on the
    other half. BusyError while another process trains or calibrates the run.
    """
    read_config(path)  # RunError where there is no run: nothing is made there
    with alone(Path(path), "calibrating"):
        return _calibrate(Run.load(path, device))


def _calibrate(run: Run) -> dict[str, Any] | None:
    if not isinstance(run.model.fusion, ReliabilityFusion):
        return None
    data = run.open(None, "validation")
    lengths: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for clip in data:
            lengths.append(clip.num_frames)
            yield whole_clips([clip], run.names)

    whole = collect(run.model, batches(), scale=True)
    clips = [Evidence(*parts) for parts in zip(*(column.split(lengths) for column in whole))]
    halves = [join(clips[i::2]) for i in range(2)] if len(clips) > 1 else []
    temperature, bias = fit_calibration(*whole, kappa=None)
    zero = torch.zeros_like(bias)
    result: dict[str, Any] = {
        "log_temperature": temperature,
        "bias": bias,
        "error_before": _errors(diagrams(whole, zero, zero, kappa=None), run.experts),
        "error_after": _errors(diagrams(whole, temperature, bias, kappa=None), run.experts),
        "error_held_out": _held_out(halves, run.experts),
    }
    state = load_checkpoint(run.path / BEST)
    state["model"]["fusion.log_temperature"], state["model"]["fusion.bias"] = temperature, bias
    for name in ("own_gain", "own_shift", "target_variance"):
        state["model"][name] = run.model.get_buffer(name).cpu()
    save_checkpoint(run.path / BEST, {**state, "calibration": result})
    return result


def join(parts: Sequence[Evidence]) -> Evidence:
    """The frames of all parts, one after another."""
    return Evidence(*(torch.cat(column) for column in zip(*parts)))


def _errors(found: Sequence[ReliabilityDiagram], names: Sequence[str]) -> dict[str, float | None]:
    """None for a modality that no frame has."""
    errors = [expected_calibration_error(diagram) for diagram in found]
    return {name: None if math.isnan(error) else error for name, error in zip(names, errors)}


def _held_out(halves: Sequence[Evidence], names: Sequence[str]) -> dict[str, float | None] | None:
    if len(halves) < 2 or not all(bool(half.mask.any(0).all()) for half in halves):
        return None
    confidence = []
    for ours, theirs in (halves, halves[::-1]):
        fitted = fit_calibration(*theirs, kappa=None)
        confidence.append(
            calibrated_confidence(ours.reliability.double(), ours.stage.double(), *(p.double() for p in fitted))
        )
    r, whole = torch.cat(confidence), join(halves)
    return _errors(
        [
            reliability_diagram(r[:, m], whole.squared_error[:, m], whole.mask[:, m], kappa=None)
            for m in range(len(names))
        ],
        names,
    )


# --------------------------------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True)
class Evaluation:
    """Scores of a run on a split, and what they were computed from."""

    scores: dict[str, dict[str, float]]  # "fused" and each modality's own head -> CCC_V, CCC_A, P or the like
    predictions: dict[str, ClipPrediction]
    before: list[ReliabilityDiagram]  # a modality; empty without learnt confidence
    after: list[ReliabilityDiagram]


def evaluate_clips(run: Run, clips: Iterable[Clip], *, smooth: Sequence[int] = (1,), chunk: int = 3000) -> Evaluation:
    """Score annotated `clips` (iterated twice), and compare confidence with error before and after calibration."""
    scores, predictions = evaluate(functools.partial(run.predict, smooth=smooth, chunk=chunk), clips, run.names)
    before: list[ReliabilityDiagram] = []
    after: list[ReliabilityDiagram] = []
    fusion = run.model.fusion
    if isinstance(fusion, ReliabilityFusion):
        evidence = collect(run.model, (whole_clips([clip], run.names) for clip in clips))
        temperature, bias = fusion.log_temperature.cpu(), fusion.bias.cpu()
        zero = torch.zeros_like(bias)
        before = diagrams(evidence, zero, zero, kappa=None)
        after = diagrams(evidence, temperature, bias, kappa=None)
    return Evaluation(scores, predictions, before, after)


def evaluate_run(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    split: str = "validation",
    *,
    smooth: Sequence[int] = (1,),
    device: str = "cpu",
    chunk: int = 3000,
    report: str | os.PathLike[str] | None = None,
    videos: int = 3,
    trust: Trust | None = None,
) -> tuple[dict[str, Any], list[Table]]:
    """Score a run on an annotated split, write RUN/evaluation-<split>.json and, if asked, a report.

    Returns what the file holds, and tables for reading.
    """
    run = Run.load(path, device, trust)
    clips = run.open(root, split)
    if not clips.annotated:
        raise ValueError(f"split: expected one with annotated frames, got {split} of {clips.root}, which has none")
    found = evaluate_clips(run, clips, smooth=smooth, chunk=chunk)
    result: dict[str, Any] = {
        "split": split,
        "videos": len(clips),
        "valid_frames": int(sum(clip.valid.sum() for clip in clips)),
        "epoch": run.epoch + 1,
        "step": run.step,
        "targets": {target.name: [target.low, target.high] for target in run.targets},
        "post_processing": {"mean_filter_frames": {t.name: width for t, width in zip(run.targets, run.widths(smooth))}},
        "scores": found.scores,
        "calibration_error": None,
        "mismatches": clips.mismatches,
    }
    if found.before:
        error = {"before": _errors(found.before, run.experts), "after": _errors(found.after, run.experts)}
        if run.calibration is not None and root is None and split == "validation":
            error["held_out"] = run.calibration["error_held_out"]
        result["calibration_error"] = error
    write_atomic(run.path / f"evaluation-{split}.json", json.dumps(result, indent=1) + "\n")
    tables = [score_table(result), *calibration_table(result)]
    if report is not None:
        chosen = sorted(clips, key=lambda clip: -int(clip.valid.sum()))[:videos]
        pictures = [*training_pictures(run), *calibration_pictures(run, found), *clip_pictures(run, found, chosen)]
        write_report(report, f"{run.path.name}: {split} split", pictures, tables)
    return result, tables


def score_table(result: Mapping[str, Any]) -> Table:
    widths = result["post_processing"]["mean_filter_frames"]
    smooth = "no post-processing"
    if max(widths.values()) > 1:
        each = ", ".join(f"{name} {width}" for name, width in widths.items())
        smooth = f"centred mean filter: {each} frames (fused only)"
    columns = list(result["scores"]["fused"])
    return Table(
        f"Concordance on the {result['split']} split",
        ("", *columns),
        [
            ("fused" if name == "fused" else f"{name}, own head", *(found[key] for key in columns))
            for name, found in result["scores"].items()
        ],
        f"{result['valid_frames']} valid frames of {result['videos']} videos taken together; {smooth}; "
        f"epoch {result['epoch']}.",
    )


def calibration_table(result: Mapping[str, Any]) -> list[Table]:
    error = result["calibration_error"]
    if error is None:
        return []
    note = "Mean gap between stated and observed reliability, 0 is perfect."
    header = ["", "before", "after"]
    if error.get("held_out"):
        header.append("held out")
        note += "\nAfter: on the frames that were fitted. Held out: each half of the videos, fitted on the other half."
    cells = {name: [error[key.replace(" ", "_")][name] for key in header[1:]] for name in error["before"]}
    rows = [[name, *("-" if value is None else value for value in values)] for name, values in cells.items()]
    return [Table("Expected calibration error of the confidence", header, rows, note)]


def training_pictures(run: Run) -> list[Picture]:
    text = (
        "Training: loss and its parts, and concordance. The training windows hold rehearsed failures, validation none."
    )
    return [Picture("training", text, plot_training(read_log(run.path / LOG)))]


def calibration_pictures(run: Run, found: Evaluation) -> list[Picture]:
    if not found.before:
        return []
    text = (
        "Reliability diagram: frames in 15 equal groups by the confidence of an expert, against the reliability that its own "
        "errors show: the share of the targets' variance that its estimate explains, once it is put to scale. On the diagonal "
        "confidence is what it claims."
    )
    return [Picture("reliability", text, plot_reliability(found.before, found.after, run.experts))]


def clip_pictures(
    run: Run, found: Evaluation, clips: Iterable[Clip], best_weights: Mapping[str, np.ndarray] | None = None
) -> list[Picture]:
    pictures = []
    for clip in clips:
        said = found.predictions[clip.name]
        present = np.stack([np.asarray(clip.present[name]) for name in run.names], 1)
        figure = plot_clip(
            clip.name, said.prediction, clip.labels, clip.valid, said.weights, said.confidence, said.stage, run.names,
            present=present, best_weights=None if best_weights is None else best_weights[clip.name],
            fps=clip.fps, targets=run.targets,
        )  # fmt: skip
        text = (
            f"{clip.name}: prediction and annotation, each modality's weight and confidence (bars: missing), "
            "and the posterior of the interaction stage."
        )
        pictures.append(Picture(f"video-{clip.name}", text, figure))
    return pictures


# --------------------------------------------------------------------------------------------------------- prediction
def predict_run(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    split: str = "test",
    sample: str | os.PathLike[str] | None = None,
    smooth: Sequence[int] = (1,),
    device: str = "cpu",
    chunk: int = 3000,
    trust: Trust | None = None,
) -> dict[str, np.ndarray]:
    """Predict a split and write `out`: in the submission format, with the rows of the sample file, where the test split
    is that of a sample file; else a table of every frame, see `write_predictions`.

    `sample` defaults to sample_submission.txt in the data set. Returns {clip name: (T, C)} in the targets' own units.
    """
    run = Run.load(path, device, trust)
    data = run.open(root, split, sample)
    said = {clip.name: run.predict(clip, smooth=smooth, chunk=chunk) for clip in data}
    predictions = {name: unscaled(one.prediction.astype(np.float64), run.targets) for name, one in said.items()}
    if data.sample_file is None:
        write_predictions(out, said, {clip.name: clip.fps for clip in data}, run.targets, run.names)
        return predictions
    names = [target.name for target in run.targets]
    if names != [target.name for target in VALENCE_AROUSAL]:
        raise ValueError(
            f"sample: expected none for a model of {', '.join(names)} (the submission format is that of valence and "
            f"arousal; Test_Set holds annotations of other targets), got {data.sample_file}"
        )
    write_submission(out, data.sample_file, {name: one.prediction for name, one in said.items()})  # on [-1, 1]
    return predictions


def write_predictions(
    path: str | os.PathLike[str],
    said: Mapping[str, ClipPrediction],
    fps: Mapping[str, float],
    targets: Targets,
    modalities: Sequence[str],
) -> None:
    """A CSV, a row a frame: video, frame (from 1), time (s, of the frame's beginning), each target in its own units, and
    each modality's weight and confidence. The file is there whole or not at all."""
    columns = [f"{what} {name}" for what in ("weight", "confidence") for name in modalities]
    with replacing(Path(path)) as file:
        rows = csv.writer(text := io.StringIO(), lineterminator="\n")
        rows.writerow(["video", "frame", "time", *(target.name for target in targets), *columns])
        for name, one in said.items():
            values = unscaled(one.prediction.astype(np.float64), targets).tolist()
            shares = np.concatenate([one.weights, one.confidence], 1).tolist()
            decimals = max(math.ceil(math.log10(fps[name])) + 3, 0)  # that tell frames apart
            for t, (row, more) in enumerate(zip(values, shares)):
                said_ = [f"{x:.{target.digits}f}" for x, target in zip(row, targets)]
                rows.writerow([name, t + 1, f"{t / fps[name]:.{decimals}f}", *said_, *(f"{x:.6f}" for x in more)])
            file.write(text.getvalue().encode())
            text.seek(0)
            text.truncate()


__all__ = ["Evaluation", "Run", "calibrate_run", "evaluate_clips", "evaluate_run", "predict_run", "write_predictions"]
