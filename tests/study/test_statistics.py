"""The study's statistics against direct computation, brute force and SciPy."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from sage_ext.functional import ccc_from_moments, ccc_moments, merge_moments
from sage_ext.study.statistics import (
    additive,
    adjusted_mutual_information,
    concordance,
    expected_mutual_information,
    interval,
    mutual_information,
    pooled_score,
    resampled,
)


def some_moments(rng, videos=5, lead=()):
    """Predictions and labels of videos of different lengths, and their moments (videos, *lead, 2, 6)."""
    pairs, moments = [], []
    for _ in range(videos):
        frames = int(rng.integers(5, 40))
        target = rng.uniform(-1, 1, (frames, 2))
        pred = np.clip(target + rng.normal(0, 0.4, (*lead, frames, 2)) + 0.1, -1, 1)
        pairs.append((pred, target))
        flat = torch.from_numpy(pred.reshape(-1, frames, 2))
        same = torch.from_numpy(target).expand(len(flat), frames, 2)
        moments.append(ccc_moments(flat, same, pool="sequence").numpy().reshape(*lead, 2, 6))
    return pairs, np.stack(moments)


def test_sums_of_videos_give_what_merged_moments_give():
    _, moments = some_moments(np.random.default_rng(0))
    merged = torch.from_numpy(moments[0])
    for more in moments[1:]:
        merged = merge_moments(merged, torch.from_numpy(more))
    np.testing.assert_allclose(concordance(additive(moments).sum(0)), ccc_from_moments(merged).numpy(), atol=1e-13)


def test_a_draw_of_the_bootstrap_is_the_score_of_the_videos_drawn():
    rng = np.random.default_rng(1)
    pairs, moments = some_moments(rng, videos=6, lead=(3,))
    weights = resampled(list("abcdef"), 20, rng)
    found = pooled_score(moments, weights)
    assert found.shape == (20, 3)
    for r, m in itertools.product(range(20), range(3)):
        drawn = np.repeat(np.arange(6), weights[r].astype(int))
        pred = np.concatenate([pairs[v][0][m] for v in drawn])
        target = np.concatenate([pairs[v][1] for v in drawn])
        covariance = ((pred - pred.mean(0)) * (target - target.mean(0))).mean(0)
        direct = 2 * covariance / (pred.var(0) + target.var(0) + (pred.mean(0) - target.mean(0)) ** 2)
        assert found[r, m] == pytest.approx(direct.mean(), abs=1e-12)


def test_the_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    _, moments = some_moments(rng, videos=25)

    def pooled(index, axis=-1):  # index (..., 25) of videos
        weights = np.apply_along_axis(lambda i: np.bincount(i.astype(int), minlength=25), -1, np.atleast_2d(index))
        found = pooled_score(moments, weights.astype(float))
        return found if np.ndim(index) > 1 else found[0]

    theirs = stats.bootstrap(
        (np.arange(25),), pooled, n_resamples=3000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    ours = interval(pooled_score(moments, resampled([str(v) for v in range(25)], 3000, rng)))
    # two independent sets of 3000 draws: the standard error of a 2.5 % quantile is about 0.013 of the spread each
    spread = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.06 * spread)


def test_persons_of_one_video_are_drawn_together():
    weights = resampled(["a", "b", "a", "c"], 500, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert set(np.unique(weights)) == {0, 1, 2, 3}


def test_concordance_is_zero_where_not_defined_and_nan_where_unknown():
    target = torch.tensor([[0.3, -0.2]] * 5)
    constant = ccc_moments(target, target).numpy()
    assert concordance(additive(constant)).tolist() == [0, 0]
    assert concordance(np.zeros((3, 6))).tolist() == [0, 0, 0]
    assert np.isnan(concordance(np.full((2, 6), np.nan))).all()


def brute_expected_mutual_information(rows, columns):
    """The mean over all arrangements of the second labelling."""
    a = np.repeat(np.arange(len(rows)), rows)
    arrangements = Counter(itertools.permutations(np.repeat(np.arange(len(columns)), columns).tolist()))
    total = 0.0
    for b, count in arrangements.items():
        table = np.zeros((len(rows), len(columns)), int)
        np.add.at(table, (a, np.array(b)), 1)
        total += count * mutual_information(table)
    return total / sum(arrangements.values())


@pytest.mark.parametrize(
    ("rows", "columns"), [((2, 2), (2, 2)), ((3, 2, 2), (4, 3)), ((1, 5), (2, 2, 2)), ((7,), (7,))]
)
def test_expected_mutual_information_is_the_mean_over_all_arrangements(rows, columns):
    found = expected_mutual_information(np.array(rows), np.array(columns))
    assert found == pytest.approx(brute_expected_mutual_information(rows, columns), abs=1e-12)


def test_adjusted_mutual_information_by_hand():
    # 2 + 2 frames, every cell 1: MI = 0; of the 6 arrangements 2 have MI = log 2, so E = log(2) / 3, H = log 2
    assert adjusted_mutual_information(np.array([[1, 1], [1, 1]])) == pytest.approx(-1 / 2)
    assert adjusted_mutual_information(np.array([[2, 0], [0, 2]])) == 1
    # rows 3, 1 and columns 2, 2: MI of either possible table is the same, so chance explains all of it
    assert adjusted_mutual_information(np.array([[2, 1], [0, 1]])) == pytest.approx(0, abs=1e-12)
    assert adjusted_mutual_information(np.array([[4]])) == 1
    assert adjusted_mutual_information(np.array([[4, 4]])) == 0
    relabelled = np.array([[0, 9, 1], [8, 0, 0], [1, 0, 7]])
    assert adjusted_mutual_information(relabelled) == pytest.approx(
        adjusted_mutual_information(relabelled[[1, 0, 2]].T)
    )
    independent = np.random.default_rng(0).multinomial(3000, np.outer([0.5, 0.3, 0.2], [0.6, 0.4]).ravel())
    assert abs(adjusted_mutual_information(independent.reshape(3, 2))) < 0.005
    for bad in (np.zeros((2, 2)), np.array([[1.5]]), np.array([1, 2]), np.array([[-1, 2]])):
        with pytest.raises(ValueError, match="table"):
            adjusted_mutual_information(bad)
