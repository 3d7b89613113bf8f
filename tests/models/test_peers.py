"""Fusion peers: every formula against numpy written from the definition, missing data, state, and the way into SAGE."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sage_ext.data.affwild2 import AffWild2
from sage_ext.data.synthetic import write_dataset
from sage_ext.data.windows import clip_tensors
from sage_ext.models import FUSIONS, SAGE, PeerFusion, SAGELoss
from sage_ext.models.peers import LateFusion, fusion_class, fusion_names, parameter_table, register
from sage_ext.nn import ReliabilityFusion, UniformFusion
from sage_ext.training.evaluate import predict_clip
from sage_ext.training.runs import Run, calibrate_run, evaluate_run
from sage_ext.training.trainer import TrainConfig, train

LENGTH = 11
PAIRWISE = {"gmu", "jca", "rjca", "dca", "grjca", "tagf"}
FIXED = {"jca", "rjca", "dca", "grjca", "tagf"}
NOT_CAUSAL = FIXED | {"mult"}
NAMES = ("concat", "late", "gmu", "can", "lfan", "avrelscore", "jca", "rjca", "dca", "grjca", "tagf", "mult")
DIMS = {2: (5, 8), 3: (5, 8, 4)}


def build(name, modalities=2, dim=8, seed=0, **options):
    """A peer in float64 and evaluation mode, away from its initial symmetry."""
    torch.manual_seed(seed)
    if name in FIXED:
        options = {"length": LENGTH, **options}
    if name == "can":
        options = {"width": 6, **options}
    if name == "lfan":
        options = {"leading": 1, **options}
    module = FUSIONS[name](DIMS[modalities], dim, **options).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def draw(modalities=2, batch=3, frames=LENGTH, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(batch, frames, d, generator=g, dtype=torch.float64) for d in DIMS[modalities]]
    present = torch.rand(batch, frames, modalities, generator=g) > 0.3
    present[0] = True  # a whole sequence,
    present[-1, :, 0] = False  # one without the first modality,
    present[1, frames // 4] = False  # and a frame without any
    return x, present


def variants():
    return [(name, m) for name in NAMES for m in ((2,) if name in PAIRWISE else (2, 3))]


# ------------------------------------------------------------------------------ the definitions, in numpy, one sequence
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - np.max(x, initial=-np.inf))
    return e / e.sum()


def layer_norm(x, p, name):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def affine(p, name, x):
    """W x + b of one vector, or of the rows of a matrix."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def concat_reference(p, x, here, net):
    rows = []
    for t in range(len(here)):
        hidden = affine(p, "first", np.concatenate([v[t] for v in x]))
        rows.append(np.tanh(affine(p, "second", np.where(hidden > 0, hidden, 0.01 * hidden))))
    return rows


def late_reference(p, x, here, net):
    rows = []
    for t in range(len(here)):
        share = np.where(here[t], np.exp(8.0 * p["logits"]), 0)
        values = np.stack([affine(p, f"value.{m}", v[t]) for m, v in enumerate(x)])
        rows.append(share @ values / max(share.sum(), 1e-300))
    return rows


def gmu_reference(p, x, here, net):
    rows = []
    for t in range(len(here)):
        h = [np.tanh(affine(p, f"value.{m}", v[t])) for m, v in enumerate(x)]
        if here[t].all():
            z = sigmoid(affine(p, "gate", np.concatenate([v[t] for v in x])))
            rows.append(z * h[0] + (1 - z) * h[1])
        else:
            rows.append(h[int(np.argmax(here[t]))])
    return rows


def can_reference(p, x, here, net):
    rows = []
    for t in range(len(here)):
        flags = np.repeat(here[t], 6)
        q = np.concatenate([affine(p, f"project.{m}", v[t]) for m, v in enumerate(x)]) * flags
        attended = np.zeros_like(q)
        if flags.any():
            attended[flags] = softmax(affine(p, "score", q)[flags]) * q[flags] * flags.sum()
        rows.append(affine(p, "out", attended))
    return rows


def lfan_reference(p, x, here, net):
    rows = []
    for t in range(len(here)):
        qkv = [np.split(affine(p, f"token.{m}", v[t]), 3) for m, v in enumerate(x)]
        tokens = []
        for m in range(len(x)):
            if not here[t, m]:
                tokens.append(np.zeros(32))
                continue
            parts = []
            for head in (slice(0, 16), slice(16, 32)):
                others = [n for n in range(len(x)) if here[t, n]]
                share = softmax(np.array([qkv[m][0][head] @ qkv[n][1][head] / math.sqrt(16) for n in others]))
                parts.append(sum(s * qkv[n][2][head] for s, n in zip(share, others)))
            tokens.append(layer_norm(np.concatenate(parts) + qkv[m][2], p, "norm"))
        rows.append(affine(p, "out", np.concatenate([*tokens, x[net.leading][t]])))
    return rows


def avrelscore_reference(p, x, here, net):
    frames, parts = len(here), []
    for m, v in enumerate(x):
        h = np.concatenate([np.zeros((18, v.shape[1])), v])
        for layer in (0, 2, 4):
            w, b = p[f"score.{m}.{layer}.weight"], p[f"score.{m}.{layer}.bias"]  # (out, in, 7)
            h = np.stack([np.einsum("oik,ki->o", w, h[t : t + 7]) + b for t in range(len(h) - 6)])
            h = np.maximum(h, 0) if layer < 4 else sigmoid(h)
        parts.append(v + v * h)
    return [affine(p, "out", np.concatenate([part[t] for part in parts])) for t in range(frames)]


def joint_layer(p, name, x, here):
    """One layer of joint cross-attention, J = Wq [V; A] and so on, matrices as in the paper: x (L, d)."""
    d = sum(v.shape[1] for v in x)
    joint = affine(p, f"{name}.joint", np.concatenate(x, 1)) * here.any(1)[:, None]
    result = []
    for m, v in enumerate(x):
        weight, bias = p[f"{name}.time.{m}.weight"], p[f"{name}.time.{m}.bias"]
        mixed = np.stack([weight @ v[:, c] + bias for c in range(v.shape[1])])  # (d_m, L)
        correlation = np.tanh(mixed @ joint / math.sqrt(d))
        hidden = np.maximum(np.tanh(affine(p, f"{name}.value.{m}", v) @ correlation), 0)
        added = np.maximum(affine(p, f"{name}.out.{m}", hidden), 0)
        result.append((v + added) * here[:, m, None])
    return result


def joint_states(p, x, here, layers, normalise):
    if normalise:
        x = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in x]
    states = [x]
    for i in range(layers):
        states.append(joint_layer(p, f"attention.{i}", states[-1], here))
    return states


def jca_reference(p, x, here, net):
    return affine(p, "out", np.concatenate(joint_states(p, x, here, 1, False)[1], 1))


def rjca_reference(p, x, here, net):
    return affine(p, "out", np.concatenate(joint_states(p, x, here, 2, True)[2], 1))


def gated_reference(layers, normalise):
    def reference(p, x, here, net):
        states, parts = joint_states(p, x, here, layers, normalise), []
        for m in range(2):
            share = np.stack([softmax(row / 0.1) for row in affine(p, f"score.{m}", states[-1][m])])
            parts.append(sum(share[:, k, None] * states[k][m] for k in range(layers + 1)))
        return affine(p, "out", np.concatenate(parts, 1))

    return reference


def lstm(p, name, suffix, steps):
    """(3, d) -> (3, units): gates in the order input, forget, cell, output."""
    units = p[f"{name}.weight_hh_l0{suffix}"].shape[1]
    h, c, rows = np.zeros(units), np.zeros(units), []
    for step in steps:
        z = (p[f"{name}.weight_ih_l0{suffix}"] @ step + p[f"{name}.bias_ih_l0{suffix}"]
             + p[f"{name}.weight_hh_l0{suffix}"] @ h + p[f"{name}.bias_hh_l0{suffix}"])  # fmt: skip
        i, f, g, o = np.split(z, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        rows.append(h)
    return np.stack(rows)


def tagf_reference(p, x, here, net):
    states, parts = joint_states(p, x, here, 2, True), []
    for m in range(2):
        rows = []
        for t in range(len(here)):
            steps = np.stack([state[m][t] for state in states])
            hidden = np.concatenate(
                [lstm(p, f"lstm.{m}", "", steps), lstm(p, f"lstm.{m}", "_reverse", steps[::-1])[::-1]], 1
            )
            rows.append(softmax(affine(p, f"score.{m}", hidden)[:, 0] / 0.1) @ steps)
        parts.append(np.stack(rows))
    return affine(p, "out", np.concatenate(parts, 1))


def transformer_layer(p, name, x, source, keys, heads=4):
    rows, size = [], x.shape[1] // heads
    keys = np.flatnonzero(keys)
    kv = [affine(p, f"{name}.source", layer_norm(row, p, f"{name}.source_norm")) for row in source]
    for row in x:
        q = affine(p, f"{name}.query", layer_norm(row, p, f"{name}.query_norm"))
        parts = []
        for h in range(heads):
            at, value_at = slice(h * size, (h + 1) * size), slice((heads + h) * size, (heads + h + 1) * size)
            share = softmax(np.array([q[at] @ kv[k][at] / math.sqrt(size) for k in keys]))
            parts.append(sum((s * kv[k][value_at] for s, k in zip(share, keys)), np.zeros(size)))
        row = row + affine(p, f"{name}.out", np.concatenate(parts))
        hidden = np.maximum(affine(p, f"{name}.feed.0", layer_norm(row, p, f"{name}.norm")), 0)
        rows.append(row + affine(p, f"{name}.feed.2", hidden))
    return np.stack(rows)


def mult_reference(p, x, here, net):
    frames, dim, count = len(here), net.dim, len(x)
    place = np.zeros((frames, dim))
    for t in range(frames):
        for i in range(0, dim, 2):
            place[t, i], place[t, i + 1] = math.sin(t / 10000 ** (i / dim)), math.cos(t / 10000 ** (i / dim))
    tokens = [affine(p, f"project.{m}", v) + place for m, v in enumerate(x)]
    pairs = [(m, n) for m in range(count) for n in range(count) if n != m]
    outputs = []
    for m in range(count):
        crossed = [
            transformer_layer(p, f"cross.{i}", tokens[m], tokens[n], here[:, n])
            for i, (a, n) in enumerate(pairs)
            if a == m
        ]
        z = np.concatenate(crossed, 1)
        outputs.append(transformer_layer(p, f"memory.{m}", z, z, here.any(1)))
    return affine(p, "out", np.concatenate(outputs, 1))


REFERENCES = {
    "concat": concat_reference, "late": late_reference, "gmu": gmu_reference, "can": can_reference,
    "lfan": lfan_reference, "avrelscore": avrelscore_reference, "jca": jca_reference, "rjca": rjca_reference,
    "dca": gated_reference(1, False), "grjca": gated_reference(2, True), "tagf": tagf_reference,
    "mult": mult_reference,
}  # fmt: skip


@pytest.mark.parametrize(("name", "modalities"), variants())
def test_formula(name, modalities):
    """float64 against float64: 1e-10 is rounding, and nothing but it."""
    net, (x, present) = build(name, modalities), draw(modalities)
    p = {key: value.detach().numpy() for key, value in net.state_dict().items()}
    for flags in (None, present):
        got = net(x, flags).fused.detach().numpy()
        here = np.ones(present.shape, bool) if flags is None else flags.numpy()
        for b in range(len(got)):
            blank = [np.where(here[b][:, m, None], v[b].numpy(), 0) for m, v in enumerate(x)]
            want = np.stack(list(REFERENCES[name](p, blank, here[b], net))) * here[b].any(1)[:, None]
            np.testing.assert_allclose(got[b], want, atol=1e-10, rtol=1e-10)
        assert np.abs(got).max() > 0.05


def test_every_peer_has_a_formula_and_says_what_it_is():
    assert tuple(FUSIONS) == ("concat", "late", "gmu", "can", "lfan", "avrelscore", "jca", "rjca", "dca", "grjca",
                              "tagf", "mult")  # fmt: skip
    assert set(REFERENCES) == set(FUSIONS)
    for name, cls in FUSIONS.items():
        assert cls.fixed_length == (name in FIXED)
        assert cls.pairwise == (name in PAIRWISE)
        assert cls.causal == (name not in NOT_CAUSAL)
        assert "missing" in cls.__doc__.lower(), name


# ------------------------------------------------------------------------------------------------------- missing data
@pytest.mark.parametrize(("name", "modalities"), variants())
def test_what_is_missing_reaches_nothing(name, modalities):
    net, (x, present) = build(name, modalities).train(), draw(modalities)
    results = []
    for fill in (float("nan"), 1e30):
        torch.manual_seed(5)  # dropout
        inputs = [torch.where(present[..., m, None], v, fill).requires_grad_() for m, v in enumerate(x)]
        out = net(inputs, present)
        net.zero_grad()
        out.fused.square().sum().backward()
        for m, v in enumerate(inputs):
            assert not v.grad[~present[..., m]].any()
        results.append([out.fused.detach(), *(v.grad for v in inputs), *(p.grad for p in net.parameters())])
    for a, b in zip(*results):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    assert not results[0][0][~present.any(-1)].any()
    for m, d in enumerate(DIMS[modalities]):  # and what is there does reach it
        assert results[0][1 + m].shape[-1] == d
        assert results[0][1 + m].abs().sum() > 0


@pytest.mark.parametrize(("name", "modalities"), variants())
def test_padding_is_the_same_as_missing_and_as_the_end(name, modalities):
    net, (x, present) = build(name, modalities), draw(modalities)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[:, 7:] = False
    padded = net([torch.where(mask.unsqueeze(-1), v, float("nan")) for v in x], present, mask)
    torch.testing.assert_close(padded.fused, net(x, present & mask.unsqueeze(-1)).fused)
    assert not padded.fused[:, 7:].any()
    assert not padded.weights[:, 7:].any()
    if name not in FIXED:
        cut = net([v[:, :7] for v in x], present[:, :7])
        torch.testing.assert_close(padded.fused[:, :7], cut.fused)


@pytest.mark.parametrize(("name", "modalities"), variants())
def test_weights_confidence_and_stage(name, modalities):
    net, (x, present) = build(name, modalities), draw(modalities)
    out = net(x, present)
    here = present.double()
    torch.testing.assert_close(out.weights.sum(-1), present.any(-1).double())
    assert not out.weights[~present].any()
    if name == "late":
        share = (8 * net.logits).softmax(0)
        torch.testing.assert_close(out.weights[0], share.expand(LENGTH, modalities))
    else:
        torch.testing.assert_close(out.weights, here / here.sum(-1, keepdim=True).clamp(min=1))
    torch.testing.assert_close(out.confidence, 0.5 * here)
    torch.testing.assert_close(out.stage, torch.ones(3, LENGTH, 1, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_causal_means_that_the_future_is_not_seen(name):
    net, (x, _) = build(name), draw()
    before = net(x).fused
    later = [v.clone() for v in x]
    for v in later:
        v[:, 6:] += 1.0
    same = torch.equal(before[:, :6], net(later).fused[:, :6])
    assert same == (name not in NOT_CAUSAL)


@pytest.mark.parametrize("name", NAMES)
def test_single_frames(name):
    options = {"length": 1} if name in FIXED else {}
    net, (x, present) = build(name, **options), draw(frames=1 if name in FIXED else LENGTH)
    rows = [v.flatten(0, 1) for v in x]
    flags = present.flatten(0, 1)
    out = net(rows, flags, torch.ones(len(flags), dtype=torch.bool))
    each = net([v.unsqueeze(1) for v in rows], flags.unsqueeze(1))
    torch.testing.assert_close(out.fused, each.fused.squeeze(1))
    torch.testing.assert_close(out.weights, each.weights.squeeze(1))
    assert out.stage.shape == (len(flags), 1)


@pytest.mark.parametrize("fusion", NAMES)
def test_autocast_and_float64(fusion):
    net, (features, present) = model(fusion=fusion), clips()
    want = net(features, present)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(features, present)
        got.prediction.sum().backward()
    assert got.prediction.dtype == got.weights.dtype == got.stage.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    # bfloat16 has 8 bits; what a prediction in (-1, 1) loses through a dozen layers of it.
    torch.testing.assert_close(got.prediction, want.prediction, atol=0.06, rtol=0)
    double = net.double()({n: v.double() for n, v in features.items()}, present)
    assert double.prediction.dtype == double.weights.dtype == torch.float64
    torch.testing.assert_close(double.prediction.float(), want.prediction, atol=2e-5, rtol=0)


def test_late_trains_its_weights():
    net, (x, _) = build("late"), draw()
    with torch.no_grad():
        net.logits.zero_()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    target = net.value[1](x[1]).detach()
    for _ in range(60):
        optimizer.zero_grad()
        (net(x).fused - target).square().mean().backward()
        optimizer.step()
    assert net(x).weights[0, 0, 1] > 0.9


def test_lfan_is_led_by_the_video():
    sizes = {"audio": 3, "visual": 4}
    assert FUSIONS["lfan"](sizes, 8).leading == 1
    assert FUSIONS["lfan"]({"video": 4, "audio": 3}, 8).leading == 0
    assert FUSIONS["lfan"]([3, 4], 8).leading == 0
    assert FUSIONS["lfan"](sizes, 8, leading="audio").leading == 0
    assert FUSIONS["lfan"]([3, 4], 8, leading=1).leading == 1
    assert SAGE(sizes, dim=8, fusion="lfan").fusion.leading == 1


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: FUSIONS["gmu"]([4], 8),
            ValueError,
            "in_dims: expected the 2 modalities that GatedMultimodalUnit fuses, got 1",
        ),
        (
            lambda: FUSIONS["jca"]([4, 4, 4], 8, length=5),
            ValueError,
            "in_dims: expected the 2 modalities that JCA fuses, got 3",
        ),
        (
            lambda: FUSIONS["mult"]([4], 8),
            ValueError,
            "in_dims: expected 2 modalities or more for CrossModalTransformer, got 1",
        ),
        (lambda: FUSIONS["mult"]([4, 4], 6), ValueError, "heads: expected a divisor of dim 6, got 4"),
        (lambda: FUSIONS["lfan"]([4, 4], 6, heads=5), ValueError, "heads: expected a divisor of width 32, got 5"),
        (lambda: FUSIONS["lfan"]({"a": 4}, 6, leading="b"), ValueError, "leading: expected one of .*'a'.* got 'b'"),
        (lambda: FUSIONS["lfan"]([4], 6, leading=1), ValueError, r"leading: expected an int in \[0, 0\], got 1"),
        (lambda: FUSIONS["jca"]([4, 4], 8, length=0), ValueError, "length: expected an int >= 1, got 0"),
        (lambda: FUSIONS["jca"]([4, 4], 8, length=5, dropout=1.0), ValueError, "dropout: expected a number in"),
        (lambda: FUSIONS["concat"]([4, 4], 0), ValueError, "dim: expected an int >= 1"),
        (
            lambda: build("tagf")([v[:, :-1] for v in draw()[0]]),
            ValueError,
            "features: expected the 11 frames that TAGF was built for .*, got 10",
        ),
        (
            lambda: build("jca")(draw()[0], state=()),
            ValueError,
            r"state: expected None \(JCA is not causal and cannot run in chunks\), got tuple",
        ),
        (
            lambda: build("can")(draw()[0], draw()[1][:, 1:]),
            ValueError,
            r"present: expected shape \(B, T, M\) = \(3, 11, 2\)",
        ),
        (lambda: build("can")(draw()[0], draw()[1].long()), TypeError, "present: expected dtype bool"),
        (lambda: build("can")(draw(3)[0]), ValueError, "features: expected 2 modalities, got 3"),
        (lambda: fusion_class("gate"), ValueError, "fusion: expected one of reliability, uniform, concat.*got 'gate'"),
        (lambda: SAGE([4, 4], fusion="gmu", fusion_options=[1]), TypeError, "fusion_options: expected a mapping"),
        (lambda: SAGE([4, 4], fusion="jca", length=0), ValueError, "length: expected an int >= 1"),
        (lambda: SAGE([4, 4], use_present=1), TypeError, "use_present: expected a bool"),
        (
            lambda: SAGE([4, 4], fusion="can").assess([torch.zeros(1, 2, 4)] * 2),
            ValueError,
            "fusion: expected one that has a reliability to assess, got 'can'",
        ),
        (lambda: TrainConfig("x", fusion="magic"), ValueError, "fusion: expected one of .*got 'magic'"),
        (lambda: TrainConfig("x", fusion_options=3), ValueError, "fusion_options: expected a mapping, got 3"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ------------------------------------------------------------------------------------------------------------ in SAGE
SIZES = {"audio": 7, "visual": 11}


def model(seed=0, **options):
    torch.manual_seed(seed)
    net = SAGE(SIZES, **{"dim": 8, "evidence_dim": 8, "stages": 3, "length": 40, **options})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def clips(seed=0, batch=2, frames=40):
    g = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(batch, frames, d, generator=g) for name, d in SIZES.items()}
    return features, torch.rand(batch, frames, 2, generator=g) > 0.3


@pytest.mark.parametrize("fusion", NAMES)
def test_sage_with_a_peer(fusion):
    net, (features, present) = model(fusion=fusion), clips()
    assert isinstance(net.fusion, FUSIONS[fusion])
    assert net.causal == (fusion not in NOT_CAUSAL)
    assert net.length == (40 if fusion in FIXED else None)
    features = {
        name: torch.where(present[..., m, None], v, float("nan")) for m, (name, v) in enumerate(features.items())
    }
    out = net(features, present)
    assert out.prediction.shape == (2, 40, 2)
    assert out.prediction.abs().max() < 1
    assert (out.state is None) == (fusion in NOT_CAUSAL)
    again = SAGE.from_config(json.loads(json.dumps(net.config))).eval()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(features, present).prediction, out.prediction, rtol=0, atol=0)

    net.train()
    labels = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(3)) * 2 - 1
    total, _ = SAGELoss()(net(features, present), labels, None, present)
    total.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    # Dropout and a ReLU can silence a few; a fusion that nothing reaches would be an accident.
    touched = [bool(p.grad.any()) for p in net.fusion.parameters()]
    assert np.mean(touched) > 0.9


@pytest.mark.parametrize("fusion", [name for name in NAMES if name not in NOT_CAUSAL])
def test_chunks_equal_one_call(fusion):
    net, (features, present) = model(fusion=fusion), clips()
    whole = net(features, present)
    state, parts = None, []
    for start, stop in ((0, 1), (1, 4), (4, 30), (30, 40)):
        piece = net({n: v[:, start:stop] for n, v in features.items()}, present[:, start:stop], state=state)
        state = piece.state
        parts.append(piece)
    for field in ("prediction", "unimodal", "weights", "confidence", "stage"):
        joined = torch.cat([getattr(part, field) for part in parts], 1)
        torch.testing.assert_close(joined, getattr(whole, field), atol=1e-6, rtol=1e-5)
    assert all(h.shape[0] == 2 for h in (*state.history, *state.fused, *(state.fusion or ())))


def test_a_fusion_that_is_not_causal_has_no_state():
    features, present = clips()
    state = model(fusion="uniform")(features, present).state
    for fusion in ("jca", "mult"):
        with pytest.raises(ValueError, match=f"only a causal SAGE.*fusion='{fusion}'"):
            model(fusion=fusion)(features, present, state=state)


def test_late_fusion_is_a_convex_sum_of_predictions():
    net, (features, present) = model(fusion="late"), clips()
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 30:] = False

    def predict(logits):
        with torch.no_grad():
            net.fusion.logits.copy_(torch.tensor(logits))
        return net(features, present, mask)

    first, second = predict([20.0, -20.0]).prediction, predict([-20.0, 20.0]).prediction
    mixed = predict([0.1, -0.05])
    share = torch.tensor([0.1, -0.05]).mul(8).softmax(0)
    both, alone = present.all(-1) & mask, [present[..., m] & ~present[..., 1 - m] & mask for m in range(2)]
    assert min(flags.sum() for flags in (both, *alone)) > 5
    want = share[0] * first + share[1] * second
    torch.testing.assert_close(mixed.prediction[both], want[both], atol=1e-6, rtol=1e-5)
    assert (first - second)[both].abs().max() > 1e-2
    for flags, own in zip(alone, (first, second)):
        torch.testing.assert_close(mixed.prediction[flags], own[flags], atol=1e-6, rtol=1e-5)
    none = ~present.any(-1) & mask
    assert none.any()  # there the trunk's memory speaks, in the learnt proportion
    assert first[none].abs().min() > 0
    torch.testing.assert_close(mixed.prediction[none], want[none], atol=1e-6, rtol=1e-5)
    assert not mixed.weights[none].any()


def test_padding_does_not_reach_a_peers_prediction():
    features, present = clips()
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[:, 25:] = False
    for fusion in NAMES:
        net = model(fusion=fusion)
        results = []
        for fill in (float("nan"), 3.0):
            filled = {n: torch.where(mask.unsqueeze(-1), v, fill) for n, v in features.items()}
            results.append(net(filled, present, mask).prediction[:, :25])
        assert results[0].isfinite().all(), fusion
        assert torch.equal(*results), fusion


def test_parameter_table():
    table = parameter_table(8, 2, length=40)
    assert set(table) == {"reliability", "uniform", *FUSIONS}
    own = {n: sum(p.numel() for p in model(fusion=n, evidence_dim=32, stages=4).fusion.parameters()) for n in table}
    assert table == own
    assert set(parameter_table(8, 3)) == {"reliability", "uniform", *FUSIONS} - PAIRWISE
    # By hand: two Linear(8, 8) on [8; 8] and a gate; and L x L.
    assert table["gmu"] == 2 * (8 * 8 + 8) + (16 * 8 + 8)
    assert parameter_table(8, 2, length=41)["jca"] - table["jca"] == 2 * (41 * 42 - 40 * 41)


# ---------------------------------------------------------------------------------------------------------- ablations
def test_no_filter_takes_each_frames_own_evidence():
    net, (features, present) = model(fusion_options={"filter_stages": False}), clips()
    emissions = []
    net.fusion.emission.register_forward_hook(lambda module, args, output: emissions.append(output))
    out = net(features, present)
    want = torch.softmax(emissions[0], -1)
    some = present.any(-1)
    torch.testing.assert_close(out.stage[some], want[some])
    torch.testing.assert_close(out.stage[~some], torch.full_like(out.stage[~some], 1 / 3))
    assert (~some).any()
    assert not any("transition" in name for name, _ in net.named_parameters())
    piece = net({n: v[:, 20:] for n, v in features.items()}, present[:, 20:],
                state=net({n: v[:, :20] for n, v in features.items()}, present[:, :20]).state)  # fmt: skip
    torch.testing.assert_close(piece.prediction, out.prediction[:, 20:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["reliability", "concat", "late"])
def test_no_mask_shows_missing_inputs_as_the_mean_frame(fusion):
    net, told, (features, present) = model(fusion=fusion, use_present=False), model(fusion=fusion, stuck=0), clips()
    for m in range(2):
        mean = torch.linspace(1, 2, list(SIZES.values())[m])
        for each in (net, told):
            each.get_buffer(f"input_mean_{m}").copy_(mean)
    missing = {n: torch.where(present[..., m, None], v, float("nan")) for m, (n, v) in enumerate(features.items())}
    means = {
        n: torch.where(present[..., m, None], v, told.get_buffer(f"input_mean_{m}"))
        for m, (n, v) in enumerate(features.items())
    }
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 33:] = False
    got, want = net(missing, present, mask), told(means, mask.unsqueeze(-1).expand(2, 40, 2), mask)
    for field in ("prediction", "weights", "confidence", "stage"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field), atol=1e-6, rtol=1e-5)
    assert (got.weights[~present & mask.unsqueeze(-1)] > 0).all()
    assert not torch.allclose(told(missing, present, mask).prediction, got.prediction)


def test_undetached_evidence_shapes_the_encoders():
    features, present = clips()
    for options, reached in (({}, False), ({"detach_evidence": False}, True)):
        net = model(fusion_options=options)
        net(features, present).confidence.sum().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in net.encoders.parameters()) == reached


def test_no_norm_has_no_norm():
    net = model(fusion_options={"norm": False})
    assert net.fusion.norm_weight is None
    assert not torch.allclose(net(*clips()).prediction, model()(*clips()).prediction)


# ----------------------------------------------------------------------------------------------- training, evaluation
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Clips shorter and longer than the window of 60 frames."""
    root = tmp_path_factory.mktemp("data") / "set"
    write_dataset(root, seed=2, train=4, validation=3, test=1, frames=(40, 130), modalities={"audio": 9, "visual": 12})
    lengths = [clip.num_frames for clip in AffWild2(root, "validation")]
    assert min(lengths) < 60 < max(lengths)
    return root


@pytest.mark.parametrize("fusion", ["jca", "tagf", "mult", "late"])
def test_trains_and_evaluates(data, tmp_path, fusion):
    config = TrainConfig(str(data), fusion=fusion, dim=8, blocks=1, window=2, hop=4 / 3, batch_size=3, epochs=1, lr=3e-3,
                         warmup=1, threads=1)  # fmt: skip
    best = train(config, tmp_path / "run", progress=False)
    result, _ = evaluate_run(tmp_path / "run")
    assert result["scores"]["fused"] == best["scores"]["fused"]
    assert calibrate_run(tmp_path / "run") is None
    assert Run.load(tmp_path / "run").model.fusion.__class__ is FUSIONS[fusion]


def test_fixed_length_on_whole_videos(data):
    """Windows of the model's length by hand: padded and masked where the video is shorter, averaged where they meet."""
    torch.manual_seed(0)
    net = SAGE({"audio": 9, "visual": 12}, dim=8, blocks=2, fusion="rjca", length=60).eval()
    for clip in AffWild2(data, "validation"):
        got = predict_clip(net, clip, ["audio", "visual"], window=500, hop=40)
        total = clip.num_frames
        sums, counts = np.zeros((total, 2)), np.zeros((total, 1))
        for start in sorted({*range(0, max(total - 60, 0), 40), max(total - 60, 0)}):
            stop = min(start + 60, total)
            item, pad = clip_tensors(clip, ["audio", "visual"], start, stop), 60 - (stop - start)
            features = {
                n: torch.cat([v, torch.full((pad, v.shape[1]), 7.0)])[None] for n, v in item["features"].items()
            }
            present = torch.cat([item["present"], torch.ones(pad, 2, dtype=torch.bool)])[None]
            with torch.no_grad():
                out = net(features, present, torch.arange(60)[None] < stop - start)
            sums[start:stop] += out.prediction[0, : stop - start].double().numpy()
            counts[start:stop] += 1
        np.testing.assert_allclose(got.prediction, sums / counts, atol=1e-6)
        assert got.stage.shape == (total, 1)


def test_one_block_is_enough(data, tmp_path):
    config = TrainConfig(str(data), blocks=1, dim=8, window=2, hop=2, epochs=1, max_steps=1, threads=1)
    train(config, tmp_path / "run", progress=False)
    assert len(Run.load(tmp_path / "run").model.encoders[0].blocks) == 1


# ---------------------------------------------------------------------------------------------------- a peer of yours
@pytest.mark.slow
def test_the_peer_of_the_contributing_page(tmp_path):
    """The page's file, given to a fresh interpreter as the page says."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    source = re.search(r"## To add a fusion peer.*?```python\n(.*?)```", text, re.S).group(1)
    assert len(source.splitlines()) < 60
    name = re.search(r'@register\("([^"]+)"', source).group(1)
    (tmp_path / "my_peer.py").write_text(source)
    check = f"""
import torch
from sage_ext.models import SAGE, FUSIONS
from sage_ext.study.methods import default_methods, find
from sage_ext.training.trainer import TrainConfig, build_model
assert {name!r} in default_methods(["audio", "visual"])
config = TrainConfig("x", dim=8, **find({name!r}).overrides)
net = build_model(config, {{"audio": 3, "visual": 4}})
assert type(net.fusion) is FUSIONS[{name!r}]
flags = torch.tensor([[[True, True], [True, False], [False, False]]])
x = {{"audio": torch.randn(1, 3, 3), "visual": torch.full((1, 3, 4), float("nan"))}}
x["visual"][0, 0] = 1.0
x["audio"][0, 2] = float("nan")
assert net(x, flags).prediction.isfinite().all()
assert SAGE.from_config(net.config).causal
"""
    environment = {**os.environ, "SAGE_EXT_PEERS": str(tmp_path / "my_peer.py")}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment["SAGE_EXT_PEERS"] = str(tmp_path / "nothing.py")
    done = subprocess.run(
        [sys.executable, "-c", "import sage_ext.models"], env=environment, capture_output=True, text=True
    )
    assert "SAGE_EXT_PEERS: expected Python files" in done.stderr


def test_register_refuses_what_is_taken(monkeypatch):
    monkeypatch.setitem(FUSIONS, "mine", None)  # so that pytest takes "mine" out again
    monkeypatch.delitem(FUSIONS, "mine")
    for taken in ("gmu", "reliability", "uniform"):
        with pytest.raises(ValueError, match=f"there is a method '{taken}' already"):
            register(taken, "mine")(PeerFusion)
    with pytest.raises(TypeError, match="expected a subclass of PeerFusion"):
        register("mine", "mine")(torch.nn.Linear)

    @register("mine", "my sum", "a note")
    class Mine(LateFusion):
        pass

    assert FUSIONS["mine"] is Mine
    assert (Mine.title, Mine.note) == ("my sum", "a note")
    assert "mine" in fusion_names()
    assert {fusion_class("reliability"), fusion_class("uniform")} == {ReliabilityFusion, UniformFusion}
