"""ReliabilityNLL, CCCLoss and TemporalCCCLoss against their definitions, and where nothing is counted."""

import math

import numpy as np
import pytest
import torch
from scores import numpy_ccc

from sage_ext.nn import CCCLoss, ReliabilityNLL, TemporalCCCLoss


# ------------------------------------------------------------------------------------------------------ ReliabilityNLL
@pytest.mark.parametrize("kappa", [0.1, 1.0])
@pytest.mark.parametrize("variance", [1e-4, 0.03, 1.0, 50.0])
def test_nll_is_minimal_at_the_calibrated_confidence(kappa, variance):
    score = ReliabilityNLL(kappa)
    torch.manual_seed(0)
    error = variance * torch.randn(20_000, 1, dtype=torch.float64).square()
    error *= variance / error.mean()
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logit], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = score(logit.sigmoid().expand(20_000, 1), error)
        loss.backward()
        return loss

    optimiser.step(closure)
    expected = 1 / (1 + variance / kappa**2)
    torch.testing.assert_close(logit.sigmoid().item(), expected, atol=1e-5, rtol=1e-3)


def test_nll_is_the_gaussian_one():
    torch.manual_seed(0)
    r, residual, kappa = torch.rand(50, 3).double() * 0.98 + 0.01, torch.randn(50, 3).double(), 0.4
    variance = kappa**2 * (1 - r) / r
    got = ReliabilityNLL(kappa)(r, residual.square())
    reference = torch.nn.functional.gaussian_nll_loss(residual, torch.zeros_like(residual), variance)
    torch.testing.assert_close(got, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("r", [0.0, 1e-30, 1e-8, 1 - 1e-7, 1.0])
def test_nll_is_finite_at_the_ends_and_pulls_back(r):
    confidence = torch.full((4, 2), r, requires_grad=True)
    error = torch.full((4, 2), 1e-3 if r < 0.5 else 4.0, requires_grad=True)
    loss = ReliabilityNLL(0.3)(confidence, error)
    loss.backward()
    assert loss.isfinite()
    assert confidence.grad.isfinite().all()
    assert (confidence.grad < 0).all() if r < 0.5 else (confidence.grad > 0).all()
    assert error.grad is None  # detached


def test_nll_mask_targets_and_empty():
    torch.manual_seed(0)
    r, error = torch.rand(5, 4, 3), torch.rand(5, 4, 3, 2)
    mask = torch.rand(5, 4, 3) > 0.4
    score = ReliabilityNLL(0.5)
    got = score(r, torch.where(mask[..., None], error, math.nan), mask)
    torch.testing.assert_close(got, score(r[mask][:, None], error.mean(-1)[mask][:, None]))
    frames = torch.rand(5, 4) > 0.5
    torch.testing.assert_close(score(r, error, frames), score(r, error, frames[..., None].expand(5, 4, 3)))
    r.requires_grad_()
    nothing = score(r, error, torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0
    assert not r.grad.any()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ReliabilityNLL(0), ValueError, "kappa: expected a number > 0"),
        (lambda: ReliabilityNLL(math.inf), ValueError, "kappa: expected a number > 0 and finite, got inf"),
        (lambda: ReliabilityNLL("1"), TypeError, "kappa: expected a number, got str"),
        (
            lambda: ReliabilityNLL(1)(torch.rand(3, 2), torch.rand(3, 4)),
            ValueError,
            r"squared_error: expected shape \(3, 2\)",
        ),
        (
            lambda: ReliabilityNLL(1)(torch.rand(3, 2), torch.rand(3, 2), torch.ones(3, 2)),
            TypeError,
            "mask: expected dtype bool, got torch.float32",
        ),
        (
            lambda: ReliabilityNLL(1)(torch.rand(3, 2), torch.rand(3, 2), torch.ones(2, 2) > 0),
            ValueError,
            r"mask: expected shape \(3, 2\) or \(3,\), got \(2, 2\)",
        ),
    ],
)
def test_nll_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


# --------------------------------------------------------------------------------------------------------- CCC losses
def labelled(seed=0, batch=3, frames=30):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(batch, frames, 2, generator=g)
    return (
        target + 0.7 * torch.randn(batch, frames, 2, generator=g) + 0.2,
        target,
        torch.rand(batch, frames, generator=g) > 0.3,
    )


@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_ccc_loss_is_one_minus_ccc(pool, weights):
    pred, target, mask = labelled()
    loss = CCCLoss(pool, channel_weights=weights)(pred, target, mask)
    groups = [(pred[mask], target[mask])] if pool == "batch" else [(p[m], t[m]) for p, t, m in zip(pred, target, mask)]
    rho = np.array([[numpy_ccc(p[:, c], t[:, c]) for c in range(2)] for p, t in groups]).mean(0)
    expected = 1 - np.average(rho, weights=weights)
    assert abs(loss.item() - expected) < 1e-6


@pytest.mark.parametrize("ignore", [-5.0, math.nan])
def test_ignored_labels_are_masked_frames(ignore):
    pred, target, mask = labelled()
    marked = target.clone()
    marked[..., 0] = torch.where(mask, target[..., 0], ignore)  # one column suffices
    loss = CCCLoss(ignore_value=ignore)
    expected = CCCLoss()(pred, target, mask)
    torch.testing.assert_close(loss(pred, marked), expected)
    torch.testing.assert_close(loss(pred, marked, torch.ones_like(mask)), expected)
    half = torch.ones_like(pred, dtype=torch.bool)
    torch.testing.assert_close(loss(pred, marked, half), expected)


@pytest.mark.parametrize(
    "loss", [CCCLoss(), CCCLoss("sequence"), CCCLoss(ignore_value=-5.0), TemporalCCCLoss(window=5)]
)
def test_nothing_valid_gives_zero_gradient(loss):
    pred, target, mask = labelled()
    pred.requires_grad_()
    value = loss(pred, target, torch.zeros_like(mask))
    value.backward()
    assert value.isfinite()
    assert not pred.grad.any()


def test_losses_take_half_precision():
    pred, target, mask = labelled()
    pred = pred.bfloat16().requires_grad_()
    for loss in (CCCLoss(), TemporalCCCLoss(halflife=10.0)):
        value = loss(pred, target, mask)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(pred.float(), target, mask))
        value.backward()
        assert pred.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("memory", [{"window": 4}, {"window": 100}, {"halflife": 6.0}, {}])
@pytest.mark.parametrize("masked", [True, False])
def test_temporal_loss_is_its_definition(memory, masked):
    pred, target, mask = labelled()
    pred, target = pred.double(), target.double()
    mask = mask if masked else None
    got = TemporalCCCLoss(**memory)(pred, target, mask)
    terms = []
    for b in range(3):
        for t in range(30):
            frames = [i for i in range(t + 1) if mask is None or mask[b, i]]
            if "window" in memory:
                frames = [i for i in frames if i > t - memory["window"]]
            if len(frames) < 2:
                continue
            w = np.array([0.5 ** ((t - i) / memory["halflife"]) if "halflife" in memory else 1.0 for i in frames])
            w /= w.sum()
            for c in range(2):
                p, y = pred[b, frames, c].numpy(), target[b, frames, c].numpy()
                mp, my = w @ p, w @ y
                terms.append(
                    1 - 2 * (w @ ((p - mp) * (y - my))) / (w @ (p - mp) ** 2 + w @ (y - my) ** 2 + (mp - my) ** 2)
                )
    torch.testing.assert_close(got.item(), float(np.mean(terms)), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: CCCLoss("video"), ValueError, "pool: expected 'batch' or 'sequence', got 'video'"),
        (
            lambda: CCCLoss(channel_weights=[-1.0, 2.0]),
            ValueError,
            "channel_weights: expected one number >= 0 a target",
        ),
        (lambda: CCCLoss(channel_weights=[0.0, 0.0]), ValueError, "channel_weights: .* not all of them 0"),
        (
            lambda: CCCLoss(channel_weights=[1.0, 1.0, 1.0])(*labelled()),
            ValueError,
            "pred: expected 3 targets .*, got 2",
        ),
        (lambda: TemporalCCCLoss(window=1), ValueError, "window: expected an int >= 2, got 1"),
        (lambda: TemporalCCCLoss(window=2.5), TypeError, "window: expected an int, got float"),
        (lambda: TemporalCCCLoss(window=5, halflife=2.0), ValueError, "window, halflife: expected at most one"),
        (lambda: TemporalCCCLoss(halflife=0), ValueError, "halflife: expected a number > 0, got 0"),
        (lambda: TemporalCCCLoss(halflife="3"), TypeError, "halflife: expected a number, got str"),
    ],
)
def test_loss_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_repr_names_what_matters():
    assert "kappa=0.5" in repr(ReliabilityNLL(0.5))
    assert "window=5" in repr(TemporalCCCLoss(window=5))
    assert "ignore_value=-5" in repr(CCCLoss(ignore_value=-5))
