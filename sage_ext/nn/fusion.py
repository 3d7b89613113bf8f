"""Fusion of modalities: what `SAGE` asks of it, `ReliabilityFusion`, and its baseline with equal weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._arguments import (
    CONSTANTS,
    MAX_STAGES,
    Features,
    Present,
    arithmetic_dtype,
    blank_missing,
    check_bool,
    check_int,
    finite_frames,
    join_flags,
    named_dims,
    ordered_features,
    read_flags,
    take_finite,
)
from .typicality import TYPICALITY_FEATURES, Typicality

# Adam moves every parameter by about the learning rate a step. A matrix has many that add up, the sharpness is alone:
# this factor lets it double within a hundred steps at 1e-3.
SHARPENING_RATE = 8.0


class FusionState(NamedTuple):
    """What `ReliabilityFusion` carries from one chunk to the next. All tensors; a new sequence starts from zeros.

    With `B` sequences, `M` modalities, `S` stages and a typicality window of `W` frames:
    """

    belief: Tensor  # (B, S) log-belief over stages after the last frame (`initial` of the next stage_filter call)
    energy: Tensor  # (B, W-1, M, 2) log energy of frame and of difference in the last W-1 frames; 0 where not counted
    counted: Tensor  # (B, W-1, M, 2) 1 where `energy` holds a value, else 0 (modality or its predecessor missing)
    last: Tensor  # (B, sum of in_dims) the last frame's typicality inputs, modality after modality; 0 where missing


class FusionOutput(NamedTuple):
    """What a fusion gives. `(*)` is `(B, T)`, or `(N,)` for two-dimensional features."""

    fused: Tensor  # (*, dim), dtype of the values
    weights: Tensor  # (*, M) sums to 1 over the present modalities; 0 where absent
    confidence: Tensor  # (*, M) calibrated reliability in [0, 1]; 0 where absent
    stage: Tensor  # (*, S) posterior of the interaction stage
    state: tuple[Tensor, ...] | None  # for the next chunk; a FusionState of ReliabilityFusion
    # (M,) int64: the frames of each modality that were said to be present, and no padding, but held NaN, Inf or numbers whose
    # squares overflow float32. They count as missing.
    nonfinite: Tensor


class Admitted(NamedTuple):
    """What `Fusion.forward` hands on once it has checked a caller's arguments: sequences (single frames are sequences of
    one), zero where `known` is False."""

    features: list[Tensor]  # M tensors (B, T, d)
    known: Tensor  # (B, T, M) bool: present, no padding, and finite
    typicality_inputs: list[Tensor] | None  # M tensors (B, T, anything)
    nonfinite: Tensor  # (M,) int64, of `FusionOutput`
    single: bool  # the caller's features were (N, d)


def nothing_refused(x: Sequence[Tensor]) -> Tensor:
    """`FusionOutput.nonfinite` of M tensors that are finite wherever they are known: (M,) zeros."""
    return x[0].new_zeros(len(x), dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ what SAGE asks for
class Fusion(nn.Module):
    """A way to fuse `M` modalities into one representation: what `SAGE` asks of it, with the answers of a plain one.

    A subclass defines `fuse_checked`, and overrides what it answers differently. `forward` checks what a caller gives and
    blanks what is missing, then calls `fuse_checked`; a model that has done both calls that one itself.

    A frame that holds NaN, Inf or numbers whose squares overflow float32 is missing, whatever `present` says of it: it
    reaches neither values nor gradients, and `FusionOutput.nonfinite` counts it.

    Everywhere `known` (B, T, M) bool says that a modality is present, and finite, in a frame that is no padding; None:
    everywhere.

    Args:
        in_dims: feature size a modality, 1 to 8 of them: a sequence, or a mapping name -> size.
        dim: size of the fused representation.
    """

    title: ClassVar[str] = ""  # for tables and pictures; `note` says in a sentence what sets it apart
    note: ClassVar[str] = ""
    causal: ClassVar[bool] = True  # frame t depends on no later frame
    fixed_length: ClassVar[bool] = False  # every call has exactly `length` frames, an argument of the constructor
    pairwise: ClassVar[bool] = False  # defined for two modalities only
    has_reliability: ClassVar[bool] = False  # `assess` gives logits and stages, which `sage_ext.calibration` calibrates
    # Whether `tracks` gives each modality alone after the fused frames. Where it does not, `SAGE` takes the unimodal
    # predictions from a linear head on each encoder.
    tracks_modalities: ClassVar[bool] = False
    default_memory: ClassVar[
        tuple[float, ...]
    ] = ()  # half-lives, in frames, of `SAGE`'s memory if nothing is asked for
    default_stuck: ClassVar[int] = 0  # repeats after which `SAGE` takes a frame as missing, likewise; 0: never

    def __init__(self, in_dims: Mapping[str, int] | Sequence[int], dim: int) -> None:
        super().__init__()
        self.names, self.in_dims = named_dims(in_dims)
        check_int("dim", dim, 1)
        self.dim = dim

    def extra_repr(self) -> str:
        dims = dict(zip(self.names, self.in_dims)) if self.names else self.in_dims
        return f"in_dims={dims}, dim={self.dim}"

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What the features' dtype has to be unless autocast is on: that of the first Linear or convolution; None: any."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                return module.weight.dtype
        return None

    def fuse_checked(
        self,
        x: list[Tensor],
        known: Tensor | None,
        state: Any = None,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> FusionOutput:
        """`forward` behind its checks: M finite tensors (B, T, d), and as many of any size for typicality, all of them zero
        where `known` is False. Its `nonfinite` is zeros: the caller has counted."""
        raise NotImplementedError

    def forward(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        *,
        typicality_inputs: Features | None = None,
        strict: bool = False,
    ) -> FusionOutput:
        """Fuse a chunk.

        Args:
            features: M tensors (B, T, d), or (N, d) for N single frames: a sequence, or a mapping by name. Of the dtype of
                the module's weights, unless autocast is on.
            present: (B, T, M) or (N, M) bool; False: the modality is missing there (not read: NaN is harmless). Or a mapping
                that gives each modality's (B, T) or (N,) by name, none left out.
            mask: (B, T) or (N,) bool; False: padding. Counts as a frame in which everything is missing.
            state: `FusionOutput.state` of the chunk before; None starts a sequence. Causal fusions only.
            typicality_inputs: M tensors (B, T, anything) that typicality reads in place of `features`: a model passes
                its inputs, whose statistics do not move while its encoders learn. Not used by fusions without typicality.
            strict: raise ValueError, naming modality and place, for a frame that is not finite where it is said to be
                present, rather than take it as missing. Waits for the device, and cannot be compiled in one graph.

        Raises TypeError or ValueError naming the argument for anything malformed.
        """
        given = self.admit(features, present, mask, state, typicality_inputs, strict)
        out = self.fuse_checked(given.features, given.known, state, given.typicality_inputs)
        fused, weights, confidence, stage = (v.squeeze(1) for v in out[:4]) if given.single else out[:4]
        return FusionOutput(fused, weights, confidence, stage, out.state, given.nonfinite)

    def admit(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        typicality_inputs: Features | None = None,
        strict: bool = False,
    ) -> Admitted:
        """The arguments of `forward`, checked, in the modalities' order, and blanked where they are missing."""
        check_bool("strict", strict)
        x = ordered_features(features, self.names, self.in_dims, "features", self.weights_dtype)
        present, mask = read_flags(x, self.names, present, mask)
        if state is not None and not self.causal:
            raise ValueError(
                f"state: expected None ({type(self).__name__} is not causal and cannot run in chunks), got "
                f"{type(state).__name__}"
            )
        inputs = None
        if typicality_inputs is not None:
            names = self.names if isinstance(typicality_inputs, Mapping) else None
            inputs = ordered_features(typicality_inputs, names, [None] * len(x), "typicality_inputs")
            lead, got = tuple(x[0].shape[:-1]), tuple(inputs[0].shape[:-1])
            if got != lead:
                raise ValueError(f"typicality_inputs: expected leading shape {lead} (that of the features), got {got}")
        known = join_flags(present, mask, len(x))
        finite = finite_frames(x) if inputs is None else finite_frames(x) & finite_frames(inputs)
        x, known, nonfinite = take_finite(x, known, self.names, finite=finite, strict=strict)
        inputs = None if inputs is None else blank_missing(inputs, known)
        single = x[0].dim() == 2
        if single:
            x, known = [v.unsqueeze(1) for v in x], known.unsqueeze(1)
            inputs = None if inputs is None else [v.unsqueeze(1) for v in inputs]
        return Admitted(x, known, inputs, nonfinite, single)

    def fit_inputs(self, batches: Iterable[tuple[Sequence[Tensor], Tensor | None]]) -> None:
        """Learn what it needs to know of clean training data: (what typicality reads, `known`) of each batch."""

    def assess(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        *,
        typicality_inputs: Features | None = None,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """Raw reliability logits (*, M, S), stage posterior (*, S), next state; only where `has_reliability`. Arguments as
        `forward`."""
        given = self.admit(features, present, mask, state, typicality_inputs, strict)
        reliability, stage, state = self.assess_checked(given.features, given.known, state, given.typicality_inputs)
        return (reliability.squeeze(1), stage.squeeze(1), state) if given.single else (reliability, stage, state)

    def assess_checked(
        self,
        x: Sequence[Tensor],
        known: Tensor | None = None,
        state: Any = None,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """`assess` behind its checks; arguments as `fuse_checked`."""
        raise NotImplementedError(f"{type(self).__name__} has no reliability to assess")

    def log_precision(self, confidence: Tensor) -> Tensor:
        """(B, T, M) confidence -> log of the precision of a modality's frame, in units of 1 / kappa^2."""
        return torch.logit(confidence, eps=CONSTANTS["confidence_margin"])

    def alone(self, encoded: Sequence[Tensor], known: Tensor | None) -> Tensor:
        """What fusing each modality alone would give, (B, T, M, dim), 0 where it is missing; only where
        `tracks_modalities`. `encoded`: M tensors (B, T, d), finite even where `known` is False."""
        raise NotImplementedError(f"{type(self).__name__} does not fuse a modality alone")

    def tracks(self, fused: Tensor, encoded: Sequence[Tensor], known: Tensor | None) -> Tensor:
        """What the layers after the fusion run on, (B, T, K, dim): the fused frames first, or all that `mix_estimates`
        joins. `encoded` as in `alone`."""
        if not self.tracks_modalities:
            return fused.unsqueeze(2)
        return torch.cat([fused.unsqueeze(2), self.alone(encoded, known).to(fused.dtype)], 2)

    def mix_estimates(self, estimates: Tensor, known: Tensor | None) -> Tensor:
        """(B, T, K, C) estimates, one a track -> (B, T, C), the prediction."""
        return estimates[:, :, 0]


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


class _WeightedFusion(Fusion):
    """A sum of values weighed frame by frame: a Linear a modality, and its LayerNorm (with `norm`) inside the fused op."""

    tracks_modalities = True
    default_memory = (8.0, 32.0, 128.0)
    default_stuck = 8

    def __init__(self, in_dims: Mapping[str, int] | Sequence[int], dim: int, norm: bool) -> None:
        super().__init__(in_dims, dim)
        modalities = len(self.in_dims)
        self.value = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.norm_weight = nn.Parameter(torch.ones(modalities, dim)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(modalities, dim)) if norm else None

    @property
    def weights_dtype(self) -> torch.dtype | None:
        return getattr(self.value[0].weight, "dtype", None)  # of a dynamically quantised Linear the weight is a method

    def values(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Each modality's values before their LayerNorm, (B, T, dim)."""
        return [linear(v) for linear, v in zip(self.value, x)]

    def alone(self, encoded: Sequence[Tensor], known: Tensor | None) -> Tensor:
        values = self.values(encoded)
        if self.norm_weight is not None and self.norm_bias is not None:
            values = [
                F.layer_norm(v, (v.shape[-1],), self.norm_weight[m].to(v.dtype), self.norm_bias[m].to(v.dtype))
                for m, v in enumerate(values)
            ]
        return torch.stack(blank_missing(values, known), 2)


class ReliabilityFusion(_WeightedFusion):
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

    A chunk's state (a `FusionState`) keeps its autograd graph: under training in chunks, detach it where gradients should
    stop. Raises TypeError or ValueError naming the argument for anything malformed.
    """

    has_reliability = True
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
        super().__init__(in_dims, dim, norm)
        check_int("stages", stages, 1, MAX_STAGES)
        check_int("evidence_dim", evidence_dim, 1)
        self.stages, self.evidence_dim, self.detach_evidence = stages, evidence_dim, detach_evidence
        modalities, width = len(self.in_dims), evidence_dim + TYPICALITY_FEATURES

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
        return (
            f"{super().extra_repr()}, stages={self.stages}, evidence_dim={self.evidence_dim}, "
            f"norm={self.norm_weight is not None}, detach_evidence={self.detach_evidence}, "
            f"filter_stages={self.transition is not None}"
        )

    def log_precision(self, confidence: Tensor) -> Tensor:
        return self.sharpness * super().log_precision(confidence)

    def assess_checked(
        self,
        x: Sequence[Tensor],
        known: Tensor | None = None,
        state: FusionState | None = None,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, FusionState]:
        """The reliability path alone: raw logits (B, T, M, S), stage posterior (B, T, S), next state.

        `x`: M tensors (B, T, d), zero where `known` (B, T, M) is False. `typicality_inputs`: what typicality reads in their
        place; shapes (B, T, anything).
        """
        if self.detach_evidence:
            x = [v.detach() for v in x]
        inputs = x if typicality_inputs is None else [v.detach() for v in typicality_inputs]
        typical, (energy, counted, last) = self.typicality(
            inputs, known, None if state is None else (state.energy, state.counted, state.last)
        )
        logits, joint = [], []
        for m, v in enumerate(x):
            evidence = torch.cat([self.evidence[m](v), typical[:, :, m].to(v.dtype)], -1)  # (B, T, E + 4)
            if known is not None:
                evidence = torch.where(known[..., m, None], evidence, 0.0)
            logits.append(self.reliability[m](evidence))
            joint.append(evidence)
        reliability = torch.stack(logits, 2)
        emission = self.emission(torch.cat(joint, -1))
        if emission.dtype in (torch.float16, torch.bfloat16):  # autocast: gating stays in float32
            reliability, emission = reliability.float(), emission.float()
        evident = None if known is None else known.any(-1)  # (B, T) frames in which some modality gives evidence
        if self.transition is None:
            # Each frame by itself: without evidence all stages are alike.
            if evident is not None:
                emission = torch.where(evident.unsqueeze(-1), emission, 0.0)
            beliefs = emission.log_softmax(-1)
            stage, belief = beliefs.exp(), beliefs[:, -1]
        else:
            stage, belief = functional.stage_filter(
                emission, self.transition.to(emission.dtype), None if state is None else state.belief, evident
            )
        return reliability, stage, FusionState(belief, energy, counted, last)

    def fuse_checked(
        self,
        x: list[Tensor],
        known: Tensor | None,
        state: FusionState | None = None,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> FusionOutput:
        reliability, stage, state = self.assess_checked(x, known, state, typicality_inputs)
        fused, weights, confidence = functional.reliability_fusion(
            self.values(x),
            reliability,
            stage,
            log_temperature=self.log_temperature,
            bias=self.bias,
            sharpness=self.sharpness,
            present=known,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )
        return FusionOutput(fused, weights, confidence, stage, state, nothing_refused(x))

    def fit_inputs(self, batches: Iterable[tuple[Sequence[Tensor], Tensor | None]]) -> None:
        self.typicality.fit(batches)

    @torch.no_grad()
    def fit_typicality(self, batches: Iterable[tuple[Features, Present | None, Tensor | None]]) -> None:
        """Set the typicality statistics from (features, present, mask) batches of clean training data, as `forward` takes
        them; frames that are not finite are missing. Without it they follow the training batches by momentum, corrupted
        ones included.
        """

        def prepared() -> Iterable[tuple[Sequence[Tensor], Tensor | None]]:
            for features, present, mask in batches:
                given = self.admit(features, present, mask)
                yield given.features, given.known

        self.typicality.fit(prepared())


def _mlp(width: int, hidden: int, bias: Tensor, scale: float) -> nn.Sequential:
    """Linear, GELU, Linear; the last begins with `bias` and `scale` times the usual weights."""
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, len(bias))
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.copy_(bias)
    return nn.Sequential(first, nn.GELU(), last)


class UniformFusion(_WeightedFusion):
    """The baseline of `ReliabilityFusion`: the same value path, equal weights over the present modalities.

    Confidence is 1/2 where present (nothing is known of it), there is one stage, and no state.
    """

    def __init__(self, in_dims: Mapping[str, int] | Sequence[int], dim: int, *, norm: bool = True) -> None:
        super().__init__(in_dims, dim, norm)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm_weight is not None}"

    def fuse_checked(
        self,
        x: list[Tensor],
        known: Tensor | None,
        state: None = None,
        typicality_inputs: Sequence[Tensor] | None = None,
    ) -> FusionOutput:
        batch, frames, dtype = *x[0].shape[:2], arithmetic_dtype(x[0])
        fused, weights, confidence = functional.reliability_fusion(
            self.values(x),
            x[0].new_zeros(batch, frames, len(x), 1, dtype=dtype),
            present=known,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )
        stage = x[0].new_ones(batch, frames, 1, dtype=dtype)
        return FusionOutput(fused, weights, confidence, stage, None, nothing_refused(x))
