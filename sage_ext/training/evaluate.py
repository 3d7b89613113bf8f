"""Whole-video predictions and the challenge's score.

The score follows the Aff-Wild2 protocol: all valid frames of all videos of the split together, one CCC a dimension,
P = (CCC_V + CCC_A) / 2. The mean over videos is another number and is not computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.windows import OverlapAverage, clip_tensors, pad_tensors, window_starts
from ..functional import ccc_from_moments, ccc_moments

Array = np.ndarray


@dataclass(frozen=True)
class ClipPrediction:
    """What a model said about one video of T frames; float32 arrays. C targets, M modalities, S stages."""

    prediction: Array  # (T, C)
    unimodal: Array  # (T, M, C)
    weights: Array  # (T, M)
    confidence: Array  # (T, M), probability
    stage: Array  # (T, S), rows sum to 1


def predict_clip(
    model: nn.Module,
    clip: Any,
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
    if chunk < 1 or window < 1 or not 1 <= hop <= window:
        raise ValueError(f"expected chunk >= 1 and 1 <= hop <= window, got chunk={chunk}, window={window}, hop={hop}")
    length = getattr(model, "length", None)
    if length is not None:
        window, hop = length, min(hop, length)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if model.causal:
                pieces = _causal(model, clip, names, chunk, torch.device(device))
            else:
                pieces = _overlapping(model, clip, names, (window, hop), torch.device(device))
    finally:
        model.train(was_training)
    return ClipPrediction(*(piece.astype(np.float32) for piece in pieces))


def _call(
    model: nn.Module,
    clip: Any,
    names: Sequence[str],
    span: tuple[int, int],
    state: Any,
    device: torch.device,
    length: int | None = None,
) -> tuple[list[Tensor], Any]:
    """The model's five outputs on frames [start, stop), batch axis removed, and its state. With `length` the frames are
    padded to it and the padding masked; the outputs are of the frames alone."""
    item = clip_tensors(clip, names, *span)
    frames, mask = len(item["frame"]), None
    if length is not None and frames < length:
        item = pad_tensors(item, length)
        mask = item["frame"][None].to(device)
    features = {name: item["features"][name][None].to(device) for name in names}
    output = model(features, present=item["present"][None].to(device), mask=mask, state=state)
    fields = (output.prediction, output.unimodal, output.weights, output.confidence, output.stage)
    return [value[0, :frames].float().cpu() for value in fields], output.state


def _causal(model: nn.Module, clip: Any, names: Sequence[str], chunk: int, device: torch.device) -> list[Array]:
    state, chunks = None, []
    for start in range(0, clip.num_frames, chunk):
        values, state = _call(model, clip, names, (start, min(start + chunk, clip.num_frames)), state, device)
        chunks.append(values)
    return [torch.cat(parts).numpy() for parts in zip(*chunks)]


def _overlapping(
    model: nn.Module, clip: Any, names: Sequence[str], size: tuple[int, int], device: torch.device
) -> list[Array]:
    window, hop = size
    total = clip.num_frames
    length = getattr(model, "length", None)
    average: OverlapAverage | None = None
    shapes: list[tuple[int, ...]] = []
    for start in window_starts(total, window, hop):
        values, _ = _call(model, clip, names, (start, min(start + window, total)), None, device, length)
        shapes = [tuple(value.shape[1:]) for value in values]
        flat = torch.cat([value.flatten(1) for value in values], 1)  # (L, all channels of all outputs)
        if average is None:
            average = OverlapAverage(total, flat.shape[1])
        average.add(start, flat.numpy())
    assert average is not None  # a clip has at least one frame
    result, pieces, at = average.result(), [], 0
    for shape in shapes:
        size_ = int(np.prod(shape))
        pieces.append(result[:, at : at + size_].reshape(total, *shape))
        at += size_
    return pieces


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


class Concordance:
    """CCC over all valid frames of any number of videos, exact: moments merged video by video in float64."""

    def __init__(self) -> None:
        self.moments: Tensor | None = None

    def add(self, prediction: Array, labels: Array, valid: Array) -> None:
        """`prediction`, `labels` (T, C), `valid` (T,) bool; labels where not valid are not read."""
        self.moments = ccc_moments(
            torch.from_numpy(np.ascontiguousarray(prediction, np.float64)),
            torch.from_numpy(np.ascontiguousarray(labels, np.float64)),
            torch.from_numpy(np.ascontiguousarray(valid)),
            state=self.moments,
        )

    def scores(self) -> dict[str, float]:
        """{"CCC_V", "CCC_A", "P"}."""
        if self.moments is None:
            raise ValueError("no annotated video to score")
        valence, arousal = ccc_from_moments(self.moments).tolist()
        return {"CCC_V": valence, "CCC_A": arousal, "P": (valence + arousal) / 2}


def score(predictions: Mapping[str, Array], clips: Iterable[Any]) -> dict[str, float]:
    """CCC_V, CCC_A and P of `predictions` {clip name: (T, 2)} over the valid frames of the annotated `clips`."""
    concordance = Concordance()
    for clip in clips:
        if clip.labels is None:
            raise ValueError(f"{clip.name}: has no annotation to score against")
        concordance.add(predictions[clip.name], clip.labels, clip.valid)
    return concordance.scores()


def evaluate(
    predict: Callable[[Any], ClipPrediction], clips: Iterable[Any], names: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, ClipPrediction]]:
    """Scores {"fused" and each modality's own head: {"CCC_V", "CCC_A", "P"}} and the predictions {clip name: ...}."""
    scores = {name: Concordance() for name in ("fused", *names)}
    predictions = {}
    for clip in clips:
        if clip.labels is None:
            raise ValueError(f"{clip.name}: has no annotation to score against")
        said = predictions[clip.name] = predict(clip)
        scores["fused"].add(said.prediction, clip.labels, clip.valid)
        for i, name in enumerate(names):
            scores[name].add(said.unimodal[:, i], clip.labels, clip.valid)
    return {name: concordance.scores() for name, concordance in scores.items()}, predictions
