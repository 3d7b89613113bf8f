"""Fusion peers: other people's ways to fuse modalities, behind the interface of `ReliabilityFusion`.

`SAGE(..., fusion=name)` takes any name of `FUSIONS`: the encoders, the temporal blocks, the heads and the loss stay the
same, so that only the fusion differs. Each module follows the published definition given in its docstring; where that
leaves a choice (its output's width, what becomes of a missing modality) the docstring states ours. `parameter_table`
counts the parameters each one adds.

Common to all (see `PeerFusion`): a missing modality is zeros, whatever the tensor holds there; in a frame without any
modality the result is zero; weights are uniform over the present modalities and confidence is 1/2, unless the module
has weights of its own. Input sizes are written `d_m`, `d = sum of d_m`; features are (B, T, d_m), `T` frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import (
    SHARPENING_RATE,
    Features,
    FusionOutput,
    ReliabilityFusion,
    UniformFusion,
    blank_missing,
    check_flags,
    check_int,
    join_flags,
    named_dims,
    ordered_features,
)

__all__ = ["FUSIONS", "METHODS", "Method", "PeerFusion", "fusion_class", "fusion_names", "parameter_table", "register"]

Dims = Mapping[str, int] | Sequence[int]


class PeerFusion(nn.Module):
    """Base of the peers. A subclass builds its layers for `self.in_dims` and `self.dim`, and defines `fuse`.

    Args:
        in_dims: feature size a modality, 1 to 8 of them: a sequence, or a mapping name -> size.
        dim: size of the fused representation.
        length: frames of every call; only where `fixed_length` is True.

    Raises TypeError or ValueError naming the argument for anything malformed.
    """

    causal: ClassVar[bool] = True  # frame t depends on no later frame
    fixed_length: ClassVar[bool] = False  # every call has exactly `length` frames
    pairwise: ClassVar[bool] = False  # defined for two modalities only

    def __init__(self, in_dims: Dims, dim: int, *, length: int | None = None) -> None:
        super().__init__()
        self.names, self.in_dims = named_dims(in_dims)
        check_int("dim", dim, 1)
        if self.fixed_length:
            check_int("length", length, 1)
        elif length is not None:
            raise ValueError(f"length: {type(self).__name__} takes any number of frames, got {length}")
        if self.pairwise and len(self.in_dims) != 2:
            raise ValueError(f"in_dims: {type(self).__name__} fuses exactly 2 modalities, got {len(self.in_dims)}")
        self.dim, self.length = dim, length

    def extra_repr(self) -> str:
        dims = dict(zip(self.names, self.in_dims)) if self.names else self.in_dims
        return f"in_dims={dims}, dim={self.dim}" + (f", length={self.length}" if self.fixed_length else "")

    def fuse(self, x: list[Tensor], valid: Tensor) -> Tensor:
        """M tensors (B, T, d_m), zero where `valid` (B, T, M) is False -> fused (B, T, dim)."""
        raise NotImplementedError

    def fuse_chunk(
        self, x: list[Tensor], valid: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """`fuse` of a chunk of a sequence; a causal peer with memory overrides this one."""
        return self.fuse(x, valid), None

    def weigh(self, valid: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, M) weights to report: rows sum to 1 over the present modalities."""
        here = valid.to(dtype)
        return here / here.sum(-1, keepdim=True).clamp(min=1)

    def forward(
        self,
        features: Features,
        present: Tensor | None = None,
        mask: Tensor | None = None,
        state: tuple[Tensor, ...] | None = None,
        *,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> FusionOutput:
        """As `ReliabilityFusion.forward`, one stage; `typicality_inputs` are not used.

        ValueError for a number of frames other than `length` where that is fixed, and for a `state` given to a fusion
        that is not causal.
        """
        x = ordered_features(features, self.names, self.in_dims)
        lead, modalities = tuple(x[0].shape[:-1]), len(x)
        check_flags("present", present, (*lead, modalities), x[0].device)
        check_flags("mask", mask, lead, x[0].device)
        if state is not None and not self.causal:
            raise ValueError(f"state: {type(self).__name__} is not causal and cannot run in chunks")
        valid = join_flags(present, mask, modalities)
        x = blank_missing(x, valid)
        if valid is None:
            valid = torch.ones(*lead, modalities, dtype=torch.bool, device=x[0].device)
        single = len(lead) == 1
        if single:
            x, valid = [v.unsqueeze(1) for v in x], valid.unsqueeze(1)
        if self.fixed_length and x[0].shape[1] != self.length:
            raise ValueError(
                f"features: {type(self).__name__} was built for length={self.length} frames, got {x[0].shape[1]}; "
                "pad shorter sequences and mask the padding, cut longer ones into windows"
            )
        fused, state = self.fuse_chunk(x, valid, state)
        fused = torch.where(valid.any(-1, keepdim=True), fused, 0.0)
        dtype = torch.float64 if x[0].dtype == torch.float64 else torch.float32
        weights, confidence = self.weigh(valid, dtype), 0.5 * valid.to(dtype)
        if single:
            fused, weights, confidence = fused.squeeze(1), weights.squeeze(1), confidence.squeeze(1)
        return FusionOutput(fused, weights, confidence, fused.new_ones(*lead, 1, dtype=dtype), state)


# ------------------------------------------------------------------------------------------------------------ registry
@dataclass(frozen=True)
class Method:
    """A method of the comparison: a name, and what it changes in a `TrainConfig`."""

    name: str
    title: str  # for tables and plots
    overrides: Mapping[str, Any] = field(default_factory=dict)  # TrainConfig fields
    fixed_length: bool = False  # runs on windows of the training length only
    note: str = ""


FUSIONS: dict[str, type[PeerFusion]] = {}
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sage", "SAGE"),
        Method("uniform", "uniform weights", {"fusion": "uniform"}, note="SAGE's values, equal weights"),
        Method("sage-one-stage", "SAGE, one stage", {"stages": 1}),
        Method(
            "sage-no-calibration",
            "SAGE, no calibration loss",
            {"reliability_weight": 0.0},
            note="the weights learn from the prediction alone",
        ),
        Method(
            "sage-undetached",
            "SAGE, undetached evidence",
            {"fusion_options": {"detach_evidence": False}},
            note="the reliability path also shapes the encoders",
        ),
        Method(
            "sage-no-filter",
            "SAGE, no stage filter",
            {"fusion_options": {"filter_stages": False}},
            note="each frame's stage from its own evidence",
        ),
        Method(
            "sage-no-mask",
            "SAGE, no presence mask",
            {"use_present": False},
            note="missing inputs are the mean frame, and look present",
        ),
        Method("sage-no-norm", "SAGE, no norm", {"fusion_options": {"norm": False}}),
    )
}
Peer = TypeVar("Peer", bound=type[PeerFusion])


def register(name: str, title: str, note: str = "") -> Callable[[Peer], Peer]:
    """Class decorator: adds a `PeerFusion` to `FUSIONS` and `METHODS` under `name`. ValueError for a taken name."""

    def add(cls: Peer) -> Peer:
        if not (isinstance(cls, type) and issubclass(cls, PeerFusion)):
            raise TypeError(f"register: expected a subclass of PeerFusion, got {cls!r}")
        if name in fusion_names() or name in METHODS:
            raise ValueError(f"name: there is a method {name!r} already")
        FUSIONS[name] = cls
        METHODS[name] = Method(name, title, {"fusion": name}, cls.fixed_length, note)
        return cls

    return add


def fusion_names() -> tuple[str, ...]:
    """All that `SAGE(fusion=...)` takes."""
    return ("reliability", "uniform", *FUSIONS)


def fusion_class(name: str) -> type[ReliabilityFusion] | type[UniformFusion] | type[PeerFusion]:
    """The module behind a name of `fusion_names`. ValueError, with those names, for any other."""
    ours: dict[str, type[ReliabilityFusion] | type[UniformFusion]] = {
        "reliability": ReliabilityFusion,
        "uniform": UniformFusion,
    }
    if not isinstance(name, str) or name not in fusion_names():
        raise ValueError(f"fusion must be one of {', '.join(fusion_names())}, got {name!r}")
    return FUSIONS[name] if name in FUSIONS else ours[name]


def parameter_table(dim: int = 128, modalities: int = 2, *, length: int = 300) -> dict[str, int]:
    """{name of a fusion: its trainable parameters} for `modalities` features of size `dim`, as `SAGE` builds it;
    fusions that are not defined for so many modalities are left out. All else in the model is the same for all."""
    table = {}
    for name in fusion_names():
        cls = fusion_class(name)
        if issubclass(cls, PeerFusion) and cls.pairwise and modalities != 2:
            continue
        options: dict[str, Any] = {"length": length} if cls.fixed_length else {}
        table[name] = sum(p.numel() for p in cls([dim] * modalities, dim, **options).parameters())
    return table


# --------------------------------------------------------------------------------------- any length, frame by frame
@register("concat", "concatenation")
class ConcatFusion(PeerFusion):
    """`tanh(Linear(LeakyReLU(Linear([x_1; ...; x_M]))))`, both layers `dim` wide.

    A missing modality is zeros in the concatenation.
    """

    def __init__(self, in_dims: Dims, dim: int) -> None:
        super().__init__(in_dims, dim)
        self.first, self.second = nn.Linear(sum(self.in_dims), dim), nn.Linear(dim, dim)

    def fuse(self, x: list[Tensor], valid: Tensor) -> Tensor:
        return torch.tanh(self.second(F.leaky_relu(self.first(torch.cat(x, -1)))))


@register("late", "late fusion", "trunk and head run on each modality; the learnt convex sum is over their predictions")
class LateFusion(PeerFusion):
    """Learnt convex sum of unimodal predictions, `sum_m w_m prediction_m` with `w = softmax(logits)`.

    In `SAGE` the sum is over predictions: the blocks after the fusion and the head, the same weights for all
    modalities, run on each modality's own `values`, and `mix` adds up what they predict. Alone, the module's `fused` is
    the same sum of `values`, which equals it where all that follows is linear.

    The weights are renormalised over the present modalities. Where none is present `mix` takes them as learnt: what a
    modality's trunk remembers is all there is.
    """

    def __init__(self, in_dims: Dims, dim: int) -> None:
        super().__init__(in_dims, dim)
        self.value = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.logits = nn.Parameter(torch.zeros(len(self.in_dims)))

    def values(self, x: Sequence[Tensor], valid: Tensor | None) -> Tensor:
        """M tensors (B, T, d_m), `valid` (B, T, M) -> each modality's own representation (B, T, M, dim)."""
        return torch.stack([linear(v) for linear, v in zip(self.value, blank_missing(x, valid))], -2)

    def mix(self, predictions: Tensor, valid: Tensor | None) -> Tensor:
        """(B, T, M, C) predictions, `valid` (B, T, M) -> (B, T, C)."""
        flags = torch.ones_like(predictions[..., 0], dtype=torch.bool) if valid is None else valid
        flags = flags | ~flags.any(-1, keepdim=True)
        return (self.weigh(flags, predictions.dtype).unsqueeze(-1) * predictions).sum(-2)

    def weigh(self, valid: Tensor, dtype: torch.dtype) -> Tensor:
        # Alone among matrices this vector needs a larger rate, as the sharpness of ReliabilityFusion does.
        share = (SHARPENING_RATE * self.logits).softmax(0).to(dtype) * valid
        return share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)

    def fuse(self, x: list[Tensor], valid: Tensor) -> Tensor:
        values = self.values(x, valid)
        return (self.weigh(valid, values.dtype).unsqueeze(-1) * values).sum(-2)


@register("gmu", "gated multimodal unit")
class GatedMultimodalUnit(PeerFusion):
    """GMU (Arevalo 2017), two modalities: `z h_1 + (1 - z) h_2`, `h_m = tanh(W_m x_m)`, `z = sigmoid(W_z [x_1; x_2])`,
    a gate a channel.

    Where one modality is missing the gate is fully on the other.
    """

    pairwise = True

    def __init__(self, in_dims: Dims, dim: int) -> None:
        super().__init__(in_dims, dim)
        self.value = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.gate = nn.Linear(sum(self.in_dims), dim)

    def fuse(self, x: list[Tensor], valid: Tensor) -> Tensor:
        first, second = (torch.tanh(linear(v)) for linear, v in zip(self.value, x))
        z = torch.sigmoid(self.gate(torch.cat(x, -1)))
        z = torch.where(valid[..., :1], torch.where(valid[..., 1:], z, 1.0), 0.0)
        return z * first + (1 - z) * second
