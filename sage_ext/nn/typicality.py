"""Typicality: how far a modality's recent energy, motion and residual are from those of the training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import CONSTANTS, arithmetic_dtype
from .._typing import called_as
from .moments import RunningMoments

MAX_COMPONENTS = 32  # principal components of a modality
EXACT = 1024  # up to so many features they are exact, from all second moments; above, from an iteration:
SPARE, POWER = 8, 6  # of so many columns more, in so many rounds
EXPLAINED = 0.95  # share of a modality's variance that they hold, if so many do


def typicality_features(energies: int) -> int:
    """Numbers a modality: the z-score of each energy, and its absolute value."""
    return 2 * energies


class Typicality(RunningMoments):
    """How usual a modality's recent energy, motion and residual are, against the training data.

    Per frame and modality the log energies `log(mean(x^2) + 1e-8)` of the frame, of its difference from the frame before, and,
    where `dims` says how many features there are, of its residual: what is left of the frame outside the principal components
    of the training data (the Q statistic, or squared prediction error, of process monitoring: Jackson and Mudholkar 1979).
    Each is averaged over the last `window` frames in which it exists, z-scored with the buffers `mean` and `var`, compressed by
    asinh (a little noise is far from usual already, and must still look different from a lot), clamped to +-`clamp`,
    joined by their absolute values: (B, T, M, 2 E) for E energies, 2 or 3. A feature without a single frame in its window is 0
    (neither usual nor unusual).

    The statistics follow the training batches by momentum (a plain average over the first `1/momentum` batches) until
    `fit` sets them from data, after which they stay. The components are learnt by `fit` alone; until then there are none, and
    the residual is the frame.
    """

    def __init__(
        self,
        modalities: int,
        window: int = 16,
        clamp: float = CONSTANTS["typicality_limit"],
        momentum: float = 0.01,
        dims: Sequence[int] | None = None,
    ) -> None:
        self.energies = 2 if dims is None else 3
        super().__init__([modalities, self.energies], momentum)
        self.modalities, self.window, self.clamp = modalities, window, clamp
        self.dims = None if dims is None else tuple(dims)
        self.features = typicality_features(self.energies)
        for m, d in enumerate(self.dims or ()):
            # Rows are orthonormal, or zero where fewer components hold enough.
            self.register_buffer(f"components_{m}", torch.zeros(min(MAX_COMPONENTS, max(d - 1, 1)), d))

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, window={self.window}, clamp={self.clamp}, momentum={self.momentum}"

    def averages(
        self, inputs: Sequence[Tensor], known: Tensor | None, history: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Windowed log energies (B, T, M, E), which of them exist, and (energy, counted, last) for the next chunk.

        `inputs`: M tensors (B, T, d), zero where `known` (B, T, M) is False.
        """
        dtype = arithmetic_dtype(inputs[0])
        x = [v.to(dtype) for v in inputs]
        batch, frames = x[0].shape[:2]
        carried = self.window - 1
        if history is None:
            zeros = x[0].new_zeros(batch, carried, self.modalities, self.energies)
            energy, counted, last = zeros, zeros, torch.cat([v.new_zeros(batch, v.shape[-1]) for v in x], -1)
        else:
            energy, counted, last = history
        here = x[0].new_ones(batch, frames, self.modalities) if known is None else known.to(dtype)
        before = torch.cat([counted[:, -1:, :, 0], here], 1)[:, :-1]  # the frame before: does it count?
        now = torch.stack([here, here * before, here][: self.energies], -1)  # (B, T, M, E)

        logs = []
        for m, (v, previous) in enumerate(zip(x, last.split([v.shape[-1] for v in x], -1))):
            step = v - torch.cat([previous.unsqueeze(1), v], 1)[:, :-1]
            parts = [v, step]
            if self.dims is not None:
                components = getattr(self, f"components_{m}").to(dtype)  # torch 2.6 exports no get_buffer
                parts.append(v - (v @ components.t()) @ components)
            square = torch.stack([part.square().mean(-1) for part in parts], -1)  # (B, T, E)
            logs.append((square + CONSTANTS["energy_floor"]).log())
        energy = torch.cat([energy, torch.stack(logs, 2) * now], 1)  # (B, W-1+T, M, E)
        counted = torch.cat([counted, now], 1)
        # Each output sums its own window, so a frame's value does not depend on where the chunk began.
        joined = torch.stack([energy, counted], -1).flatten(2).transpose(1, 2)  # (B, M*E*2, W-1+T)
        pooled = F.avg_pool1d(joined, self.window, 1).transpose(1, 2).unflatten(2, (self.modalities, self.energies, 2))
        exists = pooled[..., 1] > 0
        average = pooled[..., 0] / torch.where(exists, pooled[..., 1], 1.0)
        # An absent frame has no typicality even if its window reaches back to frames that do.
        exists = exists & (here > 0).unsqueeze(-1)
        tail = (energy[:, frames:], counted[:, frames:], torch.cat([v[:, -1] for v in x], -1))
        return average, exists, tail

    def forward(
        self, inputs: Sequence[Tensor], known: Tensor | None, history: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        average, exists, tail = self.averages(inputs, known, history)
        if self.training:
            self._follow(average.detach(), exists)
        # Copies: a later forward may move the buffers before this one's backward has run.
        mean, std = (
            self.mean.clone().to(average.dtype),
            self.var.clamp(min=CONSTANTS["variance_floor"]).sqrt().to(average.dtype),
        )
        z = torch.where(exists, (average - mean) / std, 0.0).asinh().clamp(-self.clamp, self.clamp)
        return torch.cat([z, z.abs()], -1), tail

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Set the statistics from batches that begin with (inputs, known), exactly, and stop following training batches. With
        `dims` the batches are iterated several times."""
        if self.dims is not None:
            self._fit_components(batches)
        total = self._gather(self.averages(inputs, known, None)[:2] for inputs, known, *_ in batches)
        if not bool((total[0] >= 2).all()):
            raise ValueError(f"batches: expected at least two frames of every modality, got {total[0].tolist()}")
        self._set_moments(total[1], total[2] / total[0])

    def _fit_components(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """The first principal components: exactly, in one pass through the data, or by block power iteration (Halko, Martinsson
        and Tropp 2011), where the square of the number of features is too much to hold."""
        assert self.dims is not None
        generator = torch.Generator().manual_seed(0)
        device = self.mean.device
        bases = []
        for m, d in enumerate(self.dims):
            width = d if d <= EXACT else len(self.get_buffer(f"components_{m}")) + SPARE
            start = torch.randn(d, width, generator=generator, dtype=torch.float64).to(device)
            bases.append(torch.linalg.qr(start).Q)
        narrow = [m for m, d in enumerate(self.dims) if d > EXACT]
        for _ in range(POWER if narrow else 0):
            moved = {m: torch.zeros_like(bases[m]) for m in narrow}
            for m, rows in self._rows(batches, narrow):
                moved[m] += rows.t() @ (rows @ bases[m])
            for m, y in moved.items():
                bases[m] = torch.linalg.qr(y).Q
        inner = [torch.zeros(b.shape[1], b.shape[1], dtype=torch.float64, device=device) for b in bases]
        total = [torch.zeros((), dtype=torch.float64, device=device) for _ in bases]
        for m, rows in self._rows(batches, range(len(bases))):
            inside = rows @ bases[m]
            inner[m] += inside.t() @ inside
            total[m] += rows.square().sum()
        for m, basis in enumerate(bases):
            values, vectors = torch.linalg.eigh(inner[m])  # rising
            share = values.flip(0).clamp(min=0).cumsum(0) / total[m].clamp(min=1e-300)
            components = self.get_buffer(f"components_{m}")
            count = min(int((share < EXPLAINED).sum()) + 1, len(components))
            components.zero_()
            components[:count] = (basis @ vectors.flip(1)[:, :count]).t().to(components.dtype)

    @staticmethod
    def _rows(batches: Iterable[tuple[Any, ...]], modalities: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Of each of `modalities` the frames that count, (n, d) float64, batch by batch."""
        for inputs, known, *_ in batches:
            for m in modalities:
                v = inputs[m]
                yield m, (v if known is None else v[known[..., m]]).flatten(0, -2).double()
