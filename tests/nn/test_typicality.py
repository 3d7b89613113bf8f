"""Typicality: its definition, and the statistics it is measured by."""

import copy
import math

import numpy as np
import pytest
import torch
from nn_examples import BATCH, build, draw

from sage_ext.nn import Typicality


def typicality_by_definition(x, counted, mean, var, window=16, clamp=4.0):
    """(T, 4) of one modality of one sequence, frame by frame, in numpy float64."""
    frames = len(x)
    out = np.zeros((frames, 4))
    for t in range(frames):
        recent = range(max(0, t - window + 1), t + 1)
        level = [np.log(np.mean(x[i] ** 2) + 1e-8) for i in recent if counted[i]]
        steps = [
            np.log(np.mean((x[i] - x[i - 1]) ** 2) + 1e-8) for i in recent if i > 0 and counted[i] and counted[i - 1]
        ]
        for k, values in enumerate((level, steps)):
            if counted[t] and values:
                z = (np.mean(values) - mean[k]) / np.sqrt(var[k])
                out[t, k] = np.clip(np.arcsinh(z), -clamp, clamp)
    out[:, 2:] = np.abs(out[:, :2])
    return out


def test_typicality_is_its_definition():
    features, present, _ = draw(dtype=torch.float64)
    x = [torch.where(present[..., m, None], v, 0.0) for m, v in enumerate(features.values())]
    module = Typicality(2).eval().double()
    module.mean.copy_(torch.tensor([[0.1, 0.5], [-0.2, 0.9]]))
    module.var.copy_(torch.tensor([[0.01, 0.04], [1e-4, 0.003]]))
    got, _ = module(x, present, None)
    for b in range(BATCH):
        for m in range(2):
            expected = typicality_by_definition(
                x[m][b].numpy(), present[b, :, m].numpy(), module.mean[m].numpy(), module.var[m].numpy()
            )
            np.testing.assert_allclose(got[b, :, m].numpy(), expected, atol=1e-12)
    assert (got.abs() == 4).any()  # the clamp is at work


def test_dead_and_frozen_modalities_are_atypical():
    torch.manual_seed(0)
    clean = [torch.randn(4, 200, 8) + 1.0]
    module = Typicality(1)
    module.fit([(clean, None)])
    module.eval()
    usual, _ = module(clean, None, None)
    assert usual[:, 20:, 0, 2:].mean() < 1.2  # |z| of the training data itself
    dead = torch.cat([clean[0][:, :100], torch.zeros(4, 100, 8)], 1)
    frozen = torch.cat([clean[0][:, :100], clean[0][:, 99:100].expand(4, 100, 8)], 1)
    assert (module([dead], None, None)[0][:, 104:, 0, 0] == -4).all()  # low energy within four frames
    assert (module([frozen], None, None)[0][:, 104:, 0, 1] == -4).all()  # no motion


def test_fit_is_exact_over_batches_and_ignores_missing_frames():
    features, present, mask = draw(batch=6, dtype=torch.float64)
    module = build().double()
    rows = [({k: v[i : i + 2] for k, v in features.items()}, present[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    module.fit_typicality(rows)
    known = present & mask[..., None]
    x = [torch.where(known[..., m, None], v, 0.0) for m, v in enumerate(features.values())]
    average, exists, _ = module.typicality.averages(x, known, None)
    for m in range(2):
        for k in range(2):
            values = average[..., m, k][exists[..., m, k]]
            torch.testing.assert_close(module.typicality.mean[m, k], values.mean())
            torch.testing.assert_close(module.typicality.var[m, k], values.var(correction=0))
    # From now on training leaves them alone.
    before = copy.deepcopy(module.typicality.state_dict())
    module.train()(features, present, mask)
    assert all(torch.equal(before[k], v) for k, v in module.typicality.state_dict().items())


def test_momentum_averages_the_first_batches_then_follows():
    torch.manual_seed(0)
    module = Typicality(1, momentum=0.1)
    batches = [torch.randn(2, 50, 4) * math.exp(s) for s in torch.randn(10).tolist()]
    for x in batches:
        module([x], None, None)
    averages = [module.averages([x], None, None) for x in batches]
    per_batch = torch.stack(
        [torch.stack([a[..., 0, k][e[..., 0, k]].mean() for k in range(2)]) for a, e, _ in averages]
    )
    torch.testing.assert_close(module.mean[0], per_batch.mean(0), atol=1e-5, rtol=1e-5)
    # Every batch alike in size: the pooled variance, between batches included (the difference has one frame less).
    joined = torch.cat([a[..., 0, 0].flatten() for a, _, _ in averages])
    torch.testing.assert_close(module.var[0, 0], joined.var(correction=0), atol=1e-4, rtol=1e-4)
    module([torch.full((2, 50, 4), 100.0)], None, None)
    assert abs(module.mean[0, 0] - (0.9 * per_batch[:, 0].mean() + 0.1 * math.log(1e4))) < 1e-4
    module.eval()
    before = module.mean.clone()
    module([batches[0]], None, None)
    assert torch.equal(before, module.mean)


def test_fit_needs_data():
    with pytest.raises(ValueError, match="batches: expected at least two frames"):
        build().fit_typicality([])
