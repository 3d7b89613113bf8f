"""stage_filter (docs/math.md, "Stage filter"): (emission, transition, initial?, mask?) -> (posterior, final, belief)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _door
from ._door import address, dense


def _forward(
    emission: Tensor, transition: Tensor, initial: Tensor | None, mask: Tensor | None, want_belief: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    emission, transition, initial, mask = emission.contiguous(), transition.contiguous(), dense(initial), dense(mask)
    batch, frames, stages = emission.shape
    posterior = torch.empty_like(emission)
    belief = torch.empty_like(emission) if want_belief else None
    final = emission.new_empty(batch, stages)
    if batch:
        _door.kernels[emission.device.type].stage_filter_forward(
            _door.DTYPE_CODES[emission.dtype], batch, frames, stages, address(emission), address(transition),
            address(initial), _stride(initial), address(mask), address(posterior), address(belief), address(final),
            *_door.placement(emission),
        )  # fmt: skip
    return posterior, final, belief


def _backward(
    grad_posterior: Tensor | None,
    grad_final: Tensor | None,
    emission: Tensor,
    transition: Tensor,
    initial: Tensor | None,
    mask: Tensor | None,
    posterior: Tensor,
    belief: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    emission, transition, initial, mask = emission.contiguous(), transition.contiguous(), dense(initial), dense(mask)
    posterior, belief = posterior.contiguous(), belief.contiguous()
    grad_posterior, grad_final = dense(grad_posterior), dense(grad_final)
    batch, frames, stages = posterior.shape
    grad_emission = torch.empty_like(posterior)
    grad_transition = torch.empty_like(transition) if batch else torch.zeros_like(transition)
    grad_initial = posterior.new_empty(batch, stages)
    if batch:
        space = _door.workspace(_C.stage_filter_workspace(batch, frames, stages), posterior)
        _door.kernels[posterior.device.type].stage_filter_backward(
            _door.DTYPE_CODES[posterior.dtype], batch, frames, stages, address(emission), address(transition),
            address(initial), _stride(initial), address(mask), address(posterior), address(belief), address(grad_posterior),
            address(grad_final), address(grad_emission), address(grad_transition), address(grad_initial),
            address(space), *_door.placement(posterior),
        )  # fmt: skip
    return grad_emission, grad_transition, grad_initial


def _stride(initial: Tensor | None) -> int:
    return initial.shape[-1] if initial is not None and initial.dim() == 2 else 0


def _grad_initial(initial: Tensor | None, grad: Tensor) -> Tensor | None:
    if initial is None:
        return None
    return grad if initial.dim() == 2 else grad.sum(0)


class _StageFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emission: Tensor, transition: Tensor, initial: Tensor | None, mask: Tensor | None) -> Any:
        posterior, final, belief = _forward(emission, transition, initial, mask)
        ctx.save_for_backward(emission, transition, initial, mask, posterior, belief)
        ctx.set_materialize_grads(False)
        return posterior, final

    @staticmethod
    def backward(ctx: Any, grad_posterior: Tensor | None, grad_final: Tensor | None) -> Any:
        emission, transition, initial, mask, posterior, belief = ctx.saved_tensors
        run = _door.backward_door(_backward, _backward_op, grad_posterior, grad_final)
        ge, gt, gi = run(grad_posterior, grad_final, emission, transition, initial, mask, posterior, belief)
        return ge, gt, _grad_initial(initial, gi), None


# ------------------------------------------------------------------------------------------------- torch.library
def _fake(emission: Tensor, transition: Tensor, initial: Tensor | None, mask: Tensor | None) -> Any:
    shape = emission.shape
    return emission.new_empty(shape), emission.new_empty(shape[0], shape[2]), emission.new_empty(shape)


_backward_op = _door.register(
    "stage_filter_backward(Tensor? grad_posterior, Tensor? grad_final, Tensor emission, Tensor transition, Tensor? initial, "
    "Tensor? mask, Tensor posterior, Tensor belief) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_posterior, grad_final, emission, transition, initial, mask, posterior, belief: (
        posterior.new_empty(posterior.shape),
        transition.new_empty(transition.shape),
        posterior.new_empty(posterior.shape[0], posterior.shape[2]),
    ),
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    emission, transition, initial, mask = inputs
    posterior, _, belief = output
    ctx.save_for_backward(emission, transition, initial, mask, posterior, belief)


def _autograd(ctx: Any, grad_posterior: Tensor | None, grad_final: Tensor | None, _: Tensor | None) -> Any:
    emission, transition, initial, mask, posterior, belief = ctx.saved_tensors
    ge, gt, gi = _backward_op(grad_posterior, grad_final, emission, transition, initial, mask, posterior, belief)
    return ge, gt, _grad_initial(initial, gi), None


_op = _door.register(
    "stage_filter(Tensor emission, Tensor transition, Tensor? initial, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)


def stage_filter(
    emission: Tensor, transition: Tensor, initial: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if _door.fast(emission, transition, initial, mask):
        if _door.needs_grad(emission, transition, initial):
            return _StageFilter.apply(emission, transition, initial, mask)
        return _forward(emission, transition, initial, mask, want_belief=False)[:2]
    return _op(emission, transition, initial, mask)[:2]
