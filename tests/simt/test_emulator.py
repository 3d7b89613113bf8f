"""The emulator that stands in for a GPU is itself tested: right kernels pass, each planted mistake is caught."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simt import build

pytestmark = pytest.mark.skipif(shutil.which(build.compiler()[0]) is None, reason="no C++ compiler")
HERE = Path(__file__).parent
ORDERS = (0, 1, 2, 3)
N = 128


def planted_module(sanitize: bool, races: bool = False) -> Path:
    name, kernels = "planted_races" if races else "planted", [HERE / "planted.cu"]
    return build.build(sanitize, bindings=HERE / "planted.cpp", name=name, kernels=kernels, races=races)


@pytest.fixture(scope="module")
def planted():
    return build.load(planted_module(False), "planted")


def results(planted, which: int) -> list[torch.Tensor]:
    x = torch.arange(1.0, N + 1)
    found = []
    for order in ORDERS:
        planted.simt.set_order(order)
        out = torch.full((N,), float("nan"))
        planted.planted(which, x.data_ptr(), out.data_ptr())
        found.append(out)
    return found


WANTED = {
    "reverse": lambda x: x.flip(0),
    "swap": lambda x: x.view(-1, 2).flip(1).reshape(-1),
    "rounds": lambda x: 6 * x.roll(-40),
    "read": lambda x: x,
    "shared": lambda x: x,
    "write": lambda x: x,
}


@pytest.mark.parametrize(
    ("which", "name"), [(0, "reverse"), (2, "swap"), (4, "rounds"), (6, "read"), (8, "shared"), (12, "write")]
)
def test_right_kernels_give_the_same_under_every_order(planted, which, name):
    for out in results(planted, which):
        assert torch.equal(out, WANTED[name](torch.arange(1.0, N + 1)))


@pytest.mark.parametrize(("which", "name"), [(1, "reverse"), (3, "swap"), (5, "rounds"), (13, "write")], ids=str)
def test_a_missing_barrier_or_write_shows(planted, which, name):
    """Under at least two of the orders: orders 0 and 1 are each other's mirror."""
    wrong = [not torch.equal(out, WANTED[name](torch.arange(1.0, N + 1))) for out in results(planted, which)]
    assert sum(wrong) >= 2


def test_unwritten_output_and_shared_memory_are_nan(planted):
    assert all(out[77].isnan() and out.isnan().sum() == 1 for out in results(planted, 13))
    assert all(out.isnan().all() for out in results(planted, 16))


# Planted kernel, its right twin, and what the detector says of it.
RACES = {
    "no __syncthreads": (1, 0, r"byte \d+ of shared memory"),
    "no __syncwarp": (3, 2, r"byte \d+ of shared memory"),
    "no second __syncthreads": (5, 4, r"of shared .* read at .*planted.cu:\d+.* writes at .*planted"),
    "all write one word": (21, 20, r"byte 0 of shared memory.* wrote at .*planted.cu:\d+.* writes at .*planted"),
    "a shuffle for a barrier": (23, 22, r"byte \d+ of shared memory"),
    "__syncwarp for __syncthreads": (25, 24, r"thread 0 of .* warp 0\) wrote .* thread 96 of .* warp 1\) writes"),
    "two blocks write one word": (27, 26, r"memory at .* of block 0 .* wrote .* of block 1 .* writes"),
    "two threads write one byte": (29, 28, r"memory at "),
}


@pytest.fixture(scope="module")
def watched():
    return build.load(planted_module(False, races=True), "planted_races")


@pytest.mark.parametrize("name", RACES)
def test_races_are_caught_and_their_right_twins_pass(watched, name):
    """Under every order: also where the emulation's own barriers hide them."""
    wrong, right, words = RACES[name]
    x, out = torch.arange(1.0, N + 1), torch.zeros(N)
    for order in ORDERS:
        watched.simt.set_order(order)
        watched.simt.detect(collect=False)
        watched.planted(right, x.data_ptr(), out.data_ptr())
        with pytest.raises(RuntimeError, match="race in launch") as caught:
            watched.planted(wrong, x.data_ptr(), out.data_ptr())
        if order == 0:
            assert re.search(words, str(caught.value)), caught.value
        watched.planted(right, x.data_ptr(), out.data_ptr())  # and the next launch works
        watched.simt.detect(collect=True)
        watched.planted(wrong, x.data_ptr(), out.data_ptr())
        assert watched.simt.races()
    watched.simt.detect(collect=False)


@pytest.mark.parametrize("which", [21, 23, 25, 27, 29])
def test_these_races_change_no_bit(planted, which):
    """So the detector alone catches them."""
    first, *others = results(planted, which)
    assert all(torch.equal(first.view(torch.int32), other.view(torch.int32)) for other in others)


def test_threads_can_be_preempted_at_accesses(watched):
    """Then a missing barrier shows in an order that the barriers alone would not give."""
    x, found = torch.arange(1.0, N + 1), set()
    watched.simt.set_order(2)
    for seed in range(8):
        watched.simt.detect(collect=True, preempt_one_in=3, seed=seed)
        out = torch.zeros(N)
        switches = watched.simt.switches()
        watched.planted(4, x.data_ptr(), out.data_ptr())
        assert torch.equal(out, 6 * x.roll(-40))
        found.add(watched.simt.switches() - switches)
        assert not watched.simt.races()
    assert len(found) > 1
    watched.simt.set_order(0)
    watched.simt.detect(collect=False)


@pytest.mark.parametrize(
    ("which", "how"), [(11, "memory at .* as .*uint4"), (31, "byte 4 of shared memory as .*uint4")]
)
def test_a_misaligned_vector_is_an_error(planted, watched, which, how):
    """Which the CPU takes as any other: in a build without the check it passes."""
    right = {11: 10, 31: 30}[which]
    results(planted, right)
    with pytest.raises(
        RuntimeError, match=rf"simt: misaligned use of {how}.*, which needs 16 bytes, at planted.cu:\d+"
    ):
        results(planted, which)
    results(planted, right)  # and the next launch works
    watched.simt.detect(collect=True)
    results(watched, which)
    watched.simt.detect(collect=False)


@pytest.mark.parametrize("which", [14, 15])
def test_a_barrier_that_not_all_reach_is_an_error(planted, which):
    with pytest.raises(RuntimeError, match="never reach"):
        results(planted, which)


@pytest.mark.parametrize(("which", "why"), [(17, "whole warps"), (18, "Configuration"), (19, "refused")])
def test_launches_beyond_the_limits_are_refused(planted, which, why):
    with pytest.raises(RuntimeError, match=why):
        results(planted, which)


@pytest.mark.parametrize(
    ("which", "found"),
    [("pinned", 2.0), ("pageable", 1.0), ("event", 2.0), ("no event", None), ("forgotten", None)],
)
def test_streams_run_when_they_are_waited_for(planted, which, found):
    """A pinned source is read then, a pageable one at once; unwaited work has not happened."""
    value = planted.runtime(which)
    assert math.isnan(value) if found is None else value == found


@pytest.mark.parametrize("which", ["long", "kind"])
def test_copies_that_do_not_fit_or_go_the_wrong_way_are_refused(planted, which):
    with pytest.raises(RuntimeError, match="cudaError 1"):
        planted.runtime(which)


@pytest.mark.parametrize("which", ["malloc", "host", "stream", "event", "pageable"])
def test_what_waits_or_allocates_is_refused_in_capture(planted, which):
    """And makes the capture invalid: also for who does not look at the error."""
    assert planted.captured(which) == (900, -1)


@pytest.mark.parametrize("which", ["pinned", "memset"])
def test_work_is_captured_and_not_run(planted, which):
    assert planted.captured(which) == (0, 1)


def test_inexact_exponentials_show_what_cancels(planted):
    """Up to 2 ulp away, the same each time; a kernel that multiplies the difference is then far off."""
    plain = {which: results(planted, which)[0] for which in (32, 33)}
    planted.simt.set_inexact(True)
    try:
        moved = {which: results(planted, which) for which in (32, 33)}
    finally:
        planted.simt.set_inexact(False)
    assert all(torch.equal(out, found[0]) for found in moved.values() for out in found)
    ulps = moved[32][0].view(torch.int32) - plain[32].view(torch.int32)
    assert set(ulps.tolist()) == {-2, -1, 0, 1, 2}
    assert (moved[33][0] - plain[33]).abs().max() > 0.2


@pytest.mark.parametrize(("which", "error"), [("launch", 400), ("copy", 1), ("memset", 1)])
def test_streams_and_memory_belong_to_a_device(planted, which, error):
    assert planted.elsewhere(which, 0) == 0
    assert planted.elsewhere(which, 1) == error


@pytest.fixture
def devices(planted):
    simt = planted.simt
    simt.select(0)
    yield simt
    simt.select(0)


@pytest.mark.parametrize(("device", "error"), [(-1, 101), (0, 0), (1, 0), (2, 101)])
def test_there_are_two_devices(devices, device, error):
    assert devices.select(device) == error


def test_the_guard_sets_a_device_and_restores_the_callers(planted, devices):
    for caller in (0, 1):
        devices.select(caller)
        for device in (0, 1):
            assert planted.guarded(device, True) == device
            assert devices.selected() == caller


def test_the_guard_refuses_a_device_that_cannot_be_set(planted, devices):
    with pytest.raises(RuntimeError, match=r"sage_ext: cuda:2 cannot be made the current device: refused"):
        planted.guarded(2, True)
    assert planted.guarded(2, False) == 0  # in a destructor
    assert devices.selected() == 0


def test_the_guard_makes_no_context_on_the_callers_device(planted, devices):
    devices.forget_contexts()
    assert planted.guarded(1, True) == 1
    assert devices.contexts() == [False, True]
    assert planted.guarded(1, True) == 1
    assert devices.contexts() == [False, True]


def test_the_host_cannot_touch_device_memory():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from simt import build; build.load(sys.argv[2], 'planted')"
    command = [sys.executable, "-c", code + ".runtime('touch')", str(HERE.parent), str(planted_module(False))]
    assert subprocess.run(command, capture_output=True).returncode < 0


SANITIZED = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from simt import build
planted = build.load(sys.argv[2], "planted")
x = (ctypes.c_float * 128)(*range(128))   # its own heap block: red zones on both sides
out = (ctypes.c_float * 128)()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.aligned_alloc.restype = ctypes.c_void_p
p, o = libc.aligned_alloc(16, 512), libc.aligned_alloc(16, 512)
ctypes.memmove(p, x, 512)
planted.planted(int(sys.argv[3]), p, o)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "right", "why"),
    [(7, 6, "heap-buffer-overflow"), (9, 8, "heap-buffer-overflow"), (11, 10, "misaligned")],
)
def test_sanitizers_catch_reads_out_of_bounds_and_misaligned(wrong, right, why):
    module = planted_module(True)

    def run(which: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", SANITIZED, str(HERE.parent), str(module), str(which)]
        return subprocess.run(command, env=build.sanitizer_environment(), capture_output=True, text=True)

    good, bad = run(right), run(wrong)
    assert good.returncode == 0, good.stderr
    assert "done" in good.stdout
    assert bad.returncode != 0
    assert why in bad.stderr


@pytest.mark.slow
def test_op_tests_under_the_sanitizers():
    """The kernels' op tests once more, in a build under AddressSanitizer and UndefinedBehaviorSanitizer; without the longest."""
    env = {**build.sanitizer_environment(), "SAGE_TEST_SIMT": "sanitize", "OMP_NUM_THREADS": "1"}
    chosen = ["tests/simt/test_kernels.py", "tests/ops/test_values.py", "tests/stream/test_cuda_session.py"]
    streams = "not cuda_session or offline_model and (odd or uniform or eight)"
    chosen += ["-k", f"simt and not gradcheck and not chunks and not float64 and ({streams})"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, env=env, cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
