"""StreamingSession: step by step what the offline model computes, whatever the batch, the row, the events and the input."""

import contextlib
import copy
import gc
import itertools
import math
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_ext import _C, stream
from sage_ext.models import SAGE
from sage_ext.stream import StreamingSession, StreamOutput

DIMS = {"audio": 7, "visual": 21}
FIELDS = StreamOutput._fields[:-1]  # those that the offline model has too
VARIANTS = [name for name, built, supported in _C.isa_variants() if built and supported]


def build(dims=DIMS, seed=0, limits=None, **options):
    """A model of random weights (no zeros left), with statistics fitted to `draw`, and estimates put to some scale; `limits`: a
    `stuck_limit` a modality."""
    torch.manual_seed(seed)
    options = {"dim": 20, "evidence_dim": 9, "stages": 3, **options}
    model = SAGE(dims, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if hasattr(model.fusion, "bias"):
            model.fusion.bias.normal_(0, 0.3)
            model.fusion.log_temperature.normal_(0, 0.3)
        model.own_gain.normal_(1, 0.3)
        model.own_shift.normal_(0, 0.3)
        model.target_variance.uniform_(0.1, 0.5)
    features, present = draw(4, 150, dims, seed=99, still=False)
    quality = told(model, 4, 150, seed=98)
    model.fit_statistics([{"features": features, "present": present, "quality": quality}])
    if limits is not None:
        model.stuck_limit.copy_(torch.tensor(limits))
    return model.eval()


def draw(batch, frames, dims=DIMS, seed=0, still=True):
    """Features whose loudness drifts and that now and then stand still, and presence with gaps of every length."""
    g = torch.Generator().manual_seed(seed)
    loud = torch.randn(batch, frames, 1, generator=g).cumsum(1).mul(0.1).sin().exp()
    features = {k: 2.0 + loud * torch.randn(batch, frames, d, generator=g) for k, d in dims.items()}
    for k, v in features.items():
        stands = torch.randn(batch, frames, generator=g).cumsum(1).mul(0.1).sin() > (0.95 if still else 2)
        source = torch.where(stands, 0, torch.arange(frames)).cummax(1).values
        features[k] = v.gather(1, source.unsqueeze(-1).expand_as(v))
    gaps = torch.randn(batch, frames, len(dims), generator=g).cumsum(1).mul(0.3).sin()
    return features, (gaps > -0.6) & (torch.rand(batch, frames, len(dims), generator=g) > 0.1)


def told(model, batch, frames, seed=0):
    """Quality of every modality that has any, far from the usual at times, and unknown at times."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, columns in zip(model.names or (), model.quality_dims):
        if columns:
            x = 3.0 + torch.randn(batch, frames, columns, generator=g).cumsum(1)
            x[torch.rand(x.shape, generator=g) < 0.1] = math.nan
            x[torch.rand(x.shape, generator=g) < 0.02] = math.inf
            found[name] = x.where((torch.rand(batch, frames, 1, generator=g) > 0.1), math.nan)
    return found or None


def frame(features, t):
    return None if features is None else {k: v[:, t] for k, v in features.items()}


def rows_of(features, rows):
    return {k: v[rows] for k, v in features.items()}


def keep(out):
    return StreamOutput(*(x.clone() for x in out))


def stack(outs):
    """n frames of (rows, ...) -> (rows, n, ...)"""
    return StreamOutput(*(torch.stack(x, 1) for x in zip(*outs)))


def offline(model, features, present=None, quality=None):
    with torch.no_grad():
        return model(features, present, quality=quality)


def assert_close(out, whole, tol=1e-5):
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(out, field), getattr(whole, field), atol=tol, rtol=0, msg=lambda m, f=field: f"{f}: {m}"
        )


def assert_same(a, b, fields=StreamOutput._fields):
    for field in fields:
        assert torch.equal(getattr(a, field), getattr(b, field)), field


# ------------------------------------------------------------------------------------------------------------- equality
CASES = {
    "default sizes": ({"audio": 128, "visual": 512}, {"dim": 128, "evidence_dim": 32, "stages": 4}),
    "odd sizes": (DIMS, {}),
    "uniform": (DIMS, {"fusion": "uniform"}),
    "one modality": ({"face": 5}, {"dim": 3, "stages": 1, "evidence_dim": 1}),
    "many features, narrow": ({"a": 1500, "b": 3}, {"dim": 8, "stages": 2, "evidence_dim": 4}),
    "eight modalities": ({f"m{i}": 2 + i for i in range(8)}, {"stages": 16, "dim": 33, "num_targets": 5}),
    "no own blocks": (DIMS, {"fused_blocks": 4}),
    "no fused blocks": (DIMS, {"fused_blocks": 0, "kernel_size": 2}),
    "one tap": (DIMS, {"blocks": 1, "kernel_size": 1, "dim": 70}),
    "long kernels": (DIMS, {"blocks": 6, "kernel_size": 7}),
    "no memory": (DIMS, {"memory": ()}),
    "eight averages, stuck at once": (DIMS, {"memory": [0.5, 1, 2, 3, 5, 8, 13, 1000], "stuck": 1}),
    "never stuck": (DIMS, {"stuck": 0, "dim": 16}),
    "limits of their own": ({"a": 3, "b": 17, "c": 5}, {"limits": (2, 0, 5), "dim": 16}),
    "ablations": (DIMS, {"use_present": False, "fusion_options": {"filter_stages": False, "norm": False}}),
    "no joint expert": (DIMS, {"joint": False}),
    "uniform, no joint expert": (DIMS, {"fusion": "uniform", "joint": False}),
    "quality": (DIMS, {"quality_dims": {"audio": 2, "visual": 3}}),
    "quality of forty columns": ({"a": 3, "b": 17, "c": 5}, {"quality_dims": {"a": 40, "c": 1}, "joint": False}),
    "doubt, no joint expert": ({"a": 3, "b": 17, "c": 5}, {"trust": {"a": 0.3, "c": 0.2}, "joint": False, "dim": 16}),
    "doubt of seven": (
        {f"m{i}": 2 + 5 * i for i in range(7)},
        {"trust": {"m0": 0.1, "m6": 0.2}, "num_targets": 5, "dim": 17, "evidence_dim": 6},
    ),
    "doubt, quality, not told what is missing": (
        DIMS,
        {"trust": {"audio": "may be foreign", "visual": 0.1}, "quality_dims": {"audio": 1}, "use_present": False},
    ),
    "sequence of dims": ([4, 6], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_whole_call(case):
    dims, options = CASES[case]
    named = dims if isinstance(dims, dict) else {str(i): d for i, d in enumerate(dims)}
    features, present = draw(2, 200, named, seed=3)
    torch.manual_seed(0)
    if isinstance(dims, dict):
        model = build(dims, **options)
    else:
        model, features = SAGE(dims, dim=20).eval(), list(features.values())
    present[:, 60:90] = False  # nothing at all
    session, quality = model.stream(2), told(model, 2, 200)
    take = frame if isinstance(dims, dict) else lambda f, t: [v[:, t] for v in f]
    outs = stack([
        keep(session.step(take(features, t), present[:, t], quality=frame(quality, t))) for t in range(200)
    ])  # fmt: skip
    assert_close(outs, offline(model, features, present, quality))
    session.load_state_dict(session.state_dict(), [0, 1])


EVERYTHING = {"quality_dims": {"audio": 1, "visual": 2}, "trust": {"audio": 0.3}}
KINDS = {"reliability": {}, "everything": EVERYTHING, "uniform": {"fusion": "uniform"}}


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_five_thousand_frames_with_gaps_resets_and_pauses(isa, kind):
    """Against the offline model in float64 of each stretch between resets, frames in which the row paused taken out."""
    default = _C.isa()
    frames, rows = 5000, 3
    model = build(**KINDS[kind])
    features, present = draw(rows, frames, seed=5)
    quality = told(model, rows, frames)
    g = torch.Generator().manual_seed(6)
    active = torch.rand(frames, rows, generator=g) > 0.2
    resets = torch.rand(frames, rows, generator=g) < 1 / 900
    active[2000:2300, 1] = False
    resets[0] = False
    _C.set_isa(isa)
    try:
        session = model.stream(rows)
        outs = []
        for t in range(frames):
            if resets[t].any():
                session.reset(resets[t])
            outs.append(keep(session.step(frame(features, t), present[:, t], active[t], quality=frame(quality, t))))
    finally:
        _C.set_isa(default)
    outs, exact, compared = stack(outs), copy.deepcopy(model).double(), 0
    for row in range(rows):
        borders = [0, *resets[:, row].nonzero().flatten().tolist(), frames]
        for a, b in itertools.pairwise(borders):
            index = a + active[a:b, row].nonzero().flatten()
            x, sure = (
                None if of is None else {k: v[None, row, index].double() for k, v in of.items()}
                for of in (features, quality)
            )
            whole = offline(exact, x, present[None, row, index], sure)
            for field in FIELDS:
                got = getattr(outs, field)[row, index].double()
                torch.testing.assert_close(got, getattr(whole, field)[0].double(), atol=1e-5, rtol=0)
            compared += len(index)
    assert compared == int(active.sum())
    assert resets.sum() > 8
    assert session.stats.frames == compared


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("isa", VARIANTS)
def test_bits_depend_on_neither_batch_nor_row_nor_threads(isa, dtype):
    """27 rows: whole groups and tiles and their remainders; the same streams alone, and in another order, with two threads."""
    rows, frames, default, threads = 27, 40, _C.isa(), torch.get_num_threads()
    model = build({"audio": 19, "visual": 40}, dim=70, num_targets=3, **EVERYTHING)
    features, present = draw(rows, frames, {"audio": 19, "visual": 40}, seed=8)
    quality = told(model, rows, frames)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    _C.set_isa(isa)
    try:
        torch.set_num_threads(2)
        together, shuffled = model.stream(rows, dtype), model.stream(rows, dtype)
        alone = [model.stream(1, dtype) for _ in range(rows)]
        for t in range(frames):
            active = torch.arange(rows) % 5 != t % 5
            x, p, sure = frame(features, t), present[:, t], frame(quality, t)
            torch.set_num_threads(1)
            a = keep(together.step(x, p, active, quality=sure))
            torch.set_num_threads(2)
            b = shuffled.step(rows_of(x, order), p[order], active[order], quality=rows_of(sure, order))
            assert_same(StreamOutput(*(v[order] for v in a)), b)
            for r in range(rows):
                if active[r]:
                    one = slice(r, r + 1)
                    c = alone[r].step(rows_of(x, one), p[one], quality=rows_of(sure, one))
                    assert_same(StreamOutput(*(v[one] for v in a)), c)
    finally:
        _C.set_isa(default)
        torch.set_num_threads(threads)


def test_two_sessions_and_two_runs_are_the_same_bits():
    model = build()
    features, present = draw(2, 30)
    a, b = model.stream(2), model.stream(2)
    for t in range(30):
        first = keep(a.step(frame(features, t), present[:, t]))
        assert_same(first, b.step(frame(features, t), present[:, t]))


def test_present_tells_which_frames_counted():
    """Absent, NaN, overflowing and stuck frames do not; an inactive row keeps what its last active step wrote."""
    stuck = 3
    session = build(stuck=stuck).stream(3)
    g = torch.Generator().manual_seed(0)
    present, expected = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)
    for t in range(24):
        x = {k: torch.randn(3, d, generator=g) for k, d in DIMS.items()}
        active = torch.tensor([True, True, t % 3 == 1])
        present[0, 0] = t % 5 > 1
        broken = {6: math.nan, 7: math.inf, 8: 1e30}.get(t)
        if broken is not None:
            x["visual"][0, 3] = broken
        if t >= 10:
            x["audio"][1] = 0.5  # the same frame from now on
        counts = present.clone()
        counts[0, 1] = broken is None
        counts[1, 0] = t < 10 + stuck
        expected[active] = counts[active]
        out = session.step(x, present, active)
        assert out.present.dtype == torch.bool
        assert torch.equal(out.present, expected), t
        assert torch.equal(out.present, out.confidence > 0)
    session.reset(1)
    assert session._output.present.tolist() == [expected[0].tolist(), [False, False], expected[2].tolist()]
    session.load_state_dict(session.state_dict(2), 2)
    assert not any(x[1:].any() for x in session._output)
    assert session._output.present[0].any()


def test_each_modality_has_a_limit_of_its_own():
    """What the offline model computes while each modality stands still beyond the others' limits, and a state in which no
    modality exceeds its own."""
    dims, limits = {"a": 3, "b": 17, "c": 5, "d": 2}, (1, 0, 4, 9)
    model = build(dims, limits=limits)
    features, _ = draw(2, 40, dims, seed=3, still=False)
    for v in features.values():
        v[:, 5:30] = v[:, 5:6].clone()
    session, outs, repeats = model.stream(2), [], []
    for t in range(40):
        outs.append(keep(session.step(frame(features, t))))
        repeats.append(session.state_dict(1)["repeats"][0])
    out, times = stack(outs), torch.arange(40)
    assert_close(out, offline(model, features))
    for m, limit in enumerate(limits):
        stuck = (times >= 5 + limit) & (times < 30) & (limit > 0)
        assert torch.equal(out.present[1, :, m], ~stuck)
        assert torch.stack(repeats)[:, m].tolist() == [min(t - 5, limit) if 5 <= t < 30 else 0 for t in range(40)]
    still = offline(model, {k: v[:, :25] for k, v in features.items()}).state.still
    assert torch.equal(still[0][1].float(), repeats[24])
    state = session.state_dict()
    state["repeats"] = torch.tensor(limits).float().expand(2, -1).clone()
    session.load_state_dict(state)
    for m in range(4):
        wrong = {**state, "repeats": state["repeats"].clone()}
        wrong["repeats"][1, m] += 1
        with pytest.raises(ValueError, match=r"'repeats'\]: expected whole numbers, .* at most \[1, 0, 4, 9\], got"):
            session.load_state_dict(wrong)


def test_present_tells_what_the_fusion_is_not_told():
    """With use_present=False a missing modality has a weight, and is missing all the same."""
    session = build(use_present=False).stream(1)
    x = {k: torch.randn(1, d) for k, d in DIMS.items()}
    for flags, broken in (([True, True], False), ([False, True], False), ([True, True], True)):
        y = {**x, "visual": torch.full((1, 21), math.nan)} if broken else x
        out = session.step(y, torch.tensor([flags]))
        assert out.present.tolist() == [[flags[0], not broken]]
        assert (out.weights > 0).all()


# ------------------------------------------------------------------------------------------------------------- bfloat16
def with_rounded_matrices(model):
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(module.weight.bfloat16())
        for name, buffer in rounded.named_buffers():
            if ".components_" in name:
                buffer.copy_(buffer.bfloat16())
    return rounded


def test_bfloat16_rounds_the_matrices_and_nothing_else():
    model = build()
    features, present = draw(2, 120)
    session = model.stream(2, torch.bfloat16)
    outs = stack([keep(session.step(frame(features, t), present[:, t])) for t in range(120)])
    assert_close(outs, offline(with_rounded_matrices(model), features, present))
    difference = (outs.prediction - offline(model, features, present).prediction).abs().max()
    assert 1e-5 < difference < 5e-2


def test_bfloat16_stays_near_float32_with_the_default_model():
    torch.manual_seed(0)
    model = SAGE({"audio": 128, "visual": 512}).eval()
    features, present = draw(1, 200, {"audio": 128, "visual": 512})
    half = model.stream(1, torch.bfloat16)
    outs = stack([keep(half.step(frame(features, t), present[:, t])) for t in range(200)])
    assert (outs.prediction - offline(model, features, present).prediction).abs().max() < 5e-3


# ---------------------------------------------------------------------------------------------------------------- input
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_frame_that_is_not_finite_counts_as_absent(bad):
    model = build()
    features, present = draw(2, 60)
    clean, dirty = model.stream(2), model.stream(2)
    g = torch.Generator().manual_seed(2)
    poisoned = torch.zeros(2, dtype=torch.int64)
    for t in range(60):
        x, p = frame(features, t), present[:, t].clone()
        hit = torch.rand(2, 2, generator=g) < 0.3
        y = {k: v.clone() for k, v in x.items()}
        for m, v in enumerate(y.values()):
            v[hit[:, m], int(torch.randint(v.shape[1], (), generator=g))] = bad
        poisoned += (hit & p).sum(0)
        assert_same(keep(clean.step(x, p & ~hit)), dirty.step(y, p))
    a, b = clean.state_dict(), dirty.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(x.isfinite().all() for x in b.values())
    assert list(dirty.stats.nonfinite.values()) == poisoned.tolist()
    assert min(poisoned) > 0
    assert dirty.stats.absent == clean.stats.absent
    assert clean.stats.nonfinite == {"audio": 0, "visual": 0}


def test_large_values_leave_the_state_finite_and_wash_out():
    """The largest frames that are still taken: nothing overflows into NaN, and later they are forgotten."""
    model = build(stages=2, memory=[8.0])
    calm, shaken = model.stream(1), model.stream(1)
    for t in range(400):
        x = {k: torch.randn(1, d, generator=torch.Generator().manual_seed(t)) for k, d in DIMS.items()}
        a = keep(calm.step(x))
        if t == 50:
            scale = model.get_buffer("input_scale_0")
            x = {k: v * 1e17 for k, v in x.items()}
            assert bool(scale.isfinite().all())
        b = shaken.step(x)
        assert all(v.isfinite().all() for v in b)
    assert shaken.stats.nonfinite == {"audio": 0, "visual": 0}
    torch.testing.assert_close(a.prediction, b.prediction, atol=1e-5, rtol=0)


def test_nothing_for_so_long_that_the_memory_runs_out():
    """The count of a memory is then 0 in float32 before the weight of precise frames is."""
    model = build(memory=[0.5, 2.0])
    with torch.no_grad():
        for head in model.fusion.reliability:
            head[-1].bias[3:] += 8.0
    features, _ = draw(1, 450)
    present = torch.zeros(1, 450, 2, dtype=torch.bool)
    present[:, :10] = present[:, 440:] = True
    session = model.stream()
    outs = stack([keep(session.step(frame(features, t), present[:, t])) for t in range(450)])
    assert_close(outs, offline(model, features, present))
    whole = offline(copy.deepcopy(model).double(), {k: v.double() for k, v in features.items()}, present)
    assert_close(outs, whole._replace(**{field: getattr(whole, field).float() for field in FIELDS}))


def test_what_is_told_of_quality():
    """By name or in order, as tensors or arrays; what is left out is unknown, as NaN is; a missing modality's is not read."""
    model = build(quality_dims={"visual": 2})
    features, present = draw(2, 12)
    quality = told(model, 2, 12)["visual"]
    known, unknown = ([model.stream(2) for _ in range(4)] for _ in range(2))
    for t in range(12):
        x, p, now = frame(features, t), present[:, t], quality[:, t]
        wrong = now.masked_fill(~p[:, 1:], 7.0)
        forms = ({"visual": now}, [None, now.contiguous()], {"visual": now.numpy()}, {"visual": wrong})
        outs = [keep(s.step(x, p, quality=form)) for s, form in zip(known, forms)]
        for out in outs:
            assert_same(outs[0], out)
        forms = (None, {}, [None, None], {"visual": torch.full((2, 2), math.nan)})
        outs = [keep(s.step(x, p, quality=form)) for s, form in zip(unknown, forms)]
        for out in outs:
            assert_same(outs[0], out)
    assert not torch.equal(known[0]._output.confidence, outs[0].confidence)
    assert not unknown[0].state_dict()["quality"].any()


def test_lazily_negated_features():
    model = build()
    features, _ = draw(2, 5)
    a, b = model.stream(2), model.stream(2)
    for t in range(5):
        x = {
            k: v.contiguous() for k, v in frame(features, t).items()
        }  # else it would be copied, and negated, on the way
        want = keep(a.step({k: -v for k, v in x.items()}))
        assert_same(want, b.step({k: torch._neg_view(v) for k, v in x.items()}))


def test_layer_norm_of_a_constant_row_far_from_zero():
    """All channels of an encoder alike, and large: what is left after the LayerNorm is its bias, as in float64."""
    model = build(dim=100)
    with torch.no_grad():
        for m in range(2):
            model.encoders[m].project.weight.zero_()
            model.encoders[m].project.bias.fill_(10001.3)
            for block in model.encoders[m].blocks:
                block.pointwise.weight.zero_()
                block.pointwise.bias.zero_()
    features, present = draw(2, 10)
    session = model.stream(2)
    outs = [keep(session.step(frame(features, t), present[:, t])) for t in range(10)]
    whole = offline(model.double(), {k: v.double() for k, v in features.items()}, present)
    assert_close(stack(outs), whole._replace(**{field: getattr(whole, field).float() for field in FIELDS}))


TAMPERED = {
    "belief": ("probabilities that sum to 1", [1e10, 0.5, -50.0]),
    "counted": ("expected 0 or 1", [0.5, 2.0, -1.0]),
    "energy": ("logarithms of energies", [-100.0, -3e38]),
    "fused.0": ("numbers within 1e+30", [-1e38, 1e30]),
    "history.0": ("numbers within 1e+30", [3e38]),
    "last": ("numbers within 1e+30", [-1e38]),
    "foreign": ("probabilities that sum to 1", [1e10, 0.5, -50.0]),
    "memory": ("no weight or count below 0", [1e38]),
    "quality": ("no weight or count below 0", [1e38, -1.0]),
    "repeats": ("whole numbers, of each modality at most [8, 8]", [9.0, 0.5, -1.0]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_state_that_no_step_leaves_is_refused(name):
    model = build(stuck=8, memory=[8.0], **EVERYTHING)
    session = model.stream(2)
    features, _ = draw(2, 3)
    for t in range(3):
        session.step(frame(features, t), quality=frame(told(model, 2, 3), t))
    before = session.state_dict()
    message, values = TAMPERED[name]
    for value in [*values, math.nan, -math.inf]:
        state = {k: v.clone() for k, v in before.items()}
        state[name].view(-1)[-2] = value
        with pytest.raises(ValueError, match=r"state\['" + re.escape(name) + r"'\]: .*" + re.escape(message)):
            session.load_state_dict(state)
    for at, value in ((-1, -1.0), (-2, -1.0), (0, 1e20)) if name in ("memory", "quality") else ():
        state[name] = before[name].clone()
        state[name][(0,) * (state[name].dim() - 1)][-2] = 1e-15
        state[name][(0,) * (state[name].dim() - 1)][at] = value  # a count, a weight, a sum of next to no weight
        with pytest.raises(ValueError, match="also as averages, and no weight or count below 0"):
            session.load_state_dict(state)
    assert all(torch.equal(x, session.state_dict()[k]) for k, x in before.items())


@pytest.mark.parametrize("seed", range(8))
def test_a_state_that_is_taken_never_becomes_nan(seed):
    """The largest and oddest numbers that load_state_dict takes, then frames of every size."""
    model = build(stuck=3, memory=[2.0, 100.0], seed=seed, **EVERYTHING)
    session = model.stream(3)
    g = torch.Generator().manual_seed(seed)
    state = session.state_dict()
    for name, x in state.items():
        if name in ("belief", "foreign"):
            x.copy_((1e3 * torch.rand(x.shape, generator=g)).log_softmax(-1))
        elif name == "counted":
            x.copy_(torch.rand(x.shape, generator=g) < 0.5)
        elif name == "energy":
            x.copy_(
                torch.where(
                    torch.rand(x.shape, generator=g) < 0.2, math.inf, 100 * torch.rand(x.shape, generator=g) - 18
                )
            )
        elif name == "repeats":
            x.copy_(torch.randint(0, 4, x.shape, generator=g))
        elif name != "frames":
            x.copy_(10.0 ** (60 * torch.rand(x.shape, generator=g) - 30.1))
            sums = x
            if name in ("memory", "quality"):  # of averages of every size
                x[..., -2:] *= torch.rand(x[..., -2:].shape, generator=g) > 0.1
                sums = x[..., :-2]
                sums.mul_(x[..., -2:-1]).clamp_(max=9e29)
            sums.mul_(torch.randn(sums.shape, generator=g).sign())
    session.load_state_dict(state)
    for t in range(60):
        size = 10.0 ** (20 * torch.rand(3, 1, generator=g)) if t < 20 else torch.ones(3, 1)
        sure = {k: size * torch.randn(3, q, generator=g) for k, q in EVERYTHING["quality_dims"].items()}
        out = session.step({k: size * torch.randn(3, d, generator=g) for k, d in DIMS.items()}, quality=sure)
        assert all(bool(x.isfinite().all()) for x in out), t
    state = session.state_dict()
    assert not any(bool(x.isnan().any()) for x in state.values())


def test_absent_modalities_and_inactive_rows_are_not_read():
    model = build()
    features, present = draw(3, 25)
    a, b = model.stream(3), model.stream(3)
    for t in range(25):
        active = torch.tensor([True, t % 2 == 0, False])
        x, p = frame(features, t), present[:, t]
        unread = ~(p & active[:, None])
        y = {k: v.masked_fill(unread[:, m, None], math.nan) for m, (k, v) in enumerate(x.items())}
        assert_same(keep(a.step(x, p, active)), b.step(y, p, active))
    assert b.stats.nonfinite == {"audio": 0, "visual": 0}
    assert b.state_dict()["frames"].tolist() == [25, 13, 0]
    assert not any(out[2].any() for out in b.step(frame(features, 0), None, active))


def test_a_modality_gone_for_good():
    model = build()
    features, present = draw(1, 100)
    present[:, 40:, 1] = False
    session = model.stream()
    outs = stack([keep(session.step(frame(features, t), present[:, t])) for t in range(100)])
    assert_close(outs, offline(model, features, present))
    assert not outs.weights[:, 40:, 1].any()


def test_numpy_strided_and_torch_inputs_agree():
    model = build()
    features, present = draw(2, 12)
    sessions = [model.stream(2) for _ in range(3)]
    for t in range(12):
        x, p = frame(features, t), present[:, t]  # rows of a (2, 12, d) tensor: not contiguous
        a = sessions[0].step({k: v.contiguous() for k, v in x.items()}, p.contiguous())
        assert_same(a, sessions[1].step(x, p))
        arrays = {k: v.numpy() for k, v in x.items()}
        arrays["audio"] = np.asfortranarray(arrays["audio"])
        arrays["audio"].flags.writeable = False
        assert_same(a, sessions[2].step(arrays, p.numpy(), np.ones(2, bool)))


def test_mode_dtype_and_inference_mode_do_not_matter():
    model = build()
    features, present = draw(2, 20)
    whole = offline(model, features, present)
    with torch.inference_mode():
        session = copy.deepcopy(model).double().train().stream(2)
    session.reset(1)
    outs = []
    for t in range(20):
        with torch.inference_mode(t % 2 == 0):
            outs.append(keep(session.step(frame(features, t), present[:, t])))
    assert_close(stack(outs), whole)


def test_the_page_shows_code_that_runs():
    text = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    features = {k: torch.randn(2, d) for k, d in DIMS.items()}
    names = {"model": build(), "features": features, **features, "present": torch.ones(2, 2, dtype=torch.bool)}
    names |= {"active": torch.tensor([True, False]), "other": names["model"].stream(6)}
    exec(code, names)
    assert names["session"].state_dict()["frames"].tolist() == [2, 0]
    assert names["other"].state_dict(5)["frames"].tolist() == [2]


def test_later_changes_of_the_model_are_not_seen():
    model = build()
    features, present = draw(1, 10)
    whole, session = offline(model, features, present), model.stream()
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.fill_(math.nan if x.is_floating_point() else 1)
    del model
    gc.collect()
    assert_close(stack([keep(session.step(frame(features, t), present[:, t])) for t in range(10)]), whole)


# ---------------------------------------------------------------------------------------------------------------- state
def test_a_stream_moves_between_sessions_to_the_bit():
    model = build()
    features, present = draw(4, 90)
    stay, here, there = model.stream(4), model.stream(4), model.stream(2)
    others = draw(2, 90, seed=7)
    for t in range(40):
        stay.step(frame(features, t), present[:, t])
        here.step(frame(features, t), present[:, t])
        there.step(frame(others[0], t), others[1][:, t])
    untouched = there.state_dict(0)
    there.load_state_dict(here.state_dict(3), 1)
    assert all(torch.equal(v, untouched[k]) for k, v in there.state_dict(0).items())
    for t in range(40, 90):
        a = stay.step(frame(features, t), present[:, t])
        mixed = {k: torch.stack([others[0][k][0, t], features[k][3, t]]) for k in DIMS}
        b = there.step(mixed, torch.stack([others[1][0, t], present[3, t]]))
        assert_same(StreamOutput(*(v[3] for v in a)), StreamOutput(*(v[1] for v in b)))


def test_state_round_trip_is_exact_and_survives_saving(tmp_path):
    model = build()
    features, present = draw(2, 50)
    session = model.stream(2)
    for t in range(33):
        session.step(frame(features, t), present[:, t], torch.tensor([True, t % 3 > 0]))
    state = session.state_dict()
    torch.save(state, tmp_path / "state.pt")
    other = model.stream(2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again = other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[k], again[k]) for k in state)
    for t in range(33, 50):
        a = keep(session.step(frame(features, t), present[:, t]))
        assert_same(a, other.step(frame(features, t), present[:, t]))


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_the_offline_model(kind):
    """The documented layout: part for part the SAGEState of the same frames."""
    model = build(**KINDS[kind])
    features, present = draw(2, 47)
    session, quality = model.stream(2), told(model, 2, 47)
    for t in range(47):
        session.step(frame(features, t), present[:, t], quality=frame(quality, t))
    state, whole = session.state_dict(), offline(model, features, present, quality).state
    expected = {f"history.{i}": x for i, x in enumerate(whole.history)} | {
        f"fused.{i}": x for i, x in enumerate(whole.fused)
    }
    if whole.fusion is not None:
        expected |= whole.fusion._asdict()
    expected |= {
        "repeats": whole.still[0].float(),
        "last": whole.still[1],
        "memory": whole.memory,
        "foreign": whole.foreign,
    }
    expected = {name: x for name, x in expected.items() if x is not None}
    for name, x in expected.items():
        rtol = 1e-4 if name == "memory" else 1e-5  # precisions, exp of what is rounded to float32
        torch.testing.assert_close(state[name], x, atol=1e-5, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    assert set(state) == {"frames", *expected}


def test_reset_begins_a_new_stream_in_its_rows_only():
    model = build()
    features, present = draw(3, 60)
    session, fresh = model.stream(3), model.stream(3)
    for t in range(30):
        session.step(frame(features, t), present[:, t])
    before = session.state_dict([0, 2])
    session.reset(1)
    assert all(torch.equal(x, before[k]) for k, x in session.state_dict([0, 2]).items())
    assert all(torch.equal(x, fresh.state_dict(1)[k]) for k, x in session.state_dict(1).items())
    for t in range(30, 60):
        a = session.step(frame(features, t), present[:, t])
        b = fresh.step(frame(features, t), present[:, t])
        assert_same(StreamOutput(*(v[1] for v in a)), StreamOutput(*(v[1] for v in b)))
    session.reset()
    assert session.state_dict()["frames"].tolist() == [0, 0, 0]


class Streams:
    """What hypothesis plays with: sessions of several sizes, and beside each row the list of frames that it has taken."""

    def __init__(self, model, sizes, seed):
        self.model, self.sessions = model, [model.stream(n) for n in sizes]
        self.taken = [[[] for _ in range(n)] for n in sizes]
        self.features, self.present = draw(1, 4000, seed=seed)
        self.clock = 0

    def step(self, which, active):
        session = self.sessions[which]
        index = torch.arange(self.clock, self.clock + session.batch_size) % 4000
        self.clock += session.batch_size
        mask = torch.tensor([active >> r & 1 for r in range(session.batch_size)], dtype=torch.bool)
        out = session.step({k: v[0, index] for k, v in self.features.items()}, self.present[0, index], mask)
        for r in mask.nonzero().flatten().tolist():
            self.taken[which][r].append((int(index[r]), StreamOutput(*(v[r].clone() for v in out))))

    def reset(self, which, row):
        self.check(which, row)
        self.sessions[which].reset(row)
        self.taken[which][row] = []

    def move(self, a, row_a, b, row_b):
        self.check(b, row_b)
        self.sessions[b].load_state_dict(self.sessions[a].state_dict(row_a), row_b)
        self.taken[b][row_b] = list(self.taken[a][row_a])

    def check(self, which, row):
        taken = self.taken[which][row]
        assert int(self.sessions[which].state_dict(row)["frames"]) == len(taken)
        if taken:
            index = [i for i, _ in taken]
            whole = offline(self.model, {k: v[:, index] for k, v in self.features.items()}, self.present[:, index])
            outs = StreamOutput(*(torch.stack(x)[None] for x in zip(*(out for _, out in taken))))
            assert_close(outs, whole)


SIZES = (1, 3, 5)
STEPS = st.tuples(st.just("step"), st.integers(0, 2), st.integers(0, 31), st.integers(1, 25))
RESETS = st.tuples(st.just("reset"), st.integers(0, 2), st.integers(0, 4))
MOVES = st.tuples(st.just("move"), st.integers(0, 2), st.integers(0, 4), st.integers(0, 2), st.integers(0, 4))


@settings(max_examples=25)
@given(events=st.lists(st.one_of(STEPS, STEPS, RESETS, MOVES), max_size=25), seed=st.integers(0, 3))
def test_any_order_of_events(events, seed):
    streams = Streams(EVENT_MODEL, SIZES, seed)
    for kind, which, *rest in events:
        if kind == "step":
            for _ in range(rest[1]):
                streams.step(which, rest[0])
        elif kind == "reset":
            streams.reset(which, rest[0] % SIZES[which])
        else:
            row_a, to, row_b = rest
            if (which, row_a % SIZES[which]) != (to, row_b % SIZES[to]):
                streams.move(which, row_a % SIZES[which], to, row_b % SIZES[to])
    for which, size in enumerate(SIZES):
        for row in range(size):
            streams.check(which, row)


EVENT_MODEL = build(seed=4)


# --------------------------------------------------------------------------------------------------------------- threads
CALLS = {
    "step": lambda s, x: s.step(x),
    "reset": lambda s, x: s.reset(),
    "state_dict": lambda s, x: s.state_dict(0),
    "load_state_dict": lambda s, x: s.load_state_dict(s.kept, 0),
    "stats": lambda s, x: s.stats,
}


# Two short calls seldom meet.
PAIRS = [(a, b) for a in CALLS for b in CALLS if {a, b} & {"step", "reset"}]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_call_at_a_time_and_the_gil_is_free_meanwhile(first, second):
    """While one thread is inside a call, another runs Python, and whichever of the two comes second is refused with nothing
    changed."""
    session, done, refused = build().stream(4096), threading.Event(), []
    session.kept = session.state_dict(0)
    x = {k: torch.randn(4096, d) for k, d in DIMS.items()}

    def work(call):
        deadline = time.monotonic() + 20
        while not done.is_set() and time.monotonic() < deadline:
            try:
                call(session, x)
            except RuntimeError as error:
                refused.append(str(error))
                done.set()

    worker = threading.Thread(target=work, args=(CALLS[first],))
    worker.start()
    work(CALLS[second])
    worker.join()
    assert refused
    assert all("in use by another thread" in r for r in refused)
    assert session.step(x).prediction.isfinite().all()
    assert session.stats.frames % 4096 == 0


def test_outputs_and_state_are_changed_together():
    """A step and a reset, or a loaded state, that begin at the same moment: whichever comes last, or alone if the other is
    refused, has written both the state and the outputs."""
    rows = 512
    session, meet = build().stream(rows), threading.Barrier(2)
    x, fresh = {k: torch.randn(rows, d) for k, d in DIMS.items()}, session.state_dict()
    undo = itertools.cycle([session.reset, lambda: session.load_state_dict(fresh)])

    def at_once(call):
        meet.wait()
        with contextlib.suppress(RuntimeError):
            call()

    for _ in range(150):
        threads = [threading.Thread(target=at_once, args=(c,)) for c in (lambda: session.step(x), next(undo))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begun = session.state_dict()["frames"] > 0
        assert torch.equal(begun, session._output.weights.sum(1) > 0.5)
        assert torch.equal(begun, session._output.present.all(1))
        assert torch.equal(begun, session._output.stage.sum(1) > 0.5)


# ---------------------------------------------------------------------------------------------------------------- errors
def bad(name, value):
    return lambda s, x, p: s.step({**x, name: value(x[name])}, p)


ERRORS = [
    (lambda s, x, p: s.step(x["audio"]), TypeError, "features: expected a sequence or a mapping"),
    (lambda s, x, p: s.step([x["audio"]]), ValueError, "features: expected 2 modalities, got 1"),
    (lambda s, x, p: s.step({"audio": x["audio"]}), ValueError, r"expected the modalities \['audio', 'visual'\]"),
    (bad("audio", lambda v: v.double()), TypeError, r"features\[audio\]: expected a float32 .* got torch.float64"),
    (bad("audio", lambda v: v.numpy().astype(">f4")), TypeError, r"features\[audio\]: expected a float32 .* got >f4"),
    (bad("audio", lambda v: v.tolist()), TypeError, r"features\[audio\]: expected a float32 .* got list"),
    (bad("visual", lambda v: v[:, :-1]), ValueError, r"features\[visual\]: expected \(2, 21\), got \(2, 20\)"),
    (bad("visual", lambda v: v[0]), ValueError, r"features\[visual\]: expected \(2, 21\), got \(21,\)"),
    (bad("visual", lambda v: v.to("meta")), ValueError, r"features\[visual\]: expected a dense tensor on the CPU.*, .* meta"),
    (bad("visual", lambda v: v.to_sparse()), ValueError, r"features\[visual\]: expected a dense tensor on the CPU"),
    (lambda s, x, p: s.step(x, p.float()), TypeError, "present: expected a bool"),
    (lambda s, x, p: s.step(x, p[:, :1]), ValueError, r"present: expected \(2, 2\), got \(2, 1\)"),
    (lambda s, x, p: s.step(x, p, p), ValueError, r"active: expected \(2,\), got \(2, 2\)"),
    (lambda s, x, p: s.step(x, p, [True, True]), TypeError, "active: expected a bool .* got list"),
    (lambda s, x, p: s.step(x, p, quality={"audio": x["audio"]}), ValueError, "quality: expected None .*without quality_dims"),
    (lambda s, x, p: s.step(x, p, quality=1.0), TypeError, "quality: expected a mapping, a sequence or None, got float"),
    (lambda s, x, p: s.reset(2), ValueError, r"rows: expected indices in \[0, 2\), got \[2\]"),
    (lambda s, x, p: s.reset([-1]), ValueError, r"rows: expected indices in \[0, 2\), got \[-1\]"),
    (lambda s, x, p: s.reset(torch.tensor([True])), ValueError, r"rows: expected a bool tensor \(2,\)"),
    (lambda s, x, p: s.reset(0.5), TypeError, "rows: expected integers"),
    (lambda s, x, p: s.reset("all"), TypeError, "rows: expected an index"),
    (lambda s, x, p: s.load_state_dict(s.state_dict(0)), ValueError, r"state\[.*\]: expected \(2,.*\), got \(1,.*\)"),
    (lambda s, x, p: s.load_state_dict(s.state_dict(), [1, 1]), ValueError, "rows: expected distinct"),
    (lambda s, x, p: s.load_state_dict([]), TypeError, "state: expected a mapping"),
    (lambda s, x, p: s.load_state_dict({}), ValueError, "state: expected the keys"),
    (lambda s, x, p: s.load_state_dict({**s.state_dict(), "last": 0}), TypeError, r"state\['last'\]: expected a torch.float32"),
    (lambda s, x, p: s.load_state_dict({**s.state_dict(), "belief": torch.full((2, 3), math.nan)}), ValueError,
     r"state\['belief'\]: expected logarithms"),
    (lambda s, x, p: s.load_state_dict({**s.state_dict(), "frames": torch.tensor([1, -1])}), ValueError,
     r"expected numbers in \[0, 2\*\*62\)"),
    (lambda s, x, p: build(causal=False).stream(), ValueError, "model: expected a causal SAGE"),
    (lambda s, x, p: build(fusion="concat").stream(), ValueError, "model: expected fusion=.* 'concat'"),
    (lambda s, x, p: build().stream(0), ValueError, "batch_size.* >= 1"),
    (lambda s, x, p: build().stream(1.0), TypeError, "batch_size.* int"),
    (lambda s, x, p: build().stream(1, torch.float16), ValueError, "weights_dtype: expected torch.float32 or torch.bfloat16"),
    (lambda s, x, p: build().stream(1, "bfloat16"), TypeError, "weights_dtype: expected a torch.dtype"),
    (lambda s, x, p: StreamingSession(torch.nn.Linear(2, 2)), TypeError, "model: expected a SAGE, got Linear"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_errors_name_the_argument_and_move_nothing(call, error, match):
    session = build().stream(2)
    features, present = draw(2, 3)
    session.step(frame(features, 0), present[:, 0])
    before, stats = session.state_dict(), session.stats
    with pytest.raises(error, match=match):
        call(session, frame(features, 1), present[:, 1])
    assert all(torch.equal(x, before[k]) for k, x in session.state_dict().items())
    assert session.stats == stats


QUALITY_ERRORS = [
    ({"audio": torch.zeros(2, 1)}, ValueError, r"quality: expected some of \['visual'\].* got 'audio'"),
    ([torch.zeros(2, 1), None], ValueError, r"quality\[audio\]: expected None \(no quality_dims\)"),
    ([None], ValueError, "quality: expected an array or None for each of 2 modalities, got 1"),
    ({"visual": torch.zeros(2, 1)}, ValueError, r"quality\[visual\]: expected \(2, 3\), got \(2, 1\)"),
    ({"visual": torch.zeros(2, 3).double()}, TypeError, r"quality\[visual\]: expected a float32 .* got torch.float64"),
    ({"visual": [[0.0] * 3] * 2}, TypeError, r"quality\[visual\]: expected a float32 .* got list"),
    (torch.zeros(2, 3), TypeError, "quality: expected a mapping, a sequence or None, got Tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("quality", "error", "match"), QUALITY_ERRORS)
def test_errors_name_the_quality_and_move_nothing(quality, error, match):
    session = build(quality_dims={"visual": 3}).stream(2)
    features, present = draw(2, 1)
    before = session.state_dict()
    with pytest.raises(error, match=match):
        session.step(frame(features, 0), present[:, 0], quality=quality)
    assert all(torch.equal(x, before[k]) for k, x in session.state_dict().items())


def test_equal_weights_read_no_quality_here():
    with pytest.raises(ValueError, match='model: expected fusion="reliability" to read quality'):
        build(fusion="uniform", quality_dims={"audio": 1}).stream()


def test_a_model_with_broken_weights_is_refused():
    model = build()
    with torch.no_grad():
        model.head[0].bias[3] = math.nan
    with pytest.raises(ValueError, match=r"model: expected finite numbers in 'head.0.bias'"):
        model.stream()


# ------------------------------------------------------------------------------------------------ the model's description
def opened(model, change):
    """Opens a native session on what `change` makes of the model's tensors, a list of (name, tensor)."""
    shape = stream._shape(model, torch.float32)
    tensors = change(list(stream._tensors(model, _C.describe_stream(shape)[0]).items()))
    return _C.cpu.open_session(shape, [(n, tuple(x.shape), x.data_ptr()) for n, x in tensors], 1, 1)


def index(tensors, name):
    return [n for n, _ in tensors].index(name)


def swapped(tensors, a, b):
    i, j = index(tensors, a), index(tensors, b)
    tensors[i], tensors[j] = tensors[j], tensors[i]
    return tensors


NAMES = [
    (lambda t: swapped(t, "norm.weight", "norm.bias"), r"expected 'norm.weight' \(20\), got 'norm.bias' \(20\)"),
    (lambda t: swapped(t, "encoders.0.blocks.0.pointwise.weight", "fused_blocks.1.pointwise.weight"),
     r"expected 'encoders.0.blocks.0.pointwise.weight' \(20, 20\), got 'fused_blocks.1.pointwise.weight' \(20, 20\)"),
    (lambda t: swapped(t, "fusion.typicality.mean", "fusion.typicality.std"), r"expected 'fusion.typicality.mean' \(2, 3\)"),
    (lambda t: [(n, x.T if n == "fusion.log_a" else x[:-1] if n == "memory.decay" else x) for n, x in t],
     r"expected 'memory.decay' \(3\), got 'memory.decay' \(2\)"),
    (lambda t: swapped(t, "stuck_limit", "memory.decay"), r"expected 'stuck_limit' \(2\), got 'memory.decay' \(3\)"),
    (lambda t: [x for x in t if x[0] != "stuck_limit"], r"expected 'stuck_limit' \(2\), got 'memory.decay' \(3\)"),
    (lambda t: t[:-1], r"expected 'head.3.bias' \(2\), got no more tensors"),
    (lambda t: [*t, ("unimodal.0.weight", torch.zeros(2))], "'unimodal.0.weight' is none of this model's tensors"),
    (lambda t: t[1:], r"expected 'input_mean_0' \(7\), got 'input_scale_0' \(7\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), NAMES)
def test_tensors_are_checked_by_name(change, match):
    model = build()
    opened(model, list)
    with pytest.raises(ValueError, match=match):
        opened(model, change)


def test_the_manifest_is_the_state_dict_and_what_is_folded():
    """Every tensor of the model is listed under its own name, or folded into one that is."""
    model = build(**EVERYTHING)
    names = {name for name, _ in _C.describe_stream(stream._shape(model, torch.float32))[0]}
    state, folded = set(model.state_dict()), set(stream._folded(model))
    assert names <= state | folded
    assert folded <= names
    training = {name for name in state if name.startswith("frame_heads.") or name.endswith((".updates", ".fitted"))}
    assert state - names - training == {
        "fusion.typicality.var", "fusion.typicality.components_0", "fusion.typicality.components_1", "fusion.quality.var",
        "fusion.log_temperature", "fusion.transition", "fusion.sharpening", "memory.log_prior", "own_gain", "own_shift",
        "target_variance",
    }  # fmt: skip


def test_a_model_that_drifts_is_refused_by_name():
    model = build()
    without = model.state_dict()
    del without["fusion.value.1.bias"]
    model.state_dict = lambda: without
    with pytest.raises(KeyError, match=r"'fusion.value.1.bias'"):
        model.stream()
    model = build()
    model.norm = torch.nn.LayerNorm(21)
    with pytest.raises(ValueError, match=r"expected 'norm.weight' \(20,\), got \(21,\)"):
        model.stream()
    shape = stream._shape(build(), torch.float32)
    with pytest.raises(KeyError, match="kernel"):
        _C.describe_stream({name: number for name, number in shape.items() if name != "kernel"})
    with pytest.raises(ValueError, match="no known name"):
        _C.describe_stream({**shape, "depth": 3})


# --------------------------------------------------------------------------------------------------------------- stamina
def resident() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))  # KiB


def march(steps, chunk=10_000):
    """Steps of one stream in which every chunk repeats the same frames: by how much memory grew in the steps after the
    second chunk (the offline model's own allocations, between chunks, aside), and the last chunk against the offline
    model, whose state is carried through all of them."""
    model = build(dims={"a": 3, "b": 4}, dim=8, evidence_dim=4, stages=2)
    features, present = draw(1, chunk, {"a": 3, "b": 4}, seed=1)
    frames = [([v[0, t : t + 1] for v in features.values()], present[0, t : t + 1]) for t in range(chunk)]
    frames = [(dict(zip(features, x)), p) for x, p in frames]
    session, state, growth = model.stream(), None, 0
    for i in range(steps // chunk):
        last = i == steps // chunk - 1
        outs, before = [], resident()
        for x, p in frames:
            out = session.step(x, p)
            if last:
                outs.append(keep(out))
        if i > 1 and not last:
            growth += resident() - before
        with torch.no_grad():
            whole = model(features, present, None, state)
        state = whole.state
    assert session.stats.frames == steps
    assert_close(stack(outs), whole)
    return growth


@pytest.mark.slow
def test_a_million_steps_without_growth_or_drift():
    assert march(1_000_000) < 4096


@pytest.mark.slow
@pytest.mark.skipif("SAGE_TEST_STREAM_STEPS" not in os.environ, reason="SAGE_TEST_STREAM_STEPS=10000000: minutes")
def test_many_more_steps_without_growth_or_drift():
    assert march(int(os.environ["SAGE_TEST_STREAM_STEPS"])) < 4096
