"""Confidence in somebody else's model: ReliabilityHead while it trains, `calibrate` afterwards, and how models are called."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sage_ext.calibration import (
    _cross_fitted,
    calibrate,
    calibrated_confidence,
    collect,
    diagrams,
    expected_calibration_error,
    spearman,
)
from sage_ext.models import SAGE
from sage_ext.nn import CCCLoss, ReliabilityFusion, ReliabilityHead

DIMS = {"audio": 9, "visual": 14}


class World(NamedTuple):
    """A slow signal in two modalities; the noise of audio rises and falls in spans, that of visual does not change."""

    features: dict[str, Tensor]
    labels: Tensor  # (B, T, 2)
    noise: Tensor  # (B, T) standard deviation of audio's


def world(batch, seed, frames=120):
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(batch, frames, 2, generator=g)
    signal = 3 * torch.nn.functional.avg_pool1d(steps.transpose(1, 2), 21, 1, 10).transpose(1, 2)
    phase = 6.28 * torch.rand(batch, 1, generator=g)
    noise = (1.2 * (torch.arange(frames) / 12 + phase).sin() - 0.4).exp()  # between 0.2 and 2.2
    features = {}
    fixed = torch.Generator().manual_seed(1234)
    for level, (name, dim) in zip((noise[..., None], 0.6), DIMS.items()):
        mix = 0.5 * torch.randn(2, dim, generator=fixed)
        x = (signal + level * torch.randn(batch, frames, 2, generator=g)) @ mix
        features[name] = x + 0.05 * torch.randn(batch, frames, dim, generator=g)
    return World(features, torch.tanh(signal), noise)


class Foreign(nn.Module):
    """Somebody's model: encoders of its own around the fusion. What it returns is nobody's business."""

    def __init__(self, head=True):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {k: nn.Sequential(nn.Linear(d, 24), nn.GELU(), nn.Linear(24, 16)) for k, d in DIMS.items()}
        )
        self.norm = nn.BatchNorm1d(16)
        self.fuse = ReliabilityFusion(dict.fromkeys(DIMS, 16), dim=16, stages=2)
        self.confidence = ReliabilityHead(self.fuse) if head else None
        self.out = nn.Linear(16, 2)

    def encode(self, audio, visual):
        return {"audio": self.encoders["audio"](audio), "visual": self.encoders["visual"](visual)}

    def forward(self, audio, visual, present=None):
        fused = self.fuse(self.encode(audio, visual), present).fused
        return self.out(self.norm(fused.transpose(1, 2)).transpose(1, 2)).tanh()


def train(head, seed=0, steps=150):
    torch.manual_seed(seed)
    model = Foreign(head)
    optimiser, concordance = torch.optim.Adam(model.parameters(), 3e-3), CCCLoss()
    for step in range(steps):
        data = world(8, 1000 + step)
        optimiser.zero_grad()
        features = model.encode(**data.features)
        out = model.fuse(features)
        loss = concordance(model.out(model.norm(out.fused.transpose(1, 2)).transpose(1, 2)).tanh(), data.labels)
        if head:
            loss = loss + model.confidence(features, out, data.labels)
        loss.backward()
        optimiser.step()
    return model


@pytest.fixture(scope="module")
def trained():
    return train(True)


@pytest.fixture(scope="module")
def without_head():
    return train(False)


def validation(count=6):
    worlds = [world(8, 50 + i) for i in range(count)]
    return [w.features for w in worlds], [w.labels for w in worlds]


def errors(model, evidence, kappa=0.25):
    """Expected calibration error a modality, of evidence under the model's calibration."""
    found = diagrams(evidence, model.fuse.log_temperature, model.fuse.bias, kappa=kappa)
    return [expected_calibration_error(d) for d in found]


def confidence_of(model, features):
    seen = []
    handle = model.fuse.register_forward_hook(lambda module, args, out: seen.append(out.confidence))
    with torch.no_grad():
        copy.copy(model).eval()(**features)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------------------------- does it work?
def test_three_lines_give_a_calibrated_confidence(trained):
    """Trained by the head's loss added to the model's own, and overconfident on purpose: after `calibrate` the error on other
    data is small, and confidence ranks frames by their true noise."""
    model = copy.deepcopy(trained)
    others = [world(32, 900)]
    test = [w.features for w in others], [w.labels for w in others]
    model.fuse.bias.fill_(1.5)
    boasting = errors(model, collect(model, *test))
    report = calibrate(model, *validation())
    after = errors(model, collect(model, *test))
    assert all(b > 0.15 for b in boasting), boasting
    assert all(a < 0.06 for a in after), after
    assert all(a < b for a, b in zip(report.ece_after, report.ece_before))
    model.eval()
    r = confidence_of(model, others[0].features)
    # 0.77 here, 0.69 with the weights drawn from seed 1: typicality averages over 16 frames, and so lags behind the noise.
    assert spearman(r[..., 0].flatten(), -others[0].noise.flatten()) > 0.6
    # The other modality's confidence does not take up audio's noise.
    assert abs(spearman(r[..., 1].flatten(), -others[0].noise.flatten())) < 0.5


def test_the_heads_loss_costs_the_models_own_little(trained, without_head):
    data = world(64, 901)
    scores = []
    for model in (copy.deepcopy(trained).eval(), copy.deepcopy(without_head).eval()):
        with torch.no_grad():
            scores.append(1 - float(CCCLoss()(model(**data.features), data.labels)))
    assert scores[0] > scores[1] - 0.02, scores


def test_without_a_head_ridge_regressions_take_its_place(without_head):
    """Confidence that only the fused loss taught is far from calibrated; cross-fitted ridges calibrate it all the same."""
    model = copy.deepcopy(without_head)
    batches, labels = validation()
    evidence = collect(model, batches, labels)
    assert min(errors(model, evidence)) > 0.1
    report = calibrate(model, batches, labels)
    assert max(report.ece_after) < 0.05
    others = [world(8, 300 + i) for i in range(4)]
    assert max(errors(model, collect(model, [w.features for w in others], [w.labels for w in others]))) < 0.08


def test_ridges_errors_are_those_of_a_trained_head(trained):
    """On the same features the two ways to a modality's own errors agree to a few percent of their mean."""
    batches, labels = validation()
    by_head = collect(trained, batches, labels)
    lone = copy.deepcopy(trained)
    lone.confidence = None
    by_ridge = collect(lone, batches, labels)
    assert torch.equal(by_head.reliability, by_ridge.reliability)
    means = by_head.squared_error.mean((0, 2)), by_ridge.squared_error.mean((0, 2))
    torch.testing.assert_close(means[1].float(), means[0], rtol=0.15, atol=0)


# --------------------------------------------------------------------------------------------------------------- ridge
def test_each_half_is_predicted_by_the_fit_on_the_other():
    """Labels of the second half that lie 10 higher: the first half is predicted 10 too high, the second 10 too low."""
    g = torch.Generator().manual_seed(0)
    features = [[torch.randn(4, 50, 5, generator=g)] for _ in range(4)]
    weights = torch.randn(5, 2, generator=g)
    labels = [x[0] @ weights for x in features]
    masks = [torch.ones(4, 50, 1, dtype=torch.bool) for _ in range(4)]
    exact = _cross_fitted(features, labels, masks, None)
    for got, want in zip(exact, labels):
        torch.testing.assert_close(got.squeeze(2), want.double(), atol=1e-3, rtol=1e-3)
    moved = [*labels[:2], *(y + 10 for y in labels[2:])]
    got = _cross_fitted(features, moved, masks, None)
    for p, y, offset in zip(got, labels, (10, 10, 0, 0)):
        torch.testing.assert_close(p.squeeze(2), y.double() + offset, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("lead", [(6, 30), (1, 180), (180,)])
def test_a_single_batch_is_halved_too(lead):
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(*lead, 5, generator=g), torch.randn(5, 2, generator=g)
    y, mask = x @ weights, torch.rand(*lead, 1, generator=g) > 0.2
    [got] = _cross_fitted([[x]], [y], [mask], None)
    torch.testing.assert_close(got.squeeze(-2), y.double(), atol=1e-3, rtol=1e-3)
    y = torch.randn(*lead, 2, generator=g)  # nothing to learn: cross-fitted, the error is no less than the variance
    [got] = _cross_fitted([[x]], [y], [mask], None)
    assert (got.squeeze(-2) - y).square()[mask.squeeze(-1)].mean() > 0.9 * y[mask.squeeze(-1)].var()
    half = torch.zeros_like(mask)
    half.view(-1)[: half.numel() // 2] = True
    with pytest.raises(ValueError, match="batches: expected annotated frames with modality audio in both halves"):
        _cross_fitted([[x]], [y], [half], ("audio",))


# ------------------------------------------------------------------------------------------------- how models are called
class Positional(nn.Module):
    """Takes one mapping, as the fusion does."""

    def __init__(self, inner):
        super().__init__()
        self.fuse, self.confidence = inner.fuse, inner.confidence
        self.inner = inner

    def forward(self, inputs, present=None):
        return self.inner(inputs["audio"], inputs["visual"], present)


class Named(NamedTuple):
    audio: Tensor
    visual: Tensor


def test_ways_to_pass_a_batch_agree(trained):
    data, other = world(3, 1), world(4, 2)
    labels = [data.labels, other.labels]
    want = collect(trained, [data.features, other.features], labels)
    a, b = data.features, other.features
    forms = [
        (trained, [tuple(a.values()), list(b.values())]),
        (trained, [Named(**a), Named(**b)]),
        (trained, iter([a, b])),
        (Positional(trained), [a, b]),
        (Positional(trained), [(a,), (b,)]),
        (Positional(trained), [{"inputs": a}, {"inputs": b}]),
        (nn.Sequential(Positional(trained)), [a, b]),
    ]
    for model, batches in forms:
        for x, y in zip(collect(model, batches, iter(labels)), want):
            assert torch.equal(x, y)
    # The fusion itself, given what it is given in the model; its head by name.
    with torch.no_grad():
        encoded = [copy.deepcopy(trained).eval().encode(**x) for x in (a, b)]
    for x, y in zip(collect(trained.fuse, encoded, labels, head=trained.confidence), want):
        assert torch.equal(x, y)


def test_single_frames_are_rows(trained):
    """(N, d): each a sequence of one, as the fusion has it."""
    data = world(3, 1)
    with torch.no_grad():
        encoded = copy.deepcopy(trained).eval().encode(**data.features)
    rows = {k: v.flatten(0, 1) for k, v in encoded.items()}
    labels = data.labels.flatten(0, 1)
    got = collect(trained.fuse, [rows], [labels], head=trained.confidence)
    want = collect(
        trained.fuse, [{k: v.unsqueeze(1) for k, v in rows.items()}], [labels.unsqueeze(1)], head=trained.confidence
    )
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)
    assert calibrate(copy.deepcopy(trained.fuse), [rows], [labels]).bias.isfinite().all()


def test_only_annotated_present_and_finite_frames_are_read(trained):
    data = world(4, 3)
    g = torch.Generator().manual_seed(0)
    present, valid = torch.rand(4, 120, 2, generator=g) > 0.2, torch.rand(4, 120, generator=g) > 0.2
    broken = torch.rand(4, 120, generator=g) > 0.8
    audio = data.features["audio"].masked_fill(broken[..., None], math.nan)
    batch = {"audio": audio, "visual": data.features["visual"], "present": present}
    labels = data.labels.masked_fill(~valid[..., None], math.nan)
    evidence = collect(trained, [batch], [labels])
    want = present & valid[..., None] & ~torch.stack([broken, torch.zeros_like(broken)], -1)
    assert torch.equal(evidence.mask, want.flatten(0, 1))
    assert all(x.isfinite().all() for x in evidence)
    pair = collect(trained, [batch], [(data.labels, valid)])
    for m in range(2):
        rows = evidence.mask[:, m]
        assert torch.equal(pair.squared_error[rows, m], evidence.squared_error[rows, m])
    assert torch.equal(pair.mask, evidence.mask)


def test_the_model_is_left_as_it_was(trained):
    """Modes module by module, no hook, no statistics moved, also where the model raises."""
    model = copy.deepcopy(trained).train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    collect(model, *validation(1))
    with pytest.raises(RuntimeError):
        collect(model, [{"audio": torch.zeros(2, 5, 3), "visual": torch.zeros(2, 5, 3)}], [torch.zeros(2, 5, 2)])
    assert [m.training for m in model.modules()] == modes
    assert not model.fuse._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = calibrate(model, *validation())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fuse.log_temperature", "fuse.bias"}
    assert torch.equal(model.fuse.bias, report.bias)
    assert [m.training for m in model.modules()] == modes


def test_kappa_is_the_heads_unless_given(trained):
    model = copy.deepcopy(trained)
    model.confidence.score.kappa = 0.5
    data = validation(2)
    by_head, given = calibrate(model, *data), calibrate(model, *data, kappa=0.25)
    assert not torch.allclose(by_head.bias, given.bias, atol=0.1)
    torch.testing.assert_close(calibrate(model, *data, kappa=0.5).bias, by_head.bias)
    torch.testing.assert_close(calibrate(trained, *data).bias, given.bias)


@pytest.mark.slow
def test_compiled_models_are_calibrated_as_they_are(trained):
    model = copy.deepcopy(trained)
    want = calibrate(model, *validation(2))
    torch.testing.assert_close(calibrate(torch.compile(model, backend="eager"), *validation(2)).bias, want.bias)
    model.fuse = torch.compile(model.fuse, backend="eager")
    torch.testing.assert_close(calibrate(model, *validation(2)).bias, want.bias)


# ---------------------------------------------------------------------------------------------------------------- SAGE
class AroundSage(nn.Module):
    def __init__(self, sage):
        super().__init__()
        self.sage = sage

    def forward(self, inputs, mask=None):
        return self.sage(inputs, mask=mask).prediction


def test_a_sage_and_a_model_around_one(trained):
    """Its unimodal predictions are each modality's own, as in batches of clips."""
    torch.manual_seed(0)
    sage = SAGE(DIMS, dim=8, stages=2)
    data = world(3, 5)
    mask = torch.arange(120).expand(3, 120) < 100
    clips = {"features": data.features, "labels": data.labels, "valid": mask, "frame": mask}
    want = collect(sage, [clips])
    for model, batch in (
        (sage, {"features": data.features, "mask": mask}),
        (AroundSage(sage), {"inputs": data.features, "mask": mask}),
        (AroundSage(sage), (data.features, mask)),
    ):
        got, rows = collect(model, [batch], [(data.labels, mask)]), mask.flatten()
        assert torch.equal(got.mask, want.mask)
        for x, y in zip(got[:3], want[:3]):
            torch.testing.assert_close(x[rows], y[rows])
    report = calibrate(AroundSage(copy.deepcopy(sage)), [(data.features, mask)], [(data.labels, mask)])
    torch.testing.assert_close(report.bias, calibrate(sage, [clips]).bias)


def test_presence_by_name_in_clips():
    torch.manual_seed(0)
    sage, data = SAGE(DIMS, dim=8), world(3, 5)
    present = torch.rand(3, 120, 2) > 0.3
    clips = {"features": data.features, "labels": data.labels, "valid": torch.ones(3, 120, dtype=torch.bool)}
    by_name = {"visual": present[..., 1], "audio": present[..., 0]}
    for a, b in zip(collect(sage, [{**clips, "present": present}]), collect(sage, [{**clips, "present": by_name}])):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------- errors
def unused(model):
    """Holds the fusion, and does not call it."""
    held = nn.Linear(9, 2)
    held.fuse = model.fuse
    return held


def twice(model):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, audio, visual):
            return self.inner(audio, visual) + self.inner(audio, visual)

    return Twice()


ERRORS = [
    (lambda m, x, y: calibrate(3, [x], [y]), TypeError, "model: expected a torch.nn.Module, got int"),
    (lambda m, x, y: calibrate(nn.Linear(2, 2), [x], [y]), ValueError, "holds one ReliabilityFusion, got Linear with 0"),
    (lambda m, x, y: calibrate(nn.ModuleList([m, Foreign()]), [x], [y]), ValueError, "got ModuleList with 2"),
    (lambda m, x, y: calibrate(SAGE(DIMS, fusion="uniform"), [x], [y]), ValueError, "fusion='reliability'.*got 'uniform'"),
    (lambda m, x, y: calibrate(m, [x]), TypeError, "targets: expected the labels of each batch .*, got None"),
    (lambda m, x, y: calibrate(m, x, [y]), TypeError, "batches: expected an iterable with an item a batch, got dict"),
    (lambda m, x, y: calibrate(m, [x], y), TypeError, "targets: expected an iterable with an item a batch, got Tensor"),
    (lambda m, x, y: calibrate(m, [x, x], [y]), ValueError, "targets: expected one for .*, got 1 for 2 or more"),
    (lambda m, x, y: calibrate(m, [x], [y, y]), ValueError, "targets: expected one for each of the 1 batches, got more"),
    (lambda m, x, y: calibrate(m, [], []), ValueError, "batches: expected one or more, got none"),
    (lambda m, x, y: calibrate(m, [x], [y[:, :5]]), ValueError, r"targets\[0\]: expected .*\(2, 120, 'C'\), got \(2, 5, 2\)"),
    (lambda m, x, y: calibrate(m, [x], [y[..., :1]]), ValueError, "targets: expected the 2 targets of the head, got 1"),
    (lambda m, x, y: calibrate(m, [x], [y.long()]), TypeError, r"targets\[0\]: expected dtype .*, got torch.int64"),
    (lambda m, x, y: calibrate(m, [x], [(y, y, y)]), ValueError, r"targets\[0\]: expected labels or a pair .*, got 3 items"),
    (lambda m, x, y: calibrate(m, [x], [(y, y[..., 0])]), TypeError, r"targets\[0\]\[1\]: expected dtype bool"),
    (lambda m, x, y: calibrate(m, [x], [y * math.nan]), ValueError, "mask: expected a frame or more"),
    (lambda m, x, y: calibrate(m, [{"sound": x["audio"]}], [y]), TypeError, r"batches\[0\]: .* Foreign.forward.*\['sound'\]"),
    (lambda m, x, y: calibrate(m, [x["audio"]], [y]), TypeError, r"batches\[0\]: expected what .*, got 1 positional arguments"),
    (lambda m, x, y: calibrate(m, [x], [y], head=m.out), TypeError, "head: expected a ReliabilityHead or None, got Linear"),
    (lambda m, x, y: calibrate(m, [x], [y], head=ReliabilityHead(DIMS)), ValueError, "head: expected one for the fusion's"),
    (lambda m, x, y: calibrate(m, [x], [y], kappa=0.0), ValueError, "kappa: expected a number > 0"),
    (lambda m, x, y: calibrate(unused(m), [x["audio"]], [y]), ValueError, "one call of its ReliabilityFusion a batch, got 0"),
    (lambda m, x, y: calibrate(twice(m), [x], [y]), ValueError, "one call of its ReliabilityFusion a batch, got 2"),
    (
        lambda m, x, y: calibrate(nn.ModuleDict({"a": m, "b": ReliabilityHead(m.fuse)}), [x], [y]),
        ValueError,
        "model: expected at most one ReliabilityHead .*, got 2",
    ),
    (lambda m, x, y: collect(SAGE(DIMS), [(x,)], [y], head=m.confidence), ValueError, "head: expected None"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_errors_name_the_argument(call, error, match):
    torch.manual_seed(0)
    data = world(2, 1)
    with pytest.raises(error, match=match):
        call(Foreign(), data.features, data.labels)


def test_confidence_of_the_model_is_what_was_fitted(trained):
    model, (batches, labels) = copy.deepcopy(trained).eval(), validation(2)
    calibrate(model, batches, labels)
    evidence = collect(model, batches, labels)
    fitted = calibrated_confidence(evidence.reliability, evidence.stage, model.fuse.log_temperature, model.fuse.bias)
    got = torch.cat([confidence_of(model, x).flatten(0, 1) for x in batches])
    torch.testing.assert_close(got, fitted, atol=1e-5, rtol=1e-5)
