"""The kernels under the race detector (races.cpp): every access of every op's kernels, forward and backward, ordered by
barriers and not by luck. The emulation's other tests compare bits; here the order they came about in does not matter."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from simt import build

from sage_ext import functional
from sage_ext._ops import _door

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
sys.path.insert(0, str(Path(__file__).parents[1] / "stream"))
import test_session as session
from cases import CASES, Case, Random, filter_inputs, fusion_inputs, leaky_inputs, pair_inputs, run

pytestmark = pytest.mark.skipif(shutil.which(build.compiler()[0]) is None, reason="no C++ compiler")


def _filter(frames: int, stages: int, batch: int = 1, dtype: torch.dtype = torch.float32, **more) -> tuple[Case, dict]:
    return Case("stage_filter", "", filter_inputs), filter_inputs(Random(3, dtype), batch, frames, stages, **more)


def _fusion(rows: int, modalities: int, dim: int, dtype: torch.dtype = torch.float32, **more) -> tuple[Case, dict]:
    inputs = fusion_inputs(Random(dim, dtype), (rows,), modalities, dim, 3, **more)
    return Case("reliability_fusion", "", fusion_inputs), inputs


def _pairs(
    op: str, *shape: int, dtype: torch.dtype = torch.float32, mask: str | None = "frame", **mode
) -> tuple[Case, dict]:
    return Case(op, "", pair_inputs, kwargs=mode), pair_inputs(Random(6, dtype), *shape, mask=mask)


def _leaky(frames: int, dim: int, averages: int, dtype: torch.dtype = torch.float32, **mode) -> tuple[Case, dict]:
    case = Case("leaky_average", "", leaky_inputs, ("halflife",), mode)
    return case, leaky_inputs(Random(frames, dtype), 2, frames, dim, averages, state=True)


def _contradicted() -> tuple[Case, dict]:
    case, inputs = _filter(1030, 3)
    inputs["emission"][:, ::37] *= 1e4 / 2
    inputs["transition"][0, 1] = -80.0
    return case, inputs


bf16, f16, f64 = torch.bfloat16, torch.float16, torch.float64
FAST = {
    "filter in chunks": lambda: _filter(1030, 3),
    "fusion": lambda: _fusion(5, 2, 136, bf16),
    "ccc": lambda: _pairs("ccc", 2, 150, 3),
    "temporal_ccc": lambda: _pairs("temporal_ccc", 1, 300, 1, window=30),
    "leaky_average": lambda: _leaky(61, 33, 2, causal=False, relative=True),
}
SLOW = {
    **{str(case): lambda case=case: (case, case.inputs()) for case in CASES},
    "filter in chunks of 4 stages": lambda: _filter(1100, 4, 3),
    "filter in chunks of 6 stages": lambda: _filter(1100, 6),
    "filter in chunks in float64": lambda: _filter(1030, 3, dtype=f64),
    "filter in chunks with contradictions": _contradicted,
    "filter of several blocks": lambda: _filter(40, 4, 21),
    **{
        f"fusion of {rows}x{modalities}x{dim} {dtype}": lambda a=(rows, modalities, dim, dtype): _fusion(*a)
        for rows, modalities, dim in ((37, 2, 64), (6, 3, 264), (5, 2, 512), (3, 4, 256), (9, 5, 48), (70, 1, 7), (3, 2, 2056))
        for dtype in (torch.float32, f16)
    },
    "fusion without norm": lambda: _fusion(75, 2, 64, norm=False, stage=False, sharpness=None),
    "ccc of several chunks": lambda: _pairs("ccc", 2, 4096 + 301, 2, mask="element"),
    "ccc of one channel": lambda: _pairs("ccc", 9000, 1),
    **{
        f"temporal_ccc of several warps {mode}": lambda mode=mode: _pairs("temporal_ccc", 1, 900, 1, **mode)
        for mode in ({}, {"halflife": 40.0}, {"window": 700})
    },
    **{
        f"temporal_ccc of several tiles {mode}": lambda mode=mode: _pairs("temporal_ccc", 1, 4500, 1, dtype=f64, **mode)
        for mode in ({"halflife": 40.0}, {"window": 3000})
    },
    **{
        f"leaky_average of {a} {'causal' if causal else 'both ways'} {dtype}": lambda a=a, causal=causal, dtype=dtype: _leaky(
            *a, dtype, causal=causal, relative=a[2] == 6
        )
        for a in ((233, 37, 3), (130, 5, 6), (1100, 1, 2))
        for causal in (True, False)
        for dtype in (torch.float32, bf16)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def module():
    csrc = Path(os.environ.get("SAGE_TEST_SIMT_CSRC", build.ROOT / "csrc"))  # mutate.py: a copy with a mistake
    return build.load(build.build(csrc=csrc, name="_C_simt_races", races=True), "_C_simt_races")


@pytest.fixture(autouse=True)
def detector(module, monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(_door.kernels, "cpu", module.cuda)
    monkeypatch.setitem(_door.kernels, "cuda", module.cuda)
    module.simt.set_device(2, 227 * 1024)
    module.simt.set_order(0)
    module.simt.detect(collect=True)
    yield
    module.simt.set_order(0)


def found(module, case: Case, inputs: dict, grads=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    before = module.simt.accesses()
    outputs, gradients, cotangents = run(case, functional, inputs, grads=grads)
    assert module.simt.accesses() > before  # or the kernels are not watched
    assert not (races := module.simt.races()), "\n".join(races)
    return [*outputs, *gradients.values()], cotangents


@pytest.mark.parametrize("name", FAST)
def test_no_race(module, name):
    found(module, *FAST[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_no_race_at_all(module, name):
    found(module, *SLOW[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_threads_preempted_at_accesses_compute_the_same(module, name):
    """A thread runs on to its next barrier in the other tests; here another comes first at one access in 50, 5 or 2."""
    case, inputs = FAST[name]()
    expected, grads = found(module, case, inputs)
    for seed, one_in in enumerate((50, 5, 2)):
        module.simt.set_order(2 + seed)
        module.simt.detect(collect=True, preempt_one_in=one_in, seed=seed)
        for a, b in zip(found(module, case, inputs, grads)[0], expected, strict=True):
            assert torch.equal(a, b), (seed, one_in)


def step(module, case: str, rows: int, frames: int = 6) -> list[torch.Tensor]:
    dims, options = session.CASES[case]
    model = session.build(dims, **options)
    features, present = session.draw(rows, frames, dims, seed=3)
    quality, found = session.told(model, rows, frames), []
    stream = model.stream(rows, device="cuda:0")
    before = module.simt.accesses()
    for t in range(frames):
        active = torch.arange(rows) % 5 != t % 5 if rows > 1 else None
        out = stream.step(session.frame(features, t), present[:, t], active, quality=session.frame(quality, t))
        found += [x.clone() for x in out if isinstance(x, torch.Tensor)]
    assert module.simt.accesses() > before
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 5], ids=["1 a block", "2 a block", "4 a block"])
@pytest.mark.parametrize("case", [c for c in session.CASES if c != "sequence of dims"])
def test_no_race_in_a_session(module, case, rows):
    step(module, case, rows)
    assert not (races := module.simt.races()), "\n".join(races)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["default sizes", "eight modalities", "doubt of seven"])
def test_a_session_preempted_at_accesses_computes_the_same(module, case):
    expected = step(module, case, 3)
    for seed, one_in in enumerate((50, 5)):
        module.simt.set_order(2 + seed)
        module.simt.detect(collect=True, preempt_one_in=one_in, seed=seed)
        for a, b in zip(step(module, case, 3), expected, strict=True):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), (seed, one_in)
