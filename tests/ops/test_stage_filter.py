"""stage_filter: the filter's own properties, extremes, chunks and shapes."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import Case, Random, compare, converted, error, filter_inputs, fresh, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_ext import functional, reference

CASE = Case("stage_filter", "any", filter_inputs)


def outputs(inputs):
    return functional.stage_filter(**inputs)


@settings(max_examples=40)
@given(
    batch=st.integers(0, 5), frames=st.integers(0, 12), stages=st.integers(1, 16),
    initial=st.sampled_from([None, "shared", "row"]), mask=st.booleans(), seed=st.integers(0, 99),
    double=st.booleans(),
)  # fmt: skip
def test_every_shape(backend, batch, frames, stages, initial, mask, seed, double):
    r = Random(seed, torch.float64 if double else torch.float32, backend.device)
    inputs = filter_inputs(r, batch, frames, stages, initial, mask)
    compare(CASE, inputs)
    posterior, final = outputs(inputs)
    expected, expected_final = oracles.stage_filter(**inputs)
    tolerance = 1e-13 if double else 1e-5
    assert error(posterior.cpu(), torch.from_numpy(expected)) <= tolerance
    assert error(final.cpu(), torch.from_numpy(expected_final)) <= tolerance


def test_a_filtered_belief_is_a_distribution(backend):
    posterior, final = outputs(filter_inputs(Random(1, device=backend.device), 4, backend.size(300, 20), 5))
    # rows are normalised each on its own: a few roundings of numbers <= 1
    assert (posterior.sum(-1) - 1).abs().max() <= 8 * 2.0**-23
    assert (posterior >= 0).all()
    torch.testing.assert_close(final.exp(), posterior[:, -1], rtol=1e-5, atol=1e-7)


def test_no_frames_give_back_the_normalised_initial(backend):
    inputs = filter_inputs(Random(2, torch.float64, backend.device), 3, 0, 4)
    posterior, final = outputs(inputs)
    assert posterior.shape == (3, 0, 4)
    torch.testing.assert_close(final, torch.log_softmax(inputs["initial"], -1))


def test_the_transition_is_applied_before_the_first_frame(backend):
    r = Random(3, torch.float64, backend.device)
    transition, start = r.normal(3, 3), r.normal(3)
    silent = torch.zeros(1, 2, 3, dtype=torch.float64, device=backend.device)
    posterior, _ = functional.stage_filter(silent, transition, start)
    chain = torch.softmax(transition, 1)
    first = torch.softmax(start, 0) @ chain
    torch.testing.assert_close(posterior[0], torch.stack([first, first @ chain]))


def test_default_initial_is_uniform_and_defined_up_to_a_constant(backend):
    inputs = filter_inputs(Random(4, torch.float64, backend.device), initial=None)
    plain = outputs(inputs)
    zeros = torch.zeros(4, dtype=torch.float64, device=backend.device)
    for shifted in (zeros, zeros + 7, zeros.expand(3, 4) - 1e3):
        for a, b in zip(plain, outputs({**inputs, "initial": shifted}), strict=True):
            torch.testing.assert_close(a, b)


def test_in_a_masked_frame_time_passes_without_evidence(backend):
    r = Random(5, torch.float64, backend.device)
    inputs = filter_inputs(r, 2, 6, 3, mask=False)
    mask = torch.ones(2, 6, dtype=torch.bool, device=backend.device)
    mask[:, 2:4] = False
    silent = inputs["emission"].clone()
    silent[:, 2:4] = 0
    for a, b in zip(
        outputs({**inputs, "mask": mask}), outputs({**inputs, "emission": silent, "mask": None}), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_masked_frame_is_not_read(backend, poison, dtype):
    inputs = filter_inputs(Random(6, dtype, backend.device), 4, 9, 5)
    poisoned = dict(inputs, emission=inputs["emission"].masked_fill(~inputs["mask"][..., None], poison))
    out, grads, _ = run(CASE, functional, poisoned)
    clean, clean_grads, _ = run(CASE, functional, inputs)
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a, b)
    for name, g in grads.items():
        assert torch.equal(g, clean_grads[name]), name
    assert (grads["emission"][~inputs["mask"]] == 0).all()


def test_everything_masked(backend):
    inputs = filter_inputs(Random(7, torch.float64, backend.device), 2, 5, 3)
    inputs["mask"] = torch.zeros(2, 5, dtype=torch.bool, device=backend.device)
    inputs["emission"].fill_(math.nan)
    compare(CASE, {**inputs})
    _, grads, _ = run(CASE, functional, inputs)
    assert (grads["emission"] == 0).all()


# ---------------------------------------------------------------------------------------------------------- extremes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stages", [1, 2, 5, 16])
def test_emissions_of_1e4_stay_finite(backend, dtype, stages):
    r = Random(8, dtype, backend.device)
    inputs = filter_inputs(r, 3, backend.size(40, 6), stages)
    sign = torch.sign(r.normal(*inputs["emission"].shape))
    inputs["emission"] = 1e4 * sign + inputs["emission"]
    out, grads, cotangents = run(CASE, functional, inputs)
    expected, expected_grads, _ = run(CASE, reference, converted(inputs, torch.float64), grads=cotangents)
    # float32 cannot hold belief + 1e4 better than to ulp(1e4) = 2^-10; normalisation forgets all but the last frames
    tolerance = 2.0**-7 if dtype == torch.float32 else 1e-10
    for i, (a, b) in enumerate(zip(out, expected, strict=True)):
        assert torch.isfinite(a).all()
        assert error(a, b) <= tolerance, i
    for name, g in grads.items():
        assert torch.isfinite(g).all(), name
        scale = max(1.0, expected_grads[name].abs().max().item())
        assert (g.double() - expected_grads[name]).abs().max() <= 4 * tolerance * scale, name


def test_overwhelming_evidence_is_certainty(backend):
    emission = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 1e4, 1e4]]], device=backend.device)
    posterior, final = functional.stage_filter(emission, torch.zeros(3, 3, device=backend.device))
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0.5, 0.5]], device=backend.device)
    torch.testing.assert_close(posterior[0], expected, rtol=0, atol=1e-6)
    assert torch.isfinite(final).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deterministic_transitions(backend, dtype):
    """Transition logits of +-1e4: a cycle through the stages, whatever the emissions say at the scale of 1."""
    stages, frames = 4, 9
    transition = torch.full((stages, stages), -1e4, dtype=dtype, device=backend.device)
    for i in range(stages):
        transition[i, (i + 1) % stages] = 1e4
    emission = Random(9, dtype, backend.device).normal(2, frames, stages)
    initial = torch.tensor([50.0, 0, 0, 0], dtype=dtype, device=backend.device)
    out, grads, _ = run(CASE, functional, {"emission": emission, "transition": transition, "initial": initial})
    where = out[0].argmax(-1)[0].tolist()
    assert where == [(t + 1) % stages for t in range(frames)]
    assert all(torch.isfinite(x).all() for x in [*out, *grads.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_stages_and_forbidden_transitions(backend, dtype):
    """Logits of -inf: the belief is known at the start, a left-to-right chain, evidence that excludes a stage."""
    r = Random(17, dtype, backend.device)
    inputs = filter_inputs(r, 3, 6, 4)
    inputs["initial"][:, 1:] = -math.inf
    inputs["transition"] = inputs["transition"].masked_fill(
        ~torch.ones(4, 4, dtype=torch.bool, device=backend.device).triu().tril(1), -math.inf
    )
    inputs["emission"][1, 4, 0] = -math.inf
    inputs["mask"][1, 4] = True
    expected, expected_final = oracles.stage_filter(**inputs)
    out, grads, cotangents = run(CASE, functional, inputs, through=(0,))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert error(out[0].cpu(), torch.from_numpy(expected)) <= tolerance
    assert error(out[1].exp().cpu(), torch.from_numpy(expected_final).exp()) <= tolerance
    assert (out[0][:, 0, 2:] == 0).all()  # one step reaches no further than the second stage
    _, wanted, _ = run(CASE, reference, converted(inputs, torch.float64), through=(0,), grads=cotangents)
    for name, g in grads.items():
        assert torch.isfinite(g).all(), name
        assert error(g, wanted[name]) <= 10 * tolerance, name
    # and through the final belief, where it is finite
    whole = functional.stage_filter(**inputs)
    state = functional.stage_filter(
        inputs["emission"][:, :2], inputs["transition"], inputs["initial"], inputs["mask"][:, :2]
    )
    rest = functional.stage_filter(inputs["emission"][:, 2:], inputs["transition"], state[1], inputs["mask"][:, 2:])
    assert error(rest[0], whole[0][:, 2:]) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["evidence", "contradiction", "initial", "transition"])
def test_nothing_is_possible(backend, dtype, what):
    """Logits of -inf for every stage, or for every stage that the belief still allows: in the first case there is no
    evidence, in the second the filter begins again, all stages alike. Nothing becomes NaN; a logit of -inf has no gradient."""
    inputs = filter_inputs(Random(23, dtype, backend.device), 3, 7, 3)
    inputs["mask"][1] = True
    if what == "evidence":
        inputs["emission"][1, 2] = -math.inf
    elif what == "contradiction":  # each stage for itself, for ever; then the only one left is excluded
        inputs["transition"] = torch.eye(3, dtype=dtype, device=backend.device).log()
        inputs["emission"][1, 1, :2] = -math.inf
        inputs["emission"][1, 2, 2] = -math.inf
    elif what == "initial":
        inputs["initial"][1] = -math.inf
    else:
        inputs["transition"][1] = -math.inf
    out, grads, cotangents = run(CASE, functional, inputs)
    wanted_out, wanted, _ = run(CASE, reference, converted(inputs, torch.float64), grads=cotangents)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert error(out[0], wanted_out[0]) <= tolerance
    assert error(out[1], wanted_out[1]) <= tolerance
    if what == "evidence":  # as if the frame were masked
        inputs["mask"][1, 2] = False
        assert error(functional.stage_filter(**inputs)[0], out[0].double()) <= tolerance
    for name, g in grads.items():
        assert torch.isfinite(g).all(), name
        assert error(g, wanted[name]) <= 10 * tolerance, name
        assert (g[inputs[name] == -math.inf] == 0).all(), name


@pytest.mark.parametrize("name", ["emission", "transition", "initial"])
def test_nan_where_it_counts_shows(backend, name):
    for functions in (functional, reference):
        inputs = filter_inputs(Random(18, device=backend.device), 2, 4, 3, mask=False)
        if name == "transition":
            inputs[name][1, 2] = math.nan
        else:
            inputs[name][0, 1] = math.nan
        posterior, final = functions.stage_filter(**inputs)
        last = 1 if name == "emission" else 0
        assert posterior[0, last:].isnan().all()
        assert final[0].isnan().all()
        if name != "transition":
            assert torch.isfinite(posterior[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_sequence_neither_drifts_nor_decays(backend, dtype):
    """Thousands of frames: each posterior still equals the float64 filter's, gradients included."""
    inputs = filter_inputs(Random(10, dtype, backend.device), 1, backend.size(2500, 60), 3)
    compare(CASE, inputs, tolerance=2e-4 if dtype == torch.float32 else 1e-11)


# -------------------------------------------------------------------------------------------------------- chunks
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 17), max_size=4).map(sorted), shared=st.booleans(), seed=st.integers(0, 99))
def test_chunks_equal_the_whole(backend, cuts, shared, seed):
    """Values, final, and the gradients that flow back through `final` into the chunks before."""
    inputs = filter_inputs(Random(seed, torch.float64, backend.device), 3, 17, 4, "shared" if shared else "row")

    def chunked(functions):
        def call(emission, transition, initial, mask):
            pieces, belief = [], initial
            for a, b in zip([0, *cuts], [*cuts, 17], strict=True):
                piece, belief = functions.stage_filter(emission[:, a:b], transition, belief, mask[:, a:b])
                pieces.append(piece)
            return torch.cat(pieces, 1), belief

        return call

    class Chunked:
        stage_filter = staticmethod(chunked(functional))

    whole, chunk = run(CASE, functional, inputs), run(CASE, Chunked, inputs)
    for a, b in zip(whole[0], chunk[0], strict=True):
        assert error(b, a) <= 1e-13
    for name in whole[1]:
        assert error(chunk[1][name], whole[1][name]) <= 1e-12, name


def test_chunks_of_one_frame_over_a_long_sequence(backend):
    frames = backend.size(400, 30)
    inputs = filter_inputs(Random(12, device=backend.device), 2, frames, 4)
    posterior, final = outputs(inputs)
    belief = inputs["initial"]
    for t in range(frames):
        step, belief = functional.stage_filter(
            inputs["emission"][:, t : t + 1], inputs["transition"], belief, inputs["mask"][:, t : t + 1]
        )
        # the belief is handed over in float32 here and inside the whole call alike
        torch.testing.assert_close(step[:, 0], posterior[:, t], rtol=0, atol=16 * 2.0**-23)
    torch.testing.assert_close(belief, final, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- memory and dtypes
def test_strided_and_expanded_inputs(backend):
    r = Random(13, torch.float64, backend.device)
    inputs = filter_inputs(r, 4, 6, 3)
    views = {
        "emission": inputs["emission"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "transition": inputs["transition"].t().contiguous().t(),
        "initial": torch.stack([inputs["initial"]] * 2, -1)[..., 1],
        "mask": torch.stack([inputs["mask"]] * 3, -1)[..., 1],
    }
    for name, view in views.items():
        assert not view.is_contiguous(), name
        a, b = run(CASE, functional, {**inputs, name: view}), run(CASE, functional, inputs)
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)), name
        assert all(torch.equal(a[1][n], b[1][n]) for n in b[1]), name
    wide = {**inputs, "emission": inputs["emission"][:1].expand(4, 6, 3), "mask": inputs["mask"][:, :1].expand(4, 6)}
    compare(CASE, wide)
    compare(CASE, {**inputs, "initial": inputs["initial"][0, :1].expand(4, 3)})


def test_expanded_emission_accumulates_its_gradient(backend):
    r = Random(14, torch.float64, backend.device)
    inputs = fresh(filter_inputs(r, 3, 5, 4, mask=False))
    one = inputs["emission"][:1, :1].detach().clone().requires_grad_()
    posterior, _ = functional.stage_filter(one.expand(3, 5, 4), inputs["transition"], inputs["initial"])
    (posterior**2).sum().backward()
    twin = one.detach().clone().requires_grad_()
    posterior, _ = reference.stage_filter(twin.expand(3, 5, 4), inputs["transition"], inputs["initial"])
    (posterior**2).sum().backward()
    assert error(one.grad, twin.grad) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(backend, dtype):
    inputs = filter_inputs(Random(15, dtype, backend.device))
    out, grads, cotangents = run(CASE, functional, inputs)
    assert [o.dtype for o in out] == [torch.float32] * 2
    wide, wide_grads, _ = run(CASE, functional, converted(inputs, torch.float32), grads=cotangents)
    assert all(torch.equal(a, b) for a, b in zip(out, wide, strict=True))
    assert all(g.dtype == dtype and torch.equal(g, wide_grads[n].to(dtype)) for n, g in grads.items())


def test_emission_decides_the_dtype(backend):
    inputs = filter_inputs(Random(16, torch.float64, backend.device))
    mixed = {**inputs, "transition": inputs["transition"].float(), "initial": inputs["initial"].half()}
    assert outputs(mixed)[0].dtype == torch.float64
    mixed = {**inputs, "emission": inputs["emission"].float()}
    assert outputs(mixed)[0].dtype == torch.float32
