"""ccc, ccc_moments, merge_moments, ccc_from_moments."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import scipy.stats
import torch
from cases import Case, Random, compare, converted, error, fresh, moments_inputs, named, pair_inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_ext import functional, reference

POOLS = ["batch", "sequence"]
MASKS = [None, "frame", "element"]


def case(op="ccc", **kwargs):
    return Case(op, "any", lambda r: {}, kwargs=kwargs)


def oracle_error(actual, expected):
    return error(actual.double().cpu(), torch.from_numpy(np.asarray(expected, dtype=np.float64)))


# ----------------------------------------------------------------------------------------------------- every shape
@settings(max_examples=50)
@given(
    lead=st.lists(st.integers(0, 9), min_size=1, max_size=2).map(tuple), channels=st.integers(0, 5),
    mask=st.sampled_from(MASKS), pool=st.sampled_from(POOLS), seed=st.integers(0, 99), double=st.booleans(),
)  # fmt: skip
def test_every_shape(backend, lead, channels, mask, pool, seed, double):
    r = Random(seed, torch.float64 if double else torch.float32, backend.device)
    inputs = pair_inputs(r, *lead, channels, mask=mask)
    # float32: one rounding of a float64 result
    limit = 1e-11 if double else 2 * 2.0**-24
    for op, oracle in (("ccc", oracles.ccc), ("ccc_moments", oracles.ccc_moments)):
        compare(case(op, pool=pool), inputs)
        assert oracle_error(getattr(functional, op)(**inputs, pool=pool), oracle(**inputs, pool=pool)) <= limit, op


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 63, 65, 2047, 2048, 2049, 6145])
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 17])
def test_long_sequences(backend, frames, channels):
    """Past every block and chunk size, with each kind of mask."""
    frames = backend.size(frames, min(frames, 65))
    for i, mask in enumerate(MASKS):
        inputs = pair_inputs(Random(i, torch.float64, backend.device), 2, frames, channels, mask=mask)
        for pool in POOLS:
            assert oracle_error(functional.ccc(**inputs, pool=pool), oracles.ccc(**inputs, pool=pool)) <= 1e-11
        compare(case(pool="sequence"), converted(inputs, torch.float32))


def test_batch_pool_is_the_concatenation_of_valid_frames(backend):
    """The Aff-Wild2 protocol, and not the mean over sequences."""
    inputs = pair_inputs(Random(1, torch.float64, backend.device), 4, 30, 2, mask="frame")
    inputs["pred"] += 2 * torch.arange(4, device=backend.device)[:, None, None]
    keep = inputs["mask"].reshape(-1)
    p, t = (inputs[n].reshape(-1, 2)[keep] for n in ("pred", "target"))
    pooled = functional.ccc(**inputs)
    torch.testing.assert_close(pooled, functional.ccc(p, t))
    assert (pooled - functional.ccc(**inputs, pool="sequence").mean(0)).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------- formula
def test_against_numpy_and_scipy(backend):
    inputs = pair_inputs(Random(2, torch.float64, backend.device), 500, 2)
    p, t = inputs["pred"].cpu().numpy(), inputs["target"].cpu().numpy()
    for c in range(2):
        x, y = p[:, c], t[:, c]
        pearson = scipy.stats.pearsonr(x, y).statistic
        lin = 2 * pearson * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        assert abs(functional.ccc(inputs["pred"], inputs["target"])[c].item() - lin) < 1e-13


def test_known_values(backend):
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64, device=backend.device)
    assert functional.ccc(x, x).item() == 1
    assert functional.ccc(x, 5 - x).item() == -1  # same mean and spread, reversed
    # shifted by a constant d: 2 var / (2 var + d^2), var = 1.25
    assert functional.ccc(x, x + 1).item() == pytest.approx(2.5 / 3.5, abs=1e-15)
    # scaled by two about zero: cov 2.5, variances 1.25 and 5, means 2.5 and 5
    assert functional.ccc(x, 2 * x).item() == pytest.approx(5 / 12.5, abs=1e-15)


def test_population_moments_do_not_depend_on_the_count(backend):
    """A data set repeated has the same CCC; with 1/(n - 1) anywhere it would not."""
    inputs = pair_inputs(Random(3, torch.float64, backend.device), 7, 2)
    twice = functional.ccc(torch.cat([inputs["pred"]] * 2), torch.cat([inputs["target"]] * 2))
    torch.testing.assert_close(twice, functional.ccc(inputs["pred"], inputs["target"]), rtol=1e-14, atol=0)


def test_symmetric_in_its_arguments(backend):
    inputs = pair_inputs(Random(4, torch.float64, backend.device), 3, 8, 2, mask="element")
    a, grads, _ = run(case(), functional, inputs)
    swapped = {"pred": inputs["target"], "target": inputs["pred"], "mask": inputs["mask"]}
    b, other, _ = run(case(), functional, swapped)
    torch.testing.assert_close(a, b, rtol=1e-15, atol=0)
    torch.testing.assert_close(grads["pred"], other["target"], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grads["target"], other["pred"], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mask", MASKS)
def test_mean_of_1e4_spreads_loses_nothing(backend, pool, mask):
    """float32 inputs, relative error against float64 on the same inputs below 1e-5, gradients too."""
    shape = (4, backend.size(3000, 50), 2)
    inputs = pair_inputs(Random(5, device=backend.device), *shape, mask=mask)
    inputs["pred"], inputs["target"] = 1e4 + inputs["pred"], 1e4 + inputs["target"]
    out, grads, cotangents = run(case(pool=pool), functional, inputs)
    # the oracle centres in float64 before it multiplies
    expected = oracles.ccc(**inputs, pool=pool)
    assert np.abs(out[0].double().cpu().numpy() / expected - 1).max() < 1e-5
    double = converted(inputs, torch.float64)
    double["pred"], double["target"] = double["pred"] - 1e4, double["target"] - 1e4  # exact: the same moments
    _, wanted, _ = run(case(pool=pool), reference, double, grads=cotangents)
    for name in wanted:
        assert error(grads[name], wanted[name]) < 1e-5, name


@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e10, 1e18])
def test_scale_does_not_matter(backend, scale):
    """Spreads whose squares leave float32's range: CCC is scale-free, and its gradient is the inverse scale's."""
    inputs = pair_inputs(Random(6, device=backend.device), 3, 40, 2)
    scaled = {n: None if x is None else x * scale for n, x in inputs.items()}
    compare(case(), scaled)
    torch.testing.assert_close(functional.ccc(**scaled), functional.ccc(**inputs), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------ degenerate
def degenerate():
    """name -> (pred, target, mask) of a group (5, 1) whose CCC is undefined or has nothing to agree about."""
    x = torch.tensor([[0.1], [0.7], [-0.3], [0.2], [0.5]])
    c = torch.full((5, 1), 0.1)
    none, one = torch.zeros(5, dtype=torch.bool), torch.tensor([False, False, True, False, False])
    yield "no valid frame", x, 2 * x, none
    yield "one valid frame", x, 2 * x, one
    yield "constant = constant", c, c, None
    yield "constant = constant, masked", c, c, torch.tensor([True, True, False, True, False])
    yield "zero = zero", 0 * c, 0 * c, None
    yield "constant against constant", c, c + 0.6, None
    yield "constant pred", c, x, None
    yield "constant target", x, c, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("pred", "target", "mask"), [d[1:] for d in degenerate()], ids=[d[0] for d in degenerate()])
def test_degenerate_groups_are_exactly_zero(backend, dtype, pred, target, mask):
    """0 to the bit, beside a healthy group; where CCC is undefined the gradient is 0 too."""
    healthy = pair_inputs(Random(7, dtype, backend.device), 1, 5, 1)
    p = torch.cat([pred.to(backend.device, dtype)[None], healthy["pred"]])
    t = torch.cat([target.to(backend.device, dtype)[None], healthy["target"]])
    m = torch.ones(2, 5, dtype=torch.bool, device=backend.device)
    if mask is not None:
        m[0] = mask
    inputs = {"pred": p, "target": t, "mask": m}
    out, grads, cotangents = run(case(pool="sequence"), functional, inputs)
    assert out[0][0].item() == 0
    assert abs(out[0][1].item()) > 0.1
    undefined = m[0].sum() < 2 or torch.equal(p[0][m[0]], t[0][m[0]])
    for g in grads.values():
        assert torch.isfinite(g).all()
        if undefined:
            assert (g[0] == 0).all()
    compare(case(pool="sequence"), inputs)
    alone = functional.ccc(p[0], t[0], m[0])
    assert alone.item() == 0
    # the same through moments
    moments = functional.ccc_moments(p, t, m, pool="sequence")
    assert functional.ccc_from_moments(moments)[0].item() == 0


@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1e-30, 12345.678])
@pytest.mark.parametrize("frames", [2, 3, 7, 100, 5000])
def test_constants_have_no_spread(backend, value, frames):
    """No rounding of a running mean may turn a constant into something that varies, whatever the summation order."""
    frames = backend.size(frames, min(frames, 40))
    for dtype in (torch.float32, torch.float64):
        c = torch.full((2, frames, 3), value, dtype=dtype, device=backend.device)
        r = Random(frames, dtype, backend.device)
        mask = r.mask(2, frames)
        for m in (None, mask):
            x = c.clone().requires_grad_()
            out = functional.ccc(x, c, m)
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert (out == 0).all()
            assert (grad == 0).all()
            moments = functional.ccc_moments(c, r.normal(2, frames, 3), m)
            assert (moments[:, 3] == 0).all()
            assert (moments[:, 5] == 0).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_constants_have_no_spread_in_the_reference(value):
    """At every length: the sum of n equal numbers is n times one of them only at some."""
    for frames in range(1, 200):
        for dtype in (torch.float32, torch.float64):
            c = torch.full((2, frames, 2), value, dtype=dtype)
            assert (reference.ccc(c, c) == 0).all()
            assert (reference.ccc(c, c, pool="sequence") == 0).all()
    assert (reference.temporal_ccc(c, c, window=7)[0] == 0).all()
    empty = torch.zeros(2, 5, 2, dtype=torch.bool)
    assert (reference.ccc(c[:, :5], c[:, :5], empty) == 0).all()
    assert (reference.ccc(c[:, :0], c[:, :0]) == 0).all()


def test_undefined_ccc_from_moments(backend):
    good = moments_inputs(Random(8, device=backend.device), 3)
    good[0] = 0
    good[1] = torch.tensor([1.0, 0.3, 0.4, 0, 0, 0], dtype=torch.float64)
    good.requires_grad_()
    out = functional.ccc_from_moments(good)
    assert out[:2].tolist() == [0, 0]
    (grad,) = torch.autograd.grad(out.sum(), good)
    assert torch.isfinite(grad).all()
    assert (grad[:2] == 0).all()


# ---------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", ["frame", "element"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("op", ["ccc", "ccc_moments"])
def test_a_masked_value_is_not_read(backend, op, pool, mask, poison):
    for dtype in (torch.float32, torch.float64):
        inputs = pair_inputs(Random(9, dtype, backend.device), 3, 37, 3, mask=mask)
        gone = ~inputs["mask"] if mask == "element" else ~inputs["mask"][..., None]
        poisoned = {**inputs, **{n: inputs[n].masked_fill(gone, poison) for n in ("pred", "target")}}
        out, grads, cotangents = run(case(op, pool=pool), functional, poisoned)
        clean, clean_grads, _ = run(case(op, pool=pool), functional, inputs, grads=cotangents)
        for (name, a), b in zip(named(out, grads).items(), named(clean, clean_grads).values(), strict=True):
            assert torch.equal(a, b), name
        for g in grads.values():
            assert (g.masked_select(gone) == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_where_it_counts_shows(backend, poison):
    """A model that has diverged must not look like one that is uncorrelated: CCC 0, gradient 0."""
    inputs = pair_inputs(Random(10, device=backend.device), 2, 20, 2)
    inputs["pred"][0, 3, 1] = poison
    for functions in (functional, reference):
        out, grads, _ = run(case(pool="sequence"), functions, inputs)
        assert out[0].isnan().tolist() == [[False, True], [False, False]]
        assert grads["pred"].isnan().any(1).tolist() == [[False, True], [False, False]]


# --------------------------------------------------------------------------------------------------------- moments
def test_moments_are_what_their_names_say(backend):
    inputs = pair_inputs(Random(11, torch.float64, backend.device), 3, 20, 2, mask="element")
    moments = functional.ccc_moments(**inputs, pool="sequence")
    assert moments.dtype == torch.float64
    assert functional.ccc_moments(**converted(inputs, torch.float32)).dtype == torch.float64
    assert torch.equal(moments[..., 0], inputs["mask"].sum(1).double())
    torch.testing.assert_close(
        functional.ccc_from_moments(moments), functional.ccc(**inputs, pool="sequence"), rtol=1e-14, atol=0
    )
    merged = moments[0]
    for m in moments[1:]:
        merged = functional.merge_moments(merged, m)
    torch.testing.assert_close(merged, functional.ccc_moments(**inputs), rtol=1e-13, atol=1e-14)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), empty=st.sampled_from([None, 0, 1, 2]))
def test_merge_is_associative_and_commutative(backend, seed, empty):
    x = moments_inputs(Random(seed, device=backend.device), 3, 4)
    x[..., 1:3] *= 100
    if empty is not None:
        x[empty] = 0
    merge = functional.merge_moments
    a, b, c = x
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merge(a, b), merge(b, a), rtol=1e-13, atol=1e-13)


def test_merging_with_nothing_changes_no_bit(backend):
    a = moments_inputs(Random(12, device=backend.device), 4)
    nothing = torch.zeros_like(a)
    assert torch.equal(functional.merge_moments(a, nothing), a)
    assert torch.equal(functional.merge_moments(nothing, a), a)
    assert torch.equal(functional.merge_moments(nothing, nothing), nothing)


@settings(max_examples=20)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=5).map(sorted), mask=st.sampled_from(MASKS), pool=st.sampled_from(POOLS),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pieces_with_state_equal_the_whole(backend, cuts, mask, pool, seed):
    """Values and gradients: the state carries them back into the pieces before."""
    inputs = pair_inputs(Random(seed, torch.float64, backend.device), 2, 40, 3, mask=mask)
    inputs["pred"] += 50

    class Pieces:
        @staticmethod
        def ccc_moments(pred, target, mask):
            state = None
            for a, b in zip([0, *cuts], [*cuts, 40], strict=True):
                state = functional.ccc_moments(
                    pred[:, a:b], target[:, a:b], None if mask is None else mask[:, a:b], pool=pool, state=state
                )
            return state

    whole = run(case("ccc_moments", pool=pool), functional, inputs)
    pieces = run(case("ccc_moments"), Pieces, inputs)
    torch.testing.assert_close(pieces[0][0], whole[0][0], rtol=1e-12, atol=1e-11)
    for name in whole[1]:
        torch.testing.assert_close(pieces[1][name], whole[1][name], rtol=1e-9, atol=1e-9)


def test_a_million_pieces_do_not_drift(backend):
    """A float32 counter would stop at 2^24; state is float64, so neither count nor means wander."""
    state = moments_inputs(Random(13, device=backend.device), 2)
    state[:, 0] = 2.0**30
    inputs = pair_inputs(Random(14, device=backend.device), 1, 2)
    for _ in range(10):
        state = functional.ccc_moments(**inputs, state=state)
    assert (state[:, 0] == 2**30 + 10).all()


# ------------------------------------------------------------------------------------------------ memory and dtypes
def test_strided_and_expanded_inputs(backend):
    inputs = pair_inputs(Random(15, torch.float64, backend.device), 4, 9, 2, mask="element")
    for pool in POOLS:
        wanted, wanted_grads, cotangents = run(case(pool=pool), functional, inputs)
        for name, x in inputs.items():
            for view in (
                x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
                torch.stack([x, x ^ True if x.dtype == torch.bool else x * math.nan], -1)[..., 0],
                x.transpose(0, 1).contiguous().transpose(0, 1),
            ):  # fmt: skip
                assert not view.is_contiguous()
                out, grads, _ = run(case(pool=pool), functional, {**inputs, name: view}, grads=cotangents)
                assert torch.equal(out[0], wanted[0]), name
                assert all(torch.equal(grads[n], wanted_grads[n]) for n in grads), name
        compare(case(pool=pool), {**inputs, "target": inputs["target"][:1].expand(4, 9, 2)})
        compare(case(pool=pool), {**inputs, "mask": inputs["mask"][:1, :, 0].expand(4, 9)})
        compare(case(pool=pool), {**inputs, "mask": inputs["mask"][:, :1].expand(4, 9, 2)})


def test_an_expanded_cotangent(backend):
    """`.mean()` of the result hands the kernel a gradient of stride 0."""
    inputs = fresh(pair_inputs(Random(16, torch.float64, backend.device), 3, 9, 2))
    functional.ccc(**inputs, pool="sequence").mean().backward()
    twin = fresh(pair_inputs(Random(16, torch.float64, backend.device), 3, 9, 2))
    reference.ccc(**twin, pool="sequence").mean().backward()
    assert error(inputs["pred"].grad, twin["pred"].grad) <= 1e-12


@pytest.mark.parametrize(
    ("pred", "target", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(backend, pred, target, expected):
    inputs = pair_inputs(Random(17, torch.float64, backend.device), 3, 9, 2, mask="frame")
    mixed = {**inputs, "pred": inputs["pred"].to(pred), "target": inputs["target"].to(target)}
    out, grads, cotangents = run(case(), functional, mixed)
    assert out[0].dtype == expected
    same, same_grads, _ = run(case(), functional, converted(mixed, expected), grads=cotangents)
    assert torch.equal(out[0], same[0])
    for name, dtype in (("pred", pred), ("target", target)):
        assert torch.equal(grads[name], same_grads[name].to(dtype)), name


@pytest.mark.parametrize("wanted", ["pred", "target"])
def test_only_one_of_the_two_wants_a_gradient(backend, wanted):
    inputs = pair_inputs(Random(18, torch.float64, backend.device), 3, 9, 2, mask="frame")
    both = run(case(), functional, inputs, seed=3)
    one = {n: x.detach().requires_grad_(n == wanted) if x.is_floating_point() else x for n, x in inputs.items()}
    (grad,) = torch.autograd.grad(functional.ccc(**one), one[wanted], both[2][0])
    assert torch.equal(grad, both[1][wanted])
