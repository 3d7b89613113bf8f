"""From a model to files that run without its Python code: `torch.export` programs, in our operators or in plain ones, and ONNX.

docs/deploy.md shows each way. A model's arguments and results have names there: those of its modalities, "present", and those
of the fields of its output.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from . import reference
from ._arguments import check_bool, check_int
from .extras import require
from .models import SAGE
from .nn import Fusion, ReliabilityFusion

__all__ = ["first_state", "onnx", "plain", "program"]

SAGE_FIELDS = ("prediction", "unimodal", "weights", "confidence", "stage")
# A dimension without a bound: PyTorch 2.13 then hands the loops over time a size where they expect a tensor (ONNX).
MAX_BATCH = 65536
# Sequences in what is exported: PyTorch takes two sizes that are equal there for one, such as the batch and the modalities.
EXAMPLES = 11
FUSION_FIELDS = ("fused", "weights", "confidence", "stage")


class _Estimator(nn.Module):
    """A model with named tensors in and out: (features, present, quality or None) -> a dict; `carries`: a state too."""

    def __init__(self, model: SAGE | Fusion, carries: Any = None) -> None:
        super().__init__()
        self.model, self.carries = model, carries

    def output(
        self,
        features: dict[str, Tensor],
        present: Tensor,
        quality: dict[str, Tensor] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> Any:
        """What the model says."""
        model = self.model
        inputs: Any = features if model.names else list(features.values())
        signs: Any = quality
        if quality is not None and not model.names:
            signs = [quality.get(name) for name in input_names(model)]
        more: Any = {"quality": signs}
        if isinstance(model, ReliabilityFusion) and model.typicality_dims is not None:
            more["typicality_inputs"] = inputs
        if state is not None:
            more["state"] = _unnamed(self.carries, state)
        return model(inputs, present, **more)

    def forward(
        self,
        features: dict[str, Tensor],
        present: Tensor,
        quality: dict[str, Tensor] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        out = self.output(features, present, quality, state)
        found = {name: getattr(out, name) for name in (SAGE_FIELDS if isinstance(self.model, SAGE) else FUSION_FIELDS)}
        if state is not None:
            found |= {f"next_{name}": x for name, x in _named(out.state)}
        return found


def _named(state: Any, name: str = "state") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state, each named by its place there: state_memory, state_history_0."""
    if isinstance(state, Tensor):
        yield name, state
    elif state is not None:
        for key, part in zip(getattr(state, "_fields", range(len(state))), state):
            yield from _named(part, f"{name}_{key}")


def _unnamed(like: Any, tensors: Mapping[str, Tensor], name: str = "state") -> Any:
    """The state of which `tensors` are the named tensors, built as `like` is."""
    if like is None or isinstance(like, Tensor):
        return None if like is None else tensors[name]
    fields = getattr(like, "_fields", None)
    parts = [_unnamed(part, tensors, f"{name}_{key}") for key, part in zip(fields or range(len(like)), like)]
    return type(like)(*parts) if fields else tuple(parts)


def first_state(model: SAGE | Fusion, batch: int = 1) -> dict[str, Tensor]:
    """What the streaming program of a model is given as `state` at the start of `batch` sequences: tensors (batch, ...).

    Names are those of the fields of `SAGEState` or of the fusion's state: "state_memory", "state_history_0". All are zeros, but
    for "state_foreign" of a model with `trust`, the log of its prior. ValueError for a model that carries nothing from one chunk
    to the next, since it is not causal or remembers nothing.
    """
    check_int("batch", batch, 1)
    state = {name: torch.zeros_like(x) for name, x in _named(_carried(model, batch))}
    if isinstance(model, SAGE) and model.foreign is not None:
        state["state_foreign"] += model.foreign.initial
    return state


def _carried(model: SAGE | Fusion, batch: int) -> Any:
    """A state of the model, after a frame of `batch` sequences."""
    _check_model(model)
    with torch.no_grad(), _evaluating(model):
        state = _Estimator(model).output(*example(model, batch, frames=1)).state
    if not dict(_named(state)):
        raise ValueError(
            "model: expected a causal one, which carries a state from one chunk to the next, got one that has none"
        )
    return state


def input_names(model: SAGE | Fusion) -> list[str]:
    """Of the modalities: their own, or modality_0, modality_1, ... where they have none."""
    return list(model.names or [f"modality_{m}" for m in range(len(model.in_dims))])


def example(model: SAGE | Fusion, batch: int = 2, frames: int = 37) -> tuple[Any, ...]:
    """Arguments of the exported program, of any numbers: features by name, present, and quality where the model takes some."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    names = input_names(model)
    features = {n: torch.randn(batch, frames, d, dtype=dtype, device=device) for n, d in zip(names, model.in_dims)}
    present = torch.ones(batch, frames, len(names), dtype=torch.bool, device=device)
    quality = {n: torch.randn(batch, frames, q, device=device) for n, q in zip(names, model.quality_dims) if q}
    return (features, present, quality) if quality else (features, present)


def program(model: SAGE | Fusion, max_frames: int = 4096, *, streaming: bool = False) -> ExportedProgram:
    """`torch.export` of a model as it predicts: sequences (B, T), B from 1 to 65536 and T from 1 to `max_frames`.

    The program takes `(features, present, quality)`: features and quality are dicts name -> (B, T, size), present is (B, T, M)
    bool; quality is None for a model without `quality_dims`. It returns a dict of tensors: of a `SAGE` prediction,
    unimodal, weights, confidence and stage; of a fusion fused, weights, confidence and stage. A modality without a name is
    called modality_0, modality_1 and so on. A SAGE of fixed `length` keeps it.

    `streaming`: for sequences that come in chunks, down to single frames. The program takes `(features, present, quality,
    state)`, a dict as `first_state` gives it, and returns each tensor of the state after the chunk too, as "next_" and its name.
    ValueError for a model that carries no state.

    Where it runs, `import sage_ext` comes first: our operators are in it (`plain` removes them). The model is not changed; it is
    exported as in evaluation mode.
    """
    _check_model(model)
    check_int("max_frames", max_frames, 2)
    check_bool("streaming", streaming)
    fixed = getattr(model, "length", None)
    frames = fixed or min(37, max_frames)
    axes: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if fixed is None:
        axes[1] = Dim("frames", min=1, max=max_frames)
    arguments = example(model, EXAMPLES, frames)
    shapes: tuple[Any, ...] = tuple(dict.fromkeys(a, axes) if isinstance(a, dict) else axes for a in arguments)
    if len(shapes) == 2:
        shapes, arguments = (*shapes, None), (*arguments, None)
    carries = None
    if streaming:
        carries = _carried(model, EXAMPLES)
        state = dict(_named(carries))
        shapes, arguments = (*shapes, {name: {0: axes[0]} for name in state}), (*arguments, state)
    with torch.no_grad(), _evaluating(model):
        return torch.export.export(_Estimator(model, carries), arguments, dynamic_shapes=shapes, strict=False)


def _check_model(model: object) -> None:
    if not isinstance(model, (SAGE, Fusion)):
        raise TypeError(f"model: expected a SAGE or a fusion of sage_ext.nn, got {type(model).__name__}")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def plain(exported: ExportedProgram) -> ExportedProgram:
    """The same program in PyTorch's own operators alone: what runs it need not know sage_ext.

    The recurrences become `scan`s over time of the formulas of `sage_ext.reference`. Slower than the kernels; equal to rounding.
    For inference: whole outputs, no gradients.
    """
    ours = torch.ops.sage_ext
    return exported.run_decompositions(
        {
            ours.stage_filter.default: _stage_filter,
            ours.leaky_average.default: _leaky_average,
            ours.reliability_fusion.default: _reliability_fusion,
            torch.ops.aten.cummax.default: _cummax,
        }
    )


def onnx(
    model: SAGE | Fusion, path: str | os.PathLike[str], max_frames: int = 4096, *, streaming: bool = False
) -> Path:
    """Write a model as one ONNX file, for ONNX Runtime and others; needs onnx and onnxscript.

    Inputs are the modalities by name, "present" and, for a model with `quality_dims`, quality_NAME; outputs are those of
    `program`. `streaming`: inputs too are the tensors of the state (B, ...), named as `first_state` names them, whose values
    a sequence starts from; an output next_NAME of each is its value after the chunk. Batch and time are free. Answers are the
    model's to 1e-5.
    """
    require("onnxscript", "onnx")
    exported = program(model, max_frames, streaming=streaming)
    arguments = example(model)
    quality = [f"quality_{name}" for name in (arguments[2] if len(arguments) > 2 else ())]
    state = list(first_state(model)) if streaming else []
    fields = SAGE_FIELDS if isinstance(model, SAGE) else FUSION_FIELDS
    # Its optimiser takes the additions of constants near 1e-8, which logarithms need, for additions of 0.
    written = torch.onnx.export(
        plain(exported), dynamo=True, optimize=False, verbose=False,
        input_names=[*input_names(model), "present", *quality, *state],
        output_names=[*fields, *(f"next_{name}" for name in state)],
    )  # fmt: skip
    assert written is not None
    path = Path(path)
    written.save(path, external_data=False)
    return path


# ------------------------------------------------------------------------------ the operators in terms of PyTorch's own
def _scan(step: Callable[..., Any], first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """state = step(state, row) for each of the rows: the last state, and all of them."""
    from torch._higher_order_ops.scan import scan

    def carried(state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        state = step(state, row)
        return state, state.clone()  # what is returned twice would be one tensor under two names

    return scan(carried, first, rows)


def _stage_filter(
    emission: Tensor, transition: Tensor, initial: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, stages = emission.shape
    log_a = F.log_softmax(transition.clamp(min=reference.IMPOSSIBLE), dim=1)
    first = emission.new_zeros(batch, stages) if initial is None else initial.expand(batch, stages)
    first = F.log_softmax(first.clamp(min=reference.IMPOSSIBLE), dim=-1)
    evidence = emission.clamp(min=reference.IMPOSSIBLE)
    evidence = evidence - evidence.amax(-1, keepdim=True)
    if mask is not None:
        evidence = torch.where(mask.unsqueeze(-1), evidence, 0.0)

    def step(belief: Tensor, now: Tensor) -> Tensor:
        return F.log_softmax(torch.logsumexp(belief[:, :, None] + log_a, dim=1) + now, dim=-1)

    final, beliefs = _scan(step, first, evidence.transpose(0, 1))
    beliefs = beliefs.transpose(0, 1)
    return beliefs.exp(), final, beliefs


def _leaky_sums(term: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    last, sums = _scan(lambda sums, now: decay[:, None] * sums + now.unsqueeze(1), state, term.transpose(0, 1))
    return sums.transpose(0, 1), last


def _leaky_average(
    x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor, state: Tensor | None, causal: bool, relative: bool
) -> tuple[Tensor, Tensor]:
    return reference._leaky_average(_leaky_sums, x, precision, halflife, prior, state, causal, relative)


def _reliability_fusion(values: list[Tensor], *gate: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reliability, stage, log_temperature, bias, sharpness, present, norm_weight, norm_bias, eps = gate
    fused = reference.reliability_fusion(
        values, reliability, stage, log_temperature=log_temperature, bias=bias, sharpness=sharpness, present=present,
        norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
    )  # fmt: skip
    return *fused, reliability.new_empty(0)  # the statistics are for backward


def _cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    def largest(rows: Tensor) -> Tensor:
        return _scan(torch.maximum, rows[0].clone(), rows)[1]

    x = x.movedim(dim, 0)
    values = largest(x)
    place = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (x.dim() - 1))
    indices = largest(torch.where((x == values) | x.isnan(), place, 0))
    return values.movedim(0, dim), indices.movedim(0, dim)
