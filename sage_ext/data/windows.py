"""Fixed-length windows for training, whole clips for evaluation, and the average of overlapping predictions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .affwild2 import Clip, usable_rows

_KEYS = ("present", "labels", "valid", "frame")  # of an item, beside its features and their quality


def clip_tensors(clip: Clip, names: Sequence[str], start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Frames start..stop - 1 (0-based; default: to the end) of a clip, W of them, as tensors without a batch axis.

        features  name -> (W, D) float32, 0 where the modality is absent: no NaN ever leaves here
        present   (W, M) bool, modalities in the order of `names`
        labels    (W, C) float32, each target on [-1, 1], 0 where invalid
        valid     (W,) bool: the frame is annotated
        frame     (W,) bool: the frame exists; all True here, see Windows
        quality   name -> (W, Q) float32, NaN where it is unknown, for those of `names` of which the clip has quality

    A row that holds infinity (as float32) counts as missing like one that holds NaN, with a warning.
    Raises ValueError for a span outside the clip, or a name the clip lacks.
    """
    stop = clip.num_frames if stop is None else stop
    if not 0 <= start <= stop <= clip.num_frames:
        raise ValueError(
            f"start, stop: expected a span within the {clip.num_frames} frames of {clip.name}, got {start}, {stop}"
        )
    present = np.zeros((stop - start, len(names)), dtype=bool)
    features: dict[str, torch.Tensor] = {}
    quality: dict[str, torch.Tensor] = {}
    declared = getattr(clip.present, "declared", clip.present)  # NaN rows: found in the span, not in the whole file
    for m, name in enumerate(names):
        if name not in clip.features:
            raise ValueError(f"names: expected modalities of {clip.name} ({', '.join(clip.features)}), got {name!r}")
        rows = np.asarray(clip.features[name][start:stop])  # shorter than the span where the features end early
        here, infinite = usable_rows(rows, declared[name][start : start + len(rows)])
        if infinite.any():
            warnings.warn(  # the same words in every span: shown once
                f"{clip.name}: {name}: expected finite float32 values, got infinity in some rows: they count as missing; "
                "sage-ext check says where",
                stacklevel=2,
            )
        values = np.zeros((stop - start, rows.shape[1]), dtype=np.float32)
        np.copyto(values[: len(rows)], rows, where=here[:, None], casting="same_kind")
        present[: len(rows), m] = here
        features[name] = torch.from_numpy(values)
        if name in clip.quality:
            known = np.asarray(clip.quality[name][start:stop], dtype=np.float32)
            evidence = np.full((stop - start, known.shape[1]), np.nan, dtype=np.float32)
            np.copyto(evidence[: len(known)], known, where=np.isfinite(known))
            quality[name] = torch.from_numpy(evidence)
    valid = np.array(clip.valid[start:stop], dtype=bool)
    labels = np.zeros((stop - start, len(clip.targets)), dtype=np.float32)
    if clip.labels is not None:
        np.copyto(labels, clip.labels[start:stop], where=valid[:, None])
    return {
        "features": features,
        "present": torch.from_numpy(present),
        "labels": torch.from_numpy(labels),
        "valid": torch.from_numpy(valid),
        "frame": torch.ones(stop - start, dtype=torch.bool),
        "quality": quality,
    }


class Windows(torch.utils.data.Dataset):
    """Windows of `window` frames, one every `hop`, over all clips; the last one of a clip ends with the clip, so that
    every frame is in a window. A clip shorter than `window` is one window padded at its end.

    Item i: the tensors of `clip_tensors` for W = window frames, and `clip` and `start`, its place. In padding,
    `frame`, `valid` and `present` are False, quality is NaN and everything else is 0: it must enter neither loss nor metric
    nor normalisation.

    clips: sequence of Clip, all with the same modalities; it is asked for a clip whenever one of its windows is read,
    so an AffWild2 keeps nothing but memory maps. `names`: the modalities in order. `spans`: (clip, start) of every
    window.
    """

    def __init__(self, clips: Sequence[Clip], window: int = 300, hop: int = 200):
        if not 1 <= hop <= window:
            raise ValueError(f"window, hop: expected 1 <= hop <= window (no frame may be skipped), got {window}, {hop}")
        if len(clips) == 0:
            raise ValueError("clips: expected one or more, got none")
        self.clips, self.window, self.hop = clips, window, hop
        self.names = list(clips[0].features)
        self.spans: list[tuple[int, int]] = []
        for index in range(len(clips)):
            clip = clips[index]
            if list(clip.features) != self.names:
                raise ValueError(
                    f"clips: expected the modalities {self.names} in all, got {list(clip.features)} in {clip.name}"
                )
            self.spans += [(index, start) for start in window_starts(clip.num_frames, window, hop)]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> dict[str, Any]:
        index, start = self.spans[i]
        return {**window_tensors(self.clips[index], self.names, start, self.window), "clip": index, "start": start}


def window_starts(num_frames: int, window: int, hop: int) -> list[int]:
    """First frames of the windows that cover a clip: 0, hop, 2 hop ... and the one that ends with the clip."""
    last = max(0, num_frames - window)
    return [*range(0, last, hop), last]


def window_tensors(clip: Clip, names: Sequence[str], start: int, size: int) -> dict[str, Any]:
    """What `clip_tensors` gives for the `size` frames from `start` on. Beyond the clip's end is padding: there `frame`,
    `valid` and `present` are False, quality is NaN and everything else is 0."""
    item = clip_tensors(clip, names, min(start, clip.num_frames), min(start + size, clip.num_frames))
    missing = size - len(item["frame"])
    if missing == 0:
        return item
    return {
        "features": {name: _pad(rows, missing) for name, rows in item["features"].items()},
        **{key: _pad(item[key], missing) for key in _KEYS},
        "quality": {name: _pad(rows, missing, math.nan) for name, rows in item["quality"].items()},
    }


def _pad(rows: torch.Tensor, missing: int, value: float = 0) -> torch.Tensor:
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])


def stack(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """B windows of one length, as `window_tensors` gives them, with a batch axis: (B, W, ...). Quality that some of them have
    is unknown in the others."""
    like = {name: rows for item in items for name, rows in item["quality"].items()}
    return {
        "features": {name: torch.stack([item["features"][name] for item in items]) for name in items[0]["features"]},
        **{key: torch.stack([item[key] for item in items]) for key in _KEYS},
        "quality": {
            name: torch.stack([item["quality"].get(name, torch.full_like(rows, math.nan)) for item in items])
            for name, rows in like.items()
        },
    }


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks items of `Windows` to (B, W, ...); `clip` and `start` become (B,) int64."""
    return {**stack(items), **{key: torch.tensor([item[key] for item in items]) for key in ("clip", "start")}}


def whole_clips(clips: Sequence[Clip], names: Sequence[str]) -> dict[str, Any]:
    """Clips side by side from their first frame to their last, padded at their ends to the longest: (B, W, ...)."""
    longest = max(clip.num_frames for clip in clips)
    return stack([window_tensors(clip, names, 0, longest) for clip in clips])


class OverlapAverage:
    """Mean prediction of each of a clip's T frames over the windows that hold it, accumulated in float64."""

    def __init__(self, num_frames: int, channels: int = 2):
        self._sum = np.zeros((num_frames, channels))
        self._count = np.zeros(num_frames, dtype=np.int64)

    def add(self, start: int, values, frame=None) -> None:
        """Adds a window's predictions, (W, C), whose first frame is `start`; `frame` (W,) bool: False in padding."""
        values = np.asarray(values, dtype=np.float64)
        frame = np.ones(len(values), dtype=bool) if frame is None else np.asarray(frame)
        if values.ndim != 2 or values.shape[1] != self._sum.shape[1]:
            raise ValueError(f"values: expected the shape (W, {self._sum.shape[1]}), got {values.shape}")
        if frame.dtype != bool or frame.shape != (len(values),):
            raise ValueError(f"frame: expected bool of the shape ({len(values)},), got {frame.dtype} {frame.shape}")
        index = start + np.flatnonzero(frame)
        if len(index) and not (index[0] >= 0 and index[-1] < len(self._count)):
            raise ValueError(
                f"start: expected a window within the clip's {len(self._count)} frames, got {index[0]} to {index[-1]}"
            )
        self._sum[index] += values[frame]
        self._count[index] += 1

    def result(self) -> np.ndarray:
        """(T, C) float64. Raises ValueError where a frame is in no window."""
        if (self._count == 0).any():
            missed = int(np.argmax(self._count == 0))
            raise ValueError(f"add: expected windows that hold every frame, got none with frame {missed} (0-based)")
        return self._sum / self._count[:, None]
