"""What is timed: each op and the model, a usual problem and what is changed in it, and a check that an answer is right.

A problem is a dict of sizes. `Op.make(problem, implementation, dtype)` gives a run of it: a call without arguments that returns
the outputs and, with `backward`, the gradients of all that has some. Inputs are random numbers from fixed seeds, alike for every
implementation. "sage_ext" is the kernels; "eager" the same formula in plain PyTorch (`sage_ext.reference`; the leaky average: the
einsum that it replaced); "compile" is torch.compile of that, with static shapes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sage_ext import functional, reference
from sage_ext._ops import _door
from sage_ext.models import SAGE

Problem = dict[str, Any]
Run = Callable[[], tuple[Tensor, ...]]
# Of the largest entry of what the reference says in float64.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}


@functools.cache
def _random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _present(*shape: int) -> Tensor:
    """Nine in ten."""
    return _random(*shape, seed=98, dtype=torch.float32) > -1.28


def _call(function: Callable[..., Tensor], leaves: list[Tensor], backward: bool) -> Run:
    """A run of `function(*leaves)`, forward alone or with the gradients of all leaves."""
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*leaves),)

        return forward
    leaves = [x.clone().requires_grad_() for x in leaves]
    with torch.no_grad():
        out = function(*leaves)
    weights = _random(*out.shape, seed=99, dtype=out.dtype)

    def both() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, weights, materialize_grads=True))

    return both


def _fusion(p: Problem, op: Callable, dtype: torch.dtype) -> Run:
    b, t, m, d, s = p["batch"], p["frames"], p["modalities"], p["dim"], p["stages"]
    given = getattr(torch, p["dtype"])  # what all implementations, the float64 one too, are given the values in
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = [_random(b, t, d, seed=i, dtype=given).to(dtype) for i in range(m)]
    gate = [
        _random(b, t, m, s, seed=20, dtype=wide),
        torch.softmax(_random(b, t, s, seed=21, dtype=wide), -1),
        0.1 * _random(m, s, seed=22, dtype=wide),
        _random(m, s, seed=23, dtype=wide),
        _random(m, seed=24, dtype=wide).abs() + 0.5,
        _random(m, d, seed=25, dtype=wide).abs() + 0.5,
        _random(m, d, seed=26, dtype=wide),
    ]
    present = _present(b, t, m)

    def fused(*leaves: Tensor) -> Tensor:
        r, stage, temperature, bias, sharpness, weight, shift = leaves[m:]
        return op(leaves[:m], r, stage, log_temperature=temperature, bias=bias, sharpness=sharpness, present=present,
                  norm_weight=weight, norm_bias=shift)[0]  # fmt: skip

    return _call(fused, [*values, *gate], p["backward"])


def _stage_filter(p: Problem, op: Callable, dtype: torch.dtype) -> Run:
    b, t, s = p["batch"], p["frames"], p["stages"]
    leaves = [_random(b, t, s, seed=0, dtype=dtype), _random(s, s, seed=1, dtype=dtype)]
    return _call(lambda emission, transition: op(emission, transition)[0], leaves, p["backward"])


def _pair(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (p["batch"], p["frames"], 2)
    target = _random(*shape, seed=0, dtype=dtype)
    return 0.7 * target + 0.5 * _random(*shape, seed=1, dtype=dtype), target


def _ccc(p: Problem, op: Callable, dtype: torch.dtype) -> Run:
    pred, target = _pair(p, dtype)
    mask = _present(p["batch"], p["frames"]) if p["mask"] else None
    return _call(lambda x: op(x, target, mask), [pred], p["backward"])


def _torchmetrics_ccc(x: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    from torchmetrics.functional import concordance_corrcoef

    if mask is not None:
        return concordance_corrcoef(x[mask], target[mask])
    return concordance_corrcoef(x.flatten(0, 1), target.flatten(0, 1))


def _temporal_ccc(p: Problem, op: Callable, dtype: torch.dtype) -> Run:
    pred, target = _pair(p, dtype)
    return _call(lambda x: op(x, target, window=p["window"])[0], [pred], p["backward"])


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
    return functional.leaky_average(x, precision, halflife, prior)[0]


def _leaky_average(p: Problem, op: Callable, dtype: torch.dtype) -> Run:
    """SAGE's memory in training, of three tracks: the fused frames and two modalities alone."""
    b, t, d = p["batch"], p["frames"], p["dim"]
    halflife = torch.tensor([8.0, 32.0, 128.0], dtype=dtype)
    leaves = [
        _random(b, t, d, seed=0, dtype=dtype),
        _random(b, t, seed=1, dtype=dtype).abs(),
        torch.ones(3, dtype=dtype),
    ]
    return _call(lambda x, precision, prior: op(x, precision, halflife, prior), leaves, p["backward"])


def with_kernels(call: Callable) -> Callable:
    return call


def without_kernels(call: Callable) -> Callable:
    """`call` with every op of ours in plain PyTorch."""

    def slow(*given: Any) -> Any:
        taken = _door.kernels.pop("cpu")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "no kernels in this build"
                return call(*given)
        finally:
            _door.kernels["cpu"] = taken

    return slow


def _sage(p: Problem, wrap: Callable, dtype: torch.dtype) -> Run:
    """The reference model: two modalities, all else as it comes. Gradients of all its parameters."""
    b, t = p["batch"], p["frames"]
    torch.manual_seed(0)
    model = SAGE({"audio": 128, "visual": 256}, dim=p["dim"], stages=p["stages"], dropout=0.0).to(dtype)
    features = {
        name: _random(b, t, d, seed=i, dtype=dtype) for i, (name, d) in enumerate(zip(model.names, model.in_dims))
    }
    model.fit_statistics([{"features": features}])
    model.eval()
    names, leaves = zip(*model.named_parameters())
    call = wrap(lambda *given: torch.func.functional_call(model, dict(zip(names, given)), (features,)).prediction)
    return _call(call, list(leaves), p["backward"])


@dataclass(frozen=True)
class Op:
    make: Callable[[Problem, Callable, torch.dtype], Run]
    ours: Callable
    eager: Callable
    usual: Problem
    changes: dict[str, list[Any]] = field(default_factory=dict)  # one at a time
    others: list[Problem] = field(default_factory=list)  # several at once
    targets: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # problem's name -> opponent -> least ratio; what README.md shows
    compiled: bool = True  # False: torch.compile would unroll the loop over frames
    moved: Callable[[Problem], int] | None = None  # bytes read once and written once
    truth: Callable | None = None  # what is right, if not `eager`; in float64
    torchmetrics: Callable | None = None

    def problems(self) -> Iterator[tuple[str, Problem]]:
        """(what is changed, the problem): first the usual one."""
        yield "usual", self.usual
        for change in [{name: value} for name, values in self.changes.items() for value in values] + self.others:
            yield ", ".join(f"{name} {value}" for name, value in change.items()), {**self.usual, **change}

    def runs(self, problem: Problem, compiled: bool) -> tuple[dict[str, Run], dict[str, float]]:
        """Each implementation, and how far it is off (`error`). ValueError where ours is wrong."""
        dtype = getattr(torch, problem["dtype"])
        truth = self.make(problem, self.truth or self.eager, torch.float64)()
        ways = {"sage_ext": self.ours, "eager": self.eager}
        if compiled and self.compiled:
            torch._dynamo.reset()
            ways["compile"] = torch.compile(self.eager, dynamic=False)
        if self.torchmetrics is not None:
            ways["torchmetrics"] = self.torchmetrics
        runs = {name: self.make(problem, way, dtype) for name, way in ways.items()}
        errors = {name: error(run(), truth) for name, run in runs.items()}
        if not errors["sage_ext"] <= TOLERANCE[dtype]:
            raise ValueError(
                f"{problem}: sage_ext is off by {errors['sage_ext']:.2g}, expected {TOLERANCE[dtype]:g} at most"
            )
        return runs, errors


def error(made: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest difference of the output and of each gradient, in parts of the largest entry of what it should be. A gradient
    smaller than 1e-4 of the largest of all is a sum of terms that cancel: its error is in parts of that."""
    if [x.shape for x in made] != [x.shape for x in truth]:
        return float("inf")
    sizes = [float(x.detach().abs().max()) for x in truth]
    least = 1e-4 * max(sizes[1:], default=0)
    scales = [sizes[0], *(max(size, least) for size in sizes[1:])]
    return max(
        float((x.detach().double() - y.detach()).abs().max()) / scale for x, y, scale in zip(made, truth, scales)
    )


def _rows(p: Problem) -> int:
    return p["batch"] * p["frames"]


USUAL: Problem = {"batch": 8, "frames": 300, "dtype": "float32", "threads": 2, "backward": True}
OPS = {
    "reliability_fusion": Op(
        _fusion, functional.reliability_fusion, reference.reliability_fusion,
        {**USUAL, "modalities": 2, "dim": 256, "stages": 4},
        {"backward": [False], "frames": [1, 30, 3000], "dim": [32, 128, 1024], "modalities": [1, 4, 8], "stages": [1, 16],
         "dtype": ["bfloat16"], "threads": [1]},
        targets={"usual": {"eager": 8, "compile": 3}, "backward False": {"eager": 10, "compile": 3.5}},
        moved=lambda p: _rows(p) * p["dim"] * getattr(torch, p["dtype"]).itemsize
        * (3 * p["modalities"] + 2 if p["backward"] else p["modalities"] + 1),
    ),
    "stage_filter": Op(
        _stage_filter, functional.stage_filter, reference.stage_filter, {**USUAL, "stages": 4},
        {"backward": [False], "frames": [30, 1000], "stages": [2, 8, 16], "threads": [1]},
        targets={"usual": {"eager": 100}}, compiled=False,
    ),
    "ccc": Op(
        _ccc, functional.ccc, reference.ccc, {**USUAL, "mask": False},
        {"backward": [False], "frames": [30, 3000, 100_000], "threads": [1]},
        [{"batch": 64, "frames": 3000, "mask": True}],
        targets={"usual": {"eager": 4, "compile": 2.5}, "batch 64, frames 3000, mask True": {"eager": 8, "compile": 8}},
        moved=lambda p: 8 * _rows(p) * (5 if p["backward"] else 2), torchmetrics=_torchmetrics_ccc,
    ),
    "temporal_ccc": Op(
        _temporal_ccc, functional.temporal_ccc, reference.temporal_ccc, {**USUAL, "window": 75},
        {"backward": [False], "frames": [150], "window": [10, 150], "threads": [1]}, [{"frames": 3000, "window": 300}],
        targets={"frames 3000, window 300": {"eager": 50}}, compiled=False,
    ),
    "leaky_average": Op(
        _leaky_average, fused_leaky_average, einsum_leaky_average, {**USUAL, "batch": 24, "dim": 128},
        {"backward": [False], "frames": [30, 1000], "dim": [32, 512], "threads": [1]},
        targets={"usual": {"eager": 3, "compile": 2}}, truth=lambda *given: reference.leaky_average(*given)[0],
    ),
    "SAGE": Op(
        _sage, with_kernels, without_kernels, {**USUAL, "dim": 128, "stages": 4},
        {"backward": [False], "frames": [30, 1000], "batch": [1, 32], "dim": [64, 256], "stages": [1], "threads": [1]},
        targets={"usual": {}}, compiled=False,
    ),
}  # fmt: skip
