"""ReliabilityFusion and UniformFusion: chunks, gradients, isolation of missing data, degenerate cases."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_examples import BATCH, DIMS, FRAMES, STAGES, build, draw

from sage_ext.nn import FusionState, ReliabilityFusion, UniformFusion


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
    for a, b in zip(state[:4], whole.state[:4]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_state_is_a_named_tuple_of_tensors_with_the_documented_shapes():
    features, present, mask = draw()
    state = build()(features, present, mask).state
    assert isinstance(state, FusionState)
    window = 16
    assert state.quality is None
    assert [tuple(s.shape) for s in state[:4]] == [
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
            [*out[:4], *out.state[:4], *(v.grad for v in x.values())]
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
    torch.testing.assert_close(stage, torch.full_like(stage, 0.25), atol=0.15, rtol=0)
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
            r"features\[visual\]: expected dtype float32 .*, got float64",
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


def test_two_forwards_before_one_backward():
    """The statistics move between them; the first graph must not notice."""
    module = build(detach_evidence=False).train()
    features, present, mask = draw()
    x = {k: v.requires_grad_() for k, v in features.items()}
    first = module(x, present, mask).confidence.sum()
    second = module(x, present, mask).confidence.sum()
    (first + second).backward()
    assert all(v.grad.isfinite().all() for v in x.values())


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
