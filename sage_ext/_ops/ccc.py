"""ccc and ccc_moments (docs/math.md, "Concordance"): (pred, target, mask?, pooled) -> (ccc, moments), one kernel pair.

pred and target are (..., T, C), mask (..., T) or (..., T, C). pooled: all frames are one group, and ccc is (C,), moments
(C, 6); else a group a sequence, (..., C) and (..., C, 6). The reshaping is done here, inside the op: as operations of
their own its views would cost autograd more than the kernels take on a small batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _door
from ._door import address, dense


def mask_kind(mask: Tensor | None, pred: Tensor) -> int:
    """ops.h, enum Mask: none, frame, element."""
    return 0 if mask is None else 1 if mask.dim() < pred.dim() else 2


def _groups(pred: Tensor, pooled: bool) -> tuple[int, int, int, tuple[int, ...]]:
    """(groups, frames a group, channels, leading shape of the results)"""
    *lead, frames, channels = pred.shape
    groups = math.prod(lead)
    return (1, groups * frames, channels, ()) if pooled else (groups, frames, channels, tuple(lead))


def _forward(pred: Tensor, target: Tensor, mask: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
    pred, target, mask = pred.contiguous(), target.contiguous(), dense(mask)
    groups, frames, channels, lead = _groups(pred, pooled)
    moments = torch.empty((*lead, channels, 6), dtype=torch.float64, device=pred.device)
    ccc = pred.new_empty((*lead, channels))
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
    pooled: bool,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    pred, target, mask, moments = pred.contiguous(), target.contiguous(), dense(mask), moments.contiguous()
    grad_ccc, grad_moments = dense(grad_ccc), dense(grad_moments)
    groups, frames, channels, _ = _groups(pred, pooled)
    grad_pred = torch.empty_like(pred) if need_pred else None
    grad_target = torch.empty_like(pred) if need_target else None
    if pred.numel():
        _door.kernels[pred.device.type].ccc_backward(
            _door.DTYPE_CODES[pred.dtype], groups, frames, channels, address(pred), address(target), address(mask),
            mask_kind(mask, pred), address(moments), address(grad_ccc), address(grad_moments), address(grad_pred),
            address(grad_target), *_door.placement(pred),
        )  # fmt: skip
    return grad_pred, grad_target


class _Ccc(torch.autograd.Function):
    """`of_moments` says which of the two results is wanted."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, mask: Tensor | None, pooled: bool, of_moments: bool) -> Tensor:
        ccc, moments = _forward(pred, target, mask, pooled)
        ctx.save_for_backward(pred, target, mask, moments)
        ctx.mode = pooled, of_moments
        return moments if of_moments else ccc

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pred, target, mask, moments = ctx.saved_tensors
        pooled, of_moments = ctx.mode
        need_pred, need_target = ctx.needs_input_grad[:2]
        grads = (None, grad) if of_moments else (grad, None)
        run = _door.backward_door(_backward, _backward_op, grad)
        gp, gt = run(*grads, pred, target, mask, moments, pooled, need_pred, need_target)
        return gp if need_pred else None, gt if need_target else None, None, None, None


# ------------------------------------------------------------------------------------------------- torch.library
def _backward_impl(*args: Any) -> tuple[Tensor, Tensor]:
    """An operator cannot return None: an empty tensor stands for a gradient that is not needed."""
    pred = args[2]
    grad_pred, grad_target = _backward(*args)
    return (
        pred.new_empty(0) if grad_pred is None else grad_pred,
        pred.new_empty(0) if grad_target is None else grad_target,
    )


def _fake_backward(
    grad_ccc: Any, grad_moments: Any, pred: Tensor, target: Any, mask: Any, moments: Any, pooled: bool,
    need_pred: bool, need_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return pred.new_empty(pred.shape if need_pred else 0), pred.new_empty(pred.shape if need_target else 0)


def _fake_moments(pred: Tensor, pooled: bool) -> Tensor:
    lead = () if pooled else pred.shape[:-2]
    return torch.empty((*lead, pred.shape[-1], 6), dtype=torch.float64, device=pred.device)


def _fake(pred: Tensor, target: Tensor, mask: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
    moments = _fake_moments(pred, pooled)
    return pred.new_empty(moments.shape[:-1]), moments


_backward_op = _door.register(
    "ccc_backward(Tensor? grad_ccc, Tensor? grad_moments, Tensor pred, Tensor target, Tensor? mask, Tensor moments, "
    "bool pooled, bool need_pred, bool need_target) -> (Tensor, Tensor)",
    _backward_impl,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    pred, target, mask, ctx.pooled = inputs
    ctx.save_for_backward(pred, target, mask, output if isinstance(output, Tensor) else output[1])


def _autograd_of(of_moments: bool) -> Any:
    def autograd(ctx: Any, grad: Tensor, *_: Any) -> Any:
        pred, target, mask, moments = ctx.saved_tensors
        need_pred, need_target = ctx.needs_input_grad[:2]
        grads = (None, grad) if of_moments else (grad, None)
        gp, gt = _backward_op(*grads, pred, target, mask, moments, ctx.pooled, need_pred, need_target)
        return gp if need_pred else None, gt if need_target else None, None, None

    return autograd


_ccc_op = _door.register(
    "ccc(Tensor pred, Tensor target, Tensor? mask, bool pooled) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _autograd_of(False),
    _setup_context,
)
_moments_op = _door.register(
    "ccc_moments(Tensor pred, Tensor target, Tensor? mask, bool pooled) -> Tensor",
    lambda pred, target, mask, pooled: _forward(pred, target, mask, pooled)[1],
    lambda pred, target, mask, pooled: _fake_moments(pred, pooled),
    _autograd_of(True),
    _setup_context,
)


def ccc(pred: Tensor, target: Tensor, mask: Tensor | None, pooled: bool) -> Tensor:
    if not _door.fast(pred, target, mask):
        return _ccc_op(pred, target, mask, pooled)[0]
    if _door.needs_grad(pred, target):
        return _Ccc.apply(pred, target, mask, pooled, False)
    return _forward(pred, target, mask, pooled)[0]


def ccc_moments(pred: Tensor, target: Tensor, mask: Tensor | None, pooled: bool) -> Tensor:
    if not _door.fast(pred, target, mask):
        return _moments_op(pred, target, mask, pooled)
    if _door.needs_grad(pred, target):
        return _Ccc.apply(pred, target, mask, pooled, True)
    return _forward(pred, target, mask, pooled)[1]
