"""A frame in, an estimate out: the session, and what is remembered of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.targets import VALENCE_AROUSAL, Targets
from ..functional import ccc_from_moments
from ..metrics import StreamingCCC
from ..models.sage import SAGE
from .frames import Frame

RECENT = 300  # frames of the running concordance's window, at 30 a second


class Latency:
    """A histogram of microseconds: 100 bins a decade from 1 us to 1000 s, so quantiles are good to 1.2 %."""

    PER_DECADE = 100

    def __init__(self) -> None:
        self.counts = np.zeros(9 * self.PER_DECADE, np.int64)
        self.frames, self.largest, self.last = 0, 0.0, 0.0

    def add(self, us: float) -> None:
        at = int(np.log10(us) * self.PER_DECADE) if us > 1 else 0
        self.counts[min(at, len(self.counts) - 1)] += 1
        self.frames += 1
        self.last, self.largest = us, max(us, self.largest)

    def quantile(self, q: float) -> float:
        """Microseconds within which a share `q` of the frames was answered; 0 before the first."""
        total = np.cumsum(self.counts)
        if not total[-1]:
            return 0.0
        at = int(np.searchsorted(total, max(q * total[-1], 1)))
        return min(10 ** ((at + 0.5) / self.PER_DECADE), self.largest)

    def bars(self, per_decade: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Counts of fewer, wider bins (n,), from the first that counts to the last, and their edges (n + 1,) in us."""
        wide = self.counts.reshape(-1, self.PER_DECADE // per_decade).sum(1)
        used = np.flatnonzero(wide)
        if not len(used):
            return wide[:0], np.ones(1)
        low, high = used[0], used[-1] + 1
        return wide[low:high], 10 ** (np.arange(low, high + 1) / per_decade)

    def line(self) -> str:
        quantiles = "  ".join(f"p{round(100 * q)} {microseconds(self.quantile(q))}" for q in (0.5, 0.9, 0.99))
        return f"{quantiles}  max {microseconds(self.largest)}"

    def text(self, width: int = 50) -> list[str]:
        """Lines for a terminal; the bars are linear in the count, and none that counts is empty."""
        counts, edges = self.bars()
        return [
            f"{microseconds(edge):>9} {'#' * max(round(width * n / counts.max()), int(n > 0)):{width}} {n}".rstrip()
            for edge, n in zip(edges, counts.tolist())
        ]


def microseconds(us: float) -> str:
    if us < 1e3:
        return f"{us:.0f} us" if us >= 10 else f"{us:.1f} us"
    return f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"


class Quality:
    """Concordance with the truth so far, and of the last `recent` frames (`temporal_ccc`, its state carried)."""

    def __init__(
        self, labels: np.ndarray, valid: np.ndarray, targets: Targets = VALENCE_AROUSAL, recent: int = RECENT
    ) -> None:
        """labels (T, C) on [-1, 1], valid (T,) bool: of frame 1, 2 ...; frames beyond T are not counted."""
        self.labels, self.valid = torch.from_numpy(np.nan_to_num(labels).astype(np.float32)), valid
        self.targets = targets
        self.whole, self.recent = StreamingCCC(len(targets)), StreamingCCC(len(targets), window=recent)
        self.counted = 0
        self.window: deque[bool] = deque(maxlen=recent)

    def add(self, number: int, prediction: torch.Tensor) -> dict[str, Any]:
        """Frame `number` (from 1) with its prediction (1, C) -> "truth", "ccc", "ccc_recent"; None where unknown."""
        known = number <= len(self.valid) and bool(self.valid[number - 1])
        target = self.labels[number - 1 : number] if known else torch.zeros(1, len(self.targets))
        mask = torch.tensor([known])
        self.whole.update(prediction, target, mask)
        self.recent.update(prediction, target, mask)
        self.counted += known
        self.window.append(known)
        return {
            "truth": in_units(self.targets, target[0].tolist()) if known else None,
            "ccc": self._scores(self.whole, self.counted),
            "ccc_recent": self._scores(self.recent, sum(self.window)),
        }

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (n, C) of these frames, and (n,) which of them are known."""
        rows = np.minimum(numbers, len(self.valid)) - 1
        return self.labels.numpy()[rows], self.valid[rows] & (numbers <= len(self.valid))

    def _scores(self, metric: StreamingCCC, counted: int) -> dict[str, float] | None:
        names = [target.name for target in self.targets]
        return named(names, metric.compute().tolist()) if counted >= 2 else None

    def scores(self) -> list[float]:
        """The CCC of each target over every labelled frame; 0 where undefined."""
        return ccc_from_moments(self.whole.moments).tolist()


def named(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in zip(names, values)}


def in_units(targets: Targets, values: Sequence[float]) -> dict[str, float]:
    """Values on [-1, 1] -> in the targets' own units, six digits of half their range."""
    return {target.name: round(target.unscaled(x), target.digits) for target, x in zip(targets, values)}


@dataclass
class Recording:
    """The last frames of a session, oldest first."""

    number: np.ndarray  # (T,) frame in the input, from 1
    prediction: np.ndarray  # (T, C) on [-1, 1]
    weights: np.ndarray  # (T, M)
    confidence: np.ndarray  # (T, M)
    stage: np.ndarray  # (T, S)
    present: np.ndarray  # (T, M) bool


class Trace:
    """Room for the last `keep` frames, allocated as it is needed."""

    def __init__(self, modalities: int, stages: int, keep: int, targets: int = 2) -> None:
        self.keep, self.taken = keep, 0
        self.cuts = np.cumsum([1, targets, modalities, modalities, stages])
        self.rows = np.zeros((min(1024, keep), self.cuts[-1] + modalities))

    def add(self, row: list[float]) -> None:
        if self.taken == len(self.rows) < self.keep:
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])[: self.keep]
        self.rows[self.taken % len(self.rows)] = row
        self.taken += 1

    def recording(self) -> Recording:
        at = self.taken % len(self.rows)
        rows = (
            np.concatenate([self.rows[at:], self.rows[:at]]) if self.taken > len(self.rows) else self.rows[: self.taken]
        )
        number, prediction, weights, confidence, stage, present = np.split(rows, self.cuts, 1)
        return Recording(number[:, 0].astype(np.int64), prediction, weights, confidence, stage, present > 0)


class Estimator:
    """One stream through a causal `SAGE`: a record of plain Python numbers for each frame, and the session's figures.

    `keep`: how many of the last frames `trace` remembers for a report; 0: none, and no `trace`. `recent`: frames of the
    running concordance's window.
    """

    def __init__(
        self,
        model: SAGE,
        names: Sequence[str],
        *,
        targets: Targets = VALENCE_AROUSAL,
        device: str = "cpu",
        quality: Quality | None = None,
        keep: int = 0,
        recent: int = RECENT,
    ) -> None:
        self.session, self.names, self.quality = model.stream(device=device), tuple(names), quality
        self.quality_dims = dict(zip(self.names, model.quality_dims))
        self.targets, self.recent = targets, recent
        if self.session.num_targets != len(targets):
            raise ValueError(
                f"model: expected {len(targets)} targets ({', '.join(target.name for target in targets)}), got "
                f"{self.session.num_targets}"
            )
        # Valence and arousal stand in the record itself, other targets, of whatever names, in its "prediction".
        self._apart = [target.name for target in targets] != [target.name for target in VALENCE_AROUSAL]
        self.latency, self.step = Latency(), Latency()  # frame read to answer made; the model's part of it
        self.trace = Trace(len(self.names), self.session.stages, keep, len(targets)) if keep else None

    def values(self, record: dict[str, Any]) -> list[float]:
        """What a record says of each target."""
        said = record["prediction"] if self._apart else record
        return [said[target.name] for target in self.targets]

    def take(self, number: int, frame: Frame, began: float | None = None) -> dict[str, Any]:
        """The estimate for frame `number` (from 1) of the input. `began`: `time.perf_counter()` when it had been read."""
        before = time.perf_counter()
        out = self.session.step(frame.features, frame.present, quality=frame.quality or None)
        after = time.perf_counter()
        prediction, weights, confidence, stage, present = (
            x[0].tolist() for x in (out.prediction, out.weights, out.confidence, out.stage, out.present)
        )
        said: dict[str, Any] = in_units(self.targets, prediction)
        record: dict[str, Any] = {"frame": number, **frame.echo, **({"prediction": said} if self._apart else said)}
        record["weights"], record["confidence"] = named(self.names, weights), named(self.names, confidence)
        record["present"] = dict(zip(self.names, present))
        record["stage"] = [round(p, 6) for p in stage]
        self.step.add(1e6 * (after - before))
        self.latency.add(1e6 * (time.perf_counter() - (before if began is None else began)))
        record["latency_us"] = round(self.latency.last, 1)
        if self.quality is not None:
            record.update(self.quality.add(number, out.prediction))
        if self.trace is not None:
            self.trace.add([number, *prediction, *weights, *confidence, *stage, *present])
        return record
