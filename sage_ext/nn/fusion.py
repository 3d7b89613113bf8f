"""Fusion of modalities: what `SAGE` asks of it, `ReliabilityFusion`, and its baseline with equal weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._arguments import (
    MAX_MODALITIES,
    MAX_STAGES,
    Features,
    Present,
    QualityValues,
    arithmetic_dtype,
    blank_missing,
    check_bool,
    check_int,
    finite_frames,
    join_flags,
    named_dims,
    ordered_features,
    ordered_quality,
    quality_sizes,
    read_flags,
    storable,
    take_finite,
)
from .._typing import called_as
from .quality import QUALITY_FEATURES, Quality
from .typicality import Typicality

# Adam moves every parameter by about the learning rate a step. A matrix has many that add up, the sharpness is alone:
# this factor lets it double within a hundred steps at 1e-3.
SHARPENING_RATE = 8.0


@storable
class FusionState(NamedTuple):
    """What `ReliabilityFusion` carries from one chunk to the next. All tensors; a new sequence starts from zeros.

    With `B` sequences, `M` modalities, `S` stages and a typicality window of `W` frames:
    """

    belief: Tensor  # (B, S) log-belief over stages after the last frame (`initial` of the next stage_filter call)
    energy: (
        Tensor  # (B, W-1, M, E) log energy of frame, difference (and residual) in the last W-1 frames; 0 if not counted
    )
    counted: Tensor  # (B, W-1, M, E) 1 where `energy` holds a value, else 0 (modality or its predecessor missing)
    last: Tensor  # (B, sum of in_dims) the last frame's typicality inputs, modality after modality; 0 where missing
    # (B, sum of the quality's columns, 3) of their leaky averages: weighted sum, weight and count; None without quality
    quality: Tensor | None = None


@storable
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
    joint: Tensor | None = (
        None  # (*) the share of the joint expert, of which the modalities have the rest; None without one
    )


class Assessment(NamedTuple):
    """What the reliability path says of `K` experts: the joint one, where there is one, then the modalities."""

    reliability: Tensor  # (B, T, K, S) raw logits
    log_precision: Tensor | None  # (B, T, K) of a frame, up to a constant; None: the confidence is all there is
    stage: Tensor  # (B, T, S)
    state: Any


class Represented(NamedTuple):
    """What `SAGE` runs its later layers on."""

    tracks: Tensor  # (B, T, K, dim): K experts' frames, or those of the fused whole alone
    log_precision: Tensor  # (B, T, K) of a frame, up to a constant; of any value where it is missing
    known: Tensor | None  # (B, T, K) whether a track's frame says anything
    gate: Any  # for `mix`
    state: Any  # for the next chunk


class Mixed(NamedTuple):
    """The estimates of all tracks, weighed."""

    prediction: Tensor  # (B, T, C)
    shares: Tensor  # (B, T, K) of each track
    weights: Tensor  # (B, T, M) of the modalities among themselves
    confidence: Tensor  # (B, T, K') of each expert; of peers, each modality
    stage: Tensor  # (B, T, S)


class Admitted(NamedTuple):
    """What `Fusion.forward` hands on once it has checked a caller's arguments: sequences (single frames are sequences of
    one), zero where `known` is False."""

    features: list[Tensor]  # M tensors (B, T, d)
    known: Tensor  # (B, T, M) bool: present, no padding, and finite
    typicality_inputs: list[Tensor] | None  # M tensors (B, T, anything)
    quality: Tensor | None  # (B, T, sum of the modalities' columns), NaN where unknown
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
    # Whether the last M tracks are the modalities, each alone. Where they are not, `SAGE` takes the unimodal predictions from a
    # linear head on each encoder.
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
        self.quality_dims = [0] * len(self.in_dims)
        self.typicality_dims: Sequence[int] | None = None  # sizes of `typicality_inputs`; None: any, or none given

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
        quality: Tensor | None = None,
    ) -> FusionOutput:
        """`forward` behind its checks: M finite tensors (B, T, d), and as many of any size for typicality, all of them zero
        where `known` is False; quality (B, T, sum of its columns). Its `nonfinite` is zeros: the caller has counted."""
        raise NotImplementedError

    def forward(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        *,
        typicality_inputs: Features | None = None,
        quality: QualityValues | None = None,
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
            quality: (B, T, Q_m) or (N, Q_m) of the modalities that were given `quality_dims`: a mapping by name, or a sequence
                with None for a modality without. NaN, an infinite number, and a modality left out are unknown.
            strict: raise ValueError, naming modality and place, for a frame that is not finite where it is said to be
                present, rather than take it as missing. Waits for the device, and cannot be compiled in one graph.

        Raises TypeError or ValueError naming the argument for anything malformed.
        """
        given = self.admit(features, present, mask, state, typicality_inputs, quality, strict)
        out = self.fuse_checked(given.features, given.known, state, given.typicality_inputs, given.quality)
        # By name: torch 2.6 traces no slice of a named tuple.
        parts = (out.fused, out.weights, out.confidence, out.stage)
        fused, weights, confidence, stage = (v.squeeze(1) for v in parts) if given.single else parts
        joint = out.joint.squeeze(1) if given.single and out.joint is not None else out.joint
        return FusionOutput(fused, weights, confidence, stage, out.state, given.nonfinite, joint)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...

    def admit(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        typicality_inputs: Features | None = None,
        quality: QualityValues | None = None,
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
        if typicality_inputs is None and self.typicality_dims is not None:
            raise ValueError(f"typicality_inputs: expected features of sizes {self.typicality_dims}, got None")
        if typicality_inputs is not None:
            names = self.names if isinstance(typicality_inputs, Mapping) else None
            dims = [None] * len(x) if self.typicality_dims is None else self.typicality_dims
            inputs = ordered_features(typicality_inputs, names, dims, "typicality_inputs")
            lead, got = tuple(x[0].shape[:-1]), tuple(inputs[0].shape[:-1])
            if got != lead:
                raise ValueError(f"typicality_inputs: expected leading shape {lead} (that of the features), got {got}")
        known = join_flags(present, mask, len(x))
        finite = finite_frames(x) if inputs is None else finite_frames(x) & finite_frames(inputs)
        x, known, nonfinite = take_finite(x, known, self.names, finite=finite, strict=strict)
        inputs = None if inputs is None else blank_missing(inputs, known)
        evidence = ordered_quality(quality, self.names, self.quality_dims, x[0], known)
        single = x[0].dim() == 2
        if single:
            x, known = [v.unsqueeze(1) for v in x], known.unsqueeze(1)
            inputs = None if inputs is None else [v.unsqueeze(1) for v in inputs]
            evidence = None if evidence is None else evidence.unsqueeze(1)
        return Admitted(x, known, inputs, evidence, nonfinite, single)

    def fit_inputs(self, batches: Iterable[tuple[Sequence[Tensor], Tensor | None, Tensor | None]]) -> None:
        """Learn what it needs to know of clean training data: what typicality reads, `known` and quality of each batch.
        Iterated more than once."""

    def assess(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        *,
        typicality_inputs: Features | None = None,
        quality: QualityValues | None = None,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """Raw reliability logits (*, K, S) of each expert, stage posterior (*, S), next state; only where `has_reliability`.
        Arguments as `forward`. The last M of the K experts are the modalities."""
        given = self.admit(features, present, mask, state, typicality_inputs, quality, strict)
        found = self.assess_checked(given.features, given.known, state, given.typicality_inputs, given.quality)
        reliability, stage = found.reliability, found.stage
        return (
            (reliability.squeeze(1), stage.squeeze(1), found.state)
            if given.single
            else (reliability, stage, found.state)
        )

    def assess_checked(
        self,
        x: Sequence[Tensor],
        known: Tensor | None = None,
        state: Any = None,
        typicality_inputs: Sequence[Tensor] | None = None,
        quality: Tensor | None = None,
    ) -> Assessment:
        """`assess` behind its checks; arguments as `fuse_checked`."""
        raise NotImplementedError(f"{type(self).__name__} has no reliability to assess")

    def represent(
        self,
        encoded: Sequence[Tensor],
        known: Tensor | None,
        state: Any = None,
        typicality_inputs: Sequence[Tensor] | None = None,
        quality: Tensor | None = None,
    ) -> Represented:
        """What the layers after the fusion run on. Arguments as `fuse_checked`, but `encoded` may hold anything finite where
        `known` is False. By default: the fused frames, whose precision is the number of their modalities."""
        out = self.fuse_checked(blank_missing(encoded, known), known, state, typicality_inputs, quality)
        count = out.confidence.new_full(out.confidence.shape[:-1], len(self.in_dims))
        if known is not None:
            count = known.sum(-1).to(count.dtype)
        some = None if known is None else known.any(-1, keepdim=True)
        return Represented(out.fused.unsqueeze(2), count.clamp(min=1).log().unsqueeze(-1), some, out, out.state)

    def mix(
        self,
        estimates: Tensor,
        found: Represented,
        known: Tensor | None,
        frame: Tensor | None,
        foreign: Tensor | None = None,
    ) -> Mixed:
        """(B, T, K, C) estimates, one a track of `found` -> the prediction. frame (B, T): what is no padding; None: all. foreign
        (B, T, 1 + M): of `ForeignFilter`, for a fusion that `has_reliability`."""
        out: FusionOutput = found.gate
        shares = torch.ones_like(estimates[..., 0])
        return Mixed(estimates[:, :, 0], shares, out.weights, out.confidence, out.stage)


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
    """Experts weighed frame by frame: each modality's values (a Linear), and with `joint` those of all of them together (two
    layers on the features side by side), each with its LayerNorm (with `norm`) inside the fused op."""

    tracks_modalities = True
    default_memory = (8.0, 32.0, 128.0)
    default_stuck = 8
    detach_weights = False  # see ReliabilityFusion

    def __init__(self, in_dims: Mapping[str, int] | Sequence[int], dim: int, norm: bool, joint: bool) -> None:
        super().__init__(in_dims, dim)
        check_bool("norm", norm)
        check_bool("joint", joint)
        if joint and len(self.in_dims) == MAX_MODALITIES:
            raise ValueError(
                f"joint: expected False with {MAX_MODALITIES} modalities (there is room for no more), got True"
            )
        self.experts = len(self.in_dims) + joint
        self.value = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.joint = None
        if joint:
            self.joint = nn.Sequential(nn.Linear(sum(self.in_dims), dim), nn.SiLU(), nn.Linear(dim, dim))
        self.norm_weight = nn.Parameter(torch.ones(self.experts, dim)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(self.experts, dim)) if norm else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm_weight is not None}, joint={self.joint is not None}"

    @property
    def weights_dtype(self) -> torch.dtype | None:
        return getattr(self.value[0].weight, "dtype", None)  # of a dynamically quantised Linear the weight is a method

    def values(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Each expert's values before their LayerNorm, (B, T, dim); `x` zero where missing."""
        own = [linear(v) for linear, v in zip(self.value, x)]
        return own if self.joint is None else [self.joint(torch.cat(list(x), -1)), *own]

    def expert_flags(self, known: Tensor | None, frame: Tensor | None = None) -> Tensor | None:
        """(B, T, M) -> (B, T, K): the joint expert counts where any modality does, or, given `frame` (B, T), in all of those."""
        if known is None or self.joint is None:
            return known
        first = known.any(-1) if frame is None else frame
        return torch.cat([first.unsqueeze(-1), known], -1)

    def tracks(self, encoded: Sequence[Tensor], known: Tensor | None) -> Tensor:
        """(B, T, K, dim): each expert's normed values, those of a modality 0 where it is missing. `encoded`: M tensors
        (B, T, d), finite even where `known` is False."""
        values = self.values(blank_missing(encoded, known))
        if self.norm_weight is not None and self.norm_bias is not None:
            values = [
                F.layer_norm(v, (v.shape[-1],), self.norm_weight[k].to(v.dtype), self.norm_bias[k].to(v.dtype))
                for k, v in enumerate(values)
            ]
        return torch.stack(blank_missing(values, self.expert_flags(known)), 2)

    def gate(
        self, values: list[Tensor], assessed: Assessment, present: Tensor | None, norm: bool
    ) -> tuple[Tensor, ...]:
        """`reliability_fusion` of these values, of what `assess_checked` said, and of `present` (B, T, K)."""
        raise NotImplementedError

    def _weighed(
        self,
        values: list[Tensor],
        reliability: Tensor,
        stage: Tensor | None,
        present: Tensor | None,
        norm: bool,
        **calibration: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`reliability_fusion`, with the experts' LayerNorm if `norm` asks for it (and they have one)."""
        weight, bias = (self.norm_weight, self.norm_bias) if norm else (None, None)
        return functional.reliability_fusion(
            values, reliability, stage, present=present, norm_weight=weight, norm_bias=bias, **calibration
        )

    def look(
        self,
        x: Sequence[Tensor],
        known: Tensor | None,
        state: Any,
        typicality_inputs: Sequence[Tensor] | None,
        quality: Tensor | None,
    ) -> Assessment:
        """What it goes by in weighing."""
        raise NotImplementedError

    def fuse_checked(
        self,
        x: list[Tensor],
        known: Tensor | None,
        state: Any = None,
        typicality_inputs: Sequence[Tensor] | None = None,
        quality: Tensor | None = None,
    ) -> FusionOutput:
        found = self.look(x, known, state, typicality_inputs, quality)
        fused, shares, confidence = self.gate(self.values(x), found, self.expert_flags(known), True)
        weights, joint = self._apart(shares)
        own = confidence[..., -len(x) :]
        return FusionOutput(fused, weights, own, found.stage, found.state, nothing_refused(x), joint)

    def _apart(self, shares: Tensor) -> tuple[Tensor, Tensor | None]:
        """(*, K) shares -> those of the modalities among themselves, and that of the joint expert."""
        if self.joint is None:
            return shares, None
        own = shares[..., 1:]
        total = own.sum(-1, keepdim=True)
        tiny = torch.finfo(total.dtype).tiny
        return torch.where(total > tiny, own / total.clamp(min=tiny), 0.0), shares[..., 0]

    def represent(
        self,
        encoded: Sequence[Tensor],
        known: Tensor | None,
        state: Any = None,
        typicality_inputs: Sequence[Tensor] | None = None,
        quality: Tensor | None = None,
    ) -> Represented:
        encoded = blank_missing(encoded, known)
        found = self.look(encoded, known, state, typicality_inputs, quality)
        assert found.log_precision is not None
        return Represented(
            self.tracks(encoded, known), found.log_precision, self.expert_flags(known), found, found.state
        )

    def mix(
        self,
        estimates: Tensor,
        found: Represented,
        known: Tensor | None,
        frame: Tensor | None,
        foreign: Tensor | None = None,
    ) -> Mixed:
        assessed: Assessment = found.gate
        present = known
        if known is not None and self.joint is not None:  # what it remembers is an estimate too
            present = self.expert_flags(known, torch.ones_like(known[..., 0]) if frame is None else frame)
        gate = self.gate if foreign is None else functools.partial(self.doubting_gate, foreign)
        values, apart = list(estimates.unbind(2)), self.training and self.detach_weights
        taken = assessed
        if apart:
            detached = assessed.reliability.detach(), assessed.log_precision, assessed.stage.detach()
            taken = Assessment(*detached, assessed.state)  # torch 2.6 traces no _replace
        prediction, shares, confidence = gate(values, taken, present, False)
        if apart:  # the same numbers once more, for their own score
            confidence = gate([v.detach() for v in values], assessed, present, False)[2]
        return Mixed(prediction, shares, self._apart(shares)[0], confidence, assessed.stage)

    def doubting_gate(
        self, foreign: Tensor, values: list[Tensor], assessed: Assessment, present: Tensor | None, norm: bool
    ) -> tuple[Tensor, ...]:
        """`gate` where streams may be foreign, foreign (B, T, 1 + M)."""
        raise NotImplementedError(f"{type(self).__name__} has no reliability to doubt")


class ReliabilityFusion(_WeightedFusion):
    """Fuse `M` modalities by a calibrated, stage-adaptive reliability: the drop-in for a concat or a gate.

    Value path: a Linear a modality to `dim`, then (with `norm`) a LayerNorm a modality inside the fused op. With `joint` one
    more expert looks at all modalities together, and is weighed as they are.

    Reliability path, with its own parameters, on the *detached* features (so that confidence never bends the
    representation). Who is to be trusted is said by two readers of different evidence. The *heads*, one an expert, read what
    tells how good a signal is and nothing of what it says: typicality (see `Typicality`) and, where there is some, quality (see
    `Quality`), and give `stages` logits. The *stage* reads that and what is learnt from the features (a per-frame encoder a
    modality to `evidence_dim`); its emissions are filtered causally by `stage_filter`. `reliability_fusion` mixes, calibrates
    and weights with a learnt positive `sharpness` (1 at the start).

    Args:
        in_dims: feature size a modality, 1 to 8 of them: a sequence, or a mapping name -> size.
        dim: size of the fused representation.
        stages: number S of latent interaction stages, 1 to 16.
        evidence_dim: size of the learnt evidence a modality.
        norm: LayerNorm with affine on each modality's values.
        detach_evidence: stop the reliability path's gradient at the features.
        detach_weights: in `SAGE`, stop the prediction's gradient at the confidences that weigh the experts: their own score
            alone teaches them. A prediction wants the weights of experts whose errors go together, not what each knows.
        filter_stages: False: the stage posterior of a frame is the softmax of its own emissions (uniform in a frame
            without evidence), and there is no transition to learn.
        quality_dims: how many numbers of quality each modality has: a mapping name -> Q_m, in which modalities may be left out,
            or a sequence. None: none have any.
        joint: the further expert; at most 7 modalities then. Weights stay those of the modalities among themselves, and
            `FusionOutput.joint` is its share of the whole.
        typicality_dims: sizes of the `typicality_inputs`, which then also have a residual, once `fit_inputs` has seen
            training data. None: no residual.
        frame_precision: the heads also say how precise a single frame is, which `SAGE`'s memory weighs frames by: its errors may
            average out, so that it is not the confidence in an estimate.

    The calibration `log_temperature` and `bias`, both (K, S) for the K experts, are buffers: saved with the module, never
    trained by an optimiser; `sage_ext.calibration` fits them after training.

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
        detach_weights: bool = True,
        filter_stages: bool = True,
        quality_dims: Mapping[str, int] | Sequence[int] | None = None,
        joint: bool = False,
        typicality_dims: Sequence[int] | None = None,
        frame_precision: bool = False,
    ) -> None:
        super().__init__(in_dims, dim, norm, joint)
        check_int("stages", stages, 1, MAX_STAGES)
        check_int("evidence_dim", evidence_dim, 1)
        check_bool("frame_precision", frame_precision)
        modalities = len(self.in_dims)
        self.stages, self.evidence_dim = stages, evidence_dim
        self.detach_evidence, self.detach_weights = detach_evidence, detach_weights
        self.frame_precision = frame_precision
        self.quality_dims = quality_sizes(quality_dims, self.names, modalities)

        self.typicality_dims = None if typicality_dims is None else list(typicality_dims)
        self.typicality = Typicality(modalities, dims=typicality_dims)
        self.quality = Quality(self.quality_dims) if sum(self.quality_dims) else None
        given = [self.typicality.features + QUALITY_FEATURES * q for q in self.quality_dims]
        self.evidence = nn.ModuleList(nn.Sequential(nn.Linear(d, evidence_dim), nn.GELU()) for d in self.in_dims)
        # Stages begin apart, each trusting modalities in turn, and equally believed: if they began alike, the one that
        # happened to fit best would take all the belief, and the others would never learn.
        leaning = torch.where(torch.arange(stages) % modalities == torch.arange(modalities)[:, None], 1.0, -1.0)
        if modalities == 1:
            leaning = torch.zeros(1, stages)
        widths = given
        if joint:
            widths, leaning = [sum(given), *given], torch.cat([torch.zeros(1, stages), leaning])
        more = torch.zeros(stages if frame_precision else 0)
        self.reliability = nn.ModuleList(
            _mlp(width, evidence_dim, torch.cat([lean, lean * 0.5 if frame_precision else more]), 0.3)
            for width, lean in zip(widths, leaning)
        )
        self.emission = _mlp(sum(given) + modalities * evidence_dim, evidence_dim, torch.zeros(stages), 0.3)
        # Stages last for seconds, not frames: P(stay) = 0.95 before training.
        stay = torch.eye(stages) * math.log(19.0 * max(stages - 1, 1))
        self.transition = nn.Parameter(stay) if filter_stages else None
        self.sharpening = nn.Parameter(torch.zeros(()))
        self.register_buffer("log_temperature", torch.zeros(self.experts, stages))
        self.register_buffer("bias", torch.zeros(self.experts, stages))

    @property
    def sharpness(self) -> Tensor:
        """() how strongly confidence turns into weight; positive."""
        return (SHARPENING_RATE * self.sharpening).exp()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, stages={self.stages}, evidence_dim={self.evidence_dim}, "
            f"detach_evidence={self.detach_evidence}, detach_weights={self.detach_weights}, "
            f"filter_stages={self.transition is not None}, "
            f"quality_dims={self.quality_dims}, frame_precision={self.frame_precision}"
        )

    def reliability_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the reliability path but for the sharpness, which has a rate of its own."""
        for part in (self.evidence, self.reliability, self.emission):
            yield from part.parameters()
        if self.transition is not None:
            yield self.transition

    def assess_checked(
        self,
        x: Sequence[Tensor],
        known: Tensor | None = None,
        state: FusionState | None = None,
        typicality_inputs: Sequence[Tensor] | None = None,
        quality: Tensor | None = None,
    ) -> Assessment:
        """The reliability path alone. `x`: M tensors (B, T, d), zero where `known` (B, T, M) is False. `typicality_inputs`: what
        typicality reads in their place; shapes (B, T, anything). `quality`: (B, T, sum of the columns), NaN where unknown."""
        if self.detach_evidence:
            x = [v.detach() for v in x]
        inputs = x if typicality_inputs is None else [v.detach() for v in typicality_inputs]
        typical, (energy, counted, last) = self.typicality(
            inputs, known, None if state is None else (state.energy, state.counted, state.last)
        )
        sums = None
        told: list[list[Tensor]] = [[typical[:, :, m].to(v.dtype)] for m, v in enumerate(x)]
        if self.quality is not None:
            if quality is None:
                quality = x[0].new_full((*x[0].shape[:2], sum(self.quality_dims)), math.nan, dtype=typical.dtype)
            parts, sums = self.quality(quality, None if state is None else state.quality)
            for m, part in enumerate(parts):
                told[m].append(part.to(x[m].dtype))
        signs = blank_missing([torch.cat(parts, -1) for parts in told], known)
        learnt = blank_missing([encoder(v) for encoder, v in zip(self.evidence, x)], known)
        heads = signs if self.joint is None else [torch.cat(signs, -1), *signs]
        logits = torch.stack([head(v) for head, v in zip(self.reliability, heads)], 2)
        emission = self.emission(torch.cat([*learnt, *signs], -1))
        if emission.dtype in (torch.float16, torch.bfloat16):  # autocast: gating stays in float32
            logits, emission = logits.float(), emission.float()
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
        reliability, log_precision = logits[..., : self.stages], None
        if self.frame_precision:
            log_precision = (stage.unsqueeze(2) * logits[..., self.stages :]).sum(-1)
        return Assessment(reliability, log_precision, stage, FusionState(belief, energy, counted, last, sums))

    look = assess_checked

    def gate(
        self, values: list[Tensor], assessed: Assessment, present: Tensor | None, norm: bool
    ) -> tuple[Tensor, ...]:
        calibration = {"log_temperature": self.log_temperature, "bias": self.bias, "sharpness": self.sharpness}
        return self._weighed(values, assessed.reliability, assessed.stage, present, norm, **calibration)

    def doubting_gate(
        self, foreign: Tensor, values: list[Tensor], assessed: Assessment, present: Tensor | None, norm: bool
    ) -> tuple[Tensor, ...]:
        # To the op the hypotheses are further stages: in that of m, modality m and the joint expert explain nothing, and the
        # others what they do anyway. So r becomes r times the probability of the hypotheses that leave it alone.
        calibrated = assessed.reliability * (-self.log_temperature).exp() + self.bias
        n = (assessed.stage.unsqueeze(-2) * (-calibrated).sigmoid()).sum(-1)
        r = (assessed.stage.unsqueeze(-2) * calibrated.sigmoid()).sum(-1)
        tiny = torch.finfo(r.dtype).tiny
        overall = (r.clamp(min=tiny).log() - n.clamp(min=tiny).log()).unsqueeze(-1)  # (B, T, K, 1)
        modalities, count = len(self.in_dims), self.experts
        hit = torch.eye(modalities, dtype=torch.bool, device=r.device)
        if count > modalities:
            hit = torch.cat([torch.ones_like(hit[:1]), hit])  # (K, M)
        further = torch.where(hit, -1e4, overall)
        stage = torch.cat([assessed.stage * foreign[..., :1], foreign[..., 1:]], -1)
        logits = torch.cat([calibrated, further], -1)
        return self._weighed(values, logits, stage.to(logits.dtype), present, norm, sharpness=self.sharpness)

    def fit_inputs(self, batches: Iterable[tuple[Sequence[Tensor], Tensor | None, Tensor | None]]) -> None:
        self.typicality.fit(batches)
        if self.quality is not None:
            self.quality.fit(quality for _, _, quality in batches)

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
    """The baseline of `ReliabilityFusion`: the same value path, equal weights over the experts that have something to say.

    Confidence is 1/2 where present (nothing is known of it), there is one stage, and no state.
    """

    def __init__(
        self, in_dims: Mapping[str, int] | Sequence[int], dim: int, *, norm: bool = True, joint: bool = False
    ) -> None:
        super().__init__(in_dims, dim, norm, joint)

    def look(
        self,
        x: Sequence[Tensor],
        known: Tensor | None,
        state: Any,
        typicality_inputs: Sequence[Tensor] | None,
        quality: Tensor | None,
    ) -> Assessment:
        batch, frames, dtype = *x[0].shape[:2], arithmetic_dtype(x[0])
        alike = x[0].new_zeros(batch, frames, self.experts, dtype=dtype)
        stage = x[0].new_ones(batch, frames, 1, dtype=dtype)
        return Assessment(alike.unsqueeze(-1), alike, stage, None)

    def gate(
        self, values: list[Tensor], assessed: Assessment, present: Tensor | None, norm: bool
    ) -> tuple[Tensor, ...]:
        return self._weighed(values, assessed.reliability, None, present, norm)
