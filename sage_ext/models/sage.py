"""SAGE, the reference model: temporal encoders, stage-adaptive reliability fusion, valence-arousal head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..nn import (
    Features,
    ReliabilityFusion,
    ReliabilityNLL,
    UniformFusion,
    blank_missing,
    calibrated_confidence,
    check_flags,
    check_int,
    join_flags,
    named_dims,
    ordered_features,
)
from .peers import LateFusion, PeerFusion, fusion_class

if TYPE_CHECKING:
    from ..stream import StreamingSession

DEAD = 1e-5  # a feature whose spread is below this share of its modality's mean spread is dead: it is not used


class SAGEState(NamedTuple):
    """What a causal `SAGE` carries from one chunk to the next. All tensors; a new sequence starts from zeros."""

    history: tuple[
        Tensor, ...
    ]  # a modality block: (B, M, (kernel_size - 1) * dilation, dim) its convolution's last inputs
    # a block after fusion: (B, K, (kernel_size - 1) * dilation, dim) likewise; of K = 1 + M tracks, the fused one and each
    # modality alone; K = M with late fusion, 1 with any other peer
    fused: tuple[Tensor, ...]
    fusion: tuple[Tensor, ...] | None  # a FusionState, a peer's own, or None: nothing to remember
    memory: Tensor | None  # (B, K, R, dim + 1) float32: `PrecisionMemory`'s sums; None without one
    # (repeats (B, M), last (B, sum of in_dims)): how often each modality's last frame has repeated, at most `stuck`, and that
    # frame, standardised, 0 where missing; None where a frame may repeat for ever
    still: tuple[Tensor, Tensor] | None


class SAGEOutput(NamedTuple):
    """Result of `SAGE`, for `B` sequences, `T` frames, `M` modalities, `C` targets, `S` stages."""

    prediction: Tensor  # (B, T, C) in (-1, 1), float32 (float64 for float64 features)
    unimodal: Tensor  # (B, T, M, C) each modality's own prediction; meaningful where it is present
    weights: Tensor  # (B, T, M)
    confidence: Tensor  # (B, T, M)
    stage: Tensor  # (B, T, S)
    state: SAGEState | None  # of a causal model, for the next chunk


class ChannelDropout(nn.Module):
    """Dropout of whole channels for a whole sequence: x (B, T, dim), one draw a (B, dim).

    Neighbouring frames say nearly the same, so a draw a frame would be averaged away by the next convolution; and it
    would cost more than the convolution does.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[-1]), self.p)


class TemporalBlock(nn.Module):
    """Residual `x + W silu(depthwise(LayerNorm(x)))`: a dilated depthwise-separable convolution over time.

    x: (B, T, dim). The depthwise kernel is `weight` (kernel_size, dim), oldest tap first; causal, or centred.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.kernel_size, self.dilation, self.causal = kernel_size, dilation, causal
        self.norm = nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.randn(kernel_size, dim) * kernel_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.pointwise = nn.Linear(dim, dim)
        self.dropout = ChannelDropout(dropout)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, causal={self.causal}"

    def forward(self, x: Tensor, mask: Tensor | None, history: Tensor | None) -> tuple[Tensor, Tensor]:
        """history: (B, (kernel_size - 1) * dilation, dim) before this chunk (None: zeros); returns the next."""
        batch, frames, dim = x.shape
        span = (self.kernel_size - 1) * self.dilation
        h = self.norm(x)
        if self.causal:
            before = h.new_zeros(batch, span, dim) if history is None else history.to(h.dtype)
            h = torch.cat([before, h], 1)
        else:
            if mask is not None:  # padding is the same as the end of the sequence
                h = torch.where(mask.unsqueeze(-1), h, 0.0)
            h = F.pad(h, (0, 0, span // 2, span - span // 2))
        # Channels last, one multiply-add a tap: on CPU 1.7x faster in training than conv1d(groups=dim), same bits.
        y = self.bias.to(h.dtype).expand(batch, frames, dim)
        for tap in range(self.kernel_size):
            start = tap * self.dilation
            y = torch.addcmul(y, h[:, start : start + frames], self.weight[tap].to(h.dtype))
        y = self.pointwise(F.silu(y))
        return x + self.dropout(y), h[:, frames:]


class Encoder(nn.Module):
    """One modality: Linear to `dim`, temporal blocks with dilations 1, 2, 4, ..., LayerNorm."""

    def __init__(self, in_dim: int, dim: int, blocks: int, kernel_size: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.project = nn.Linear(in_dim, dim)
        self.dropout = ChannelDropout(dropout)
        self.blocks = nn.ModuleList(TemporalBlock(dim, kernel_size, 2**i, dropout, causal) for i in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None, history: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        x = self.dropout(self.project(x))
        tails = []
        for i, block in enumerate(self.blocks):
            x, tail = block(x, mask, None if history is None else history[i])
            tails.append(tail)
        return self.norm(x), tails


class PrecisionMemory(nn.Module):
    """What was seen lately, each frame counted by its precision: a normalised leaky average for each half-life.

    `average_r(t) = sum_k lambda_r^(t-k) p_k x_k / (a_r + sum_k lambda_r^(t-k) p_k)`, `lambda_r = 0.5^(1/halflife_r)`, over
    the frames `k <= t` (all frames and `|t-k|` if not causal); `a_r` is learnt, the weight of the average's prior, 0. The
    result is a Linear of the R averages side by side. With the precision of a calibrated confidence, `odds(r)`, this is the
    inverse-variance weighted mean of the past: unreliable frames hold what reliable ones left behind.

    Args:
        dim: channels. halflives: of the averages, in frames. causal: see above.
    """

    CHUNK = 64  # frames of one product with the triangular matrix of powers of lambda
    halflife: Tensor  # (R,)

    def __init__(self, dim: int, halflives: Sequence[float], causal: bool) -> None:
        super().__init__()
        self.halflives, self.causal = tuple(halflives), causal
        self.register_buffer("halflife", torch.tensor(self.halflives), persistent=False)
        self.log_prior = nn.Parameter(torch.zeros(len(self.halflives)))
        self.mix = nn.Linear(dim * len(self.halflives), dim)

    def extra_repr(self) -> str:
        return f"halflives={self.halflives}, causal={self.causal}"

    def forward(self, x: Tensor, precision: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, dim), precision (B, T) >= 0, sums (B, R, dim + 1) before this chunk (None: nothing was seen): the
        memory (B, T, dim), and the sums for the next chunk."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        p = precision.to(dtype).unsqueeze(-1)
        weighed = torch.cat([p * x.to(dtype), p], -1)  # (B, T, dim + 1)
        total, sums = self._leaky(weighed, sums)
        if not self.causal:
            total = total + self._leaky(weighed.flip(1), None)[0].flip(2) - weighed.unsqueeze(1)
        average = total[..., :-1] / (total[..., -1:] + self.log_prior.to(dtype).exp()[:, None, None])
        return self.mix(average.transpose(1, 2).flatten(2).to(self.mix.weight.dtype)).to(x.dtype), sums

    def _leaky(self, x: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, n) -> (B, R, T, n): `sum_(k <= t) lambda_r^(t-k) x_k`, and the last of them (B, R, n)."""
        frames, decay = x.shape[1], 0.5 ** (1.0 / self.halflife.to(x.dtype))
        chunks = frames // self.CHUNK + 1  # never without padding: torch.export would tell the two cases apart
        x = F.pad(x, (0, 0, 0, chunks * self.CHUNK - frames)).view(x.shape[0], chunks, self.CHUNK, x.shape[2])
        age = torch.arange(self.CHUNK, device=x.device)
        inside = torch.einsum("rts,bcsn->brctn", _powers(decay, age[:, None] - age), x)
        # What had come together before each chunk: of the chunks before it, and before the first.
        chunk = torch.arange(chunks, device=x.device)
        between = _powers(decay**self.CHUNK, chunk[:, None] - chunk - 1)
        before = torch.einsum("rcd,brdn->brcn", between, inside[:, :, :, -1])
        if sums is not None:
            before = before + _powers(decay**self.CHUNK, chunk).unsqueeze(-1) * sums.to(x.dtype).unsqueeze(2)
        total = inside + _powers(decay, age + 1)[:, None, :, None] * before.unsqueeze(3)
        total = total.flatten(2, 3)[:, :, :frames]
        return total, total[:, :, -1]


def _powers(base: Tensor, exponent: Tensor) -> Tensor:
    """(R,) and (*) whole numbers -> (R, *): base**exponent, 0 where that is negative."""
    base = base.view(-1, *[1] * exponent.dim())
    return torch.where(exponent >= 0, base ** exponent.clamp(min=0), 0.0)


class SAGE(nn.Module):
    """Stage-Adaptive Gated Estimation of valence and arousal from several modalities.

    Per modality: standardised features -> Linear -> causal (or centred) dilated depthwise-separable temporal
    convolutions -> `ReliabilityFusion` -> the widest of the convolutions -> plus `PrecisionMemory` -> head -> tanh. The
    precision of a frame in that memory is the sum over its modalities of `odds(confidence)^sharpness`, of which the fusion
    weights are the shares. The same convolutions, memory and head on each modality's values alone give the unimodal
    predictions against which its confidence is trained and calibrated: what the model would say if it had that modality
    only (but for the stage, which all modalities tell). Typicality reads the standardised inputs. Long averages come
    after the fusion because they should not mix reliable frames with unreliable ones before those are told apart.
    (With a peer's fusion the unimodal predictions are those of a linear head a modality on its encoder.)

    A frame in which a modality is missing enters its encoder as zeros, that is (after `fit_statistics`) as the mean
    frame of the training data; whatever the tensor holds there, NaN included, reaches nothing. A modality whose features
    stand perfectly still is missing too: a muted microphone and a frozen picture repeat themselves to the last digit, a
    live one does not.

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
        stuck: a frame of a modality that repeats the one before it exactly, as do the `stuck - 1` before it, is missing; 0:
            a frame may repeat for ever. Default: 8; 0 with a peer's fusion, and where `use_present` hides what is missing.

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
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        for name, flag in (("causal", causal), ("use_present", use_present)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be bool, got {type(flag).__name__}")
        if not isinstance(fusion_options, (Mapping, type(None))):
            raise TypeError(f"fusion_options must be a mapping or None, got {type(fusion_options).__name__}")
        check_int("length", length, 1)
        fusion_type = fusion_class(fusion)
        ours = not issubclass(fusion_type, PeerFusion)
        if memory is None:
            memory = (8.0, 32.0, 128.0) if ours else ()
        lives = isinstance(memory, Sequence) and all(isinstance(h, (int, float)) and 0 < h < 1e6 for h in memory)
        if not lives or len(memory) > 8:  # csrc/stream/model.h: kMaxMemory
            raise ValueError(f"memory must be at most 8 half-lives in frames, each in (0, 1e6), got {memory!r}")
        if stuck is None:
            stuck = 8 if ours and use_present else 0
        check_int("stuck", stuck, 0)
        if stuck and not use_present:
            raise ValueError(f"stuck: use_present=False hides what is missing, stuck={stuck} would add to it")
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
        own = blocks - fused_blocks
        self.encoders = nn.ModuleList(Encoder(d, dim, own, kernel_size, dropout, causal) for d in self.in_dims)
        if fusion == "reliability":
            options = {"stages": stages, "evidence_dim": evidence_dim, **options}
        elif self.length is not None:
            options["length"] = length
        encoded = [dim] * len(self.in_dims)
        self.fusion: ReliabilityFusion | UniformFusion | PeerFusion = fusion_type(
            dict(zip(self.names, encoded)) if self.names else encoded, dim, **options
        )
        self.unimodal = None
        if isinstance(self.fusion, PeerFusion):
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

    # ------------------------------------------------------------------------------------------------- statistics
    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Fit the input standardisation and the typicality statistics on clean training data, before training.

        `batches`: dicts with "features", and optionally "present" (B, T, M) and "frame" (B, T): what the windows'
        `collate` gives. Iterated twice, so a one-shot iterator is a TypeError. Without this call inputs are used as
        they are, and typicality follows the training batches by momentum.
        """
        if iter(batches) is batches:
            raise TypeError("batches must be iterable more than once (a list or a DataLoader), got an iterator")
        device = next(self.parameters()).device
        n = [torch.zeros((), dtype=torch.float64, device=device) for _ in self.in_dims]
        mean = [torch.zeros(d, dtype=torch.float64, device=device) for d in self.in_dims]
        m2 = [torch.zeros(d, dtype=torch.float64, device=device) for d in self.in_dims]
        for batch in batches:
            x, valid, _ = self._inputs(batch["features"], batch.get("present"), batch.get("frame"), device)
            for m, v in enumerate(x):
                rows = (v.flatten(0, 1) if valid is None else v[valid[..., m]]).double()
                if not len(rows):
                    continue
                gap = rows.mean(0) - mean[m]
                joint = n[m] + len(rows)
                m2[m] += (rows - rows.mean(0)).square().sum(0) + gap * gap * n[m] * len(rows) / joint
                mean[m] += gap * len(rows) / joint
                n[m] = joint
        for m in range(len(self.in_dims)):
            if n[m] < 2:
                raise ValueError(f"batches: modality {self._label(m)} has {int(n[m])} present frames, needs 2 or more")
            std = (m2[m] / n[m]).sqrt()
            alive = std > DEAD * std.mean()
            self.get_buffer(f"input_mean_{m}").copy_(mean[m])
            self.get_buffer(f"input_scale_{m}").copy_(torch.where(alive, 1 / torch.where(alive, std, 1.0), 0.0))
        if isinstance(self.fusion, ReliabilityFusion):
            self.fusion.typicality.fit(self._standardised(batches, device))

    def _standardised(
        self, batches: Iterable[Mapping[str, Any]], device: torch.device
    ) -> Iterable[tuple[list[Tensor], Tensor | None]]:
        for batch in batches:
            x, valid, _ = self._inputs(batch["features"], batch.get("present"), batch.get("frame"), device)
            yield self._standardise(x, valid), valid

    def _label(self, m: int) -> str:
        return self.names[m] if self.names else str(m)

    def _inputs(
        self, features: Features, present: Tensor | None, mask: Tensor | None, device: torch.device | None = None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        if device is not None:
            features = (
                {k: v.to(device) for k, v in features.items()}
                if isinstance(features, Mapping)
                else [v.to(device) for v in features]
            )
            present = None if present is None else present.to(device)
            mask = None if mask is None else mask.to(device)
        x = ordered_features(features, self.names, self.in_dims)
        if x[0].dim() != 3:
            raise ValueError(f"features must be (B, T, d), got {tuple(x[0].shape)}")
        batch, frames = x[0].shape[:2]
        check_flags("present", present, (batch, frames, len(x)), x[0].device)
        check_flags("mask", mask, (batch, frames), x[0].device)
        return x, join_flags(present, mask, len(x)), mask

    def _standardise(self, x: Sequence[Tensor], valid: Tensor | None) -> list[Tensor]:
        scaled = [
            (v - self.get_buffer(f"input_mean_{m}").to(v.dtype)) * self.get_buffer(f"input_scale_{m}").to(v.dtype)
            for m, v in enumerate(x)
        ]
        return blank_missing(scaled, valid)

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
        present: Tensor | None = None,
        mask: Tensor | None = None,
        state: SAGEState | None = None,
    ) -> SAGEOutput:
        """Estimate a chunk; consecutive chunks with `state` give what one whole call gives.

        Args:
            features: M tensors (B, T, D_m), one floating dtype: a mapping by name, or a sequence.
            present: (B, T, M) bool; False: the modality is missing in that frame (not read).
            mask: (B, T) bool; False: padding, in which everything is missing.
            state: `SAGEOutput.state` of the chunk before; None starts a sequence. Causal models only.
        """
        if state is not None and not self.causal:
            why = "causal=False" if not self.config["causal"] else f"fusion={self.config['fusion']!r}"
            raise ValueError(f"state: only a causal SAGE can be run in chunks; this one was built with {why}")
        x, valid, mask = self._inputs(features, present, mask)
        x, valid, still = self._moving(self._standardise(x, valid), valid, None if state is None else state.still)
        encoded, history = self.encode(x, mask, None if state is None else state.history)
        known = self._known(valid, mask)
        result = self.fusion(encoded, known, None, None if state is None else state.fusion, typicality_inputs=x)
        tracks = self._tracks(result.fused, encoded, known)
        precision = self._precision(result.confidence, known)
        estimates, fused, memory = self._estimate(tracks, precision, mask, state)
        if isinstance(self.fusion, LateFusion):
            prediction = self.fusion.mix(estimates, known)
        else:
            prediction = estimates[:, :, 0]
        return SAGEOutput(
            prediction,
            estimates[:, :, 1:] if self.unimodal is None else self._heads(encoded),
            result.weights,
            result.confidence,
            result.stage,
            SAGEState(history, fused, result.state, memory, still) if self.causal else None,
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
        self, features: Features, present: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What calibration reads: uncalibrated reliability logits (B, T, M, S), stage posterior (B, T, S), unimodal
        predictions (B, T, M, C) of whole sequences, and (B, T, M) bool: present, and not stuck. The memory goes by
        uncalibrated confidence: what is fitted must not depend on what was fitted before. Arguments as `forward`;
        ValueError with uniform weights."""
        if not isinstance(self.fusion, ReliabilityFusion):
            raise ValueError(f'fusion="{self.config["fusion"]}" has no reliability to assess')
        x, valid, mask = self._inputs(features, present, mask)
        x, valid, _ = self._moving(self._standardise(x, valid), valid, None)
        encoded, _ = self.encode(x, mask)
        known = self._known(valid, mask)
        encoded = blank_missing(encoded, known)
        reliability, stage, _ = self.fusion.assess(encoded, known, None, x)
        precision = self._precision(calibrated_confidence(reliability, stage), known)
        unimodal = self._estimate(self.fusion.alone(encoded, known), precision, mask, None)[0]
        if valid is None:
            valid = torch.ones(reliability.shape[:3], dtype=torch.bool, device=reliability.device)
        return reliability, stage, unimodal, valid

    def _known(self, valid: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """(B, T, M) what the fusion is told of `valid`, all of it unless `use_present` is False."""
        return valid if self.use_present else join_flags(None, mask, len(self.in_dims))

    def _moving(
        self, x: list[Tensor], valid: Tensor | None, still: tuple[Tensor, Tensor] | None
    ) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, Tensor] | None]:
        """Standardised inputs and `valid` without the frames that repeat for the `stuck`th time or more, and what the next
        chunk needs to tell."""
        if not self.stuck:
            return x, valid, None
        batch, frames = x[0].shape[:2]
        if still is None:
            still = (x[0].new_zeros(batch, len(x), dtype=torch.int64), x[0].new_zeros(batch, sum(self.in_dims)))
        repeats, last = still
        before = [torch.cat([b.to(v.dtype).unsqueeze(1), v[:, :-1]], 1) for b, v in zip(last.split(self.in_dims, 1), x)]
        same = torch.stack([(v == b).all(-1) for v, b in zip(x, before)], -1)  # (B, T, M)
        if valid is not None:
            same = same & valid
        frame = torch.arange(frames, device=same.device)[None, :, None]
        # The last frame that was not a repeat; -1: in an earlier chunk.
        fresh = torch.where(same, -1, frame).cummax(1).values
        repeats = torch.where(fresh >= 0, frame - fresh, frame + 1 + repeats.unsqueeze(1)).clamp(max=self.stuck)
        moving = repeats < self.stuck
        valid = moving if valid is None else valid & moving
        return blank_missing(x, valid), valid, (repeats[:, -1], torch.cat([v[:, -1] for v in x], -1))

    def _precision(self, confidence: Tensor, known: Tensor | None) -> Tensor | None:
        """(B, T, M) -> (B, T, 1 + M): precision of the fused frame, and of each modality alone; 0 where missing. Confidence
        counts as within [0.001, 0.999]: one frame must not outweigh thousands. None without a memory."""
        if self.memory is None:
            return None
        log_odds = torch.logit(confidence, eps=1e-3)
        if isinstance(self.fusion, ReliabilityFusion):
            log_odds = self.fusion.sharpness * log_odds
        own = log_odds.clamp(-10.0, 10.0).exp()
        if known is not None:
            own = torch.where(known, own, 0.0)
        return torch.cat([own.sum(-1, keepdim=True), own], -1)

    def _tracks(self, fused: Tensor, encoded: Sequence[Tensor], known: Tensor | None) -> Tensor:
        """What blocks and head run on, (B, T, K, dim): the fused frames, then each modality alone if the fusion can tell.
        Late fusion: each modality's values."""
        if isinstance(self.fusion, LateFusion):
            return self.fusion.values(encoded, known)
        if isinstance(self.fusion, PeerFusion):
            return fused.unsqueeze(2)
        alone = self.fusion.alone(encoded, known)
        return torch.cat([fused.unsqueeze(2), alone.to(fused.dtype)], 2)

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
    """

    def __init__(self, kappa: float = 0.25, *, unimodal: float = 0.5, reliability: float = 0.1) -> None:
        super().__init__()
        for name, value in (("unimodal", unimodal), ("reliability", reliability)):
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite weight >= 0, got {value!r}")
        self.unimodal, self.reliability = float(unimodal), float(reliability)
        self.score = ReliabilityNLL(kappa)

    def extra_repr(self) -> str:
        return f"unimodal={self.unimodal}, reliability={self.reliability}"

    def forward(
        self, output: SAGEOutput, labels: Tensor, valid: Tensor | None = None, present: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """labels (B, T, C); valid (B, T) bool: annotated frames; present (B, T, M) bool, as given to the model.

        Returns the total and its unweighted parts, detached: "prediction", "unimodal", "reliability".
        """
        modalities = output.unimodal.shape[2]
        labels = labels.to(output.prediction.dtype)
        counted = join_flags(present, valid, modalities)  # (B, T, M)
        prediction = 1 - functional.ccc(output.prediction, labels, valid).mean()

        targets = labels.unsqueeze(2).expand_as(output.unimodal)
        mask = None if counted is None else counted.unsqueeze(-1).expand_as(targets).flatten(2)
        own = 1 - functional.ccc(output.unimodal.flatten(2), targets.flatten(2), mask).mean()

        error = (output.unimodal.detach() - targets).square()
        score = self.score(output.confidence, error, counted)
        total = prediction + self.unimodal * own + self.reliability * score
        parts = {"prediction": prediction, "unimodal": own, "reliability": score}
        return total, {name: part.detach() for name, part in parts.items()}
