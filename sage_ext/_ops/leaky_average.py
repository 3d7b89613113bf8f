"""leaky_average (docs/math.md, "Leaky average"): (x, precision, halflife, prior, state?, causal, relative) -> (average, state).

Saved for backward: the inputs and the average itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _door
from ._door import address, dense


def _arguments(
    x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor, state: Tensor | None, causal: bool, relative: bool
) -> tuple[Any, ...]:
    """The kernels' leading arguments; the caller holds the (dense) tensors."""
    batch, frames, dim = x.shape
    return (
        _door.DTYPE_CODES[x.dtype], batch, frames, dim, halflife.shape[0], causal, relative, address(x), address(precision),
        address(halflife), address(prior), address(state),
    )  # fmt: skip


def _space(x: Tensor, averages: int, causal: bool) -> Tensor:
    batch, frames, dim = x.shape
    return _door.workspace(_C.leaky_average_workspace(batch, frames, dim, averages, causal), x)


def _forward(
    x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor, state: Tensor | None, causal: bool, relative: bool
) -> tuple[Tensor, Tensor]:
    x, precision, halflife, prior, state = (
        x.contiguous(), precision.contiguous(), halflife.contiguous(), prior.contiguous(), dense(state),
    )  # fmt: skip
    (batch, frames, dim), averages = x.shape, halflife.shape[0]
    average = x.new_empty(batch, frames, averages, dim)
    after = precision.new_empty(batch, averages, dim + 2)
    if batch:
        space = _space(x, averages, causal)
        _door.kernels[x.device.type].leaky_average_forward(
            *_arguments(x, precision, halflife, prior, state, causal, relative), address(average), address(after),
            address(space), *_door.placement(x),
        )  # fmt: skip
    return average, after


def _backward(
    grad_average: Tensor | None,
    grad_after: Tensor | None,
    x: Tensor,
    precision: Tensor,
    halflife: Tensor,
    prior: Tensor,
    state: Tensor | None,
    average: Tensor,
    causal: bool,
    relative: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, precision, prior and state (empty without one)."""
    x, precision, halflife, prior, state, average = (
        x.contiguous(), precision.contiguous(), halflife.contiguous(), prior.contiguous(), dense(state),
        average.contiguous(),
    )  # fmt: skip
    grad_average, grad_after = dense(grad_average), dense(grad_after)
    batch = x.shape[0]
    grad_x, grad_precision = torch.empty_like(x), torch.empty_like(precision)
    grad_prior = torch.empty_like(prior) if batch else torch.zeros_like(prior)
    grad_state = precision.new_empty(0) if state is None else torch.empty_like(state)
    if batch:
        space = _space(x, halflife.shape[0], causal)
        _door.kernels[x.device.type].leaky_average_backward(
            *_arguments(x, precision, halflife, prior, state, causal, relative), address(average),
            address(grad_average), address(grad_after), address(grad_x), address(grad_precision), address(grad_prior),
            0 if state is None else address(grad_state), address(space), *_door.placement(x),
        )  # fmt: skip
    return grad_x, grad_precision, grad_prior, grad_state


class _LeakyAverage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor, state: Tensor | None, causal: bool,
        relative: bool,
    ) -> Any:  # fmt: skip
        average, after = _forward(x, precision, halflife, prior, state, causal, relative)
        ctx.save_for_backward(x, precision, halflife, prior, state, average)
        ctx.mode = causal, relative
        ctx.set_materialize_grads(False)
        return average, after

    @staticmethod
    def backward(ctx: Any, grad_average: Tensor | None, grad_after: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        run = _door.backward_door(_backward, _backward_op, grad_average, grad_after)
        return _distribute(run(grad_average, grad_after, *saved, *ctx.mode), saved[4])


def _distribute(grads: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor | None, ...]:
    """_backward's gradients in the order of the op's arguments."""
    grad_x, grad_precision, grad_prior, grad_state = grads
    return grad_x, grad_precision, None, grad_prior, None if state is None else grad_state, None, None


# ------------------------------------------------------------------------------------------------- torch.library
def _fake(
    x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor, state: Tensor | None, causal: bool, relative: bool
) -> Any:
    (batch, frames, dim), averages = x.shape, halflife.shape[0]
    return x.new_empty(batch, frames, averages, dim), precision.new_empty(batch, averages, dim + 2)


_INPUTS = "Tensor x, Tensor precision, Tensor halflife, Tensor prior, Tensor? state"
_MODE = "bool causal, bool relative"

_backward_op = _door.register(
    f"leaky_average_backward(Tensor? grad_average, Tensor? grad_after, {_INPUTS}, Tensor average, {_MODE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_average, grad_after, x, precision, halflife, prior, state, average, causal, relative: (
        x.new_empty(x.shape),
        precision.new_empty(precision.shape),
        prior.new_empty(prior.shape),
        precision.new_empty(0 if state is None else state.shape),
    ),
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], output[0])
    ctx.mode = inputs[5:]


def _autograd(ctx: Any, grad_average: Tensor | None, grad_after: Tensor | None) -> Any:
    saved = ctx.saved_tensors
    return _distribute(_backward_op(grad_average, grad_after, *saved, *ctx.mode), saved[4])


_op = _door.register(
    f"leaky_average({_INPUTS}, {_MODE}) -> (Tensor, Tensor)", _forward, _fake, _autograd, _setup_context
)


def leaky_average(
    x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor, state: Tensor | None, causal: bool, relative: bool
) -> tuple[Tensor, Tensor]:
    if _door.fast(x, precision, halflife, prior, state):
        if _door.needs_grad(x, precision, prior, state):
            return _LeakyAverage.apply(x, precision, halflife, prior, state, causal, relative)
        return _forward(x, precision, halflife, prior, state, causal, relative)
    return _op(x, precision, halflife, prior, state, causal, relative)
