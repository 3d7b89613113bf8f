"""What training loops do to a module: autocast, gradient scaling, checkpointing, functional calls; and what is refused."""

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
