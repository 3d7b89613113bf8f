"""The benchmark cases: one problem, several implementations of it. Shared by test_ops.py (pytest-benchmark) and report.py.

"kernel" is sage_ext, "eager" the plain-PyTorch reference, "compile" torch.compile of that reference (inductor, default
mode). Inputs are fresh random numbers from a fixed seed; every implementation gets the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sage_ext import functional as kernel
from sage_ext import reference

Run = Callable[[], object]


@dataclass
class Case:
    name: str
    make: Callable[[Callable], Run]  # an implementation of the op -> the call to time
    eager: Callable
    fused: Callable
    targets: dict[str, float] = field(default_factory=dict)  # opponent -> required ratio
    compiled: bool = True
    bytes: int = 0  # read once + written once, where a copy of the same size is the floor

    def implementations(self, compiled: bool = True) -> dict[str, Run]:
        runs = {"kernel": self.make(self.fused), "eager": self.make(self.eager)}
        if compiled and self.compiled:
            torch._dynamo.reset()
            runs["compile"] = self.make(torch.compile(self.eager, dynamic=False))
        return runs


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def _backward(outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], leaves: list[Tensor]) -> Run:
    return torch.autograd.grad(outputs, leaves, grads)


def _fusion(backward: bool) -> Callable[[Callable], Run]:
    def make(op: Callable) -> Run:
        g = torch.Generator().manual_seed(0)
        b, t, m, d, s = 8, 300, 2, 256, 4
        values = [torch.randn(b, t, d, generator=g) for _ in range(m)]
        gate = [
            torch.randn(b, t, m, s, generator=g),
            torch.softmax(torch.randn(b, t, s, generator=g), -1),
            torch.randn(m, s, generator=g) * 0.1,
            torch.randn(m, s, generator=g),
            torch.rand(m, generator=g) + 0.5,
            torch.rand(m, d, generator=g) + 0.5,
            torch.randn(m, d, generator=g),
        ]
        present = torch.rand(b, t, m, generator=g) > 0.1
        grad = torch.randn(b, t, d, generator=g)

        def call(values: list[Tensor], gate: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            r, p, lt, bias, sharp, w, beta = gate
            return op(
                values, r, p, log_temperature=lt, bias=bias, sharpness=sharp, present=present, norm_weight=w, norm_bias=beta
            )  # fmt: skip

        if not backward:

            def forward() -> object:
                with torch.no_grad():
                    return call(values, gate)

            return forward
        leaves = [_leaf(x) for x in (*values, *gate)]

        def step() -> object:
            fused, _, _ = call(leaves[:m], leaves[m:])
            return _backward((fused,), (grad,), leaves)

        return step

    return make


def _stage_filter(op: Callable) -> Run:
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(8, 300, 4, generator=g).requires_grad_(), torch.randn(4, 4, generator=g).requires_grad_()]
    grad = torch.randn(8, 300, 4, generator=g)
    return lambda: _backward((op(*leaves)[0],), (grad,), leaves)


def _ccc(b: int, t: int, masked: bool) -> Callable[[Callable], Run]:
    def make(op: Callable) -> Run:
        g = torch.Generator().manual_seed(2)
        target = torch.randn(b, t, 2, generator=g)
        pred = (0.7 * target + 0.5 * torch.randn(b, t, 2, generator=g)).requires_grad_()
        mask = torch.rand(b, t, generator=g) > 0.1 if masked else None
        grad = torch.ones(2)
        return lambda: _backward((op(pred, target, mask),), (grad,), [pred])

    return make


def _temporal(op: Callable) -> Run:
    g = torch.Generator().manual_seed(3)
    target = torch.randn(8, 3000, 2, generator=g)
    pred = (0.7 * target + 0.5 * torch.randn(8, 3000, 2, generator=g)).requires_grad_()
    grad = torch.randn(8, 3000, 2, generator=g)
    return lambda: _backward((op(pred, target, window=300)[0],), (grad,), [pred])


def einsum_leaky_average(x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor) -> Tensor:
    """The leaky average as products with triangular matrices of powers of the decay, 64 frames at a time: what a PyTorch
    user would write, and what the model had before the op."""
    chunk, frames = 64, x.shape[1]
    decay = 0.5 ** (1.0 / halflife)

    def powers(base: Tensor, exponent: Tensor) -> Tensor:
        base = base.view(-1, *[1] * exponent.dim())
        return torch.where(exponent >= 0, base ** exponent.clamp(min=0), 0.0)

    term = torch.cat([precision[..., None] * x, precision[..., None]], -1)
    chunks = frames // chunk + 1
    term = torch.nn.functional.pad(term, (0, 0, 0, chunks * chunk - frames)).view(len(x), chunks, chunk, -1)
    age, number = torch.arange(chunk, device=x.device), torch.arange(chunks, device=x.device)
    inside = torch.einsum("rts,bcsn->brctn", powers(decay, age[:, None] - age), term)
    between = powers(decay**chunk, number[:, None] - number - 1)
    before = torch.einsum("rcd,brdn->brcn", between, inside[:, :, :, -1])
    total = inside + powers(decay, age + 1)[:, None, :, None] * before.unsqueeze(3)
    total = total.flatten(2, 3)[:, :, :frames]
    return (total[..., :-1] / (total[..., -1:] + prior[:, None, None])).transpose(1, 2)


def fused_leaky_average(x: Tensor, precision: Tensor, halflife: Tensor, prior: Tensor) -> Tensor:
    return kernel.leaky_average(x, precision, halflife, prior)[0]


def _leaky(op: Callable) -> Run:
    """SAGE's memory in training: three tracks (the fused frames and two modalities alone) of 8 windows."""
    g = torch.Generator().manual_seed(4)
    x, precision = torch.randn(24, 300, 128, generator=g), 3 * torch.rand(24, 300, generator=g)
    halflife, leaves = torch.tensor([8.0, 32.0, 128.0]), [_leaf(x), _leaf(precision), _leaf(torch.ones(3))]
    grad = torch.randn(24, 300, 3, 128, generator=g)
    return lambda: _backward((op(leaves[0], leaves[1], halflife, leaves[2]),), (grad,), leaves)


_ROW = 4 * 8 * 300 * 256
CASES = [
    Case(
        "reliability_fusion 8x300, M 2, D 256, S 4, norm, present; forward",
        _fusion(False),
        reference.reliability_fusion,
        kernel.reliability_fusion,
        {"eager": 10, "compile": 3.5},
        bytes=3 * _ROW,
    ),
    Case(
        "the same, forward + backward",
        _fusion(True),
        reference.reliability_fusion,
        kernel.reliability_fusion,
        {"eager": 8, "compile": 3},
        bytes=8 * _ROW,
    ),
    Case(
        "stage_filter 8x300x4, forward + backward",
        _stage_filter,
        reference.stage_filter,
        kernel.stage_filter,
        {"eager": 100},
        compiled=False,
    ),
    Case(
        "ccc pooled 64x3000x2, mask, forward + backward",
        _ccc(64, 3000, True),
        reference.ccc,
        kernel.ccc,
        {"eager": 8, "compile": 8},
    ),
    Case(
        "ccc pooled 8x300x2, forward + backward",
        _ccc(8, 300, False),
        reference.ccc,
        kernel.ccc,
        {"eager": 4, "compile": 2.5},
    ),
    Case(
        "temporal_ccc 8x3000x2, window 300, forward + backward",
        _temporal,
        reference.temporal_ccc,
        kernel.temporal_ccc,
        {"eager": 50},
        compiled=False,
    ),
    Case(
        "leaky_average 24x300x128, 3 half-lives, forward + backward (eager: einsum)",
        _leaky,
        einsum_leaky_average,
        fused_leaky_average,
        {"eager": 3, "compile": 2},
    ),
]
