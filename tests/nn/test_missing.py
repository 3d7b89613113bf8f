"""What every way in makes of frames that are not finite, of presence by name, and of dtypes: drop-in fusions, peers, SAGE, its
streaming session, and the op."""

import copy
import math

import numpy as np
import pytest
import torch

from sage_ext import functional, reference
from sage_ext._arguments import LARGEST_NORM
from sage_ext.models import SAGE, SAGELoss
from sage_ext.models.peers import fusion_class, fusion_names
from sage_ext.nn import ReliabilityFusion, UniformFusion

DIMS = {"audio": 5, "visual": 8}
BATCH, FRAMES = 3, 11
FUSIONS = fusion_names()
BAD = [math.nan, math.inf, -math.inf, 1e20]  # the last: finite, its square is not


def fusion(name, seed=0, dims=DIMS):
    torch.manual_seed(seed)
    cls = fusion_class(name)
    return cls(dims, 8, **({"length": FRAMES} if cls.fixed_length else {})).eval()


def sage(seed=0, **options):
    torch.manual_seed(seed)
    model = SAGE(DIMS, **{"dim": 8, "stages": 2, "evidence_dim": 6, "length": FRAMES, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def draw(seed=0, batch=BATCH, frames=FRAMES):
    g = torch.Generator().manual_seed(seed)
    features = {k: torch.randn(batch, frames, d, generator=g) for k, d in DIMS.items()}
    present = torch.rand(batch, frames, 2, generator=g) > 0.25
    mask = torch.arange(frames).expand(batch, frames) < torch.tensor([frames, frames - 2, frames])[:batch, None]
    return features, present, mask


def spoil(features, bad, seed=1, share=0.3):
    """Features with one bad number in some frames, and (B, T, M): which."""
    g = torch.Generator().manual_seed(seed)
    spoilt, hits = {}, []
    for name, x in features.items():
        hit = torch.rand(x.shape[:-1], generator=g) < share
        where = torch.randint(x.shape[-1], x.shape[:-1], generator=g)
        one = torch.nn.functional.one_hot(where, x.shape[-1]).bool() & hit[..., None]
        spoilt[name] = x.masked_fill(one, bad)
        hits.append(hit)
    return spoilt, torch.stack(hits, -1)


def flat(out):
    """Every tensor of an output but the count."""
    return [x for x in torch.utils._pytree.tree_leaves(out._replace(nonfinite=None)) if isinstance(x, torch.Tensor)]


# ------------------------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", FUSIONS)
def test_a_frame_that_is_not_finite_is_missing_in_every_fusion(name, bad):
    """The bits of a call that says so: values, state and gradients; and the frames are counted."""
    features, present, mask = draw()
    spoilt, hit = spoil(features, bad)
    results = []
    for x, told in ((features, present & ~hit), (spoilt, present)):
        module = fusion(name)
        x = {k: v.clone().requires_grad_() for k, v in x.items()}
        out = module(x, told, mask)
        (out.fused.square().sum() + out.confidence.sum()).backward()
        results.append(
            [*flat(out), *(v.grad for v in x.values()), *(p.grad for p in module.parameters() if p.grad is not None)]
        )
    assert len(results[0]) == len(results[1])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()
    assert out.nonfinite.dtype == torch.int64
    assert torch.equal(out.nonfinite, (hit & present & mask[..., None]).sum((0, 1)))
    assert out.nonfinite.min() > 0
    assert not fusion(name)(features, present, mask).nonfinite.any()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"use_present": False}, {"fusion": "uniform"}, {"fusion": "can"},
                                     {"fusion": "jca"}, {"fusion": "late"}], ids=str)  # fmt: skip
def test_and_in_sage(options, bad):
    features, present, mask = draw()
    spoilt, hit = spoil(features, bad)
    labels = torch.rand(BATCH, FRAMES, 2, generator=torch.Generator().manual_seed(2)) - 0.5
    results = []
    for x, told in ((features, present & ~hit), (spoilt, present)):
        model = sage(dropout=0.0, **options).train()
        x = {k: v.clone().requires_grad_() for k, v in x.items()}
        out = model(x, told, mask)
        SAGELoss()(out, labels, mask, present & ~hit)[0].backward()
        results.append([*flat(out), *(v.grad for v in x.values()), *(p.grad for p in model.parameters() if p.grad is not None),
                        *model.buffers()])  # fmt: skip
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()
    assert torch.equal(out.nonfinite, (hit & present & mask[..., None]).sum((0, 1)))


def test_without_flags_too():
    features, _, _ = draw()
    spoilt, hit = spoil(features, math.nan)
    for module in (fusion("reliability"), sage()):
        clean, dirty = module(features, ~hit), module(spoilt)
        assert all(torch.equal(a, b) for a, b in zip(flat(clean), flat(dirty)))
        assert torch.equal(dirty.nonfinite, hit.sum((0, 1)))


def test_typicality_inputs_follow_the_rule():
    features, present, _ = draw()
    spoilt, hit = spoil(features, math.inf)
    module = fusion("reliability")
    clean = module(features, present & ~hit, typicality_inputs=features)
    dirty = module(features, present, typicality_inputs=dict(reversed(spoilt.items())))
    assert all(torch.equal(a, b) for a, b in zip(flat(clean), flat(dirty)))
    assert torch.equal(dirty.nonfinite, (hit & present).sum((0, 1)))


def test_assessment_and_statistics_follow_the_rule():
    features, present, mask = draw(frames=40)
    spoilt, hit = spoil(features, math.nan)
    told = present & ~hit
    module, model = fusion("reliability"), sage()
    for got, want in zip(module.assess(spoilt, present, mask)[:2], module.assess(features, told, mask)[:2]):
        assert torch.equal(got, want)
    for got, want in zip(model.assess(spoilt, present, mask), model.assess(features, told, mask)):
        assert torch.equal(got, want)
    for bad in BAD:
        spoilt, _ = spoil(features, bad)
        by_value, by_flag = sage(), sage()
        by_value.fit_statistics([{"features": spoilt, "present": present, "frame": mask}])
        by_flag.fit_statistics([{"features": features, "present": told, "frame": mask}])
        fusions = fusion("reliability"), fusion("reliability")
        fusions[0].fit_typicality([(spoilt, present, mask)])
        fusions[1].fit_typicality([(features, told, mask)])
        for a, b in ((by_value, by_flag), fusions):
            assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))
            assert all(x.isfinite().all() for x in a.buffers())


def test_chunks_equal_the_whole():
    features, present, _ = draw(frames=40)
    spoilt, _ = spoil(features, math.nan)
    for module in (fusion("reliability"), sage()):
        whole, state, parts = module(spoilt, present), None, []
        for a, b in ((0, 7), (7, 8), (8, 40)):
            parts.append(module({k: v[:, a:b] for k, v in spoilt.items()}, present[:, a:b], None, state))
            state = parts[-1].state
        torch.testing.assert_close(torch.cat([p.confidence for p in parts], 1), whole.confidence, atol=1e-5, rtol=1e-5)
        assert torch.equal(sum(p.nonfinite for p in parts), whole.nonfinite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_frame_that_counts(dtype):
    """By the sum of squares in float32, in every dtype; for one feature the bound is exact, and the streaming kernel's."""
    model = SAGE([1], dim=4).eval()
    edge = torch.tensor(LARGEST_NORM, dtype=torch.float64)
    below, above = edge * (1 - 2**-7), edge * (1 + 2**-7)
    if dtype == torch.float32:
        below = edge.float()
        above = torch.nextafter(below, torch.tensor(math.inf))
        assert (below * below).isfinite()
        assert not (above * above).isfinite()
        session = model.stream()
        for x in (below, above):
            session.step([x.view(1, 1)])
        assert session.stats.nonfinite == {"0": 1}
    x = torch.stack([below, above]).view(1, 2, 1).to(dtype)
    assert (x > 0).all()
    assert x.isfinite().all()
    for module in (copy.deepcopy(model).to(dtype), UniformFusion([1], 4).to(dtype)):
        out = module([x])
        assert out.nonfinite.tolist() == [1]
        assert (out.confidence[0, :, 0] > 0).tolist() == [True, False]


@pytest.mark.parametrize("bad", BAD)
def test_streaming_and_offline_agree(bad):
    model = sage()
    features, present, _ = draw(batch=2, frames=60)
    model.fit_statistics([{"features": features, "present": present}])
    spoilt, _ = spoil(features, bad)
    with torch.no_grad():
        whole = model(spoilt, present)
    session, steps = model.stream(2), []
    for t in range(60):
        flags = {"visual": present[:, t, 1], "audio": present[:, t, 0].numpy()}
        out = session.step({k: v[:, t] for k, v in spoilt.items()}, flags if t % 2 else present[:, t])
        steps.append([x.clone() for x in out[:5]])
    for got, want in zip(zip(*steps), whole[:5]):
        torch.testing.assert_close(torch.stack(got, 1), want, atol=1e-5, rtol=0)
    assert list(session.stats.nonfinite.values()) == whole.nonfinite.tolist()


@pytest.mark.slow
def test_compiles_and_exports_with_the_count():
    features, present, _ = draw()
    spoilt, hit = spoil(features, math.nan)
    for module in (fusion("reliability"), fusion("can"), sage()):
        want = module(spoilt, present)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(spoilt, present)
        exported = torch.export.export(module, (spoilt, present)).module()(spoilt, present)
        for got in (compiled, exported):
            assert torch.equal(got.nonfinite, (hit & present).sum((0, 1)))
            torch.testing.assert_close(got.confidence, want.confidence, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("bad", "word"), [(math.nan, "NaN"), (-math.inf, "Inf"), (1e20, "numbers whose squares overflow float32")]
)
def test_strict_names_the_modality_and_the_place(bad, word):
    features, present, mask = draw()
    present[:] = True
    features["visual"][2, 4, 3] = features["visual"][1, 7, 0] = bad
    features["audio"][1, FRAMES - 1] = bad  # padding: not read
    match = rf"^features\[visual\]: expected finite numbers .*, got {word} in sequence 1, frame 7$"
    for module in (fusion("reliability"), fusion("lfan"), sage()):
        with pytest.raises(ValueError, match=match):
            module(features, present, mask, strict=True)
        present[1, 7, 1] = False
        with pytest.raises(ValueError, match="sequence 2, frame 4"):
            module(features, present, mask, strict=True)
        present[2, 4, 1] = False
        assert torch.equal(
            module(features, present, mask, strict=True).confidence, module(features, present, mask).confidence
        )
        present[:] = True
    rows = {k: v[2] for k, v in features.items()}
    with pytest.raises(ValueError, match=rf"features\[visual\]: .* got {word} in row 4"):
        fusion("reliability")(rows, strict=True)
    with pytest.raises(TypeError, match="strict: expected a bool, got int"):
        sage()(features, strict=1)


def test_strict_steps_move_nothing():
    model = sage()
    features, _, _ = draw(batch=2)
    model.fit_statistics([{"features": features}])
    session = model.stream(2)
    session.step({k: v[:, 0] for k, v in features.items()}, strict=True)
    before, stats = session.state_dict(), session.stats
    x = {k: v[:, 1].clone() for k, v in features.items()}
    x["visual"][1, 2] = math.nan
    for given in (x, {k: v.numpy() for k, v in x.items()}):
        with pytest.raises(ValueError, match=r"features\[visual\]: expected finite numbers .* got NaN in row 1"):
            session.step(given, strict=True)
        assert all(torch.equal(v, before[k]) for k, v in session.state_dict().items())
        assert session.stats == stats
    active = torch.tensor([True, False])
    assert session.step(x, None, active, strict=True).present.tolist() == [[True, True], [True, True]]
    present = {"audio": np.array([True, True]), "visual": np.array([True, False])}
    assert session.step(x, present, strict=True).present.tolist() == [[True, True], [True, False]]
    assert session.stats.nonfinite == {"audio": 0, "visual": 0}
    with pytest.raises(TypeError, match="strict: expected a bool, got str"):
        session.step(x, strict="yes")


# ------------------------------------------------------------------------------------------------------------- by name
@pytest.mark.parametrize("name", FUSIONS)
def test_presence_by_name(name):
    features, present, mask = draw()
    by_name = {"visual": present[..., 1], "audio": present[..., 0]}
    module = fusion(name)
    for a, b in zip(flat(module(features, by_name, mask)), flat(module(features, present, mask))):
        assert torch.equal(a, b)
    if not module.fixed_length:
        rows, flags = {k: v[0] for k, v in features.items()}, {k: v[0] for k, v in by_name.items()}
        assert torch.equal(module(rows, flags).fused, module(rows, present[0]).fused)


def test_presence_by_name_in_sage_and_its_loss():
    features, present, mask = draw()
    by_name = {"visual": present[..., 1], "audio": present[..., 0]}
    model = sage()
    out, want = model(features, by_name, mask), model(features, present, mask)
    assert all(torch.equal(a, b) for a, b in zip(flat(out), flat(want)))
    for a, b in zip(model.assess(features, by_name, mask), model.assess(features, present, mask)):
        assert torch.equal(a, b)
    labels = torch.rand(BATCH, FRAMES, 2) - 0.5
    loss = SAGELoss(names=model.names)
    assert torch.equal(loss(out, labels, mask, by_name)[0], loss(want, labels, mask, present)[0])
    assert not torch.equal(loss(out, labels, mask, by_name)[0], loss(want, labels, mask, present.flip(-1))[0])
    with pytest.raises(TypeError, match=r"present: expected a tensor \(SAGELoss was built without names=model.names\)"):
        SAGELoss()(out, labels, mask, by_name)
    with pytest.raises(ValueError, match=r"present: expected the modalities \['audio', 'visual'\], got \['audio'\]"):
        loss(out, labels, mask, {"audio": present[..., 0]})
    others = sage(), sage()
    others[0].fit_statistics([{"features": features, "present": by_name, "frame": mask}])
    others[1].fit_statistics([{"features": features, "present": present, "frame": mask}])
    assert all(torch.equal(a, b) for a, b in zip(others[0].buffers(), others[1].buffers()))


def test_the_op_takes_modalities_by_name():
    """Their order is that of the mapping, in all that has a dimension M; presence goes by name."""
    g = torch.Generator().manual_seed(0)
    values = {k: torch.randn(4, 6, 5, generator=g) for k in ("c", "a", "b")}
    reliability, tau = torch.randn(4, 6, 3, 2, generator=g), torch.randn(3, 2, generator=g)
    present = torch.rand(4, 6, 3, generator=g) > 0.3
    by_name = {k: present[..., "cab".index(k)] for k in "abc"}
    for f in (functional.reliability_fusion, reference.reliability_fusion):
        want = f(list(values.values()), reliability, log_temperature=tau, present=present)
        for flags in (present, by_name):
            for a, b in zip(f(values, reliability, log_temperature=tau, present=flags), want):
                assert torch.equal(a, b)
        for a, b in zip(f(values, reliability), f(list(values.values()), reliability)):
            assert torch.equal(a, b)
    inputs, mean, var = [*values.values()], torch.randn(3, 2), torch.rand(3, 2)
    assert torch.equal(
        reference.typicality(values, mean, var, by_name), reference.typicality(inputs, mean, var, present)
    )


# --------------------------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize("given", [torch.float64, torch.float16, torch.bfloat16])
def test_a_dtype_that_is_not_the_weights_is_named(given):
    features, *_ = draw()
    cast = {torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}[given]
    name = str(given).removeprefix("torch.")
    match = (
        rf"features\[audio\]: expected dtype float32 \(that of the module's weights; cast the features, or the module with "
        rf"\.{cast}\(\)\), got {name}"
    )
    x = {k: v.to(given) for k, v in features.items()}
    for module in (*(fusion(f) for f in FUSIONS), sage(), sage(fusion="mult")):
        with pytest.raises(TypeError, match=match):
            module(x)
        if isinstance(module, ReliabilityFusion | UniformFusion):
            with pytest.raises(TypeError, match=match.replace("audio", "0")):
                fusion(module.__class__.__name__.removesuffix("Fusion").lower(), dims=list(DIMS.values()))(
                    [v[0] for v in x.values()]
                )


@pytest.mark.parametrize("name", FUSIONS)
def test_dtypes_that_fit_go_on_working(name):
    features, present, _ = draw()
    module = fusion(name)
    full = module(features, present)
    # An LSTM in bfloat16 needs a processor that has it.
    for given in () if name == "tagf" else (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            out = module({k: v.to(given) for k, v in features.items()}, present)
        torch.testing.assert_close(out.fused.float(), full.fused, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="got float64"):
        module({k: v.double() for k, v in features.items()}, present)
    double = module.double()({k: v.double() for k, v in features.items()}, present)
    torch.testing.assert_close(double.fused.float(), full.fused, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- errors
ERRORS = [
    (lambda f, p: fusion("reliability")(f, {"audio": p["audio"]}), ValueError, r"present: .*'visual'\], got \['audio'\]"),
    (lambda f, p: fusion("can")(f, {**p, "lips": p["audio"]}), ValueError, r"present: .*, got \['audio', 'visual', 'lips'\]"),
    (lambda f, p: fusion("can")(f, {**p, "audio": None}), TypeError, r"present\[audio\]: expected a torch.Tensor, got NoneType"),
    (lambda f, p: sage()(f, {**p, "audio": p["audio"].float()}), TypeError, r"present\[audio\]: expected dtype bool"),
    (lambda f, p: sage()(f, {**p, "audio": p["audio"][:1]}), ValueError, r"present\[audio\]: .* \(B, T\) = \(3, 11\)"),
    (lambda f, p: fusion("can", dims=[5, 8])(list(f.values()), p), TypeError, "present: expected a tensor .*, got a mapping"),
    (lambda f, p: functional.reliability_fusion([f["audio"]], f["audio"], present=p), TypeError, "present: expected a tensor"),
    (lambda f, p: functional.reliability_fusion(f["audio"], f["audio"]), TypeError, "values: expected a sequence or a mapping"),
    (lambda f, p: functional.reliability_fusion(f, f["audio"]), ValueError, r"values\[visual\]: .* \(that of values\[audio\]\)"),
    (lambda f, p: functional.reliability_fusion({}, f["audio"]), ValueError, "values: expected 1 to 8 modalities, got 0"),
    (lambda f, p: sage().stream(3).step({k: v[:, 0] for k, v in f.items()}, {"audio": p["audio"][:, 0]}), ValueError,
     r"present: expected the modalities \['audio', 'visual'\], got \['audio'\]"),
    (lambda f, p: sage().stream(3).step({k: v[:, 0] for k, v in f.items()}, {k: v[:2, 0] for k, v in p.items()}), ValueError,
     r"present\[audio\]: expected \(3,\), got \(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_errors_name_the_argument(call, error, match):
    features, present, _ = draw()
    with pytest.raises(error, match=match):
        call(features, {"audio": present[..., 0], "visual": present[..., 1]})
