"""Whose stream it is, against a Bayes filter written out, and what it does with two people's streams."""

import numpy as np
import pytest
import torch

from sage_ext.nn.foreign import MARGIN, ForeignFilter, check_trust

BATCH, FRAMES, TARGETS = 2, 60, 2


def draw(modalities, seed=0):
    g = torch.Generator().manual_seed(seed)
    scaled = torch.randn(BATCH, FRAMES, modalities, TARGETS, generator=g, dtype=torch.float64)
    confidence = torch.rand(BATCH, FRAMES, modalities, generator=g, dtype=torch.float64)
    confidence[0, 3], confidence[0, 4] = 0.0, 1.0  # beyond the margin
    known = torch.rand(BATCH, FRAMES, modalities, generator=g) > 0.3
    return scaled, confidence, known


def by_definition(scaled, confidence, known, prior, pace, dwell):
    """(T, 1 + M) of one sequence, in probabilities."""
    modalities = len(prior)
    mine = 1 - sum(prior)
    belief, out = np.array([mine, *prior]), []
    move = np.eye(1 + modalities)
    for m, p in enumerate(prior):
        move[1 + m, 0], move[1 + m, 1 + m] = 1 / dwell, 1 - 1 / dwell
        move[0, 1 + m] = p / mine / dwell
        move[0, 0] -= move[0, 1 + m]
    for t in range(len(scaled)):
        logs = np.zeros(1 + modalities)
        r = np.clip(confidence[t], MARGIN, 1 - MARGIN)
        for m in range(modalities):
            for n in range(modalities):
                if n != m and (known is None or (known[t, m] and known[t, n])):
                    together, apart = r[m] + r[n] - 2 * r[m] * r[n], r[m] + r[n]
                    for d in scaled[t, m] - scaled[t, n]:
                        logs[1 + m] += (d * d / together - d * d / apart + np.log(together / apart)) / 2
        belief = (belief if t == 0 else belief @ move) * np.exp(logs / pace)
        belief = belief / belief.sum()
        out.append(belief)
    return np.array(out)


@pytest.mark.parametrize("prior", [(0.3, 0.0), (0.2, 0.1), (0.1, 0.2, 0.3), (0.0, 0.0, 0.4)])
@pytest.mark.parametrize("masked", [False, True])
def test_beliefs_are_those_of_the_bayes_filter(prior, masked):
    scaled, confidence, known = draw(len(prior))
    module = ForeignFilter(prior, 5.0, 40.0)
    found, _ = module(scaled, confidence, known if masked else None, None)
    for b in range(BATCH):
        flags = known[b].numpy() if masked else None
        wanted = by_definition(scaled[b].numpy(), confidence[b].numpy(), flags, prior, 5.0, 40.0)
        np.testing.assert_allclose(found[b], wanted, atol=2e-6)  # the transition is held in float32


def test_chunks_equal_the_whole():
    scaled, confidence, known = draw(3, seed=1)
    module, state, parts = ForeignFilter((0.1, 0.0, 0.2), 5.0, 40.0), None, []
    whole, _ = module(scaled, confidence, known, None)
    for span in (slice(0, 1), slice(1, 30), slice(30, FRAMES)):
        found, state = module(scaled[:, span], confidence[:, span], known[:, span], state)
        parts.append(found)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


def test_who_is_never_foreign_is_never_doubted():
    scaled, confidence, known = draw(2, seed=2)
    found, _ = ForeignFilter((0.5, 0.0), 1.0, 10.0)(scaled, confidence, known, None)
    assert found[..., 2].max() < 1e-6


def test_a_foreign_stream_is_found_and_a_poor_one_is_not():
    """Two estimates that explain r of the same target, then one of another person's: errors of their own each."""
    g = torch.Generator().manual_seed(3)
    r, frames = torch.tensor([0.7, 0.6]), 3000
    mine, theirs = torch.randn(2, 1, frames, 1, 1, generator=g)
    noise = torch.randn(1, frames, 2, 1, generator=g)
    said = [r[m] * y + (r[m] * (1 - r[m])).sqrt() * noise[:, :, m : m + 1] for m, y in enumerate((mine, mine))]
    other = r[1] * theirs + (r[1] * (1 - r[1])).sqrt() * noise[:, :, 1:]
    module = ForeignFilter((0.0, 0.3), 30.0, 1800.0)
    confidence = r.expand(1, frames, 2)
    own, _ = module(torch.cat(said, 2), confidence, None, None)
    foreign, _ = module(torch.cat([said[0], other], 2), confidence, None, None)
    assert own[0, -1, 2] < 0.06
    assert foreign[0, -1, 2] > 0.94
    nothing, _ = module(torch.cat([said[0], 0 * other], 2), torch.tensor([0.7, 0.0]).expand(1, frames, 2), None, None)
    assert abs(float(nothing[0, -1, 2]) - 0.3) < 0.05  # what says nothing tells nothing of whose it is


@pytest.mark.parametrize("prior", [(-0.1, 0.2), (1.0, 0.0), (0.5, 0.5), (float("nan"), 0.1), ("much", 0.1)])
def test_priors_are_checked(prior):
    with pytest.raises(ValueError, match="trust: expected"):
        check_trust(prior)
