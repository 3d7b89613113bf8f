"""ReliabilityHead: its loss is its definition, what counts, what learns, and what it leaves alone."""

import math

import pytest
import torch

from sage_ext.nn import FusionOutput, ReliabilityFusion, ReliabilityHead, ReliabilityNLL, UniformFusion

DIMS = {"audio": 6, "visual": 9}
BATCH, FRAMES, KAPPA = 3, 20, 0.3


def build(seed=0, **options):
    """A fusion and a head whose Linears are away from zero."""
    torch.manual_seed(seed)
    fusion = ReliabilityFusion(DIMS, 8, stages=3, evidence_dim=7).eval()
    head = ReliabilityHead(fusion, kappa=KAPPA, **options)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(0, 0.3)
    return fusion, head


def draw(seed=0, lead=(BATCH, FRAMES)):
    g = torch.Generator().manual_seed(seed)
    features = {k: torch.randn(*lead, d, generator=g) for k, d in DIMS.items()}
    labels = torch.rand(*lead, 2, generator=g) - 0.5
    return features, labels, torch.rand(*lead, generator=g) > 0.2, torch.rand(*lead, 2, generator=g) > 0.3


@pytest.mark.parametrize("lead", [(BATCH, FRAMES), (40,)])
def test_loss_is_its_definition(lead):
    fusion, head = build(weight=0.7)
    features, labels, valid, present = draw(lead=lead)
    out = fusion(features, present)
    got = head(features, out, labels, valid, present)
    error = torch.stack([(f(features[k]) - labels).square() for f, k in zip(head.heads, DIMS)], -2)
    counted = present & valid[..., None]
    odds = (out.confidence / (1 - out.confidence))[counted]
    own = error.mean(-1)[counted]
    expected = (own / (2 * KAPPA**2) + 0.5 * (odds * own.detach() / KAPPA**2 - (odds / KAPPA**2).log())).mean()
    torch.testing.assert_close(got, 0.7 * expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        head.predict(features), torch.stack([f(features[k]) for f, k in zip(head.heads, DIMS)], -2)
    )
    assert head.predict(features).shape == (*lead, 2, 2)
    score = ReliabilityNLL(KAPPA)(out.confidence, error, counted)
    torch.testing.assert_close(got / 0.7 - score, own.mean() / (2 * KAPPA**2), atol=1e-5, rtol=1e-4)


def test_names_set_the_order_and_sequences_agree():
    fusion, head = build()
    features, labels, valid, present = draw()
    want = head(features, fusion(features, present), labels, valid, present)
    shuffled = dict(reversed(features.items()))
    flags = {"visual": present[..., 1], "audio": present[..., 0]}
    assert torch.equal(head(shuffled, fusion(shuffled, flags), labels, valid, flags), want)
    assert torch.equal(head(list(features.values()), fusion(features, present), labels, valid, present), want)
    listed = ReliabilityHead(list(DIMS.values()), kappa=KAPPA)
    listed.load_state_dict(head.state_dict())
    assert torch.equal(listed(list(features.values()), fusion(features, present), labels, valid, present), want)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e25])
def test_what_does_not_count_is_not_read(garbage):
    """Missing, unannotated and non-finite frames: the same bits whatever they hold, in the loss and in all gradients."""
    features, labels, valid, present = draw()
    results = []
    for value in (0.0, garbage):
        fusion, head = build(detach_features=False)
        x = {
            k: v.masked_fill(~present[..., m, None], value).requires_grad_()
            for m, (k, v) in enumerate(features.items())
        }
        y = labels.masked_fill(~valid[..., None], value)
        # Without `present` the head finds out: by the fusion's confidence, and by the values.
        loss = head(x, fusion(x, present), y, valid if value == 0 else None if math.isnan(value) else valid)
        loss.backward()
        results.append([loss.detach(), *(v.grad for v in x.values()), *(p.grad for p in head.parameters())])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()


def test_a_frame_said_to_be_present_that_is_not_finite_does_not_count():
    fusion, head = build()
    features, labels, valid, present = draw()
    hit = torch.rand(BATCH, FRAMES, generator=torch.Generator().manual_seed(3)) > 0.7
    dirty = {**features, "audio": features["audio"].masked_fill(hit[..., None], math.nan)}
    told = present & ~torch.stack([hit, torch.zeros_like(hit)], -1)
    want = head(features, fusion(features, told), labels, valid, told)
    assert torch.equal(head(dirty, fusion(dirty, present), labels, valid, present), want)
    assert head.predict(dirty).isfinite().all()
    assert not torch.equal(want, head(features, fusion(features, present), labels, valid, present))


def test_padding_that_the_fusion_was_told_of_does_not_count():
    fusion, head = build()
    features, labels, _, present = draw()
    mask = torch.arange(FRAMES).expand(BATCH, FRAMES) < 13
    whole = head(features, fusion(features, present, mask), labels)
    short = {k: v[:, :13] for k, v in features.items()}
    cut = head(short, fusion(short, present[:, :13]), labels[:, :13])
    torch.testing.assert_close(whole, cut, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_the_error_teaches_the_linears_and_the_score_teaches_confidence(detach):
    fusion, head = build(detach_features=detach)
    features, labels, _, _ = draw()
    x = {k: v.requires_grad_() for k, v in features.items()}
    head(x, fusion(x), labels).backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    touched = {name.split(".")[0] for name, p in fusion.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"evidence", "reliability", "emission", "transition"}
    reached = [v.grad is not None and bool(v.grad.any()) for v in x.values()]
    assert reached == [not detach] * 2


def test_the_error_is_held_fixed_for_the_score():
    """The Linears' gradient is that of the mean squared error alone, whatever the confidence."""
    fusion, head = build()
    features, labels, _, _ = draw()
    grads = []
    for bias in (-3.0, 3.0):
        fusion.bias.fill_(bias)
        head.zero_grad()
        head(features, fusion(features), labels).backward()
        grads.append([p.grad.clone() for p in head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_begins_at_zero_and_takes_nothing_of_the_fusion():
    fusion = ReliabilityFusion(DIMS, 8)
    head = ReliabilityHead(fusion, num_targets=3)
    assert [m for m in head.modules() if isinstance(m, ReliabilityFusion)] == []
    assert set(head.state_dict()) == {f"heads.{m}.{name}" for m in range(2) for name in ("weight", "bias")}
    assert not any(p.any() for p in head.parameters())
    assert head.kappa == 0.25
    features, *_ = draw()
    assert head.predict({k: 1e6 * v for k, v in features.items()}).shape == (BATCH, FRAMES, 2, 3)
    for part in ("audio", "num_targets=3", "kappa=0.25"):
        assert part in repr(head)


def test_nothing_counted_is_zero_with_zero_gradient():
    fusion, head = build()
    features, labels, valid, _ = draw()
    loss = head(features, fusion(features), labels, torch.zeros_like(valid))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in [*head.parameters(), *fusion.parameters()])


def test_autocast_half_and_double():
    fusion, head = build()
    features, labels, valid, present = draw()
    full = head(features, fusion(features, present), labels, valid, present)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            x = {k: v.to(dtype) for k, v in features.items()}
            got = head(x, fusion(x, present), labels, valid, present)
            assert head.predict(x).dtype == torch.float32
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, full, atol=0.03, rtol=0.03)
    fusion, head = fusion.double(), head.double()
    x = {k: v.double() for k, v in features.items()}
    got = head(x, fusion(x, present), labels.double(), valid, present)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), full, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiles_in_one_graph():
    fusion, head = build()

    def loss(features, labels, valid, present):
        return head(features, fusion(features, present), labels, valid, present)

    data = draw()
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*data), loss(*data), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f, h, d: ReliabilityHead(3), TypeError, "fusion: expected a Fusion, or in_dims .*, got int"),
        (lambda f, h, d: ReliabilityHead({}), ValueError, "in_dims: expected 1 to 8 modalities, got 0"),
        (lambda f, h, d: ReliabilityHead(f, 0), ValueError, "num_targets: expected an int >= 1, got 0"),
        (lambda f, h, d: ReliabilityHead(f, kappa=0.0), ValueError, "kappa: expected a number > 0"),
        (
            lambda f, h, d: ReliabilityHead(f, weight=-1),
            ValueError,
            "weight: expected a number >= 0 and finite, got -1",
        ),
        (lambda f, h, d: ReliabilityHead(f, detach_features=1), TypeError, "detach_features: expected a bool, got int"),
        (lambda f, h, d: h(d[0], f(d[0]).fused, d[1]), TypeError, "out: expected the FusionOutput .*, got Tensor"),
        (
            lambda f, h, d: h(d[0], f({k: v[:, 1:] for k, v in d[0].items()}), d[1]),
            ValueError,
            r"out: expected a confidence of shape \(3, 20, 2\), got \(3, 19, 2\)",
        ),
        (
            lambda f, h, d: h(d[0], f(d[0]), d[1][..., :1]),
            ValueError,
            r"labels: expected shape \(B, T, C\) = \(3, 20, 2\), got \(3, 20, 1\)",
        ),
        (lambda f, h, d: h(d[0], f(d[0]), d[1].long()), TypeError, "labels: expected dtype .*, got torch.int64"),
        (lambda f, h, d: h(d[0], f(d[0]), d[1], d[2][:1]), ValueError, r"valid: expected shape \(B, T\) = \(3, 20\)"),
        (lambda f, h, d: h(d[0], f(d[0]), d[1], d[2].float()), TypeError, "valid: expected dtype bool"),
        (lambda f, h, d: h(d[0], f(d[0]), d[1], None, d[2]), ValueError, r"present: expected shape \(B, T, M\)"),
        (
            lambda f, h, d: h({k: v.double() for k, v in d[0].items()}, f(d[0]), d[1]),
            TypeError,
            r"features\[audio\]: expected dtype float32 \(that of the module's weights; .* \.double\(\)\), got float64",
        ),
        (lambda f, h, d: h.predict({"audio": d[0]["audio"]}), ValueError, "features: expected the modalities"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    fusion, head = build()
    with pytest.raises(error, match=match):
        call(fusion, head, draw())


def test_a_fusion_without_learnt_confidence_teaches_the_linears_alone():
    torch.manual_seed(0)
    fusion = UniformFusion(DIMS, 8)
    head = ReliabilityHead(fusion)
    features, labels, valid, present = draw()
    out = fusion(features, present)
    assert isinstance(out, FusionOutput)
    head(features, out, labels, valid, present).backward()
    assert all(p.grad is not None for p in head.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in fusion.parameters())
