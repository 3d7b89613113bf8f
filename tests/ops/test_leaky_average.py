"""leaky_average: values, state, meaning, what is not read, arguments."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from cases import Case, Random, compare, converted, error, leaky_inputs, named, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_ext import functional

MODES = [{"causal": causal, "relative": relative} for causal in (True, False) for relative in (False, True)]
ALL_MODES = pytest.mark.parametrize(
    "mode", MODES, ids=lambda m: f"{'causal' if m['causal'] else 'both-ways'}{'-relative' * m['relative']}"
)


def case(**mode):
    return Case("leaky_average", "any", lambda r: {}, ("halflife",), mode)


# ----------------------------------------------------------------------------------------------------- every shape
@settings(max_examples=50)
@given(
    batch=st.integers(0, 3), frames=st.integers(0, 40), dim=st.integers(0, 40), averages=st.integers(1, 8),
    mode=st.sampled_from(MODES), state=st.booleans(), unread=st.booleans(), seed=st.integers(0, 99), double=st.booleans(),
)  # fmt: skip
def test_every_shape(backend, batch, frames, dim, averages, mode, state, unread, seed, double):
    r = Random(seed, torch.float64 if double else torch.float32, backend.device)
    inputs = leaky_inputs(r, batch, frames, dim, averages, state=state, unread=unread)
    average, after = functional.leaky_average(**inputs, **mode)
    assert average.shape == (batch, frames, averages, dim)
    assert after.shape == (batch, averages, dim + 2)
    for found, wanted in zip((average, after), oracles.leaky_average(**inputs, **mode)):
        assert error(found.cpu(), torch.from_numpy(wanted)) <= (1e-13 if double else 64 * 2.0**-23)
    compare(case(**mode), inputs, tolerance=1e-11 if double else None)


@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_values(backend, dtype, mode):
    """The average is rounded once; the gradients of precision and prior go by the rounded average."""
    inputs = leaky_inputs(Random(3, dtype, backend.device), 2, backend.size(200, 50), 24, 3, unread=True, state=True)
    (average, after), gradients, grads = run(case(**mode), functional, inputs)
    assert average.dtype == dtype
    assert after.dtype == torch.float32
    assert gradients["precision"].dtype == torch.float32
    wanted, wanted_gradients, _ = run(case(**mode), functional, converted(inputs, torch.float64), grads=grads)
    unit = torch.finfo(dtype).eps
    assert error(average, wanted[0]) <= unit
    assert error(after, wanted[1]) <= 1e-5
    assert error(gradients["x"], wanted_gradients["x"]) <= unit
    assert error(gradients["state"], wanted_gradients["state"]) <= 2 * unit
    assert error(gradients["precision"], wanted_gradients["precision"]) <= 16 * unit


# ----------------------------------------------------------------------------------------------------------- chunks
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (20, 21), (32, 64), (7, 50)])
def test_chunks_equal_the_whole(backend, relative, cuts):
    """Averages, state and all gradients: those of the state flow from chunk to chunk."""
    mode = {"causal": True, "relative": relative}
    inputs = leaky_inputs(Random(4, torch.float64, backend.device), 2, 70, 5, 3, state=True)
    wanted, gradients, grads = run(case(**mode), functional, inputs)

    def in_chunks(causal, relative, **given):
        state, parts, edges = given["state"], [], [0, *cuts, 70]
        for begin, end in itertools.pairwise(edges):
            piece = {
                **given,
                "x": given["x"][:, begin:end],
                "precision": given["precision"][:, begin:end],
                "state": state,
            }
            average, state = functional.leaky_average(**piece, relative=relative)
            parts.append(average)
        return torch.cat(parts, 1), state

    class Chunked:
        leaky_average = staticmethod(in_chunks)

    found, found_gradients, _ = run(case(**mode), Chunked, inputs, grads=grads)
    for (name, x), y in zip(named(found, found_gradients).items(), named(wanted, gradients).values(), strict=True):
        assert error(x, y) <= 1e-12, name


def test_both_ways_is_the_causal_average_of_both_sides(backend):
    inputs = leaky_inputs(Random(5, torch.float64, backend.device), 2, 45, 4, 2)
    inputs["prior"].zero_()
    whole = functional.leaky_average(**inputs, causal=False)[0]
    turned = {**inputs, "x": inputs["x"].flip(1), "precision": inputs["precision"].flip(1)}
    turned = functional.leaky_average(**turned, causal=False)[0].flip(1)
    torch.testing.assert_close(whole, turned, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole[:, -1], functional.leaky_average(**inputs)[0][:, -1], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- meaning
def test_equal_precisions_and_no_prior_give_an_exponential_average(backend):
    x = Random(6, torch.float64, backend.device).normal(1, 30, 2)
    average, _ = functional.leaky_average(x, torch.full_like(x[..., 0], 0.3), [4.0], [0.0])
    share = 0.5 ** (torch.arange(29, -1, -1, dtype=torch.float64, device=backend.device) / 4)
    torch.testing.assert_close(average[0, -1, 0], (share @ x[0]) / share.sum())


def test_an_unreliable_frame_moves_the_average_by_its_share(backend):
    x = torch.tensor([[[1.0], [5.0]]], dtype=torch.float64, device=backend.device)
    p = torch.tensor([[4.0, 1.0]], dtype=torch.float64, device=backend.device)
    average, state = functional.leaky_average(x, p, [1.0], [1.0])
    # Half of the first frame's precision is left beside the second: (2 * 1 + 1 * 5) / (1 + 2 + 1).
    assert average.flatten().tolist() == [4 / 5, 7 / 4]
    assert state.flatten().tolist() == [7.0, 3.0, 1.5]


def test_a_relative_prior_counts_frames(backend):
    """Any common factor of the precisions cancels, and little precision does not empty the average."""
    inputs = leaky_inputs(Random(7, torch.float64, backend.device), 2, 40, 3, 2)
    whole = functional.leaky_average(**inputs, relative=True)[0]
    inputs["precision"] = inputs["precision"] * 1e-6
    torch.testing.assert_close(functional.leaky_average(**inputs, relative=True)[0], whole, rtol=1e-11, atol=1e-12)
    assert functional.leaky_average(**inputs)[0].abs().max() < 1e-3 * whole.abs().max()


@ALL_MODES
def test_nothing_seen_is_zero(backend, mode):
    inputs = leaky_inputs(Random(8, torch.float32, backend.device), 2, 40, 3, 2)
    inputs["precision"].zero_()
    inputs["x"].fill_(float("nan"))
    for prior in (inputs["prior"], torch.zeros_like(inputs["prior"])):
        out, gradients, _ = run(case(**mode), functional, {**inputs, "prior": prior})
        for name, x in named(out, gradients).items():
            assert not x.any(), name


@ALL_MODES
def test_what_is_not_read_reaches_nothing(backend, mode):
    inputs = leaky_inputs(Random(9, torch.float32, backend.device), 2, 70, 6, 3, unread=True, state=True)
    unread = inputs["precision"] == 0
    zeros = {**inputs, "x": inputs["x"].masked_fill(unread.unsqueeze(-1), 0.0)}
    inputs["x"][unread] = float("nan")
    out, gradients, grads = run(case(**mode), functional, inputs)
    wanted, wanted_gradients, _ = run(case(**mode), functional, zeros, grads=grads)
    for (name, x), y in zip(named(out, gradients).items(), named(wanted, wanted_gradients).values(), strict=True):
        assert torch.equal(x, y), name
    assert not gradients["x"][unread].any()
    assert not gradients["precision"][unread].any()


@ALL_MODES
def test_a_nan_that_counts_shows(backend, mode):
    inputs = leaky_inputs(Random(10, torch.float32, backend.device), 1, 40, 2, 1)
    inputs["x"][0, 20, 0] = float("nan")
    nan = functional.leaky_average(**inputs, **mode)[0].isnan()[0, :, 0]
    assert nan[20:, 0].all()
    assert bool(nan[:20, 0].all()) is (not mode["causal"])
    assert not nan[:, 1].any()
    inputs = leaky_inputs(Random(10, torch.float32, backend.device), 1, 40, 2, 1)
    inputs["precision"][0, 20] = float("nan")
    assert functional.leaky_average(**inputs, **mode)[0].isnan()[0, 20:].all()


def test_a_long_half_life(backend):
    """Ten thousand frames at a half-life of a thousand: float32 sums against float64."""
    inputs = leaky_inputs(Random(11, torch.float64, backend.device), 1, backend.size(10_000, 600), 2, 1)
    inputs["halflife"].fill_(1000.0)
    inputs["x"] += 3
    wanted = functional.leaky_average(**inputs)[0]
    single = functional.leaky_average(**{n: None if x is None else x.float() for n, x in inputs.items()})[0]
    assert error(single, wanted) <= 3e-5


# -------------------------------------------------------------------------------------------------------- arguments
def test_a_strided_or_expanded_input(backend):
    r = Random(12, torch.float64, backend.device)
    inputs = leaky_inputs(r, 3, 9, 4, 2, state=True)
    strided = {
        **inputs, "x": r.normal(3, 4, 9).transpose(1, 2), "precision": r.uniform(9, 1).expand(9, 3).t(),
        "prior": r.uniform(1).expand(2),
    }  # fmt: skip
    compare(case(), strided)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": "no"}, TypeError, r"^x: expected a torch.Tensor, got str"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"^x: expected shape \(B, T, D\), got \(2, 5\)"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, TypeError, r"^x: expected dtype .*, got torch.int64"),
        ({"precision": torch.ones(2, 4)}, ValueError, r"^precision: expected shape \(B, T\) = \(2, 5\), got \(2, 4\)"),
        ({"halflife": [1.0] * 9}, ValueError, r"^halflife: expected 1 to 8 half-lives, got 9"),
        ({"halflife": []}, ValueError, r"^halflife: expected 1 to 8 half-lives, got 0"),
        ({"halflife": [0.0, 1.0]}, ValueError, r"^halflife: expected finite numbers > 0, got 0.0"),
        ({"halflife": [float("nan"), 1.0]}, ValueError, r"^halflife: expected finite numbers > 0, got nan"),
        ({"halflife": "ab"}, TypeError, r"^halflife: expected a torch.Tensor or a sequence of numbers, got str"),
        ({"halflife": ["a", 1.0]}, TypeError, r"^halflife: expected numbers, got str"),
        ({"halflife": torch.ones(2, requires_grad=True)}, ValueError, r"^halflife: expected a constant"),
        ({"halflife": torch.ones(2, 1)}, ValueError, r"^halflife: expected shape \(R,\), got \(2, 1\)"),
        ({"prior": [1.0, -1.0]}, ValueError, r"^prior: expected finite numbers >= 0, got -1.0"),
        ({"prior": [1.0]}, ValueError, r"^prior: expected shape \(R,\) = \(2,\), got \(1,\)"),
        ({"state": torch.zeros(2, 2, 3)}, ValueError, r"^state: expected shape \(B, R, D \+ 2\) = \(2, 2, 5\), got"),
        ({"causal": 1}, TypeError, r"^causal: expected a bool, got int"),
        ({"relative": None}, TypeError, r"^relative: expected a bool, got NoneType"),
    ],
)
def test_errors(change, kind, words):
    good = {"x": torch.zeros(2, 5, 3), "precision": torch.ones(2, 5), "halflife": [2.0, 3.0], "prior": [1.0, 0.0]}
    functional.leaky_average(**good)
    with pytest.raises(kind, match=words):
        functional.leaky_average(**{**good, **change})
