"""SAGE: chunks, padding, missing data, statistics, compile and export, its loss, and that it learns."""

import copy
import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scores import numpy_ccc

from sage_ext.models import SAGE, SAGELoss, SAGEState
from sage_ext.models import sage as sage_module
from sage_ext.nn import ReliabilityNLL
from sage_ext.nn import fusion as fusion_module

DIMS = {"audio": 7, "visual": 11}
BATCH, FRAMES = 2, 70
FIELDS = ("prediction", "unimodal", "weights", "confidence", "stage")


def draw(seed=0, batch=BATCH, frames=FRAMES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    features = {
        k: (2.0 + torch.randn(batch, frames, d, generator=g, dtype=torch.float64)).to(dtype) for k, d in DIMS.items()
    }
    present = torch.rand(batch, frames, 2, generator=g) > 0.2
    return features, present


def build(seed=0, statistics=True, limits=None, **options):
    torch.manual_seed(seed)
    model = SAGE(DIMS, **{"dim": 12, "evidence_dim": 8, "stages": 3, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if statistics:
        features, present = draw(9)
        model.fit_statistics([{"features": features, "present": present}])
    if limits is not None:
        model.stuck_limit.copy_(torch.tensor(limits))
    return model.eval()


def close(a, b, tol=1e-5, fields=FIELDS):
    for field in fields:
        torch.testing.assert_close(
            getattr(a, field), getattr(b, field), atol=tol, rtol=tol, msg=lambda m, field=field: f"{field}: {m}"
        )


# -------------------------------------------------------------------------------------------------------------- chunks
@pytest.mark.parametrize(
    "options", [{}, {"fusion": "uniform"}, {"fused_blocks": 0}, {"fused_blocks": 4}, {"limits": (13, 0)}]
)
@settings(max_examples=8, deadline=None)
@given(points=st.lists(st.integers(1, FRAMES - 1), max_size=6), seed=st.integers(0, 1000))
def test_chunks_equal_the_whole(options, points, seed):
    model = build(**options)
    features, present = draw(seed)
    mask = torch.ones(BATCH, FRAMES, dtype=torch.bool)
    mask[0, 50:] = False
    features["audio"][0, 12:34] = features["audio"][0, 12:13]  # stuck
    features["visual"][1, 30:] = features["visual"][1, 30:31]
    present[0, 12:34, 0] = present[1, 30:, 1] = True
    whole = model(features, present, mask)
    parts, state = [], None
    for a, b in pairwise(sorted({0, FRAMES, *points})):
        parts.append(model({k: v[:, a:b] for k, v in features.items()}, present[:, a:b], mask[:, a:b], state))
        state = parts[-1].state
    for field in FIELDS:
        joined = torch.cat([getattr(p, field) for p in parts], 1)
        torch.testing.assert_close(joined, getattr(whole, field), atol=1e-5, rtol=1e-5)


def test_frame_by_frame_equals_the_whole_and_state_is_tensors():
    model = build()
    features, present = draw()
    whole, state, steps = model(features, present), None, []
    for t in range(FRAMES):
        out = model({k: v[:, t : t + 1] for k, v in features.items()}, present[:, t : t + 1], None, state)
        state = out.state
        steps.append(out)
    for field in FIELDS:
        torch.testing.assert_close(
            torch.cat([getattr(s, field) for s in steps], 1), getattr(whole, field), atol=1e-5, rtol=1e-5
        )
    assert isinstance(state, SAGEState)
    assert [tuple(h.shape) for h in state.history] == [(BATCH, 2, 4, 12), (BATCH, 2, 8, 12)]
    assert [tuple(h.shape) for h in state.fused] == [(BATCH, 3, 16, 12), (BATCH, 3, 32, 12)]
    assert all(isinstance(x, torch.Tensor) for x in (*state.history, *state.fused, *state.fusion[:4]))


def test_causal_ignores_the_future_and_centred_does_not():
    features, present = draw()
    later = {k: torch.cat([v[:, :40], v[:, 40:] + 1.0], 1) for k, v in features.items()}
    model = build()
    a, b = model(features, present), model(later, present)
    for field in FIELDS:
        assert torch.equal(getattr(a, field)[:, :40], getattr(b, field)[:, :40])
    assert (a.prediction[:, 40:] - b.prediction[:, 40:]).abs().max() > 1e-3
    centred = build(causal=False)
    a, b = centred(features, present), centred(later, present)
    assert (a.prediction[:, 39] - b.prediction[:, 39]).abs().max() > 1e-4
    assert a.state is None


@pytest.mark.parametrize("fusion", ["reliability", "uniform"])
def test_unimodal_is_what_the_model_says_with_that_modality_alone(fusion):
    # With more stages the other modality has a say in the stage, and so in the memory.
    model = build(fusion=fusion, stages=1, joint=False)
    features, present = draw()
    out = model(features, present)
    for m in range(2):
        lone = torch.zeros_like(present)
        lone[..., m] = present[..., m]
        alone = model(features, lone).prediction
        there = present[..., m]
        torch.testing.assert_close(out.unimodal[:, :, m][there], alone[there], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused_blocks", [0, 2])
def test_receptive_field_is_as_documented(fused_blocks):
    model = build(fusion="uniform", fused_blocks=fused_blocks, memory=())
    features, _ = draw(batch=1)
    x = {k: v.requires_grad_() for k, v in features.items()}
    model(x).prediction[0, -1].sum().backward()
    reached = x["audio"].grad[0].abs().sum(-1) > 0
    assert reached[-61:].all()
    assert not reached[:-61].any()


@pytest.mark.parametrize("fusion", ["reliability", "uniform", "late", "concat"])
def test_features_are_checked_once(fusion, monkeypatch):
    """By SAGE; its fusion takes them as checked."""
    model, (features, present), seen = build(fusion=fusion), draw(), []
    for module in (sage_module, fusion_module):
        check = module.ordered_features
        monkeypatch.setattr(module, "ordered_features", lambda *args, check=check: seen.append(args) or check(*args))
    model(features, present)
    assert len(seen) == 1
    inputs = {k: torch.zeros(2, 3, d) for k, d in DIMS.items()}
    model.fusion(dict.fromkeys(DIMS, torch.zeros(2, 3, 12)), typicality_inputs=inputs)
    assert len(seen) == 3


# -------------------------------------------------------------------------------------------------------------- memory
def test_memory_remembers_beyond_the_convolutions():
    features, _ = draw(batch=1, frames=200)
    x = {k: v.requires_grad_() for k, v in features.items()}
    build()(x).prediction[0, -1].sum().backward()
    assert (x["audio"].grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("bad", [(0.0,), (-1.0,), (float("nan"),), (float("inf"),), (4.0,) * 9])
def test_bad_half_lives_are_named(bad):
    with pytest.raises(ValueError, match="memory: expected at most 8 half-lives"):
        SAGE(DIMS, memory=bad)


@pytest.mark.parametrize("bad", [8.0, "8", ("a",)])
def test_a_memory_is_a_sequence_of_numbers(bad):
    with pytest.raises(TypeError, match="memory: expected a sequence of half-lives"):
        SAGE(DIMS, memory=bad)


# ------------------------------------------------------------------------------------------------------- stuck modality
@pytest.mark.parametrize("fusion", ["reliability", "uniform"])
@pytest.mark.parametrize("stuck", [1, 3, 8])
def test_a_frame_that_repeats_too_often_is_missing(fusion, stuck):
    model = build(fusion=fusion, stuck=stuck)
    features, present = draw()
    features["audio"][0, 10:31] = features["audio"][0, 10:11]
    features["visual"][1, 40:] = 0.0  # a dead sensor: zeros, far from the mean
    present[0, 10:31, 0] = present[1, 40:, 1] = True
    told = present.clone()
    told[0, 10 + stuck : 31, 0] = False  # frame 10 is new, the stuck-th repeat is the first that is missing
    told[1, 40 + stuck :, 1] = False
    close(model(features, present), build(fusion=fusion, stuck=0)(features, told), 1e-6)


def test_repeats_begin_anew_after_a_gap_or_a_change():
    model = build(stuck=4)
    features, present = draw()
    present[:] = True
    features["audio"][0, 5:20] = features["audio"][0, 5:6]
    features["audio"][0, 8, 3] += 1e-4  # the smallest of movements
    features["audio"][0, 9:12] = features["audio"][0, 8:9]
    present[0, 15, 0] = False
    told = present.clone()
    # 5-7 hold, 8 moves, 9-11 are its repeats 1 to 3, 12-14 stand still anew, 15 is a gap, 16 is new, 17-19 repeats
    close(model(features, present), build(stuck=0)(features, told), 1e-6)
    features["audio"][0, 9:14] = features["audio"][0, 8:9]
    told[0, 12:14, 0] = False
    close(model(features, present), build(stuck=0)(features, told), 1e-6)


def test_stuck_frames_reach_nothing_and_peers_take_the_rule_too():
    features, present = draw()
    features["audio"][:, 20:40] = 7.0
    present[:] = True
    for fusion in ("reliability", "can"):
        model = build(fusion=fusion, stuck=8)
        x = {k: v.clone().requires_grad_() for k, v in features.items()}
        out = model(x, present)
        (out.prediction.sum() + out.unimodal.sum()).backward()
        assert (x["audio"].grad[:, 28:40] == 0).all()
        assert (x["audio"].grad[:, 20:28].abs().sum(-1) > 0).all()
    assert SAGE(DIMS, fusion="can").config["stuck"] == 0
    assert SAGE(DIMS, fusion="can").config["memory"] == []
    assert build(fusion="late", memory=(4.0,))(features, present).prediction.isfinite().all()
    for bad in ({"stuck": -1}, {"stuck": 4, "use_present": False}):
        with pytest.raises(ValueError, match="stuck"):
            SAGE(DIMS, **bad)


@pytest.mark.parametrize("limits", [(5, 20), (20, 0), (0, 1)])
def test_each_modality_has_a_limit_of_its_own(limits):
    model, frames = build(limits=limits), torch.arange(FRAMES)
    features, present = draw()
    present[:] = True
    for v in features.values():
        v[:, 10:60] = v[:, 10:11]
    told = present.clone()
    for m, limit in enumerate(limits):
        told[:, (frames >= 10 + limit) & (frames < 60) & (limit > 0), m] = False
    out = model(features, present)
    close(out, build(stuck=0)(features, told), 1e-6)
    assert (told == (out.confidence > 0)).all()


def rest(repeats, windows=slice(None)):
    """Frame 10 of these windows is repeated so often."""

    def change(v):
        v[windows, 10 : 11 + repeats] = v[windows, 10:11].clone()

    return change


def rest_but_for_a_dead_feature(v):
    rest(12)(v)
    v[..., 0] = 1e-9 * torch.randn(v.shape[:2])


def rest_at_both_ends(v):
    v[:, :5] = v[:, -5:] = 0.5


# What a modality does in 50 windows of 60 frames; the limits that it gets with `stuck` 8 and 20.
RESTS = {
    "never": (rest(0), 8, 20),
    "4 repeats": (rest(4), 8, 20),
    "5 repeats": (rest(5), 10, 20),
    "12 repeats": (rest(12), 24, 24),
    "29 repeats": (rest(29), 58, 58),
    "half a window": (rest(30), 0, 0),
    "3 in 3,000 frames for longer than 4 repeats": (rest(7, slice(1)), 8, 20),
    "4 of them": (rest(8, slice(1)), 10, 20),
    "one dead window": (rest(49, slice(1)), 0, 0),
    "a dead feature moves": (rest_but_for_a_dead_feature, 24, 24),
    "windows do not meet": (rest_at_both_ends, 8, 20),
    "all the time": (lambda v: v.fill_(1.0), 0, 0),
}


@pytest.mark.parametrize("fusion", ["reliability", "can"])  # the second has no use for the frames
@pytest.mark.parametrize("case", RESTS)
def test_limits_are_learnt(case, fusion):
    change, *expected = RESTS[case]
    features, _ = draw(batch=50, frames=60)
    change(features["audio"])
    batches = [{"features": {k: v[i : i + 10] for k, v in features.items()}} for i in range(0, 50, 10)]
    for stuck, limit in zip((8, 20, 0), (*expected, 0)):
        model = build(statistics=False, fusion=fusion, stuck=stuck)
        assert model.stuck_limit.tolist() == [stuck, stuck]
        model.fit_statistics(batches)
        assert model.stuck_limit.tolist() == [limit, stuck]


def test_limits_are_learnt_from_the_frames_that_are_present():
    features, _ = draw(batch=50, frames=60)
    rest(15)(features["audio"])
    gap, whole = torch.ones(50, 60, 2, dtype=torch.bool), torch.ones(50, 60, dtype=torch.bool)
    gap[:, 20, 0] = False  # 9 repeats; 21 is new
    short = whole & (torch.arange(60) < 30)  # in windows of 30 frames a rest of 15 is half of them
    for flags, limit in (({"frame": whole}, 30), ({"present": gap}, 18), ({"frame": short}, 0)):
        model = build(statistics=False)
        model.fit_statistics([{"features": features, **flags}])
        assert model.stuck_limit.tolist() == [limit, 8]


def test_silence_is_no_missing_modality():
    """One second in ten without a word, all zeros: a held-out modality is present throughout, and another still stuck after 8
    frames."""
    g = torch.Generator().manual_seed(0)
    features, _ = draw(batch=40, frames=75)
    held, _ = draw(seed=1, batch=10, frames=300)
    for v in (features["audio"], held["audio"]):
        for row, start in (torch.rand(v.shape[:2], generator=g) < 0.01).nonzero().tolist():
            v[row, start : start + int(torch.randint(5, 16, (), generator=g))] = 0.0
    held["visual"][:, 200:] = held["visual"][:, 200:201].clone()
    model = build(statistics=False)
    model.fit_statistics([{"features": features}])
    known = model.assess(held)[3][..., 1:]  # without the joint expert
    assert known[..., 0].all()
    assert known[:, :208, 1].all()
    assert not known[:, 208:, 1].any()
    model.stuck_limit.fill_(8)
    assert 0.01 < (~model.assess(held)[3][..., 1]).float().mean() < 0.1


def test_limits_are_saved_and_older_weights_go_by_stuck():
    model = build(limits=(13, 0))
    state = model.state_dict()
    other = build(seed=1)
    other.load_state_dict(state)
    assert other.stuck_limit.tolist() == [13, 0]
    del state["stuck_limit"]
    whole = torch.nn.ModuleDict({"sage": build(seed=2, stuck=5, limits=(13, 0))})
    for module, sage, prefix, stuck in ((other, other, "", 8), (whole, whole["sage"], "sage.", 5)):
        given = {prefix + name: value for name, value in state.items()}
        module.load_state_dict(given)
        assert sage.stuck_limit.tolist() == [stuck, stuck]
        assert prefix + "stuck_limit" not in given
    del state["norm.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*: "norm.bias"\.'):
        other.load_state_dict(state)


def test_limits_keep_their_digits_in_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert build(limits=(70_001, 257)).to(dtype).stuck_limit.tolist() == [70_001, 257]
    with pytest.raises(ValueError, match=r"stuck: expected an int in \[0, 16777216\], got 16777217"):
        SAGE(DIMS, stuck=2**24 + 1)


# ----------------------------------------------------------------------------------------------------- missing, padding
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_missing_frames_hold_anything(causal, training):
    features, present = draw()
    mask = torch.ones(BATCH, FRAMES, dtype=torch.bool)
    mask[1, 55:] = False
    missing = ~(present & mask[..., None])
    results = []
    for garbage in (0.0, math.nan):
        model = build(causal=causal, dropout=0.0).train(training)
        x = {
            k: v.masked_fill(missing[..., m, None], garbage).requires_grad_()
            for m, (k, v) in enumerate(features.items())
        }
        out = model(x, present, mask)
        labels = torch.linspace(-0.5, 0.5, BATCH * FRAMES * 2).view(BATCH, FRAMES, 2)
        loss, _ = SAGELoss()(out, labels.masked_fill(~mask[..., None], garbage), mask, present)
        loss.backward()
        results.append(
            [getattr(out, f) for f in FIELDS]
            + [p.grad for p in model.parameters() if p.grad is not None]  # what only training runs has none else
            + [v.grad for v in x.values()]
        )
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_equals_a_shorter_clip(causal):
    model = build(causal=causal)
    features, present = draw()
    mask = torch.arange(FRAMES).expand(BATCH, FRAMES) < 45
    padded = model(features, present, mask)
    short = model({k: v[:, :45] for k, v in features.items()}, present[:, :45])
    for field in FIELDS:
        torch.testing.assert_close(getattr(padded, field)[:, :45], getattr(short, field), atol=1e-5, rtol=1e-5)
    assert not padded.weights[:, 45:].any()


def test_rows_do_not_meet():
    model = build()
    features, present = draw(batch=5)
    whole = model(features, present)
    row = model({k: v[3:4] for k, v in features.items()}, present[3:4])
    for field in FIELDS:
        torch.testing.assert_close(getattr(row, field), getattr(whole, field)[3:4], atol=1e-5, rtol=1e-5)


def test_one_modality_has_all_the_weight():
    torch.manual_seed(0)
    model = SAGE({"visual": 11}, dim=8).eval()
    features, present = draw()
    out = model({"visual": features["visual"]}, present[..., 1:])
    torch.testing.assert_close(out.weights, present[..., 1:].float())


def test_uniform_weights_share_encoders_and_head():
    a, b = build(fusion="reliability"), build(fusion="uniform")
    only = {n for n, _ in a.named_parameters()} - {n for n, _ in b.named_parameters()}
    assert only
    assert all(n.startswith(("fusion.", "frame_heads.")) for n in only)
    features, present = draw()
    out = b(features, present)
    share = present / present.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out.weights, share.float())


# -------------------------------------------------------------------------------------------------------- statistics
def test_statistics_standardise_the_present_frames():
    torch.manual_seed(0)
    features, present = draw(batch=6)
    features["audio"][..., 2] = 3.25  # a dead feature
    frame = torch.arange(FRAMES).expand(6, FRAMES) < 60
    valid = present & frame[..., None]
    model = SAGE(DIMS, dim=8)
    batches = [
        {
            "features": {k: v[i : i + 2] for k, v in features.items()},
            "present": present[i : i + 2],
            "frame": frame[i : i + 2],
        }
        for i in (0, 2, 4)
    ]
    for batch in batches:  # never read
        for m, v in enumerate(batch["features"].values()):
            v[~(batch["present"] & batch["frame"][..., None])[..., m]] = math.nan
    model.fit_statistics(batches)
    rows = features["audio"][valid[..., 0]]
    torch.testing.assert_close(model.input_mean_0, rows.mean(0), atol=1e-5, rtol=1e-5)
    alive = torch.arange(7) != 2
    torch.testing.assert_close(model.input_scale_0[alive], 1 / rows.std(0, correction=0)[alive], atol=1e-4, rtol=1e-4)
    assert model.input_scale_0[2] == 0
    assert bool(model.fusion.typicality.fitted)
    # A dead feature that wakes up says nothing; any affine change of a feature before fitting changes nothing.
    model.eval()
    woken = {**features, "audio": features["audio"].clone()}
    woken["audio"][..., 2] += 100
    close(model(features, present, frame), model(woken, present, frame), tol=0)


def test_statistics_make_units_irrelevant():
    features, present = draw(batch=4)
    scaled = {k: 50.0 * v + 7.0 for k, v in features.items()}
    outputs = []
    for x in (features, scaled):
        model = build(statistics=False)
        model.fit_statistics([{"features": x, "present": present}])
        outputs.append(model(x, present))
    close(*outputs, tol=1e-3)


def test_statistics_errors():
    features, present = draw()
    model = build(statistics=False)
    with pytest.raises(TypeError, match="batches: expected something to iterate over again and again"):
        model.fit_statistics(iter([{"features": features}]))
    with pytest.raises(ValueError, match="batches: expected 2 frames or more with modality visual, got 0"):
        model.fit_statistics([{"features": features, "present": present & torch.tensor([True, False])}])


# ------------------------------------------------------------------------------------------------------------- config
def test_config_rebuilds_the_model():
    model = build(causal=False, fusion="uniform", kernel_size=3, blocks=2, num_targets=3)
    config = json.loads(json.dumps(model.config))
    other = SAGE.from_config(config)
    assert other.config == model.config
    other.load_state_dict(model.state_dict())
    features, present = draw()
    close(other.eval()(features, present), model(features, present), tol=0)
    assert model(features, present).prediction.shape == (BATCH, FRAMES, 3)


def test_half_the_blocks_follow_the_fusion():
    assert [build(blocks=n).config["fused_blocks"] for n in (1, 2, 4, 5)] == [0, 1, 2, 2]
    assert len(build(blocks=5).fused_blocks) == 2


def test_config_names_every_constructor_argument():
    import inspect

    assert set(build().config) == set(inspect.signature(SAGE).parameters)


STATE = """
input_mean_{0,1} input_scale_{0,1} stuck_limit own_gain own_shift target_variance
encoders.{0,1}.project.{weight,bias} encoders.{0,1}.norm.{weight,bias}
encoders.{0,1}.blocks.0.{weight,bias} encoders.{0,1}.blocks.0.{norm,pointwise}.{weight,bias}
fusion.{norm_weight,norm_bias,transition,sharpening,log_temperature,bias} fusion.value.{0,1}.{weight,bias}
fusion.joint.{0,2}.{weight,bias} frame_heads.{0,1,2}.{weight,bias}
fusion.typicality.{mean,var,updates,fitted,components_0,components_1} fusion.evidence.{0,1}.0.{weight,bias}
fusion.reliability.{0,1,2}.{0,2}.{weight,bias} fusion.emission.{0,2}.{weight,bias}
fused_blocks.0.{weight,bias} fused_blocks.0.{norm,pointwise}.{weight,bias}
memory.log_prior memory.mix.{weight,bias} norm.{weight,bias} head.{0,3}.{weight,bias}
"""


def braces(pattern):
    """As in a shell: a.{b,c} is a.b and a.c."""
    choice = re.search(r"\{([^{}]*)\}", pattern)
    if choice is None:
        return [pattern]
    return [
        x for part in choice[1].split(",") for x in braces(pattern[: choice.start()] + part + pattern[choice.end() :])
    ]


def test_the_names_in_a_checkpoint_are_these():
    """Checkpoints are read by name, and so are the weights of a stream: a new name is a new format."""
    expected = [name for pattern in STATE.split() for name in braces(pattern)]
    assert sorted(build(blocks=2).state_dict()) == sorted(expected)
    late = set(build(blocks=2, fusion="late").state_dict())
    fusion = {"fusion.logits", *braces("fusion.value.{0,1}.{weight,bias}"), *braces("unimodal.{0,1}.{weight,bias}")}
    assert late == fusion | {name for name in expected if not name.startswith(("fusion.", "memory.", "frame_heads."))}


# ------------------------------------------------------------------------------------------------- compile and friends
@pytest.mark.slow
def test_compiles_in_one_graph():
    """With state; training compiled, below, is without."""
    model = build(blocks=2, limits=(13, 0))
    features, present = draw()
    features["audio"][0, 20:50] = features["visual"][0, 20:] = 0.5
    present[0, 20:] = True
    state = model(features, present).state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(features, present, None, state), model(features, present, None, state))


@pytest.mark.slow
def test_compiles_with_inductor():
    model = build()
    features, present = draw()
    close(torch.compile(model, fullgraph=True)(features, present), model(features, present), tol=1e-4)


@pytest.mark.slow
def test_trains_compiled():
    model = build(dropout=0.0, blocks=2).train()
    features, present = draw()
    labels = torch.rand(BATCH, FRAMES, 2) - 0.5
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        SAGELoss()(run(features, present), labels, None, present)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_exports_with_dynamic_batch_and_time():
    model = build(blocks=2, limits=(13, 0))
    features, present = draw()
    # AUTO: the exporter finds the bounds itself; tests/stack asks for 1 to 4096 frames.
    shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        model, (features, present), dynamic_shapes=(dict.fromkeys(features, shape), shape), strict=False
    )
    close(program.module()(features, present), model(features, present))
    for frames in (65, 101, 128, 129, 700):
        other, flags = draw(3, batch=3, frames=frames)
        other["audio"][0, 20:50] = other["visual"][0, 20:] = 0.5
        flags[0, 20:] = True
        close(program.module()(other, flags), model(other, flags))


def test_exports_the_step_with_state():
    model = build(blocks=2)
    features, present = draw()
    state = model(features, present).state
    step = ({k: v[:, :1] for k, v in features.items()}, present[:, :1], None, state)
    close(torch.export.export(model, step).module()(*step), model(*step))


def test_autocast_predicts_in_float32():
    model = build()
    features, present = draw()
    full = model(features, present)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(features, present)
        again = model(features, present, None, out.state)
    assert {getattr(out, f).dtype for f in FIELDS} == {torch.float32}
    torch.testing.assert_close(out.prediction, full.prediction, atol=0.05, rtol=0)
    assert again.prediction.isfinite().all()
    labels = torch.rand(BATCH, FRAMES, 2) - 0.5
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = SAGELoss()(model(features, present), labels, None, present)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    full = build()
    features, present = draw()
    model = copy.deepcopy(full).to(dtype).train()
    out = model({k: v.to(dtype) for k, v in features.items()}, present)
    assert {getattr(out, f).dtype for f in FIELDS} == {torch.float32}
    SAGELoss()(out, torch.rand(BATCH, FRAMES, 2) - 0.5, None, present)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    reference = full(features, present)
    got = model.eval()({k: v.to(dtype) for k, v in features.items()}, present)
    torch.testing.assert_close(got.prediction, reference.prediction, atol=0.05, rtol=0)


def test_double_precision_throughout():
    model = build().double()
    features, present = draw(dtype=torch.float64)
    out = model(features, present)
    assert {getattr(out, f).dtype for f in FIELDS} == {torch.float64}


# --------------------------------------------------------------------------------------------------------------- loss
def test_loss_is_the_sum_of_its_parts():
    model = build()
    features, present = draw()
    g = torch.Generator().manual_seed(0)
    labels = torch.rand(BATCH, FRAMES, 2, generator=g) - 0.5
    valid = torch.rand(BATCH, FRAMES, generator=g) > 0.2
    out = model(features, present)
    total, parts = SAGELoss(unimodal=0.7, reliability=0.2)(out, labels, valid, present)
    prediction = 1 - sum(numpy_ccc(out.prediction[valid][:, c].detach(), labels[valid][:, c]) for c in range(2)) / 2
    own, scores = [], []
    counted = torch.cat([valid[..., None], present & valid[..., None]], -1)  # the joint expert counts everywhere
    for k in range(3):
        q = counted[..., k]
        own += [1 - numpy_ccc(out.experts[q][:, k, c].detach(), labels[q][:, c]) for c in range(2)]
        explained = []
        for c in range(2):
            x, y = out.experts[q][:, k, c].detach().double().numpy(), labels[q][:, c].double().numpy()
            slope, level = np.polyfit(x, y, 1)
            if slope < 0:
                slope, level = 0.0, y.mean()
            explained.append((slope * x + level - y) ** 2 / y.var())
        left = 1 - out.expert_confidence[q][:, k].detach().double().numpy() + 1e-4
        scores.append(0.5 * (np.mean(explained, 0) / left + np.log(left)))
    score = torch.tensor(np.concatenate(scores).mean(), dtype=torch.float32)
    assert abs(parts["prediction"] - prediction) < 1e-5
    assert abs(parts["unimodal"] - sum(own) / 6) < 1e-5
    torch.testing.assert_close(parts["reliability"], score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total, parts["prediction"] + 0.7 * parts["unimodal"] + 0.2 * parts["reliability"])
    assert not any(p.requires_grad for p in parts.values())


def test_score_teaches_confidence_and_not_the_encoders():
    model = build()
    features, present = draw()
    labels = torch.zeros(BATCH, FRAMES, 2)
    out = model(features, present)
    score = ReliabilityNLL(0.3)(out.confidence, (out.unimodal - labels[:, :, None]).square(), present)
    score.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("fusion.reliability") for n in touched)
    assert any(n.startswith("fusion.evidence") for n in touched)
    assert not [n for n in touched if n.startswith(("encoders", "unimodal", "head", "fusion.value", "fusion.norm"))]


def test_estimates_teach_nothing_of_reliability():
    """An average can be made to say anything by the choice of what it counts: a stream of noise would learn to follow the
    labels that the others see."""
    model = build(dropout=0.0).train()
    features, present = draw()
    model(features, present).experts.square().sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    path = ("fusion.reliability", "fusion.evidence", "fusion.emission", "fusion.transition", "frame_heads")
    assert "memory.log_prior" in touched
    assert not [n for n in touched if n.startswith(path)]
    model.zero_grad()
    out = model(features, present)
    (out.expert_confidence.sum() + out.frame_log_precision.sum()).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(n.startswith(part) for n in touched) for part in path[:4])
    assert not [n for n in touched if not n.startswith(path)]


@pytest.mark.parametrize("detach", [True, False])
def test_the_prediction_teaches_confidence_only_where_asked(detach):
    model = build(dropout=0.0, fusion_options={"detach_weights": detach})
    features, present = draw()
    outs = []
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        outs.append(model(features, present))
        outs[-1].prediction.square().sum().backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        path = [n for n in touched if n.startswith(("fusion.reliability", "fusion.evidence", "fusion.emission"))]
        assert bool(path) == (not detach or not training)
        assert "fusion.sharpening" in touched
    close(*outs)  # what is stated and weighed is the same


def test_every_parameter_learns():
    model = build().train()
    features, present = draw()
    labels = torch.rand(BATCH, FRAMES, 2) - 0.5
    SAGELoss()(model(features, present), labels, None, present)[0].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_nothing_annotated_gives_zero_gradient():
    model = build()
    features, present = draw()
    valid = torch.zeros(BATCH, FRAMES, dtype=torch.bool)
    loss, _ = SAGELoss()(model(features, present), torch.zeros(BATCH, FRAMES, 2), valid, present)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m, f, p: build(causal=False)(f, p, None, m(f, p).state),
            ValueError,
            "state: expected None .*only a causal SAGE.*causal=False.*, got SAGEState",
        ),
        (
            lambda m, f, p: m({k: v[:, 0] for k, v in f.items()}),
            ValueError,
            r"features: expected shape \(B, T, D\) a modality, got \(2, 7\)",
        ),
        (lambda m, f, p: m(f, p[:, :-1]), ValueError, r"present: expected shape \(B, T, M\) = \(2, 70, 2\)"),
        (lambda m, f, p: m(f, p, p), ValueError, r"mask: expected shape \(B, T\) = \(2, 70\)"),
        (lambda m, f, p: m({"audio": f["audio"]}), ValueError, "features: expected the modalities"),
        (
            lambda m, f, p: build(fusion="gate"),
            ValueError,
            "fusion: expected one of reliability, uniform, concat, .* got 'gate'",
        ),
        (lambda m, f, p: build(dropout=1.0), ValueError, r"dropout: expected a number in \[0, 1\), got 1.0"),
        (lambda m, f, p: build(causal=1), TypeError, "causal: expected a bool, got int"),
        (lambda m, f, p: build(blocks=0), ValueError, r"blocks: expected an int in \[1, 12\], got 0"),
        (lambda m, f, p: build(fused_blocks=5), ValueError, r"fused_blocks: expected an int in \[0, 4\], got 5"),
        (lambda m, f, p: build(trust={"audio": 1.5}), ValueError, "trust: expected the share of time"),
        (lambda m, f, p: build(trust={"smell": 0.5}), ValueError, "trust: expected some of the modalities"),
        (
            lambda m, f, p: build(fusion="concat", trust={"audio": 0.5}),
            ValueError,
            "trust: expected None with fusion='concat'",
        ),
        (lambda m, f, p: build(fusion="concat", joint=True), ValueError, "joint: expected False with fusion='concat'"),
        (lambda m, f, p: build(quality_dims={"smell": 2}), ValueError, "quality_dims: expected some of the modalities"),
        (lambda m, f, p: m(f, p, quality={"audio": torch.zeros(1)}), ValueError, "quality: expected None"),
        (
            lambda m, f, p: build(fusion="uniform").assess(f, p),
            ValueError,
            "fusion: expected one that has a reliability to assess, got 'uniform'",
        ),
        (lambda m, f, p: SAGELoss(unimodal=-1), ValueError, "unimodal: expected a number >= 0 and finite, got -1"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(build(), *draw())


# ------------------------------------------------------------------------------------------------------------ learning
def toy(batch, generator, frames=100):
    """Two noisy views of a slow signal; which one is good switches in long spans, and loudness tells."""
    steps = torch.randn(batch, frames, 2, generator=generator)
    signal = torch.nn.functional.avg_pool1d(steps.transpose(1, 2), 21, 1, 10).transpose(1, 2) * 3.0
    good = (torch.arange(frames) // 25 + torch.randint(2, (batch, 1), generator=generator)) % 2  # (B, T): which one
    features = {}
    for m, (name, dim) in enumerate(DIMS.items()):
        noise = torch.where(good[..., None] == m, 0.3, 3.0) * torch.randn(batch, frames, 2, generator=generator)
        mix = torch.linspace(-1, 1, 2 * dim).view(2, dim).sin() + torch.eye(2, dim)
        features[name] = (signal + noise) @ mix
    return features, torch.tanh(signal), good


def test_learns_whom_to_trust():
    """In 60 steps: confidence and weight follow the good modality, and the fused prediction beats each one alone."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = SAGE(DIMS, dim=16, blocks=2, stages=2, dropout=0.0)
    model.fit_statistics([{"features": toy(32, g)[0]}])
    loss, optimiser = SAGELoss(), torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        features, labels, _ = toy(16, g)
        optimiser.zero_grad()
        loss(model(features), labels)[0].backward()
        optimiser.step()
    features, labels, good = toy(64, g)
    with torch.no_grad():
        out = model.eval()(features)
    audio_good = good == 0
    assert out.weights[..., 0][audio_good].mean() > 0.65
    assert out.weights[..., 0][~audio_good].mean() < 0.35
    for m in range(2):
        trusted = good == m
        assert out.confidence[..., m][trusted].mean() > out.confidence[..., m][~trusted].mean() + 0.1
    fused = sum(numpy_ccc(out.prediction[..., c], labels[..., c]) for c in range(2)) / 2
    alone = [sum(numpy_ccc(out.unimodal[..., m, c], labels[..., c]) for c in range(2)) / 2 for m in range(2)]
    assert fused > max(alone) + 0.05
