"""StreamingSession on a GPU: emulated (tests/simt) everywhere, real where there is one. The emulated device has as many
multiprocessors as a test says, which decides how many streams a block takes (1, 2 or 4)."""

import copy
import ctypes
import math
import threading
import time
from functools import partialmethod
from itertools import pairwise

import pytest
import test_session as on_cpu
import torch
from backends import CUDA, SIMT, SIMT_MODULE
from test_session import (
    CASES,
    DIMS,
    EVERYTHING,
    FIELDS,
    KINDS,
    assert_close,
    assert_same,
    build,
    draw,
    frame,
    keep,
    offline,
    rows_of,
    stack,
    told,
)  # fmt: skip

from sage_ext._ops import _door
from sage_ext.models import SAGE
from sage_ext.stream import StreamOutput

ROOM = 227 * 1024
ORDERS = (0, 1, 2)


@pytest.fixture(params=["simt"] * (SIMT is not None) + ["cuda"] * CUDA)
def device(request, monkeypatch):
    if request.param == "simt":
        monkeypatch.setitem(_door.kernels, "cuda", SIMT)
        SIMT_MODULE.simt.set_device(2, ROOM)
    yield "cuda:0"
    if request.param == "simt":
        SIMT_MODULE.simt.set_device(2, ROOM)
        SIMT_MODULE.simt.set_order(0)
        SIMT_MODULE.simt.set_inexact(False)


@pytest.fixture
def simt(device):
    if "cuda" in _door.kernels and _door.kernels["cuda"] is not SIMT:
        pytest.skip("of the emulator")
    return SIMT_MODULE.simt


def orders(request):
    """Under emulation each order of the threads in turn; a GPU has its own."""
    for order in ORDERS if "simt" in request.node.name else (0,):
        if SIMT_MODULE is not None:
            SIMT_MODULE.simt.set_order(order)
        yield order


# ------------------------------------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("rows", [1, 3, 5], ids=["1 a block", "2 a block", "4 a block"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "sequence of dims"])
def test_steps_equal_the_offline_model(case, rows, device, request):
    """In float64, after events of every kind; the same bits under every order of the threads."""
    dims, options = CASES[case]
    model, frames = build(dims, **options), 12
    features, present = draw(rows, frames, dims, seed=3)
    quality, found = told(model, rows, frames), []
    present[:, 7:9] = False  # nothing at all
    for _ in orders(request):
        session = model.stream(rows, device=device)
        steps = (session.step(frame(features, t), present[:, t], quality=frame(quality, t)) for t in range(frames))
        found.append(stack([keep(out) for out in steps]))
        assert_same(found[0], found[-1])
    exact = copy.deepcopy(model).double()
    x, sure = (None if of is None else {k: v.double() for k, v in of.items()} for of in (features, quality))
    whole = offline(exact, x, present, sure)
    for field in FIELDS:
        torch.testing.assert_close(getattr(found[0], field).double(), getattr(whole, field).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["default sizes", "eight modalities"])
def test_steps_equal_the_offline_model_with_the_exponentials_of_a_gpu(case, simt, device):
    """The kernel's expf and logf up to 2 ulp from the CPU's, at the tolerance of the test above."""
    dims, options = CASES[case]
    model, frames, rows, found = build(dims, **options), 12, 3, []
    features, present = draw(rows, frames, dims, seed=3)
    quality = told(model, rows, frames)
    for inexact in (False, True):
        simt.set_inexact(inexact)
        session = model.stream(rows, device=device)
        steps = (session.step(frame(features, t), present[:, t], quality=frame(quality, t)) for t in range(frames))
        found.append(stack([keep(out) for out in steps]))
    plain, moved = found
    assert not torch.equal(plain.prediction, moved.prediction)
    x, sure = (None if of is None else {k: v.double() for k, v in of.items()} for of in (features, quality))
    whole = offline(copy.deepcopy(model).double(), x, present, sure)
    for field in FIELDS:
        torch.testing.assert_close(getattr(moved, field).double(), getattr(whole, field).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [2, 3])
def test_short_windows_of_typicality(window, device, request):
    """Where a frame's slot is the one that another lane has just read."""
    model, found = build(), []
    model.fusion.typicality.window = window
    features, present = draw(3, 12, seed=4)
    for _ in orders(request):
        session = model.stream(3, device=device)
        found.append(stack([keep(session.step(frame(features, t), present[:, t])) for t in range(12)]))
        assert_same(found[0], found[-1])
    assert_close(found[0], offline(model, features, present))


@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_frames_with_gaps_resets_pauses_and_broken_frames(kind, device):
    """Against the offline model in float64 of each stretch between resets, frames in which the row paused taken out."""
    frames, rows = 300, 5
    model = build(**KINDS[kind])
    features, present = draw(rows, frames, seed=5)
    quality = told(model, rows, frames)
    g = torch.Generator().manual_seed(6)
    active = torch.rand(frames, rows, generator=g) > 0.2
    resets = torch.rand(frames, rows, generator=g) < 1 / 90
    broken = (torch.rand(rows, frames, 2, generator=g) < 0.03) & present & active.T[:, :, None]
    active[100:150, 1] = False
    resets[0] = False
    session, outs = model.stream(rows, device=device), []
    for t in range(frames):
        if resets[t].any():
            session.reset(resets[t])
        x = {k: v.masked_fill(broken[:, t, m, None], math.nan) for m, (k, v) in enumerate(frame(features, t).items())}
        outs.append(keep(session.step(x, present[:, t], active[t], quality=frame(quality, t))))
    outs, exact, compared = stack(outs), copy.deepcopy(model).double(), 0
    for row in range(rows):
        for a, b in pairwise([0, *resets[:, row].nonzero().flatten().tolist(), frames]):
            index = a + active[a:b, row].nonzero().flatten()
            seen = present[None, row, index] & ~broken[None, row, index]
            x, sure = (
                None if of is None else {k: v[None, row, index].double() for k, v in of.items()}
                for of in (features, quality)
            )
            whole = offline(exact, x, seen, sure)
            for field in FIELDS:
                got = getattr(outs, field)[row, index].double()
                torch.testing.assert_close(got, getattr(whole, field)[0].double(), atol=1e-5, rtol=0)
            compared += len(index)
    assert compared == session.stats.frames == int(active.sum())
    counted = active.T[:, :, None]
    assert list(session.stats.nonfinite.values()) == (broken & counted).sum((0, 1)).tolist()
    assert ((~present | broken) & counted <= ~outs.present).all()  # and where they are stuck
    assert list(session.stats.absent.values()) == (~outs.present & counted).sum((0, 1)).tolist()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_bits_depend_on_neither_batch_nor_row(dtype, device, request):
    """7 streams: 4 to a block, 2 to a block in another order, each alone."""
    rows, frames, dims = 7, 12, {"audio": 19, "visual": 40}
    model = build(dims, dim=70, num_targets=3, **EVERYTHING)
    features, present = draw(rows, frames, dims, seed=8)
    quality = told(model, rows, frames)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    together = model.stream(rows, dtype, device)
    if "simt" in request.node.name:
        SIMT_MODULE.simt.set_device(4, ROOM)
    shuffled = model.stream(rows, dtype, device)
    alone = [model.stream(1, dtype, device) for _ in range(rows)]
    for t in range(frames):
        active = torch.arange(rows) % 5 != t % 5
        x, p, sure = frame(features, t), present[:, t], frame(quality, t)
        a = keep(together.step(x, p, active, quality=sure))
        b = shuffled.step(rows_of(x, order), p[order], active[order], quality=rows_of(sure, order))
        assert_same(StreamOutput(*(v[order] for v in a)), b)
        for r in range(rows):
            if active[r]:
                one = slice(r, r + 1)
                c = alone[r].step(rows_of(x, one), p[one], quality=rows_of(sure, one))
                assert_same(StreamOutput(*(v[one] for v in a)), c)
    state = together.state_dict()
    for r in range(rows):
        assert all(
            torch.equal(v[r : r + 1], state_r) for v, state_r in zip(state.values(), alone[r].state_dict().values())
        )


def test_bfloat16_rounds_the_matrices_and_nothing_else(device):
    model = build()
    features, present = draw(2, 40)
    session = model.stream(2, torch.bfloat16, device)
    outs = stack([keep(session.step(frame(features, t), present[:, t])) for t in range(40)])
    assert_close(outs, offline(on_cpu.with_rounded_matrices(model), features, present))
    assert (outs.prediction - offline(model, features, present).prediction).abs().max() > 1e-5


# ------------------------------------------------------------------------------------- what holds on the CPU holds here
SHARED = [
    ("test_a_frame_that_is_not_finite_counts_as_absent", {"bad": math.nan}),
    ("test_a_frame_that_is_not_finite_counts_as_absent", {"bad": 1e30}),
    ("test_absent_modalities_and_inactive_rows_are_not_read", {}),
    ("test_present_tells_which_frames_counted", {}),
    ("test_each_modality_has_a_limit_of_its_own", {}),
    ("test_present_tells_what_the_fusion_is_not_told", {}),
    ("test_numpy_strided_and_torch_inputs_agree", {}),
    ("test_mode_dtype_and_inference_mode_do_not_matter", {}),
    ("test_later_changes_of_the_model_are_not_seen", {}),
    ("test_a_stream_moves_between_sessions_to_the_bit", {}),
    *(("test_state_is_that_of_the_offline_model", {"kind": kind}) for kind in KINDS),
    ("test_what_is_told_of_quality", {}),
    ("test_reset_begins_a_new_stream_in_its_rows_only", {}),
    *(
        ("test_errors_name_the_argument_and_move_nothing", dict(zip(("call", "error", "match"), e)))
        for e in on_cpu.ERRORS
    ),
]


@pytest.mark.parametrize(("name", "arguments"), SHARED, ids=[name[5:] for name, _ in SHARED])
def test_as_on_the_cpu(name, arguments, device, monkeypatch):
    monkeypatch.setattr(SAGE, "stream", partialmethod(SAGE.stream, device=device))
    getattr(on_cpu, name)(**arguments)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_stream_moves_between_cpu_and_gpu(dtype, device):
    """There and back while it runs, into sessions of other sizes: what the offline model computes."""
    model = build(**EVERYTHING)
    features, present = draw(1, 60)
    sessions, quality = [model.stream(3, dtype), model.stream(6, dtype, device)], told(model, 1, 60)
    stay, at, outs, kept = model.stream(1, dtype), 0, [], []
    for t in range(60):
        if t % 11 == 10:
            sessions[1 - at].load_state_dict(sessions[at].state_dict(2), 2)
            at = 1 - at
        n = sessions[at].batch_size
        x, sure = ({k: v[:, t].expand(n, -1) for k, v in of.items()} for of in (features, quality))
        out = sessions[at].step(x, present[:, t].expand(n, -1), quality=sure)
        outs.append(StreamOutput(*(v[2:3].clone() for v in out)))
        kept.append(keep(stay.step(frame(features, t), present[:, t], quality=frame(quality, t))))
    assert_close(stack(outs), stack(kept))


# ------------------------------------------------------------------------------------------------------ the session
def test_a_step_is_one_launch_and_allocates_nothing(simt):
    session = build().stream(5, device="cuda:0")
    features, present = draw(5, 6)
    session.step(frame(features, 0))
    launches, allocations = simt.launches(), simt.allocations()
    for t in range(6):
        session.step(frame(features, t), present[:, t], torch.arange(5) != t)
    assert simt.launches() == launches + 6
    assert simt.allocations() == allocations


def test_inputs_may_lie_on_the_host_pinned_or_on_the_device(simt):
    rows, wide = 3, 1500  # more bytes than are copied rather than asked about
    model = build({"audio": 7, "visual": wide})
    features, present = draw(rows, 8, {"audio": 7, "visual": wide})
    plain, native = model.stream(rows, device="cuda:0"), model.stream(rows, device="cuda:0")
    features = {k: v.transpose(0, 1).contiguous() for k, v in features.items()}
    active = torch.tensor([True, False, True])
    places = [simt.allocate(rows * 7 * 4, True), simt.allocate(rows * wide * 4, False), simt.allocate(rows * 2, True)]
    try:
        for t in range(8):
            audio, visual, p = features["audio"][t], features["visual"][t], present[:, t].contiguous()
            simt.upload(places[0], audio.data_ptr(), rows * 7 * 4)
            torch.frombuffer((ctypes.c_char * (rows * wide * 4)).from_address(places[1]), dtype=torch.float32).copy_(
                visual.flatten()
            )
            simt.upload(places[2], p.data_ptr(), rows * 2)
            there = 0b01001  # audio, not visual; not quality; present, not active
            native._native.step(tuple(places[:2]), 0, places[2], active.data_ptr(), there, native._targets, 0, 0)
            assert_same(plain.step({"audio": audio, "visual": visual}, p, active), native._output)
    finally:
        for place in places:
            simt.release(place)


def test_the_gpus_own_tensors(device):
    """And outputs on the CPU all the same."""
    if not CUDA:
        pytest.skip("no GPU")
    model = build()
    features, present = draw(2, 20)
    a, b = model.stream(2, device=device), model.stream(2, device=device)
    for t in range(20):
        x = frame(features, t)
        out = b.step({k: v.to(device) for k, v in x.items()}, present[:, t].to(device))
        assert_same(a.step(x, present[:, t]), out)
        assert all(v.is_cpu for v in out)


def test_a_step_under_capture_is_refused_before_anything_moves(device, monkeypatch):
    session, other = (build().stream(2, device=device) for _ in range(2))
    features, present = draw(2, 3)
    for t in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(RuntimeError, match="expected no CUDA graph to be captured"):
                session.step(frame(features, t), present[:, t])
        assert_same(session.step(frame(features, t), present[:, t]), other.step(frame(features, t), present[:, t]))


def test_rows_are_read_and_written_with_one_wait_for_many(device):
    """70 rows: more than are lent at once. State, and outputs of zeros, to the right row."""
    rows, model = 70, build()
    a, b = model.stream(rows, device=device), model.stream(rows, device=device)
    features, present = draw(rows, 3)
    for t in range(2):
        a.step(frame(features, t), present[:, t])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    b.load_state_dict(a.state_dict(order))
    assert_same(
        b.step(rows_of(frame(features, 2), order), present[order, 2]),
        StreamOutput(*(v[order] for v in keep(a.step(frame(features, 2), present[:, 2])))),
    )
    b.reset(torch.arange(rows) % 2 == 0)
    frames = b.state_dict()["frames"]
    assert frames.tolist() == [0, 3] * (rows // 2)
    assert not b._output.prediction[::2].any()
    assert b._output.prediction[1::2].all()


def test_a_failed_launch_is_a_clear_error_and_the_next_step_works(simt):
    session, other = (build().stream(2, device="cuda:0") for _ in range(2))
    features, present = draw(2, 3)
    simt.fail_next_launch(209)
    with pytest.raises(RuntimeError, match=r"session of 2 rows on cuda:0: .*rebuild with CMAKE_CUDA_ARCHITECTURES"):
        session.step(frame(features, 0))
    for t in range(3):
        assert_same(session.step(frame(features, t), present[:, t]), other.step(frame(features, t), present[:, t]))


def test_a_model_that_does_not_fit_a_block_is_refused(simt):
    simt.set_device(2, 48 * 1024)
    build().stream(1, device="cuda:0")
    with pytest.raises(ValueError, match=r"in_dims, dim, evidence_dim.* takes \d+ bytes .* cuda:0 has 49152"):
        build({"audio": 20_000}).stream(1, device="cuda:0")
    model = build()
    outs = [keep(model.stream(9, device="cuda:0").step(frame(draw(9, 1)[0], 0)))]
    simt.set_device(2, ROOM)  # now 4 streams fit a block
    assert_same(outs[0], model.stream(9, device="cuda:0").step(frame(draw(9, 1)[0], 0)))


def test_one_call_at_a_time(device):
    """Whichever of two threads comes second is told so."""
    session, done, refused = build().stream(40, device=device), threading.Event(), []
    x = {k: torch.randn(40, d) for k, d in DIMS.items()}

    def work(call):
        deadline = time.monotonic() + 20
        while not done.is_set() and time.monotonic() < deadline:
            try:
                call()
            except RuntimeError as error:
                refused.append(str(error))
                done.set()

    worker = threading.Thread(target=work, args=(lambda: session.step(x),))
    worker.start()
    work(lambda: session.state_dict(0))
    worker.join()
    assert all("in use by another thread" in r for r in refused)
    assert refused
    assert session.step(x).prediction.isfinite().all()


def test_devices_are_checked(monkeypatch):
    model = build()
    for device, error in (("cuda:0", "no CUDA kernels"), ("tpu", "device: expected"), ("meta", "device: expected")):
        with monkeypatch.context() as patch:
            patch.delitem(_door.kernels, "cuda", raising=False)
            with pytest.raises(ValueError, match=error):
                model.stream(device=device)
    with pytest.raises(TypeError, match="device: expected"):
        model.stream(device=0)
    assert str(model.stream(device="cpu").device) == str(model.stream().device) == "cpu"
