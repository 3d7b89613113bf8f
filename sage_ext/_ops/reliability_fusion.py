"""reliability_fusion (docs/math.md, "Reliability-weighted fusion"): (values, gate, eps) -> (fused, weights, confidence,
stats), in this order from `functional` to the kernel. `values` are M tensors (*, D); the gate is unpacked where a schema or
an autograd.Function needs plain arguments.

`stats` (N, M, 2) holds each row's LayerNorm mean and 1/std for backward: with the inputs, all that is saved. Without a
LayerNorm it is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import _door
from ._door import address, dense


class Gate(NamedTuple):
    """What decides how the values are weighed, in one dtype but `present`, which alone has no gradient."""

    reliability: Tensor  # (*, M, S)
    stage: Tensor | None  # (*, S); None: uniform
    log_temperature: Tensor | None  # (M, S); None: 0
    bias: Tensor | None  # (M, S); None: 0
    sharpness: Tensor | None  # (M,); None: 1
    present: Tensor | None  # (*, M) bool; None: all
    norm_weight: Tensor | None  # (M, D); None, as norm_bias is then: no LayerNorm
    norm_bias: Tensor | None  # (M, D)


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


def _arguments(values: Sequence[Tensor], gate: Gate, eps: float) -> tuple[tuple[Any, ...], list[Any]]:
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
    dense_gate = [dense(t) for t in gate]
    first = rows_of[0]
    modalities, stages = gate.reliability.shape[-2:]
    arguments = (
        _door.DTYPE_CODES[first.dtype], gate.reliability.numel() // (modalities * stages), first.shape[-1], stages,
        tuple([x.data_ptr() for x in rows_of]), tuple(strides), *[address(t) for t in dense_gate], eps,
    )  # fmt: skip
    return arguments, [rows_of, dense_gate]


def _forward(
    values: Sequence[Tensor], gate: Gate, eps: float, want_stats: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments, held = _arguments(values, gate, eps)
    first, reliability = values[0], gate.reliability
    lead = reliability.shape[:-1]
    fused = torch.empty_like(first, memory_format=torch.contiguous_format)
    weights = reliability.new_empty(lead)
    confidence = torch.empty_like(weights)
    stats = reliability.new_empty((*lead, 2) if gate.norm_weight is not None else 0) if want_stats else None
    if weights.numel():
        _door.kernels[first.device.type].reliability_fusion_forward(
            *arguments, address(fused), address(weights), address(confidence), address(stats), *_door.placement(first)
        )
    del held
    return fused, weights, confidence, stats  # type: ignore[return-value]


def _empty_gradients(values: Sequence[Tensor], needs: Sequence[bool], together: bool) -> list[Tensor]:
    """A gradient a value, empty where it is not needed. Together they are one block: the C library's allocator, which keeps
    freed memory in proportion to the largest block that it has seen, then keeps theirs. For autograd they are no views, and
    none reaches into another; the block lives as long as one of them does. An operator's results may not share it."""
    if not together or len(values) == 1 or not all(needs) or values[0].dim() < 2:
        return [v.new_empty(v.shape if need else 0) for v, need in zip(values, needs)]
    lead, *rest = values[0].shape
    return list(torch.unsafe_chunk(values[0].new_empty((len(values) * lead, *rest)), len(values)))


def _backward(
    grad_fused: Tensor | None,
    grad_weights: Tensor | None,
    grad_confidence: Tensor | None,
    values: Sequence[Tensor],
    gate: Gate,
    eps: float,
    stats: Tensor,
    needs: Sequence[bool],
    together: bool = True,
) -> list[Tensor]:
    """Gradients of each value (empty where not needed), reliability, stage (empty without one), and flat parameters."""
    arguments, held = _arguments(values, gate, eps)
    reliability, stage = gate.reliability, gate.stage
    modalities, stages = reliability.shape[-2:]
    rows, dim, norm = reliability.numel() // (modalities * stages), values[0].shape[-1], gate.norm_weight is not None
    grad_fused, grad_weights, grad_confidence = dense(grad_fused), dense(grad_weights), dense(grad_confidence)
    stats = stats.contiguous()
    grads = _empty_gradients(values, needs, together)
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


def _distribute(grads: list[Tensor], values: Sequence[Tensor], gate: Gate, needs: Sequence[bool]) -> tuple[Any, ...]:
    """_backward's list -> (gradients of the values, those of the gate in its order), None where there is none."""
    modalities, dim = len(values), values[0].shape[-1]
    *grad_values, grad_reliability, grad_stage, flat = grads
    stages = grad_reliability.shape[-1]
    affine = 0 if gate.norm_weight is None else modalities * dim
    norm_weight, norm_bias, log_temperature, bias, sharpness = torch.split_with_sizes(
        flat, [affine, affine, modalities * stages, modalities * stages, modalities]
    )

    def shaped(given: Tensor | None, grad: Tensor) -> Tensor | None:
        return None if given is None else grad.view(given.shape)

    return [g if need else None for g, need in zip(grad_values, needs)], (
        grad_reliability,
        None if gate.stage is None else grad_stage,
        shaped(gate.log_temperature, log_temperature),
        shaped(gate.bias, bias),
        shaped(gate.sharpness, sharpness),
        None,
        shaped(gate.norm_weight, norm_weight),
        shaped(gate.norm_bias, norm_bias),
    )


def _split(tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Gate]:
    """(*values, *gate) -> values, gate."""
    size = len(Gate._fields)
    return tensors[:-size], Gate(*tensors[-size:])


class _ReliabilityFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:  # *values, *gate, eps
        *tensors, ctx.eps = arguments
        fused, weights, confidence, stats = _forward(*_split(tensors), ctx.eps)
        ctx.save_for_backward(*tensors, stats)
        ctx.set_materialize_grads(False)
        return fused, weights, confidence

    @staticmethod
    def backward(ctx: Any, grad_fused: Tensor | None, grad_weights: Tensor | None, grad_conf: Tensor | None) -> Any:
        *tensors, stats = ctx.saved_tensors
        values, gate = _split(tensors)
        needs = ctx.needs_input_grad[: len(values)]
        run = _door.backward_door(_backward, _registered_backward, grad_fused, grad_weights, grad_conf)
        grads = run(grad_fused, grad_weights, grad_conf, values, gate, ctx.eps, stats, needs)
        grad_values, grad_gate = _distribute(grads, values, gate, needs)
        return *grad_values, *grad_gate, None


# ------------------------------------------------------------------------------------------------- torch.library
# A schema has no tuples but lists of one type: the gate's tensors stand there one by one.
_GATE_SCHEMA = "Tensor reliability, " + ", ".join(f"Tensor? {name}" for name in Gate._fields[1:])


def _forward_impl(values: Sequence[Tensor], *rest: Any) -> Any:
    *gate, eps = rest
    return _forward(values, Gate(*gate), eps)


def _fake(values: Sequence[Tensor], *rest: Any) -> Any:
    *tensors, _ = rest
    gate = Gate(*tensors)
    lead = gate.reliability.shape[:-1]
    return (
        values[0].new_empty(values[0].shape),
        gate.reliability.new_empty(lead),
        gate.reliability.new_empty(lead),
        gate.reliability.new_empty((*lead, 2) if gate.norm_weight is not None else 0),
    )


def _backward_impl(
    grad_fused: Any, grad_weights: Any, grad_confidence: Any, values: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    *gate, eps, stats, needs = rest
    return _backward(grad_fused, grad_weights, grad_confidence, values, Gate(*gate), eps, stats, needs, together=False)


def _fake_backward(
    grad_fused: Any, grad_weights: Any, grad_confidence: Any, values: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    *tensors, _, _, needs = rest
    gate = Gate(*tensors)
    modalities, stages = gate.reliability.shape[-2:]
    affine = 0 if gate.norm_weight is None else 2 * modalities * values[0].shape[-1]
    return [
        *[v.new_empty(v.shape) if need else v.new_empty(0) for v, need in zip(values, needs)],
        gate.reliability.new_empty(gate.reliability.shape),
        gate.reliability.new_empty(0) if gate.stage is None else gate.reliability.new_empty(gate.stage.shape),
        gate.reliability.new_empty(affine + modalities * (2 * stages + 1)),
    ]


_backward_op = _door.register(
    "reliability_fusion_backward(Tensor? grad_fused, Tensor? grad_weights, Tensor? grad_confidence, Tensor[] values, "
    f"{_GATE_SCHEMA}, float eps, Tensor stats, bool[] needs) -> Tensor[]",
    _backward_impl,
    _fake_backward,
)


def _registered_backward(
    grad_fused: Any,
    grad_weights: Any,
    grad_confidence: Any,
    values: Any,
    gate: Gate,
    eps: float,
    stats: Any,
    needs: Any,
) -> list[Tensor]:
    """`_backward` through its registered operator."""
    return _backward_op(grad_fused, grad_weights, grad_confidence, values, *gate, eps, stats, needs)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    values, *gate, ctx.eps = inputs
    ctx.save_for_backward(*values, *gate, output[3])


def _autograd(
    ctx: Any, grad_fused: Tensor | None, grad_weights: Tensor | None, grad_conf: Tensor | None, _: Tensor | None
) -> Any:
    *tensors, stats = ctx.saved_tensors
    values, gate = _split(tensors)
    needs = [v.requires_grad for v in values]
    grads = _registered_backward(grad_fused, grad_weights, grad_conf, values, gate, ctx.eps, stats, needs)
    grad_values, grad_gate = _distribute(grads, values, gate, needs)
    return grad_values, *grad_gate, None


_op = _door.register(
    f"reliability_fusion(Tensor[] values, {_GATE_SCHEMA}, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _fake,
    _autograd,
    _setup_context,
)


def reliability_fusion(values: Sequence[Tensor], gate: Gate, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if not _door.fast(*values, *gate):
        return _op(list(values), *gate, eps)[:3]
    if _door.needs_grad(*values, *gate):
        return _ReliabilityFusion.apply(*values, *gate, eps)
    return _forward(values, gate, eps, want_stats=False)[:3]
