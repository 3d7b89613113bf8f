"""torch.export with any number of frames, our operators taken out, AOTInductor packages, ONNX under ONNX Runtime."""

import io
import itertools
import subprocess
import sys

import pytest
import torch
from tiny import FIELDS, close, draw, tiny, tiny_fusion

from sage_ext import export
from sage_ext.models import SAGE

FRAMES = (1, 2, 3, 63, 64, 65, 500, 4096)
FUSED = ("fused", "weights", "confidence", "stage")


def stored(program):
    """Written to a file and read back."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def agrees(run, model, frames=FRAMES, fields=FIELDS):
    with torch.no_grad():
        for n in frames:
            features, present = draw(n, 3 if n != 2 else 1, n)
            close(run(features, present, None), model(features, present), fields=fields)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def program(model):
    return export.program(model)


# ------------------------------------------------------------------------------------------------------- torch.export
@pytest.mark.slow
def test_one_program_serves_1_to_4096_frames(model, program):
    agrees(stored(program).module(), model)
    names = str(program.graph)
    assert all(f"sage_ext.{op}.default" in names for op in ("stage_filter", "leaky_average", "reliability_fusion"))
    with pytest.raises((AssertionError, RuntimeError)):
        program.module()(*draw(1, 2, 4097), None)


@pytest.mark.slow
def test_a_whole_output_with_dynamic_time_survives_a_file(model):
    """The model itself, as a user exports it: named tuples come back. (It once refused fewer than 65 frames.)"""
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("frames", min=1, max=4096)}
    features, present = draw()
    shapes = (dict.fromkeys(features, axes), axes)
    exported = stored(torch.export.export(model, (features, present), dynamic_shapes=shapes))
    with torch.no_grad():
        for n in (1, 2, 64, 300):
            out, expected = (f(*draw(n, 3, n)) for f in (exported.module(), model))
            close(out, expected)
            torch.testing.assert_close(out.state.fusion.belief, expected.state.fusion.belief)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"fusion": "uniform"}, {"causal": False}, {"fusion": "concat"}, {"memory": []}, {"trust": {"audio": 0.2}}],
    ids=str,
)
def test_other_models_are_exported_with_any_length_too(options):
    model = tiny(1, **options)
    agrees(export.program(model).module(), model, (1, 2, 64, 100))


@pytest.mark.slow
def test_quality_and_modalities_without_names():
    model = tiny(1, quality_dims={"visual": 3})
    run = export.program(model).module()
    features, present = draw(5, 3, 30)
    quality = {"visual": torch.randn(3, 30, 3)}
    quality["visual"][0, 5:9] = torch.nan
    close(run(features, present, quality), model(features, present, quality=quality))
    torch.manual_seed(0)
    model = SAGE([5, 6], dim=8, evidence_dim=4, stages=2, blocks=2).eval()
    named = {"modality_0": features["audio"], "modality_1": features["visual"]}
    close(export.program(model).module()(named, present, None), model(list(features.values()), present))


def test_it_leaves_the_model_as_it_was():
    fusion = tiny_fusion().train()
    fusion.value.eval()
    before = {name: x.clone() for name, x in fusion.state_dict().items()}
    program = export.program(fusion, max_frames=50)
    assert fusion.training
    assert not fusion.value.training
    assert all(torch.equal(x, before[name]) for name, x in fusion.state_dict().items())
    agrees(program.module(), fusion.eval(), (1, 20, 50), FUSED)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model: expected a SAGE or a fusion of sage_ext\.nn, got Linear"):
        export.program(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"max_frames: expected an int >= 2, got 1"):
        export.program(tiny_fusion(), max_frames=1)


# ------------------------------------------------------------------------------------- without our operators
@pytest.mark.slow
def test_in_plain_operators_alone(model, program, tmp_path):
    """To rounding the same, and it runs where sage_ext was never imported."""
    plain = export.plain(program)
    assert not [n for n in plain.graph.nodes if "sage_ext" in str(n.target) or "cummax" in str(n.target)]
    agrees(plain.module(), model)
    torch.export.save(plain, tmp_path / "plain.pt2")
    features, present = draw(6, 2, 30)
    torch.save((features, present, model(features, present).prediction.detach()), tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        f"features, present, expected = torch.load({str(tmp_path / 'data.pt')!r})\n"
        f"run = torch.export.load({str(tmp_path / 'plain.pt2')!r}).module()\n"
        "torch.testing.assert_close(run(features, present, None)['prediction'], expected, atol=1e-5, rtol=0)\n"
        "assert 'sage_ext' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


class Cummax(torch.nn.Module):
    def forward(self, x):
        return torch.cummax(x, 1)


@pytest.mark.parametrize("whole", [False, True])
def test_the_running_maximum_in_plain_operators(whole):
    """With ties, of which cummax takes the last, and NaN, which stays."""
    x = torch.randint(0, 5, (3, 12, 2), generator=torch.Generator().manual_seed(0))
    if not whole:
        x = x.double()
        x[1, 7] = torch.nan
    plain = export.plain(torch.export.export(Cummax(), (x,)))
    values, indices = plain.module()(x)
    expected = torch.cummax(x, 1)
    torch.testing.assert_close(values, expected.values, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(indices, expected.indices)


# --------------------------------------------------------------------------------------------------------- AOTInductor
@pytest.mark.slow
def test_an_aotinductor_package(model, program, tmp_path):
    """A C++ compiler, and minutes."""
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "sage.pt2"))
    agrees(torch._inductor.aoti_load_package(path), model)


# ---------------------------------------------------------------------------------------------------------------- ONNX
def onnx_agrees(path, model, fields, frames=FRAMES):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()][:3] == ["audio", "visual", "present"]
    assert [o.name for o in session.get_outputs()] == list(fields)
    for n in frames:
        features, present = draw(n, 3 if n != 2 else 1, n)
        features["audio"][0, : n // 4] = torch.nan
        feeds = {**{name: x.numpy() for name, x in features.items()}, "present": present.numpy()}
        out = dict(zip(fields, map(torch.from_numpy, session.run(None, feeds))))
        with torch.no_grad():
            close(out, model(features, present), fields=fields)


@pytest.mark.slow
def test_onnx_runtime_gives_the_models_answers(model, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = export.onnx(model, tmp_path / "sage.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["sage.onnx"]
    onnx_agrees(path, model, FIELDS)


@pytest.mark.slow
def test_onnx_of_the_fusion(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    fusion = tiny_fusion(joint=True)
    onnx_agrees(export.onnx(fusion, tmp_path / "fusion.onnx"), fusion, FUSED)


def test_without_onnxscript_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is not installed.*sage-ext\[onnx\]"):
        export.onnx(tiny_fusion(), tmp_path / "fusion.onnx")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- a chunk after the other
CUTS = [0, 1, 2, 3, 17, 18, 40]


def chunks(run, model, fields):
    """run(features, present, quality, state) -> tensors by name, over three sequences cut at CUTS, against the whole ones. As
    many sequences as stages and experts, so that a size that was taken for another shows."""
    features, present = draw(5, 3, CUTS[-1])
    features["audio"][1, 7:19] = torch.nan
    present[2, 16:30] = False
    asked = isinstance(model, SAGE) and any(model.quality_dims)
    quality = {"visual": torch.randn(3, CUTS[-1], 3, generator=torch.Generator().manual_seed(6))} if asked else None
    with torch.no_grad():
        whole = model(features, present, quality=quality)
    state, found = export.first_state(model, 3), []
    for a, b in itertools.pairwise(CUTS):
        own = None if quality is None else {name: x[:, a:b] for name, x in quality.items()}
        out = run({name: x[:, a:b] for name, x in features.items()}, present[:, a:b], own, state)
        state = {name: out[f"next_{name}"] for name in state}
        found.append(out)
    close({name: torch.cat([out[name] for out in found], 1) for name in fields}, whole, fields=fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"quality_dims": {"visual": 3}}, {"fusion": "uniform"}, {"trust": {"audio": 0.2}}], ids=str
)
def test_a_streaming_program(options):
    model = tiny(1, **options)
    chunks(stored(export.program(model, streaming=True)).module(), model, FIELDS)


@pytest.mark.slow
def test_a_stream_under_onnx_runtime(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = tiny(1, quality_dims={"visual": 3})
    session = runtime.InferenceSession(str(export.onnx(model, tmp_path / "stream.onnx", streaming=True)))
    names = [o.name for o in session.get_outputs()]

    def run(features, present, quality, state):
        feeds = {**features, "present": present, **{f"quality_{name}": x for name, x in quality.items()}, **state}
        assert {i.name for i in session.get_inputs()} == set(feeds)
        return dict(
            zip(names, map(torch.from_numpy, session.run(None, {name: x.numpy() for name, x in feeds.items()})))
        )

    chunks(run, model, FIELDS)


def test_a_streaming_fusion_and_what_carries_nothing():
    fusion = tiny_fusion()
    state = export.first_state(fusion, 2)
    assert {name: len(x) for name, x in state.items()} == dict.fromkeys(
        ("state_belief", "state_energy", "state_counted", "state_last"), 2
    )
    chunks(export.program(fusion, 64, streaming=True).module(), fusion, FUSED)
    with pytest.raises(ValueError, match=r"model: expected a causal one, which carries a state"):
        export.first_state(tiny(causal=False))
    with pytest.raises(ValueError, match=r"batch: expected an int >= 1, got 0"):
        export.first_state(fusion, 0)
    with pytest.raises(TypeError, match=r"model: expected a SAGE or a fusion"):
        export.first_state(torch.nn.Linear(2, 2))
