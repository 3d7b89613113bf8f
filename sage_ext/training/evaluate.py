"""Whole-video predictions and the challenge's score.

The score follows the Aff-Wild2 protocol: all valid frames of all videos of the split together, one CCC a target, and P,
their mean: (CCC_V + CCC_A) / 2 for valence and arousal. It is the same in a target's own units and on [-1, 1], where
predictions and labels are here. The mean over videos is another number and is not computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.affwild2 import Clip
from ..data.targets import VALENCE_AROUSAL, Targets, scores
from ..data.windows import OverlapAverage, stack, window_starts, window_tensors
from ..functional import ccc_from_moments, ccc_moments
from ..models.sage import SAGE

Array = np.ndarray
FRAMES = 12_000  # that a model is given at once, about: windows, or clips side by side, their padding included


@dataclass(frozen=True)
class ClipPrediction:
    """What a model said about one video of T frames; float32 arrays. C targets, M modalities, S stages."""

    prediction: Array  # (T, C)
    unimodal: Array  # (T, M, C)
    weights: Array  # (T, M)
    confidence: Array  # (T, M), probability
    stage: Array  # (T, S), rows sum to 1
    experts: Array | None = None  # (T, K, C) the estimates that were weighed, see `SAGEOutput`
    shares: Array | None = None  # (T, K)
    expert_confidence: Array | None = None  # (T, K); of a peer's fusion (T, M)


def predict_clip(
    model: SAGE,
    clip: Clip,
    names: Sequence[str],
    *,
    chunk: int = 3000,
    window: int = 300,
    hop: int = 200,
    device: torch.device | str = "cpu",
) -> ClipPrediction:
    """Predict every frame of `clip` from the modalities `names`, in evaluation mode.

    A causal model runs through the video once in chunks of `chunk` frames, its state carried, which equals one call on
    the whole video. Any other model runs on windows of `window` frames, `hop` apart, the last one flush with the end;
    frames that several windows cover get the mean. A model of fixed `length` has windows of that length whatever
    `window` says, at most that far apart; a shorter video is padded to it, and the padding masked.
    """
    return predict_clips(model, [clip], names, chunk=chunk, window=window, hop=hop, device=device)[0]


def predict_clips(
    model: SAGE,
    clips: Sequence[Clip],
    names: Sequence[str],
    *,
    chunk: int = 3000,
    window: int = 300,
    hop: int = 200,
    device: torch.device | str = "cpu",
) -> list[ClipPrediction]:
    """What `predict_clip` says of each of `clips`, which go through the model side by side.

    Shorter clips are padded at their ends, and the padding masked: see `alike` for which to take together.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected frames >= 1, got {chunk}")
    if not 1 <= hop <= window:
        raise ValueError(f"window, hop: expected 1 <= hop <= window (no frame may be skipped), got {window}, {hop}")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if model.causal:
                said = _in_chunks(model, clips, names, chunk, torch.device(device))
            else:
                said = _in_windows(model, clips, names, window, hop, torch.device(device))
    finally:
        model.train(was_training)
    return [ClipPrediction(*(array.astype(np.float32, copy=False) for array in arrays)) for arrays in said]


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups of clips to predict together, by their places in `lengths` (frames of each): every clip once, the
    shortest first, those of like length in one group, at most `FRAMES` frames a group with the padding (or one clip)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    while order:
        count = 1
        while count < len(order) and (count + 1) * lengths[order[count]] <= FRAMES:
            count += 1
        yield order[:count]
        order = order[count:]


def _call(
    model: SAGE,
    parts: Sequence[tuple[Clip, int]],
    names: Sequence[str],
    size: int,
    state: Any,
    device: torch.device,
) -> tuple[list[Tensor], Any]:
    """The model's outputs, (B, size, ...) each, and its state, for the `size` frames of each clip from the given
    one on; what is beyond a clip's end is padding, and masked."""
    batch = stack([window_tensors(clip, names, start, size) for clip, start in parts])
    features = {name: value.to(device) for name, value in batch["features"].items()}
    mask = None if bool(batch["frame"].all()) else batch["frame"].to(device)
    quality = {name: x.to(device) for name, x in batch.get("quality", {}).items() if model.reads_quality(name)}
    output = model(features, present=batch["present"].to(device), mask=mask, state=state, quality=quality or None)
    fields = (
        output.prediction,
        output.unimodal,
        output.weights,
        output.confidence,
        output.stage,
        output.experts,
        output.shares,
        output.expert_confidence,
    )
    return [value.float().cpu() for value in fields], output.state


def _in_chunks(
    model: SAGE, clips: Sequence[Clip], names: Sequence[str], chunk: int, device: torch.device
) -> list[list[Array]]:
    """The outputs of each clip, of a causal model."""
    longest, state, chunks = max(clip.num_frames for clip in clips), None, []
    for start in range(0, longest, chunk):
        parts = [(clip, start) for clip in clips]
        values, state = _call(model, parts, names, min(chunk, longest - start), state, device)
        chunks.append(values)
    whole = [torch.cat(values, 1).numpy() for values in zip(*chunks)]
    return [[value[b, : clip.num_frames] for value in whole] for b, clip in enumerate(clips)]


def _in_windows(
    model: SAGE, clips: Sequence[Clip], names: Sequence[str], window: int, hop: int, device: torch.device
) -> list[list[Array]]:
    """The outputs of each clip, means over the windows that hold a frame."""
    length = getattr(model, "length", None)
    size = length if length is not None else min(window, max(clip.num_frames for clip in clips))
    spans = [
        (b, start) for b, clip in enumerate(clips) for start in window_starts(clip.num_frames, size, min(hop, size))
    ]
    averages: list[list[OverlapAverage]] = []  # a clip, an output
    shapes: list[tuple[int, ...]] = []  # of an output, without batch and time
    step = max(FRAMES // size, 1)
    for first in range(0, len(spans), step):
        taken = spans[first : first + step]
        values, _ = _call(model, [(clips[b], start) for b, start in taken], names, size, None, device)
        if not averages:
            shapes = [tuple(value.shape[2:]) for value in values]
            averages = [[OverlapAverage(clip.num_frames, int(np.prod(s))) for s in shapes] for clip in clips]
        for i, value in enumerate(values):
            for (b, start), rows in zip(taken, value.flatten(2).numpy()):
                averages[b][i].add(start, rows[: clips[b].num_frames - start])
    return [[average.result().reshape(-1, *s) for average, s in zip(of_clip, shapes)] for of_clip in averages]


def mean_filter(values: Array, widths: Sequence[int]) -> Array:
    """Centred moving mean of each column of (T, C) `values` over `widths[c]` frames (1: unchanged).

    Even widths reach one frame further back than ahead. At the ends the mean is over the frames that exist. The filter
    looks ahead by half its width: its output is not causal.
    """
    if len(widths) != values.shape[1] or min(widths) < 1:
        raise ValueError(f"widths: expected {values.shape[1]} numbers of frames >= 1, got {list(widths)}")
    frames = np.arange(len(values))
    columns = []
    for column, width in zip(values.T.astype(np.float64), widths):
        total = np.concatenate([[0.0], np.cumsum(column)])
        low = np.maximum(frames - width // 2, 0)
        high = np.minimum(frames + (width + 1) // 2, len(values))
        columns.append((total[high] - total[low]) / (high - low))
    return np.stack(columns, 1).astype(values.dtype)


def clip_moments(prediction: Array, clip: Clip, state: Tensor | None = None) -> Tensor:
    """(C, 6) float64 moments, as `ccc_moments` gives them, of `prediction` (T, C) over the valid frames of an annotated
    clip; merged with `state`, those of the clips before it."""
    assert clip.labels is not None
    return ccc_moments(
        torch.from_numpy(np.ascontiguousarray(prediction, np.float64)),
        torch.from_numpy(np.ascontiguousarray(clip.labels, np.float64)),  # where not valid they are not read
        torch.from_numpy(np.ascontiguousarray(clip.valid)),
        state=state,
    )


def add_moments(moments: dict[str, Tensor], said: ClipPrediction, clip: Clip, names: Sequence[str]) -> None:
    """Merge into `moments`, of "fused" and of each modality's own head, those of what was said of an annotated clip."""
    heads = {"fused": said.prediction, **{name: said.unimodal[:, m] for m, name in enumerate(names)}}
    for name, prediction in heads.items():
        moments[name] = clip_moments(prediction, clip, moments.get(name))


def _annotated(clips: Iterable[Clip]) -> Iterator[Clip]:
    for clip in clips:
        if clip.labels is None:
            raise ValueError(f"clips: expected annotated ones, got {clip.name} without annotation")
        yield clip


def _scores(moments: Tensor | None, targets: Targets) -> dict[str, float]:
    """{"CCC_V", "CCC_A", "P"} or the like of all the frames in (C, 6) `moments`."""
    if moments is None:
        raise ValueError("clips: expected one or more to score, got none")
    return scores(ccc_from_moments(moments).tolist(), targets)


def score(predictions: Mapping[str, Array], clips: Iterable[Clip]) -> dict[str, float]:
    """The CCC of each target, as in {"CCC_V", "CCC_A"}, and their mean P, of `predictions` {clip name: (T, C)} over the
    valid frames of the annotated `clips`."""
    moments: Tensor | None = None
    targets = VALENCE_AROUSAL
    for clip in _annotated(clips):
        moments, targets = clip_moments(predictions[clip.name], clip, moments), clip.targets
    return _scores(moments, targets)


def evaluate(
    predict: Callable[[Clip], ClipPrediction], clips: Iterable[Clip], names: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, ClipPrediction]]:
    """Scores {"fused" and each modality's own head: {"CCC_V", "CCC_A", "P"} or the like, see `score`} and the predictions
    {clip name: ...}."""
    moments: dict[str, Tensor] = {}
    predictions = {}
    targets = VALENCE_AROUSAL
    for clip in _annotated(clips):
        targets = clip.targets
        predictions[clip.name] = predict(clip)
        add_moments(moments, predictions[clip.name], clip, names)
    return {name: _scores(moments.get(name), targets) for name in ("fused", *names)}, predictions
