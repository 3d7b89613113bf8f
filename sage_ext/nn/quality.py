"""Quality: numbers that say how good a modality's signal is, and nothing of what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from .._arguments import CONSTANTS
from .._typing import called_as
from .moments import RunningMoments

QUALITY_FEATURES = 3  # a column: its z-score now, its average of late, and whether it is known now


class Quality(RunningMoments):
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

    def __init__(
        self,
        dims: Sequence[int],
        halflife: float = CONSTANTS["quality_halflife"],
        clamp: float = CONSTANTS["typicality_limit"],
        momentum: float = 0.01,
    ) -> None:
        super().__init__([sum(dims)], momentum)
        self.dims, self.halflife, self.clamp = tuple(dims), halflife, clamp

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

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor | None]) -> None:
        """Set the statistics from batches of quality (B, T, sum of dims), NaN where unknown (None: nothing is known), exactly,
        and stop following training batches. A column that is never known keeps mean 0 and variance 1."""
        total = self._gather((quality, quality.isfinite()) for quality in batches if quality is not None)
        seen = total[0] > 0
        self._set_moments(torch.where(seen, total[1], 0.0), torch.where(seen, total[2] / total[0].clamp(min=1), 1.0))
