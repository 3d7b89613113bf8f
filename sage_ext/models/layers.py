"""The layers of `SAGE` beside its fusion: encoders of temporal blocks, and the memory behind the fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._typing import called_as


class Share(NamedTuple):
    """Rows `rank`, `rank + size`, ... of a batch of `whole` sequences: what one of `size` processes computes."""

    rank: int
    size: int
    whole: int

    @property
    def rows(self) -> int:
        return len(range(self.rank, self.whole, self.size))


def dropped(ones: Tensor, p: float, share: Share | None) -> Tensor:
    """Dropout of `ones`, a row or several a sequence. With a `share` all of the batch's are drawn and its own are taken, so that
    every process draws the same numbers, and together they have what one would have drawn for the batch."""
    if share is None:
        return F.dropout(ones, p)
    whole = ones.new_ones(share.whole, len(ones) // share.rows, *ones.shape[1:])
    return F.dropout(whole, p)[share.rank :: share.size].flatten(0, 1)


class Dropout(nn.Dropout):
    """`nn.Dropout` of x (B, ...)."""

    share: Share | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.share is None or not self.training:
            return super().forward(x)
        return x * dropped(torch.ones_like(x), self.p, self.share)


class ChannelDropout(nn.Module):
    """Dropout of whole channels for a whole sequence: x (B, T, dim), one draw a (B, dim).

    Neighbouring frames say nearly the same, so a draw a frame would be averaged away by the next convolution; and it
    would cost more than the convolution does.
    """

    share: Share | None = None

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * dropped(x.new_ones(x.shape[0], 1, x.shape[-1]), self.p, self.share)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


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

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


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

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


class PrecisionMemory(nn.Module):
    """What was seen lately, each frame counted by its precision: a normalised leaky average for each half-life.

    `average_r(t) = sum_k lambda_r^(t-k) p_k x_k / (a_r pbar + sum_k lambda_r^(t-k) p_k)`, `lambda_r = 0.5^(1/halflife_r)`, over
    the frames `k <= t` (all frames and `|t-k|` if not causal); `a_r` is learnt, the weight of the average's prior, 0, in frames
    of the mean precision `pbar` seen so far. The result is a Linear of the R averages side by side. With `p` the inverse variance
    of a frame this is the inverse-variance weighted mean of the past: unreliable frames hold what reliable ones left behind.
    Only how precise frames are against each other counts: where all are poor the memory averages as long as ever.

    Args:
        dim: channels. halflives: of the averages, in frames. causal: see above.
    """

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
        """x (B, T, dim), precision (B, T) >= 0, sums (B, R, dim + 2) before this chunk (None: nothing was seen): the
        memory (B, T, dim), and the sums for the next chunk."""
        average, sums = functional.leaky_average(
            x, precision, self.halflife, self.log_prior.exp(), sums, causal=self.causal, relative=True
        )
        return self.mix(average.flatten(2).to(self.mix.weight.dtype)).to(x.dtype), sums

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...
