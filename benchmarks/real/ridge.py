"""A ridge regression on causal moving averages: what any fusion has to beat on real data to be worth anything.

Every feature of every modality is standardised by the training frames and averaged over the last 1, 3, 8, 20 and 60
seconds (`SECONDS`) of its video; a missing frame counts as the mean. One linear map of all of that to the targets is
fitted on the training split of a fold, under each of `PENALTIES`; that of the best CCC on the fold's tuning split is taken,
a target at a time. Least squares shrinks an estimate towards the mean, which CCC punishes, so it is put to the scale of
the training labels: their mean and standard deviation, which is the scale of the greatest CCC that a correlation leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sage_ext.data import AffWild2, Clip
from sage_ext.study.plan import Part, scored_clips

SECONDS = (1, 3, 8, 20, 60)
PENALTIES = tuple(10.0**e for e in range(-4, 4))  # as shares of the number of frames


def predictions(parts: Sequence[Part], names: Sequence[str], *, quality: bool = False) -> dict[str, np.ndarray]:
    """{clip: (T, C)}: every scored clip, predicted from the modalities `names` by the fit of its fold. `quality`: what the data
    set has of the modalities' quality is given as further features."""
    found = {}
    for part in parts:
        train, tune = (list(AffWild2(part.data, split, modalities=names)) for split in ("train", "validation"))
        fit = Ridge(train, tune, quality=quality)
        found.update({clip.name: fit.predict(clip) for clip in scored_clips(part, tuple(names))})
    return found


class Ridge:
    def __init__(self, train: Sequence[Clip], tune: Sequence[Clip], *, quality: bool = False) -> None:
        self.quality = quality
        rows = np.concatenate([self._rows(clip) for clip in train])
        self.mean = np.nan_to_num(_over(rows, np.nanmean))
        self.std = np.nan_to_num(_over(rows, np.nanstd))
        inputs, labels = self._annotated(train)
        self.centre, offset, scale = inputs.mean(0), labels.mean(0), labels.std(0)
        x, y = inputs - self.centre, labels - offset
        values, vectors = np.linalg.eigh(x.T @ x / len(x))
        along = vectors.T @ (x.T @ y) / len(x)
        tried = np.stack([vectors @ (along / (np.maximum(values, 0) + p)[:, None]) for p in PENALTIES])  # (P, D, C)
        spread = (x @ tried).std(1)  # (P, C)
        tried *= np.divide(scale, spread, out=np.zeros_like(spread), where=spread > 1e-9)[:, None]
        inputs, labels = self._annotated(tune)
        score = np.stack([concordance((inputs - self.centre) @ weights + offset, labels) for weights in tried])
        best = score.argmax(0)
        self.penalties = [PENALTIES[i] for i in best]  # one a target
        self.weights = np.stack([tried[i, :, c] for c, i in enumerate(best)], 1)
        self.offset = offset

    def predict(self, clip: Clip) -> np.ndarray:
        """(T, C) on [-1, 1]."""
        return (self._inputs(clip) - self.centre) @ self.weights + self.offset

    def _annotated(self, clips: Iterable[Clip]) -> tuple[np.ndarray, np.ndarray]:
        parts = [(self._inputs(clip)[clip.valid], np.asarray(clip.labels)[clip.valid]) for clip in clips]
        inputs, labels = (np.concatenate(column).astype(np.float64) for column in zip(*parts))
        return inputs, labels

    def _inputs(self, clip: Clip) -> np.ndarray:
        """(T, D * len(SECONDS))."""
        scaled = np.nan_to_num((self._rows(clip) - self.mean) / np.where(self.std > 0, self.std, np.inf))
        return np.concatenate([causal_mean(scaled, max(round(s * clip.fps), 1)) for s in SECONDS], 1)

    def _rows(self, clip: Clip) -> np.ndarray:
        """(T, D) of all modalities, NaN where missing."""
        told = [(values, clip.present[name]) for name, values in clip.features.items()]
        if self.quality:
            have: Mapping[str, np.ndarray] = getattr(clip, "quality", {})
            told += [(have[name], np.ones(clip.num_frames, bool)) for name in clip.features if name in have]
        return np.concatenate([_whole(values, np.asarray(there), clip.num_frames) for values, there in told], 1)


def _whole(values: np.ndarray, there: np.ndarray, frames: int) -> np.ndarray:
    """(frames, D) float64, NaN where missing."""
    given = np.asarray(values[:frames], np.float64)
    rows = np.full((frames, given.shape[1]), np.nan)
    rows[: len(given)] = given
    rows[~there] = np.nan
    return rows


def _over(rows: np.ndarray, statistic) -> np.ndarray:
    """A statistic of each column's known numbers, NaN where there are none."""
    known = np.isfinite(rows).any(0)
    out = np.full(rows.shape[1], np.nan)
    out[known] = statistic(rows[:, known], axis=0)
    return out


def causal_mean(rows: np.ndarray, width: int) -> np.ndarray:
    """(T, D) -> (T, D): the mean of a row and the width - 1 before it, of as many as there are."""
    total = np.cumsum(rows, axis=0)
    if width < len(rows):
        total[width:] -= total[:-width].copy()
    return total / np.minimum(np.arange(1, len(rows) + 1), width)[:, None]


def concordance(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, C) twice -> (C,)."""
    covariance = ((p - p.mean(0)) * (y - y.mean(0))).mean(0)
    return 2 * covariance / np.maximum(p.var(0) + y.var(0) + (p.mean(0) - y.mean(0)) ** 2, 1e-12)
