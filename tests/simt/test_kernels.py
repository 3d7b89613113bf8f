"""CUDA kernels under emulation at the sizes where they change shape: several chunks, tiles and warps, every kernel of the
files, under several orders of the threads (bits must not differ) and against the float64 reference."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from backends import SIMT, SIMT_MODULE
from torch.utils import _pytree as pytree

from sage_ext import _C, functional, reference
from sage_ext._ops import _door

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import CASES, Case, Random, converted, filter_inputs, fusion_inputs, leaky_inputs, pair_inputs, run

pytestmark = pytest.mark.skipif(SIMT is None, reason="no C++ compiler for the emulation")
ORDERS = (0, 1, 2)
FILTER = Case("stage_filter", "long", filter_inputs)
FUSION = Case("reliability_fusion", "wide", fusion_inputs)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setitem(_door.kernels, "cpu", SIMT)
    yield SIMT_MODULE
    SIMT_MODULE.simt.set_order(0)
    SIMT_MODULE.simt.set_inexact(False)


@pytest.fixture
def poison():
    """Every torch.empty is NaN (True, the largest integer): what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(module, case: Case, inputs: dict, tolerance: float) -> list[torch.Tensor]:
    """The outputs: their bits and the gradients' equal under every order; near the reference in float64."""
    first = None
    for order in ORDERS:
        module.simt.set_order(order)
        out, grads, cotangents = run(case, functional, inputs, grads=None if first is None else first[2])
        found = [*[x for x in out if x is not None], *grads.values()]
        if first is None:
            first = (found, (out, grads), cotangents)
        for a, b in zip(found, first[0], strict=True):
            assert torch.equal(a, b), f"order {order}"
    out, grads = first[1]
    wanted, wanted_grads, _ = run(case, reference, converted(inputs, torch.float64), grads=first[2])
    for a, b in zip([*out, *grads.values()], [*wanted, *wanted_grads.values()], strict=True):
        assert torch.isfinite(a.double()).all()
        scale = b.double().abs().max().item() if b.numel() else 0.0
        error = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
        assert error <= tolerance * max(scale, 1e-3), f"{case}: {error:.3g} of {scale:.3g}"
    return [x for x in first[1][0] if x is not None]


HALF = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "modalities", "dim"),
    [
        (37, 2, 64),
        (5, 2, 136),
        (9, 1, 256),
        (6, 3, 264),
        (6, 2, 512),
        (5, 2, 1024),
        (3, 4, 256),
        (9, 5, 48),
        (3, 2, 2056),
    ],
)
def test_fusion(module, dtype, rows, modalities, dim):
    inputs = fusion_inputs(Random(dim, dtype), (rows,), modalities, dim, 3)
    check(module, FUSION, inputs, HALF[dtype])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [128, 200, 256, 512, 1024])
@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_a_row_of_fusion_is_the_same_at_any_address_and_beside_any_rows(module, dtype, dim, modalities):
    """Rows that fill a lane's vectors, those that do not, and those read number by number have kernels of their own; many
    rows go through a warp four at a time, few one or two at a time, and many come round again."""
    inputs = fusion_inputs(Random(dim, dtype), (389,), modalities, dim, 3)
    per_row = ("reliability", "stage", "present")

    def few(rows: slice) -> dict:
        return {
            **inputs,
            "values": [x[rows] for x in inputs["values"]],
            **{name: inputs[name][rows] for name in per_row if isinstance(inputs.get(name), torch.Tensor)},
        }

    def unaligned(x: torch.Tensor) -> torch.Tensor:
        buffer = x.new_zeros(x.numel() + 1)
        return buffer[1:].view(x.shape).copy_(x)

    with torch.no_grad():
        expected = run(FUSION, functional, inputs)[0]
        for rows in (slice(0, 3), slice(5, 6), slice(100, 170)):
            for a, b in zip(run(FUSION, functional, few(rows))[0], expected, strict=True):
                assert torch.equal(a, b[rows])
        moved = {**few(slice(0, 40)), "values": [unaligned(x[:40]) for x in inputs["values"]]}
        for a, b in zip(run(FUSION, functional, moved)[0], expected, strict=True):
            assert torch.equal(a, b[:40])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dim", [64, 7])
def test_fusion_of_several_chunks(module, dim):
    inputs = fusion_inputs(Random(1), (75,), 2, dim, 4)
    check(module, FUSION, inputs, 2e-5)
    inputs = fusion_inputs(Random(2), (75,), 2, dim, 4, norm=False, stage=False, sharpness=None)
    check(module, FUSION, inputs, 2e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("stages", "dtype"), [(4, torch.float32), (3, torch.float32), (6, torch.float32), (3, torch.float64)]
)
def test_stage_filter_in_chunks(module, stages, dtype):
    """Longer than 1024 frames: summaries of chunks, chained, replayed."""
    inputs = filter_inputs(Random(3, dtype), 1, 1100, stages, scale=1.5)
    check(module, FILTER, inputs, 1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.usefixtures("poison")
def test_stage_filter_in_chunks_with_contradictions(module):
    """Evidence of +-1e4 and a forbidden transition: the frames that are taken in log space."""
    inputs = filter_inputs(Random(4), 1, 1030, 3)
    inputs["emission"][:, ::37] *= 1e4 / 2
    inputs["transition"][0, 1] = -80.0
    case = Case("stage_filter", "hard", filter_inputs)
    for order in ORDERS:
        module.simt.set_order(order)
        out, grads, _ = run(case, functional, inputs)
        wanted, wanted_grads, _ = run(case, reference, converted(inputs, torch.float64))
        assert (out[0].double() - wanted[0]).abs().max() < 2e-3  # float32 evidence of 1e4 has a step of 1e-3
        assert (out[1].double() - wanted[1]).abs().max() < 2e-3 * wanted[1].abs().max()
        for name, g in grads.items():
            assert torch.isfinite(g).all(), name
            assert (g.double() - wanted_grads[name]).abs().max() <= 1e-2 * wanted_grads[name].abs().max() + 1e-4, name


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("mask", [None, "frame", "element"])
def test_ccc_of_several_chunks(module, channels, mask):
    inputs = pair_inputs(Random(5), 2, 4096 * 2 + 301, channels, mask=mask)  # the second group lies unaligned
    check(module, Case("ccc", "long", pair_inputs), inputs, 1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", [{}, {"halflife": 40.0}, {"window": 30}, {"window": 700}], ids=str)
def test_temporal_ccc_over_several_warps(module, mode):
    inputs = pair_inputs(Random(6), 1, 900, 1, mask="frame")
    check(module, Case("temporal_ccc", "long", pair_inputs, kwargs=mode), inputs, 1e-4)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", [{"halflife": 40.0}, {"window": 3000}], ids=str)
def test_temporal_ccc_over_several_tiles(module, monkeypatch, mode):
    """More than 256 x 16 frames, against the CPU kernels (the reference is quadratic here)."""
    inputs = pair_inputs(Random(7, torch.float64), 1, 4500, 1, mask="frame")
    case = Case("temporal_ccc", "tiles", pair_inputs, kwargs=mode)
    out, grads, cotangents = run(case, functional, inputs)
    monkeypatch.setitem(_door.kernels, "cpu", _C.cpu)
    wanted, wanted_grads, _ = run(case, functional, inputs, grads=cotangents)
    for a, b in zip([*out, *grads.values()], [*wanted, *wanted_grads.values()], strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())


def test_no_launch_for_nothing(module):
    before = module.simt.launches()
    empty = torch.zeros(0, 5, 4)
    functional.stage_filter(empty, torch.zeros(4, 4))
    functional.reliability_fusion([torch.zeros(0, 8)] * 2, torch.zeros(0, 2, 3))
    functional.temporal_ccc(torch.zeros(0, 4, 2), torch.zeros(0, 4, 2))
    assert module.simt.launches() == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (35, r"driver serves CUDA 12\.4 and is older than the CUDA 13\.0 runtime"),
        (209, r"architectures .* compute capability 7\.0: rebuild with CMAKE_CUDA_ARCHITECTURES=70"),
        (1, "refused"),
    ],
)
def test_a_failed_launch_is_one_clear_error(module, error, words):
    module.simt.fail_next_launch(error)
    x = torch.randn(3, 5, 2)
    with pytest.raises(RuntimeError, match=r"ccc of \(1, 15, 2\) float32 on cuda:\d+: .*" + words):
        functional.ccc(x, x)
    assert math.isclose(functional.ccc(x, x)[0].item(), 1.0, rel_tol=1e-6)  # and the next call works


INEXACT = {
    "fusion": lambda module: check(module, FUSION, fusion_inputs(Random(64), (37,), 2, 64, 3), 2e-5),
    "wide fusion": lambda module: check(module, FUSION, fusion_inputs(Random(264), (6,), 3, 264, 3), 2e-5),
    "filter": lambda module: check(module, FILTER, filter_inputs(Random(3), 3, 70, 4, scale=1.5), 1e-4),
    "filter in chunks": lambda module: check(module, FILTER, filter_inputs(Random(3), 1, 1100, 4, scale=1.5), 1e-4),
}


@pytest.mark.parametrize("name", INEXACT)
def test_tolerances_hold_with_the_exponentials_of_a_gpu(module, name):
    """expf and logf up to 2 ulp from the CPU's, which shows in the outputs and goes no further than the tolerance. The other
    ops' kernels take no such function of float32."""
    plain = INEXACT[name](module)
    module.simt.set_inexact(True)
    moved = INEXACT[name](module)
    assert any(not torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


OPS = ("reliability_fusion", "stage_filter", "ccc", "temporal_ccc", "leaky_average")


@pytest.mark.parametrize("case", [c for c in CASES if c.op in OPS], ids=str)
def test_ops_are_legal_in_capture(module, monkeypatch, case):
    """Forward and backward send their work to the capturing stream alone, wait for nothing and allocate nothing."""
    stream = module.simt.create_stream()
    monkeypatch.setattr(_door, "placement", lambda _: (0, stream))
    inputs = case.inputs()
    ran, allocated = module.simt.launches(), module.simt.allocations()

    def captured(work):
        module.simt.begin_capture(stream)
        try:
            return work()
        finally:
            assert module.simt.end_capture(stream) > 0

    try:
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for x in tensors:
            x.requires_grad_(True)
        for name in case.constant:
            if isinstance(inputs.get(name), torch.Tensor):
                inputs[name].requires_grad_(False)
        out = captured(lambda: case.call(functional, inputs))
        wanted = [x for x in out if x is not None and x.requires_grad]
        captured(
            lambda: torch.autograd.grad(wanted, [x for x in tensors if x.requires_grad], wanted, allow_unused=True)
        )
    finally:
        module.simt.destroy_stream(stream)
    assert (module.simt.launches(), module.simt.allocations()) == (ran, allocated)


def test_an_op_runs_on_the_device_of_its_stream(module, monkeypatch):
    """Whatever device is the caller's, which is restored."""
    x = torch.randn(3, 5, 2)
    module.simt.select(1)
    stream = module.simt.create_stream()
    monkeypatch.setattr(_door, "placement", lambda _: (1, stream))
    try:
        for caller in (0, 1):
            module.simt.select(caller)
            module.simt.begin_capture(stream)
            functional.ccc(x, x)
            assert module.simt.end_capture(stream) > 0
            assert module.simt.selected() == caller
    finally:
        module.simt.select(0)
        module.simt.destroy_stream(stream)


def test_what_info_asks(module):
    assert module.cuda_versions() == "runtime 13.0, driver for CUDA 12.4"
    assert module.cuda_problem(0) == ""
    module.simt.fail_next_launch(209)
    assert "rebuild with CMAKE_CUDA_ARCHITECTURES=70" in module.cuda_problem(0)
    assert "cuda:7 cannot be made the current device" in module.cuda_problem(7)
    assert module.cuda_problem(0) == ""


# Several tiles of every kernel's runs, a last tile that is not full, and two groups of channels with a partial one.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize(("averages", "frames", "dim"), [(3, 233, 37), (6, 130, 5), (2, 61, 33)])
def test_leaky_average(module, dtype, causal, averages, frames, dim):
    case = Case("leaky_average", "long", leaky_inputs, ("halflife",), {"causal": causal, "relative": averages == 6})
    r = Random(frames, dtype)
    inputs = leaky_inputs(r, 2, frames, dim, averages, state=True)
    inputs["precision"][:, ::5] = 0  # not read
    check(module, case, inputs, HALF.get(dtype, 1e-10))


def test_leaky_average_scans_longer_than_a_warp_holds(module):
    """What has no channels is scanned by a warp in tiles of 512 frames."""
    for causal in (True, False):
        case = Case("leaky_average", "long", leaky_inputs, ("halflife",), {"causal": causal, "relative": True})
        check(module, case, leaky_inputs(Random(1, torch.float64), 2, 1100, 1, 2, state=True), 1e-9)
