"""Whose stream is it? A filter over the hypotheses that a modality's stream belongs to somebody else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from .._arguments import CONSTANTS
from .._typing import called_as

MARGIN = CONSTANTS["foreign_margin"]  # confidence is kept this far from 0 and 1: nobody's disagreement is beyond doubt


class ForeignFilter(nn.Module):
    """The probability that each modality's stream is foreign: it belongs to another person or place than the labels.

    Hypotheses: all streams are mine, or that of modality m, one of those with a prior above 0, is foreign. Two estimates of
    the same targets, put to scale, that explain the shares `r_m` and `r_n` of their variance by errors of their own, differ by
    `r_m + r_n - 2 r_m r_n` of that variance on average; if one of them is foreign, by `r_m + r_n`. So each pair of modalities
    gives a log-likelihood ratio of two Gaussians for its squared difference, summed over targets, divided by `pace`, the
    number of frames that bring as much as one independent observation; a hypothesis is told by the pairs that its modality is in.
    `functional.stage_filter` accumulates it over time, with a visit of `dwell` frames on average.

    With two modalities both hypotheses have the same evidence, disagreement, and only the prior tells them apart.

    Args:
        prior: of each modality, the share of time in which it is foreign, from 0 up; their sum is below 1.
        pace, dwell: in frames.
    """

    transition: Tensor
    initial: Tensor

    def __init__(self, prior: Sequence[float], pace: float, dwell: float) -> None:
        super().__init__()
        self.prior, self.pace, self.dwell = tuple(prior), pace, dwell
        total = sum(prior)
        mine = 1 - total
        count = len(prior)
        chance = torch.zeros(1 + count, 1 + count, dtype=torch.float64)
        leave = 1 / dwell
        for m, p in enumerate(prior):
            chance[1 + m, 0], chance[1 + m, 1 + m] = leave, 1 - leave
            chance[0, 1 + m] = leave * p / mine  # so that the prior is what the chain settles to
        chance[0, 0] = 1 - chance[0, 1:].sum()
        self.register_buffer("transition", chance.log().clamp(min=-1e30).float(), persistent=False)
        initial = torch.tensor([mine, *prior], dtype=torch.float64)
        self.register_buffer("initial", initial.log().clamp(min=-1e30).float(), persistent=False)

    def extra_repr(self) -> str:
        return f"prior={self.prior}, pace={self.pace}, dwell={self.dwell}"

    def forward(
        self, scaled: Tensor, confidence: Tensor, known: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """scaled (B, T, M, C): estimates put to scale, in standard deviations of the targets; confidence (B, T, M); known
        (B, T, M). Returns (B, T, 1 + M), that all are mine, or that modality m is foreign, and the log-belief (B, 1 + M)
        for the next chunk."""
        r = confidence.clamp(MARGIN, 1 - MARGIN)
        modalities = r.shape[-1]
        told = [torch.zeros_like(r[..., 0]) for _ in range(modalities)]
        for m in range(modalities):
            for n in range(m):
                apart = r[..., m] + r[..., n]
                mine = apart - 2 * r[..., m] * r[..., n]
                gap = (scaled[..., m, :] - scaled[..., n, :]).square()
                gain = 0.5 * (gap * (1 / mine - 1 / apart).unsqueeze(-1) + (mine / apart).log().unsqueeze(-1)).sum(-1)
                if known is not None:
                    gain = torch.where(known[..., m] & known[..., n], gain, 0.0)
                told[m] = told[m] + gain
                told[n] = told[n] + gain
        emission = torch.stack([torch.zeros_like(told[0]), *told], -1) / self.pace
        initial = self.initial.to(emission.dtype) if state is None else state
        return functional.stage_filter(emission, self.transition.to(emission.dtype), initial)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...


def check_trust(prior: Sequence[float]) -> None:
    for p in prior:
        if not (isinstance(p, (int, float)) and 0 <= p < 1 and math.isfinite(p)):
            raise ValueError(f"trust: expected the share of time that a stream is foreign, in [0, 1), got {p}")
    if sum(prior) >= 1:
        raise ValueError(f"trust: expected shares of time that sum to less than 1, got {list(prior)}")
