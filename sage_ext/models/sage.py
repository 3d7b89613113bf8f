"""SAGE, the reference model: temporal encoders, stage-adaptive reliability fusion, valence-arousal head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .._arguments import (
    CONSTANTS,
    MAX_MEMORY,
    Features,
    Present,
    blank_missing,
    check_bool,
    check_dropout,
    check_int,
    check_number,
    join_flags,
    named_dims,
    ordered_features,
    ordered_present,
    read_flags,
    take_finite,
)
from ..nn import Fusion, ReliabilityNLL, calibrated_confidence
from .fusions import fusion_class
from .layers import ChannelDropout, Encoder, PrecisionMemory, TemporalBlock

if TYPE_CHECKING:
    from ..stream import StreamingSession

DEAD = 1e-5  # a feature whose spread is below this share of its modality's mean spread is dead: it is not used
RARE = 1000  # one frame in so many may repeat for longer than is natural to its modality
MAX_STUCK = 2**24  # the largest number of repeats up to which the streaming engines, in float32, count


class SAGEState(NamedTuple):
    """What a causal `SAGE` carries from one chunk to the next. All tensors; a new sequence starts from zeros."""

    # The last inputs of each block's convolution before the fusion: (B, M, (kernel_size - 1) * dilation, dim) a block.
    history: tuple[Tensor, ...]
    # The same after it: (B, K, (kernel_size - 1) * dilation, dim) a block. Its K tracks are what the fusion's `tracks` gives:
    # the fused frames, and each modality alone; the modalities only (late fusion); the fused frames only (other peers).
    fused: tuple[Tensor, ...]
    fusion: tuple[Tensor, ...] | None  # a FusionState, a peer's own, or None: nothing to remember
    memory: Tensor | None  # (B, K, R, dim + 1) float32: `PrecisionMemory`'s sums; None without one
    # (repeats (B, M), last (B, sum of in_dims)): how often each modality's last frame has repeated, at most its `stuck_limit`,
    # and that frame, standardised, 0 where missing; None with `stuck` 0
    still: tuple[Tensor, Tensor] | None


class SAGEOutput(NamedTuple):
    """Result of `SAGE`, for `B` sequences, `T` frames, `M` modalities, `C` targets, `S` stages."""

    prediction: Tensor  # (B, T, C) in (-1, 1), float32 (float64 for float64 features)
    unimodal: Tensor  # (B, T, M, C) each modality's own prediction; meaningful where it is present
    weights: Tensor  # (B, T, M)
    confidence: Tensor  # (B, T, M)
    stage: Tensor  # (B, T, S)
    state: SAGEState | None  # of a causal model, for the next chunk
    # (M,) int64: the frames of each modality that were said to be present, and no padding, but, once standardised, held NaN,
    # Inf or numbers whose squares overflow float32. They count as missing.
    nonfinite: Tensor


class SAGE(nn.Module):
    """Stage-Adaptive Gated Estimation of valence and arousal from several modalities.

    Each modality: standardised features -> Linear -> temporal convolutions (dilated, depthwise-separable, causal or
    centred). Then `ReliabilityFusion` -> the widest of the convolutions -> plus `PrecisionMemory` -> head -> tanh. Long
    averages come after the fusion because they should not mix reliable frames with unreliable ones before those are told
    apart. The memory counts a frame by its precision, the sum over its modalities of `odds(confidence)^sharpness`; the
    fusion weights are the modalities' shares of that sum. Typicality, a part of the fusion, reads the standardised inputs.

    The unimodal predictions are what the model would say if it had one modality only: the same convolutions, memory and
    head, run on that modality's values alone. (Only the stage is still told by all modalities.) Against them each
    modality's confidence is trained and calibrated. With a peer's fusion they are those of a linear head a modality on
    its encoder.

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
        kappa: error scale, in label units, at which confidence is 1/2 (see `ReliabilityNLL`).
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
    `stuck` until `fit_statistics` raises it for a modality that naturally rests.

    Raises TypeError or ValueError naming the argument for anything malformed.
    """

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
        kappa: float = 0.25,
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
            "kappa": ReliabilityNLL(kappa).kappa,
            "fusion": fusion,
            "fusion_options": dict(options),
            "length": length,
            "use_present": use_present,
            "memory": [float(h) for h in memory],
            "stuck": stuck,
        }
        self.causal = causal and fusion_type.causal
        self.length = length if fusion_type.fixed_length else None
        self.num_targets, self.kappa, self.use_present = num_targets, self.config["kappa"], use_present
        self.stuck = stuck
        for m, d in enumerate(self.in_dims):
            self.register_buffer(f"input_mean_{m}", torch.zeros(d))
            self.register_buffer(f"input_scale_{m}", torch.ones(d))
        self.stuck_limit: Tensor  # int64: exact whatever dtype the model is cast to
        self.register_buffer("stuck_limit", torch.full((len(self.in_dims),), stuck))
        own = blocks - fused_blocks
        self.encoders = nn.ModuleList(Encoder(d, dim, own, kernel_size, dropout, causal) for d in self.in_dims)
        if fusion_type.has_reliability:
            options = {"stages": stages, "evidence_dim": evidence_dim, **options}
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
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), ChannelDropout(dropout), nn.Linear(dim, num_targets))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SAGE:
        """The model that `model.config` describes, freshly initialised."""
        return cls(**config)

    def extra_repr(self) -> str:
        return f"causal={self.causal}, kappa={self.kappa}"

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

        `batches`: dicts with "features", and optionally "present" (B, T, M) and "frame" (B, T): what the windows'
        `collate` gives. Iterated twice, so a one-shot iterator is a TypeError. Without this call inputs are used as
        they are, typicality follows the training batches by momentum, and every limit is `stuck`. A frame that is not
        finite is missing; for the standardisation it is judged by its features as they are.
        """
        if iter(batches) is batches:
            raise TypeError(
                "batches: expected something to iterate over twice (a list or a DataLoader), got an iterator"
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
        rests = [_Rests() for _ in self.in_dims]
        standardised = self._standardised(batches, device, rests)
        self.fusion.fit_inputs(standardised)
        if self.stuck:
            for _ in standardised:  # a fusion need not ask for them
                pass
            self.stuck_limit.copy_(torch.tensor([rest.limit(self.stuck) for rest in rests]))

    def _standardised(
        self, batches: Iterable[Mapping[str, Any]], device: torch.device, rests: Sequence[_Rests]
    ) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        for batch in batches:
            x, known, _ = self._inputs(batch["features"], batch.get("present"), batch.get("frame"), device)
            x, known, _ = self._standardise(x, known)
            if self.stuck:
                repeats = self._repeats(x, known, None)
                for m, rest in enumerate(rests):
                    rest.add(repeats[..., m], None if known is None else known[..., m])
            yield x, known

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
        scaled = [
            (v - self.get_buffer(f"input_mean_{m}").to(v.dtype)) * self.get_buffer(f"input_scale_{m}").to(v.dtype)
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
        encoded, history = self.encode(x, mask, None if state is None else state.history)
        told = self._told(known, mask)
        result = self.fusion.fuse_checked(
            blank_missing(encoded, told), told, None if state is None else state.fusion, x
        )
        tracks = self.fusion.tracks(result.fused, encoded, told)
        precision = self._precision(result.confidence, told)
        estimates, fused, memory = self._estimate(tracks, precision, mask, state)
        return SAGEOutput(
            self.fusion.mix_estimates(estimates, told),
            estimates[:, :, 1:] if self.unimodal is None else self._heads(encoded),
            result.weights,
            result.confidence,
            result.stage,
            SAGEState(history, fused, result.state, memory, still) if self.causal else None,
            nonfinite,
        )

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
        self, features: Features, present: Present | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What calibration reads: uncalibrated reliability logits (B, T, M, S), stage posterior (B, T, S), unimodal
        predictions (B, T, M, C) of whole sequences, and (B, T, M) bool: present, finite, and not stuck. The memory goes by
        uncalibrated confidence: what is fitted must not depend on what was fitted before. Arguments as `forward`;
        ValueError with uniform weights."""
        if not self.fusion.has_reliability:
            raise ValueError(f"fusion: expected one that has a reliability to assess, got {self.config['fusion']!r}")
        x, known, mask = self._inputs(features, present, mask)
        x, known, _ = self._standardise(x, known)
        x, known, _ = self._moving(x, known, None)
        encoded, _ = self.encode(x, mask)
        told = self._told(known, mask)
        encoded = blank_missing(encoded, told)
        reliability, stage, _ = self.fusion.assess_checked(encoded, told, None, x)
        precision = self._precision(calibrated_confidence(reliability, stage), told)
        unimodal = self._estimate(self.fusion.alone(encoded, told), precision, mask, None)[0]
        assert known is not None  # `_standardise` gave it
        return reliability, stage, unimodal, known

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
        before = [torch.cat([b.to(v.dtype).unsqueeze(1), v[:, :-1]], 1) for b, v in zip(last.split(self.in_dims, 1), x)]
        same = torch.stack([(v == b).all(-1) for v, b in zip(x, before)], -1)  # (B, T, M)
        if known is not None:
            same = same & known
        frame = torch.arange(frames, device=same.device)[None, :, None]
        # The last frame that was not a repeat; -1: in an earlier chunk.
        fresh = torch.where(same, -1, frame).cummax(1).values
        return torch.where(fresh >= 0, frame - fresh, frame + 1 + repeats.unsqueeze(1))

    def _precision(self, confidence: Tensor, told: Tensor | None) -> Tensor | None:
        """(B, T, M) -> (B, T, 1 + M): precision of the fused frame, and of each modality alone; 0 where missing. None
        without a memory, which alone asks for it."""
        if self.memory is None:
            return None
        limit = CONSTANTS["log_precision_limit"]
        own = self.fusion.log_precision(confidence).clamp(-limit, limit).exp()
        if told is not None:
            own = torch.where(told, own, 0.0)
        return torch.cat([own.sum(-1, keepdim=True), own], -1)

    def _estimate(
        self, tracks: Tensor, precision: Tensor | None, mask: Tensor | None, state: SAGEState | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Blocks after the fusion, memory and head, on K tracks (B, T, K, dim) in one batch: the fused frames alone, the
        modalities, or both; `precision` is of both. Estimates (B, T, K, C), and for the next chunk the blocks' histories
        (B, K, span, dim) and the memory's sums (B, K, R, dim + 1)."""
        count = tracks.shape[2]
        x = tracks.transpose(1, 2).flatten(0, 1)
        mask = None if mask is None else mask.repeat_interleave(count, 0)
        tails = []
        for i, block in enumerate(self.fused_blocks):
            x, tail = block(x, mask, None if state is None else state.fused[i].flatten(0, 1))
            tails.append(tail.unflatten(0, (-1, count)))
        sums = None
        if self.memory is not None and precision is not None:
            if state is not None and state.memory is not None:
                sums = state.memory.flatten(0, 1)
            precision = precision[..., :1] if count == 1 else precision[..., -count:]
            kept, sums = self.memory(x, precision.transpose(1, 2).flatten(0, 1), sums)
            x, sums = x + kept, sums.unflatten(0, (-1, count))
        return _bounded(self.head(self.norm(x))).unflatten(0, (-1, count)).transpose(1, 2), tuple(tails), sums

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
    """What trains `SAGE`: concordance of the prediction and of each modality's own, and the score of its confidence.

    `total = (1 - CCC(prediction)) + unimodal * mean_m (1 - CCC(unimodal_m)) + reliability * ReliabilityNLL`, CCC pooled
    over the batch's valid frames, a modality's own over those in which it is present.

    Args:
        kappa: error scale of confidence, `model.kappa`.
        unimodal, reliability: weights of the second and third part.
        names: of the modalities in order, `model.names`: only for a `present` that is a mapping.
    """

    def __init__(
        self,
        kappa: float = 0.25,
        *,
        unimodal: float = 0.5,
        reliability: float = 0.1,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.names = None if names is None else tuple(names)
        for name, value in (("unimodal", unimodal), ("reliability", reliability)):
            check_number(name, value, ">= 0 and finite", lambda weight: 0 <= weight < math.inf)
        self.unimodal, self.reliability = float(unimodal), float(reliability)
        self.score = ReliabilityNLL(kappa)

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
        labels = labels.to(output.prediction.dtype)
        counted = join_flags(flags, valid, modalities)  # (B, T, M)
        prediction = 1 - functional.ccc(output.prediction, labels, valid).mean()

        targets = labels.unsqueeze(2).expand_as(output.unimodal)
        mask = None if counted is None else counted.unsqueeze(-1).expand_as(targets).flatten(2)
        own = 1 - functional.ccc(output.unimodal.flatten(2), targets.flatten(2), mask).mean()

        error = (output.unimodal.detach() - targets).square()
        score = self.score(output.confidence, error, counted)
        total = prediction + self.unimodal * own + self.reliability * score
        parts = {"prediction": prediction, "unimodal": own, "reliability": score}
        return total, {name: part.detach() for name, part in parts.items()}
