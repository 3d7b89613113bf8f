"""Losses that train through concordance, and the proper score that trains confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from .._arguments import BOOL, arithmetic_dtype, check_kappa, check_pool, check_tensor, check_window
from .._distributed import check_group, sum_ranks, warn_apart
from .._typing import called_as

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReliabilityNLL(nn.Module):
    """The proper score that trains confidence: Gaussian negative log-likelihood of a modality's own squared error.

    A confidence `r` states that the modality's error has variance `kappa^2 (1 - r) / r`, that is precision
    `p = odds(r) / kappa^2`. For a squared error `e2` the loss is `(p * e2 - log p) / 2` (the constant `log(2 pi) / 2`
    left out, as in `torch.nn.GaussianNLLLoss`). In expectation its derivative in `p` is `(E[e2] - 1 / p) / 2`, zero
    only at `1 / p = E[e2]`: the minimiser is the calibrated `r = 1 / (1 + E[e2] / kappa^2)`, and the loss is convex in
    `log p`. The squared error is detached: the loss teaches confidence, never the prediction.

    Args:
        kappa: the error scale, in units of the labels, at which confidence is 1/2.
        process_group: as in `CCCLoss`: the mean is over the counted entries of all ranks, which matters where they count
            unequally many (for equally many, the mean of the ranks' own means is the same).
    """

    FLOOR = float(torch.finfo(torch.float32).eps)  # added to r and 1 - r: bounds |log odds| by 16, smoothly

    def __init__(self, kappa: float = 0.25, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        check_kappa(kappa)
        if process_group is not None:
            check_group(process_group)
        self.kappa, self.process_group = float(kappa), process_group

    def extra_repr(self) -> str:
        return f"kappa={self.kappa}"

    def forward(self, confidence: Tensor, squared_error: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean score over the counted entries (0, with gradient 0, where there is none).

        confidence: (*, M) in [0, 1]; squared_error: (*, M), or (*, M, C) for C targets that share one confidence;
        mask: (*, M) or (*) bool, False = not counted (not read: NaN there reaches nothing).
        """
        return mean_counted(self.scores(confidence, squared_error, mask), mask, self.process_group)

    def scores(self, confidence: Tensor, squared_error: Tensor, mask: Tensor | None = None) -> Tensor:
        """(*, M) the score of each entry, what `forward` takes the mean of; an entry that is not counted has some number, with
        gradient 0. Arguments as there."""
        r, error = _scored(confidence, squared_error, mask, "squared_error")
        log_odds = (r + self.FLOOR).log() - (1 - r + self.FLOOR).log()
        log_precision = log_odds - 2 * math.log(self.kappa)
        return 0.5 * (log_precision.exp() * error - log_precision)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


class ExplainedVarianceNLL(nn.Module):
    """The proper score of a confidence that states the share of a target's variance that an estimate explains.

    A confidence `r` states that the estimate's squared error is `1 - r` of the target's variance: 0 for one that knows no more
    than the mean, 1 for a perfect one. For a squared error relative to that variance, `e`, the loss is
    `(e / (1 - r) + log(1 - r)) / 2`: the Gaussian negative log-likelihood, up to a constant. In expectation its minimiser is
    the calibrated `r = 1 - E[e]`, and the loss is convex in `1 / (1 - r)`. `odds(r) = 1 / E[e] - 1` is the precision that the
    estimate adds to that of the target's distribution, in units of the latter. The error is detached: the loss teaches
    confidence, never the estimate.

    Args:
        process_group: as in `ReliabilityNLL`. The variance that an error is relative to is the caller's: take it from the
            batch of all ranks (`functional.ccc_moments` and the group), as `models.SAGELoss` does.
    """

    FLOOR = 1e-4  # added to 1 - r: bounds the loss where confidence is wrongly complete

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        if process_group is not None:
            check_group(process_group)
        self.process_group = process_group

    def forward(self, confidence: Tensor, relative_error: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean score over the counted entries (0, with gradient 0, where there is none).

        confidence: (*, M) in [0, 1]; relative_error: (*, M), or (*, M, C) for C targets that share one confidence;
        mask: (*, M) or (*) bool, False = not counted (not read: NaN there reaches nothing).
        """
        return mean_counted(self.scores(confidence, relative_error, mask), mask, self.process_group)

    def scores(self, confidence: Tensor, relative_error: Tensor, mask: Tensor | None = None) -> Tensor:
        """(*, M) the score of each entry, as `ReliabilityNLL.scores`."""
        r, error = _scored(confidence, relative_error, mask, "relative_error")
        left = 1 - r + self.FLOOR
        return 0.5 * (error / left + left.log())

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


def _scored(confidence: Tensor, error: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """What a proper score is computed from: confidence and detached mean error, 0.5 and 0 where not counted."""
    if error.dim() == confidence.dim():
        error = error.unsqueeze(-1)
    if error.shape[:-1] != confidence.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(confidence.shape)}, or that and targets at the end, got {tuple(error.shape)}"
        )
    dtype = arithmetic_dtype(confidence)
    r, error = confidence.to(dtype), error.detach().to(dtype).mean(-1)
    if mask is not None:
        check_tensor("mask", mask, BOOL)
        if mask.shape not in (confidence.shape, confidence.shape[:-1]):
            raise ValueError(
                f"mask: expected shape {tuple(confidence.shape)} or {tuple(confidence.shape[:-1])}, got {tuple(mask.shape)}"
            )
        mask = _entries(mask, confidence)
        r, error = torch.where(mask, r, 0.5), torch.where(mask, error, 0.0)
    return r, error


def _entries(mask: Tensor, like: Tensor) -> Tensor:
    """(*, M) from (*) or (*, M)."""
    return mask if mask.dim() == like.dim() else mask.unsqueeze(-1).expand_as(like)


def mean_counted(x: Tensor, counted: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """The mean of x (*, M) over the counted entries, (*, M) or (*) bool or None for all; of those of all ranks of `group`
    (None: this process alone). 0, with gradient 0, where there is none."""
    if counted is not None:
        counted = _entries(counted, x)
        x = torch.where(counted, x, 0.0)
    if group is None:
        return x.sum() / (max(x.numel(), 1) if counted is None else counted.sum().clamp(min=1))
    total = x.sum(dtype=torch.float64)
    count = torch.full_like(total, x.numel()) if counted is None else counted.sum().to(total.dtype)
    whole = sum_ranks(torch.stack([total, count]), group)
    return (whole[0] / whole[1].clamp(min=1)).to(x.dtype)


class CCCLoss(nn.Module):
    """Mean over targets of `1 - CCC` (Lin 1989, population moments); the Aff-Wild2 objective with `pool="batch"`.

    Args:
        pool: "batch" takes one CCC over all valid frames of all sequences; "sequence" one a sequence, then the mean.
        ignore_value: a frame in which any target equals this (-5 in Aff-Wild2; NaN works too) is not counted.
        channel_weights: relative weight of each target, default equal; normalised to sum to 1.
        process_group: the processes that hold parts of one global batch: every rank then has the loss of the global batch,
            exactly, and under DistributedDataParallel the parameters get its gradient, as in one process with the whole
            batch (`functional.ccc` says by which convention). All ranks must call; parts may be of any size, and
            empty. With "sequence" the mean is over all ranks' sequences. None: this process's batch alone, which under
            DistributedDataParallel is another loss with "batch"; it warns once.

    A group of fewer than two frames, or of constant and equal ones, has CCC 0: it counts as 1 with gradient 0.
    """

    channel_weights: Tensor | None

    def __init__(
        self,
        pool: str = "batch",
        ignore_value: float | None = None,
        channel_weights: Sequence[float] | Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_pool(pool)
        if process_group is not None:
            check_group(process_group)
        self.pool, self.ignore_value, self.process_group = pool, ignore_value, process_group
        weights = None
        if channel_weights is not None:
            weights = torch.as_tensor(channel_weights, dtype=torch.float32)
            if weights.dim() != 1 or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
                raise ValueError(
                    f"channel_weights: expected one number >= 0 a target, not all of them 0, got {channel_weights}"
                )
            weights = weights / weights.sum()
        self.register_buffer("channel_weights", weights, persistent=False)

    def extra_repr(self) -> str:
        weights = None if self.channel_weights is None else self.channel_weights.tolist()
        return f"pool={self.pool!r}, ignore_value={self.ignore_value}, channel_weights={weights}"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """pred, target: (B, T, C) or (T, C); mask: bool, (B, T) or the shape of pred. Returns a scalar."""
        dtype = arithmetic_dtype(pred)
        pred, target = pred.to(dtype), target.to(dtype)
        if self.ignore_value is not None:
            ignored = target.isnan() if math.isnan(self.ignore_value) else target == self.ignore_value
            counted = ~ignored.any(-1)
            mask = counted if mask is None else mask & (counted if mask.dim() < target.dim() else counted.unsqueeze(-1))
        if self.channel_weights is not None and self.channel_weights.numel() != pred.shape[-1]:
            raise ValueError(
                f"pred: expected {self.channel_weights.numel()} targets (one for each of channel_weights), got "
                f"{pred.shape[-1]}"
            )
        pooled = self.pool == "batch"
        if pooled and self.process_group is None:
            warn_apart("CCCLoss")
        group = self.process_group if pooled else None
        loss = 1 - functional.ccc(pred, target, mask, pool=self.pool, process_group=group)
        if self.channel_weights is not None:
            loss = (loss * self.channel_weights.to(loss.dtype)).sum(-1)
        return loss.mean() if pooled else mean_counted(loss, None, self.process_group)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


class TemporalCCCLoss(nn.Module):
    """Mean of `1 - rho` over frames, rho the running CCC: concordance at every moment, not only overall.

    Args:
        window: rho over the last `window` frames (int >= 2), or
        halflife: rho over all frames so far, weighted by `0.5 ** (age / halflife)`; neither: all frames so far alike.
        process_group: as in `CCCLoss`. A sequence is whole on its rank, so its running CCC is what it is; the mean is over the
            frames of all ranks, which matters where they average unequally many.

    Only the frames are averaged by which at least two unmasked ones are inside the window. Where those are constant and
    equal, rho is 0, and the frame counts as 1 with gradient 0, as in `CCCLoss`.
    """

    def __init__(
        self, window: int | None = None, halflife: float | None = None, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        check_window(window, halflife)
        if process_group is not None:
            check_group(process_group)
        self.window, self.halflife, self.process_group = window, halflife, process_group

    def extra_repr(self) -> str:
        return f"window={self.window}, halflife={self.halflife}"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """pred, target: (B, T, C); mask: bool, (B, T) or the shape of pred. A scalar, 0 where no frame is averaged."""
        dtype = arithmetic_dtype(pred)
        pred, target = pred.to(dtype), target.to(dtype)
        rho, _ = functional.temporal_ccc(pred, target, mask, window=self.window, halflife=self.halflife)
        counted = torch.ones_like(pred, dtype=torch.bool) if mask is None else _entries(mask, pred)
        seen = counted.long().cumsum(1)  # counted frames so far; below: inside the window
        if self.window is not None and pred.shape[1] > self.window:
            seen = torch.cat([seen[:, : self.window], seen[:, self.window :] - seen[:, : -self.window]], 1)
        return mean_counted(1 - rho, seen >= 2, self.process_group)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...
