"""Quality against a plain loop over frames, in chunks, and with numbers that are not known."""

import math

import numpy as np
import pytest
import torch

from sage_ext.nn import ReliabilityFusion
from sage_ext.nn.quality import QUALITY_FEATURES, Quality

DIMS, ROWS, FRAMES = (2, 0, 1), 3, 50


def draw(seed=0, rows=ROWS, frames=FRAMES, dtype=torch.float64):
    """(B, T, 3), a fifth of it NaN; the last column of the first row is never known."""
    g = torch.Generator().manual_seed(seed)
    x = 2 + 3 * torch.randn(rows, frames, sum(DIMS), generator=g, dtype=torch.float64)
    x[torch.rand(x.shape, generator=g) < 0.2] = math.nan
    x[0, :, -1] = math.nan
    return x.to(dtype)


def build(seed=0):
    module = Quality(DIMS).eval()
    g = torch.Generator().manual_seed(seed)
    module.mean.copy_(torch.randn(3, generator=g))
    module.var.copy_(0.5 + torch.rand(3, generator=g))
    return module


def by_definition(column, mean, var, halflife, clamp):
    """(T, 3) of one column (T,), frame by frame."""
    fade, total, weight, out = 0.5 ** (1 / halflife), 0.0, 0.0, []
    for value in column:
        known = np.isfinite(value)
        z = float(np.clip((value - mean) / np.sqrt(var), -clamp, clamp)) if known else 0.0
        total, weight = fade * total + z * known, fade * weight + known
        out.append((z, total / (1.0 + weight), float(known)))
    return np.array(out)


def test_features_are_their_definition():
    module, x = build(), draw()
    found, _ = module(x, None)
    assert [part.shape[-1] for part in found] == [QUALITY_FEATURES * d for d in DIMS]
    joined = torch.cat(found, -1).unflatten(-1, (-1, QUALITY_FEATURES))
    for b in range(ROWS):
        for q in range(sum(DIMS)):
            mean, var = float(module.mean[q]), float(module.var[q])
            wanted = by_definition(x[b, :, q].numpy(), mean, var, module.halflife, module.clamp)
            np.testing.assert_allclose(joined[b, :, q], wanted, atol=1e-12)


@pytest.mark.parametrize("points", [(1,), (7, 8), (20, 21, 49), tuple(range(1, FRAMES))])
def test_chunks_equal_the_whole(points):
    module, x = build(), draw(1)
    whole = torch.cat(module(x, None)[0], -1)
    state, parts = None, []
    for part in x.tensor_split(points, 1):
        found, state = module(part, state)
        parts.append(torch.cat(found, -1))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_what_is_not_known_reaches_nothing(unknown):
    module, x = build(), draw(2)
    hidden = torch.where(x.isnan(), unknown, x)
    for a, b in zip(module(x, None)[0], module(hidden, None)[0]):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    nothing, _ = module(torch.full_like(x, unknown), None)
    assert not torch.cat(nothing, -1).any()


def test_statistics_are_those_of_the_known_numbers():
    module, x = Quality(DIMS), draw(3, rows=6)
    x[..., -1] = math.nan  # a column that is never known
    module.fit([x[:2], None, x[2:5], x[5:]])
    for q in range(2):
        column = x[..., q][x[..., q].isfinite()]
        torch.testing.assert_close(module.mean[q].double(), column.mean(), atol=1e-6, rtol=0)
        torch.testing.assert_close(module.var[q].double(), column.var(correction=0), atol=0, rtol=1e-6)
    assert module.mean[2] == 0
    assert module.var[2] == 1
    before = module.mean.clone(), module.var.clone()
    module.train()(draw(4, dtype=torch.float32), None)  # fitted: training batches are followed no more
    assert torch.equal(module.mean, before[0])
    assert torch.equal(module.var, before[1])


def test_without_fit_the_statistics_follow_the_batches():
    module = Quality(DIMS).train()
    batches = [draw(seed, dtype=torch.float32) for seed in range(10, 40)]
    for batch in batches:
        module(batch, None)
    column = torch.cat(batches)[..., 0]
    assert abs(float(module.mean[0]) - float(column.nanmean())) < 0.1
    assert abs(float(module.var[0]) / float(column[column.isfinite()].var()) - 1) < 0.1


def test_quality_reaches_the_reliability_alone():
    torch.manual_seed(0)
    fusion = ReliabilityFusion({"a": 4, "b": 6}, 8, quality_dims={"b": 2}).eval()
    features = {"a": torch.randn(2, 30, 4), "b": torch.randn(2, 30, 6)}
    low, high = (fusion(features, quality={"b": torch.full((2, 30, 2), value)}) for value in (-2.0, 2.0))
    assert not torch.allclose(low.confidence[..., 1], high.confidence[..., 1])
    # The fused frame lies on the line between the modalities' values: its place there is all that may have moved.
    with torch.no_grad():
        alone = []
        for name in ("a", "b"):
            present = torch.zeros(2, 30, 2, dtype=torch.bool)
            present[..., list(features).index(name)] = True
            alone.append(fusion(features, present=present).fused)
    for out in (low, high):
        mixed = sum(out.weights[..., m, None] * alone[m] for m in range(2))
        torch.testing.assert_close(out.fused, mixed, atol=1e-5, rtol=0)


def test_quality_that_is_not_given_is_unknown():
    torch.manual_seed(0)
    fusion = ReliabilityFusion({"a": 4, "b": 6}, 8, quality_dims={"a": 1, "b": 2}).eval()
    features = {"a": torch.randn(2, 30, 4), "b": torch.randn(2, 30, 6)}
    unknown = {"a": torch.full((2, 30, 1), math.nan), "b": torch.full((2, 30, 2), math.nan)}
    torch.testing.assert_close(fusion(features).confidence, fusion(features, quality=unknown).confidence)
