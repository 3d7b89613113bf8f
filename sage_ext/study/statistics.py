"""Statistics of a comparison: bootstrap of pooled concordance over videos, agreement of two labellings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..functional import ccc_from_moments

Array = np.ndarray


def additive(moments: Array) -> Array:
    """(..., 6) moments as `functional.ccc_moments` gives them (count, means, central second moments) -> (..., 6)
    float64: count, sums of pred and target, of their squares and of their product. These of several videos add up."""
    n, mean_p, mean_t, m2_p, m2_t, c = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    return np.stack(
        [n, n * mean_p, n * mean_t, m2_p + n * mean_p**2, m2_t + n * mean_t**2, c + n * mean_p * mean_t], -1
    )


def concordance(sums: Array) -> Array:
    """(..., 6) sums as `additive` gives them -> (...) CCC with population moments; 0 where it is not defined (fewer
    than two frames, or a zero denominator). For values of the labels' size: the sums are about zero.
    NaN where a sum is."""
    n, p, t, pp, tt, pt = np.moveaxis(sums, -1, 0)
    count = np.maximum(n, 1)
    mean_p, mean_t = p / count, t / count
    spread = np.stack([pp - p * mean_p, tt - t * mean_t, pt - p * mean_t])
    constant = np.minimum(spread[0], spread[1]) <= 1e-15 * count  # what is left of a constant's by rounding
    moments = np.stack([n, mean_p, mean_t, *np.where(constant, 0.0, spread)], -1)
    value = ccc_from_moments(torch.from_numpy(moments)).numpy()
    return np.where(np.isnan(sums).any(-1), np.nan, value)


def pooled_score(moments: Array, weights: Array) -> Array:
    """P, the mean CCC of the targets, over all frames of all videos together, in each of `R` weightings of the videos.

    moments: (V, *, C, 6) of each video; weights: (R, V), how often a video counts. Returns (R, *) float64.
    """
    sums = additive(moments)
    pooled = weights @ sums.reshape(len(sums), -1)
    return concordance(pooled.reshape(len(weights), *sums.shape[1:])).mean(-1)


def resampled(clusters: Sequence[str], draws: int, rng: np.random.Generator) -> Array:
    """(draws, V) float64: how often each of V members counts when whole clusters are drawn with replacement, as many
    as there are. `clusters` (V,): the cluster of each member."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return drawn[:, index].astype(np.float64)


def interval(samples: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap samples (R,)."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _entropy(counts: Array) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(table: Array) -> float:
    """Of two labellings with the contingency `table` (A, B) of counts, in nats."""
    return _entropy(table.sum(1)) + _entropy(table.sum(0)) - _entropy(np.ravel(table))


def expected_mutual_information(rows: Array, columns: Array) -> float:
    """Mean mutual information, in nats, of all tables with these margins under random permutation of the labels
    (the hypergeometric model): Vinh, Epps & Bailey 2010, "Information theoretic measures for clusterings comparison".

    E[MI] = sum_ij sum_n (n / N) log(N n / (a_i b_j)) P(n), n from max(1, a_i + b_j - N) to min(a_i, b_j), with
    P(n) = a_i! b_j! (N - a_i)! (N - b_j)! / (N! n! (a_i - n)! (b_j - n)! (N - a_i - b_j + n)!).
    """
    total = int(rows.sum())
    log_factorial = np.array([math.lgamma(k + 1) for k in range(total + 1)])
    value = 0.0
    for a in (int(x) for x in rows if x > 0):
        for b in (int(x) for x in columns if x > 0):
            n = np.arange(max(1, a + b - total), min(a, b) + 1)
            constant = log_factorial[[a, b, total - a, total - b]].sum() - log_factorial[total]
            varying = log_factorial[n] + log_factorial[a - n] + log_factorial[b - n] + log_factorial[total - a - b + n]
            value += float((n / total * np.log(total * n / (a * b)) * np.exp(constant - varying)).sum())
    return value


def adjusted_mutual_information(table: Array) -> float:
    """Agreement of two labellings with contingency `table` (A, B) of counts: 1 the same, 0 what chance gives.

    (MI - E[MI]) / ((H_A + H_B) / 2 - E[MI]), E under the hypergeometric model; 1 where both have a single label, as
    they are the same then. ValueError for anything but a table of whole counts >= 0 with one frame or more.
    """
    counts = np.asarray(table)
    if counts.ndim != 2 or not np.all(counts == np.floor(counts)) or np.any(counts < 0) or counts.sum() < 1:
        raise ValueError(f"table: expected (A, B) counts with a positive sum, got {counts.tolist()}")
    counts = counts.astype(np.int64)
    rows, columns = counts.sum(1), counts.sum(0)
    chance = expected_mutual_information(rows, columns)
    ceiling = (_entropy(rows) + _entropy(columns)) / 2
    if ceiling - chance < 1e-12:  # a single label each, or every frame its own
        return 1.0
    return (mutual_information(counts) - chance) / (ceiling - chance)


__all__ = [
    "additive",
    "adjusted_mutual_information",
    "concordance",
    "expected_mutual_information",
    "interval",
    "mutual_information",
    "pooled_score",
    "resampled",
]
