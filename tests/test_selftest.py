"""`sage-ext info --test`: a sound build passes, and a fault in any op is reported, forward, backward or raised."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from backends import SIMT, open_backend

from sage_ext import _C, cli, functional, selftest, stream
from sage_ext._ops import _door
from sage_ext.stream import StreamingSession

STREAM = selftest.STREAM
OPS = ["stage_filter", "reliability_fusion", "ccc", "ccc_moments", "temporal_ccc", "leaky_average"]


@pytest.fixture
def one_backend(monkeypatch):
    """The CPU as it is in use: the other instruction sets are the business of the first test."""
    monkeypatch.setattr(selftest, "backends", lambda: [("cpu", "cpu", None)])


def test_a_sound_build_passes(capsys):
    """Every op, dtype and instruction set that this machine has; and the one in use is in use again afterwards."""
    before = _C.isa()
    assert cli.main(["info", "--test"]) == 0
    out = capsys.readouterr().out
    assert "CPU kernels:" in out  # what else belongs into an issue
    assert out.endswith("\n\nall ok\n")
    here = [name for name, built, supported in _C.isa_variants() if built and supported]
    for op in (*OPS, STREAM):
        for name in here:
            for dtype in ("float32", "bfloat16"):
                assert len(re.findall(rf"^{op} +cpu {name} +{dtype} +\d\.\d\de[+-]\d\d  ok$", out, re.MULTILINE)) == 1
    assert _C.isa() == before


def test_the_inputs_are_those_of_the_seed():
    first, again, other = (selftest.cases(seed)[0].tensors["emission"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("where", ["forward", "backward", "nan", "shape"])
def test_a_planted_fault_is_reported(capsys, monkeypatch, one_backend, op, where):
    right = getattr(functional, op)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        if where == "forward":
            first = first + 0.05 * first.detach().abs().max()
        elif where == "backward":  # the same value, 5 % more gradient
            first = first + 0.05 * (first - first.detach())
        elif where == "nan":
            first = torch.where(torch.ones_like(first).cumsum(-1) == 1, torch.nan, first)
        else:
            first = first[..., :1]
        return (first, *out[1:]) if isinstance(out, tuple) else first

    monkeypatch.setattr(functional, op, wrong)
    monkeypatch.setattr(selftest, "streaming_error", lambda *_: 0.0)  # the whole model too is made of these ops
    assert cli.main(["info", "--test"]) == 1
    out = capsys.readouterr().out
    failed = re.findall(r"^(\w+) +cpu +(\w+) +\S+  FAILED", out, re.MULTILINE)
    assert failed == [(op, "float32"), (op, "bfloat16")]
    assert out.endswith("\n\n2 FAILED\n")


@pytest.mark.parametrize(
    "where", ["prediction", "stage", "nan", "shape", "state", "present", "quality", "stuck", "raises", "model"]
)
def test_a_fault_of_the_streaming_step_is_reported(capsys, monkeypatch, one_backend, where):
    """In what it gives, in what it takes in, and in what it remembers; and a model whose whole forward is another."""
    monkeypatch.setattr(selftest, "cases", lambda seed: [])
    right, load = StreamingSession.step, StreamingSession.load_state_dict

    def wrong(self, features, present=None, active=None, *, quality=None, strict=False):
        if where == "raises":
            raise RuntimeError("launch failed")
        if where == "present":
            present = torch.ones_like(present)
        if where == "quality":
            quality = None
        out = right(self, features, present, active, quality=quality, strict=strict)
        if where == "prediction":
            return out._replace(prediction=out.prediction + 1e-3)
        if where == "stage":
            return out._replace(stage=out.stage.flip(-1))
        if where == "nan":
            return out._replace(weights=out.weights * torch.nan)
        return out._replace(prediction=out.prediction[:, :1]) if where == "shape" else out

    def forgets(self, state, rows=None):
        load(self, {**state, "memory": torch.zeros_like(state["memory"])}, rows)

    def never(*args, _shape=stream._shape):
        return {**_shape(*args), "stuck": False}

    if where == "state":
        monkeypatch.setattr(StreamingSession, "load_state_dict", forgets)
    elif where == "stuck":
        monkeypatch.setattr(stream, "_shape", never)
    elif where == "model":
        filtered = functional.stage_filter
        monkeypatch.setattr(functional, "stage_filter", lambda e, *args, **kwargs: filtered(1.05 * e, *args, **kwargs))
    else:
        monkeypatch.setattr(StreamingSession, "step", wrong)
    assert cli.main(["info", "--test"]) == 1
    out = capsys.readouterr().out
    assert re.findall(r"^(\w+) +cpu +(\w+) +\S+  FAILED", out, re.MULTILINE) == [
        (STREAM, "float32"),
        (STREAM, "bfloat16"),
    ]
    assert ("RuntimeError: launch failed" in out) == (where == "raises")


def test_a_kernel_that_raises_is_reported(capsys, monkeypatch, one_backend):
    """And those after it still run."""

    def broken(*args):
        raise RuntimeError("launch failed\nwith code 7")

    kernels = {name: getattr(_C.cpu, name) for name in dir(_C.cpu) if not name.startswith("_")}
    assert "stage_filter_backward" in kernels
    monkeypatch.setitem(_door.kernels, "cpu", SimpleNamespace(**{**kernels, "stage_filter_backward": broken}))
    rows = selftest.run(seed=3)
    assert [row.op for row in rows if not row.ok] == ["stage_filter"] * 2
    assert all(row.answer == "FAILED (RuntimeError: launch failed with code 7)" for row in rows if not row.ok)
    assert {row.op for row in rows if row.ok} == {*OPS, STREAM} - {"stage_filter"}


def test_the_reference_in_the_place_of_kernels_is_no_success(monkeypatch, one_backend):
    """A backend that is said to be there and is not would otherwise be the reference against itself."""
    monkeypatch.delitem(_door.kernels, "cpu")
    rows = selftest.run()
    assert {row.answer for row in rows} == {"FAILED (RuntimeError: no kernels for device 'cpu')"}


def test_the_cuda_kernels_under_emulation_pass(monkeypatch, one_backend):
    """Their order of sums is another one: the limits are wide enough for it."""
    if SIMT is None:
        pytest.skip("no compiler for the emulation")
    open_backend("simt", monkeypatch)
    rows = selftest.run()
    assert {row.op for row in rows} == {*OPS, STREAM}
    assert all(row.ok for row in rows), rows
