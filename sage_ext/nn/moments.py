"""Statistics of what a module sees: followed by momentum in training, or set from data once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance of numbers (B, T, *shape), of which some exist, as buffers.

    They follow the training batches by momentum (a plain average over the first `1/momentum` batches) until `fit` sets
    them from data, after which they stay.
    """

    mean: Tensor  # (*shape)
    var: Tensor  # (*shape)
    updates: Tensor  # (*shape) batches seen by the momentum rule
    fitted: Tensor  # () bool

    def __init__(self, shape: Sequence[int], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("var", torch.ones(*shape))
        self.register_buffer("updates", torch.zeros(*shape))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def _follow(self, x: Tensor, exists: Tensor) -> None:
        """One training batch: x (B, T, *shape), exists of its shape, bool."""
        count = exists.sum((0, 1)).to(x.dtype)
        share = 1.0 / count.clamp(min=1)
        mean = torch.where(exists, x, 0.0).sum((0, 1)) * share
        var = torch.where(exists, (x - mean).square(), 0.0).sum((0, 1)) * share
        moves = (count > 0) & ~self.fitted
        self.updates.add_(moves)
        rate = torch.where(moves, (1.0 / self.updates.clamp(min=1)).clamp(min=self.momentum), 0.0)
        gap = mean - self.mean
        self.var.lerp_((var + (1 - rate) * gap * gap).to(self.var.dtype), rate.to(self.var.dtype))
        self.mean.add_((rate * gap).to(self.mean.dtype))

    def _gather(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """(3, *shape) float64: count, mean, and sum of squares about it, of all (x, exists)."""
        total = torch.zeros(3, *self.mean.shape, dtype=torch.float64, device=self.mean.device)
        for x, exists in batches:
            count = exists.sum((0, 1)).double()
            rows = torch.where(exists, x, 0.0).double()
            mean = rows.sum((0, 1)) / count.clamp(min=1)
            m2 = torch.where(exists, (rows - mean).square(), 0.0).sum((0, 1))
            joint = total[0] + count
            gap, share = mean - total[1], count / joint.clamp(min=1)
            total = torch.stack([joint, total[1] + gap * share, total[2] + m2 + gap * gap * total[0] * share])
        return total

    def _set_moments(self, mean: Tensor, var: Tensor) -> None:
        """From data; training batches are followed no more."""
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.fitted.fill_(True)
