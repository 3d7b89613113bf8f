"""Every op and the streaming step on every backend of this machine against float64: `sage-ext info --test`.

The CPU kernels run in each instruction set that is built and that this machine has, and the CUDA kernels where they and a
GPU are there; forward and backward, in float32 and bfloat16, on random inputs whose sizes leave remainders in vectors
and reach several threads. `sage_ext.reference` is given the same, already rounded, numbers in float64. The error is relative to
the largest number of each tensor, and the largest of all outputs and gradients is shown.

The streaming step (`stream`) has a kernel of its own, for a whole model: what a session gives for a small `SAGE`, frame by frame,
is held against one call of the model in float64 on the whole sequences, with the matrices rounded as the session's are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _C, functional, reference
from ._ops import _door
from .models import SAGE

# Arithmetic is float32 at least; with bfloat16 inputs the outputs and gradients of that dtype are rounded to it, by 2^-9 of
# their own size. The largest errors of 60 seeds are 4.4e-6 and 6.2e-3.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
STREAM = "stream"
STREAM_LIMIT = 1e-4  # for both dtypes of the weights: all else is float32. The largest error of 60 seeds is 1.9e-6.


class Case(NamedTuple):
    """A call of an op: its tensors, those without a gradient, and the other arguments."""

    op: str
    tensors: dict[str, Any]
    constant: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Row(NamedTuple):
    """A line of the table. `error`: the largest relative one; NaN where the op raised, and `answer` says what."""

    op: str
    backend: str
    dtype: str
    error: float
    answer: str

    @property
    def ok(self) -> bool:
        return self.answer == "ok"


def cases(seed: int) -> list[Case]:
    """Random calls of every op, in float64 on the CPU: the same numbers for all backends and dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def flags(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.75

    def pair(*shape: int) -> dict[str, Any]:
        target = normal(*shape)
        return {"pred": 0.7 * target + 0.5 * normal(*shape) + 0.3, "target": target, "mask": flags(*shape)}

    batch, frames, dim, modalities, stages, averages = 21, 9, 37, 3, 4, 3
    fusion = {
        "values": [normal(batch, frames, dim) for _ in range(modalities)],
        "reliability": 2 * normal(batch, frames, modalities, stages),
        "stage": torch.softmax(2 * normal(batch, frames, stages), -1),
        "log_temperature": 0.3 * normal(modalities, stages),
        "bias": 0.5 * normal(modalities, stages),
        "sharpness": 0.5 + uniform(modalities),
        "present": flags(batch, frames, modalities),
        "norm_weight": 1 + 0.3 * normal(modalities, dim),
        "norm_bias": 0.3 * normal(modalities, dim),
    }
    filtered = {
        "emission": 2 * normal(batch, frames, stages),
        "transition": normal(stages, stages) + 2 * torch.eye(stages, dtype=torch.float64),
        "initial": normal(batch, stages),
        "mask": flags(batch, frames),
    }
    averaged = {
        "x": normal(batch, frames, dim),
        "precision": 0.1 + 2 * uniform(batch, frames),
        "halflife": 0.5 + 9 * uniform(averages),
        "prior": 0.1 + uniform(averages),
        "state": 0.2 + uniform(batch, averages, dim + 2),
    }
    return [
        Case("stage_filter", filtered),
        Case("reliability_fusion", fusion),
        Case("ccc", pair(5, 3500, 2)),
        Case("ccc", pair(batch, frames, 2), options={"pool": "sequence"}),
        Case("ccc_moments", pair(batch, frames, 2)),
        *(Case("temporal_ccc", pair(batch, 50, 2), options=mode) for mode in ({}, {"window": 7}, {"halflife": 4.5})),
        *(
            Case("leaky_average", averaged, ("halflife",), {"causal": causal, "relative": relative})
            for causal, relative in ((True, False), (False, True))
        ),
    ]


@contextmanager
def _instruction_set(name: str | None) -> Iterator[None]:
    before = _C.isa()
    try:
        if name is not None:
            _C.set_isa(name)
        yield
    finally:
        _C.set_isa(before)


def backends() -> list[tuple[str, str, str | None]]:
    """Name, device and CPU instruction set of each backend that is there."""
    found: list[tuple[str, str, str | None]] = [
        (f"cpu {name}", "cpu", name) for name, built, here in _C.isa_variants() if built and here
    ]
    if hasattr(_C, "cuda") and torch.cuda.is_available():
        found.append((f"cuda {torch.cuda.get_device_name()}", "cuda", None))
    return found


def _run(functions: Any, case: Case, tensors: dict[str, Any], cotangents: list[Tensor] | None) -> Any:
    """Outputs, gradients (zeros where there is none), and the cotangents: given, or drawn."""
    leaves = []
    for name, value in tensors.items():
        for tensor in value if isinstance(value, list) else [value]:
            if tensor.is_floating_point() and name not in case.constant:
                leaves.append(tensor.requires_grad_())
    outputs = getattr(functions, case.op)(**tensors, **case.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    through = [(y, c.to(y.dtype)) for y, c in zip(outputs, cotangents) if y.requires_grad]
    found = torch.autograd.grad([y for y, _ in through], leaves, [c for _, c in through], allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]
    return [*outputs, *gradients], cotangents


def _placed(tensors: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Copies; floating-point tensors in `dtype`."""

    def place(x: Tensor) -> Tensor:
        return x.detach().to(device, dtype if x.is_floating_point() else x.dtype, copy=True)

    return pytree.tree_map(place, tensors)


def largest_error(case: Case, device: str, dtype: torch.dtype) -> float:
    """Of outputs and gradients, relative to the largest number of each; inf for a wrong shape, NaN or Inf."""
    tensors = _placed(case.tensors, device, dtype)
    found, cotangents = _run(functional, case, tensors, None)
    wanted, _ = _run(reference, case, _placed(tensors, "cpu", torch.float64), [c.double().cpu() for c in cotangents])
    return max(_difference(got, expected) for got, expected in zip(found, wanted, strict=True))


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest number that is expected; inf for a wrong shape, NaN or Inf."""
    if got.shape != expected.shape or not bool(got.isfinite().all()):
        return float("inf")
    difference = (got.detach().double().cpu() - expected).abs().max().item()
    scale = expected.abs().max().item()
    return difference / scale if scale else float("inf") if difference else 0.0


def streaming_error(seed: int, device: str, dtype: torch.dtype) -> float:
    """As `largest_error`, of what a session gives, its weights in `dtype`, for a model of random weights: streams with missing,
    broken and repeated frames, and quality that is unknown at times, which go on in another session halfway."""
    generator = torch.Generator().manual_seed(seed)
    rows, frames, dims, columns = 3, 40, {"a": 11, "b": 37}, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SAGE(dims, dim=12, stages=3, blocks=3, evidence_dim=9, quality_dims={"b": columns}).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    x = {name: 2 + torch.randn(rows, frames, d, generator=generator) for name, d in dims.items()}
    present = torch.rand(rows, frames, len(dims), generator=generator) < 0.8
    quality = torch.randn(rows, frames, columns, generator=generator)
    quality[torch.rand(quality.shape, generator=generator) < 0.2] = torch.nan
    model.fit_statistics([{"features": x, "present": present, "quality": {"b": quality}}])
    x["a"][0, 7, 3] = torch.nan
    x["b"][1, 12:28], present[1, 12:28] = x["b"][1, 12], True  # stands still: stuck after 8 repeats
    session = model.stream(rows, dtype, device)
    steps = []
    for t in range(frames):
        if t == frames // 2:  # from here on in a session of its own
            state, session = session.state_dict(), model.stream(rows, dtype, device)
            session.load_state_dict(state)
        out = session.step({k: v[:, t] for k, v in x.items()}, present[:, t], quality={"b": quality[:, t]})
        steps.append([y.clone() for y in out[:5]])
    if dtype != torch.float32:
        with torch.no_grad():
            matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
            for matrix in [*matrices, *(b for name, b in model.named_buffers() if ".components_" in name)]:
                matrix.copy_(matrix.to(dtype))
    with torch.no_grad():
        whole = model.double()({k: v.double() for k, v in x.items()}, present, quality={"b": quality.double()})
    fields = (whole.prediction, whole.unimodal, whole.weights, whole.confidence, whole.stage)
    return max(_difference(torch.stack(got, 1), expected) for got, expected in zip(zip(*steps), fields))


def run(seed: int = 0, say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Every op, and the streaming step, on every backend and dtype; `say` is given the table line by line as it comes."""
    width = max(len(name) for name, _, _ in backends())
    line = f"{{:<20}}{{:<{width + 2}}}{{:<10}}{{:>12}}  {{}}"
    say(line.format("op", "backend", "dtype", "error", "").rstrip())
    rows = []
    by_op: dict[str, list[Case]] = {}
    for case in cases(seed):
        by_op.setdefault(case.op, []).append(case)
    for name, device, isa in backends():
        for op in (*by_op, STREAM):
            for dtype, limit in LIMITS.items():
                limit = STREAM_LIMIT if op == STREAM else limit
                error, answer = float("nan"), "ok"
                try:
                    if device not in _door.kernels:  # the reference would be compared with itself
                        raise RuntimeError(f"no kernels for device '{device}'")
                    with _instruction_set(isa):
                        if op == STREAM:
                            error = streaming_error(seed, device, dtype)
                        else:
                            error = max(largest_error(case, device, dtype) for case in by_op[op])
                    if not error <= limit:
                        answer = f"FAILED (limit {limit:.2g})"
                except Exception as problem:
                    answer = f"FAILED ({type(problem).__name__}: {' '.join(str(problem).split())})"
                rows.append(Row(op, name, str(dtype).removeprefix("torch."), error, answer))
                say(line.format(*rows[-1][:3], f"{error:.2e}", answer))
    return rows
