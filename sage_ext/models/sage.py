"""SAGE, the reference model: temporal encoders, stage-adaptive reliability fusion, valence-arousal head."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .._arguments import (
    BOOL,
    CONSTANTS,
    MAX_MEMORY,
    MAX_MODALITIES,
    Features,
    Present,
    QualityValues,
    blank_missing,
    by_modality,
    check_bool,
    check_dropout,
    check_int,
    check_number,
    check_optional,
    check_shape,
    check_tensor,
    join_flags,
    named_dims,
    ordered_features,
    ordered_present,
    ordered_quality,
    quality_sizes,
    read_flags,
    storable,
    take_finite,
)
from .._distributed import check_group, merge_ranks, warn_apart
from .._typing import called_as
from ..files import parsing
from ..nn import ExplainedVarianceNLL, Fusion, Quality, ReliabilityFusion, UniformFusion, calibrated_confidence
from ..nn.foreign import ForeignFilter, check_trust
from ..nn.fusion import Assessment, Represented
from ..nn.losses import mean_counted
from .fusions import fusion_class
from .layers import ChannelDropout, Encoder, PrecisionMemory, TemporalBlock
from .pretrained import CONFIG, precision_of, read_folder, write_folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..stream import StreamingSession

DEAD = 1e-5  # a feature whose spread is below this share of its modality's mean spread is dead: it is not used
# Of `ForeignFilter`, in frames at 30 a second: label and error change within about a second; whose voice it is, within a minute.
PACE, DWELL = 30.0, 1800.0
MAY_BE_FOREIGN = 0.3  # share of time
Trust = Mapping[str, float | str] | Sequence[float]
RARE = 1000  # one frame in so many may repeat for longer than is natural to its modality
MAX_STUCK = 2**24  # the largest number of repeats up to which the streaming engines, in float32, count


@storable
class SAGEState(NamedTuple):
    """What a causal `SAGE` carries from one chunk to the next. All tensors; a new sequence starts from zeros, `foreign` from the
    log of its prior."""

    # The last inputs of each block's convolution before the fusion: (B, M, (kernel_size - 1) * dilation, dim) a block.
    history: tuple[Tensor, ...]
    # The same after it: (B, K, (kernel_size - 1) * dilation, dim) a block, of the fusion's K tracks: the joint expert and each
    # modality; the modalities only (late fusion, one modality); the fused frames only (other peers).
    fused: tuple[Tensor, ...]
    fusion: tuple[Tensor, ...] | None  # a FusionState, a peer's own, or None: nothing to remember
    memory: Tensor | None  # (B, K, R, dim + 2) float32: `PrecisionMemory`'s sums; None without one
    # (repeats (B, M), last (B, sum of in_dims)): how often each modality's last frame has repeated, at most its `stuck_limit`,
    # and that frame, standardised, 0 where missing; None with `stuck` 0
    still: tuple[Tensor, Tensor] | None
    foreign: Tensor | None = None  # (B, 1 + M) log-belief of `ForeignFilter`; None without `trust`


@storable
class SAGEOutput(NamedTuple):
    """Result of `SAGE`, for `B` sequences, `T` frames, `M` modalities, `C` targets, `S` stages."""

    prediction: Tensor  # (B, T, C) in (-1, 1), float32 (float64 for float64 features)
    unimodal: Tensor  # (B, T, M, C) each modality's own prediction; meaningful where it is present
    weights: Tensor  # (B, T, M) of the modalities among themselves: sums to 1 where any is present; 0 where missing
    confidence: Tensor  # (B, T, M) the share of the targets' variance that the modality's own prediction explains
    stage: Tensor  # (B, T, S)
    state: SAGEState | None  # of a causal model, for the next chunk
    # (M,) int64: the frames of each modality that were said to be present, and no padding, but, once standardised, held NaN,
    # Inf or numbers whose squares overflow float32. They count as missing.
    nonfinite: Tensor
    experts: Tensor  # (B, T, K, C) the estimates that were weighed: the joint expert's, then the modalities'; peers': the fused
    shares: Tensor  # (B, T, K) `prediction` is the sum of `shares * experts`
    expert_confidence: Tensor  # (B, T, K) the confidence of each; of a peer, (B, T, M)
    # Of a fusion with reliability in training mode, for `SAGELoss`: what each expert's single frame says of the targets,
    # (B, T, K, C), and the log of the precision that the memory counts it by, (B, T, K).
    frame_estimates: Tensor | None = None
    frame_log_precision: Tensor | None = None


class SAGE(nn.Module):
    """Stage-Adaptive Gated Estimation of valence and arousal from several modalities.

    Each modality: standardised features -> Linear -> temporal convolutions (dilated, depthwise-separable, causal or
    centred). From there on `K` experts run side by side through the same layers: each modality alone, and a joint one that sees
    all of them (where there are 2 to 7). Those layers are the widest of the convolutions, plus `PrecisionMemory`, which counts
    a frame by how precise it is, then head and tanh. Last, the experts' estimates are weighed by their confidence
    (`ReliabilityFusion`). Long averages come after the modalities' encoders because they should not mix precise frames with
    imprecise ones before those are told apart. Typicality, a part of the fusion, reads the standardised inputs.

    Two quantities are kept apart. The precision of a *frame*, which the memory goes by, says how much the frame adds: the odds of
    the share of the targets' variance that a Linear on that frame alone explains. Only training runs that Linear; its errors
    depend on the stage much more than those of estimates that average over time, and are what the stages are learnt from.
    The confidence of an *estimate* says how much of the targets' variance it explains, all that was remembered included; it
    decides the weights, and is what a user reads. It is trained by the errors of each expert's own estimate (`SAGELoss`), and
    calibrated on other data (`sage_ext.calibration`).

    The unimodal predictions are what the model would say if it had one modality only. (Only the stage is still told by all
    modalities.) With a peer's fusion they are those of a linear head a modality on its encoder.

    A frame in which a modality is missing enters its encoder as zeros, that is (after `fit_statistics`) as the mean
    frame of the training data; whatever the tensor holds there, NaN included, reaches nothing. A modality whose frame is
    not finite is missing, whatever `present` says. One whose features stand perfectly still for longer than is natural to it
    is missing too: a muted microphone and a frozen picture repeat themselves to the last digit, a live one does not. How
    long words and flags rest while all is well, `fit_statistics` learns.

    Args:
        in_dims: feature size a modality, 1 to 8: a mapping name -> size, or a sequence.
        dim: width of encoders, fusion and head.
        stages: number of latent interaction stages, 1 to 16.
        num_targets: C, 2 for valence and arousal.
        blocks: temporal blocks on the way from input to head, with dilations 1, 2, 4, ...; the receptive field is
            `1 + (kernel_size - 1) * (2**blocks - 1)` frames (61 with the defaults).
        fused_blocks: how many of them, the widest, follow the fusion; the others run in each modality. Default: half.
        kernel_size: taps of each convolution.
        dropout: probability, in projections and blocks.
        causal: False centres the convolutions (offline use: no state, no streaming). A fusion that sees the future
            makes the model non-causal too: the attribute `causal` is False, `state` is None, the convolutions stay as
            asked for here.
        evidence_dim: size of the learnt evidence a modality in `ReliabilityFusion`.
        quality_dims: how many numbers of quality each modality has, see `ReliabilityFusion`. A fusion without reliability gets
            them as further features of the modality (standardised, 0 where unknown) with a flag each that says if it is known.
        trust: whose stream a modality's is, as a prior: a mapping name -> the share of time in which that stream belongs to
            somebody else than the labels, or "may be foreign" for .3. None: nobody doubts. See `ForeignFilter`; not used in
            training mode. It may be changed at any time (`set_trust`), and needs a calibrated model.
        joint: None: a joint expert where there are 2 to 7 modalities and the fusion weighs experts; False: none.
        fusion: "reliability", "uniform" (equal weights over the present modalities: the baseline), or a peer of
            `models.peers.FUSIONS`.
        fusion_options: keyword arguments of the fusion's constructor beyond those given here.
        length: frames of every call, for a fusion of fixed length; not used by any other. The attribute `length` holds
            it, or None where any length goes.
        use_present: False hides from the fusion which modalities are missing: they are the mean frame, and look
            present (an ablation).
        memory: half-lives, in frames, of the averages that `PrecisionMemory` keeps; () for none. Default: 8, 32 and 128;
            none with a peer's fusion, whose frames all have the precision of their number of modalities.
        stuck: the fewest repeats in a row after which a modality is missing: a frame that repeats the one before it exactly, as
            do the `stuck - 1` before it; 0: a frame may repeat for ever. Default: 8; 0 with a peer's fusion, and where
            `use_present` hides what is missing.

    The buffer `stuck_limit` (M,) int64 holds the number that each modality goes by, 0 where it may repeat for ever. It is
    `stuck` until `fit_statistics` raises it for a modality that naturally rests. The buffers `own_gain` and `own_shift` (K, C)
    and `target_variance` (C) say what an expert's estimate explains of the targets: its squared error is that of
    `own_gain * estimate + own_shift`, relative to the variance. `sage_ext.calibration` fits them; they are 1, 0 and 1 before.

    Raises TypeError or ValueError naming the argument for anything malformed.
    """

    quality_mean: Tensor  # these two where there are quality_dims
    quality_scale: Tensor

    def __init__(
        self,
        in_dims: Mapping[str, int] | Sequence[int],
        *,
        dim: int = 128,
        stages: int = 4,
        num_targets: int = 2,
        blocks: int = 4,
        fused_blocks: int | None = None,
        kernel_size: int = 5,
        dropout: float = 0.1,
        causal: bool = True,
        evidence_dim: int = 32,
        quality_dims: Mapping[str, int] | Sequence[int] | None = None,
        joint: bool | None = None,
        trust: Trust | None = None,
        fusion: str = "reliability",
        fusion_options: Mapping[str, Any] | None = None,
        length: int = 300,
        use_present: bool = True,
        memory: Sequence[float] | None = None,
        stuck: int | None = None,
    ) -> None:
        super().__init__()
        self.names, self.in_dims = named_dims(in_dims)
        check_int("dim", dim, 1)
        check_int("num_targets", num_targets, 1)
        check_int("blocks", blocks, 1, 12)
        if fused_blocks is None:
            fused_blocks = blocks // 2
        check_int("fused_blocks", fused_blocks, 0, blocks)
        check_int("kernel_size", kernel_size, 1)
        check_dropout(dropout)
        check_bool("causal", causal)
        check_bool("use_present", use_present)
        if not isinstance(fusion_options, (Mapping, type(None))):
            raise TypeError(f"fusion_options: expected a mapping or None, got {type(fusion_options).__name__}")
        check_int("length", length, 1)
        fusion_type = fusion_class(fusion)
        weighs = issubclass(fusion_type, (ReliabilityFusion, UniformFusion))
        if joint is None:
            joint = weighs and 2 <= len(self.in_dims) < MAX_MODALITIES
        check_bool("joint", joint)
        if joint and not weighs:
            raise ValueError(f"joint: expected False with fusion={fusion!r}, which weighs no experts, got True")
        self.quality_dims = quality_sizes(quality_dims, self.names, len(self.in_dims))
        if memory is None:
            memory = fusion_type.default_memory
        _check_memory(memory)
        if stuck is None:
            stuck = fusion_type.default_stuck if use_present else 0
        check_int("stuck", stuck, 0, MAX_STUCK)
        if stuck and not use_present:
            raise ValueError(f"stuck: expected 0 (use_present=False hides what is missing), got {stuck}")
        options: dict[str, Any] = dict(fusion_options or {})
        self.config: dict[str, Any] = {
            "in_dims": dict(in_dims) if isinstance(in_dims, Mapping) else list(in_dims),
            "dim": dim,
            "stages": stages,
            "num_targets": num_targets,
            "blocks": blocks,
            "fused_blocks": fused_blocks,
            "kernel_size": kernel_size,
            "dropout": dropout,
            "causal": causal,
            "evidence_dim": evidence_dim,
            "quality_dims": dict(zip(self.names, self.quality_dims)) if self.names else self.quality_dims,
            "joint": joint,
            "trust": None,  # below
            "fusion": fusion,
            "fusion_options": dict(options),
            "length": length,
            "use_present": use_present,
            "memory": [float(h) for h in memory],
            "stuck": stuck,
        }
        self.causal = causal and fusion_type.causal
        self.length = length if fusion_type.fixed_length else None
        self.num_targets, self.use_present = num_targets, use_present
        self.stuck = stuck
        for m, d in enumerate(self.in_dims):
            self.register_buffer(f"input_mean_{m}", torch.zeros(d))
            self.register_buffer(f"input_scale_{m}", torch.ones(d))
        self.stuck_limit: Tensor  # int64: exact whatever dtype the model is cast to
        self.register_buffer("stuck_limit", torch.full((len(self.in_dims),), stuck))
        own = blocks - fused_blocks
        # A fusion without a reliability path reads quality as it reads everything else.
        self.as_features = sum(self.quality_dims) > 0 and not fusion_type.has_reliability
        extra = [2 * q if self.as_features else 0 for q in self.quality_dims]
        if self.as_features:
            self.register_buffer("quality_mean", torch.zeros(sum(self.quality_dims)))
            self.register_buffer("quality_scale", torch.ones(sum(self.quality_dims)))
        self.encoders = nn.ModuleList(
            Encoder(d + more, dim, own, kernel_size, dropout, causal) for d, more in zip(self.in_dims, extra)
        )
        if weighs:
            options = {"joint": joint, **options}
        if fusion_type.has_reliability:
            options = {
                "stages": stages,
                "evidence_dim": evidence_dim,
                "quality_dims": self.quality_dims,
                "typicality_dims": self.in_dims,
                "frame_precision": True,
                **options,
            }
        if self.length is not None:
            options["length"] = length
        encoded = [dim] * len(self.in_dims)
        self.fusion: Fusion = fusion_type(dict(zip(self.names, encoded)) if self.names else encoded, dim, **options)
        self.unimodal = None
        if not fusion_type.tracks_modalities:
            self.unimodal = nn.ModuleList(nn.Linear(dim, num_targets) for _ in self.in_dims)
        self.fused_blocks = nn.ModuleList(
            TemporalBlock(dim, kernel_size, 2**i, dropout, causal) for i in range(own, blocks)
        )
        self.memory = PrecisionMemory(dim, self.config["memory"], causal) if memory else None
        experts = len(self.in_dims) + joint
        self.own_gain: Tensor
        self.own_shift: Tensor
        self.target_variance: Tensor
        self.register_buffer("own_gain", torch.ones(experts, num_targets))
        self.register_buffer("own_shift", torch.zeros(experts, num_targets))
        self.register_buffer("target_variance", torch.ones(num_targets))
        self.frame_heads = None
        if fusion_type.has_reliability:
            self.frame_heads = nn.ModuleList(nn.Linear(dim, num_targets) for _ in range(experts))
        self.foreign: ForeignFilter | None = None
        self.set_trust(trust)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), ChannelDropout(dropout), nn.Linear(dim, num_targets))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SAGE:
        """The model that `model.config` describes, freshly initialised."""
        return cls(**config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write config.json, model.safetensors and, if there is none, a model card README.md into `folder`, which is made if it
        is not there: the layout of the Hugging Face Hub. Nothing is pickled. An older model there is replaced."""
        config: dict[str, Any] = {**self.config}
        if self.foreign is not None:
            config["doubt"] = {"pace": self.foreign.pace, "dwell": self.foreign.dwell}
        return write_folder(folder, config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> SAGE:
        """The model of a folder that `save_pretrained` wrote, in evaluation mode, its weights in the dtype that they had.

        FileNotFoundError for a folder that is not there or lacks a file; ValueError that names the file for one that is
        damaged, that was edited, or whose weights are another model's.
        """
        config, state = read_folder(folder)
        with parsing(Path(folder) / CONFIG):
            doubt = config.pop("doubt", None)
            model = cls.from_config(config).to(precision_of(state))
            model.load_state_dict(state)
            if doubt is not None:
                model.set_trust(config["trust"], **doubt)
        return model.to(device).eval()

    def extra_repr(self) -> str:
        return f"causal={self.causal}"

    def set_trust(self, trust: Trust | None, pace: float = PACE, dwell: float = DWELL) -> None:
        """Which modality's stream may belong to somebody else, see `trust` above; `pace` and `dwell`, in frames, are those of
        `ForeignFilter` (`Run.load` knows the rate). A state from before does not fit."""
        self.config["trust"], self.foreign = None, None
        if trust is None:
            return
        if not isinstance(self.fusion, ReliabilityFusion):
            raise ValueError(
                f"trust: expected None with fusion={self.config['fusion']!r}, which doubts nobody, got {trust!r}"
            )
        prior = ordered_trust(trust, self.names, len(self.in_dims))
        self.foreign = ForeignFilter(prior, pace, dwell).to(self.own_gain.device)
        self.config["trust"] = dict(zip(self.names, prior)) if self.names else prior

    def reliability_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the reliability path: little is asked of them by each frame, and they take a higher rate."""
        if isinstance(self.fusion, ReliabilityFusion):
            assert self.frame_heads is not None
            yield from self.fusion.reliability_parameters()
            yield from self.frame_heads.parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As of any module; weights from before limits were learnt go by `stuck`."""
        state_dict.setdefault(f"{prefix}stuck_limit", torch.full((len(self.in_dims),), self.stuck))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ------------------------------------------------------------------------------------------------- statistics
    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Fit the input standardisation, how long each modality may stand still, and the typicality statistics on clean
        training data, before training.

        A modality's natural rest is the smallest number of repeats in a row that at most one in a thousand of its frames
        exceeds. Twice that, and no less than `stuck`, becomes its limit. Where that reaches the length of the windows, they
        cannot show how long it rests, and it is never stuck (`stuck_limit` 0).

        `batches`: dicts with "features", and optionally "present" (B, T, M), "frame" (B, T) and "quality": what the windows'
        `collate` gives. Iterated more than once, so a one-shot iterator is a TypeError. Without this call inputs are used as
        they are, typicality follows the training batches by momentum, and every limit is `stuck`. A frame that is not
        finite is missing; for the standardisation it is judged by its features as they are.
        """
        if iter(batches) is batches:
            raise TypeError(
                "batches: expected something to iterate over again and again (a list or a DataLoader), got an iterator"
            )
        device = next(self.parameters()).device
        n = [torch.zeros((), dtype=torch.float64, device=device) for _ in self.in_dims]
        mean = [torch.zeros(d, dtype=torch.float64, device=device) for d in self.in_dims]
        m2 = [torch.zeros(d, dtype=torch.float64, device=device) for d in self.in_dims]
        for batch in batches:
            x, known, _ = self._inputs(batch["features"], batch.get("present"), batch.get("frame"), device)
            x, known, _ = take_finite(x, known)
            for m, v in enumerate(x):
                rows = v[known[..., m]].double()
                if not len(rows):
                    continue
                gap = rows.mean(0) - mean[m]
                joint = n[m] + len(rows)
                m2[m] += (rows - rows.mean(0)).square().sum(0) + gap * gap * n[m] * len(rows) / joint
                mean[m] += gap * len(rows) / joint
                n[m] = joint
        for m in range(len(self.in_dims)):
            if n[m] < 2:
                label = self.names[m] if self.names else m
                raise ValueError(f"batches: expected 2 frames or more with modality {label}, got {int(n[m])}")
            std = (m2[m] / n[m]).sqrt()
            alive = std > DEAD * std.mean()
            self.get_buffer(f"input_mean_{m}").copy_(mean[m])
            self.get_buffer(f"input_scale_{m}").copy_(torch.where(alive, 1 / torch.where(alive, std, 1.0), 0.0))
        standardised = _Standardised(self, batches, device)
        if self.as_features:
            quality = Quality(self.quality_dims).to(device)
            quality.fit(found for _, _, found in standardised)
            self.get_buffer("quality_mean").copy_(quality.mean)
            self.get_buffer("quality_scale").copy_(1 / quality.var.clamp(min=CONSTANTS["variance_floor"]).sqrt())
        self.fusion.fit_inputs(standardised)
        if self.stuck:
            rests = [_Rests() for _ in self.in_dims]
            for x, known, _ in standardised:
                repeats = self._repeats(x, known, None)
                for m, rest in enumerate(rests):
                    rest.add(repeats[..., m], None if known is None else known[..., m])
            self.stuck_limit.copy_(torch.tensor([rest.limit(self.stuck) for rest in rests]))

    def _inputs(
        self, features: Features, present: Present | None, mask: Tensor | None, device: torch.device | None = None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """The caller's arguments, checked: M tensors (B, T, D_m), `known` (B, T, M), mask. `known` says that a modality is
        present in a frame that is no padding; None: all are."""
        if device is not None:
            features, present = moved(features, device), moved(present, device)
            mask = None if mask is None else mask.to(device)
        first = self.encoders[0]
        assert isinstance(first, Encoder)
        # Of a dynamically quantised Linear the weight is a method.
        weights = getattr(first.project.weight, "dtype", None)
        x = ordered_features(features, self.names, self.in_dims, "features", weights)
        if x[0].dim() != 3:
            raise ValueError(f"features: expected shape (B, T, D) a modality, got {tuple(x[0].shape)}")
        present, mask = read_flags(x, self.names, present, mask)
        return x, join_flags(present, mask, len(x)), mask

    def _standardise(
        self, x: Sequence[Tensor], known: Tensor | None, strict: bool = False
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Standardised inputs, zero where missing; `known` without the frames that are not finite; how many those are."""
        scaled = [  # torch 2.6 exports no get_buffer
            (v - getattr(self, f"input_mean_{m}").to(v.dtype)) * getattr(self, f"input_scale_{m}").to(v.dtype)
            for m, v in enumerate(x)
        ]
        return take_finite(scaled, known, self.names, strict=strict)

    # ----------------------------------------------------------------------------------------------------- forward
    def encode(
        self, inputs: Sequence[Tensor], mask: Tensor | None = None, history: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Standardised inputs -> M tensors (B, T, dim), and the blocks' histories for the next chunk."""
        encoded, tails = [], []
        for m, (encoder, v) in enumerate(zip(self.encoders, inputs)):
            x, tail = encoder(v, mask, None if history is None else [h[:, m] for h in history])
            encoded.append(x)
            tails.append(tail)
        return encoded, tuple(torch.stack(block, 1) for block in zip(*tails)) if self.causal else ()

    def forward(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        state: SAGEState | None = None,
        *,
        quality: QualityValues | None = None,
        strict: bool = False,
    ) -> SAGEOutput:
        """Estimate a chunk; consecutive chunks with `state` give what one whole call gives.

        Args:
            features: M tensors (B, T, D_m), of the dtype of the model's weights unless autocast is on: a mapping by name, or
                a sequence.
            present: (B, T, M) bool; False: the modality is missing in that frame (not read). Or a mapping that gives each
                modality's (B, T) by name, none left out.
            mask: (B, T) bool; False: padding, in which everything is missing.
            state: `SAGEOutput.state` of the chunk before; None starts a sequence. Causal models only.
            quality: (B, T, Q_m) of the modalities with `quality_dims`: a mapping by name, or a sequence with None for those
                without. NaN, and a modality left out, are unknown.
            strict: raise ValueError, naming modality and place, for a frame that is not finite where it is said to be
                present, rather than take it as missing. Waits for the device, and cannot be compiled in one graph.
        """
        check_bool("strict", strict)
        if state is not None and not self.causal:
            why = "causal=False" if not self.config["causal"] else f"fusion={self.config['fusion']!r}"
            raise ValueError(
                f"state: expected None (only a causal SAGE can be run in chunks; this one was built with {why}), got "
                f"{type(state).__name__}"
            )
        x, known, mask = self._inputs(features, present, mask)
        x, known, nonfinite = self._standardise(x, known, strict)
        x, known, still = self._moving(x, known, None if state is None else state.still)
        evidence = ordered_quality(quality, self.names, self.quality_dims, x[0], known)
        encoded, history = self.encode(self._with_quality(x, evidence), mask, None if state is None else state.history)
        told = self._told(known, mask)
        found = self.fusion.represent(encoded, told, None if state is None else state.fusion, x, evidence)
        estimates, fused, memory = self._estimate(found, mask, state)
        foreign, belief = self._doubt(estimates, found, told, state)
        mixed = self.fusion.mix(estimates, found, told, mask, foreign)
        return SAGEOutput(
            mixed.prediction,
            estimates[:, :, -len(x) :] if self.unimodal is None else self._heads(encoded),
            mixed.weights,
            mixed.confidence[..., -len(x) :],
            mixed.stage,
            SAGEState(history, fused, found.state, memory, still, belief) if self.causal else None,
            nonfinite,
            estimates,
            mixed.shares,
            mixed.confidence,
            *self._single_frames(found),
        )

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...

    def stream(
        self,
        batch_size: int = 1,
        weights_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StreamingSession:
        """A session that takes `batch_size` streams frame by frame, with the results of `forward`.

        It copies the weights as they are now, in `weights_dtype`: float32 (None) or bfloat16, and runs on `device`: the CPU
        (None) or a GPU, wherever the model lies. Causal models with fusion="reliability" or "uniform"; ValueError for any
        other, or for a GPU in a build without CUDA kernels.
        """
        from ..stream import StreamingSession

        return StreamingSession(self, batch_size, weights_dtype, device)

    def assess(
        self,
        features: Features,
        present: Present | None = None,
        mask: Tensor | None = None,
        *,
        quality: QualityValues | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What calibration reads of the K experts: uncalibrated reliability logits (B, T, K, S), stage posterior (B, T, S),
        estimates (B, T, K, C) of whole sequences, and (B, T, K) bool: which have something to say there. Nothing of it depends
        on the calibration. Arguments as `forward`; ValueError with uniform weights."""
        if not isinstance(self.fusion, ReliabilityFusion):
            raise ValueError(f"fusion: expected one that has a reliability to assess, got {self.config['fusion']!r}")
        x, known, mask = self._inputs(features, present, mask)
        x, known, _ = self._standardise(x, known)
        x, known, _ = self._moving(x, known, None)
        evidence = ordered_quality(quality, self.names, self.quality_dims, x[0], known)
        encoded, _ = self.encode(x, mask)
        found = self.fusion.represent(encoded, self._told(known, mask), None, x, evidence)
        estimates, _, _ = self._estimate(found, mask, None)
        assessed: Assessment = found.gate
        assert known is not None  # `_standardise` gave it
        frame = torch.ones_like(known[..., 0]) if mask is None else mask
        flags = self.fusion.expert_flags(known, frame)
        assert flags is not None
        return assessed.reliability, assessed.stage, estimates, flags

    @torch.no_grad()
    def put_to_scale(self, estimates: Tensor, labels: Tensor, counted: Tensor) -> None:
        """Set `own_gain`, `own_shift` and `target_variance` by estimates (*, K, C), labels (*, C) and flags (*, K)."""
        gain, shift, _ = regression(estimates, labels, counted)
        some = counted.any(-1, keepdim=True).unsqueeze(-1)
        variance = regression(labels.unsqueeze(-2), labels, some.squeeze(-1))[2][0]
        for buffer, value in ((self.own_gain, gain), (self.own_shift, shift), (self.target_variance, variance)):
            buffer.copy_(value)

    def reads_quality(self, name: str) -> bool:
        """Whether quality of the modality `name` is an input."""
        return self.names is not None and name in self.names and self.quality_dims[self.names.index(name)] > 0

    def _told(self, known: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """(B, T, M) what the fusion is told of `known`: all of it, or without `use_present` only what is padding."""
        return known if self.use_present else join_flags(None, mask, len(self.in_dims))

    def _moving(
        self, x: list[Tensor], known: Tensor | None, still: tuple[Tensor, Tensor] | None
    ) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, Tensor] | None]:
        """Standardised inputs and `known` without the frames that repeat for the `stuck_limit`th time or more, and
        `SAGEState.still` for the next chunk."""
        if not self.stuck:
            return x, known, None
        repeats = torch.minimum(self._repeats(x, known, still), self.stuck_limit)
        moving = (repeats < self.stuck_limit) | (self.stuck_limit == 0)
        known = moving if known is None else known & moving
        return blank_missing(x, known), known, (repeats[:, -1], torch.cat([v[:, -1] for v in x], -1))

    def _repeats(self, x: list[Tensor], known: Tensor | None, still: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, M) how often each modality's frame has repeated by then, `SAGEState.still` before the first one."""
        batch, frames = x[0].shape[:2]
        if still is None:
            still = (x[0].new_zeros(batch, len(x), dtype=torch.int64), x[0].new_zeros(batch, sum(self.in_dims)))
        repeats, last = still
        # Cut last, not within `cat`: of `v[:, :-1]` the exporter asks whether it has one frame, and T = 2 is then refused.
        before = [torch.cat([b.to(v.dtype).unsqueeze(1), v], 1)[:, :-1] for b, v in zip(last.split(self.in_dims, 1), x)]
        same = torch.stack([(v == b).all(-1) for v, b in zip(x, before)], -1)  # (B, T, M)
        if known is not None:
            same = same & known
        frame = torch.arange(frames, device=same.device)[None, :, None]
        # The last frame that was not a repeat; -1: in an earlier chunk.
        fresh = torch.where(same, -1, frame).cummax(1).values
        return torch.where(fresh >= 0, frame - fresh, frame + 1 + repeats.unsqueeze(1))

    def _with_quality(self, x: list[Tensor], quality: Tensor | None) -> list[Tensor]:
        """What the encoders read: with a fusion that has no reliability path, quality and what is known of it too."""
        if not self.as_features:
            return x
        assert quality is not None
        known = quality.isfinite()
        scaled = (quality - self.quality_mean) * self.quality_scale
        limit = CONSTANTS["typicality_limit"]
        scaled = torch.where(known, scaled, 0.0).clamp(-limit, limit)
        parts = [scaled.split(self.quality_dims, -1), known.to(scaled.dtype).split(self.quality_dims, -1)]
        return [torch.cat([v, a.to(v.dtype), b.to(v.dtype)], -1) for v, a, b in zip(x, *parts)]

    def _estimate(
        self, found: Represented, mask: Tensor | None, state: SAGEState | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Blocks after the fusion, memory and head, on K tracks (B, T, K, dim) in one batch. Estimates (B, T, K, C), and for the
        next chunk the blocks' histories (B, K, span, dim) and the memory's sums (B, K, R, dim + 2)."""
        count = found.tracks.shape[2]
        x = found.tracks.transpose(1, 2).flatten(0, 1)
        mask = None if mask is None else mask.repeat_interleave(count, 0)
        tails = []
        for i, block in enumerate(self.fused_blocks):
            x, tail = block(x, mask, None if state is None else state.fused[i].flatten(0, 1))
            tails.append(tail.unflatten(0, (-1, count)))
        sums = None
        if self.memory is not None:
            if state is not None and state.memory is not None:
                sums = state.memory.flatten(0, 1)
            limit = CONSTANTS["log_precision_limit"]
            # Taught by its own score alone. Were it taught by the prediction too, it would learn to say what the others see: an
            # average can be made to follow anything by choosing what it counts.
            precision = found.log_precision.detach().clamp(-limit, limit).exp()
            if found.known is not None:
                precision = torch.where(found.known, precision, 0.0)
            kept, sums = self.memory(x, precision.transpose(1, 2).flatten(0, 1), sums)
            x, sums = x + kept, sums.unflatten(0, (-1, count))
        return _bounded(self.head(self.norm(x))).unflatten(0, (-1, count)).transpose(1, 2), tuple(tails), sums

    def _doubt(
        self, estimates: Tensor, found: Represented, told: Tensor | None, state: SAGEState | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What `ForeignFilter` gives; nothing without it, or in training."""
        if self.foreign is None or self.training:
            return None, None
        assert isinstance(self.fusion, ReliabilityFusion)
        assessed: Assessment = found.gate
        own = slice(-len(self.in_dims), None)
        confidence = calibrated_confidence(
            assessed.reliability, assessed.stage, self.fusion.log_temperature, self.fusion.bias
        )[..., own]
        scaled = (self.own_gain * estimates + self.own_shift)[..., own, :] * self.target_variance.rsqrt()
        return self.foreign(scaled, confidence, told, None if state is None else state.foreign)

    def _single_frames(self, found: Represented) -> tuple[Tensor | None, Tensor | None]:
        """The last two fields of the output."""
        if self.frame_heads is None or not self.training:
            return None, None
        frames = found.tracks.detach()
        said = [head(frames[:, :, k]) for k, head in enumerate(self.frame_heads)]
        return _bounded(torch.stack(said, 2)), found.log_precision

    def _heads(self, encoded: Sequence[Tensor]) -> Tensor:
        assert self.unimodal is not None
        return _bounded(torch.stack([head(h) for head, h in zip(self.unimodal, encoded)], 2))


def moved(features: Any, device: torch.device) -> Any:
    """Tensors on `device`: one, a mapping or a sequence of them, or None."""
    if isinstance(features, Mapping):
        return {name: x.to(device) for name, x in features.items()}
    if isinstance(features, Sequence):
        return [x.to(device) for x in features]
    return None if features is None else features.to(device)


def ordered_trust(trust: Trust, names: tuple[str, ...] | None, count: int) -> list[float]:
    """The prior of each modality, 0 where a mapping leaves it out, checked."""
    values = by_modality("trust", trust, names, count, 0.0)
    prior = [MAY_BE_FOREIGN if p == "may be foreign" else p for p in values]
    check_trust(prior)
    return [float(p) for p in prior]


class _Standardised:
    """Standardised inputs, `known` and quality of each batch of training data, any number of times."""

    def __init__(self, model: SAGE, batches: Iterable[Mapping[str, Any]], device: torch.device) -> None:
        self.model, self.batches, self.device = model, batches, device

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
        model = self.model
        for batch in self.batches:
            x, known, _ = model._inputs(batch["features"], batch.get("present"), batch.get("frame"), self.device)
            quality = moved(batch.get("quality"), self.device) if sum(model.quality_dims) else None
            evidence = ordered_quality(quality, model.names, model.quality_dims, x[0], known)
            x, known, _ = model._standardise(x, known)
            yield x, known, evidence


class _Rests:
    """How often the frames of one modality repeat, over windows of training data."""

    def __init__(self) -> None:
        self.counts = torch.zeros(1, dtype=torch.int64)  # frames by their repeats
        self.longest = 0  # frames of it in a window, at most

    def add(self, repeats: Tensor, known: Tensor | None) -> None:
        """(B, T) repeats, in the frames that are `known`."""
        known = torch.ones_like(repeats, dtype=torch.bool) if known is None else known
        counts = torch.bincount(repeats[known], minlength=len(self.counts)).cpu()
        counts[: len(self.counts)] += self.counts
        self.counts, self.longest = counts, max([self.longest, *known.sum(1).tolist()])

    def limit(self, stuck: int) -> int:
        """The repeats from which on the modality is stuck, `stuck` at least; 0: it never is (`SAGE.fit_statistics`)."""
        total = self.counts.sum()
        exceed = total - self.counts.cumsum(0)  # frames with more than 0, 1, ... repeats
        natural = int((RARE * exceed > total).sum())
        return 0 if 2 * natural >= self.longest else max(stuck, 2 * natural)


def _check_memory(halflives: Any) -> None:
    if not isinstance(halflives, Sequence) or not all(isinstance(h, (int, float)) for h in halflives):
        raise TypeError(f"memory: expected a sequence of half-lives in frames, got {halflives!r}")
    if len(halflives) > MAX_MEMORY or not all(0 < h < 1e6 for h in halflives):
        raise ValueError(
            f"memory: expected at most {MAX_MEMORY} half-lives, each in (0, 1e6) frames, got {halflives!r}"
        )


def _bounded(x: Tensor) -> Tensor:
    """tanh, in float32 under autocast: the concordance needs the digits."""
    return torch.tanh(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


class SAGELoss(nn.Module):
    """What trains `SAGE`: concordance of the prediction and of each expert's own estimate, and the score of their confidence.

    `total = (1 - CCC(prediction)) + unimodal * mean_k (1 - CCC(expert_k)) + reliability * score`, CCC pooled over the batch's
    valid frames, a modality's own over those in which it is present. The score is the sum of three:

    `ExplainedVarianceNLL` of each expert's confidence. The error is that of the best affine function of its estimate, relative to
    the target's variance, both by the batch: an estimate of high concordance is as spread as the target, however little it
    explains of it.
    `ExplainedVarianceNLL` of the precision of each expert's single frame, as `odds(r)`, by the error of `frame_estimates`.
    Half the mean of that error itself, relative to the variance, which teaches the frame estimates.

    Args:
        unimodal, reliability: weights of the second and third part.
        names: of the modalities in order, `model.names`: only for a `present` that is a mapping.
        process_group: as in `nn.CCCLoss`: concordance, the variance and affine function of each estimate, and the mean score are
            those of the global batch of all ranks; two collectives a step, whatever the batch. None: this process's
            batch alone, which under DistributedDataParallel is another loss; it warns once.
    """

    def __init__(
        self,
        *,
        unimodal: float = 0.5,
        reliability: float = 0.3,
        names: Sequence[str] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            check_group(process_group)
        self.process_group = process_group
        self.names = None if names is None else tuple(names)
        for name, value in (("unimodal", unimodal), ("reliability", reliability)):
            check_number(name, value, ">= 0 and finite", lambda weight: 0 <= weight < math.inf)
        self.unimodal, self.reliability = float(unimodal), float(reliability)
        self.score = ExplainedVarianceNLL()

    def extra_repr(self) -> str:
        return f"unimodal={self.unimodal}, reliability={self.reliability}"

    def forward(
        self, output: SAGEOutput, labels: Tensor, valid: Tensor | None = None, present: Present | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """labels (B, T, C); valid (B, T) bool: annotated frames; present (B, T, M) bool, or a mapping name -> (B, T), as
        given to the model.

        Returns the total and its unweighted parts, detached: "prediction", "unimodal", "reliability".
        """
        modalities = output.unimodal.shape[2]
        if isinstance(present, Mapping) and self.names is None:
            raise TypeError("present: expected a tensor (SAGELoss was built without names=model.names), got a mapping")
        lead = tuple(output.unimodal.shape[:2])
        flags = ordered_present(present, self.names, lead, "(B, T)", output.unimodal, "the output")
        check_tensor("labels", labels)
        check_shape("labels", labels, tuple(output.prediction.shape), "(B, T, C)")
        check_optional("valid", valid, lead, "(B, T)", labels, "labels", BOOL)
        labels = labels.to(output.prediction.dtype)
        if valid is not None:
            labels = torch.where(valid.unsqueeze(-1), labels, 0.0)
        counted = join_flags(flags, valid, modalities)  # (B, T, M); None: all, below too
        everywhere = None
        if counted is not None:  # where the prediction counts, and the joint expert
            everywhere = (torch.ones_like(counted[..., 0]) if valid is None else valid).unsqueeze(-1)

        own = output.unimodal
        if output.experts.shape[2] > modalities:  # the joint expert, before the modalities
            own = output.experts
            counted = _joined(everywhere, counted)
        estimates = torch.cat([output.prediction.unsqueeze(2), own], 2)
        moments = pair_moments(estimates, labels, _joined(everywhere, counted))
        if self.process_group is None:
            warn_apart("SAGELoss")
        else:
            moments = merge_ranks(moments, self.process_group)
        distance = 1 - functional.ccc_from_moments(moments).to(labels.dtype)
        prediction, concordance = distance[0].mean(), distance[1:].mean()

        gain, shift, variance = line(moments[1:].detach()).to(labels.dtype)
        score = self.score.scores(
            output.expert_confidence, explained_error(own, labels, gain, shift, variance), counted
        )
        if output.frame_estimates is not None and output.frame_log_precision is not None:
            error = (output.frame_estimates - labels.unsqueeze(2)).square() / variance
            precise = self.score.scores(output.frame_log_precision.sigmoid(), error, counted)
            score = score + precise + 0.5 * error.mean(-1)
        score = mean_counted(score, counted, self.process_group)
        total = prediction + self.unimodal * concordance + self.reliability * score
        parts = {"prediction": prediction, "unimodal": concordance, "reliability": score}
        return total, {name: part.detach() for name, part in parts.items()}

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


def _joined(first: Tensor | None, others: Tensor | None) -> Tensor | None:
    """Flags (B, T, 1) before those of (B, T, K)."""
    return None if first is None or others is None else torch.cat([first, others], -1)


def explained_error(estimates: Tensor, labels: Tensor, gain: Tensor, shift: Tensor, variance: Tensor) -> Tensor:
    """(*, K, C) squared errors, relative to the targets' variance (C), of what each estimate (*, K, C) says of the labels (*, C)
    once it is put to scale by gain and shift (K, C)."""
    return (gain * estimates + shift - labels.unsqueeze(-2)).square() / variance


def regression(estimates: Tensor, labels: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares line of the labels on each expert's estimates: gain and shift (K, C), and the variance (K, C) of the
    labels about their mean, in the frames that are counted.

    estimates (*, K, C), labels (*, C), counted (*, K) bool or None: all. The gain is never negative: an estimate that runs
    against the labels explains nothing. 1 stands for a variance of 0.
    """
    gain, shift, variance = line(pair_moments(estimates, labels, counted)).to(estimates.dtype)
    return gain, shift, variance


def pair_moments(estimates: Tensor, labels: Tensor, counted: Tensor | None) -> Tensor:
    """(K, C, 6) float64 moments, as of `functional.ccc_moments`, of each estimate and its label, arguments as `regression`."""
    own = estimates.flatten(0, -3)
    targets = labels.flatten(0, -2).unsqueeze(1).expand_as(own)
    mask = None if counted is None else counted.flatten(0, -2).unsqueeze(-1).expand_as(own).flatten(1)
    return functional.ccc_moments(own.flatten(1), targets.flatten(1), mask).unflatten(0, own.shape[1:])


def line(moments: Tensor) -> Tensor:
    """(3, K, C): what `regression` gives, of moments (K, C, 6)."""
    count, center, level, spread, variance, shared = moments.unbind(-1)
    count = count.clamp(min=1)
    gain = (shared / torch.maximum(spread, 1e-12 * count)).clamp(min=0)
    return torch.stack([gain, level - gain * center, torch.where(variance > 1e-12 * count, variance / count, 1.0)])
