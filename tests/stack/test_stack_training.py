"""What training loops do to a module: autocast, gradient scaling, checkpointing, functional calls; and what is refused."""

import pickle

import pytest
import torch
from tiny import DIMS, close, draw, tiny
from torch.utils.checkpoint import checkpoint

from sage_ext.metrics import TorchMetricsCCC
from sage_ext.models import SAGELoss


def labels():
    return torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(3)) - 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    """Three steps follow those of float32; a gradient that overflows is skipped."""
    features, present = draw()
    losses = []
    for enabled in (False, True):
        model = tiny(dropout=0.0).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss, _ = SAGELoss()(model(features, present), labels(), None, present)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append(loss.item())
        losses.append(seen)
    torch.testing.assert_close(*losses, atol=0.05, rtol=0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(features, present).prediction.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit_of_the_gradients(reentrant):
    model = tiny()
    features, present = draw()
    grads = []
    for saving in (False, True):
        model.zero_grad()
        x = [features[name].clone().requires_grad_() for name in DIMS]

        def run(*x):
            return model(dict(zip(DIMS, x)), present).prediction

        out = checkpoint(run, *x, use_reentrant=reentrant) if saving else run(*x)
        out.square().mean().backward()
        grads.append([p.grad for p in [*x, *model.parameters()] if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_functional_call_runs_other_weights():
    model, other = tiny(1), tiny(2)
    weights = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    close(torch.func.functional_call(model, weights, draw()), other(*draw()), tol=0)
    close(model(*draw()), tiny(1)(*draw()), tol=0)


# -------------------------------------------------------------------------------------------------------- torchmetrics
def test_every_mode_of_a_metric_gives_the_same():
    """The package does not ship its own tester: forward in both of its ways, update and compute, merged states."""
    pytest.importorskip("torchmetrics")
    r = torch.Generator().manual_seed(4)
    data = [(torch.randn(2, n, 2, generator=r), torch.randn(2, n, 2, generator=r)) for n in (5, 9, 3)]
    whole = TorchMetricsCCC()
    whole.update(*(torch.cat(parts, 1) for parts in zip(*data)))
    expected = whole.compute()
    for full in (False, True):
        metric = type("Full", (TorchMetricsCCC,), {"full_state_update": full})()
        for pair in data:
            alone = TorchMetricsCCC()
            alone.update(*pair)
            torch.testing.assert_close(metric(*pair), alone.compute())
        torch.testing.assert_close(metric.compute(), expected)
    merged = TorchMetricsCCC()
    merged.update(*data[0])
    for pair in data[1:]:
        part = TorchMetricsCCC()
        part.update(*pair)
        merged.merge_state(part)
    torch.testing.assert_close(merged.compute(), expected)


def drawn(count=4):
    r = torch.Generator().manual_seed(6)
    return [torch.randn(2, 2, 15, 2, generator=r).unbind(0) for _ in range(count)]


def test_what_the_tester_of_torchmetrics_asks_of_any_metric():
    """Constants, scripting, hash, clone, pickle, an empty state_dict, half precision, and no gradient."""
    pytest.importorskip("torchmetrics")
    first, second, *_ = drawn()
    metric = TorchMetricsCCC(dist_sync_on_step=True)
    for name in ("is_differentiable", "higher_is_better"):
        with pytest.raises(RuntimeError, match="const"):
            setattr(metric, name, not getattr(metric, name))
    torch.jit.script(metric)
    empty = hash(metric)
    metric.update(*first)
    assert hash(metric) != empty
    assert metric.state_dict() == {}
    for copied in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert type(copied) is type(metric)
        torch.testing.assert_close(copied.compute(), metric.compute(), atol=0, rtol=0)
        before = metric.compute()
        copied.update(*second)
        assert not torch.equal(copied.compute(), before)
        assert torch.equal(metric.compute(), before)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(TorchMetricsCCC()(*(x.to(dtype) for x in first)), before, atol=1e-2, rtol=0)
    assert not TorchMetricsCCC()(first[0].clone().requires_grad_(), first[1]).requires_grad
    metric.persistent(True)
    other = TorchMetricsCCC()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.moments, metric.moments)
    assert other.moments.dtype == torch.float64


def test_wrappers_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    data = drawn()
    group = torchmetrics.MetricCollection({"each": TorchMetricsCCC(), "mean": TorchMetricsCCC(average=True)})
    for pair in data:
        group.update(*pair)
    assert group.compute_groups == {0: ["each", "mean"]}  # one state for both
    whole = TorchMetricsCCC()
    whole.update(*(torch.cat(parts) for parts in zip(*data)))
    torch.testing.assert_close(group.compute(), {"each": whole.compute(), "mean": whole.compute().mean()})
    running = torchmetrics.wrappers.Running(TorchMetricsCCC(), window=2)
    for pair in data:
        running.update(*pair)
    last = TorchMetricsCCC()
    last.update(*(torch.cat(parts) for parts in zip(*data[-2:])))
    torch.testing.assert_close(running.compute(), last.compute())
    torch.manual_seed(0)
    resampled = torchmetrics.BootStrapper(TorchMetricsCCC(), num_bootstraps=6, raw=True)
    resampled.update(*(torch.cat(parts) for parts in zip(*data)))
    raw = resampled.compute()["raw"]
    assert raw.shape == (6, 2)
    assert (raw.std(0) > 0).all()
    tracker = torchmetrics.MetricTracker(TorchMetricsCCC(average=True))
    for share in (0.0, 1.0, 0.3):
        tracker.increment()
        for pred, target in data:
            tracker.update(pred + share * target, target)
    best, step = tracker.best_metric(return_step=True)
    assert step == 1
    assert best == max(tracker.compute_all().tolist())
