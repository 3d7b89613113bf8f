"""temporal_ccc: running concordance in its three modes, chunked and whole."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from cases import Case, Random, compare, converted, error, named, pair_inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_ext import functional, reference

MASKS = [None, "frame", "element"]
MODES = [{}, {"window": 2}, {"window": 5}, {"window": 64}, {"halflife": 0.3}, {"halflife": 4}, {"halflife": 300.0}]
mode_id = {"ids": lambda m: "-".join(f"{k}{v}" for k, v in m.items()) or "cumulative"}
ALL_MODES = pytest.mark.parametrize("mode", MODES, **mode_id)


def case(**mode):
    return Case("temporal_ccc", "any", lambda r: {}, constant=("state",), kwargs=mode)


def rho_of(inputs, mode):
    return functional.temporal_ccc(**inputs, **mode)[0]


def oracle_error(actual, inputs, mode):
    inputs = {n: x for n, x in inputs.items() if n != "state"}
    return error(actual.double().cpu(), torch.from_numpy(oracles.temporal_ccc(**inputs, **mode)))


# ----------------------------------------------------------------------------------------------------- every shape
@settings(max_examples=50)
@given(
    batch=st.integers(0, 4), frames=st.integers(0, 25), channels=st.integers(0, 5), mask=st.sampled_from(MASKS),
    mode=st.one_of(
        st.just({}), st.builds(lambda w: {"window": w}, st.integers(2, 40)),
        st.builds(lambda h: {"halflife": h}, st.floats(0.05, 500)),
    ),
    seed=st.integers(0, 99), double=st.booleans(),
)  # fmt: skip
def test_every_shape(backend, batch, frames, channels, mask, mode, seed, double):
    r = Random(seed, torch.float64 if double else torch.float32, backend.device)
    inputs = pair_inputs(r, batch, frames, channels, mask=mask)
    rho = rho_of(inputs, mode)
    assert rho.shape == (batch, frames, channels)
    assert oracle_error(rho, inputs, mode) <= (1e-10 if double else 2 * 2.0**-24)
    # Two close values make a small spread, which divides their rounding: float64 keeps nine digits of the gradient.
    compare(case(**mode), inputs, tolerance=1e-9 if double else None)


@ALL_MODES
def test_long_sequences(backend, mode):
    inputs = pair_inputs(Random(1, torch.float64, backend.device), 2, backend.size(400, 70), 2, mask="element")
    assert oracle_error(rho_of(inputs, mode), inputs, mode) <= 1e-10
    short = {n: x[:, :70] for n, x in inputs.items()}
    compare(case(**mode), short, tolerance=1e-9)
    compare(case(**mode), converted(short, torch.float32))


@pytest.mark.parametrize("batch", [1, 3, 5, 8, 9])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_lanes(backend, batch, channels):
    """Every split of (sequence, channel) pairs over vector lanes."""
    inputs = pair_inputs(Random(2, torch.float64, backend.device), batch, 20, channels, mask="element")
    for mode in ({}, {"window": 6}, {"halflife": 3.0}):
        assert oracle_error(rho_of(inputs, mode), inputs, mode) <= 1e-11
        compare(case(**mode), inputs, tolerance=1e-10)


# --------------------------------------------------------------------------------------------------------- meaning
def test_the_last_frame_is_the_ccc_of_all(backend):
    inputs = pair_inputs(Random(3, torch.float64, backend.device), 3, 50, 2, mask="frame")
    torch.testing.assert_close(rho_of(inputs, {})[:, -1], functional.ccc(**inputs, pool="sequence"))


def test_a_window_counts_frames_valid_or_not(backend):
    inputs = pair_inputs(Random(4, torch.float64, backend.device), 2, 30, 2, mask="frame")
    rho = rho_of(inputs, {"window": 7})
    for t in range(30):
        part = {n: x[:, max(0, t - 6) : t + 1] for n, x in inputs.items()}
        torch.testing.assert_close(rho[:, t], functional.ccc(**part, pool="sequence"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [30, 31, 1000, 10**9])
def test_a_window_longer_than_the_sequence_is_cumulative(backend, window):
    inputs = pair_inputs(Random(5, torch.float64, backend.device), 2, 30, 2, mask="element")
    torch.testing.assert_close(rho_of(inputs, {"window": window}), rho_of(inputs, {}), rtol=1e-10, atol=1e-12)
    compare(case(window=min(window, 1000)), inputs, tolerance=1e-9)


def test_a_long_halflife_is_cumulative(backend):
    inputs = pair_inputs(Random(6, torch.float64, backend.device), 2, 30, 2, mask="element")
    torch.testing.assert_close(rho_of(inputs, {"halflife": 1e15}), rho_of(inputs, {}), rtol=1e-10, atol=1e-12)
    for endless in (1e300, math.inf):
        torch.testing.assert_close(rho_of(inputs, {"halflife": endless}), rho_of(inputs, {}), rtol=1e-10, atol=1e-12)


def repeats(backend, values, first):
    """To the bit frame by frame (CPU); a GPU's scan brackets the same sums differently from frame to frame."""
    return (values == first).all() if backend.name == "cpu" else ((values - first).abs() <= 1e-14).all()


def test_an_invalid_frame_repeats_the_last_value(backend):
    """Cumulative and half-life: nothing new, and ageing scales all weights alike. Before two valid frames: 0."""
    inputs = pair_inputs(Random(7, torch.float64, backend.device), 1, 40, 1)
    inputs["mask"] = torch.zeros(1, 40, dtype=torch.bool, device=backend.device)
    inputs["mask"][0, [5, 9, 10, 30]] = True
    for mode in ({}, {"halflife": 3.0}):
        rho = rho_of(inputs, mode)[0, :, 0]
        assert (rho[:9] == 0).all()
        assert repeats(backend, rho[10:30], rho[10])
        assert repeats(backend, rho[30:], rho[30])
        assert rho[9] != rho[10]


@pytest.mark.parametrize("gap", [1000, 20000])
@pytest.mark.parametrize("halflife", [0.5, 10.0, 1000.0])
def test_huge_gaps_do_not_wear_out_the_weights(backend, gap, halflife):
    """0.5 ** (gap / halflife) underflows, in steps or at once: what was known keeps its value until something is seen."""
    gap = backend.size(gap, 100)
    r = Random(8, torch.float64, backend.device)
    head = pair_inputs(r, 1, 20, 2)
    quiet = torch.zeros(1, gap, 2, dtype=torch.float64, device=backend.device)
    inputs = {n: torch.cat([head[n], quiet, head[n][:, :5]], 1) for n in ("pred", "target")}
    inputs["mask"] = torch.ones(1, gap + 25, dtype=torch.bool, device=backend.device)
    inputs["mask"][:, 20 : 20 + gap] = False
    rho, state = functional.temporal_ccc(**inputs, halflife=halflife)
    assert repeats(backend, rho[0, 20 : 20 + gap], rho[0, 19])
    assert torch.isfinite(rho).all()
    assert torch.isfinite(state).all()
    if gap / halflife > 1000:  # all before the gap weighs nothing: as if the stream began after it
        alone = functional.temporal_ccc(head["pred"][:, :5], head["target"][:, :5], halflife=halflife)[0]
        torch.testing.assert_close(rho[0, 20 + gap + 1 :], alone[0, 1:], rtol=1e-9, atol=1e-12)
    _, grads, _ = run(case(halflife=halflife), functional, inputs)
    for g in grads.values():
        assert torch.isfinite(g).all()
        assert (g[0, 20 : 20 + gap] == 0).all()


def test_cost_does_not_depend_on_the_window(backend):
    """Linear in T: a window of thousands costs as much as one of tens, to within a factor that O(T window) is far from."""
    if backend.small:
        pytest.skip("timing under emulation says nothing")
    from time import perf_counter

    inputs = pair_inputs(Random(9, device=backend.device), 1, 20000, 2)

    def seconds(window):
        best = math.inf
        for _ in range(3):
            start = perf_counter()
            float(rho_of(inputs, {"window": window})[0, -1, 0])
            best = min(best, perf_counter() - start)
        return best

    seconds(10)
    assert seconds(5000) < 20 * seconds(10) + 0.01  # 500 times the work, were it done window by window


# ------------------------------------------------------------------------------------------------------ degenerate
@ALL_MODES
@pytest.mark.parametrize("value", [0.1, 1 / 3, -12345.678])
def test_constants_are_exactly_zero(backend, mode, value):
    """Zero CCC and zero gradient to the bit, wherever a window holds nothing but one constant on both sides."""
    frames = backend.size(300, 40)
    for dtype in (torch.float32, torch.float64):
        r = Random(10, dtype, backend.device)
        c = torch.full((2, frames, 2), value, dtype=dtype, device=backend.device)
        for mask in (None, r.mask(2, frames)):
            out, grads, _ = run(case(**mode), functional, {"pred": c, "target": c.clone(), "mask": mask})
            assert (out[0] == 0).all()
            assert all((g == 0).all() for g in grads.values())
            assert (rho_of({"pred": c, "target": r.normal(2, frames, 2), "mask": mask}, mode) == 0).all()


@pytest.mark.parametrize("window", [2, 5, 16])
def test_a_window_forgets_what_has_left_it(backend, window):
    """After `window` frames of a constant nothing of the wild values before is left, exactly."""
    r = Random(11, torch.float64, backend.device)
    wild = 1e6 * r.normal(1, 30, 2)
    constant = torch.full((1, 40, 2), 0.1, dtype=torch.float64, device=backend.device)
    x = torch.cat([wild, constant, wild], 1)
    rho = rho_of({"pred": x, "target": x.clone()}, {"window": window})
    assert (rho[:, 30 + window - 1 : 70] == 0).all()
    assert (rho[:, :30][:, 1:] > 0.999).all()


@ALL_MODES
def test_fewer_than_two_valid_frames(backend, mode):
    inputs = pair_inputs(Random(12, torch.float64, backend.device), 2, 12, 2)
    inputs["mask"] = torch.zeros(2, 12, dtype=torch.bool, device=backend.device)
    inputs["mask"][1, 4] = True
    out, grads, _ = run(case(**mode), functional, inputs)
    assert (out[0] == 0).all()
    assert all((g == 0).all() for g in grads.values())


@ALL_MODES
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", ["frame", "element"])
def test_a_masked_value_is_not_read(backend, mode, mask, poison):
    """Nor does it reach a later frame, a gradient, or the state."""
    for dtype in (torch.float32, torch.float64):
        inputs = pair_inputs(Random(13, dtype, backend.device), 3, 21, 2, mask=mask)
        gone = ~inputs["mask"] if mask == "element" else ~inputs["mask"][..., None]
        poisoned = {**inputs, **{n: inputs[n].masked_fill(gone, poison) for n in ("pred", "target")}}
        out, grads, cotangents = run(case(**mode), functional, poisoned)
        clean, clean_grads, _ = run(case(**mode), functional, inputs, grads=cotangents)
        for (name, a), b in zip(named(out, grads).items(), named(clean, clean_grads).values(), strict=True):
            assert torch.isfinite(a).all(), name
            if name != "output 1":
                assert torch.equal(a, b), name
        later = pair_inputs(Random(14, dtype, backend.device), 3, 9, 2)
        after, same = (functional.temporal_ccc(**later, state=o[1], **mode)[0] for o in (out, clean))
        assert torch.equal(after, same)
        for g in grads.values():
            assert (g.masked_select(gone) == 0).all()


@ALL_MODES
def test_far_from_zero(backend, mode):
    """Means 1e4 times the spread, float32: nothing is lost against float64 on the same inputs."""
    frames = backend.size(150, 40)
    inputs = pair_inputs(Random(15, device=backend.device), 2, frames, 2, mask="frame")
    inputs["pred"], inputs["target"] = 1e4 + inputs["pred"], 1e4 + inputs["target"]
    out, grads, cotangents = run(case(**mode), functional, inputs)
    assert np.abs(out[0].double().cpu().numpy() - oracles.temporal_ccc(**inputs, **mode)).max() < 1e-5
    double = converted(inputs, torch.float64)
    double["pred"], double["target"] = double["pred"] - 1e4, double["target"] - 1e4
    _, wanted, _ = run(case(**mode), reference, double, grads=cotangents)
    for name in wanted:
        assert error(grads[name], wanted[name]) < 1e-5, name


# ---------------------------------------------------------------------------------------------------------- chunks
def chunked(cuts, frames, mode):
    def call(pred, target, mask=None):
        state, pieces = None, []
        for a, b in zip([0, *cuts], [*cuts, frames], strict=True):
            piece, state = functional.temporal_ccc(
                pred[:, a:b], target[:, a:b], None if mask is None else mask[:, a:b], state=state, **mode
            )
            pieces.append(piece)
        return torch.cat(pieces, 1), state

    return call


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 24), max_size=5).map(sorted), mask=st.sampled_from(MASKS), seed=st.integers(0, 99),
    mode=st.sampled_from([*MODES, {"window": 24}, {"window": 25}]), double=st.booleans(),
)  # fmt: skip
def test_chunks_equal_the_whole(backend, cuts, mask, seed, mode, double):
    dtype = torch.float64 if double else torch.float32
    inputs = pair_inputs(Random(seed, dtype, backend.device), 2, 24, 2, mask=mask)
    whole, state = functional.temporal_ccc(**inputs, **mode)
    pieces, last = chunked(cuts, 24, mode)(**inputs)
    torch.testing.assert_close(pieces, whole, rtol=1e-6 if not double else 1e-9, atol=1e-7 if not double else 1e-10)
    # and both states continue alike
    later = pair_inputs(Random(seed + 1, dtype, backend.device), 2, 7, 2)
    a, b = (functional.temporal_ccc(**later, state=s, **mode)[0] for s in (state, last))
    torch.testing.assert_close(a, b, rtol=1e-6 if not double else 1e-9, atol=1e-7 if not double else 1e-10)


@ALL_MODES
def test_frame_by_frame_over_a_long_stream(backend, mode):
    """One frame a call, as a live stream: no drift against the whole."""
    frames = backend.size(500, 40)
    inputs = pair_inputs(Random(16, device=backend.device), 1, frames, 2, mask="frame")
    whole = rho_of(inputs, mode)
    pieces, _ = chunked(range(1, frames), frames, mode)(**inputs)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-7)


@ALL_MODES
def test_gradients_stop_at_the_chunks_border(backend, mode):
    """The state is a constant: the second chunk's gradient is that of its own frames, with the first held fixed."""
    inputs = pair_inputs(Random(17, torch.float64, backend.device), 2, 18, 2, mask="frame")
    whole = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    rho, _ = functional.temporal_ccc(**whole, **mode)
    (wanted,) = torch.autograd.grad(rho[:, 10:].square().sum(), whole["pred"])

    first = {n: x[:, :10].clone() for n, x in inputs.items()}
    second = {n: x[:, 10:].clone() for n, x in inputs.items()}
    for part in (first, second):
        part["pred"].requires_grad_()
    _, state = functional.temporal_ccc(**first, **mode)
    assert not state.requires_grad
    rho, after = functional.temporal_ccc(**second, state=state, **mode)
    assert not after.requires_grad
    grad, before = torch.autograd.grad(rho.square().sum(), [second["pred"], first["pred"]], allow_unused=True)
    assert before is None
    torch.testing.assert_close(grad, wanted[:, 10:], rtol=1e-8, atol=1e-10)


@ALL_MODES
def test_a_state_is_not_changed_by_its_use(backend, mode):
    inputs = pair_inputs(Random(18, device=backend.device), 2, 9, 2)
    _, state = functional.temporal_ccc(**inputs, **mode)
    copy = state.clone()
    first = functional.temporal_ccc(**inputs, state=state, **mode)
    again = functional.temporal_ccc(**inputs, state=state, **mode)
    assert torch.equal(state, copy)
    assert torch.equal(first[0], again[0])
    assert first[1].data_ptr() != state.data_ptr()


@ALL_MODES
def test_no_frames(backend, mode):
    """A chunk without frames returns an empty rho and the state it was given; without a state, one that means nothing yet."""
    empty = pair_inputs(Random(19, torch.float64, backend.device), 2, 0, 2, mask="frame")
    some = pair_inputs(Random(20, torch.float64, backend.device), 2, 9, 2)
    rho, fresh = functional.temporal_ccc(**empty, **mode)
    assert rho.shape == (2, 0, 2)
    assert torch.equal(functional.temporal_ccc(**some, state=fresh, **mode)[0], rho_of(some, mode))
    _, state = functional.temporal_ccc(**some, **mode)
    _, same = functional.temporal_ccc(**empty, state=state, **mode)
    assert torch.equal(same, state)


def test_states_are_as_documented(backend):
    inputs = pair_inputs(Random(21, device=backend.device), 2, 9, 3)
    for mode in ({}, {"halflife": 2.0}):
        state = functional.temporal_ccc(**inputs, **mode)[1]
        assert state.shape == (2, 3, 8)
        assert state.dtype == torch.float64
    for window, kept in ((2, 1), (6, 5), (10, 9), (50, 9)):
        state = functional.temporal_ccc(**inputs, window=window)[1]
        assert state.shape == (2, 3, kept, 3)
        assert state.dtype == torch.float64


@ALL_MODES
def test_a_state_may_be_strided(backend, mode):
    """A batch's rows taken from a larger state, or a state that came out of a stack."""
    inputs = pair_inputs(Random(22, device=backend.device), 4, 9, 2)
    _, state = functional.temporal_ccc(**inputs, **mode)
    some = {n: x[::2] if x is not None else None for n, x in inputs.items()}
    view = state[::2]
    assert not view.is_contiguous()
    a = functional.temporal_ccc(**some, state=view, **mode)
    b = functional.temporal_ccc(**some, state=view.contiguous(), **mode)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


# ------------------------------------------------------------------------------------------------ memory and dtypes
@ALL_MODES
def test_strided_and_expanded_inputs(backend, mode):
    inputs = pair_inputs(Random(23, torch.float64, backend.device), 4, 9, 2, mask="element")
    wanted, wanted_grads, cotangents = run(case(**mode), functional, inputs)
    for name, x in inputs.items():
        view = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert not view.is_contiguous()
        out, grads, _ = run(case(**mode), functional, {**inputs, name: view}, grads=cotangents)
        assert torch.equal(out[0], wanted[0]), name
        assert all(torch.equal(grads[n], wanted_grads[n]) for n in grads), name
    compare(case(**mode), {**inputs, "target": inputs["target"][:1].expand(4, 9, 2)}, tolerance=1e-9)
    compare(case(**mode), {**inputs, "mask": inputs["mask"][:, :1, 0].expand(4, 9)}, tolerance=1e-9)


@ALL_MODES
def test_an_expanded_cotangent(backend, mode):
    inputs = pair_inputs(Random(24, torch.float64, backend.device), 3, 9, 2, mask="frame")
    half = torch.full((1, 1, 1), 0.5, dtype=torch.float64, device=backend.device).expand(3, 9, 2)
    state = functional.temporal_ccc(**inputs, **mode)[1]
    a = run(case(**mode), functional, inputs, grads=[half, state])[1]
    b = run(case(**mode), functional, inputs, grads=[half.contiguous(), state])[1]
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("pred", "target", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(backend, pred, target, expected):
    inputs = pair_inputs(Random(25, torch.float64, backend.device), 3, 9, 2, mask="frame")
    mixed = {**inputs, "pred": inputs["pred"].to(pred), "target": inputs["target"].to(target)}
    rho, state = functional.temporal_ccc(**mixed, window=4)
    assert (rho.dtype, state.dtype) == (expected, torch.float64)
    assert torch.equal(rho, rho_of(converted(mixed, expected), {"window": 4}))


def test_only_one_of_the_two_wants_a_gradient(backend):
    for mode in ({}, {"window": 4}, {"halflife": 2.0}):
        inputs = pair_inputs(Random(26, torch.float64, backend.device), 3, 9, 2, mask="frame")
        both = run(case(**mode), functional, inputs, seed=3)
        for wanted in ("pred", "target"):
            one = {n: x.detach().requires_grad_(n == wanted) if x.is_floating_point() else x for n, x in inputs.items()}
            rho, _ = functional.temporal_ccc(**one, **mode)
            (grad,) = torch.autograd.grad(rho, one[wanted], both[2][0])
            assert torch.equal(grad, both[1][wanted])
