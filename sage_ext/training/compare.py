"""The comparison of fusion methods: trained alike, scored clean and under every robustness condition.

    OUT/study.json                                what was asked for; a study is continued only with the same
    OUT/data/                                     synthetic data made here, or a view of licensed data (see `Study`)
    OUT/runs/<method>/seed-<s>-lr-<rate>/         an ordinary run directory each, and result.json when it is finished
    OUT/evaluations/seed-<s>/<condition>.npz      moments of every video under one condition, all methods
    OUT/results.csv, report.md, report.html, *.png

Everything is a function of the data, the configuration and the seed, and every file is there whole or not at all, so a
study that is stopped at any moment continues with the same command, and may be given more methods, seeds or conditions.

What is alike for all methods: data, windows and their order, rehearsed failures, steps, sizes, loss, the grid of
learning rates, and how the best epoch and rate are chosen, on the validation split alone. The rate is the one with the
best mean validation P over the first `tuning_seeds` seeds; it is then used for all of them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..calibration import calibrated_confidence, reliability_diagram, spearman
from ..data.affwild2 import SPLITS, AffWild2, Clip, annotation_folder, bare_name
from ..data.synthetic import Oracle, write_dataset
from ..data.windows import OverlapAverage, clip_tensors, window_starts
from ..files import write_atomic
from ..functional import ccc_moments
from ..models.peers import FUSIONS, METHODS
from ..nn import ReliabilityFusion
from ..report import Table
from ..robustness import Condition, conditions, corrupted
from .demo import TruthClips
from .jobs import Job, Workers
from .runs import Run, calibrate_run
from .trainer import BEST, RunError, TrainConfig, data_shape, open_data, read_config, train

STUDY, RESULT, CLEAN, REFERENCE, ORACLE = "study.json", "result.json", "clean", "sage", "oracle"
DATA = {"seed": 1, "train": 160, "validation": 32, "test": 48, "frames": (250, 900)}
QUICK = ("sage", "concat", "uniform")  # and every single modality
HELD_OUT = 5  # of data without truth, one training video in so many is the validation split
BINS = 15
_FRAMES = 12_000  # of a batch, padding included
_CHUNK = 3_000  # frames a causal model is given at once
_FREE = ("methods", "seeds", "severities", "corruptions")  # a study may be continued with others


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how.

    On synthetic data (root has truth/ and a test split) the score is on the test split with the labels that only the
    synthesiser knows, choices are made on the validation split. On any other data in the Aff-Wild2 layout the score is
    on the validation split, and a fifth of the training *videos*, chosen by a hash of their names, takes its place in
    all choices: OUT/data is that view of the data set, made of links.
    """

    data: str  # root of the data set
    methods: tuple[str, ...]  # names in `peers.METHODS`, "<modality>-only"
    seeds: int = 5  # seeds 0 .. seeds - 1 of weights, order, rehearsal and corruption
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)  # the grid of peak learning rates
    tuning_seeds: int = 1
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    corruptions: tuple[str, ...] | None = None  # None: the whole protocol
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of TrainConfig, the same for all

    def __post_init__(self) -> None:
        for name, low in (("seeds", 1), ("tuning_seeds", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected a whole number >= {low}, got {value!r}")
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
            raise ValueError(f"train: the study itself decides {', '.join(sorted(fixed))}")
        return TrainConfig.from_json({"data": self.data, "threads": 1, "patience": 10**9, **self.train})

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({**dataclasses.asdict(self), "train": self.base().to_json()}))


def default_methods(modalities: Sequence[str]) -> tuple[str, ...]:
    """All there are for data with these modalities."""
    fused = [m.name for m in METHODS.values() if len(modalities) == 2 or not _pairwise(m.overrides.get("fusion"))]
    return (*fused, *(f"{name}-only" for name in modalities))


def _pairwise(fusion: str | None) -> bool:
    return fusion in FUSIONS and FUSIONS[fusion].pairwise


def quick_methods(modalities: Sequence[str]) -> tuple[str, ...]:
    return (*QUICK, *(f"{name}-only" for name in modalities))


def title(method: str) -> str:
    """For tables and pictures."""
    if method == ORACLE:
        return "oracle (true noise known)"
    return METHODS[method].title if method in METHODS else method.replace("-", " ")


def configuration(study: Study, data: Path, method: str, seed: int, rate: float) -> TrainConfig:
    """Of one training."""
    own = METHODS[method].overrides if method in METHODS else {"modalities": (method.removesuffix("-only"),)}
    return dataclasses.replace(study.base(), data=str(data), seed=seed, lr=rate, **own)


# -------------------------------------------------------------------------------------------------------------- jobs
def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any], free: Iterable[str]) -> str:
    keys = [key for key in {**stored, **asked} if key not in free and stored.get(key) != asked.get(key)]
    return "; ".join(f"{key} {stored.get(key)!r} -> {asked.get(key)!r}" for key in keys)


def finished(config: TrainConfig, path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What result.json of the run at `path` holds; None before it is finished. RunError for another configuration."""
    run = Path(path)
    if not (run / RESULT).exists():
        return None
    differ = _differences(read_config(run).to_json(), config.to_json(), ("data", "num_workers", "checkpoint_every"))
    if differ:
        raise RunError(f"{run}: was trained with another configuration ({differ})")
    return json.loads((run / RESULT).read_text())


def train_one(config: TrainConfig, path: str) -> dict[str, Any]:
    """In a process of its own: train (or continue) the run at `path`, calibrate it, and say what came out.

    Returns (and leaves in result.json) {"P": of the best epoch on the validation split, "epoch", "step", "seconds" of
    the processor, "parameters", "model": digest of the weights}.
    """
    run = Path(path)
    began = time.process_time()
    best = train(config, run, resume=True, progress=False)
    model = Run.load(run, config.device).model
    if isinstance(model.fusion, ReliabilityFusion):
        calibrate_run(run, device=config.device)
    result = {
        "P": best["scores"]["fused"]["P"],
        "epoch": best["epoch"],
        "step": best["step"],
        "seconds": time.process_time() - began,  # of the last sitting
        "parameters": sum(p.numel() for p in model.parameters()),
        "model": hashlib.sha256((run / BEST).read_bytes()).hexdigest()[:16],
    }
    write_atomic(run / RESULT, json.dumps(result, indent=1) + "\n")
    return result


class Scored(NamedTuple):
    """A finished run that is to be scored."""

    method: str
    run: str
    model: str  # digest


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The evaluation of all methods under one condition with one seed."""

    data: str
    truth: bool
    runs: tuple[Scored, ...]
    condition: Condition | None  # None: clean
    seed: int
    device: str
    out: str


def missing(sweep: Sweep, found: Mapping[str, Mapping[str, np.ndarray]]) -> list[Scored]:
    """What is not in `found`, or is there of other weights."""
    wanted = list(sweep.runs) + ([Scored(ORACLE, "", "")] if sweep.truth else [])
    return [run for run in wanted if run.method not in found or str(found[run.method]["model"]) != run.model]


def evaluate_sweep(sweep: Sweep) -> dict[str, str]:
    """In a process of its own: write what `sweep.out` lacks of `sweep.runs`. Returns {method: what went wrong}."""
    path = Path(sweep.out)
    found = read_evaluation(path) if path.exists() else {}
    todo = missing(sweep, found)
    clean = _clips(sweep.data, sweep.truth)
    seen = clean if sweep.condition is None else _corrupted(sweep, clean)
    errors: dict[str, str] = {}
    for method, arrays in _score(sweep, clean, seen, todo, errors).items():
        found[method] = arrays
    flat = {f"{method}/{key}": value for method, arrays in found.items() for key, value in arrays.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **flat)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return errors


def read_evaluation(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{method: {"model": digest, "moments": (V, 2, 6), ...}} that `evaluate_sweep` wrote."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as file:
        for key in file.files:
            method, _, name = key.partition("/")
            found.setdefault(method, {})[name] = file[key]
    return found


@functools.lru_cache(maxsize=1)
def _clips(data: str, truth: bool) -> list[Clip]:
    """What is scored, in the order of its names."""
    return list(TruthClips(Path(data))) if truth else list(AffWild2(data, "validation"))


@functools.lru_cache(maxsize=1)
def _truth(data: str) -> dict[str, dict[str, np.ndarray]]:
    """{clip name: stage (T,), reliability (T, M)}, modalities in the order of the clips."""
    found = {}
    for clip in _clips(data, True):
        with np.load(Path(data) / "truth" / f"{clip.name}.npz") as file:
            order = [list(file["modalities"]).index(name) for name in clip.features]
            found[clip.name] = {"stage": file["stage"].astype(np.int64), "reliability": file["reliability"][:, order]}
    return found


def _corrupted(sweep: Sweep, clips: Sequence[Clip]) -> Sequence[Clip]:
    assert sweep.condition is not None
    stages = {name: truth["stage"] for name, truth in _truth(sweep.data).items()} if sweep.truth else None
    return corrupted(clips, sweep.condition, sweep.seed, stages=stages)


@functools.lru_cache(maxsize=1)
def _oracle(data: str) -> Oracle:
    return Oracle(data)


@functools.lru_cache(maxsize=1)
def _models(runs: tuple[Scored, ...], device: str) -> dict[str, Run]:
    """All of one seed: kept while that seed's conditions are gone through."""
    return {run.method: Run.load(run.run, device) for run in runs}


# -------------------------------------------------------------------------------------------------------- prediction
class Batch(NamedTuple):
    """Clips side by side, padded at their ends to the longest."""

    places: list[int]  # (B,) of each in the split
    clips: list[Clip]  # (B,)
    lengths: list[int]  # (B,)
    features: dict[str, Tensor]  # name -> (B, L, D)
    present: Tensor  # (B, L, M) bool, False in padding
    frame: Tensor  # (B, L) bool, False in padding
    labels: Tensor  # (B, L, 2)
    valid: Tensor  # (B, L) bool, False in padding


def batches(
    clips: Sequence[Clip], lengths: Sequence[int], names: Sequence[str], device: str = "cpu"
) -> Iterator[Batch]:
    """All clips of `lengths` frames, once each, those of like length together; about 12,000 frames a batch at most."""
    order = sorted(range(len(clips)), key=lambda i: lengths[i])
    while order:
        count = 1
        while count < len(order) and (count + 1) * lengths[order[count]] <= _FRAMES:
            count += 1
        places, order = order[:count], order[count:]
        taken = [clips[i] for i in places]  # once: a corrupted clip is computed when it is asked for
        items = [clip_tensors(clip, names) for clip in taken]

        def stack(values: list[Tensor]) -> Tensor:
            return pad_sequence(values, batch_first=True).to(device)

        yield Batch(
            places,
            taken,
            [len(item["frame"]) for item in items],
            {name: stack([item["features"][name] for item in items]) for name in names},
            *(stack([item[key] for item in items]) for key in ("present", "frame", "labels", "valid")),
        )


def predict_batch(run: Run, batch: Batch) -> Tensor:
    """(B, L, 2) of the run's own modalities: what `predict_clip` gives for each clip alone; anything in padding."""
    names = list(batch.features)
    present = batch.present[..., [names.index(name) for name in run.names]]
    features = {name: batch.features[name] for name in run.names}
    with torch.inference_mode():
        if not run.model.causal:
            return _windowed(run, batch, features, present)
        state, parts = None, []
        for start in range(0, present.shape[1], _CHUNK):
            span = slice(start, start + _CHUNK)
            output = run.model(
                {name: value[:, span] for name, value in features.items()},
                present=present[:, span],
                mask=batch.frame[:, span],
                state=state,
            )
            state = output.state
            parts.append(output.prediction)
    return torch.cat(parts, 1)


def _windowed(run: Run, batch: Batch, features: Mapping[str, Tensor], present: Tensor) -> Tensor:
    """Mean over windows of the run's length, the last one of a clip flush with its end, a short clip padded."""
    spans = [
        (b, start) for b, length in enumerate(batch.lengths) for start in window_starts(length, run.window, run.hop)
    ]
    average = [OverlapAverage(length) for length in batch.lengths]

    def cut(value: Tensor, b: int, start: int) -> Tensor:
        piece = value[b, start : min(start + run.window, batch.lengths[b])]
        return torch.cat([piece, piece.new_zeros(run.window - len(piece), *piece.shape[1:])])

    step = max(_FRAMES // run.window, 1)
    for first in range(0, len(spans), step):
        part = spans[first : first + step]
        output = run.model(
            {name: torch.stack([cut(value, *span) for span in part]) for name, value in features.items()},
            present=torch.stack([cut(present, *span) for span in part]),
            mask=torch.stack([cut(batch.frame, *span) for span in part]),
        )
        for (b, start), said in zip(part, output.prediction.double().cpu().numpy()):
            average[b].add(start, said[: batch.lengths[b] - start])
    return pad_sequence([torch.from_numpy(a.result()).float() for a in average], batch_first=True).to(present.device)


def _score(
    sweep: Sweep, clean: Sequence[Clip], seen: Sequence[Clip], todo: Sequence[Scored], errors: dict[str, str]
) -> dict[str, dict[str, np.ndarray]]:
    """{method: what the evaluation file holds of it}."""
    models = _models(sweep.runs, sweep.device)
    names = list(clean[0].features)
    moments = {run.method: np.zeros((len(clean), 2, 6)) for run in todo}
    evidence: list[_Evidence] = []
    lost = 0  # frames
    for batch in batches(seen, [clip.num_frames for clip in clean], names, sweep.device):
        for method in [method for method in moments if method not in errors]:
            try:
                if method == ORACLE:
                    parts = [_oracle_says(sweep, clean[i], clip) for i, clip in zip(batch.places, batch.clips)]
                    lost += sum(gone for _, gone in parts)
                    said = pad_sequence([torch.from_numpy(p) for p, _ in parts], batch_first=True).to(sweep.device)
                else:
                    said = predict_batch(models[method], batch)
                moments[method][batch.places] = (
                    ccc_moments(said, batch.labels, batch.valid, pool="sequence").cpu().numpy()
                )
                if method == REFERENCE:
                    evidence += _evidence(models[method], batch)
            except Exception as error:  # one method's fault must not cost the others
                errors[method] = f"{type(error).__name__}: {error}"
    found = {
        run.method: {"model": np.array(run.model), "moments": moments[run.method]}
        for run in todo
        if run.method not in errors
    }
    if ORACLE in found and lost > LOST * sum(clip.num_frames for clip in clean):
        found[ORACLE]["moments"][:] = np.nan
    if evidence:
        truth = _truth(sweep.data) if sweep.truth and sweep.condition is None else None
        found[REFERENCE].update(_confidence_study(models[REFERENCE], evidence, truth, sweep.condition is None))
    return found


# ------------------------------------------------------------------------------------------------------------- oracle
# Share of the frames that the corruption leaves without a sound modality beyond which the oracle is left blank: what is
# still in spoilt ones it cannot tell, and nothing would no longer be the upper line.
LOST = 0.1


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


def _oracle_says(sweep: Sweep, clean: Clip, seen: Clip) -> tuple[np.ndarray, int]:
    """(T, 2), and in how many frames nothing is left. It is told what was spoilt, and uses the rest."""
    oracle = _oracle(sweep.data)
    if sweep.condition is None:
        return oracle.predict(clean.name), 0
    bad = spoilt(clean, seen)
    had = np.stack([np.asarray(clean.present[name]) for name in clean.features], 1)
    with np.load(Path(sweep.data) / "truth" / f"{clean.name}.npz") as file:
        order = [list(clean.features).index(name) for name in file["modalities"]]
    return oracle.predict(clean.name, bad[:, order]), int((had.any(1) & ~(had & ~bad).any(1)).sum())


# -------------------------------------------------------------------------------------------------------- calibration
class _Evidence(NamedTuple):
    """Of one clip of T frames."""

    name: str
    reliability: Tensor  # (T, M, S) logits before calibration
    stage: Tensor  # (T, S)
    error: Tensor  # (T, M) squared, of the unimodal predictions, mean over targets
    mask: Tensor  # (T, M) annotated and present


def _evidence(run: Run, batch: Batch) -> list[_Evidence]:
    with torch.inference_mode():
        reliability, stage, unimodal, known = run.model.assess(batch.features, batch.present, batch.frame)
    error = (unimodal - batch.labels.unsqueeze(2)).square().mean(-1)
    mask = known & batch.valid.unsqueeze(-1)
    return [
        _Evidence(clip.name, *(x[b, :length].cpu() for x in (reliability, stage, error, mask)))
        for b, (clip, length) in enumerate(zip(batch.clips, batch.lengths))
    ]


def _confidence_study(
    run: Run, evidence: Sequence[_Evidence], truth: Mapping[str, Mapping[str, np.ndarray]] | None, clean: bool
) -> dict[str, np.ndarray]:
    """What the evaluation file holds of the confidence of the model with the stages `S` and modalities `M`.

    diagram (2, M, 3, K): before and after post-hoc fitting; mean confidence, observed reliability and frames of each
    bin, NaN where there are fewer. Clean only: stage_diagram (stages, 2, M, 3, K), by the true stage where there is a
    truth, else by the most probable; with a truth: contingency (S, true stages) in frames, spearman (M + 1,) of
    confidence after fitting with true reliability, each modality and all together.
    """
    fusion = run.model.fusion
    assert isinstance(fusion, ReliabilityFusion)
    reliability, stage, error, mask = (torch.cat([getattr(e, key) for e in evidence]) for key in _Evidence._fields[1:])
    reliability, stage = reliability.double(), stage.double()
    fitted = [x.detach().cpu().double() for x in (fusion.log_temperature, fusion.bias)]
    both = [calibrated_confidence(reliability, stage), calibrated_confidence(reliability, stage, *fitted)]

    def diagrams(chosen: Tensor) -> np.ndarray:
        out = np.full((2, mask.shape[1], 3, BINS), np.nan)
        for k, confidence in enumerate(both):
            for m in range(mask.shape[1]):
                counted = mask[:, m] & chosen
                if counted.any():
                    d = reliability_diagram(confidence[:, m], error[:, m], counted, kappa=run.model.kappa, bins=BINS)
                    out[k, m, :, : len(d.predicted)] = torch.stack([d.predicted, d.observed, d.frames.double()]).numpy()
        return out

    found = {"diagram": diagrams(torch.ones(len(mask), dtype=torch.bool))}
    if not clean:
        return found
    learnt = stage.argmax(1)
    if truth is None:
        labels, count = learnt, stage.shape[1]
    else:
        labels = torch.from_numpy(np.concatenate([truth[e.name]["stage"] for e in evidence]))
        count = int(max(t["stage"].max() for t in truth.values())) + 1
        table = torch.bincount(learnt * count + labels, minlength=stage.shape[1] * count)
        found["contingency"] = table.reshape(-1, count).numpy()
        true = torch.from_numpy(np.concatenate([truth[e.name]["reliability"] for e in evidence])).double()
        pairs = [(both[1][mask[:, m], m], true[mask[:, m], m]) for m in range(mask.shape[1])]
        found["spearman"] = np.array([spearman(*pair) for pair in [*pairs, (both[1][mask], true[mask])]])
    found["stage_diagram"] = np.stack([diagrams(labels == s) for s in range(count)])
    return found


def calibration_error(diagram: np.ndarray) -> np.ndarray:
    """(..., 3, K) as in the evaluation files -> (...) expected calibration error; NaN where no frame was counted."""
    predicted, observed, frames = np.moveaxis(diagram, -2, 0)
    weight = np.nan_to_num(frames)
    total = weight.sum(-1)
    gap = (np.nan_to_num(np.abs(predicted - observed)) * weight).sum(-1)
    return np.divide(gap, total, out=np.full_like(total, np.nan), where=total > 0)


# --------------------------------------------------------------------------------------------------------------- data
def has_truth(root: str | os.PathLike[str]) -> bool:
    """Synthetic data with a test split: its labels are known to the synthesiser alone."""
    root = Path(root)
    spec = root / "truth" / "spec.json"
    return spec.exists() and json.loads(spec.read_text())["test"] > 0


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
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    folders = {False: "Train_Set", True: "Validation_Set"}
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
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return out


# ---------------------------------------------------------------------------------------------------------- the study
class _Reporter:
    def __init__(self, quiet: bool) -> None:
        self.quiet, self.began = quiet, time.monotonic()

    def say(self, text: str) -> None:
        if not self.quiet:
            seconds = int(time.monotonic() - self.began)
            print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)

    def phase(self, count: int) -> _Phase:
        return _Phase(self, count)


class _Phase:
    """Counts finished jobs and guesses from them when the rest will be."""

    def __init__(self, reporter: _Reporter, count: int) -> None:
        self.reporter, self.count, self.done, self.began = reporter, count, 0, time.monotonic()
        self.said, self.skipped = self.began, 0

    def skip(self) -> None:
        """One was done before."""
        self.done += 1
        self.skipped += 1

    def say(self, text: str, every: float = 0.0) -> None:
        """One more is done; says so, but not before `every` seconds after the last time, unless it is the last one."""
        self.done += 1
        now = time.monotonic()
        if self.done < self.count and now - self.said < every:
            return
        self.said = now
        left = int((now - self.began) / (self.done - self.skipped) * (self.count - self.done))
        rest = f", {left // 60}:{left % 60:02d} left" if self.done < self.count else ""
        self.reporter.say(f"{self.done}/{self.count}{rest}  {text}")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process a study. The lock ends with the process."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{out}: another process is at work on this study") from None
        yield


def _prepare(study: Study, out: Path, reporter: _Reporter) -> tuple[Path, bool]:
    """Check that `out` is this study's or new; the data to train on, and whether the truth about them is known."""
    truth = has_truth(study.data)
    shape = data_shape(open_data(study.base()))
    asked = {**study.to_json(), "shape": shape}
    asked["train"] = {key: value for key, value in asked["train"].items() if key not in ("data", "seed", "lr")}
    asked.pop("data")  # it may move; its shape may not
    asked = {**{key: asked.pop(key) for key in _FREE}, **asked.pop("train"), **asked}
    path = out / STUDY
    if path.exists():
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path}: damaged ({error})") from error
        differ = _differences(stored, asked, (*_FREE, "num_workers", "checkpoint_every"))
        if differ:
            raise RunError(f"{out}: holds a study with another configuration ({differ}); continue it or name another")
    elif any(entry.name not in (".lock", "data") for entry in out.iterdir()):
        raise RunError(f"{out}: is not empty, and holds no study")
    known = default_methods(list(shape["modalities"]))
    unknown = [name for name in study.methods if name not in known]
    if unknown:
        raise ValueError(f"methods: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    write_atomic(path, json.dumps(asked, indent=1) + "\n")
    if truth:
        reporter.say("scored on the test split with the synthesiser's truth, tuned on the validation split")
        return Path(study.data), True
    reporter.say(
        f"scored on the validation split, tuned on one in {HELD_OUT} training videos, which are not trained on"
    )
    return tuning_view(study.data, out / "data"), False


def run_path(out: Path, method: str, seed: int, rate: float) -> Path:
    return out / "runs" / method / f"seed-{seed}-lr-{rate:g}"


def _train_all(
    study: Study, out: Path, data: Path, workers: Workers, reporter: _Reporter, failed: dict[str, str]
) -> tuple[dict[str, float], dict[tuple[str, int], dict[str, Any]]]:
    """The rate chosen for each method, and the result of each (method, seed) trained with it."""
    results: dict[tuple[str, int, float], dict[str, Any]] = {}

    def work(wanted: Sequence[tuple[str, int, float]], phase: _Phase) -> None:
        keys = {f"{method}, seed {seed}, rate {rate:g}": (method, seed, rate) for method, seed, rate in wanted}
        jobs = []
        for name, key in keys.items():
            config, path = configuration(study, data, *key), run_path(out, *key)
            done = finished(config, path)
            if done is None:
                jobs.append(Job(name, train_one, (config, str(path))))
            else:
                results[key] = done
                phase.skip()
        for outcome in workers.run(jobs):
            key = keys[outcome.job.name]
            if outcome.error is None:
                results[key] = outcome.value
                phase.say(
                    f"{outcome.job.name}: validation P {outcome.value['P']:.4f} ({outcome.value['seconds']:.0f} s)"
                )
            else:
                failed[key[0]] = f"{outcome.job.name}: {outcome.error}"
                phase.say(f"{outcome.job.name} FAILED: {outcome.error}")

    tuning = [
        (method, seed, rate) for seed in range(study.tuning_seeds) for method in study.methods for rate in study.rates
    ]
    count = len(tuning) + len(study.methods) * (study.seeds - study.tuning_seeds)
    phase = reporter.phase(count)
    reporter.say(f"{count} trainings")
    work(tuning, phase)
    chosen = {}
    for method in [method for method in study.methods if method not in failed]:
        mean = {r: np.mean([results[method, s, r]["P"] for s in range(study.tuning_seeds)]) for r in study.rates}
        chosen[method] = max(study.rates, key=lambda rate: mean[rate])
    work([(m, s, chosen[m]) for s in range(study.tuning_seeds, study.seeds) for m in chosen], phase)
    good = {m: rate for m, rate in chosen.items() if m not in failed}
    return good, {(m, s): results[m, s, rate] for m, rate in good.items() for s in range(study.seeds)}


def _evaluate_all(
    study: Study,
    out: Path,
    found: Sequence[Condition | None],
    chosen: Mapping[str, float],
    trained: Mapping[tuple[str, int], Mapping[str, Any]],
    truth: bool,
    workers: Workers,
    reporter: _Reporter,
    failed: dict[str, str],
) -> None:
    device = study.base().device
    jobs = []
    for seed in range(study.seeds):
        runs = tuple(
            Scored(m, str(run_path(out, m, seed, rate)), trained[m, seed]["model"]) for m, rate in chosen.items()
        )
        for condition in found:
            sweep = Sweep(study.data, truth, runs, condition, seed, device, str(evaluation_path(out, seed, condition)))
            path = evaluation_path(out, seed, condition)
            if not path.exists() or missing(sweep, read_evaluation(path)):
                jobs.append(Job(f"seed {seed}, {_name(condition)}", evaluate_sweep, (sweep,)))
    phase = reporter.phase(len(jobs))
    broken = []
    for outcome in workers.run(jobs):
        if outcome.error is not None:
            broken.append(f"evaluation, {outcome.job.name}: {outcome.error}")
            phase.say(f"{broken[-1]} FAILED")
            continue
        for method, error in outcome.value.items():
            failed[method] = f"{method}, evaluation, {outcome.job.name}: {error}"
            reporter.say(f"{failed[method]} FAILED")
        phase.say(f"evaluated {outcome.job.name}", every=2.0)
    if broken:
        raise RunError("; ".join(broken))


def _name(condition: Condition | None) -> str:
    return CLEAN if condition is None else condition.name


def evaluation_path(out: Path, seed: int, condition: Condition | None) -> Path:
    return out / "evaluations" / f"seed-{seed}" / f"{_name(condition)}.npz"


def compare(
    study: Study, out: str | os.PathLike[str], *, processes: int | None = None, draws: int = 2000, quiet: bool = False
) -> list[Table]:
    """Run (or continue) the study in directory `out`, write tables and pictures there, and return the tables.

    `processes`: how many at once, of one thread each (default: one a core). `draws`: of the bootstrap.
    Where a method fails, the others are finished and reported, then RunError names it; the same call tries it again.
    RunError too for a directory that holds another study, by what differs.
    """
    from .compare_report import write_study

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reporter, failed = _Reporter(quiet), dict[str, str]()
    with _alone(out), Workers(processes or os.cpu_count() or 1) as workers:
        data, truth = _prepare(study, out, reporter)
        modalities = list(AffWild2(study.data, "train").modalities)
        wanted = [None, *conditions(modalities, study.corruptions, study.severities)]
        chosen, trained = _train_all(study, out, data, workers, reporter, failed)
        if not chosen:
            raise RunError("every method failed: " + "; ".join(failed.values()))
        _evaluate_all(study, out, wanted, chosen, trained, truth, workers, reporter, failed)
        good = {m: rate for m, rate in chosen.items() if m not in failed}
        results = gather(study, out, wanted, good, trained, truth, truth and ORACLE not in failed)
        write_results(results, out / "results.csv")
        tables, page = write_study(results, out, draws=draws)
        reporter.say(f"{out / 'results.csv'}, {out / 'report.md'}, {page}")
    if failed:
        raise RunError(f"{len(failed)} methods failed and are not in the report: " + "; ".join(failed.values()))
    return tables


# ------------------------------------------------------------------------------------------------------------- results
@dataclasses.dataclass(frozen=True)
class Results:
    """All that was measured; `N` seeds, `K` conditions (the first is clean), `V` clips."""

    study: Study
    truth: bool
    modalities: list[str]
    methods: list[str]  # the oracle last, where there is one
    conditions: list[Condition | None]
    clips: list[str]  # (V,)
    frames: int  # that count
    moments: dict[str, np.ndarray]  # method -> (N, K, V, 2, 6), NaN where the oracle is blank
    rates: dict[str, float]  # method -> chosen learning rate
    trained: dict[tuple[str, int], dict[str, Any]]  # (method, seed) -> what `train_one` said
    confidence: dict[tuple[int, int], dict[str, np.ndarray]]  # (seed, condition) -> of SAGE

    @property
    def videos(self) -> list[str]:
        """(V,) the video of each clip: two persons of one are not independent."""
        return [bare_name(name) for name in self.clips]


def gather(
    study: Study,
    out: Path,
    found: Sequence[Condition | None],
    chosen: Mapping[str, float],
    trained: Mapping[tuple[str, int], dict[str, Any]],
    truth: bool,
    oracle: bool,
) -> Results:
    """Read the evaluation files."""
    methods = [*chosen, *([ORACLE] if oracle else [])]
    clips = _clips(study.data, truth)
    moments = {m: np.zeros((study.seeds, len(found), len(clips), 2, 6)) for m in methods}
    confidence: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for seed in range(study.seeds):
        for k, condition in enumerate(found):
            held = read_evaluation(evaluation_path(out, seed, condition))
            for method in methods:
                moments[method][seed, k] = held[method]["moments"]
            if REFERENCE in chosen:
                confidence[seed, k] = {
                    name: value for name, value in held[REFERENCE].items() if name not in ("model", "moments")
                }
    return Results(
        study,
        truth,
        list(clips[0].features),
        methods,
        list(found),
        [clip.name for clip in clips],
        int(sum(clip.valid.sum() for clip in clips)),
        moments,
        dict(chosen),
        {key: value for key, value in trained.items() if key[0] in chosen},
        confidence,
    )


def write_results(results: Results, path: Path) -> None:
    """One row a (method, seed, condition); blank where the oracle cannot be computed."""
    from .statistics import additive, concordance

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
                rows.writerow((method, seed, _name(condition), *what, *said))
    write_atomic(path, buffer.getvalue())


def synthesise(out: str | os.PathLike[str]) -> str:
    """The study's own data set in OUT/data, made where it is not there yet; returns its root."""
    root = Path(out) / "data"
    if not root.exists():
        write_dataset(root, **DATA)  # type: ignore[arg-type]
    return str(root)


__all__ = ["Results", "Study", "compare", "default_methods", "synthesise"]
