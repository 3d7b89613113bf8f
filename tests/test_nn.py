"""ReliabilityFusion, its typicality, and the losses: chunks, gradients, isolation of missing data, degenerate cases."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_ext.nn import (
    CCCLoss,
    FusionState,
    ReliabilityFusion,
    ReliabilityNLL,
    TemporalCCCLoss,
    Typicality,
    UniformFusion,
)

DIMS = {"audio": 6, "visual": 9}
BATCH, FRAMES, STAGES = 3, 40, 4


def build(seed=0, **options):
    """A module in evaluation mode whose every parameter and buffer is away from its neutral start."""
    torch.manual_seed(seed)
    module = ReliabilityFusion(options.pop("in_dims", DIMS), 8, **{"evidence_dim": 12, **options})
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
        module.log_temperature.normal_(0, 0.3)
        module.bias.normal_(0, 0.3)
        module.typicality.mean.normal_()
        module.typicality.var.uniform_(0.5, 2)
    return module.eval()


def draw(seed=0, batch=BATCH, frames=FRAMES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    features = {k: torch.randn(batch, frames, d, generator=g, dtype=torch.float64).to(dtype) for k, d in DIMS.items()}
    present = torch.rand(batch, frames, len(DIMS), generator=g) > 0.25
    mask = torch.rand(batch, frames, generator=g) > 0.15
    return features, present, mask


def cut(features, flags, start, stop):
    return {k: v[:, start:stop] for k, v in features.items()}, [f[:, start:stop] for f in flags]


def splits(points, frames):
    edges = sorted({0, frames, *(p % frames for p in points)})
    return list(pairwise(edges))


# --------------------------------------------------------------------------------------------------------- the module
def test_output_is_a_convex_combination_of_the_present_modalities():
    module = build(norm=False)
    features, present, mask = draw()
    out = module(features, present, mask)
    counts = present & mask[..., None]
    some = counts.any(-1)
    torch.testing.assert_close(out.weights.sum(-1), some.float(), atol=1e-6, rtol=0)
    assert not out.weights[~counts].any()
    assert not out.confidence[~counts].any()
    assert not out.fused[~some].any()
    values = [linear(features[k]) for linear, k in zip(module.value, DIMS)]
    expected = sum(out.weights[..., m, None] * v for m, v in enumerate(values))
    torch.testing.assert_close(out.fused, torch.where(some[..., None], expected, 0.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.stage.sum(-1), torch.ones(BATCH, FRAMES), atol=1e-5, rtol=0)
    assert out.confidence[counts].min() > 0
    assert out.confidence.max() < 1
    assert out.confidence[counts].std() > 0.01  # it depends on the evidence


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=6), st.integers(0, 1000))
def test_chunks_equal_the_whole(points, seed):
    module = build()
    features, present, mask = draw(seed)
    whole = module(features, present, mask)
    parts, state = [], None
    for start, stop in splits(points, FRAMES):
        piece, flags = cut(features, (present, mask), start, stop)
        parts.append(module(piece, *flags, state))
        state = parts[-1].state
    for field in ("fused", "weights", "confidence", "stage"):
        joined = torch.cat([getattr(p, field) for p in parts], 1)
        torch.testing.assert_close(joined, getattr(whole, field), atol=1e-5, rtol=1e-5)
    for a, b in zip(state, whole.state):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_state_is_a_named_tuple_of_tensors_with_the_documented_shapes():
    features, present, mask = draw()
    state = build()(features, present, mask).state
    assert isinstance(state, FusionState)
    window = 16
    assert [tuple(s.shape) for s in state] == [
        (BATCH, STAGES),
        (BATCH, window - 1, 2, 2),
        (BATCH, window - 1, 2, 2),
        (BATCH, sum(DIMS.values())),
    ]


def test_state_carries_information():
    """Dropping it changes the result: the chunk test cannot pass by ignoring state."""
    module = build()
    features, _, _ = draw()
    head, tail = cut(features, (), 0, 20)[0], cut(features, (), 20, 40)[0]
    warm, cold = module(tail, state=module(head).state), module(tail)
    assert (warm.stage[:, 0] - cold.stage[:, 0]).abs().max() > 1e-3
    assert (warm.confidence[:, 0] - cold.confidence[:, 0]).abs().max() > 1e-4


def test_single_frames_are_a_sequence_of_length_one():
    module = build()
    features, present, mask = draw(frames=1)
    whole = module(features, present, mask)
    single = module({k: v[:, 0] for k, v in features.items()}, present[:, 0], mask[:, 0])
    for field in ("fused", "weights", "confidence", "stage"):
        torch.testing.assert_close(getattr(single, field), getattr(whole, field)[:, 0], atol=0, rtol=0)


def test_sequence_and_mapping_agree_and_names_set_the_order():
    features, present, _ = draw()
    named, listed = build(), build(in_dims=list(DIMS.values()))
    shuffled = dict(reversed(features.items()))
    torch.testing.assert_close(named(shuffled, present).fused, listed(list(features.values()), present).fused)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_missing_data_reach_nothing(training, garbage):
    """Absent or masked frames that hold NaN give the bits that zeros give: outputs, gradients, statistics, state."""
    features, present, mask = draw()
    missing = ~(present & mask[..., None])
    results = []
    for value in (0.0, garbage):
        module = build(detach_evidence=False).train(training)
        x = {
            k: v.masked_fill(missing[..., m, None], value).requires_grad_() for m, (k, v) in enumerate(features.items())
        }
        out = module(x, present, mask)
        (
            out.fused.square().sum() + out.weights.square().sum() + out.confidence.sum() + out.stage[..., 0].sum()
        ).backward()
        results.append(
            [*out[:4], *out.state, *(v.grad for v in x.values())]
            + [p.grad for p in module.parameters()]
            + list(module.typicality.buffers())
        )
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()
    for m, grad in enumerate(results[0][8:10]):
        assert not grad[missing[..., m]].any()


def test_an_absent_modality_gives_no_evidence():
    """What the other one holds decides alone; its values do not matter."""
    module = build()
    features, _, _ = draw()
    present = torch.ones(BATCH, FRAMES, 2, dtype=torch.bool)
    present[..., 0] = False
    other = {**features, "audio": torch.randn_like(features["audio"])}
    a, b = module(features, present), module(other, present)
    for x, y in zip(a[:4], b[:4]):
        assert torch.equal(x, y)
    torch.testing.assert_close(a.weights[..., 1], torch.ones(BATCH, FRAMES))


def test_nothing_present_lets_time_pass_without_evidence():
    module = build(stages=3)
    features, _, _ = draw(frames=200)
    absent = torch.zeros(BATCH, 200, 2, dtype=torch.bool)
    out = module(features, absent)
    # Belief tends to the stationary distribution of the transition matrix.
    chain = torch.softmax(module.transition.detach(), 1).double()
    stationary = torch.matrix_power(chain, 10_000)[0].float()
    torch.testing.assert_close(out.stage[:, -1], stationary.expand(BATCH, -1), atol=1e-3, rtol=0)
    assert not out.fused.any()


def test_batch_and_place_do_not_matter():
    module = build()
    features, present, mask = draw(batch=7)
    whole = module(features, present, mask)
    row = module({k: v[4:5] for k, v in features.items()}, present[4:5], mask[4:5])
    for a, b in zip(row[:4], whole[:4]):
        torch.testing.assert_close(a, b[4:5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_detached_evidence_blocks_exactly_the_reliability_path(detach):
    module = build(detach_evidence=detach)
    features, _, _ = draw()
    x = {k: v.requires_grad_() for k, v in features.items()}
    out = module(x)
    by_confidence = torch.autograd.grad(
        out.confidence.sum() + out.stage[..., 0].sum(), list(x.values()), retain_graph=True, allow_unused=True
    )
    if detach:
        assert not any(g is not None and g.any() for g in by_confidence)
    else:
        assert all(g.abs().sum() > 0 for g in by_confidence)
    by_value = torch.autograd.grad(out.fused.square().sum(), list(x.values()))
    assert all(g.abs().sum() > 0 for g in by_value)


def test_every_parameter_learns():
    module = build()
    features, present, mask = draw()
    out = module(features, present, mask)
    (out.fused.square().sum() + out.confidence.sum()).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_parameter_gradients_match_finite_differences():
    module = build(stages=2).double()
    features, present, mask = draw(frames=5, dtype=torch.float64)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in module.named_parameters()))

    def run(*values):
        out = torch.func.functional_call(module, dict(zip(names, values)), (features, present, mask))
        return out.fused.square().sum() + out.confidence.sin().sum() + out.stage[..., 0].sum()

    torch.manual_seed(1)
    direction = [torch.randn_like(v) for v in values]
    step = 1e-6
    analytic = sum((g * d).sum() for g, d in zip(torch.autograd.grad(run(*values), values), direction))
    up, down = (run(*(v + s * step * d for v, d in zip(values, direction))) for s in (1, -1))
    torch.testing.assert_close(analytic, (up - down) / (2 * step), atol=1e-6, rtol=1e-6)


def test_sharpness_starts_at_one_and_stays_positive():
    module = ReliabilityFusion(DIMS, 8)
    assert module.sharpness.item() == 1.0
    with torch.no_grad():
        module.sharpening.fill_(-5.0)
    assert module.sharpness.item() > 0


def test_stages_begin_apart_and_equally_believed():
    """Alike, one would take all the belief for good."""
    module = ReliabilityFusion(DIMS, 8, stages=4)
    features, _, _ = draw()
    reliability, stage, _ = module.assess(list(features.values()))
    torch.testing.assert_close(stage, torch.full_like(stage, 0.25))
    leaning = (reliability[:, :, 0] - reliability[:, :, 1]).mean((0, 1))  # audio over visual, by stage
    assert (leaning[0::2] > 1).all()
    assert (leaning[1::2] < -1).all()


def test_calibration_is_saved_but_never_trained():
    module = build()
    assert {"log_temperature", "bias"} <= set(module.state_dict())
    assert not {"log_temperature", "bias"} & {n for n, _ in module.named_parameters()}
    other = build(seed=1)
    other.load_state_dict(module.state_dict())
    features, present, mask = draw()
    for a, b in zip(module(features, present, mask)[:4], other(features, present, mask)[:4]):
        assert torch.equal(a, b)


def test_calibration_bias_raises_confidence():
    module = build()
    features, _, _ = draw()
    before = module(features).confidence
    module.bias[0] += 1.0
    after = module(features).confidence
    assert (after[..., 0] > before[..., 0]).all()
    torch.testing.assert_close(after[..., 1], before[..., 1])


def test_compiles_in_one_graph():
    module = build()
    features, present, mask = draw()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, expected = compiled(features, present, mask), module(features, present, mask)
    second, expected_second = (f(features, present, mask, o.state) for f, o in ((compiled, first), (module, expected)))
    for got, want in ((first, expected), (second, expected_second)):
        for a, b in zip(got[:4], want[:4]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_exports():
    module = build()
    features, present, mask = draw()
    program = torch.export.export(module, (features, present, mask))
    for a, b in zip(program.module()(features, present, mask)[:4], module(features, present, mask)[:4]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_autocast_keeps_gating_in_float32():
    module = build()
    features, present, mask = draw()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(features, present, mask)
    full = module(features, present, mask)
    assert out.fused.dtype == torch.bfloat16
    assert out.weights.dtype == out.confidence.dtype == out.stage.dtype == torch.float32
    torch.testing.assert_close(out.confidence, full.confidence, atol=0.05, rtol=0)


def test_typicality_inputs_replace_the_features():
    module = build()
    features, _, _ = draw()
    silent = [torch.zeros(BATCH, FRAMES, 5), torch.randn(BATCH, FRAMES, 4)]
    a, b = module(features), module(features, typicality_inputs=silent)
    assert (a.confidence - b.confidence).abs().max() > 1e-3
    torch.testing.assert_close(module(features, typicality_inputs=list(features.values())).fused, a.fused)


def test_repr_names_what_matters():
    text = repr(build())
    for part in ("audio", "dim=8", "stages=4", "evidence_dim=12", "detach_evidence=True", "window=16"):
        assert part in text
    assert "dim=8" in repr(UniformFusion([3, 4], 8))
    assert "kappa=0.5" in repr(ReliabilityNLL(0.5))
    assert "window=5" in repr(TemporalCCCLoss(window=5))
    assert "ignore_value=-5" in repr(CCCLoss(ignore_value=-5))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, f, p, k: m({"audio": f["audio"]}), ValueError, "features: expected the modalities"),
        (lambda m, f, p, k: m([f["audio"]]), ValueError, "expected 2 modalities, got 1"),
        (lambda m, f, p, k: m(f["audio"].tolist), TypeError, "sequence or a mapping"),
        (
            lambda m, f, p, k: m({**f, "audio": f["audio"].numpy()}),
            TypeError,
            r"features\[audio\]: expected a torch.Tensor, got ndarray",
        ),
        (
            lambda m, f, p, k: m({**f, "audio": f["audio"].long()}),
            TypeError,
            r"features\[audio\]: expected dtype .*, got torch.int64",
        ),
        (
            lambda m, f, p, k: m({**f, "audio": f["visual"]}),
            ValueError,
            r"features\[audio\]: expected shape \(B, T, 6\) or \(N, 6\), got",
        ),
        (
            lambda m, f, p, k: m({**f, "visual": f["visual"][:, :5]}),
            ValueError,
            r"features\[visual\]: expected leading shape \(3, 40\)",
        ),
        (
            lambda m, f, p, k: m({**f, "visual": f["visual"].double()}),
            TypeError,
            r"features\[visual\]: expected dtype torch.float32 .*, got torch.float64",
        ),
        (
            lambda m, f, p, k: m({**f, "visual": f["visual"].to("meta")}),
            ValueError,
            r"features\[visual\]: expected device cpu .*, got meta",
        ),
        (
            lambda m, f, p, k: m({n: v[:, :0] for n, v in f.items()}),
            ValueError,
            r"features\[audio\]: expected at least one frame, got \(3, 0, 6\)",
        ),
        (lambda m, f, p, k: m(f, p.float()), TypeError, "present: expected dtype bool, got torch.float32"),
        (lambda m, f, p, k: m(f, p.tolist()), TypeError, "present: expected a torch.Tensor, got list"),
        (
            lambda m, f, p, k: m(f, p[..., :1]),
            ValueError,
            r"present: expected shape \(B, T, M\) = \(3, 40, 2\), got \(3, 40, 1\)",
        ),
        (lambda m, f, p, k: m(f, None, k[:1]), ValueError, r"mask: expected shape \(B, T\) = \(3, 40\), got \(1, 40\)"),
        (
            lambda m, f, p, k: m(f, typicality_inputs=[f["audio"]]),
            ValueError,
            "typicality_inputs: expected 2 modalities, got 1",
        ),
        (
            lambda m, f, p, k: m(f, typicality_inputs=[v[:, 1:] for v in f.values()]),
            ValueError,
            r"typicality_inputs: expected leading shape \(3, 40\) .*, got \(3, 39\)",
        ),
        (
            lambda m, f, p, k: ReliabilityFusion([3], 8)({"a": f["audio"]}),
            TypeError,
            "features: expected a sequence .*, got a mapping",
        ),
        (lambda m, f, p, k: ReliabilityFusion([], 8), ValueError, "1 to 8 modalities, got 0"),
        (lambda m, f, p, k: ReliabilityFusion([2] * 9, 8), ValueError, "1 to 8 modalities, got 9"),
        (lambda m, f, p, k: ReliabilityFusion([2.5], 8), TypeError, "in_dims: expected an int, got float"),
        (lambda m, f, p, k: ReliabilityFusion([0], 8), ValueError, "in_dims: expected an int >= 1, got 0"),
        (lambda m, f, p, k: ReliabilityFusion(3, 8), TypeError, "sequence of int or a mapping"),
        (lambda m, f, p, k: ReliabilityFusion({1: 3}, 8), TypeError, "in_dims: expected names .* str, got"),
        (lambda m, f, p, k: ReliabilityFusion([3], 0), ValueError, "dim: expected an int >= 1, got 0"),
        (
            lambda m, f, p, k: ReliabilityFusion([3], 8, stages=17),
            ValueError,
            r"stages: expected an int in \[1, 16\], got 17",
        ),
        (
            lambda m, f, p, k: ReliabilityFusion([3], 8, evidence_dim=0),
            ValueError,
            "evidence_dim: expected an int >= 1",
        ),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(build(), *draw())


# --------------------------------------------------------------------------------------------------------- typicality
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
    valid = present & mask[..., None]
    x = [torch.where(valid[..., m, None], v, 0.0) for m, v in enumerate(features.values())]
    average, exists, _ = module.typicality.averages(x, valid, None)
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


def test_two_forwards_before_one_backward():
    """The statistics move between them; the first graph must not notice."""
    module = build(detach_evidence=False).train()
    features, present, mask = draw()
    x = {k: v.requires_grad_() for k, v in features.items()}
    first = module(x, present, mask).confidence.sum()
    second = module(x, present, mask).confidence.sum()
    (first + second).backward()
    assert all(v.grad.isfinite().all() for v in x.values())


def test_fit_needs_data():
    with pytest.raises(ValueError, match="batches: expected at least two frames"):
        build().fit_typicality([])


# ------------------------------------------------------------------------------------------------------------ uniform
def test_uniform_is_the_mean_of_the_present():
    torch.manual_seed(0)
    module = UniformFusion(DIMS, 8, norm=False)
    features, present, mask = draw()
    out = module(features, present, mask)
    valid = (present & mask[..., None]).float()
    values = torch.stack([linear(features[k]) for linear, k in zip(module.value, DIMS)], 2)
    expected = (values * valid[..., None]).sum(2) / valid.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out.fused, expected, atol=1e-6, rtol=1e-5)
    assert out.state is None
    torch.testing.assert_close(out.confidence, 0.5 * valid)


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
def numpy_ccc(p, t):
    p, t = np.asarray(p, np.float64).ravel(), np.asarray(t, np.float64).ravel()
    if len(p) < 2:
        return 0.0
    denominator = p.var() + t.var() + (p.mean() - t.mean()) ** 2
    return 2 * np.mean((p - p.mean()) * (t - t.mean())) / denominator if denominator > 0 else 0.0


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
