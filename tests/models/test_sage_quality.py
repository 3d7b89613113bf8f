"""SAGE with quality evidence: chunks, what it reaches, other people's fusions; and the scale that confidence is judged on."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sage_ext.models import SAGE
from sage_ext.models.sage import explained_error, regression

DIMS, QUALITY = {"audio": 7, "visual": 11}, {"audio": 2, "visual": 3}
BATCH, FRAMES = 2, 60
FIELDS = ("prediction", "unimodal", "weights", "confidence", "stage")


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    features = {k: 2 + torch.randn(BATCH, FRAMES, d, generator=g) for k, d in DIMS.items()}
    quality = {k: 5 - 3 * torch.randn(BATCH, FRAMES, d, generator=g) for k, d in QUALITY.items()}
    for v in quality.values():
        v[torch.rand(v.shape, generator=g) < 0.2] = math.nan
    present = torch.rand(BATCH, FRAMES, 2, generator=g) > 0.2
    return features, quality, present


def build(**options):
    torch.manual_seed(0)
    model = SAGE(DIMS, **{"dim": 12, "evidence_dim": 8, "stages": 3, "quality_dims": QUALITY, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    features, quality, present = draw(9)
    model.fit_statistics([{"features": features, "present": present, "quality": quality}])
    return model.eval()


@pytest.mark.parametrize("fusion", ["reliability", "concat", "can", "uniform"])
@pytest.mark.parametrize("points", [(1, 2, 30), (17,), tuple(range(1, FRAMES))])
def test_chunks_equal_the_whole(fusion, points):
    model = build(fusion=fusion)
    features, quality, present = draw()
    with torch.no_grad():
        whole, parts, state = model(features, present, quality=quality), [], None
        for a, b in pairwise((0, *points, FRAMES)):
            chunk, sure = ({k: v[:, a:b] for k, v in of.items()} for of in (features, quality))
            parts.append(model(chunk, present[:, a:b], state=state, quality=sure))
            state = parts[-1].state
    for field in FIELDS:
        found = torch.cat([getattr(part, field) for part in parts], 1)
        torch.testing.assert_close(
            found, getattr(whole, field), atol=1e-5, rtol=1e-5, msg=lambda m, f=field: f"{f}: {m}"
        )


def test_quality_moves_confidence_and_no_modality_s_own_estimate_without_a_memory():
    """The memory weighs frames by precision, which quality is part of; without it values never see quality."""
    model = build(memory=())
    features, quality, present = draw()
    with torch.no_grad():
        one = model(features, present, quality=quality)
        other = model(features, present, quality={k: v + 2 for k, v in quality.items()})
    assert not torch.allclose(one.confidence, other.confidence, atol=1e-3)
    assert torch.equal(one.experts, other.experts)


@pytest.mark.parametrize("fusion", ["reliability", "concat", "can"])
def test_unknown_is_nan_or_left_out(fusion):
    model = build(fusion=fusion)
    features, quality, present = draw()
    with torch.no_grad():
        left_out = model(features, present, quality={"visual": quality["visual"]})
        nan = model(features, present, quality={**quality, "audio": torch.full_like(quality["audio"], math.nan)})
    assert torch.equal(left_out.prediction, nan.prediction)


@pytest.mark.parametrize("fusion", ["concat", "can", "uniform"])
def test_others_read_quality_as_two_features_a_column(fusion):
    """Its z-score, 0 where unknown, and whether it is known, after the modality's own features: what a model without quality
    says of the two side by side."""
    model = build(fusion=fusion)
    features, quality, present = draw()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        same = model(features, present, quality=quality)
        units = model(features, present, quality={k: v + 0 for k, v in quality.items()})
        moved = model(features, present, quality={k: v + torch.randn(v.shape, generator=g) for k, v in quality.items()})
    assert torch.equal(same.prediction, units.prediction)
    assert not torch.allclose(same.prediction, moved.prediction, atol=1e-3)
    assert [e.project.in_features for e in model.encoders] == [7 + 2 * 2, 11 + 2 * 3]
    # In other units, after statistics of those, it says the same.
    torch.manual_seed(0)
    again = SAGE(DIMS, dim=12, evidence_dim=8, stages=3, quality_dims=QUALITY, fusion=fusion)
    told, sure, there = draw(9)
    again.fit_statistics([{"features": told, "present": there, "quality": {k: 100 * v + 7 for k, v in sure.items()}}])
    again.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("quality_")}, strict=False)
    with torch.no_grad():
        found = again.eval()(features, present, quality={k: 100 * v + 7 for k, v in quality.items()})
    torch.testing.assert_close(found.prediction, same.prediction, atol=2e-4, rtol=2e-4)


# --------------------------------------------------------------------------------------------------------- regression
def test_regression_is_the_least_squares_line_of_each_expert():
    g = torch.Generator().manual_seed(0)
    labels = torch.randn(4, 50, 2, generator=g, dtype=torch.float64)
    noise = torch.randn(4, 50, 3, 2, generator=g, dtype=torch.float64)
    estimates = torch.tensor([0.5, 2.0, -1.0])[:, None] * labels.unsqueeze(2) + noise + 3
    counted = torch.rand(4, 50, 3, generator=g) > 0.3
    gain, shift, variance = regression(estimates, labels, counted)
    for k in range(3):
        for c in range(2):
            x, y = estimates[counted[..., k]][:, k, c].numpy(), labels[counted[..., k]][:, c].numpy()
            slope, level = np.polyfit(x, y, 1)
            if k == 2:  # runs against the labels: explains nothing
                assert slope < 0
                slope, level = 0.0, y.mean()
            np.testing.assert_allclose([gain[k, c], shift[k, c], variance[k, c]], [slope, level, y.var()], atol=1e-9)
    error = explained_error(estimates, labels, gain, shift, variance)
    x, y = estimates[counted[..., 0]][:, 0].numpy(), labels[counted[..., 0]].numpy()
    wanted = [np.corrcoef(x[:, c], y[:, c])[0, 1] ** 2 for c in range(2)]
    np.testing.assert_allclose(1 - error[counted[..., 0]][:, 0].mean(0), wanted, atol=1e-9)
    np.testing.assert_allclose(error[counted[..., 2]][:, 2].mean(0), 1, atol=1e-9)


def test_regression_without_frames_or_spread_is_finite():
    labels, estimates = torch.ones(1, 5, 2), torch.zeros(1, 5, 1, 2)
    for counted in (None, torch.zeros(1, 5, 1, dtype=torch.bool)):
        gain, shift, variance = regression(estimates, labels, counted)
        assert torch.equal(gain, torch.zeros(1, 2))
        assert torch.equal(variance, torch.ones(1, 2))
        assert shift.isfinite().all()
    hidden = torch.full((1, 5, 1, 2), math.nan)
    counted = torch.zeros(1, 5, 1, dtype=torch.bool)
    assert all(x.isfinite().all() for x in regression(hidden, labels, counted))
