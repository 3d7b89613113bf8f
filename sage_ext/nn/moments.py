"""Statistics of what a module sees: followed by momentum in training, or set from data once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .._distributed import check_group, initialised, merge_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class RunningMoments(nn.Module):
    """Mean and variance of numbers (B, T, *shape), of which some exist, as buffers.

    They follow the training batches by momentum (a plain average over the first `1/momentum` batches) until `fit` sets
    them from data, after which they stay.
    """

    mean: Tensor  # (*shape)
    var: Tensor  # (*shape)
    updates: Tensor  # (*shape) batches seen by the momentum rule
    fitted: Tensor  # () bool
    synchronised: bool = False
    process_group: ProcessGroup | None = None  # of those whose batches are one; None: the default group

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
        m2 = torch.where(exists, (x - mean).square(), 0.0).sum((0, 1))
        if self.synchronised and initialised():
            none = torch.zeros_like(count)  # of a second variable, which these moments of pairs do not have
            own = torch.stack([count, mean, none, m2, none, none], -1).double()
            count, mean, _, m2, _, _ = merge_ranks(own, self.process_group).to(x.dtype).unbind(-1)
            share = 1.0 / count.clamp(min=1)
        var = m2 * share
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


def convert_sync_statistics(module: AnyModule, process_group: ProcessGroup | None = None) -> AnyModule:
    """Let all typicality and quality statistics in `module` follow the batches of all processes; returns `module`.

    In the manner of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, to be called before DistributedDataParallel: where
    `torch.distributed` is initialised, each training step gathers count, mean and spread of every rank's frames (48 bytes a
    statistic), merges them exactly and moves the buffers by the whole, so that they are the same on all ranks and those of
    one process with the global batch. Every rank then has to run as many training steps, though any with an empty batch
    (also once `fit` has set them: only the device knows that it has). Without it each rank's buffers follow its own
    batches. `fit` and its like are not synchronised: give every rank the same data, or fit before DistributedDataParallel,
    which starts all ranks with the buffers of rank 0.

    Args:
        process_group: the processes whose batches are one; None: all (the default group).

    Raises TypeError for a `module` or a `process_group` that is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if process_group is not None:
        check_group(process_group)
    for part in module.modules():
        if isinstance(part, RunningMoments):
            part.synchronised, part.process_group = True, process_group
    return module
