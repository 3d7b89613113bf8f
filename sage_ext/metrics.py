"""Streaming concordance: accumulate it over batches, chunks and workers without ever holding the data."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import functional
from ._arguments import arithmetic_dtype, check_int, check_window
from ._distributed import check_group, initialised, merge_ranks
from ._typing import called_as
from .extras import require

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["StreamingCCC"]  # and TorchMetricsCCC, which `import *` would make need torchmetrics


def _update_pair(pred: Tensor, target: Tensor, num_targets: int) -> tuple[Tensor, Tensor]:
    """What an update was given, checked, detached and in one arithmetic dtype (integers are welcome)."""
    for name, value in (("pred", pred), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        if value.dim() not in (2, 3) or value.shape[-1] != num_targets:
            raise ValueError(
                f"{name}: expected shape (T, {num_targets}) or (B, T, {num_targets}), got {tuple(value.shape)}"
            )
    dtype = arithmetic_dtype(pred, target)
    return pred.detach().to(dtype), target.detach().to(dtype)


class StreamingCCC(nn.Module):
    """Concordance correlation coefficient (Lin 1989, population moments) of a stream of updates.

    Three modes:
    - pooled (default): one CCC a target over every valid frame of every update; the Aff-Wild2 score. Updates may have
      any shape and order, and two metrics `merge` exactly, those of several processes by `sync`.
    - `window=W` (int >= 2) or `halflife=H` (frames): successive updates are one running stream, (T, C), or (B, T, C)
      with a fixed B; `compute` gives the CCC of the last W frames, or with weights `0.5 ** (age / H)`, as of the last.

    Nothing synchronises the device. The state is float64, in `state_dict`, and moves with `.to(device)`.

    Args:
        num_targets: C.
        window, halflife: see above; at most one of them.
    """

    moments: Tensor  # (C, 6) pooled: count, mean_p, mean_t, M2_p, M2_t, C_pt
    running: Tensor  # temporal_ccc's state after the last frame; empty before the first
    rho: Tensor  # (B, C), or (C,): running CCC as of the last frame; (C,) zeros before the first

    def __init__(self, num_targets: int = 2, window: int | None = None, halflife: float | None = None) -> None:
        super().__init__()
        check_int("num_targets", num_targets, 1)
        check_window(window, halflife)
        self.num_targets, self.window, self.halflife = num_targets, window, halflife
        if self.pooled:
            self.register_buffer("moments", torch.zeros(num_targets, 6, dtype=torch.float64))
        else:
            self.register_buffer("running", torch.zeros(0, dtype=torch.float64))
            self.register_buffer("rho", torch.zeros(num_targets, dtype=torch.float64))

    @property
    def pooled(self) -> bool:
        """Whether this is the pooled mode."""
        return self.window is None and self.halflife is None

    def extra_repr(self) -> str:
        return f"num_targets={self.num_targets}, window={self.window}, halflife={self.halflife}"

    def reset(self) -> None:
        """Forget everything seen."""
        if self.pooled:
            self.moments.zero_()
        else:
            self.running = self.running.new_zeros(0)
            self.rho = self.rho.new_zeros(self.num_targets)

    @torch.no_grad()
    def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add frames. pred, target: (T, C) or (B, T, C); mask: bool, that shape or without C, False: not counted."""
        pred, target = _update_pair(pred, target, self.num_targets)
        if self.pooled:
            self.moments.copy_(functional.ccc_moments(pred, target, mask, state=self.moments))
            return
        lead = pred.shape[:-2]
        if self.running.numel() and self.rho.shape[:-1] != lead:
            raise ValueError(
                f"pred: expected {_streams(self.rho.shape[:-1])}, as this stream began (reset() starts another), got "
                f"{_streams(lead)}"
            )
        if pred.shape[-2] == 0:
            return
        if not lead:
            pred, target, mask = pred[None], target[None], None if mask is None else mask[None]
        rho, self.running = functional.temporal_ccc(
            pred,
            target,
            mask,
            window=self.window,
            halflife=self.halflife,
            state=self.running if self.running.numel() else None,
        )
        self.rho = rho[:, -1].double() if lead else rho[0, -1].double()

    def compute(self) -> Tensor:
        """float64: pooled (C,); running (C,) for (T, C) updates, (B, C) for (B, T, C). 0 where it is undefined."""
        return functional.ccc_from_moments(self.moments) if self.pooled else self.rho.clone()

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """`update`, then `compute`."""
        self.update(pred, target, mask)
        return self.compute()

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...

    @torch.no_grad()
    def merge(self, other: StreamingCCC) -> None:
        """Add everything `other` has seen. Pooled mode only: two running streams have no common order in time."""
        if not isinstance(other, StreamingCCC):
            raise TypeError(f"other: expected a StreamingCCC, got {type(other).__name__}")
        if not (self.pooled and other.pooled):
            running = repr(self if not self.pooled else other)
            raise ValueError(
                f"other: expected both metrics pooled (running streams have no common order in time), got {running}"
            )
        if other.num_targets != self.num_targets:
            raise ValueError(f"other: expected num_targets={self.num_targets}, got {other.num_targets}")
        self.moments.copy_(functional.merge_moments(self.moments, other.moments.to(self.moments.device)))

    @torch.no_grad()
    def sync(self, process_group: ProcessGroup | None = None) -> StreamingCCC:
        """A new metric that has seen what this one has on every process of the group (None: the default one), alike on all.

        This one goes on with what its own process sees, so that `metric.sync().compute()` may be asked for at any time and
        nothing is ever counted twice. Every rank must call; one may have seen nothing. One collective of 48 C bytes a rank;
        none, and a mere copy, where `torch.distributed` is not initialised. Pooled mode only: running streams have no
        common order in time.
        """
        if not self.pooled:
            raise ValueError(
                f"sync: expected a pooled metric (running streams have no common order in time), got {self!r}"
            )
        if process_group is not None:
            check_group(process_group)
        whole = copy.deepcopy(self)
        if initialised():
            whole.moments.copy_(merge_ranks(self.moments, process_group))
        return whole

    def _apply(self, fn: Any, recurse: bool = True) -> StreamingCCC:
        """`.to(device)` moves the state; `.half()`, `.float()` and the like leave it in float64."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A running stream's state has the shape that its updates gave it.
        for name in () if self.pooled else ("running", "rho"):
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]


def _streams(lead: torch.Size) -> str:
    return f"{lead[0]} sequences, (B, T, C)" if lead else "one sequence, (T, C)"


@functools.cache
def _torchmetrics_adapter() -> type:
    metric = require("torchmetrics", "metrics").Metric

    class TorchMetricsCCC(metric):  # type: ignore[misc, valid-type]
        """`StreamingCCC` (pooled) as a `torchmetrics.Metric`: masks, float64 moments, exact merge over processes.

        `update(pred, target, mask=None)` as there, and (T,) for one target; `compute()` gives (C,), for one target, or with
        `average=True` their mean, a scalar, as torchmetrics does. The state stays float64 whatever it is cast to: by
        `module.to(dtype)`, `.half()`, Lightning's "16-true" and "bf16-true", or `set_dtype`.
        Moments are population (1/n) ones: `torchmetrics.ConcordanceCorrCoef` divides second moments by n - 1, and so
        gives a slightly smaller value, equal in the limit; undefined values are 0 here, NaN there.
        """

        is_differentiable = False
        higher_is_better = True
        full_state_update = False
        plot_lower_bound = -1.0
        plot_upper_bound = 1.0

        def __init__(self, num_targets: int = 2, average: bool = False, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            check_int("num_targets", num_targets, 1)
            self.num_targets, self.average = num_targets, average
            zeros = torch.zeros(num_targets, 6, dtype=torch.float64)
            self.add_state("moments", zeros, dist_reduce_fx=_merge_stacked)

        def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
            if self.num_targets == 1 and all(isinstance(x, Tensor) and x.dim() == 1 for x in (pred, target)):
                pred, target = pred[:, None], target[:, None]
            pred, target = _update_pair(pred, target, self.num_targets)
            self.moments = functional.ccc_moments(pred, target, mask, state=self.moments)  # type: ignore[has-type]

        def compute(self) -> Tensor:
            rho = functional.ccc_from_moments(self.moments)
            return rho.mean() if self.average or self.num_targets == 1 else rho

        def plot(self, val: Any = None, ax: Any = None) -> Any:
            """`torchmetrics.Metric.plot`: (figure, axes) of `val`, one result or several, by default `compute()`."""
            return self._plot(val, ax)

        def _apply(self, fn: Any, exclude_state: Any = "") -> Any:
            before = self.moments, self._defaults["moments"]
            super()._apply(fn, exclude_state)
            device = fn(self.moments.new_zeros(0)).device
            self.moments, self._defaults["moments"] = (x.to(device) for x in before)
            return self

    TorchMetricsCCC.__qualname__ = "TorchMetricsCCC"  # picklable by the name that __getattr__ serves
    return TorchMetricsCCC


if TYPE_CHECKING:
    from torchmetrics import Metric

    class TorchMetricsCCC(Metric):
        """What `_torchmetrics_adapter` makes, for type checkers."""

        num_targets: int
        average: bool
        moments: Tensor

        def __init__(self, num_targets: int = 2, average: bool = False, **kwargs: Any) -> None: ...
        def update(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None: ...
        def compute(self) -> Tensor: ...
        def __call__(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor: ...


def _merge_stacked(moments: Tensor) -> Tensor:
    """(processes, C, 6) -> (C, 6), in order: what torchmetrics calls after gathering, or to join two states."""
    return functools.reduce(functional.merge_moments, moments.unbind(0))


def __getattr__(name: str) -> Any:
    if name == "TorchMetricsCCC":
        return _torchmetrics_adapter()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
