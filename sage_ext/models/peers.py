"""Fusion peers: other people's ways to fuse modalities, behind the interface of `ReliabilityFusion`.

`SAGE(..., fusion=name)` takes any name of `FUSIONS`: the encoders, the temporal blocks, the heads and the loss stay the
same, so that only the fusion differs. Each module follows the published definition given in its docstring; where that
leaves a choice (its output's width, what becomes of a missing modality) the docstring states ours. `parameter_table`
counts the parameters each one adds.

Common to all (see `PeerFusion`): a missing modality is zeros, whatever the tensor holds there, and one whose frame is not
finite is missing; in a frame without any
modality the result is zero; weights are uniform over the present modalities and confidence is 1/2, unless the module
has weights of its own. Input sizes are written `d_m`, `d = sum of d_m`; features are (B, T, d_m), `T` frames.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import arithmetic_dtype, blank_missing, check_dropout, check_int
from ..nn import Fusion, FusionOutput
from ..nn.fusion import SHARPENING_RATE, Mixed, Represented, nothing_refused
from .fusions import FUSIONS, fusion_class, fusion_names
from .layers import Dropout

__all__ = ["FUSIONS", "PeerFusion", "fusion_class", "fusion_names", "parameter_table", "register"]

Dims = Mapping[str, int] | Sequence[int]


class PeerFusion(Fusion):
    """Base of the peers. A subclass builds its layers for `self.in_dims` and `self.dim`, and defines `fuse`.

    Args:
        in_dims: feature size a modality, 1 to 8 of them: a sequence, or a mapping name -> size.
        dim: size of the fused representation.
        length: frames of every call; only where `fixed_length` is True.

    Raises TypeError or ValueError naming the argument for anything malformed.
    """

    def __init__(self, in_dims: Dims, dim: int, *, length: int | None = None) -> None:
        super().__init__(in_dims, dim)
        if self.fixed_length:
            check_int("length", length, 1)
        elif length is not None:
            raise ValueError(f"length: expected None ({type(self).__name__} takes any number of frames), got {length}")
        if self.pairwise and len(self.in_dims) != 2:
            raise ValueError(
                f"in_dims: expected the 2 modalities that {type(self).__name__} fuses, got {len(self.in_dims)}"
            )
        self.length = length

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", length={self.length}" if self.fixed_length else "")

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        """M tensors (B, T, d_m), zero where `known` (B, T, M) is False -> fused (B, T, dim)."""
        raise NotImplementedError

    def fuse_chunk(
        self, x: list[Tensor], known: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """`fuse` of a chunk of a sequence; a causal peer with memory overrides this one."""
        return self.fuse(x, known), None

    def weigh(self, known: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, M) weights to report: rows sum to 1 over the present modalities."""
        here = known.to(dtype)
        return here / here.sum(-1, keepdim=True).clamp(min=1)

    def fuse_checked(
        self,
        x: list[Tensor],
        known: Tensor | None,
        state: tuple[Tensor, ...] | None = None,
        typicality_inputs: Sequence[Tensor] | None = None,
        quality: Tensor | None = None,
    ) -> FusionOutput:
        """As `Fusion.fuse_checked`, one stage. ValueError for a number of frames other than `length` where that is fixed."""
        batch, frames = x[0].shape[:2]
        if self.fixed_length and frames != self.length:
            raise ValueError(
                f"features: expected the {self.length} frames that {type(self).__name__} was built for (length; pad shorter "
                f"sequences and mask the padding, cut longer ones into windows), got {frames}"
            )
        if known is None:
            known = torch.ones(batch, frames, len(x), dtype=torch.bool, device=x[0].device)
        fused, state = self.fuse_chunk(x, known, state)
        fused = torch.where(known.any(-1, keepdim=True), fused, 0.0)
        dtype = arithmetic_dtype(x[0])
        weights, confidence = self.weigh(known, dtype), 0.5 * known.to(dtype)
        stage = fused.new_ones(batch, frames, 1, dtype=dtype)
        return FusionOutput(fused, weights, confidence, stage, state, nothing_refused(x))


# ------------------------------------------------------------------------------------------------------------ registry
Peer = TypeVar("Peer", bound=type[PeerFusion])


def register(name: str, title: str, note: str = "") -> Callable[[Peer], Peer]:
    """Class decorator: adds a `PeerFusion` to `FUSIONS` under `name`. ValueError for a taken name.

    `title` names it in tables and pictures, `note` says in a sentence what sets it apart; the class keeps both.
    """

    def add(cls: Peer) -> Peer:
        if not (isinstance(cls, type) and issubclass(cls, PeerFusion)):
            raise TypeError(f"register: expected a subclass of PeerFusion, got {cls!r}")
        if name in fusion_names():
            raise ValueError(f"name: there is a method {name!r} already")
        FUSIONS[name], cls.title, cls.note = cls, title, note
        return cls

    return add


def parameter_table(dim: int = 128, modalities: int = 2, *, length: int = 300) -> dict[str, int]:
    """{name of a fusion: its trainable parameters} for `modalities` features of size `dim`, as `SAGE` builds it;
    fusions that are not defined for so many modalities are left out. All else in the model is the same for all."""
    from .sage import SAGE  # which reads this module's registry

    table = {}
    for name in fusion_names():
        cls = fusion_class(name)
        if cls.pairwise and modalities != 2:
            continue
        fusion = SAGE([dim] * modalities, dim=dim, fusion=name, length=length).fusion
        table[name] = sum(p.numel() for p in fusion.parameters())
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

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        return torch.tanh(self.second(F.leaky_relu(self.first(torch.cat(x, -1)))))


@register("late", "late fusion", "trunk and head run on each modality; the learnt convex sum is over their predictions")
class LateFusion(PeerFusion):
    """Learnt convex sum of unimodal predictions, `sum_m w_m prediction_m` with `w = softmax(logits)`.

    In `SAGE` the sum is over predictions: the blocks after the fusion and the head, the same weights for all
    modalities, run on each modality's own `values`, and `mix` adds up what they predict. Alone, the module's
    `fused` is the same sum of `values`, which equals it where all that follows is linear.

    A missing modality has no weight; the others' are renormalised. Where all are missing `mix` takes them as
    learnt: what the layers before it remember is all there is.
    """

    def __init__(self, in_dims: Dims, dim: int) -> None:
        super().__init__(in_dims, dim)
        self.value = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.logits = nn.Parameter(torch.zeros(len(self.in_dims)))

    def values(self, x: Sequence[Tensor]) -> Tensor:
        """M tensors (B, T, d_m), zero where missing -> each modality's own representation (B, T, M, dim)."""
        return torch.stack([linear(v) for linear, v in zip(self.value, x)], -2)

    def represent(
        self,
        encoded: Sequence[Tensor],
        known: Tensor | None,
        state: Any = None,
        typicality_inputs: Sequence[Tensor] | None = None,
        quality: Tensor | None = None,
    ) -> Represented:
        found = super().represent(encoded, known, state, typicality_inputs, quality)
        values = self.values(blank_missing(encoded, known))
        log_precision = values.new_zeros(values.shape[:-1])
        return Represented(values, log_precision, known, found.gate, found.state)  # torch 2.6 traces no _replace

    def mix(
        self,
        estimates: Tensor,
        found: Represented,
        known: Tensor | None,
        frame: Tensor | None,
        foreign: Tensor | None = None,
    ) -> Mixed:
        flags = torch.ones_like(estimates[..., 0], dtype=torch.bool) if known is None else known
        shares = self.weigh(flags | ~flags.any(-1, keepdim=True), estimates.dtype)
        out: FusionOutput = found.gate
        prediction = (shares.unsqueeze(-1) * estimates).sum(-2)
        return Mixed(prediction, shares, out.weights, out.confidence, out.stage)

    def weigh(self, known: Tensor, dtype: torch.dtype) -> Tensor:
        # Alone among matrices this vector needs a larger rate, as the sharpness of ReliabilityFusion does.
        share = (SHARPENING_RATE * self.logits).softmax(0).to(dtype) * known
        return share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        values = self.values(x)
        return (self.weigh(known, values.dtype).unsqueeze(-1) * values).sum(-2)


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

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        first, second = (torch.tanh(linear(v)) for linear, v in zip(self.value, x))
        z = torch.sigmoid(self.gate(torch.cat(x, -1)))
        z = torch.where(known[..., :1], torch.where(known[..., 1:], z, 1.0), 0.0)
        return z * first + (1 - z) * second


@register("can", "CAN attention")
class ChannelAttention(PeerFusion):
    """CAN attention (ABAW 3): `p = [P_1 x_1; ...; P_M x_M]`, each `width` channels; `softmax(W p)` over all channels,
    times `p`; then Linear to `dim`.

    The product is scaled by the number of channels, so that even attention leaves `p` as it is: a constant that the
    last layer's weights would otherwise have to learn. The channels of a missing modality are left out of the softmax
    (and of that number).
    """

    def __init__(self, in_dims: Dims, dim: int, *, width: int = 128) -> None:
        super().__init__(in_dims, dim)
        check_int("width", width, 1)
        self.width, total = width, width * len(self.in_dims)
        self.project = nn.ModuleList(nn.Linear(d, width) for d in self.in_dims)
        self.score, self.out = nn.Linear(total, total), nn.Linear(total, dim)

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        channels = known.repeat_interleave(self.width, -1)  # (B, T, M * width)
        p = torch.cat([linear(v) for linear, v in zip(self.project, x)], -1)
        p = torch.where(channels, p, 0.0)
        # Finite where nothing is present: a softmax over nothing would be NaN.
        attention = self.score(p).masked_fill(~channels, -1e4).softmax(-1)
        return self.out(attention.to(p.dtype) * p * channels.sum(-1, keepdim=True))


@register("lfan", "leader-follower attention")
class LeaderFollower(PeerFusion):
    """LFAN (ABAW 2): in each frame `heads`-head attention over the modality tokens (query, key and value: a Linear to
    `width` a modality), plus the value, LayerNorm; the tokens concatenated with the leading feature; then Linear to
    `dim`.

    `leading`: name or index of the leading modality; default: the one named "visual" or "video", else the first.

    A missing modality is no key, and its own token and, if it leads, the leading feature are zeros.
    """

    def __init__(
        self, in_dims: Dims, dim: int, *, width: int = 32, heads: int = 2, leading: str | int | None = None
    ) -> None:
        super().__init__(in_dims, dim)
        check_int("width", width, 1)
        check_int("heads", heads, 1)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        self.width, self.heads, self.leading = width, heads, self._leader(leading)
        self.token = nn.ModuleList(nn.Linear(d, 3 * width) for d in self.in_dims)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(len(self.in_dims) * width + self.in_dims[self.leading], dim)

    def _leader(self, leading: str | int | None) -> int:
        names = self.names or ()
        if leading is None:
            return next((i for i, name in enumerate(names) if name in ("visual", "video")), 0)
        if isinstance(leading, str):
            if leading not in names:
                raise ValueError(f"leading: expected one of the modalities {list(names)}, got {leading!r}")
            return names.index(leading)
        check_int("leading", leading, 0, len(self.in_dims) - 1)
        return leading

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        batch, frames, modalities = known.shape
        tokens = torch.stack([linear(v) for linear, v in zip(self.token, x)], 2)  # (B, T, M, 3 * width)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3).flatten(0, 1) for part in tokens.chunk(3, -1)
        )  # (B * T, heads, M, width / heads)
        keys = (known | ~known.any(-1, keepdim=True)).flatten(0, 1)[:, None, None]  # (B * T, 1, 1, M)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys) + value
        attended = attended.transpose(1, 2).reshape(batch, frames, modalities, self.width)
        attended = torch.where(known.unsqueeze(-1), self.norm(attended), 0.0)
        return self.out(torch.cat([attended.flatten(2), x[self.leading]], -1))


@register("avrelscore", "AVRelScore", "sees a fixed past; remembers it from chunk to chunk")
class ReliabilityScore(PeerFusion):
    """AVRelScore (2023): for each modality `x + x * s`, `s = sigmoid` of three Conv1d over time with `kernel_size` taps
    and channels d -> 2d -> 2d -> d, ReLU between; then Linear of the concatenation to `dim`.

    Causal: the convolutions reach back only, over zeros before the first frame. (The published ones are centred.)
    A missing modality is zeros, in the convolutions and in the concatenation.
    """

    def __init__(self, in_dims: Dims, dim: int, *, kernel_size: int = 7) -> None:
        super().__init__(in_dims, dim)
        check_int("kernel_size", kernel_size, 1)
        self.span = 3 * (kernel_size - 1)  # frames before the first that the three layers see
        self.score = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(d, 2 * d, kernel_size),
                nn.ReLU(),
                nn.Conv1d(2 * d, 2 * d, kernel_size),
                nn.ReLU(),
                nn.Conv1d(2 * d, d, kernel_size),
                nn.Sigmoid(),
            )
            for d in self.in_dims
        )
        self.out = nn.Linear(sum(self.in_dims), dim)

    def fuse_chunk(
        self, x: list[Tensor], known: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """state: M tensors (B, span, d_m), the frames before this chunk; None: zeros."""
        frames = x[0].shape[1]
        before = state or tuple(v.new_zeros(v.shape[0], self.span, v.shape[2]) for v in x)
        whole = [torch.cat([past, v], 1) for past, v in zip(before, x)]
        scored = [v + v * net(w.transpose(1, 2)).transpose(1, 2) for net, v, w in zip(self.score, x, whole)]
        return self.out(torch.cat(scored, -1)), tuple(w[:, frames:] for w in whole)


# --------------------------------------------------------------------------- joint cross-attention: two, of fixed length
TEMPERATURE = 0.1  # of the gates of DCA, GRJCA and TAGF


class JointCrossAttention(nn.Module):
    """One layer of JCA (Praveen 2022) over two modalities of `length` frames, `d = d_1 + d_2`:

        J   = Wq [x_1; x_2]                                     (B, L, d)
        C_m = tanh((Wt_m x_m^T) J / sqrt(d))                    (B, d_m, d), Wt_m is L x L
        y_m = x_m + ReLU(W_m ReLU(tanh((Wv_m x_m) C_m)))        (B, L, d_m)

    All `W` are Linear with bias; dropout acts on `C_m` and on what is added to `x_m`. Frames in which both are missing
    are zero in `J`, and `y_m` is zero where modality m is missing.
    """

    def __init__(self, dims: Sequence[int], length: int, dropout: float) -> None:
        super().__init__()
        total = sum(dims)
        self.joint = nn.Linear(total, total)
        self.time = nn.ModuleList(nn.Linear(length, length) for _ in dims)
        self.value = nn.ModuleList(nn.Linear(d, d) for d in dims)
        self.out = nn.ModuleList(nn.Linear(total, d) for d in dims)
        self.dropout = Dropout(dropout)

    def forward(self, x: Sequence[Tensor], known: Tensor) -> list[Tensor]:
        joint = self.joint(torch.cat(list(x), -1))
        joint = torch.where(known.any(-1, keepdim=True), joint, 0.0)
        result = []
        for m, v in enumerate(x):
            correlation = torch.tanh(self.time[m](v.transpose(1, 2)) @ joint / joint.shape[-1] ** 0.5)
            attended = F.relu(torch.tanh(self.value[m](v) @ self.dropout(correlation)))
            v = v + self.dropout(F.relu(self.out[m](attended)))
            result.append(torch.where(known[..., m, None], v, 0.0))
        return result


class _JointFusion(PeerFusion):
    """The JCA family: `layers` of JointCrossAttention, untied, one after another; `gate` chooses, frame by frame, among
    a modality's states x_m, y_m of the first layer, y_m of the second ...; then Linear of the concatenation to `dim`.
    """

    causal, fixed_length, pairwise = False, True, True
    layers: ClassVar[int] = 1
    normalise: ClassVar[bool] = False  # inputs to unit length in each frame

    def __init__(self, in_dims: Dims, dim: int, *, length: int, dropout: float = 0.6) -> None:
        super().__init__(in_dims, dim, length=length)
        check_dropout(dropout)
        self.attention = nn.ModuleList(JointCrossAttention(self.in_dims, length, dropout) for _ in range(self.layers))
        self.out = nn.Linear(sum(self.in_dims), dim)

    def gate(self, m: int, states: list[Tensor]) -> Tensor:
        """`layers + 1` states (B, L, d_m) of modality m -> (B, L, d_m)."""
        return states[-1]

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        states = [[F.normalize(v, dim=-1) for v in x] if self.normalise else x]
        for layer in self.attention:
            states.append(layer(states[-1], known))
        return self.out(torch.cat([self.gate(m, [state[m] for state in states]) for m in range(2)], -1))


def _mixture(logits: Tensor, states: Sequence[Tensor]) -> Tensor:
    """(B, L, K) logits, K states (B, L, d) -> their mean under softmax(logits / TEMPERATURE)."""
    share = (logits / TEMPERATURE).softmax(-1)
    return (share.unsqueeze(-2).to(states[0].dtype) * torch.stack(list(states), -1)).sum(-1)


@register("jca", "joint cross-attention")
class JCA(_JointFusion):
    """JCA (Praveen 2022), two modalities, fixed length: one `JointCrossAttention`, then Linear of [y_1; y_2] to `dim`.

    A missing modality is zeros in `J`, in its own correlation and in the concatenation.
    """


@register("rjca", "recursive joint cross-attention")
class RJCA(_JointFusion):
    """RJCA, two modalities, fixed length: two untied `JointCrossAttention` layers on L2-normalised inputs, then Linear
    of the second's [y_1; y_2] to `dim`. Missing modalities as in `JCA`.
    """

    layers, normalise = 2, True


@register("dca", "dynamic cross-attention")
class DCA(_JointFusion):
    """DCA (Praveen 2024), two modalities, fixed length: for each modality the gate `softmax(W y / 0.1)` mixes the input
    x and the attended y of one `JointCrossAttention`; then Linear of the concatenation to `dim`. Missing modalities as
    in `JCA`.
    """

    def __init__(self, in_dims: Dims, dim: int, *, length: int, dropout: float = 0.6) -> None:
        super().__init__(in_dims, dim, length=length, dropout=dropout)
        self.score = nn.ModuleList(nn.Linear(d, self.layers + 1) for d in self.in_dims)

    def gate(self, m: int, states: list[Tensor]) -> Tensor:
        return _mixture(self.score[m](states[-1]), states)


@register("grjca", "gated recursive joint cross-attention")
class GRJCA(DCA):
    """GRJCA (2025), two modalities, fixed length: `RJCA`, and for each modality a gate `softmax(W y2 / 0.1)` over the
    L2-normalised input and the two layers' results; then Linear of the concatenation to `dim`. Missing modalities as in
    `JCA`.
    """

    layers, normalise = 2, True


@register("tagf", "time-aware gated fusion")
class TAGF(_JointFusion):
    """TAGF (Lee 2025), two modalities, fixed length: `RJCA`; in each frame a BiLSTM runs over the three steps
    (L2-normalised input, first, second layer) of a modality, a Linear scores each step, `softmax(score / 0.1)` mixes
    them; then Linear of the concatenation to `dim`. The BiLSTM has d_m / 2 units a direction. Missing modalities as in
    `JCA`.
    """

    layers, normalise = 2, True

    def __init__(self, in_dims: Dims, dim: int, *, length: int, dropout: float = 0.6) -> None:
        super().__init__(in_dims, dim, length=length, dropout=dropout)
        units = [max(d // 2, 1) for d in self.in_dims]
        self.lstm = nn.ModuleList(
            nn.LSTM(d, u, batch_first=True, bidirectional=True) for d, u in zip(self.in_dims, units)
        )
        self.score = nn.ModuleList(nn.Linear(2 * u, 1) for u in units)

    def gate(self, m: int, states: list[Tensor]) -> Tensor:
        steps = torch.stack(states, 2)  # (B, L, 3, d_m)
        hidden, _ = self.lstm[m](steps.flatten(0, 1))
        return _mixture(self.score[m](hidden).squeeze(-1).unflatten(0, steps.shape[:2]), states)


# -------------------------------------------------------------------------------------------- cross-modal transformer
class _Attention(nn.Module):
    """Pre-norm transformer layer whose queries are `x` and whose keys and values are `source`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.query_norm, self.source_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.source, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, source: Tensor, keys: Tensor) -> Tensor:
        """x, source (B, T, dim); keys (B, T) bool. In a sequence without any key attention brings zeros."""
        parts = (self.query(self.query_norm(x)), *self.source(self.source_norm(source)).chunk(2, -1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        some = keys.any(1)[:, None, None, None]  # a softmax over nothing would be NaN
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys[:, None, None] | ~some)
        attended = torch.where(some, attended, 0.0)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed(self.norm(x)))


@register("mult", "cross-modal transformer")
class CrossModalTransformer(PeerFusion):
    """MulT-style, two modalities or more, any length, sees the whole window: each modality projected to `dim`, plus
    sinusoidal positions; for each ordered pair (m, n) a transformer layer with queries of m and keys of n; for each m
    those results side by side and one self-attention layer; then Linear of all of them to `dim`, frame by frame.

    Keys are the frames in which modality n is not missing (in self-attention: any modality), and one that is missing
    throughout brings zeros; a missing frame still asks the other modalities as a query.
    """

    causal = False

    def __init__(self, in_dims: Dims, dim: int, *, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__(in_dims, dim)
        modalities = len(self.in_dims)
        if modalities < 2:
            raise ValueError(f"in_dims: expected 2 modalities or more for CrossModalTransformer, got {modalities}")
        check_int("heads", heads, 1)
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")
        check_dropout(dropout)
        self.project = nn.ModuleList(nn.Linear(d, dim) for d in self.in_dims)
        self.pairs = [(m, n) for m in range(modalities) for n in range(modalities) if m != n]
        self.cross = nn.ModuleList(_Attention(dim, heads, dropout) for _ in self.pairs)
        width = dim * (modalities - 1)
        self.memory = nn.ModuleList(_Attention(width, heads, dropout) for _ in self.in_dims)
        self.out = nn.Linear(width * modalities, dim)

    def fuse(self, x: list[Tensor], known: Tensor) -> Tensor:
        place = positions(known.shape[1], self.dim, arithmetic_dtype(x[0]), known.device)
        tokens = [linear(v) for linear, v in zip(self.project, x)]
        tokens = [token + place.to(token.dtype) for token in tokens]
        crossed: list[list[Tensor]] = [[] for _ in x]
        for layer, (m, n) in zip(self.cross, self.pairs):
            crossed[m].append(layer(tokens[m], tokens[n], known[..., n]))
        some = known.any(-1)
        joined = [torch.cat(parts, -1) for parts in crossed]
        return self.out(torch.cat([layer(z, z, some) for layer, z in zip(self.memory, joined)], -1))


def positions(frames: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(frames, dim) sinusoidal positions (Vaswani 2017): sin in the even channels, cos in the odd ones."""
    rate = 10000.0 ** (-2 * torch.arange((dim + 1) // 2, dtype=dtype, device=device) / dim)
    angle = torch.arange(frames, dtype=dtype, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]


# ---------------------------------------------------------------------------------------------------- other people's
def _load(path: Path) -> None:
    """Run a Python file that registers peers. ImportError where there is none."""
    spec = importlib.util.spec_from_file_location(f"sage_ext_peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"SAGE_EXT_PEERS: expected Python files separated by {os.pathsep!r}, got {str(path)!r}")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


for _path in filter(None, os.environ.get("SAGE_EXT_PEERS", "").split(os.pathsep)):
    _load(Path(_path))
