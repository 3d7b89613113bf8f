"""ccc and ccc_moments (spec 1.3): (pred, target, mask?) -> (ccc, moments), one kernel pair for both.

pred and target come as (G, F, C): G groups of F frames; mask as (G, F) or (G, F, C).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _door
from ._door import address, dense


def mask_kind(mask: Tensor | None, pred: Tensor) -> int:
    """ops.h, enum Mask: none, frame, element."""
    return 0 if mask is None else 1 if mask.dim() < pred.dim() else 2


def _forward(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    pred, target, mask = pred.contiguous(), target.contiguous(), dense(mask)
    groups, frames, channels = pred.shape
    moments = torch.empty(groups, channels, 6, dtype=torch.float64, device=pred.device)
    ccc = pred.new_empty(groups, channels)
    if groups and channels:
        space = _door.workspace(_C.ccc_workspace(groups, frames, channels), pred)
        _door.kernels[pred.device.type].ccc_forward(
            _door.DTYPE_CODES[pred.dtype], groups, frames, channels, address(pred), address(target), address(mask),
            mask_kind(mask, pred), address(moments), address(ccc), address(space), *_door.placement(pred),
        )  # fmt: skip
    return ccc, moments


def _backward(
    grad_ccc: Tensor | None,
    grad_moments: Tensor | None,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    pred, target, mask, moments = pred.contiguous(), target.contiguous(), dense(mask), moments.contiguous()
    grad_ccc, grad_moments = dense(grad_ccc), dense(grad_moments)
    groups, frames, channels = pred.shape
    grad_pred = pred.new_empty(pred.shape if need_pred else 0)
    grad_target = pred.new_empty(pred.shape if need_target else 0)
    if pred.numel():
        _door.kernels[pred.device.type].ccc_backward(
            _door.DTYPE_CODES[pred.dtype], groups, frames, channels, address(pred), address(target), address(mask),
            mask_kind(mask, pred), address(moments), address(grad_ccc), address(grad_moments), address(grad_pred),
            address(grad_target), *_door.placement(pred),
        )  # fmt: skip
    return grad_pred, grad_target


class _Ccc(torch.autograd.Function):
    """Differentiable in one of its two outputs: `of_moments` says which (the other is marked so)."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, mask: Tensor | None, of_moments: bool) -> Any:
        ccc, moments = _forward(pred, target, mask)
        ctx.save_for_backward(pred, target, mask, moments)
        ctx.of_moments = of_moments
        return moments if of_moments else ccc

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pred, target, mask, moments = ctx.saved_tensors
        need_pred, need_target = ctx.needs_input_grad[:2]
        grads = (None, grad) if ctx.of_moments else (grad, None)
        run = _door.backward_door(_backward, _backward_op, grad)
        gp, gt = run(*grads, pred, target, mask, moments, need_pred, need_target)
        return gp if need_pred else None, gt if need_target else None, None, None


# ------------------------------------------------------------------------------------------------- torch.library
_backward_op = _door.register(
    "ccc_backward(Tensor? grad_ccc, Tensor? grad_moments, Tensor pred, Tensor target, Tensor? mask, Tensor moments, "
    "bool need_pred, bool need_target) -> (Tensor, Tensor)",
    _backward,
    lambda grad_ccc, grad_moments, pred, target, mask, moments, need_pred, need_target: (
        pred.new_empty(pred.shape if need_pred else 0),
        pred.new_empty(pred.shape if need_target else 0),
    ),
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    pred, target, mask = inputs
    ctx.save_for_backward(pred, target, mask, output if isinstance(output, Tensor) else output[1])


def _autograd_of(of_moments: bool) -> Any:
    def autograd(ctx: Any, grad: Tensor, *_: Any) -> Any:
        pred, target, mask, moments = ctx.saved_tensors
        need_pred, need_target = ctx.needs_input_grad[:2]
        grads = (None, grad) if of_moments else (grad, None)
        gp, gt = _backward_op(*grads, pred, target, mask, moments, need_pred, need_target)
        return gp if need_pred else None, gt if need_target else None, None

    return autograd


def _empty_moments(pred: Tensor) -> Tensor:
    return torch.empty(pred.shape[0], pred.shape[2], 6, dtype=torch.float64, device=pred.device)


_ccc_op = _door.register(
    "ccc(Tensor pred, Tensor target, Tensor? mask) -> (Tensor, Tensor)",
    _forward,
    lambda pred, target, mask: (pred.new_empty(pred.shape[0], pred.shape[2]), _empty_moments(pred)),
    _autograd_of(False),
    _setup_context,
)
_moments_op = _door.register(
    "ccc_moments(Tensor pred, Tensor target, Tensor? mask) -> Tensor",
    lambda pred, target, mask: _forward(pred, target, mask)[1],
    lambda pred, target, mask: _empty_moments(pred),
    _autograd_of(True),
    _setup_context,
)


def ccc(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """(G, F, C) -> (G, C)"""
    if _door.fast(pred, target, mask):
        return (
            _Ccc.apply(pred, target, mask, False) if _door.needs_grad(pred, target) else _forward(pred, target, mask)[0]
        )
    return _ccc_op(pred, target, mask)[0]


def ccc_moments(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """(G, F, C) -> (G, C, 6) float64"""
    if _door.fast(pred, target, mask):
        return (
            _Ccc.apply(pred, target, mask, True) if _door.needs_grad(pred, target) else _forward(pred, target, mask)[1]
        )
    return _moments_op(pred, target, mask)
