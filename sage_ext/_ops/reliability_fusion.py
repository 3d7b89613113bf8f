"""reliability_fusion (spec 1.2): (values, gate...) -> (fused, weights, confidence, stats).

`stats` (N, M, 2) holds each row's LayerNorm mean and 1/std for backward: with the inputs, all that is saved. Without a
LayerNorm it is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _door
from ._door import address, dense

# The gating tensors in the order of the schema; `present` is the only one without a gradient.
_GATE = ("reliability", "stage", "log_temperature", "bias", "sharpness", "present", "norm_weight", "norm_bias")


def _row_stride(x: Tensor) -> int | None:
    """Elements from row to row of (*, D) seen as (N, D); None where no single stride reaches every row."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    step = None
    reach = 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if step is None:
            step, reach = stride, stride * size
        elif stride == reach:
            reach = stride * size
        else:
            return None
    return x.shape[-1] if step is None else step


def _arguments(
    values: Sequence[Tensor],
    reliability: Tensor,
    stage: Tensor | None,
    log_temperature: Tensor | None,
    bias: Tensor | None,
    sharpness: Tensor | None,
    present: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[tuple[Any, ...], list[Any]]:
    """The kernels' leading arguments, and the tensors that own the addresses among them."""
    strides = []
    rows_of = []
    for x in values:
        stride = _row_stride(x)
        if stride is None:
            x = x.contiguous()
            stride = x.shape[-1]
        rows_of.append(x)
        strides.append(stride)
    gate = [dense(t) for t in (reliability, stage, log_temperature, bias, sharpness, present, norm_weight, norm_bias)]
    first = rows_of[0]
    dim = first.shape[-1]
    rows = reliability.numel() // (reliability.shape[-1] * reliability.shape[-2])
    arguments = (
        _door.DTYPE_CODES[first.dtype], rows, dim, reliability.shape[-1], tuple([x.data_ptr() for x in rows_of]),
        tuple(strides), *[address(t) for t in gate], eps,
    )  # fmt: skip
    return arguments, [rows_of, gate]


def _forward(values: Sequence[Tensor], *gate: Any, want_stats: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments, held = _arguments(values, *gate)
    first, reliability = values[0], gate[0]
    lead = reliability.shape[:-1]
    fused = torch.empty_like(first, memory_format=torch.contiguous_format)
    weights = reliability.new_empty(lead)
    confidence = torch.empty_like(weights)
    stats = reliability.new_empty((*lead, 2) if gate[6] is not None else 0) if want_stats else None
    if arguments[1]:
        _door.kernels[first.device.type].reliability_fusion_forward(
            *arguments, address(fused), address(weights), address(confidence), address(stats), *_door.placement(first)
        )
    del held
    return fused, weights, confidence, stats  # type: ignore[return-value]


def _backward(
    grad_fused: Tensor | None,
    grad_weights: Tensor | None,
    grad_confidence: Tensor | None,
    values: Sequence[Tensor],
    reliability: Tensor,
    stage: Tensor | None,
    log_temperature: Tensor | None,
    bias: Tensor | None,
    sharpness: Tensor | None,
    present: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    stats: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of each value (empty where not needed), reliability, stage (empty without one), and flat parameters."""
    arguments, held = _arguments(
        values, reliability, stage, log_temperature, bias, sharpness, present, norm_weight, norm_bias, eps
    )
    rows, dim, stages, modalities = arguments[1], arguments[2], arguments[3], len(values)
    grad_fused, grad_weights, grad_confidence = dense(grad_fused), dense(grad_weights), dense(grad_confidence)
    stats = stats.contiguous()
    norm = norm_weight is not None
    grads = [v.new_empty(v.shape) if need else v.new_empty(0) for v, need in zip(values, needs)]
    grad_reliability = reliability.new_empty(reliability.shape)
    grad_stage = reliability.new_empty(0) if stage is None else reliability.new_empty(stage.shape)
    count = _C.reliability_fusion_param_count(dim, modalities, stages, norm)
    grad_params = reliability.new_empty(count) if rows else reliability.new_zeros(count)
    if rows:
        space = _door.workspace(_C.reliability_fusion_workspace(rows, dim, modalities, stages, norm), reliability)
        _door.kernels[reliability.device.type].reliability_fusion_backward(
            *arguments, 0, address(stats), address(grad_fused), address(grad_weights), address(grad_confidence),
            tuple([g.data_ptr() for g in grads]), address(grad_reliability),
            0 if stage is None else address(grad_stage), address(grad_params), address(space),
            *_door.placement(reliability),
        )  # fmt: skip
    del held
    return [*grads, grad_reliability, grad_stage, grad_params]


def _distribute(grads: list[Tensor], inputs: tuple[Any, ...], needs: Sequence[bool]) -> tuple[Any, ...]:
    """_backward's list -> gradients in the order (values, reliability, stage, ..., norm_bias, eps)."""
    values, _, stage, log_temperature, bias, sharpness, _, norm_weight, _ = inputs
    modalities, dim = len(values), values[0].shape[-1]
    *grad_values, grad_reliability, grad_stage, flat = grads
    stages = grad_reliability.shape[-1]
    norm_size = 0 if norm_weight is None else modalities * dim
    gate_size = modalities * stages
    sizes = [norm_size, norm_size, gate_size, gate_size, modalities]
    norm_w, norm_b, temperature, offset, sharp = flat.split(sizes)
    return (
        [g if need else None for g, need in zip(grad_values, needs)],
        grad_reliability,
        None if stage is None else grad_stage,
        None if log_temperature is None else temperature.reshape(modalities, stages),
        None if bias is None else offset.reshape(modalities, stages),
        None if sharpness is None else sharp,
        None,
        None if norm_weight is None else norm_w.reshape(modalities, dim),
        None if norm_weight is None else norm_b.reshape(modalities, dim),
        None,
    )


class _ReliabilityFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, *tensors: Any) -> Any:  # eps, the eight gating tensors, then the values
        gate, values = tensors[:8], tensors[8:]
        fused, weights, confidence, stats = _forward(values, *gate, eps)
        ctx.save_for_backward(stats, *tensors)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return fused, weights, confidence

    @staticmethod
    def backward(ctx: Any, grad_fused: Tensor | None, grad_weights: Tensor | None, grad_conf: Tensor | None) -> Any:
        stats, *tensors = ctx.saved_tensors
        gate, values = tensors[:8], tensors[8:]
        needs = ctx.needs_input_grad[9:]
        run = _door.backward_door(_backward, _backward_op, grad_fused, grad_weights, grad_conf)
        grads = run(grad_fused, grad_weights, grad_conf, values, *gate, ctx.eps, stats, needs)
        grad_values, *grad_gate = _distribute(grads, (values, *gate), needs)
        return None, *grad_gate[:-1], *grad_values


# ------------------------------------------------------------------------------------------------- torch.library
def _fake(values: Sequence[Tensor], reliability: Tensor, *rest: Any) -> Any:
    lead = reliability.shape[:-1]
    norm_weight = rest[5]
    return (
        values[0].new_empty(values[0].shape),
        reliability.new_empty(lead),
        reliability.new_empty(lead),
        reliability.new_empty((*lead, 2) if norm_weight is not None else 0),
    )


def _fake_backward(
    grad_fused: Any, grad_weights: Any, grad_confidence: Any, values: Sequence[Tensor], reliability: Tensor,
    stage: Tensor | None, log_temperature: Any, bias: Any, sharpness: Any, present: Any, norm_weight: Tensor | None,
    norm_bias: Any, eps: float, stats: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    modalities, stages = reliability.shape[-2:]
    affine = 0 if norm_weight is None else 2 * modalities * values[0].shape[-1]
    return [
        *[v.new_empty(v.shape) if need else v.new_empty(0) for v, need in zip(values, needs)],
        reliability.new_empty(reliability.shape),
        reliability.new_empty(0) if stage is None else reliability.new_empty(stage.shape),
        reliability.new_empty(affine + modalities * (2 * stages + 1)),
    ]


_GATE_SCHEMA = "Tensor reliability, " + ", ".join(f"Tensor? {name}" for name in _GATE[1:]) + ", float eps"

_backward_op = _door.register(
    "reliability_fusion_backward(Tensor? grad_fused, Tensor? grad_weights, Tensor? grad_confidence, Tensor[] values, "
    f"{_GATE_SCHEMA}, Tensor stats, bool[] needs) -> Tensor[]",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    values, *gate, eps = inputs
    ctx.save_for_backward(output[3], *gate, *values)
    ctx.eps = eps


def _autograd(
    ctx: Any, grad_fused: Tensor | None, grad_weights: Tensor | None, grad_conf: Tensor | None, _: Tensor | None
) -> Any:
    stats, *tensors = ctx.saved_tensors
    gate, values = tensors[:8], tensors[8:]
    needs = [v.requires_grad for v in values]
    grads = _backward_op(grad_fused, grad_weights, grad_conf, values, *gate, ctx.eps, stats, needs)
    return _distribute(grads, (values, *gate), needs)


_op = _door.register(
    f"reliability_fusion(Tensor[] values, {_GATE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)


def reliability_fusion(values: Sequence[Tensor], *gate: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`gate`: the eight tensors of _GATE, then eps."""
    *tensors, eps = gate
    if _door.fast(*tensors, *values):
        if _door.needs_grad(*tensors, *values):
            return _ReliabilityFusion.apply(eps, *tensors, *values)
        return _forward(values, *gate, want_stats=False)[:3]
    return _op(list(values), *gate)[:3]
