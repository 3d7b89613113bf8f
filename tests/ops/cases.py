"""Representative calls of every op: seeded inputs, the call, and the comparison with the float64 reference.

A case is called as `case.call(functions, inputs)`, with `sage_ext.functional` or `sage_ext.reference` for `functions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sage_ext import functional, reference

# A mask or `present` of these tests is True in this share of places.
SHARE = 0.75


class Random:
    """Seeded random tensors, the same numbers on every device and (up to rounding) in every dtype."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> None:
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(seed), dtype, device

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def simplex(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return torch.softmax(2 * x, -1).to(self.device, self.dtype)

    def mask(self, *shape: int, share: float = SHARE) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)


# --------------------------------------------------------------------------------------------------- random inputs
def filter_inputs(r: Random, batch=3, frames=7, stages=4, initial: str | None = "row", mask=True, scale=2.0) -> dict:
    shape = {"row": (batch, stages), "shared": (stages,)}
    return {
        "emission": scale * r.normal(batch, frames, stages),
        "transition": r.normal(stages, stages) + 2 * torch.eye(stages, dtype=r.dtype, device=r.device),
        "initial": r.normal(*shape[initial]) if initial else None,
        "mask": r.mask(batch, frames) if mask else None,
    }


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fusion_inputs(
    r: Random, lead=(2, 5), modalities=3, dim=6, stages=4, *, stage=True, calibrated=True, sharpness: str | None = "each",
    present=True, norm=True, eps=1e-5,
) -> dict:  # fmt: skip
    values = [r.normal(*lead, dim) for _ in range(modalities)]
    g = Random(0, gate_dtype(r.dtype), r.device)
    g.generator = r.generator
    m, s = modalities, stages
    return {
        "values": values,
        "reliability": 2 * g.normal(*lead, m, s),
        "stage": g.simplex(*lead, s) if stage else None,
        "log_temperature": 0.3 * g.normal(m, s) if calibrated else None,
        "bias": 0.5 * g.normal(m, s) if calibrated else None,
        "sharpness": {"each": lambda: 0.5 + g.uniform(m), "one": lambda: 0.5 + g.uniform(), None: lambda: None}[
            sharpness
        ](),
        "present": r.mask(*lead, m) if present else None,
        "norm_weight": 1 + 0.3 * g.normal(m, dim) if norm else None,
        "norm_bias": 0.3 * g.normal(m, dim) if norm else None,
        "eps": eps,
    }


def pair_inputs(r: Random, *shape: int, mask: str | None = None) -> dict:
    """Correlated pred and target, each channel with its own offset."""
    target = r.normal(*shape)
    pred = 0.7 * target + 0.5 * r.normal(*shape) + 0.3
    kinds = {None: lambda: None, "frame": lambda: r.mask(*shape[:-1]), "element": lambda: r.mask(*shape)}
    return {"pred": pred, "target": target, "mask": kinds[mask]()}


def moments_inputs(r: Random, *shape: int) -> Tensor:
    """Well-formed moments (*shape, 6), float64."""
    x = Random(0, torch.float64, r.device)
    x.generator = r.generator
    p, t = x.normal(*shape, 5), x.normal(*shape, 5)
    dp, dt = p - p.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    sums = [(a * b).sum(-1) for a, b in ((dp, dp), (dt, dt), (dp, dt))]
    return torch.stack([torch.full_like(p[..., 0], 5.0), p.mean(-1), t.mean(-1), *sums], -1)


def leaky_inputs(r: Random, batch=2, frames=7, dim=5, averages=3, *, state=False, unread=False) -> dict:
    """Precisions of 0.1 to 2.1, or, where `unread`, of 0 in a quarter of the frames."""
    g = Random(0, gate_dtype(r.dtype), r.device)
    g.generator = r.generator
    x, precision = r.normal(batch, frames, dim), 0.1 + 2 * g.uniform(batch, frames)
    if unread:
        precision = precision * r.mask(batch, frames)
    return {
        "x": x,
        "precision": precision,
        "halflife": 0.5 + 9 * g.uniform(averages),
        "prior": 0.1 + g.uniform(averages),
        "state": 0.2 + g.uniform(batch, averages, dim + 2) if state else None,
    }


# ----------------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[Random], dict]
    constant: tuple[str, ...] = ()  # floating-point arguments without a gradient
    kwargs: dict = field(default_factory=dict)

    def call(self, functions: Any, inputs: dict) -> tuple[Tensor, ...]:
        inputs = dict(inputs)
        if self.op == "reliability_fusion":
            positional = [inputs.pop("values"), inputs.pop("reliability"), inputs.pop("stage")]
        else:
            positional = []
        out = getattr(functions, self.op)(*positional, **inputs, **self.kwargs)
        return out if isinstance(out, tuple) else (out,)

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> dict:
        return self.make(Random(seed, dtype, device))

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _temporal(name: str, mask: str | None, chunked: bool, **mode: Any) -> Case:
    def make(r: Random) -> dict:
        inputs = pair_inputs(r, 3, 9, 2, mask=mask)
        if chunked:
            earlier = pair_inputs(r, 3, 6, 2, mask=mask)
            inputs["state"] = reference.temporal_ccc(**earlier, **mode)[1]
        return inputs

    return Case("temporal_ccc", name, make, constant=("state",), kwargs=mode)


def _leaky(name: str, *, causal=True, relative=False, constant: tuple[str, ...] = (), **shape: Any) -> Case:
    return Case(
        "leaky_average", name, lambda r: leaky_inputs(r, **shape), ("halflife", *constant),
        {"causal": causal, "relative": relative},
    )  # fmt: skip


CASES = [
    Case("stage_filter", "plain", lambda r: filter_inputs(r, initial=None, mask=False)),
    Case("stage_filter", "shared", lambda r: filter_inputs(r, initial="shared")),
    Case("stage_filter", "row", lambda r: filter_inputs(r, initial="row")),
    Case("stage_filter", "S1", lambda r: filter_inputs(r, stages=1)),
    Case("stage_filter", "S16", lambda r: filter_inputs(r, batch=2, frames=4, stages=16)),
    Case("stage_filter", "T1", lambda r: filter_inputs(r, frames=1, stages=5)),
    Case(
        "reliability_fusion", "bare",
        lambda r: fusion_inputs(r, modalities=2, stage=False, calibrated=False, sharpness=None, present=False, norm=False),
    ),
    Case("reliability_fusion", "full", fusion_inputs),
    Case("reliability_fusion", "norm", lambda r: fusion_inputs(r, (9,), 2, 7, 3, present=False, sharpness="one")),
    Case("reliability_fusion", "plain", lambda r: fusion_inputs(r, (2, 1, 3), 4, 5, 2, norm=False, sharpness="one")),
    Case("reliability_fusion", "M1", lambda r: fusion_inputs(r, (4,), 1, 3, 1)),
    Case("reliability_fusion", "M8S16", lambda r: fusion_inputs(r, (3,), 8, 5, 16)),
    Case("reliability_fusion", "row", lambda r: fusion_inputs(r, (), 2, 9, 2, present=False)),
    Case("ccc", "batch", lambda r: pair_inputs(r, 3, 6, 2)),
    Case("ccc", "frame", lambda r: pair_inputs(r, 3, 6, 2, mask="frame")),
    Case("ccc", "element", lambda r: pair_inputs(r, 2, 5, 3, mask="element")),
    Case("ccc", "sequence", lambda r: pair_inputs(r, 3, 6, 2, mask="frame"), kwargs={"pool": "sequence"}),
    Case("ccc", "one", lambda r: pair_inputs(r, 11, 1, mask="frame")),
    Case("ccc", "one-sequence", lambda r: pair_inputs(r, 11, 2), kwargs={"pool": "sequence"}),
    Case("ccc_moments", "batch", lambda r: pair_inputs(r, 3, 6, 2, mask="element")),
    Case("ccc_moments", "sequence", lambda r: pair_inputs(r, 3, 6, 2, mask="frame"), kwargs={"pool": "sequence"}),
    Case("ccc_moments", "state", lambda r: {**pair_inputs(r, 3, 6, 2), "state": moments_inputs(r, 2)}),
    _temporal("cumulative", None, False),
    _temporal("cumulative-chunk", "frame", True),
    _temporal("window", None, False, window=4),
    _temporal("window-chunk", "element", True, window=4),
    _temporal("window-long", "frame", True, window=40),
    _temporal("halflife", None, False, halflife=2.5),
    _temporal("halflife-chunk", "frame", True, halflife=3),
    _temporal("halflife-element", "element", False, halflife=0.7),
    _leaky("plain"),
    _leaky("chunk", state=True),
    _leaky("both-ways", causal=False, state=True),
    _leaky("relative", relative=True, state=True),
    _leaky("relative-both-ways", causal=False, relative=True),
    # Gradients of a precision of 0 are 0 by definition, which gradcheck's differences do not see.
    _leaky("unread", constant=("precision",), unread=True, frames=11),
    _leaky("unread-both-ways", causal=False, relative=True, constant=("precision",), unread=True, frames=11),
    _leaky("R1T1", averages=1, frames=1),
    _leaky("R8", averages=8, dim=3, frames=5, state=True),
]  # fmt: skip
OPS = ["stage_filter", "reliability_fusion", "ccc", "ccc_moments", "temporal_ccc", "leaky_average"]
# Formulas over moments that are PyTorch by definition: no kernel of ours, but the same promises.
MOMENT_CASES = [
    Case("merge_moments", "both", lambda r: {"a": moments_inputs(r, 3), "b": moments_inputs(r, 3)}),
    Case("ccc_from_moments", "groups", lambda r: {"moments": moments_inputs(r, 2, 3)}),
]


def cases(*ops: str) -> list[Case]:
    return [c for c in CASES if not ops or c.op in ops]


# ------------------------------------------------------------------------------------------------ outputs and gradients
def leaves(inputs: dict, constant: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The differentiable tensors among a case's inputs, by name (values.0, values.1, ...)."""
    named = {}
    for name, x in inputs.items():
        for i, t in enumerate(x if isinstance(x, (list, tuple)) else [x]):
            if isinstance(t, Tensor) and t.is_floating_point() and name not in constant:
                named[f"{name}.{i}" if isinstance(x, (list, tuple)) else name] = t
    return named


def converted(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs with every floating-point tensor in `dtype`."""
    return pytree.tree_map(
        lambda x: x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


def fresh(inputs: Any, constant: tuple[str, ...] = (), requires_grad: bool = True) -> Any:
    """The same inputs as leaves that want a gradient, without a copy (strides are kept)."""
    out = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
    for x in leaves(out, constant).values():
        x.requires_grad_(requires_grad)
    return out


def cotangents(outputs: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    r = Random(seed)
    return [r.normal(*o.shape, dtype=torch.float64).to(o.device, o.dtype) for o in outputs]


def run(
    case: Case, functions: Any, inputs: dict, seed: int = 1, through: tuple[int, ...] | None = None,
    grads: list[Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor], list[Tensor]]:  # fmt: skip
    """Outputs, gradients of all differentiable inputs (zeros where autograd gives None), and the cotangents used.

    `through`: the outputs to differentiate, default all. `grads`: cotangents to use instead of seeded ones.
    """
    inputs = fresh(inputs, case.constant)
    outputs = case.call(functions, inputs)
    differentiable = [i for i, o in enumerate(outputs) if o.requires_grad and (through is None or i in through)]
    grads = cotangents(outputs, seed) if grads is None else [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    wanted = leaves(inputs, case.constant)
    if differentiable:
        got = torch.autograd.grad(
            [outputs[i] for i in differentiable], list(wanted.values()), [grads[i] for i in differentiable],
            allow_unused=True,
        )  # fmt: skip
    else:
        got = [None] * len(wanted)
    gradients = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), got)}
    return tuple(o.detach() for o in outputs), gradients, grads


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest magnitude of `expected`; 0 for empty tensors, inf for NaN or a wrong shape."""
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


# Relative to the largest magnitude of the tensor compared. A float32 kernel sums D (at most some hundred) numbers, T
# steps or N rows, and rounds a few times on the way: some tens of eps. float64 likewise, with room for the reference's
# own rounding. Where a sum cancels (a gradient of sharpness over few rows), float32 cannot do better than `SLACK` times
# the error of the float32 reference: that is then the bound.
TOLERANCE = {torch.float32: 64 * 2.0**-23, torch.float64: 4096 * 2.0**-52}
SLACK = 4


def compare(
    case: Case, inputs: dict, seed: int = 1, tolerance: float | None = None, through: tuple[int, ...] | None = None
) -> None:
    """Outputs and gradients of the op against the float64 reference on the same (already rounded) inputs."""
    outputs, gradients, grads = run(case, functional, inputs, seed, through)
    expected, expected_gradients, _ = run(case, reference, converted(inputs, torch.float64), seed, through, grads)
    dtype = gate_dtype(next(iter(leaves(inputs).values())).dtype)
    same_dtype = None
    for (name, actual), (_, wanted) in zip(
        named(outputs, gradients).items(), named(expected, expected_gradients).items(), strict=True
    ):
        e, limit = error(actual, wanted), tolerance or TOLERANCE[dtype]
        if e > limit and dtype == torch.float32 and tolerance is None:
            same_dtype = same_dtype or named(*run(case, reference, inputs, seed, through, grads)[:2])
            limit = SLACK * error(same_dtype[name], wanted)
        assert e <= limit, f"{case}: {name}: relative error {e:.3g} > {limit:.3g}"


def named(outputs: tuple[Tensor, ...], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**{f"output {i}": o for i, o in enumerate(outputs)}, **{f"grad {n}": g for n, g in gradients.items()}}
