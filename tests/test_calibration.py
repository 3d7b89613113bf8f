"""Calibration on data whose truth is known: the fit recovers it, the error measures it."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from sage_ext import functional
from sage_ext.calibration import (
    Evidence,
    ReliabilityDiagram,
    calibrate,
    calibrated_confidence,
    collect,
    diagrams,
    expected_calibration_error,
    fit_calibration,
    reliability_diagram,
    spearman,
)
from sage_ext.models import SAGE
from sage_ext.nn import ReliabilityNLL

KAPPA = 0.4


def world(frames=40_000, modalities=2, stages=3, targets=2, seed=0, uncalibrate=True):
    """Logits that a known temperature and bias make exactly calibrated, and Gaussian errors to match."""
    g = torch.Generator().manual_seed(seed)
    logit = 1.2 * torch.randn(frames, modalities, stages, generator=g, dtype=torch.float64)
    stage = torch.softmax(3 * torch.randn(frames, stages, generator=g, dtype=torch.float64), -1)
    log_temperature = torch.tensor([[0.7, -0.4, 0.2], [0.0, 0.5, -0.6]], dtype=torch.float64)[:modalities, :stages]
    bias = torch.tensor([[0.5, -0.8, 0.0], [-0.3, 0.9, 0.4]], dtype=torch.float64)[:modalities, :stages]
    if not uncalibrate:
        log_temperature, bias = torch.zeros_like(bias), torch.zeros_like(bias)
    r = calibrated_confidence(logit, stage, log_temperature, bias)
    variance = KAPPA**2 * (1 - r) / r
    error = variance[..., None] * torch.randn(frames, modalities, targets, generator=g, dtype=torch.float64).square()
    return logit, stage, error, log_temperature, bias


# ------------------------------------------------------------------------------------------------------------- formula
def test_confidence_is_the_ops():
    logit, stage, _, log_temperature, bias = world(frames=50)
    values = [torch.randn(50, 4, dtype=torch.float64)] * 2
    _, _, expected = functional.reliability_fusion(values, logit, stage, log_temperature=log_temperature, bias=bias)
    torch.testing.assert_close(calibrated_confidence(logit, stage, log_temperature, bias), expected)


# ----------------------------------------------------------------------------------------------------------------- fit
def test_fit_recovers_temperature_and_bias():
    logit, stage, error, log_temperature, bias = world()
    got = fit_calibration(logit, stage, error, kappa=KAPPA, prior=0.0)
    for fitted, true in zip(got, (log_temperature, bias)):
        assert fitted.dtype == torch.float32
        torch.testing.assert_close(fitted.double(), true, atol=0.1, rtol=0)
    again = fit_calibration(logit, stage, error, kappa=KAPPA, prior=0.0)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_fit_of_one_stage_has_the_closed_form_bias():
    """One stage, equal logits: the only calibrated confidence is 1 / (1 + mean squared error / kappa^2)."""
    error = torch.rand(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stage = torch.ones(500, 1)
    _, bias = fit_calibration(torch.zeros(500, 1, 1), stage, error, kappa=KAPPA, prior=0.0)
    expected = torch.logit(1 / (1 + error.mean() / KAPPA**2))
    torch.testing.assert_close(bias.double().squeeze(), expected, atol=1e-5, rtol=1e-5)


def test_calibrated_data_stay_as_they_are():
    logit, stage, error, *_ = world(uncalibrate=False)
    log_temperature, bias = fit_calibration(logit, stage, error, kappa=KAPPA)
    assert log_temperature.abs().max() < 0.08
    assert bias.abs().max() < 0.08


def test_fit_lowers_score_and_error_on_other_frames():
    logit, stage, error, *_ = world()
    half = len(logit) // 2
    got = fit_calibration(logit[:half], stage[:half], error[:half], kappa=KAPPA)
    score, before, after = ReliabilityNLL(KAPPA), [], []
    for column, calibration in ((before, (None, None)), (after, [p.double() for p in got])):
        r = calibrated_confidence(logit[half:], stage[half:], *calibration)
        column.append(score(r, error[half:]).item())
        for m in range(2):
            column.append(expected_calibration_error(reliability_diagram(r[:, m], error[half:, m], kappa=KAPPA)))
    assert after[0] < before[0] - 0.05
    assert max(after[1:]) < 0.02
    assert min(before[1:]) > 0.03


def test_prior_decides_where_data_do_not():
    logit, stage, error, *_ = world(frames=4000)
    never = torch.cat([stage[:, :2] / stage[:, :2].sum(-1, keepdim=True), torch.zeros(4000, 1)], -1)
    log_temperature, bias = fit_calibration(logit, never, error, kappa=KAPPA)
    assert not log_temperature[:, 2].any()
    assert not bias[:, 2].any()
    weak, strong = (fit_calibration(logit, stage, error, kappa=KAPPA, prior=p)[1].norm() for p in (1.0, 1e7))
    assert strong < 0.01 < 0.5 < weak


def test_masked_frames_are_not_read():
    logit, stage, error, *_ = world(frames=3000)
    mask = torch.rand(3000, 2, generator=torch.Generator().manual_seed(1)) > 0.3
    clean = fit_calibration(logit, stage, error, mask, kappa=KAPPA)
    dirty = fit_calibration(
        logit.masked_fill(~mask[..., None], math.nan),
        stage,
        error.masked_fill(~mask[..., None], math.inf),
        mask,
        kappa=KAPPA,
    )
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    everything = fit_calibration(logit, stage, error, kappa=KAPPA)
    assert not torch.equal(clean[1], everything[1])


def test_extreme_logits_and_errors_stay_finite():
    logit, stage, error, *_ = world(frames=1000)
    got = fit_calibration(300 * logit, stage, 1e6 * error, kappa=KAPPA)
    assert all(p.isfinite().all() for p in got)
    score = ReliabilityNLL(KAPPA)
    before = score(calibrated_confidence(300 * logit, stage), 1e6 * error)
    assert score(calibrated_confidence(300 * logit, stage, *[p.double() for p in got]), 1e6 * error) < before


# ------------------------------------------------------------------------------------------------------------- measure
def test_perfect_calibration_has_no_error_and_a_shift_shows():
    logit, stage, error, *_ = world(uncalibrate=False, frames=200_000)
    r = calibrated_confidence(logit, stage)
    for m in range(2):
        perfect = expected_calibration_error(reliability_diagram(r[:, m], error[:, m], kappa=KAPPA))
        assert perfect < 0.006
        boast = torch.sigmoid(torch.logit(r[:, m]) + 1.0)
        shifted = expected_calibration_error(reliability_diagram(boast, error[:, m], kappa=KAPPA))
        assert abs(shifted - (boast - r[:, m]).mean().item()) < 0.01


def test_diagram_is_its_definition():
    r, error = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7]), torch.tensor([0.01, 1.0, 0.2, 0.4, 0.1])
    got = reliability_diagram(r, error, kappa=0.5, bins=2)
    assert isinstance(got, ReliabilityDiagram)
    observed = [1 / (1 + np.mean(e) / 0.25) for e in ([1.0, 0.4, 0.2], [0.1, 0.01])]
    np.testing.assert_allclose(got.predicted, [0.3, 0.8], atol=1e-7)
    np.testing.assert_allclose(got.observed, observed, atol=1e-7)
    assert got.frames.tolist() == [3, 2]
    np.testing.assert_allclose(got.lower, [0.1, 0.7], atol=1e-7)
    np.testing.assert_allclose(got.upper, [0.5, 0.9], atol=1e-7)
    expected = (3 * abs(0.3 - observed[0]) + 2 * abs(0.8 - observed[1])) / 5
    assert abs(expected_calibration_error(got) - expected) < 1e-7


def test_diagram_masks_averages_targets_and_needs_no_full_bins():
    g = torch.Generator().manual_seed(0)
    r, error, mask = (
        torch.rand(4, 7, generator=g),
        torch.rand(4, 7, 2, generator=g),
        torch.rand(4, 7, generator=g) > 0.5,
    )
    got = reliability_diagram(r, error.masked_fill(~mask[..., None], math.nan), mask, kappa=1.0, bins=5)
    want = reliability_diagram(r[mask], error[mask].mean(-1), kappa=1.0, bins=5)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    assert len(reliability_diagram(r[0], error[0], kappa=1.0, bins=100).frames) == 7


def test_spearman_is_scipys():
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 12, (300,), generator=g).float()  # ties
    b = a + 4 * torch.randn(300, generator=g)
    assert abs(spearman(a, b) - scipy.stats.spearmanr(a, b).statistic) < 1e-12
    assert math.isnan(spearman(a, torch.ones(300)))


# --------------------------------------------------------------------------------------------------------------- model
def batches(count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        present = torch.rand(2, 50, 2, generator=g) > 0.2
        frame = torch.arange(50).expand(2, 50) < 44
        valid = frame & (torch.rand(2, 50, generator=g) > 0.1)
        features = {k: torch.randn(2, 50, d, generator=g) for k, d in (("audio", 5), ("visual", 6))}
        labels = torch.rand(2, 50, 2, generator=g) - 0.5
        labels[~valid] = math.nan
        out.append(
            {
                "features": features,
                "present": present & frame[..., None],
                "labels": labels,
                "valid": valid,
                "frame": frame,
            }
        )
    return out


def model(**options):
    torch.manual_seed(0)
    built = SAGE({"audio": 5, "visual": 6}, dim=8, stages=2, **options)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return built.train()


def test_collect_matches_forward():
    net, data = model(), batches()
    evidence = collect(net, data)
    assert isinstance(evidence, Evidence)
    assert net.training
    net.eval()
    with torch.no_grad():
        outputs = [net(b["features"], b["present"], b["frame"]) for b in data]
    confidence = torch.cat([o.expert_confidence.flatten(0, 1) for o in outputs])
    flags = [torch.cat([b["frame"][..., None], b["present"]], -1) & b["valid"][..., None] for b in data]
    mask = torch.cat([f.flatten(0, 1) for f in flags])  # the joint expert counts in every frame
    error = torch.cat([(o.experts - b["labels"][:, :, None]).square().flatten(0, 1) for o, b in zip(outputs, data)])
    assert torch.equal(evidence.mask, mask)
    torch.testing.assert_close(calibrated_confidence(evidence.reliability, evidence.stage)[mask], confidence[mask])
    torch.testing.assert_close(evidence.squared_error[mask], error[mask])
    assert evidence.squared_error[mask].isfinite().all()
    # Put to scale, an expert's error is what is left of the variance after regression.
    scaled = collect(net, data, scale=True)
    labels = torch.cat([b["labels"].flatten(0, 1) for b in data])
    own = torch.cat([o.experts.flatten(0, 1) for o in outputs])
    for k in range(3):
        for c in range(2):
            x, y = (v[mask[:, k]].double().numpy() for v in (own[:, k, c], labels[:, c]))
            found = scaled.squared_error[mask[:, k], k, c].mean() * net.target_variance[c]
            slope, level = np.polyfit(x, y, 1)
            want = ((slope * x + level - y) ** 2).mean() if slope > 0 else y.var()
            assert abs(float(found) - want) < 1e-5


def test_calibrate_changes_the_model_and_says_by_how_much():
    net, data = model(), batches(20)
    with torch.no_grad():
        net.fusion.bias.fill_(3.0)  # an old calibration, to be replaced
    report = calibrate(net, data, prior=1.0)
    assert torch.equal(net.fusion.bias, report.bias)
    assert torch.equal(net.fusion.log_temperature, report.log_temperature)
    assert len(report.ece_after) == 3
    for before, after in zip(report.ece_before, report.ece_after):
        assert after < before / 2
    again = calibrate(net, data, prior=1.0)
    torch.testing.assert_close(again.bias, report.bias)
    # What the model now says is what the report measured.
    net.eval()
    with torch.no_grad():
        r = torch.cat([net(b["features"], b["present"], b["frame"]).expert_confidence.flatten(0, 1) for b in data])
    evidence = collect(net, data)
    for m, diagram in enumerate(report.after):
        got = reliability_diagram(r[:, m], evidence.squared_error[:, m], evidence.mask[:, m], kappa=None)
        torch.testing.assert_close(got.predicted, diagram.predicted, atol=1e-5, rtol=1e-5)
    assert len(diagrams(evidence, report.log_temperature, report.bias, kappa=None)) == 3


def test_calibration_keeps_the_ranking_within_a_stage():
    """A temperature is positive: confidence can be rescaled, never turned around."""
    logit, _, _, log_temperature, bias = world(frames=200)
    stage = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(200, 3)
    raw, calibrated = calibrated_confidence(logit, stage), calibrated_confidence(logit, stage, log_temperature, bias)
    assert torch.equal(raw.argsort(0), calibrated.argsort(0))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda l, s, e: fit_calibration(l, s[:, :2], e, kappa=1.0),
            ValueError,
            r"stage: expected shape \(\*, S\) = \(60, 3\)",
        ),
        (
            lambda l, s, e: fit_calibration(l, s, e[:, :1], kappa=1.0),
            ValueError,
            r"squared_error: expected shape \(60, 2\)",
        ),
        (
            lambda l, s, e: fit_calibration(l, s, e, torch.ones(60, 2), kappa=1.0),
            TypeError,
            "mask: expected dtype bool",
        ),
        (
            lambda l, s, e: fit_calibration(l, s, e, torch.ones(60) > 0, kappa=1.0),
            ValueError,
            r"mask: expected shape \(\*, M\) = \(60, 2\)",
        ),
        (
            lambda l, s, e: fit_calibration(l, s, e, torch.zeros(60, 2) > 0, kappa=1.0),
            ValueError,
            "mask: expected a frame or more to .*, got none",
        ),
        (
            lambda l, s, e: fit_calibration(l * math.nan, s, e, kappa=1.0),
            ValueError,
            "expected finite numbers wherever mask",
        ),
        (lambda l, s, e: fit_calibration(l, s, e, kappa=0.0), ValueError, "kappa: expected a number > 0"),
        (lambda l, s, e: fit_calibration(l, s, e, kappa=1.0, prior=-1.0), ValueError, "prior: expected a number >= 0"),
        (
            lambda l, s, e: reliability_diagram(s[:, 0], e[:5, 0], kappa=1.0),
            ValueError,
            r"squared_error: expected shape \(60,\)",
        ),
        (
            lambda l, s, e: reliability_diagram(s[:, 0], e[:, 0], kappa=1.0, bins=0),
            ValueError,
            "bins: expected an int >= 1",
        ),
        (
            lambda l, s, e: reliability_diagram(s[:, 0], e[:, 0], s[:, 0], kappa=1.0),
            TypeError,
            "mask: expected dtype bool",
        ),
        (
            lambda l, s, e: reliability_diagram(s[:, 0], e[:, 0], s > 0, kappa=1.0),
            ValueError,
            r"mask: expected shape \(\*,\) = \(60,\)",
        ),
        (
            lambda l, s, e: reliability_diagram(s[:, 0], e[:, 0], s[:, 0] > 2, kappa=1.0),
            ValueError,
            "mask: expected a frame or more to .*, got none",
        ),
        (lambda l, s, e: spearman(s, s), ValueError, "two 1-d tensors"),
        (
            lambda l, s, e: calibrate(torch.nn.Linear(1, 1), []),
            ValueError,
            "model: expected a module that holds one ReliabilityFusion, got Linear with 0",
        ),
        (
            lambda l, s, e: calibrate(model(fusion="uniform"), batches()),
            ValueError,
            "model: expected fusion='reliability', .*, got 'uniform'",
        ),
        (lambda l, s, e: calibrate(model(), batches(), kappa=0.3), ValueError, "kappa: expected None"),
        (lambda l, s, e: calibrate(model(), []), ValueError, "batches: expected one or more, got none"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(*world(frames=60)[:3])
