"""Modules: the drop-in `ReliabilityFusion`, and the losses that train through concordance and calibrated confidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional

__all__ = [
    "CCCLoss",
    "FusionOutput",
    "FusionState",
    "ReliabilityFusion",
    "ReliabilityNLL",
    "TemporalCCCLoss",
    "UniformFusion",
]

Features = Mapping[str, Tensor] | Sequence[Tensor]

ENERGY_FLOOR = 1e-8  # added to a frame's mean square before the log: a dead modality has a finite, very low energy
# Adam moves every parameter by about the learning rate a step. A matrix has many that add up, the sharpness is alone:
# this factor lets it double within a hundred steps at 1e-3.
SHARPENING_RATE = 8.0
TYPICALITY_FEATURES = 4  # z of log energy, z of log energy of the difference, and their absolute values


class FusionState(NamedTuple):
    """What `ReliabilityFusion` carries from one chunk to the next. All tensors; a new sequence starts from zeros.

    With `B` sequences, `M` modalities, `S` stages and a typicality window of `W` frames:
    """

    belief: Tensor  # (B, S) log-belief over stages after the last frame (`initial` of the next stage_filter call)
    energy: Tensor  # (B, W-1, M, 2) log energy of frame and of difference in the last W-1 frames; 0 where not counted
    counted: Tensor  # (B, W-1, M, 2) 1 where `energy` holds a value, else 0 (modality or its predecessor missing)
    last: Tensor  # (B, sum of in_dims) the last frame's typicality inputs, modality after modality; 0 where missing


class FusionOutput(NamedTuple):
    """Result of `ReliabilityFusion`. `(*)` is `(B, T)`, or `(N,)` for two-dimensional features."""

    fused: Tensor  # (*, dim), dtype of the values
    weights: Tensor  # (*, M) sums to 1 over the present modalities; 0 where absent
    confidence: Tensor  # (*, M) calibrated reliability in [0, 1]; 0 where absent
    stage: Tensor  # (*, S) posterior of the interaction stage
    state: tuple[Tensor, ...] | None  # for the next chunk; a FusionState of ReliabilityFusion


# ------------------------------------------------------------------------------------------------- argument checks
def named_dims(in_dims: Mapping[str, int] | Sequence[int]) -> tuple[tuple[str, ...] | None, list[int]]:
    """Constructor's `in_dims` -> (names or None, sizes). Raises what the modules document."""
    if isinstance(in_dims, Mapping):
        names, sizes = tuple(in_dims), list(in_dims.values())
    elif isinstance(in_dims, Sequence) and not isinstance(in_dims, str):
        names, sizes = None, list(in_dims)
    else:
        raise TypeError(f"in_dims must be a sequence of int or a mapping name -> int, got {type(in_dims).__name__}")
    if names is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"in_dims: modality names must be str, got {names}")
    if not 1 <= len(sizes) <= 8:
        raise ValueError(f"in_dims: expected 1 to 8 modalities, got {len(sizes)}")
    for size in sizes:
        check_int("in_dims", size, 1)
    return names, sizes


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {f'>= {low}' if high is None else f'in [{low}, {high}]'}, got {value}")


def ordered_features(
    features: Features, names: tuple[str, ...] | None, dims: Sequence[int], what: str = "features"
) -> list[Tensor]:
    """The caller's features in modality order, checked: floating, one dtype and device, (B, T, d) or (N, d)."""
    if isinstance(features, Mapping):
        if names is None:
            raise TypeError(f"{what}: this module was built from a sequence of in_dims; pass a sequence, not a mapping")
        if set(features) != set(names):
            raise ValueError(f"{what}: expected the modalities {list(names)}, got {list(features)}")
        tensors = [features[name] for name in names]
    elif isinstance(features, Sequence):
        tensors = list(features)
    else:
        raise TypeError(f"{what} must be a sequence or a mapping of tensors, got {type(features).__name__}")
    if len(tensors) != len(dims):
        raise ValueError(f"{what}: expected {len(dims)} modalities, got {len(tensors)}")
    labels = names or tuple(str(m) for m in range(len(dims)))
    for label, dim, x in zip(labels, dims, tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{what}[{label}] must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{what}[{label}] must be floating point, got {x.dtype}")
        if x.dim() not in (2, 3) or x.shape[-1] != dim:
            raise ValueError(f"{what}[{label}] must be (B, T, {dim}) or (N, {dim}), got {tuple(x.shape)}")
        if x.shape[:-1] != tensors[0].shape[:-1]:
            raise ValueError(
                f"{what}[{label}]: leading shape {tuple(x.shape[:-1])} differs from that of {what}[{labels[0]}], "
                f"{tuple(tensors[0].shape[:-1])}"
            )
        if x.dtype != tensors[0].dtype:
            raise TypeError(f"{what}[{label}] is {x.dtype}, {what}[{labels[0]}] is {tensors[0].dtype}")
        if x.device != tensors[0].device:
            raise ValueError(f"{what}[{label}] is on {x.device}, {what}[{labels[0]}] is on {tensors[0].device}")
    if tensors[0].dim() == 3 and tensors[0].shape[1] == 0:
        raise ValueError(f"{what}: expected at least one frame, got {tuple(tensors[0].shape)}")
    return tensors


def check_flags(name: str, flags: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """`present` and `mask`: None, or a bool tensor of exactly this shape on this device."""
    if flags is None:
        return
    if not isinstance(flags, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(flags).__name__}")
    if flags.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {flags.dtype}")
    if tuple(flags.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(flags.shape)}")
    if flags.device != device:
        raise ValueError(f"{name} is on {flags.device}, the features are on {device}")


def join_flags(present: Tensor | None, mask: Tensor | None, modalities: int) -> Tensor | None:
    """(B, T, M) frames that count, of `present` (B, T, M) and `mask` (B, T); None where everything counts."""
    if mask is None:
        return present
    rows = mask.unsqueeze(-1)
    return rows.expand(*rows.shape[:-1], modalities) if present is None else present & rows


def blank_missing(tensors: Sequence[Tensor], valid: Tensor | None) -> list[Tensor]:
    """Zero the frames that do not count; NaN there reaches neither values nor gradients."""
    if valid is None:
        return list(tensors)
    return [torch.where(valid[..., m, None], x, 0.0) for m, x in enumerate(tensors)]


# ------------------------------------------------------------------------------------------------------ typicality
class Typicality(nn.Module):
    """How usual a modality's recent energy and motion are, against the training data.

    Per frame and modality: `log(mean(x^2) + 1e-8)` of the frame and of its difference from the frame before, each
    averaged over the last `window` frames in which it exists, z-scored with the buffers `mean` and `std`, compressed by
    asinh (a little noise is far from usual already, and must still look different from a lot), clamped to +-`clamp`,
    joined by their absolute values: (B, T, M, 4). A feature without a single frame in its window is 0 (neither usual
    nor unusual).

    The statistics follow the training batches by momentum (a plain average over the first `1/momentum` batches) until
    `fit` sets them from data, after which they stay.
    """

    mean: Tensor  # (M, 2)
    var: Tensor  # (M, 2)
    updates: Tensor  # (M, 2) batches seen by the momentum rule
    fitted: Tensor  # () bool

    def __init__(self, modalities: int, window: int = 16, clamp: float = 4.0, momentum: float = 0.01) -> None:
        super().__init__()
        self.modalities, self.window, self.clamp, self.momentum = modalities, window, clamp, momentum
        self.register_buffer("mean", torch.zeros(modalities, 2))
        self.register_buffer("var", torch.ones(modalities, 2))
        self.register_buffer("updates", torch.zeros(modalities, 2))
        self.register_buffer("fitted", torch.tensor(False))

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, window={self.window}, clamp={self.clamp}, momentum={self.momentum}"

    def averages(
        self, inputs: Sequence[Tensor], valid: Tensor | None, history: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Windowed log energies (B, T, M, 2), which of them exist, and (energy, counted, last) for the next chunk.

        `inputs`: M tensors (B, T, d), zero where `valid` (B, T, M) is False.
        """
        dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        x = [v.to(dtype) for v in inputs]
        batch, frames = x[0].shape[:2]
        carried = self.window - 1
        if history is None:
            zeros = x[0].new_zeros(batch, carried, self.modalities, 2)
            energy, counted, last = zeros, zeros, torch.cat([v.new_zeros(batch, v.shape[-1]) for v in x], -1)
        else:
            energy, counted, last = history
        here = x[0].new_ones(batch, frames, self.modalities) if valid is None else valid.to(dtype)
        before = torch.cat([counted[:, -1:, :, 0], here], 1)[:, :-1]  # the frame before: does it count?
        now = torch.stack([here, here * before], -1)  # (B, T, M, 2)

        logs = []
        for v, previous in zip(x, last.split([v.shape[-1] for v in x], -1)):
            step = v - torch.cat([previous.unsqueeze(1), v], 1)[:, :-1]
            square = torch.stack([v.square().mean(-1), step.square().mean(-1)], -1)  # (B, T, 2)
            logs.append((square + ENERGY_FLOOR).log())
        energy = torch.cat([energy, torch.stack(logs, 2) * now], 1)  # (B, W-1+T, M, 2)
        counted = torch.cat([counted, now], 1)
        # Each output sums its own window, so a frame's value does not depend on where the chunk began.
        joined = torch.stack([energy, counted], -1).flatten(2).transpose(1, 2)  # (B, M*2*2, W-1+T)
        pooled = F.avg_pool1d(joined, self.window, 1).transpose(1, 2).unflatten(2, (self.modalities, 2, 2))
        exists = pooled[..., 1] > 0
        average = pooled[..., 0] / torch.where(exists, pooled[..., 1], 1.0)
        # An absent frame has no typicality even if its window reaches back to frames that do.
        exists = exists & (here > 0).unsqueeze(-1)
        tail = (energy[:, frames:], counted[:, frames:], torch.cat([v[:, -1] for v in x], -1))
        return average, exists, tail

    def forward(
        self, inputs: Sequence[Tensor], valid: Tensor | None, history: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        average, exists, tail = self.averages(inputs, valid, history)
        if self.training:
            self._follow(average.detach(), exists)
        # Copies: a later forward may move the buffers before this one's backward has run.
        mean, std = self.mean.clone().to(average.dtype), self.var.clamp(min=1e-6).sqrt().to(average.dtype)
        z = torch.where(exists, (average - mean) / std, 0.0).asinh().clamp(-self.clamp, self.clamp)
        return torch.cat([z, z.abs()], -1), tail

    def _follow(self, average: Tensor, exists: Tensor) -> None:
        with torch.no_grad():
            count = exists.sum((0, 1)).to(average.dtype)  # (M, 2)
            share = 1.0 / count.clamp(min=1)
            mean = torch.where(exists, average, 0.0).sum((0, 1)) * share
            var = torch.where(exists, (average - mean).square(), 0.0).sum((0, 1)) * share
            moves = (count > 0) & ~self.fitted
            self.updates.add_(moves)
            rate = torch.where(moves, (1.0 / self.updates.clamp(min=1)).clamp(min=self.momentum), 0.0)
            gap = mean - self.mean
            self.var.lerp_((var + (1 - rate) * gap * gap).to(self.var.dtype), rate.to(self.var.dtype))
            self.mean.add_((rate * gap).to(self.mean.dtype))

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Sequence[Tensor], Tensor | None]]) -> None:
        """Set the statistics from (inputs, valid) batches, exactly, and stop following training batches."""
        total = torch.zeros(3, self.modalities, 2, dtype=torch.float64, device=self.mean.device)  # n, mean, M2
        for inputs, valid in batches:
            average, exists, _ = self.averages(inputs, valid, None)
            average = average.double()
            count = exists.sum((0, 1)).double()
            mean = torch.where(exists, average, 0.0).sum((0, 1)) / count.clamp(min=1)
            m2 = torch.where(exists, (average - mean).square(), 0.0).sum((0, 1))
            joint = total[0] + count
            gap, share = mean - total[1], count / joint.clamp(min=1)
            total = torch.stack([joint, total[1] + gap * share, total[2] + m2 + gap * gap * total[0] * share])
        if not bool((total[0] >= 2).all()):
            raise ValueError(f"typicality: every modality needs at least two frames to fit, got {total[0].tolist()}")
        self.mean.copy_(total[1])
        self.var.copy_(total[2] / total[0])
        self.fitted.fill_(True)


# ---------------------------------------------------------------------------------------------- reliability fusion
def calibrated_confidence(
    reliability: Tensor, stage: Tensor, log_temperature: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """(*, M, S) logits, (*, S) stages, (M, S) calibration -> (*, M) confidence: the formula of `reliability_fusion`."""
    logit = reliability
    if log_temperature is not None:
        logit = logit * (-log_temperature).exp()
    if bias is not None:
        logit = logit + bias
    return (stage.unsqueeze(-2) * logit.sigmoid()).sum(-1)


class _Values(nn.Module):
    """The value path that weighted fusions share: a Linear a modality, and its LayerNorm inside the fused op."""

    value: nn.ModuleList
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def alone(self, features: Sequence[Tensor], valid: Tensor | None) -> Tensor:
        """What fusing each modality alone would give, (B, T, M, dim); 0 where it is missing.

        `features`: M tensors (B, T, d), finite even where `valid` (B, T, M) is False.
        """
        values = []
        for m, (linear, x) in enumerate(zip(self.value, features)):
            v = linear(x)
            if self.norm_weight is not None and self.norm_bias is not None:
                v = F.layer_norm(v, (v.shape[-1],), self.norm_weight[m].to(v.dtype), self.norm_bias[m].to(v.dtype))
            values.append(v)
        return torch.stack(blank_missing(values, valid), 2)


class ReliabilityFusion(_Values):
    """Fuse `M` modalities by a calibrated, stage-adaptive reliability: the drop-in for a concat or a gate.

    Value path: a Linear a modality to `dim`, then (with `norm`) a LayerNorm a modality inside the fused op.
    Reliability path, with its own parameters, on the *detached* features (so that confidence never bends the
    representation): a per-frame encoder a modality to `evidence_dim`, joined by typicality (see `Typicality`); a head a
    modality gives `stages` logits; the joint evidence gives stage emissions, filtered causally by `stage_filter`;
    `reliability_fusion` mixes, calibrates and weights with a learnt positive `sharpness` (1 at the start).

    Args:
        in_dims: feature size a modality, 1 to 8 of them: a sequence, or a mapping name -> size.
        dim: size of the fused representation.
        stages: number S of latent interaction stages, 1 to 16.
        evidence_dim: size of the learnt evidence a modality.
        norm: LayerNorm with affine on each modality's values.
        detach_evidence: stop the reliability path's gradient at the features.
        filter_stages: False: the stage posterior of a frame is the softmax of its own emissions (uniform in a frame
            without evidence), and there is no transition to learn.

    The calibration `log_temperature` and `bias`, both (M, S), are buffers: saved with the module, never trained by an
    optimiser; `sage_ext.calibration` fits them after training.

    A chunk's state keeps its autograd graph: under training in chunks, detach it where gradients should stop.
    Raises TypeError or ValueError naming the argument for anything malformed.
    """

    causal: ClassVar[bool] = True
    fixed_length: ClassVar[bool] = False
    log_temperature: Tensor
    bias: Tensor

    def __init__(
        self,
        in_dims: Mapping[str, int] | Sequence[int],
        dim: int,
        *,
        stages: int = 4,
        evidence_dim: int = 32,
        norm: bool = True,
        detach_evidence: bool = True,
        filter_stages: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.in_dims = named_dims(in_dims)
        check_int("dim", dim, 1)
        check_int("stages", stages, 1, 16)
        check_int("evidence_dim", evidence_dim, 1)
        self.dim, self.stages, self.evidence_dim, self.detach_evidence = dim, stages, evidence_dim, detach_evidence
        modalities, width = len(self.in_dims), evidence_dim + TYPICALITY_FEATURES

        self.value = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.norm_weight = nn.Parameter(torch.ones(modalities, dim)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(modalities, dim)) if norm else None

        self.typicality = Typicality(modalities)
        self.evidence = nn.ModuleList(nn.Sequential(nn.Linear(d, evidence_dim), nn.GELU()) for d in self.in_dims)
        # Stages begin apart, each trusting modalities in turn, and equally believed: if they began alike, the one that
        # happened to fit best would take all the belief, and the others would never learn.
        leaning = torch.where(torch.arange(stages) % modalities == torch.arange(modalities)[:, None], 1.0, -1.0)
        if modalities == 1:
            leaning = torch.zeros(1, stages)
        self.reliability = nn.ModuleList(_mlp(width, evidence_dim, lean, 0.3) for lean in leaning)
        self.emission = _mlp(modalities * width, evidence_dim, torch.zeros(stages), 0.0)
        # Stages last for seconds, not frames: P(stay) = 0.95 before training.
        stay = torch.eye(stages) * math.log(19.0 * max(stages - 1, 1))
        self.transition = nn.Parameter(stay) if filter_stages else None
        self.sharpening = nn.Parameter(torch.zeros(()))
        self.register_buffer("log_temperature", torch.zeros(modalities, stages))
        self.register_buffer("bias", torch.zeros(modalities, stages))

    @property
    def sharpness(self) -> Tensor:
        """() how strongly confidence turns into weight; positive."""
        return (SHARPENING_RATE * self.sharpening).exp()

    def extra_repr(self) -> str:
        dims = dict(zip(self.names, self.in_dims)) if self.names else self.in_dims
        return (
            f"in_dims={dims}, dim={self.dim}, stages={self.stages}, evidence_dim={self.evidence_dim}, "
            f"norm={self.norm_weight is not None}, detach_evidence={self.detach_evidence}, "
            f"filter_stages={self.transition is not None}"
        )

    def assess(
        self,
        features: Sequence[Tensor],
        valid: Tensor | None = None,
        state: FusionState | None = None,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, FusionState]:
        """The reliability path alone: raw logits (B, T, M, S), stage posterior (B, T, S), next state.

        `features`: M tensors (B, T, d), zero where `valid` (B, T, M) is False. `typicality_inputs`: what typicality
        reads in their place; shapes (B, T, anything).
        """
        if self.detach_evidence:
            features = [x.detach() for x in features]
        inputs = features if typicality_inputs is None else [x.detach() for x in typicality_inputs]
        typical, (energy, counted, last) = self.typicality(
            inputs, valid, None if state is None else (state.energy, state.counted, state.last)
        )
        logits, joint = [], []
        for m, x in enumerate(features):
            evidence = torch.cat([self.evidence[m](x), typical[:, :, m].to(x.dtype)], -1)  # (B, T, E + 4)
            if valid is not None:
                evidence = torch.where(valid[..., m, None], evidence, 0.0)
            logits.append(self.reliability[m](evidence))
            joint.append(evidence)
        reliability = torch.stack(logits, 2)
        emission = self.emission(torch.cat(joint, -1))
        if emission.dtype in (torch.float16, torch.bfloat16):  # autocast: gating stays in float32
            reliability, emission = reliability.float(), emission.float()
        evident = None if valid is None else valid.any(-1)
        if self.transition is None:
            belief = (emission if evident is None else torch.where(evident.unsqueeze(-1), emission, 0.0)).log_softmax(
                -1
            )
            stage, belief = belief.exp(), belief[:, -1]
        else:
            stage, belief = functional.stage_filter(
                emission, self.transition.to(emission.dtype), None if state is None else state.belief, evident
            )
        return reliability, stage, FusionState(belief, energy, counted, last)

    def forward(
        self,
        features: Features,
        present: Tensor | None = None,
        mask: Tensor | None = None,
        state: FusionState | None = None,
        *,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> FusionOutput:
        """Fuse a chunk.

        Args:
            features: M tensors (B, T, d), or (N, d) for N single frames: a sequence, or a mapping by name.
            present: (B, T, M) or (N, M) bool; False: the modality is missing there (not read: NaN is harmless).
            mask: (B, T) or (N,) bool; False: padding. Counts as a frame in which everything is missing.
            state: `FusionOutput.state` of the chunk before; None starts a sequence.
            typicality_inputs: M tensors (B, T, anything) that typicality reads in place of `features`: a model passes
                its inputs, whose statistics do not move while its encoders learn.
        """
        x = ordered_features(features, self.names, self.in_dims)
        single = x[0].dim() == 2
        lead, modalities = tuple(x[0].shape[:-1]), len(x)
        check_flags("present", present, (*lead, modalities), x[0].device)
        check_flags("mask", mask, lead, x[0].device)
        if typicality_inputs is not None:
            typicality_inputs = ordered_features(
                typicality_inputs, None, [v.shape[-1] for v in typicality_inputs], "typicality_inputs"
            )
            if len(typicality_inputs) != modalities or tuple(typicality_inputs[0].shape[:-1]) != lead:
                raise ValueError(
                    f"typicality_inputs must be {modalities} tensors of leading shape {lead}, got "
                    f"{[tuple(v.shape) for v in typicality_inputs]}"
                )
        valid = join_flags(present, mask, modalities)
        if single:
            x = [v.unsqueeze(1) for v in x]
            valid = None if valid is None else valid.unsqueeze(1)
            typicality_inputs = None if typicality_inputs is None else [v.unsqueeze(1) for v in typicality_inputs]
        x = blank_missing(x, valid)
        inputs = None if typicality_inputs is None else blank_missing(typicality_inputs, valid)

        reliability, stage, state = self.assess(x, valid, state, inputs)
        fused, weights, confidence = functional.reliability_fusion(
            [linear(v) for linear, v in zip(self.value, x)],
            reliability,
            stage,
            log_temperature=self.log_temperature,
            bias=self.bias,
            sharpness=self.sharpness,
            present=valid,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )
        if single:
            fused, weights, confidence, stage = (v.squeeze(1) for v in (fused, weights, confidence, stage))
        return FusionOutput(fused, weights, confidence, stage, state)

    @torch.no_grad()
    def fit_typicality(self, batches: Iterable[tuple[Features, Tensor | None, Tensor | None]]) -> None:
        """Set the typicality statistics from (features, present, mask) batches of clean training data.

        Without it they follow the training batches by momentum, corrupted ones included.
        """

        def prepared() -> Iterable[tuple[Sequence[Tensor], Tensor | None]]:
            for features, present, mask in batches:
                x = ordered_features(features, self.names, self.in_dims)
                valid = join_flags(present, mask, len(x))
                yield blank_missing(x, valid), valid

        self.typicality.fit(prepared())


def _mlp(width: int, hidden: int, bias: Tensor, scale: float) -> nn.Sequential:
    """Linear, GELU, Linear; the last begins with `bias` and `scale` times the usual weights."""
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, len(bias))
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.copy_(bias)
    return nn.Sequential(first, nn.GELU(), last)


class UniformFusion(_Values):
    """The baseline of `ReliabilityFusion`: the same value path, equal weights over the present modalities.

    Confidence is 1/2 where present (nothing is known), there is one stage, and no state.
    """

    causal: ClassVar[bool] = True
    fixed_length: ClassVar[bool] = False

    def __init__(self, in_dims: Mapping[str, int] | Sequence[int], dim: int, *, norm: bool = True) -> None:
        super().__init__()
        self.names, self.in_dims = named_dims(in_dims)
        check_int("dim", dim, 1)
        self.dim = dim
        self.value = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.norm_weight = nn.Parameter(torch.ones(len(self.in_dims), dim)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(len(self.in_dims), dim)) if norm else None

    def extra_repr(self) -> str:
        dims = dict(zip(self.names, self.in_dims)) if self.names else self.in_dims
        return f"in_dims={dims}, dim={self.dim}, norm={self.norm_weight is not None}"

    def forward(
        self,
        features: Features,
        present: Tensor | None = None,
        mask: Tensor | None = None,
        state: FusionState | None = None,
        *,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> FusionOutput:
        """As `ReliabilityFusion.forward`; `state` and `typicality_inputs` are not used."""
        x = ordered_features(features, self.names, self.in_dims)
        lead, modalities = tuple(x[0].shape[:-1]), len(x)
        check_flags("present", present, (*lead, modalities), x[0].device)
        check_flags("mask", mask, lead, x[0].device)
        valid = join_flags(present, mask, modalities)
        x = blank_missing(x, valid)
        dtype = torch.float64 if x[0].dtype == torch.float64 else torch.float32
        fused, weights, confidence = functional.reliability_fusion(
            [linear(v) for linear, v in zip(self.value, x)],
            x[0].new_zeros(*lead, modalities, 1, dtype=dtype),
            present=valid,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )
        return FusionOutput(fused, weights, confidence, x[0].new_ones(*lead, 1, dtype=dtype), None)


# ---------------------------------------------------------------------------------------------------------- losses
class ReliabilityNLL(nn.Module):
    """The proper score that trains confidence: Gaussian negative log-likelihood of a modality's own squared error.

    A confidence `r` states that the modality's error has variance `kappa^2 (1 - r) / r`, that is precision
    `p = odds(r) / kappa^2`. For a squared error `e2` the loss is `(p * e2 - log p) / 2` (the constant `log(2 pi) / 2`
    left out, as in `torch.nn.GaussianNLLLoss`). In expectation its derivative in `p` is `(E[e2] - 1 / p) / 2`, zero
    only at `1 / p = E[e2]`: the minimiser is the calibrated `r = 1 / (1 + E[e2] / kappa^2)`, and the loss is convex in
    `log p`. The squared error is detached: the loss teaches confidence, never the prediction.

    `kappa`: the error scale, in units of the labels, at which confidence is 1/2.
    """

    FLOOR = float(torch.finfo(torch.float32).eps)  # added to r and 1 - r: bounds |log odds| by 16, smoothly

    def __init__(self, kappa: float = 0.25) -> None:
        super().__init__()
        if not isinstance(kappa, (int, float)) or isinstance(kappa, bool):
            raise TypeError(f"kappa must be float, got {type(kappa).__name__}")
        if not (kappa > 0 and math.isfinite(kappa)):
            raise ValueError(f"kappa must be positive and finite, got {kappa}")
        self.kappa = float(kappa)

    def extra_repr(self) -> str:
        return f"kappa={self.kappa}"

    def forward(self, confidence: Tensor, squared_error: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean score over the counted entries (0, with gradient 0, where there is none).

        confidence: (*, M) in [0, 1]; squared_error: (*, M), or (*, M, C) for C targets that share one confidence;
        mask: (*, M) or (*) bool, False = not counted (not read: NaN there reaches nothing).
        """
        if squared_error.dim() == confidence.dim():
            squared_error = squared_error.unsqueeze(-1)
        if squared_error.shape[:-1] != confidence.shape:
            raise ValueError(
                f"squared_error must be {tuple(confidence.shape)} or that with targets at the end, got "
                f"{tuple(squared_error.shape)}"
            )
        dtype = torch.float64 if confidence.dtype == torch.float64 else torch.float32
        r, error = confidence.to(dtype), squared_error.detach().to(dtype)
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool, got {mask.dtype}")
            if mask.shape == confidence.shape[:-1]:
                mask = mask.unsqueeze(-1).expand_as(confidence)
            if mask.shape != confidence.shape:
                raise ValueError(
                    f"mask must be {tuple(confidence.shape)} or {tuple(confidence.shape[:-1])}, got {tuple(mask.shape)}"
                )
            r = torch.where(mask, r, 0.5)
            error = torch.where(mask.unsqueeze(-1), error, 0.0)
        log_odds = (r + self.FLOOR).log() - (1 - r + self.FLOOR).log()
        log_precision = log_odds - 2 * math.log(self.kappa)
        score = 0.5 * (log_precision.exp() * error.mean(-1) - log_precision)
        if mask is None:
            return score.sum() / max(score.numel(), 1)
        return torch.where(mask, score, 0.0).sum() / mask.sum().clamp(min=1)


def _as_real(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Half precision (autocast) up to float32, and both in one dtype."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return pred.to(dtype), target.to(dtype)


class CCCLoss(nn.Module):
    """Mean over targets of `1 - CCC` (Lin 1989, population moments); the Aff-Wild2 objective with `pool="batch"`.

    Args:
        pool: "batch" takes one CCC over all valid frames of all sequences; "sequence" one a sequence, then the mean.
        ignore_value: a frame in which any target equals this (-5 in Aff-Wild2; NaN works too) is not counted.
        channel_weights: relative weight of each target, default equal; normalised to sum to 1.

    A group without a defined CCC (fewer than two valid frames, or constant and equal) counts as 1 with gradient 0.
    """

    channel_weights: Tensor | None

    def __init__(
        self,
        pool: str = "batch",
        ignore_value: float | None = None,
        channel_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("batch", "sequence"):
            raise ValueError(f'pool must be "batch" or "sequence", got {pool!r}')
        self.pool, self.ignore_value = pool, ignore_value
        weights = None
        if channel_weights is not None:
            weights = torch.as_tensor(channel_weights, dtype=torch.float32)
            if weights.dim() != 1 or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
                raise ValueError(
                    f"channel_weights must be 1-d, non-negative, with a positive sum, got {channel_weights}"
                )
            weights = weights / weights.sum()
        self.register_buffer("channel_weights", weights, persistent=False)

    def extra_repr(self) -> str:
        weights = None if self.channel_weights is None else self.channel_weights.tolist()
        return f"pool={self.pool!r}, ignore_value={self.ignore_value}, channel_weights={weights}"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """pred, target: (B, T, C) or (T, C); mask: bool, (B, T) or the shape of pred. Returns a scalar."""
        pred, target = _as_real(pred, target)
        if self.ignore_value is not None:
            ignored = target.isnan() if math.isnan(self.ignore_value) else target == self.ignore_value
            counted = ~ignored.any(-1)
            mask = counted if mask is None else mask & (counted if mask.dim() < target.dim() else counted.unsqueeze(-1))
        loss = 1 - functional.ccc(pred, target, mask, pool=self.pool)
        if self.channel_weights is None:
            return loss.mean()
        if self.channel_weights.numel() != pred.shape[-1]:
            raise ValueError(
                f"channel_weights has {self.channel_weights.numel()} entries, pred {pred.shape[-1]} targets"
            )
        return (loss * self.channel_weights.to(loss.dtype)).sum(-1).mean()


class TemporalCCCLoss(nn.Module):
    """Mean of `1 - rho` over the frames whose running CCC is defined: concordance at every moment, not only overall.

    Args:
        window: rho over the last `window` frames (int >= 2), or
        halflife: rho over all frames so far, weighted by `0.5 ** (age / halflife)`; neither: all frames so far alike.

    A running CCC is defined where at least two valid frames are inside the window; others contribute nothing.
    """

    def __init__(self, window: int | None = None, halflife: float | None = None) -> None:
        super().__init__()
        check_memory(window, halflife)
        self.window, self.halflife = window, halflife

    def extra_repr(self) -> str:
        return f"window={self.window}, halflife={self.halflife}"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """pred, target: (B, T, C); mask: bool, (B, T) or the shape of pred. A scalar, 0 if nothing is defined."""
        pred, target = _as_real(pred, target)
        rho, _ = functional.temporal_ccc(pred, target, mask, window=self.window, halflife=self.halflife)
        valid = torch.ones_like(pred, dtype=torch.bool) if mask is None else mask
        if valid.dim() < pred.dim():
            valid = valid.unsqueeze(-1).expand_as(pred)
        seen = valid.long().cumsum(1)
        if self.window is not None and pred.shape[1] > self.window:
            seen = torch.cat([seen[:, : self.window], seen[:, self.window :] - seen[:, : -self.window]], 1)
        defined = seen >= 2
        return torch.where(defined, 1 - rho, 0.0).sum() / defined.sum().clamp(min=1)


def check_memory(window: int | None, halflife: float | None) -> None:
    """`window` and `halflife` of a running CCC: at most one of them, in range."""
    if window is not None and halflife is not None:
        raise ValueError("give window or halflife, not both")
    if window is not None:
        check_int("window", window, 2)
    if halflife is not None:
        if not isinstance(halflife, (int, float)) or isinstance(halflife, bool):
            raise TypeError(f"halflife must be float, got {type(halflife).__name__}")
        if not (halflife > 0 and math.isfinite(halflife)):
            raise ValueError(f"halflife must be positive and finite, got {halflife}")
