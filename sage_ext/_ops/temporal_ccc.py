"""temporal_ccc (docs/math.md, "Temporal CCC"): (pred, target, mask?, state?, window, decay) -> (rho, state).

window 0 means none; decay is 0.5 ** (1 / halflife), 1 for the cumulative mode. The layout of `state` is in csrc/ops.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _door
from ._door import address, dense
from .ccc import mask_kind


def state_shape(batch: int, frames: int, channels: int, window: int, history: int) -> tuple[int, ...]:
    if window == 0:
        return batch, channels, 8
    return batch, channels, min(window - 1, history + frames), 3


def _history(state: Tensor | None, window: int) -> int:
    return state.shape[2] if state is not None and window else 0


def _forward(
    pred: Tensor, target: Tensor, mask: Tensor | None, state: Tensor | None, window: int, decay: float
) -> tuple[Tensor, Tensor]:
    pred, target, mask, state = pred.contiguous(), target.contiguous(), dense(mask), dense(state)
    batch, frames, channels = pred.shape
    history = _history(state, window)
    shape = state_shape(batch, frames, channels, window, history)
    rho = torch.empty_like(pred)
    new_state = torch.empty(shape, dtype=torch.float64, device=pred.device)
    if batch and channels:
        space = _door.workspace(_C.temporal_ccc_workspace(batch, frames, channels, window, history, False), pred)
        defined = torch.empty(pred.shape, dtype=torch.bool, device=pred.device)  # the kernel's, read by nobody
        _door.kernels[pred.device.type].temporal_ccc_forward(
            _door.DTYPE_CODES[pred.dtype], batch, frames, channels, address(pred), address(target), address(mask),
            mask_kind(mask, pred), window, decay, history, address(state), shape[2] if window else 0,
            address(new_state), address(rho), address(defined), address(space), *_door.placement(pred),
        )  # fmt: skip
    return rho, new_state


def _backward(
    grad_rho: Tensor,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    state: Tensor | None,
    window: int,
    decay: float,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    pred, target, mask, state = pred.contiguous(), target.contiguous(), dense(mask), dense(state)
    grad_rho = grad_rho.contiguous()
    batch, frames, channels = pred.shape
    history = _history(state, window)
    grad_pred = pred.new_empty(pred.shape if need_pred else 0)
    grad_target = pred.new_empty(pred.shape if need_target else 0)
    if pred.numel():
        space = _door.workspace(_C.temporal_ccc_workspace(batch, frames, channels, window, history, True), pred)
        _door.kernels[pred.device.type].temporal_ccc_backward(
            _door.DTYPE_CODES[pred.dtype], batch, frames, channels, address(pred), address(target), address(mask),
            mask_kind(mask, pred), window, decay, history, address(state), address(grad_rho), address(grad_pred),
            address(grad_target), address(space), *_door.placement(pred),
        )  # fmt: skip
    return grad_pred, grad_target


class _TemporalCcc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        rho, new_state = _forward(*args)
        ctx.save_for_backward(*args[:4])
        ctx.mode = args[4:]
        ctx.mark_non_differentiable(new_state)
        return rho, new_state

    @staticmethod
    def backward(ctx: Any, grad_rho: Tensor, *_: Any) -> Any:
        need_pred, need_target = ctx.needs_input_grad[:2]
        run = _door.backward_door(_backward, _backward_op, grad_rho)
        gp, gt = run(grad_rho, *ctx.saved_tensors, *ctx.mode, need_pred, need_target)
        return gp if need_pred else None, gt if need_target else None, None, None, None, None


# ------------------------------------------------------------------------------------------------- torch.library
def _fake(pred: Tensor, target: Tensor, mask: Any, state: Tensor | None, window: int, decay: float) -> Any:
    batch, frames, channels = pred.shape
    shape = state_shape(batch, frames, channels, window, _history(state, window))
    return pred.new_empty(pred.shape), torch.empty(shape, dtype=torch.float64, device=pred.device)


_MODE = "Tensor pred, Tensor target, Tensor? mask, Tensor? state, SymInt window, float decay"

_backward_op = _door.register(
    f"temporal_ccc_backward(Tensor grad_rho, {_MODE}, bool need_pred, bool need_target) -> (Tensor, Tensor)",
    _backward,
    lambda grad_rho, pred, target, mask, state, window, decay, need_pred, need_target: (
        pred.new_empty(pred.shape if need_pred else 0),
        pred.new_empty(pred.shape if need_target else 0),
    ),
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.mode = inputs[4:]


def _autograd(ctx: Any, grad_rho: Tensor, *_: Any) -> Any:
    need_pred, need_target = ctx.needs_input_grad[:2]
    gp, gt = _backward_op(grad_rho, *ctx.saved_tensors, *ctx.mode, need_pred, need_target)
    return gp if need_pred else None, gt if need_target else None, None, None, None, None


_op = _door.register(
    f"temporal_ccc({_MODE}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)


def temporal_ccc(
    pred: Tensor, target: Tensor, mask: Tensor | None, state: Tensor | None, window: int, decay: float
) -> tuple[Tensor, Tensor]:
    if _door.fast(pred, target, mask, state):
        if _door.needs_grad(pred, target):
            return _TemporalCcc.apply(pred, target, mask, state, window, decay)
        return _forward(pred, target, mask, state, window, decay)
    return _op(pred, target, mask, state, window, decay)
