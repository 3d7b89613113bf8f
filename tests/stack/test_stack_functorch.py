"""torch.func over the ops and the models: grad, vmap, jacrev and jvp against autograd, a sample at a time; what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import DIMS, draw, tiny, tiny_fusion
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vmap

from sage_ext import functional
from sage_ext.models import SAGELoss

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}


def pair(*, seed=0, shape=(4, 3, 9, 2)):
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2)]
    return (*draw, torch.rand(shape[:-1], generator=g) > 0.3)


def ops():
    """Of each op: a scalar function of one sample, its samples (4, ...), and what they share."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def stage_filter(emission, mask, transition):
        posterior, final = functional.stage_filter(emission, transition, mask=mask)
        return (posterior.square() * torch.arange(3)).sum() + final.sin().sum()

    def reliability_fusion(a, b, reliability, emission, present, temperature, weight):
        out = functional.reliability_fusion(
            [a, b], reliability, emission.softmax(-1), log_temperature=temperature, sharpness=temperature[0, 0].exp(),
            present=present, norm_weight=weight, norm_bias=weight * 0.5,
        )  # fmt: skip
        return sum((x.sin() * (i + 1)).sum() for i, x in enumerate(out))

    def ccc(pred, target, mask):
        return functional.ccc(pred, target, mask, pool="sequence").sin().sum() + functional.ccc(pred, target).sum()

    def moments(pred, target, mask):
        return functional.ccc_from_moments(functional.ccc_moments(pred, target, mask)).sum()

    def running(**mode):
        return lambda pred, target, mask: functional.temporal_ccc(pred, target, mask, **mode)[0].sin().sum()

    def leaky_average(x, precision, prior):
        average, state = functional.leaky_average(x, precision, [2.0, 5.0], prior, relative=True)
        return average.sin().sum() + state.square().sum()

    flags = torch.rand(4, 2, 7, 2, generator=g) > 0.3
    values = normal(4, 2, 7, 5), normal(4, 2, 7, 5)
    return {
        "stage_filter": (stage_filter, (normal(4, 2, 7, 3), flags[..., 0]), (normal(3, 3),)),
        "reliability_fusion": (
            reliability_fusion,
            (*values, normal(4, 2, 7, 2, 3), normal(4, 2, 7, 3), flags),
            (normal(2, 3), normal(2, 5)),
        ),
        "ccc": (ccc, pair(), ()),
        "ccc_moments": (moments, pair(), ()),
        "temporal_ccc": (running(), pair(), ()),
        "temporal_ccc, window": (running(window=4), pair(), ()),
        "temporal_ccc, halflife": (running(halflife=3.0), pair(), ()),
        "leaky_average": (leaky_average, (normal(4, 2, 7, 3), normal(4, 2, 7).relu()), (normal(2).exp(),)),
    }


@pytest.mark.parametrize("op", ops())
def test_gradients_of_each_sample_at_once(op):
    """`vmap(grad(f))` equals the kernels' gradients, sample by sample; `jvp` is the same gradient along a direction."""
    f, samples, shared = ops()[op]
    floats = [i for i, x in enumerate((*samples, *shared)) if x.is_floating_point()]
    axes = (*[0] * len(samples), *[None] * len(shared))
    got, values = vmap(grad_and_value(f, argnums=tuple(floats)), axes)(*samples, *shared)
    for n in range(4):
        inputs = [*(x[n] for x in samples), *shared]
        leaves = [inputs[i].clone().requires_grad_() for i in floats]
        for i, leaf in zip(floats, leaves, strict=True):
            inputs[i] = leaf
        value = f(*inputs)
        torch.testing.assert_close(values[n], value.detach(), **TOLERANCE)
        expected = torch.autograd.grad(value, leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[n], b, **TOLERANCE)
        along = [torch.ones_like(x) for x in leaves]

        def of_floats(*given, inputs=inputs):
            inputs = list(inputs)
            for i, x in zip(floats, given, strict=True):
                inputs[i] = x
            return f(*inputs)

        _, slope = jvp(of_floats, tuple(x.detach() for x in leaves), tuple(along))
        torch.testing.assert_close(slope, sum(b.sum() for b in expected), **TOLERANCE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [tiny, tiny_fusion])
def test_gradients_of_a_models_weights_for_each_sample(build, training):
    """Per-sample gradients, NaN frames and missing modalities included. In training the running statistics stand still."""
    model = (build(dropout=0.0) if build is tiny else build()).double().train(training)
    whole = model.fusion if build is tiny else model
    whole.typicality.eval()
    features, present = draw(3, 3, 12)
    features = {name: x.double() for name, x in features.items()}
    features["audio"][1, 2:5] = torch.nan
    present[2, :, 1] = False
    labels = torch.rand(3, 12, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    criterion = SAGELoss()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, features, present, labels):
        x, present, labels = ({n: v[None] for n, v in features.items()}, present[None], labels[None])
        out = functional_call(model, weights, (x, present))
        if build is tiny:
            return criterion(out, labels, None, present)[0]
        return out.fused.square().mean() + (out.weights[..., 0] * out.confidence[..., 1]).sum()

    got, values = vmap(grad_and_value(loss), (None, 0, 0, 0))(weights, features, present, labels)
    for n in range(3):
        sample = {name: x[n] for name, x in features.items()}, present[n], labels[n]
        value = loss(dict(model.named_parameters()), *sample)
        model.zero_grad()
        value.backward()
        torch.testing.assert_close(values[n], value.detach(), **TOLERANCE)
        for name, p in model.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(got[name][n], expected, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)
    assert sum(bool(g.any()) for g in got.values()) > len(DIMS)


def test_a_jacobian_over_the_weights():
    model = tiny_fusion().double()
    features, present = draw(4, 1, 3)
    features = {name: x.double() for name, x in features.items()}
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def fused(weights):
        return functional_call(model, weights, (features, present)).fused[0, :, :2]

    rows = jacrev(fused)(weights)
    out = model(features, present).fused[0, :, :2]
    for t in range(3):
        for c in range(2):
            expected = torch.autograd.grad(out[t, c], list(model.parameters()), retain_graph=True, allow_unused=True)
            for (name, p), g in zip(model.named_parameters(), expected, strict=True):
                torch.testing.assert_close(rows[name][t, c], torch.zeros_like(p) if g is None else g, **TOLERANCE)


def test_a_batch_dimension_more_without_gradients_of_torch_func():
    """vmap alone; autograd outside of it."""
    model = tiny().double()
    features, present = draw(5, 3, 9)
    x = {name: v.double().unsqueeze(1).requires_grad_() for name, v in features.items()}
    mapped = vmap(lambda x, present: model(x, present).prediction)(x, present.unsqueeze(1))
    plain = model({name: v.squeeze(1) for name, v in x.items()}, present).prediction
    torch.testing.assert_close(mapped.squeeze(1), plain, **TOLERANCE)
    grads = [torch.autograd.grad(y.square().sum(), list(x.values())) for y in (mapped, plain)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("op", ops())
def test_second_derivatives_are_refused(op):
    """The reference, which runs here, has wrong ones."""
    f, samples, shared = ops()[op]
    inputs = [*(x[0] for x in samples), *shared]
    with pytest.raises(
        NotImplementedError, match=r"no second derivatives: expected one of torch\.func's grad, vjp and jvp"
    ):
        hessian(f)(*inputs)
    inputs[0] = inputs[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="do not require a gradient outside of it"):
        grad(lambda x: f(x, *inputs[1:]))(inputs[0])


def test_outside_of_the_transforms_the_kernels_run(monkeypatch):
    """And inside of them the reference."""
    pred, target, mask = (x[0] for x in pair())
    calls = []
    reference = functional.reference.ccc
    monkeypatch.setattr(functional.reference, "ccc", lambda *a, **k: calls.append(1) or reference(*a, **k))
    functional.ccc(pred, target, mask)
    assert not calls
    grad(lambda p: functional.ccc(p, target, mask).sum())(pred)
    assert len(calls) == 1
    functional.ccc(pred, target, mask)
    assert len(calls) == 1
