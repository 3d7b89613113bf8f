"""Failure rehearsal: training windows in which a modality fails, so that its reliability can be learnt.

A model that never saw a modality fail trusts a dead one (a zeroed input looks "quiet", hence reliable). So before each
training step some windows of the batch get failures, the same way for every method that is compared:

    zero     the features are 0, and the presence mask does not tell
    freeze   the features stand still at the failure's first frame
    noise    Gaussian noise is added at a signal-to-noise ratio drawn for the failure
    swap     the features are another clip's at the same place in its window: plausible, but foreign
    drop     the modality is marked absent (its features are 0, as they are for any absent frame)

Labels, padding and the other modality are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.rates import FPS, default_frames, nearest

LENGTH = (8, 150)  # of a failure by default: frames at 30 a second
KINDS = ("zero", "freeze", "noise", "swap", "drop")


@dataclass(frozen=True)
class Rehearsal:
    """How often modalities fail, for how long and in what way. Calling it on a collated batch returns a new batch.

    probability   chance that a window is rehearsed at all
    whole         chance that a rehearsed window has one failure as long as the window (a clip-long failure is learnt
                  from these alone); otherwise it has one to `spans` failures, each of one modality drawn evenly
    length        seconds of a failure, (shortest, longest), drawn log-uniformly, cut at the window's ends. Default: 8 to
                  150 frames at 30 a second, see `data.rates` for slower data
    snr_db        signal-to-noise ratio of "noise", (lowest, highest) in dB, drawn evenly; the signal's power is its
                  variance over the window's present frames, averaged over the channels that vary
    kinds         relative frequency of each kind
    overlap       False: a frame keeps at least one modality that is present and has not failed, wherever it had one
                  besides the failing one; True: modalities fail independently of each other
    """

    probability: float = 0.5
    whole: float = 0.25
    spans: int = 3
    length: tuple[float, float] | None = None
    snr_db: tuple[float, float] = (-10.0, 10.0)
    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("probability", "whole"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {getattr(self, name)}")
        if self.spans < 1:
            raise ValueError(f"spans: expected at least 1, got {self.spans}")
        if self.length is not None and not 0 < self.length[0] <= self.length[1] < math.inf:
            raise ValueError(f"length: expected seconds, 0 < shortest <= longest, got {self.length}")
        if not self.snr_db[0] <= self.snr_db[1]:
            raise ValueError(f"snr_db: expected lowest <= highest, got {self.snr_db}")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or min(self.kinds.values(), default=0) < 0 or sum(self.kinds.values()) <= 0:
            raise ValueError(f"kinds: expected non-negative frequencies of {', '.join(KINDS)}, got {dict(self.kinds)}")

    def frames(self, fps: float) -> tuple[int, int]:
        """The shortest and the longest failure in frames, one at least, at `fps` frames a second."""
        if self.length is None:
            ends = [default_frames(thirtieths, fps) for thirtieths in LENGTH]
        else:
            ends = [seconds * fps for seconds in self.length]
        shortest, longest = (max(nearest(frames), 1) for frames in ends)
        return shortest, longest

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator, fps: float = FPS) -> dict[str, Any]:
        """`batch` as `sage_ext.data.windows.collate` makes it: features {name: (B, W, D)}, present (B, W, M) bool,
        frame (B, W) bool, clip (B,); all on the CPU. Returns a new batch that shares nothing it changed with the old
        one, with "rehearsed" (B, W, M) bool: where a modality failed. The draws depend on `generator` alone. `fps`:
        frames a second."""
        features = {name: value.clone() for name, value in batch["features"].items()}
        present = batch["present"].clone()
        out = {**batch, "features": features, "present": present, "rehearsed": torch.zeros_like(present)}
        for row in range(present.shape[0]):
            if _uniform(generator) < self.probability:
                whole = _uniform(generator) < self.whole
                for _ in range(1 if whole else 1 + _index(self.spans, generator)):
                    self._fail(batch, out, row, whole, generator, fps)
        return out

    def _fail(
        self,
        batch: Mapping[str, Any],
        out: dict[str, Any],
        row: int,
        whole: bool,
        generator: torch.Generator,
        fps: float,
    ) -> None:
        """One failure of one modality of window `row`."""
        names = list(batch["features"])
        modality = _index(len(names), generator)
        kind = self._draw_kind(generator)
        start, stop = (0, batch["present"].shape[1]) if whole else self._draw_span(batch["frame"][row], generator, fps)
        span = slice(start, stop)

        present, failed = batch["present"][row, span], out["rehearsed"][row, span]  # (L, M) each
        hit = present[:, modality] & batch["frame"][row, span] & ~failed[:, modality]
        if not self.overlap and len(names) > 1:
            sound = present & ~failed
            sound[:, modality] = False
            hit &= sound.any(-1)

        source = batch["features"][names[modality]]  # (B, W, D), as it was before any failure
        value = source[row, span]
        if kind == "swap":
            donor = self._draw_donor(batch["clip"], row, generator)
            if donor is None:
                kind = "noise"  # nobody to swap with
            else:
                hit &= batch["present"][donor, span, modality] & batch["frame"][donor, span]
                value = source[donor, span]
        if not hit.any():
            return
        if kind == "freeze":
            value = value[hit.nonzero()[0, 0]].expand_as(value)
        elif kind == "noise":
            snr = self.snr_db[0] + (self.snr_db[1] - self.snr_db[0]) * _uniform(generator)
            power = _power(source[row], batch["present"][row, :, modality] & batch["frame"][row])
            scale = math.sqrt(power / 10 ** (snr / 10))
            value = value + scale * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        elif kind in ("zero", "drop"):
            value = torch.zeros_like(value)
        target = out["features"][names[modality]][row, span]
        target[hit] = value[hit]
        if kind == "drop":
            out["present"][row, span, modality] &= ~hit
        out["rehearsed"][row, span, modality] |= hit

    def _draw_kind(self, generator: torch.Generator) -> str:
        rest = _uniform(generator) * sum(self.kinds.values())
        for kind, share in self.kinds.items():
            rest -= share
            if rest < 0:
                return kind
        return [kind for kind, share in self.kinds.items() if share > 0][-1]

    def _draw_span(self, frame: Tensor, generator: torch.Generator, fps: float) -> tuple[int, int]:
        """[start, stop) of a failure that begins in an existing frame (padding is at the end)."""
        shortest, longest = self.frames(fps)
        frames = int(frame.sum())
        length = round(shortest * (longest / shortest) ** _uniform(generator))
        start = _index(max(frames, 1), generator) - length // 2  # as likely at the ends as in the middle
        return max(start, 0), min(start + length, frames)

    def _draw_donor(self, clip: Tensor, row: int, generator: torch.Generator) -> int | None:
        others = (clip != clip[row]).nonzero().flatten()
        return int(others[_index(len(others), generator)]) if len(others) else None


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _index(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _power(value: Tensor, valid: Tensor) -> float:
    """Variance over the valid frames of (W, D) `value`, averaged over the channels that vary at all."""
    if int(valid.sum()) < 2:
        return 0.0
    variance = value[valid].double().var(0, correction=0)
    varying = variance > 0
    return float(variance[varying].mean()) if varying.any() else 0.0
