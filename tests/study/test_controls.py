"""Controls of confidence: shares of another clip, shuffled, held; against values by hand and what must not change."""

import numpy as np
import pytest

from sage_ext.study.controls import another, control_predictions, controlled, donors, held, shuffled
from sage_ext.training.evaluate import ClipPrediction


def said(frames, seed=0, missing=()):
    """An answer of three experts, the first a joint one, as a model gives it."""
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.1, 1, (frames, 3)).astype(np.float32)
    shares[list(missing), 1] = 0
    shares /= shares.sum(1, keepdims=True)
    experts = rng.uniform(-1, 1, (frames, 3, 2)).astype(np.float32)
    prediction = np.einsum("tk,tkc->tc", shares, experts)
    weights = shares[:, 1:] / shares[:, 1:].sum(1, keepdims=True)
    stage = np.ones((frames, 1), np.float32)
    return ClipPrediction(prediction, experts[:, 1:], weights, weights, stage, experts=experts, shares=shares)


def test_a_clips_own_shares_change_nothing():
    one = said(50, missing=range(10, 20))
    np.testing.assert_allclose(controlled(one, one.shares), one.prediction, atol=1e-6)


def test_what_is_missing_stays_missing_and_shares_sum_to_one():
    one = said(4, missing=(1,))
    theirs = np.array([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = controlled(one, theirs)
    e = one.experts.astype(np.float64)
    expected = [
        0.2 * e[0, 0] + 0.3 * e[0, 1] + 0.5 * e[0, 2],
        (0.2 * e[1, 0] + 0.5 * e[1, 2]) / 0.7,
        e[2].mean(0),  # nothing is left of theirs
        e[3, 0],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_where_nothing_is_there_the_prediction_stays():
    one = said(3)
    shares = one.shares.copy()
    shares[1] = 0
    gone = ClipPrediction(one.prediction, one.unimodal, one.weights, one.confidence, one.stage, one.experts, shares)
    np.testing.assert_array_equal(controlled(gone, np.full((3, 3), 1 / 3))[1], one.prediction[1])


def test_another_clips_shares_are_cropped_or_repeated():
    shares = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(another(shares, 2), shares[:2])
    np.testing.assert_array_equal(another(shares, 7), shares[[0, 1, 2, 0, 1, 2, 0]])


def test_shuffled_moves_whole_blocks_and_every_one_of_them():
    shares = np.arange(100.0)[:, None] * np.ones(3)
    for key in "abc":
        found = shuffled(shares, 8, key)
        np.testing.assert_array_equal(np.sort(found[:, 0]), shares[:, 0])
        np.testing.assert_array_equal(found, shuffled(shares, 8, key))
        assert (np.diff(found[:, 0]) != 1).sum() <= 12  # 13 blocks, the last one of 4 frames
        assert (found != shares).all()
    assert not np.array_equal(shuffled(shares, 8, "a"), shuffled(shares, 8, "b"))
    np.testing.assert_array_equal(shuffled(shares, 100, "a"), shares)  # one block


def test_held_is_the_mean_where_the_expert_is_there():
    shares = np.array([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])
    np.testing.assert_allclose(held(shares), np.tile([1.7 / 3, 0.65], (3, 1)))


def test_donors_are_of_another_video_and_fixed():
    names = ["a_left", "a_right", "b", "c", "d"]
    found = donors(names)
    assert all(names[j].partition("_")[0] != name.partition("_")[0] for name, j in zip(names, found))
    order = [3, 1, 4, 0, 2]
    again = donors([names[i] for i in order])
    assert {names[i]: names[order[j]] for i, j in zip(order, again)} == {n: names[j] for n, j in zip(names, found)}
    assert donors(["a_left", "a_right"]) == [None, None]


def test_controls_of_clips_that_share_experts_alike_cost_nothing():
    """Where shares are constant no control can change anything; where they are not, each does."""
    clips = [said(90, seed) for seed in range(3)]
    even = [
        ClipPrediction(
            c.experts.mean(1), c.unimodal, c.weights, c.confidence, c.stage, c.experts, np.full((90, 3), 1 / 3)
        )
        for c in clips
    ]
    names, fps = ["a", "b", "c"], [10.0] * 3
    for predictions in control_predictions(even, names, fps, 0).values():
        for clip, prediction in zip(even, predictions):
            np.testing.assert_allclose(prediction, clip.prediction, atol=1e-6)
    for control, predictions in control_predictions(clips, names, fps, 0).items():
        for clip, prediction in zip(clips, predictions):
            assert np.abs(prediction - clip.prediction).mean() > 0.02, control
    alone = control_predictions(clips[:1], ["a"], fps, 0)
    assert alone["another"] == [None]
    assert alone["held"][0] == pytest.approx(controlled(clips[0], held(clips[0].shares)))
