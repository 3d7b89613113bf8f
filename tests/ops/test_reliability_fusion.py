"""reliability_fusion: its formula, absence, extremes, layouts and dtypes."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import TOLERANCE, Case, Random, compare, converted, error, fusion_inputs, leaves, named, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_ext import functional, reference

CASE = Case("reliability_fusion", "any", fusion_inputs)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def call(inputs):
    return CASE.call(functional, inputs)


def assert_zero(x):
    assert (x == 0).all()


# --------------------------------------------------------------------------------------------------- every shape
@settings(max_examples=60)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple), modalities=st.integers(1, 8),
    dim=st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100]), stages=st.integers(1, 16),
    stage=st.booleans(), calibrated=st.booleans(), sharpness=st.sampled_from([None, "one", "each"]),
    present=st.booleans(), norm=st.booleans(), seed=st.integers(0, 99), double=st.booleans(),
)  # fmt: skip
def test_every_shape(backend, lead, modalities, dim, stages, seed, double, norm, **options):
    r = Random(seed, torch.float64 if double else torch.float32, backend.device)
    # A LayerNorm over two numbers has a gradient of rounding errors alone; one over one number is a constant (below).
    norm = norm and dim > 2
    inputs = fusion_inputs(r, lead, modalities, dim, stages, norm=norm, **options)
    compare(CASE, inputs)
    for name, actual, wanted in zip(
        ("fused", "weights", "confidence"), call(inputs), oracles.reliability_fusion(**inputs), strict=True
    ):
        e = error(actual.cpu(), torch.from_numpy(wanted))
        assert e <= (1e-13 if double else 1e-5), f"{name}: {e}"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3,)])
def test_zero_sizes(backend, lead, norm):
    """No rows, or (last) no channels: outputs of the right shape, parameter gradients zero where nothing depends on them."""
    dim = 0 if lead == (3,) else 5
    inputs = fusion_inputs(Random(1, device=backend.device), lead, 2, dim, 3, norm=norm)
    out, grads, _ = run(CASE, functional, inputs)
    assert [tuple(o.shape) for o in out] == [(*lead, dim), (*lead, 2), (*lead, 2)]
    assert all(torch.isfinite(g).all() for g in grads.values())
    if dim == 0:
        wanted = run(CASE, reference, converted(inputs, torch.float64))
        for i in (1, 2):
            assert error(out[i], wanted[0][i]) <= 1e-5
        assert error(grads["reliability"], wanted[1]["reliability"]) <= 1e-5
    else:
        assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("rows", [63, 64, 65, 257, 2500])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_rows(backend, rows, dtype):
    """Past every block and chunk size, for all value dtypes: parameter gradients are sums over all the rows."""
    rows = backend.size(rows, min(rows, 65))
    inputs = fusion_inputs(Random(2, dtype, backend.device), (rows,), 2, 33, 4)
    check_dtype(inputs)


# -------------------------------------------------------------------------------------------------------- formula
def test_one_stage_is_the_softmax_gate(backend):
    r = Random(3, torch.float64, backend.device)
    values, logit = [r.normal(4, 6) for _ in range(3)], r.normal(4, 3, 1)
    fused, weights, confidence = functional.reliability_fusion(values, logit)
    torch.testing.assert_close(weights, torch.softmax(logit[..., 0], -1))
    torch.testing.assert_close(confidence, torch.sigmoid(logit[..., 0]))
    torch.testing.assert_close(fused, sum(w[:, None] * v for w, v in zip(weights.unbind(-1), values)))


def test_weights_are_inverse_variances_of_what_confidence_claims(backend):
    """Error variance kappa^2 (1 - r) / r: at sharpness 1 the weights are proportional to r / (1 - r)."""
    inputs = fusion_inputs(Random(4, torch.float64, backend.device), sharpness=None, present=False)
    _, weights, confidence = call(inputs)
    precision = confidence / (1 - confidence)
    torch.testing.assert_close(weights, precision / precision.sum(-1, keepdim=True))
    _, sharp, _ = call({**inputs, "sharpness": torch.tensor(2.0, dtype=torch.float64, device=backend.device)})
    torch.testing.assert_close(sharp, precision**2 / (precision**2).sum(-1, keepdim=True))


def test_log_temperature_divides_and_bias_shifts(backend):
    inputs = fusion_inputs(Random(5, torch.float64, backend.device))
    logit = inputs["reliability"] / inputs["log_temperature"].exp() + inputs["bias"]
    by_hand = {**inputs, "reliability": logit, "log_temperature": None, "bias": None}
    for a, b in zip(call(inputs), call(by_hand), strict=True):
        torch.testing.assert_close(a, b)


def test_defaults(backend):
    """Every option left out equals the value that its docstring gives as its default."""
    r = Random(6, torch.float64, backend.device)
    bare = {"values": [r.normal(5, 4) for _ in range(2)], "reliability": r.normal(5, 2, 3), "stage": None}
    zeros = torch.zeros(2, 3, dtype=torch.float64, device=backend.device)
    spelled = {
        "stage": zeros.new_full((5, 3), 1 / 3), "log_temperature": zeros, "bias": zeros, "sharpness": zeros.new_ones(2),
        "present": torch.ones(5, 2, dtype=torch.bool, device=backend.device),
    }  # fmt: skip
    expected = call(bare)
    for name, value in spelled.items():
        for a, b in zip(call({**bare, name: value}), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15, msg=name)


def test_norm_is_pytorchs_layer_norm(backend):
    r = Random(7, torch.float64, backend.device)
    x, w, b = 3 * r.normal(6, 1, 19) + 5, r.normal(1, 19), r.normal(1, 19)
    for eps in (1e-5, 1e-3, 0.0, 1):
        fused, _, _ = functional.reliability_fusion([x], r.normal(6, 1, 1, 2), norm_weight=w, norm_bias=b, eps=eps)
        torch.testing.assert_close(fused, torch.nn.functional.layer_norm(x, (19,), w[0], b[0], eps))


@pytest.mark.parametrize("dim", [5, 64, 257])
def test_layer_norm_of_values_far_from_zero(backend, dim):
    """mean / spread of 1e4 in float32: a mean rounded to eps * 1e4 spreads, and no squares of 1e4 to cancel."""
    inputs = fusion_inputs(Random(8, device=backend.device), (7,), 2, dim, 2, present=False)
    inputs["values"] = [1e4 + v for v in inputs["values"]]
    compare(CASE, inputs, tolerance=16 * 2.0**-23 * 1e4)


@pytest.mark.parametrize("dim", [100, 1024])
@pytest.mark.parametrize("where", ["first", "last", "ramp"])
def test_layer_norm_of_uneven_values(backend, dim, where):
    """The first numbers of a row say nothing about its mean: variance must not hang on where a sum begins."""
    inputs = fusion_inputs(Random(9, device=backend.device), (7,), 2, dim, 2, present=False)
    for v in inputs["values"]:
        if where == "ramp":
            v += torch.linspace(-100, 100, dim, device=backend.device)
        else:
            v[:, slice(0, 16) if where == "first" else slice(-16, None)] += 1e3
    # one-pass variance about any one number of the row loses up to D eps
    compare(CASE, inputs, tolerance=dim * 2.0**-23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 8, 33])
def test_constant_values_normalise_to_the_bias(backend, dtype, dim):
    """1/std is eps**-0.5 there: it multiplies the rounding of the values' mean, as in PyTorch's LayerNorm."""
    inputs = fusion_inputs(Random(9, dtype, backend.device), (4,), 1, dim, 2, present=False)
    inputs["values"] = [torch.full_like(inputs["values"][0], 0.1)]
    fused, _, _ = call(inputs)
    limit = 4 * torch.finfo(dtype).eps * 0.1 * 1e-5**-0.5 * inputs["norm_weight"].abs().max()
    assert (fused - inputs["norm_bias"]).abs().max() <= limit
    _, grads, cotangents = run(CASE, functional, inputs)
    wanted = run(CASE, reference, converted(inputs, torch.float64), grads=cotangents)[1]
    scale = max(wanted["values.0"].abs().max().item(), 1e-5**-0.5)
    assert (grads["values.0"].double() - wanted["values.0"]).abs().max() <= 1e3 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("offset", [1.00013, 1e4, 12345.678, 1e6])
@pytest.mark.parametrize("dim", [1, 7, 64, 100, 256, 300])
def test_constant_rows_far_from_zero(backend, dim, offset):
    """x - mean is exactly 0 there, and 1/std is 316: in (x rstd - mean rstd) two numbers of 3e6 would be rounded."""
    inputs = fusion_inputs(Random(9, device=backend.device), (5,), 1, dim, 2, present=False)
    inputs["values"] = [torch.full_like(inputs["values"][0], offset)]
    out, grads, cotangents = run(CASE, functional, inputs)
    assert torch.equal(out[0], inputs["norm_bias"].expand_as(out[0]))
    wanted = run(CASE, reference, converted(inputs, torch.float64), grads=cotangents)[1]
    assert (grads["norm_weight"] == 0).all()
    scale = max(wanted["values.0"].abs().max().item(), 1e-5**-0.5)
    assert (grads["values.0"].double() - wanted["values.0"]).abs().max() <= 1e-5 * scale


def test_the_same_tensor_for_two_modalities(backend):
    inputs = fusion_inputs(Random(10, torch.float64, backend.device))
    x = inputs["values"][0].clone().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    ours = CASE.call(functional, {**inputs, "values": [x, x, x]})[0]
    theirs = CASE.call(reference, {**inputs, "values": [twin, twin, twin]})[0]
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    assert error(x.grad, twin.grad) <= 1e-12


def test_values_may_be_any_sequence(backend):
    inputs = fusion_inputs(Random(11, device=backend.device))
    for a, b in zip(call(inputs), call({**inputs, "values": tuple(inputs["values"])}), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------- absence
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_absent_modality_is_not_read(backend, dtype, norm, poison):
    """NaN or Inf in its values and logits changes no bit anywhere; its own outputs and gradients are exactly 0."""
    inputs = fusion_inputs(Random(12, dtype, backend.device), (4, 9), 3, 11, 3, norm=norm)
    absent = ~inputs["present"]
    absent[0, 0] = True
    inputs["present"] = ~absent
    assert 0 < absent.sum() < absent.numel()
    poisoned = {
        **inputs,
        "values": [v.masked_fill(absent[..., m, None], poison) for m, v in enumerate(inputs["values"])],
        "reliability": inputs["reliability"].masked_fill(absent[..., None], poison),
    }
    out, grads, cotangents = run(CASE, functional, poisoned)
    clean, clean_grads, _ = run(CASE, functional, inputs, grads=cotangents)
    for (name, a), b in zip(named(out, grads).items(), named(clean, clean_grads).values(), strict=True):
        assert torch.equal(a, b), name
    _, weights, confidence = out
    assert_zero(weights[absent])
    assert_zero(confidence[absent])
    assert_zero(grads["reliability"][absent])
    for m in range(3):
        assert_zero(grads[f"values.{m}"][absent[..., m]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_a_frame_with_no_modality(backend, dtype, norm):
    inputs = fusion_inputs(Random(13, dtype, backend.device), (40,), 2, 9, 4, norm=norm)
    inputs["present"][::3] = False
    nobody = ~inputs["present"].any(-1)
    for v in inputs["values"]:
        v[nobody] = math.nan
    inputs["reliability"][nobody] = math.nan
    out, grads, _ = run(CASE, functional, inputs)
    for x in [*out, *(grads[n] for n in ("values.0", "values.1", "reliability", "stage"))]:
        assert_zero(x[nobody])
    assert all(torch.isfinite(x).all() for x in [*out, *grads.values()])
    check_dtype(inputs)


@pytest.mark.parametrize("stage", [0.0, math.nan, math.inf])
def test_a_frame_with_no_modality_does_not_need_a_stage(backend, stage):
    """Padding: a frame with nothing in it, its stage row zeros or garbage, gives zeros and zero gradients."""
    inputs = fusion_inputs(Random(14, device=backend.device), (20,), 2, 9, 4)
    nobody = torch.arange(20, device=backend.device) % 3 == 0
    inputs["present"] |= ~nobody[:, None]
    inputs["present"][nobody] = False
    inputs["stage"][nobody] = stage
    for functions in (functional, reference):
        out, grads, _ = run(CASE, functions, inputs)
        for x in [*out, *(grads[n] for n in ("values.0", "values.1", "reliability", "stage"))]:
            assert_zero(x[nobody])
        assert all(torch.isfinite(x).all() for x in [*out, *grads.values()])


def test_nothing_present_anywhere(backend):
    inputs = fusion_inputs(Random(15, device=backend.device), (5,), 3, 4, 2)
    inputs["present"] = torch.zeros_like(inputs["present"])
    out, grads, _ = run(CASE, functional, inputs)
    for x in [*out, *grads.values()]:
        assert_zero(x)


def test_a_lone_modality_has_weight_one(backend):
    inputs = fusion_inputs(Random(16, device=backend.device), (6,), 3, 4, 2, norm=False)
    inputs["present"] = torch.zeros_like(inputs["present"])
    inputs["present"][:, 1] = True
    fused, weights, _ = call(inputs)
    assert (weights[:, 1] == 1).all()
    assert torch.equal(fused, inputs["values"][1])


# ------------------------------------------------------------------------------------------------------- extremes
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stages", [1, 3, 16])
def test_logits_of_1e4(backend, dtype, stages):
    """Exact weights (softmax of the log-odds in log space) and finite gradients, with stages that disagree wildly."""
    r = Random(17, dtype, backend.device)
    inputs = fusion_inputs(r, (50,), 3, 9, stages, sharpness=None)
    scale = torch.tensor([1e4, 100.0, 1.0], device=backend.device)[torch.arange(50, device=backend.device) % 3]
    inputs["reliability"] *= scale.to(inputs["reliability"].dtype)[:, None, None]
    check_dtype(inputs, gradient_tolerance=1e-3)  # log-odds of 1e4 carry ulp(1e4) = 1e-3 into sharpness' gradient


def test_logits_of_1e4_give_exact_weights(backend):
    """The weights are those of the log-odds' differences, which float32 holds exactly here."""
    logit = torch.tensor(
        [[1e4, -1e4], [1e4, 1e4], [-1e4, -1e4], [1e4, 9999.0], [-9998.0, -1e4], [-1e4, 0.0]], device=backend.device
    )
    expected = torch.softmax(logit.double(), -1)
    for dtype in (torch.float32, torch.float64):
        x = logit.to(dtype)[..., None].requires_grad_()
        for stages in (1, 4):  # a certain stage, or four that agree
            values = [torch.ones(6, 1, dtype=dtype, device=backend.device)] * 2
            _, weights, confidence = functional.reliability_fusion(values, x.expand(6, 2, stages))
            tolerance = 1e-6 if dtype == torch.float32 else 1e-12
            # four equal stages: log-odds of 1e4 in log space round at ulp(1e4) = 1e-3 (float32), 2e-12 (float64)
            if stages > 1:
                tolerance = 5e-4 if dtype == torch.float32 else 2e-12
            assert (weights.double() - expected).abs().max() <= tolerance
            assert torch.equal(weights[:3].round(decimals=3), weights[:3].new_tensor([[1, 0], [0.5, 0.5], [0.5, 0.5]]))
            assert torch.equal(weights[0], weights.new_tensor([1, 0]))
            assert (confidence[0] == confidence.new_tensor([1, 0])).all()
            (grad,) = torch.autograd.grad(weights[:, 0].sum() + confidence.sum(), x)
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0, 1e4])
def test_one_hot_stages(backend, dtype, scale):
    """stage exactly 0 and 1: the certain stage decides, whatever the others would say; all gradients are finite."""
    inputs = fusion_inputs(Random(18, dtype, backend.device), (60,), 2, 5, 4, sharpness=None)
    certain = torch.arange(60, device=backend.device) % 4
    inputs["stage"] = torch.nn.functional.one_hot(certain, 4).to(dtype)
    inputs["reliability"] *= scale / 2
    out, grads, cotangents = run(CASE, functional, inputs)
    assert all(torch.isfinite(x).all() for x in [*out, *grads.values()])
    if scale == 1:
        compare(CASE, inputs)
    wanted, wanted_grads, _ = run(CASE, reference, converted(inputs, torch.float64), grads=cotangents)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for i, (a, b) in enumerate(zip(out, wanted, strict=True)):
        assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max()) * max(1, scale / 100), i
    for name in ("reliability", "values.0", "values.1", "norm_weight"):
        assert error(grads[name], wanted_grads[name]) <= 100 * tolerance, name
    # The derivative in an impossible stage is a product of up to exp(60) and of a weight down to exp(-60): float32 keeps
    # nothing of it. That of the certain stage is plain.
    mine = certain[:, None]
    a, b = grads["stage"].gather(1, mine), wanted_grads["stage"].gather(1, mine)
    assert error(a, b) <= 100 * tolerance
    # where a stage is impossible its logits get no gradient
    other = torch.arange(4, device=backend.device) != mine
    assert_zero(grads["reliability"].transpose(1, 2)[other])


def test_a_one_hot_stage_picks_its_column(backend):
    inputs = fusion_inputs(Random(19, torch.float64, backend.device), (8,), 3, 5, 4)
    for s in range(4):
        one_hot = torch.zeros(8, 4, dtype=torch.float64, device=backend.device)
        one_hot[:, s] = 1
        alone = {
            **inputs, "reliability": inputs["reliability"][..., s : s + 1], "stage": None,
            "log_temperature": inputs["log_temperature"][:, s : s + 1], "bias": inputs["bias"][:, s : s + 1],
        }  # fmt: skip
        for a, b in zip(call({**inputs, "stage": one_hot}), call(alone), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("tiny", [1e-8, 1e-20, 1e-30, 1e-37, 1e-42])
@pytest.mark.parametrize("far", [90.0, 2000.0, 1e4])
@pytest.mark.parametrize("near", [-0.5, 0.5])
def test_almost_impossible_stages(backend, tiny, far, near):
    """A stage probability down to the subnormals (a filter's posterior has them) that outvotes the likely stage."""
    inputs = fusion_inputs(
        Random(20, device=backend.device), (12,), 2, 5, 3, calibrated=False, sharpness=None, present=False
    )
    inputs["stage"] = torch.tensor([1.0, tiny, 0.0], device=backend.device).expand(12, 3).clone()
    logit = torch.tensor([[-far, near * far, far], [1.0, -far, -far]], device=backend.device)
    inputs["reliability"] = logit.expand(12, 2, 3).clone()
    out, grads, cotangents = run(CASE, functional, inputs)
    wanted, wanted_grads, _ = run(CASE, reference, converted(inputs, torch.float64), grads=cotangents)
    for a, b in zip(out, wanted, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()
    for name, g in grads.items():
        assert torch.isfinite(g).all(), name
        if name != "stage":  # its derivative there is up to exp(60) / tiny
            b = wanted_grads[name]
            assert (g.double() - b).abs().max() <= 1e-4 * b.abs().max() + 1e-35, name


# --------------------------------------------------------------------------------------------------------- dtypes
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-133}  # half of the smallest subnormal


def check_dtype(inputs, gradient_tolerance=None):
    """float32/float64: `compare`. Half: a float32 result rounded once, so half an ulp besides float32's own error."""
    dtype = inputs["values"][0].dtype
    if dtype not in ROUNDING:
        return compare(
            CASE, inputs, tolerance=gradient_tolerance and (gradient_tolerance if dtype == torch.float32 else 1e-9)
        )
    out, grads, cotangents = run(CASE, functional, inputs)
    expected, expected_grads, _ = run(CASE, reference, converted(inputs, torch.float64), grads=cotangents)
    for (name, a), b in zip(named(out, grads).items(), named(expected, expected_grads).values(), strict=True):
        half = name == "output 0" or name.startswith("grad values")
        assert a.dtype == (dtype if half else torch.float32), name
        if b.numel() == 0:
            continue
        limit = (gradient_tolerance or 4 * TOLERANCE[torch.float32]) * b.abs().max()
        if half:
            limit = limit + ROUNDING[dtype] * b.abs() + SMALLEST[dtype]
        assert ((a.double() - b).abs() <= limit).all(), f"{name}: {((a.double() - b).abs() - limit).max()}"
    return None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 16, 31, 40])
@pytest.mark.parametrize("norm", [False, True])
def test_half_values(backend, dtype, dim, norm):
    norm = norm and dim > 2
    for seed in range(3):
        inputs = fusion_inputs(Random(seed, dtype, backend.device), (3, 7), 3, dim, 4, norm=norm)
        check_dtype(inputs)


def test_half_values_do_not_overflow_on_the_way(backend):
    """float16 close to its largest number: a mean of equals is itself, and a LayerNorm's variance is float32's."""
    x = torch.full((4, 16), 6e4, dtype=torch.float16, device=backend.device)
    x[:, ::2] = -6e4
    gate = Random(21, device=backend.device)
    fused, _, _ = functional.reliability_fusion([x] * 8, gate.normal(4, 8, 2))
    torch.testing.assert_close(fused, x, rtol=2e-3, atol=0)
    ones, zeros = torch.ones(8, 16, device=backend.device), torch.zeros(8, 16, device=backend.device)
    fused, _, _ = functional.reliability_fusion([x] * 8, gate.normal(4, 8, 2), norm_weight=ones, norm_bias=zeros)
    torch.testing.assert_close(fused, x.sign(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_dtypes(backend, dtype):
    inputs = fusion_inputs(Random(22, dtype, backend.device))
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    assert [o.dtype for o in call(inputs)] == [dtype, gate, gate]
    assert [o.dtype for o in call(converted_gate(inputs, torch.bfloat16))] == [dtype, gate, gate]


def converted_gate(inputs, dtype):
    return {**converted(inputs, dtype), "values": inputs["values"]}


@pytest.mark.parametrize("gate", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gating_tensors_are_converted_to_the_arithmetic_dtype(backend, gate):
    """float32 values: gating tensors of any dtype count as their float32 selves, gradients come back in their own."""
    inputs = converted_gate(fusion_inputs(Random(23, device=backend.device)), gate)
    out, grads, cotangents = run(CASE, functional, inputs)
    same = converted_gate(inputs, torch.float32)
    wanted, wanted_grads, _ = run(CASE, functional, same, grads=cotangents)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
    for name, g in grads.items():
        own = leaves(inputs)[name].dtype
        assert g.dtype == own, name
        assert torch.equal(g, wanted_grads[name].to(own)), name


# -------------------------------------------------------------------------------------------------------- layouts
def layouts(x):
    """Views equal to x (*, D) with other strides: rows apart, channels apart, transposed leads, an odd address."""
    lead, dim = x.shape[:-1], x.shape[-1]
    apart = x.new_full((*lead, dim + 5), math.nan)
    apart[..., 2 : 2 + dim] = x
    channels = x.new_full((*lead, 2 * dim), math.nan)
    channels[..., ::2] = x
    moved = x.new_full((dim, *lead), math.nan)
    moved.copy_(x.movedim(-1, 0))
    odd = x.new_full((x.numel() + 1,), math.nan)
    odd[1:] = x.reshape(-1)
    yield "rows apart", apart[..., 2 : 2 + dim]
    yield "channels apart", channels[..., ::2]
    yield "channels first", moved.movedim(0, -1)
    yield "odd address", odd[1:].view(x.shape)
    yield "leads transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "every other row", torch.stack([x, x * math.nan], len(lead))[(slice(None),) * len(lead) + (0,)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 32])
def test_strided_values(backend, dtype, dim):
    inputs = fusion_inputs(Random(24, dtype, backend.device), (3, 5), 2, dim, 3)
    wanted, wanted_grads, cotangents = run(CASE, functional, inputs)
    for kind, view in layouts(inputs["values"][1]):
        assert torch.equal(view, inputs["values"][1]), kind
        out, grads, _ = run(CASE, functional, {**inputs, "values": [inputs["values"][0], view]}, grads=cotangents)
        for (name, a), b in zip(named(out, grads).items(), named(wanted, wanted_grads).values(), strict=True):
            assert torch.equal(a, b), (kind, name)


def test_expanded_values(backend):
    """Stride 0 over rows, over one lead axis, over everything."""
    r = Random(25, torch.float64, backend.device)
    inputs = fusion_inputs(r, (4, 3), 2, 5, 3)
    for one in (r.normal(1, 1, 5), r.normal(4, 1, 5), r.normal(1, 3, 5), r.normal(1, 1, 1), r.normal(4, 3, 1)):
        compare(CASE, {**inputs, "values": [inputs["values"][0], one.expand(4, 3, 5)]})


def test_modalities_packed_in_one_tensor(backend):
    """The halves of one (*, M D) projection: never copied, and each gradient lands in its own half."""
    r = Random(26, torch.float64, backend.device)
    inputs = fusion_inputs(r, (4, 3), 2, 5, 3)
    packed = torch.cat(inputs["values"], -1).requires_grad_()
    fused = call({**inputs, "values": packed.chunk(2, -1)})[0]
    (grad,) = torch.autograd.grad(fused.square().sum(), packed)
    separate = [v.detach().clone().requires_grad_() for v in inputs["values"]]
    wanted = torch.autograd.grad(call({**inputs, "values": separate})[0].square().sum(), separate)
    assert torch.equal(grad, torch.cat(wanted, -1))


def test_strided_gating_tensors(backend):
    inputs = fusion_inputs(Random(27, device=backend.device), (4, 3), 2, 5, 3)
    wanted, wanted_grads, cotangents = run(CASE, functional, inputs)
    for name, x in inputs.items():
        if not isinstance(x, torch.Tensor):
            continue
        view = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
        out, grads, _ = run(CASE, functional, {**inputs, name: view}, grads=cotangents)
        for a, b in zip([*out, *grads.values()], [*wanted, *wanted_grads.values()], strict=True):
            assert torch.equal(a, b), name
    narrow = {
        "stage": inputs["stage"][:1, :1].expand(4, 3, 3), "reliability": inputs["reliability"][:, :1].expand(4, 3, 2, 3),
        "present": inputs["present"][:1].expand(4, 3, 2), "bias": inputs["bias"][:1].expand(2, 3),
        "norm_weight": inputs["norm_weight"][:, :1].expand(2, 5), "sharpness": inputs["sharpness"][:1].expand(2),
    }  # fmt: skip
    for name, view in narrow.items():
        compare(CASE, {**inputs, name: view})


def test_strided_cotangents(backend):
    """Gradients that arrive expanded (from a sum) or transposed."""
    inputs = fusion_inputs(Random(28, torch.float64, backend.device), (4, 3), 2, 5, 3)
    outputs = call(inputs)
    dense = [torch.full_like(o, 0.5) for o in outputs]
    expanded = [torch.full_like(o[:1, :1, :1], 0.5).expand_as(o) for o in outputs]
    moved = [torch.full_like(o, 0.5).permute(2, 0, 1).contiguous().permute(1, 2, 0) for o in outputs]
    wanted = run(CASE, functional, inputs, grads=dense)[1]
    for grads in (expanded, moved):
        got = run(CASE, functional, inputs, grads=grads)[1]
        assert all(torch.equal(got[n], wanted[n]) for n in wanted)


# --------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("door", ["direct", "registered"])
def test_backward_saves_two_numbers_a_row_and_modality(backend, door):
    """Beside its inputs the op keeps nothing larger than (*, M): a LayerNorm's mean and 1/std for each."""
    lead, modalities, dim = (7, 9), 3, 50
    inputs = fusion_inputs(Random(29, device=backend.device), lead, modalities, dim, 4)
    for x in leaves(inputs).values():
        x.requires_grad_()
    owned = {x.untyped_storage().data_ptr() for x in [*leaves(inputs).values(), inputs["present"]]}
    saved = []

    def pack(x):
        if x.untyped_storage().data_ptr() not in owned:
            saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        if door == "direct":
            call(inputs)
        else:
            positional = [inputs[n] for n in inputs if n != "eps"]
            torch.ops.sage_ext.reliability_fusion(*positional, inputs["eps"])
    assert sum(x.numel() for x in saved) <= 2 * 7 * 9 * modalities
