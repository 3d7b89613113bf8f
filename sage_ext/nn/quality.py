"""Quality: numbers that say how good a modality's signal is, and nothing of what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import functional
from .._arguments import CONSTANTS

QUALITY_FEATURES = 3  # a column: its z-score now, its average of late, and whether it is known now


class Quality(nn.Module):
    """What the reliability path reads of a modality's quality: a detector's score, a level, a signal-to-noise ratio ...

    Each of the Q columns of each modality gives three numbers: its z-score against the training data, clamped to +-`clamp`;
    the leaky average of that (half-life `halflife` frames, shrunk towards 0 by a prior worth one frame), since such numbers are
    noisier than the quality that they measure; and 1 where it is known. NaN, infinite numbers and missing modalities are
    unknown: 0, 0 as far as nothing was known of late, and 0.

    The statistics are buffers, over all columns of all modalities side by side. They follow the training batches by momentum (a
    plain average over the first `1/momentum` batches) until `fit` sets them from data, after which they stay.

    Args:
        dims: Q of each modality, 0 for none.
    """

    mean: Tensor  # (sum of dims,)
    var: Tensor  # (sum of dims,)
    updates: Tensor  # (sum of dims,) batches seen by the momentum rule
    fitted: Tensor  # () bool

    def __init__(
        self,
        dims: Sequence[int],
        halflife: float = CONSTANTS["quality_halflife"],
        clamp: float = CONSTANTS["typicality_limit"],
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.dims, self.halflife, self.clamp, self.momentum = tuple(dims), halflife, clamp, momentum
        count = sum(self.dims)
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("var", torch.ones(count))
        self.register_buffer("updates", torch.zeros(count))
        self.register_buffer("fitted", torch.tensor(False))

    def extra_repr(self) -> str:
        return f"dims={self.dims}, halflife={self.halflife}, clamp={self.clamp}, momentum={self.momentum}"

    def forward(self, quality: Tensor, state: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """quality (B, T, sum of dims), NaN where unknown; state (B, sum of dims, 3) before this chunk (None: nothing was seen).
        Returns (B, T, 3 Q) a modality, and the state for the next chunk."""
        known = quality.isfinite()
        if self.training:
            self._follow(quality.detach(), known)
        # Copies: a later forward may move the buffers before this one's backward has run.
        mean, var = self.mean.clone().to(quality.dtype), self.var.clone().to(quality.dtype)
        z = (torch.where(known, quality, mean) - mean) / var.clamp(min=CONSTANTS["variance_floor"]).sqrt()
        z = z.clamp(-self.clamp, self.clamp)
        batch, frames, count = z.shape
        weight = known.to(z.dtype)
        average, sums = functional.leaky_average(
            z.transpose(1, 2).reshape(batch * count, frames, 1),
            weight.transpose(1, 2).reshape(batch * count, frames),
            [self.halflife],
            [1.0],
            None if state is None else state.reshape(batch * count, 1, 3),
        )
        average = average.reshape(batch, count, frames).transpose(1, 2)
        features = torch.stack([z, average, weight], -1)  # (B, T, sum of dims, 3)
        return [part.flatten(2) for part in features.split(self.dims, 2)], sums.reshape(batch, count, 3)

    @torch.no_grad()
    def _follow(self, quality: Tensor, known: Tensor) -> None:
        count = known.sum((0, 1)).to(self.mean.dtype)
        share = 1.0 / count.clamp(min=1)
        mean = torch.where(known, quality, 0.0).sum((0, 1)) * share
        var = torch.where(known, (quality - mean).square(), 0.0).sum((0, 1)) * share
        moves = (count > 0) & ~self.fitted
        self.updates.add_(moves)
        rate = torch.where(moves, (1.0 / self.updates.clamp(min=1)).clamp(min=self.momentum), 0.0)
        gap = mean - self.mean
        self.var.lerp_((var + (1 - rate) * gap * gap).to(self.var.dtype), rate.to(self.var.dtype))
        self.mean.add_((rate * gap).to(self.mean.dtype))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor | None]) -> None:
        """Set the statistics from batches of quality (B, T, sum of dims), NaN where unknown (None: nothing is known), exactly,
        and stop following training batches. A column that is never known keeps mean 0 and variance 1."""
        total = torch.zeros(3, sum(self.dims), dtype=torch.float64, device=self.mean.device)  # n, mean, M2
        for quality in batches:
            if quality is None:
                continue
            known = quality.isfinite()
            count = known.sum((0, 1)).double()
            rows = torch.where(known, quality, 0.0).double()
            mean = rows.sum((0, 1)) / count.clamp(min=1)
            m2 = torch.where(known, (rows - mean).square(), 0.0).sum((0, 1))
            joint = total[0] + count
            gap, share = mean - total[1], count / joint.clamp(min=1)
            total = torch.stack([joint, total[1] + gap * share, total[2] + m2 + gap * gap * total[0] * share])
        seen = total[0] > 0
        self.mean.copy_(torch.where(seen, total[1], 0.0))
        self.var.copy_(torch.where(seen, total[2] / total[0].clamp(min=1), 1.0))
        self.fitted.fill_(True)
