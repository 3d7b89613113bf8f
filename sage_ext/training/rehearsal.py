"""Failure rehearsal: training windows in which a modality fails, so that its reliability can be learnt.

A model that never saw a modality fail trusts a dead one (a zeroed input looks "quiet", hence reliable). So before each
training step some windows of the batch get failures, the same way for every method that is compared:

    zero     the features are 0, and the presence mask does not tell
    freeze   the features stand still at the failure's first frame
    noise    Gaussian noise is added at a signal-to-noise ratio drawn for the failure; in some of the failures an automatic
             gain control then brings the power back to what it was
    swap     the features are another clip's at the same place in its window: plausible, but foreign
    drop     the modality is marked absent (its features are 0, as they are for any absent frame)
    gain     the features are too large or too small, measured from a point between zero and the window's mean
    occlude  some of the features are nearly still, where a frame of the window has them
    offset   each feature is off by up to three standard deviations at the failure's end, by a part of that at its beginning

Noise, gain, occlusion and offset leave something of what the modality saw, so that all modalities may fail in these ways
at once; the other kinds leave nothing. Labels, padding and modalities that do not fail are never touched.

Quality evidence in a batch goes with the features: a frozen frame has that of the failure's first frame, a swapped one
that of the other clip, a dropped one none (NaN). Of the other kinds it tells where a `meter` says what would have been
measured; else it stays as it is. Besides, and without a failure, it is made unknown, so that this is learnt too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.quality import Meter
from ..data.rates import FPS, default_frames, nearest

LENGTH = (8, 150)  # of a failure by default: frames at 30 a second
KINDS = ("zero", "freeze", "noise", "swap", "drop", "gain", "occlude", "offset")
MILD = ("noise", "gain", "occlude", "offset")  # those that leave something of the modality
GAIN = (1.5, 4.0)  # least and greatest factor of "gain", or its reciprocal
OCCLUDED = (0.25, 1.0)  # least and greatest share of the features in "occlude"
JITTER, JITTER_FRAMES = 0.2, 8  # of "occlude": standard deviations, and frames from knot to knot of the noise
OFFSET = 3.0  # standard deviations, at the most, at the end of "offset"


class Donors(NamedTuple):
    """The windows that a swap may take from: those of a whole batch, of which the rehearsed one may be a part."""

    clip: Tensor  # (windows,) which clip each is of
    window: Callable[[int, str], Mapping[str, Any]]  # place, modality -> its `window_tensors` of that modality alone


@dataclass(frozen=True)
class Rehearsal:
    """How often modalities fail, for how long and in what way. Calling it on a collated batch returns a new batch.

    probability   chance that a window is rehearsed at all
    whole         chance that a rehearsed window has one failure as long as the window (a clip-long failure is learnt
                  from these alone); otherwise it has one to `spans` failures, each of one modality drawn evenly
    length        seconds of a failure, (shortest, longest), drawn log-uniformly, cut at the window's ends. Default: 8 to
                  150 frames at 30 a second, see `data.rates` for slower data
    snr_db        signal-to-noise ratio of "noise", (lowest, highest) in dB, drawn evenly; the signal's power is its
                  variance over the window's present frames, averaged over the channels that vary
    levelled      share of "noise" behind a gain control
    kinds         relative frequency of each kind. Default: alike
    overlap       False: a frame keeps at least one modality that is present and has not failed, wherever it had one
                  besides the failing one; True: modalities fail independently of each other
    together      chance that in a rehearsed window all modalities fail in one span, each in a way that leaves something of
                  it (noise, gain, occlude, offset), drawn by `kinds` for each; nothing else fails in that window then
    unknown       chance that a modality's quality is unknown in a whole window, rehearsed or not, and the same again in a
                  span of it
    """

    probability: float = 0.6
    whole: float = 0.25
    spans: int = 3
    length: tuple[float, float] | None = None
    snr_db: tuple[float, float] = (-10.0, 10.0)
    levelled: float = 0.5
    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    overlap: bool = False
    together: float = 0.25
    unknown: float = 0.15

    def __post_init__(self) -> None:
        for name in ("probability", "whole", "levelled", "together", "unknown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {getattr(self, name)}")
        if self.spans < 1:
            raise ValueError(f"spans: expected at least 1, got {self.spans}")
        if self.length is not None and not 0 < self.length[0] <= self.length[1] < math.inf:
            raise ValueError(f"length: expected seconds, 0 < shortest <= longest, got {self.length}")
        if not self.snr_db[0] <= self.snr_db[1]:
            raise ValueError(f"snr_db: expected lowest <= highest, got {self.snr_db}")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or min(self.kinds.values(), default=0) < 0 or sum(self.kinds.values()) <= 0:
            raise ValueError(f"kinds: expected non-negative frequencies of {', '.join(KINDS)}, got {dict(self.kinds)}")

    def frames(self, fps: float) -> tuple[int, int]:
        """The shortest and the longest failure in frames, one at least, at `fps` frames a second."""
        if self.length is None:
            ends = [default_frames(thirtieths, fps) for thirtieths in LENGTH]
        else:
            ends = [seconds * fps for seconds in self.length]
        shortest, longest = (max(nearest(frames), 1) for frames in ends)
        return shortest, longest

    def __call__(
        self,
        batch: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        fps: float = FPS,
        meter: Meter | None = None,
        donors: Donors | None = None,
    ) -> dict[str, Any]:
        """`batch` as `sage_ext.data.windows.collate` makes it: features {name: (B, W, D)}, present (B, W, M) bool,
        frame (B, W) bool, clip (B,), and quality {name: (B, W, Q)}, which may be empty or not there; all on the CPU.
        Returns a new batch that shares nothing it changed with the old one, with "rehearsed" (B, W, M) bool: where a
        modality failed. `generators`: one for each window, of which its draws are, so that what becomes of a window is
        the same whatever windows are beside it. `fps`: frames a second. `meter`: as in `study.corruptions.corrupted`.
        `donors`: of "swap", where `batch` is a part of the batch; None: its windows. ValueError for another number of
        generators than windows."""
        if len(generators) != len(batch["present"]):
            raise ValueError(
                f"generators: expected one for each of {len(batch['present'])} windows, got {len(generators)}"
            )
        donors = donors or _among(batch)
        features = {name: value.clone() for name, value in batch["features"].items()}
        present = batch["present"].clone()
        out = {**batch, "features": features, "present": present, "rehearsed": torch.zeros_like(present)}
        if "quality" in batch:
            out["quality"] = {name: value.clone() for name, value in batch["quality"].items()}
        modalities = range(len(features))
        for row, generator in enumerate(generators):
            if _uniform(generator) < self.probability:
                together = _uniform(generator) < self.together and any(self.kinds.get(kind, 0) > 0 for kind in MILD)
                whole = _uniform(generator) < self.whole
                for _ in range(1 if whole or together else 1 + _index(self.spans, generator)):
                    if together:
                        failing = [(modality, self._draw_kind(generator, MILD)) for modality in modalities]
                    else:
                        failing = [(_index(len(features), generator), self._draw_kind(generator))]
                    span = self._draw_span(batch["frame"][row], whole, generator, fps)
                    for modality, kind in failing:
                        self._fail(
                            batch, out, row, modality, kind, span, together or self.overlap, generator, meter, donors
                        )
            for value in out.get("quality", {}).values():
                for whole in (True, False):
                    if _uniform(generator) < self.unknown:
                        value[row, self._draw_span(batch["frame"][row], whole, generator, fps)] = math.nan
        return out

    def _fail(
        self,
        batch: Mapping[str, Any],
        out: dict[str, Any],
        row: int,
        modality: int,
        kind: str,
        span: slice,
        overlap: bool,
        generator: torch.Generator,
        meter: Meter | None,
        donors: Donors,
    ) -> None:
        """One failure of one modality of window `row`. `overlap`: the others may have failed, all of them."""
        name = list(batch["features"])[modality]
        present, failed = batch["present"][row, span], out["rehearsed"][row, span]  # (L, M) each
        hit = present[:, modality] & batch["frame"][row, span] & ~failed[:, modality]
        if not overlap and present.shape[1] > 1:
            sound = present & ~failed
            sound[:, modality] = False
            hit &= sound.any(-1)

        # (B, W, D) and (B, W, Q) or nothing, as they were before any failure
        sources = [source[name] for source in (batch["features"], batch.get("quality", {})) if name in source]
        value, *quality = (source[row, span] for source in sources)
        if kind == "swap":
            others = (donors.clip != batch["clip"][row]).nonzero().flatten()
            if len(others):
                donor = donors.window(int(others[_index(len(others), generator)]), name)
                hit &= donor["present"][span, 0] & donor["frame"][span]
                value, *quality = (donor[key][name][span] for key in ("features", "quality")[: len(sources)])
            else:
                kind = "noise"  # nobody to swap with
        if not hit.any():
            return
        if kind == "freeze":
            first = hit.nonzero()[0, 0]
            value, *quality = (rows[first].expand_as(rows) for rows in (value, *quality))
        elif kind in ("zero", "drop"):
            value = torch.zeros_like(value)
        elif kind != "swap":
            usual = sources[0][row][batch["present"][row, :, modality] & batch["frame"][row]]
            value = self._mild(kind, value, usual, generator)
        _replace(out["features"][name][row, span], hit, value)
        if meter is not None and quality and kind in ("zero", *MILD):
            there = batch["present"][row, :, modality] & batch["frame"][row]
            before, after = sources[0][row][there].numpy(), out["features"][name][row][there].numpy()
            found = sources[1][row].clone()
            told = meter(name, found[there].numpy(), before, after, before.std(axis=0))
            found[there] = torch.from_numpy(told).to(found.dtype)
            quality = [found[span]]
        if kind == "drop":
            out["present"][row, span, modality] &= ~hit
            quality = [torch.full_like(rows, math.nan) for rows in quality]
        for rows in quality:
            _replace(out["quality"][name][row, span], hit, rows)
        out["rehearsed"][row, span, modality] |= hit

    def _mild(self, kind: str, value: Tensor, usual: Tensor, generator: torch.Generator) -> Tensor:
        """(L, D) `value` under one of MILD; `usual` (N, D) are the window's frames that have the modality, one at least."""
        length, dim = value.shape
        if kind == "gain":
            log = math.log(GAIN[0]) + math.log(GAIN[1] / GAIN[0]) * _uniform(generator)
            centre = usual.mean(0) * _uniform(generator)
            return centre + math.exp(log if _uniform(generator) < 0.5 else -log) * (value - centre)
        if kind in ("occlude", "offset"):
            deviation = usual.std(0, correction=0)
        if kind == "occlude":
            share = OCCLUDED[0] + (OCCLUDED[1] - OCCLUDED[0]) * _uniform(generator)
            hidden = torch.randperm(dim, generator=generator) < max(round(share * dim), 1)
            knots = torch.randn(1, dim, 2 + length // JITTER_FRAMES, generator=generator, dtype=value.dtype)
            slow = torch.nn.functional.interpolate(knots, length, mode="linear")[0].T
            instead = usual[_index(len(usual), generator)] + JITTER * deviation * slow
            return torch.where(hidden, instead, value)
        if kind == "offset":
            reach = OFFSET * (2 * torch.rand(dim, generator=generator, dtype=value.dtype) - 1)
            ramp = torch.linspace(_uniform(generator), 1, length, dtype=value.dtype)
            return value + ramp[:, None] * (reach * deviation)
        snr = self.snr_db[0] + (self.snr_db[1] - self.snr_db[0]) * _uniform(generator)
        scale = math.sqrt(_power(usual) / 10 ** (snr / 10))
        value = value + scale * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if _uniform(generator) < self.levelled:
            mean = usual.mean(0)
            value = mean + (value - mean) / math.sqrt(1 + 1 / 10 ** (snr / 10))
        return value

    def _draw_kind(self, generator: torch.Generator, among: Sequence[str] = KINDS) -> str:
        shares = {kind: share for kind, share in self.kinds.items() if kind in among}
        rest = _uniform(generator) * sum(shares.values())
        for kind, share in shares.items():
            rest -= share
            if rest < 0:
                return kind
        return [kind for kind, share in shares.items() if share > 0][-1]

    def _draw_span(self, frame: Tensor, whole: bool, generator: torch.Generator, fps: float) -> slice:
        """Of a failure that begins in an existing frame (padding is at the end), or is as long as the window."""
        if whole:
            return slice(0, len(frame))
        shortest, longest = self.frames(fps)
        frames = int(frame.sum())
        length = round(shortest * (longest / shortest) ** _uniform(generator))
        start = _index(max(frames, 1), generator) - length // 2  # as likely at the ends as in the middle
        return slice(max(start, 0), min(start + length, frames))


def _among(batch: Mapping[str, Any]) -> Donors:
    """The windows of `batch` for donors."""

    def window(place: int, name: str) -> dict[str, Any]:
        modality = list(batch["features"]).index(name)
        return {
            "present": batch["present"][place, :, modality : modality + 1],
            "frame": batch["frame"][place],
            **{key: {name: batch[key][name][place]} for key in ("features", "quality") if name in batch.get(key, {})},
        }

    return Donors(batch["clip"], window)


def _replace(target: Tensor, hit: Tensor, value: Tensor) -> None:
    """The rows of `target` (L, D) that are `hit` (L,) by those of `value`."""
    torch.where(hit.unsqueeze(-1), value, target, out=target)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _index(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _power(rows: Tensor) -> float:
    """Variance over (N, D) rows, averaged over the channels that vary at all."""
    variance = rows.double().var(0, correction=0)
    varying = variance > 0
    return float(variance[varying].mean()) if varying.any() else 0.0
