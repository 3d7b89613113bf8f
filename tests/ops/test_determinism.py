"""The same bits whatever the thread count, the rest of the batch, and the run; every instruction set right; fork safe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import (
    CASES,
    Case,
    Random,
    compare,
    cotangents,
    filter_inputs,
    fresh,
    fusion_inputs,
    leaky_inputs,
    leaves,
    named,
    pair_inputs,
    run,
)  # fmt: skip
from torch.utils import _pytree as pytree

from sage_ext import _C, functional

# op -> (case, inputs of n rows, names of inputs with a row axis, outputs with a row axis). Sizes pass the blocks that the
# kernels cut rows, frames and channels into; extreme rows sit beside plain ones.


def extreme(inputs, name, dim=0):
    x = inputs[name]
    x.select(dim, 0).mul_(1e4)
    x.select(dim, x.shape[dim] // 2).mul_(-300)
    return inputs


def rows_of_fusion(r, n):
    return extreme(fusion_inputs(r, (n,), 2, 37, 4, sharpness="each"), "reliability")


ROWS = {
    "stage_filter": (
        Case("stage_filter", "rows", filter_inputs), lambda r, n: extreme(filter_inputs(r, n, 11, 4), "emission"),
        ("emission", "initial", "mask"), (0, 1),
    ),
    "stage_filter-S5": (
        Case("stage_filter", "rows", filter_inputs), lambda r, n: filter_inputs(r, n, 11, 5),
        ("emission", "initial", "mask"), (0, 1),
    ),
    "reliability_fusion": (
        Case("reliability_fusion", "rows", fusion_inputs), rows_of_fusion, ("values", "reliability", "stage", "present"),
        (0, 1, 2),
    ),
    "reliability_fusion-M3": (
        Case("reliability_fusion", "rows", fusion_inputs),
        lambda r, n: fusion_inputs(r, (n,), 3, 64, 2, norm=False, present=False), ("values", "reliability", "stage"), (0, 1, 2),
    ),
    "ccc": (
        Case("ccc", "rows", pair_inputs, kwargs={"pool": "sequence"}), lambda r, n: pair_inputs(r, n, 77, 3, mask="element"),
        ("pred", "target", "mask"), (0,),
    ),
    "ccc_moments": (
        Case("ccc_moments", "rows", pair_inputs, kwargs={"pool": "sequence"}),
        lambda r, n: pair_inputs(r, n, 77, 2, mask="frame"), ("pred", "target", "mask"), (0,),
    ),
    **{
        f"temporal_ccc-{name}": (
            Case("temporal_ccc", "rows", pair_inputs, constant=("state",), kwargs=mode),
            lambda r, n: pair_inputs(r, n, 41, 3, mask="frame"), ("pred", "target", "mask"), (0, 1),
        )
        for name, mode in {"cumulative": {}, "window": {"window": 9}, "halflife": {"halflife": 5.0}}.items()
    },
    **{
        f"leaky_average-{name}": (
            Case("leaky_average", "rows", leaky_inputs, ("halflife",), kwargs=mode),
            lambda r, n: leaky_inputs(r, n, 70, 37, state=True, unread=True), ("x", "precision", "state"), (0, 1),
        )
        for name, mode in {"causal": {}, "both-ways": {"causal": False, "relative": True}}.items()
    },
}  # fmt: skip
ALL_ROWS = pytest.mark.parametrize("op", ROWS)
FLOATS = [torch.float32, torch.float64]


def pick(inputs, per_row, index):
    """The rows `index` of every input that has rows."""
    take = lambda x: x[index] if isinstance(x, torch.Tensor) else x  # noqa: E731
    return {n: pytree.tree_map(take, x) if n in per_row else x for n, x in inputs.items()}


def assert_same(a, b, what=""):
    for (name, x), y in zip(a.items(), b.values(), strict=True):
        assert torch.equal(x, y), f"{name} {what}"


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (op, d)
        for op in ROWS
        for d in (*FLOATS, torch.bfloat16)
        if d != torch.bfloat16 or "fusion" in op or "leaky" in op
    ],
    ids=str,
)
def test_batch_invariance(backend, op, dtype):
    """A row alone, in any batch and at any place, has the bits (outputs and gradients) that it has in a big batch."""
    case, make, per_row, outputs = ROWS[op]
    n = backend.size(70, 12)
    inputs = make(Random(1, dtype, backend.device), n)
    out, grads, cotangents = run(case, functional, inputs)
    generator = torch.Generator().manual_seed(2)
    shuffled = torch.randperm(n, generator=generator)
    some = [
        [0],
        [n // 2],
        [n - 1],
        list(range(3)),
        list(range(1, 9)),
        [5] * 9,
        list(range(n // 2, n)),
        shuffled.tolist(),
    ]
    for rows in some:
        index = torch.tensor(rows, device=backend.device)
        part = pick(inputs, per_row, index)
        got, got_grads, _ = run(
            case, functional, part, grads=[g[index] if i in outputs else g for i, g in enumerate(cotangents)]
        )
        for i in outputs:
            assert torch.equal(got[i], out[i][index]), f"output {i} of rows {rows[:9]}"
        for name, g in got_grads.items():
            if name.split(".")[0] in per_row:
                assert torch.equal(g, grads[name][index]), f"grad {name} of rows {rows[:9]}"


@ALL_ROWS
def test_the_address_of_a_row_does_not_matter(backend, op):
    """The same rows as a view into a larger buffer, at every alignment."""
    case, make, per_row, _ = ROWS[op]
    inputs = make(Random(3, device=backend.device), 9)
    expected = named(*run(case, functional, inputs)[:2])
    for offset in (1, 3, 7):

        def moved(x, offset=offset):
            if not isinstance(x, torch.Tensor):
                return x
            buffer = x.new_zeros(x.numel() + 8)
            view = buffer[offset : offset + x.numel()].view(x.shape)
            return view.copy_(x)

        assert_same(named(*run(case, functional, pytree.tree_map(moved, inputs))[:2]), expected, f"at offset {offset}")


def big(op, backend):
    case, make, _, _ = ROWS[op]
    rows = {"stage_filter": 60, "reliability_fusion": 2000, "ccc": 300, "temporal_ccc": 90, "leaky_average": 30}
    n = next(v for k, v in rows.items() if op.startswith(k))
    return case, make(Random(4, device=backend.device), backend.size(n, 10))


@ALL_ROWS
def test_two_runs_give_the_same_bits(backend, op):
    case, inputs = big(op, backend)
    expected = named(*run(case, functional, inputs)[:2])
    for _ in range(3):
        assert_same(named(*run(case, functional, inputs)[:2]), expected)


def test_pooled_gradients_and_long_groups_repeat(backend):
    """ccc over one long group, cut into pieces that are merged in a fixed order."""
    inputs = pair_inputs(Random(5, device=backend.device), 3, backend.size(20000, 50), 2, mask="frame")
    case = Case("ccc", "pooled", pair_inputs)
    assert_same(named(*run(case, functional, inputs)[:2]), named(*run(case, functional, inputs)[:2]))


# --------------------------------------------------------------------------------------------------------- threads
@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@ALL_ROWS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_thread_counts_give_the_same_bits(cpu_only, threads, op, dtype):
    case, inputs = big(op, cpu_only)
    inputs = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs
    )
    threads(1)
    expected = named(*run(case, functional, inputs)[:2])
    for count in (2, 3, 7):
        threads(count)
        assert_same(named(*run(case, functional, inputs)[:2]), expected, f"with {count} threads")


def test_thread_counts_on_one_long_group(cpu_only, threads):
    for case, inputs in (
        (Case("ccc", "pooled", pair_inputs), pair_inputs(Random(6), 2, 30000, 2, mask="frame")),
        (Case("ccc_moments", "pooled", pair_inputs), pair_inputs(Random(7), 50001, 1)),
        (Case("reliability_fusion", "long", fusion_inputs), fusion_inputs(Random(8), (9000,), 2, 5, 3)),
        (Case("stage_filter", "long", filter_inputs), filter_inputs(Random(9), 40, 200, 4)),
    ):
        threads(1)
        expected = named(*run(case, functional, inputs)[:2])
        for count in (2, 5):
            threads(count)
            assert_same(named(*run(case, functional, inputs)[:2]), expected, f"{case} with {count} threads")


# ------------------------------------------------------------------------------------------------ instruction sets
@pytest.fixture
def restore_isa():
    before = _C.isa()
    yield
    _C.set_isa(before)


ISA = {name: (built, supported) for name, built, supported in _C.isa_variants()}
EACH_ISA = pytest.mark.parametrize("isa", ISA)


def use(isa):
    built, supported = ISA[isa]
    if not (built and supported):
        pytest.skip(f"{isa}: built {built}, supported by this machine {supported}")
    _C.set_isa(isa)
    assert _C.isa() == isa


def test_the_best_instruction_set_is_chosen(cpu_only):
    if "SAGE_EXT_CPU_ISA" in os.environ:
        assert _C.isa() == os.environ["SAGE_EXT_CPU_ISA"]
    else:
        assert _C.isa() == [name for name, (built, supported) in ISA.items() if built and supported][-1]
    assert list(ISA) == ["baseline", "avx2", "avx512"]
    assert ISA["baseline"] == (True, True)


@EACH_ISA
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_instruction_set(cpu_only, restore_isa, case, isa):
    use(isa)
    for dtype in FLOATS:
        compare(case, case.inputs(11, dtype))


@EACH_ISA
def test_each_instruction_set_at_every_tail(cpu_only, restore_isa, isa):
    """D and the number of rows, sequences and channels through every remainder of the widest vector."""
    use(isa)
    fusion, filtering = Case("reliability_fusion", "tail", fusion_inputs), Case("stage_filter", "tail", filter_inputs)
    concordance, running = (
        Case("ccc", "tail", pair_inputs),
        Case("temporal_ccc", "tail", pair_inputs, constant=("state",)),
    )
    for n in range(1, 35):
        compare(fusion, fusion_inputs(Random(n), (3,), 2, n + 2, 3))
        compare(fusion, fusion_inputs(Random(n), (n,), 3, 5, 3, norm=False))
        compare(concordance, pair_inputs(Random(n), n, 3, mask="frame"))
        compare(concordance, pair_inputs(Random(n), 4, n, mask="element"))
        if n % 3 == 0:
            compare(filtering, filter_inputs(Random(n), n, 3, 3))
            compare(running, pair_inputs(Random(n), n, 4, 1))


@EACH_ISA
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_instruction_set_converts_halves_exactly(cpu_only, restore_isa, isa, dtype):
    """Every finite half, both ways: as a lone modality of weight 1 the value comes back, its gradient too."""
    use(isa)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for dim in (1, 16, 19):
        rows = every[: every.numel() // dim * dim].view(-1, dim).clone().requires_grad_()
        fused, _, _ = functional.reliability_fusion([rows], torch.zeros(len(rows), 1, 1))
        assert torch.equal(fused, rows)
        cotangent = rows.detach().flip(0)
        (grad,) = torch.autograd.grad(fused, rows, cotangent)
        assert torch.equal(grad, cotangent)
    # and a result between two halves is rounded to nearest even, as PyTorch's conversion does
    x = Random(12).normal(500, 33)
    x = (x * 10.0 ** torch.arange(-9, 5).repeat(36)[:500, None]).clamp(-6e4, 6e4)
    halves = [x.to(dtype), x.flip(0).to(dtype)]
    fused, weights, _ = functional.reliability_fusion(halves, torch.zeros(500, 2, 1))
    assert torch.equal(fused, ((halves[0].double() + halves[1].double()) / 2).to(dtype))


@EACH_ISA
def test_overflow_to_half_is_infinity(cpu_only, restore_isa, isa):
    use(isa)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
    weight, bias = torch.full((1, 2), 1e5), torch.tensor([[0.0, 1e6]])
    fused, _, _ = functional.reliability_fusion([x], torch.zeros(1, 1, 1), norm_weight=weight, norm_bias=bias)
    assert fused.tolist() == [[-float("inf"), float("inf")]]


@EACH_ISA
def test_accuracy_of_exp_and_log(cpu_only, restore_isa, isa):
    """The lanes' exp and log seen through the ops: two float32 roundings over the whole range where sigmoid is not 0 or 1."""
    use(isa)
    for dtype, ulp in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        x = torch.linspace(-80, 80, 40001, dtype=dtype)
        values = [torch.zeros(len(x), 1, dtype=dtype)] * 2
        logits = torch.stack([x, torch.zeros_like(x)], -1)[..., None]
        _, weights, confidence = functional.reliability_fusion(values, logits)
        exact = torch.sigmoid(x.double())  # within 1 ulp of float64
        # the weight's argument is log(r / (1 - r)): its rounding, at up to 80, is an absolute one
        for actual, bound in ((confidence[:, 0], 4 * ulp), (weights[:, 0], 90 * ulp)):
            relative = ((actual.double() - exact) / exact).abs()
            assert relative.max() <= bound, (dtype, (relative.max() / ulp).item())
        # log: the belief of a two-stage filter with no memory is the log-softmax of its evidence
        emission = torch.stack([x, torch.zeros_like(x)], -1)[:, None]
        posterior, final = functional.stage_filter(emission, torch.zeros(2, 2, dtype=dtype))
        exact = torch.log_softmax(emission[:, 0].double(), -1)
        assert ((final - exact).abs() <= 4 * ulp * exact.abs().clamp(min=1)).all(), dtype
        relative = ((posterior[:, 0].double() - exact.exp()) / exact.exp()).abs()
        assert relative.max() <= 90 * ulp  # exp multiplies the rounding of an argument of up to 80


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def test_isa_from_the_environment(cpu_only):
    """baseline is never what would be chosen here by itself."""
    assert _C.isa() != "baseline"
    done = python("import sage_ext; from sage_ext import _C; print(_C.isa())", SAGE_EXT_CPU_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


def test_an_unknown_isa_is_an_error(cpu_only):
    done = python("import sage_ext", SAGE_EXT_CPU_ISA="sse9")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "SAGE_EXT_CPU_ISA" in last
    assert "'sse9'" in last
    before = _C.isa()
    with pytest.raises(ValueError, match="baseline, avx2 or avx512, got 'sse9'"):
        _C.set_isa("sse9")
    assert _C.isa() == before


# ------------------------------------------------------------------------------------------------------------ fork
class Calls(torch.utils.data.Dataset):
    """Each item runs every op, forward and backward, in a DataLoader worker."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        results = [float(torch.get_num_threads())]
        for case in CASES[::3]:
            out, grads, _ = run(case, functional, case.inputs(i))
            results += [float(x.double().sum()) for x in [*out, *grads.values()]]
        return torch.tensor(results, dtype=torch.float64)


def test_dataloader_workers_after_fork(cpu_only, threads):
    """OpenMP after fork hangs when it was multi-threaded before: workers run on one thread and give the same bits."""
    threads(2)
    for op in ("reliability_fusion", "ccc", "stage_filter", "temporal_ccc-window"):
        case, inputs = big(op, cpu_only)
        run(case, functional, inputs)
    loader = torch.utils.data.DataLoader(
        Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    threads_there, *_ = zip(*(item.tolist()[:1] for item in loader), strict=True)
    assert set(threads_there) == {1.0}
    for here, there in zip(Calls(), loader):
        assert torch.equal(here[1:], there[1:])


def test_the_parent_still_works_after_its_workers(cpu_only, threads):
    threads(2)
    case, inputs = big("reliability_fusion", cpu_only)
    before = named(*run(case, functional, inputs)[:2])
    list(
        torch.utils.data.DataLoader(Calls(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    )
    assert_same(named(*run(case, functional, inputs)[:2]), before)


def test_calls_from_many_python_threads(cpu_only):
    """The kernels run without the interpreter's lock: concurrent calls on the same inputs do not meet."""
    from concurrent.futures import ThreadPoolExecutor

    work = [big(op, cpu_only) for op in ("reliability_fusion", "ccc", "stage_filter", "temporal_ccc-window")]
    expected = [named(*run(case, functional, inputs)[:2]) for case, inputs in work]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: [named(*run(c, functional, i)[:2]) for c, i in work], range(6)):
            for got, wanted in zip(results, expected, strict=True):
                assert_same(got, wanted)


# ------------------------------------------------------------------------------------------------ every element written
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_of_every_output_is_written(backend, case):
    """`torch.empty` full of NaN: nothing of it may be seen in an output, a gradient, or a later result."""
    inputs = case.inputs(13, torch.float32, backend.device)
    expected = named(*run(case, functional, inputs)[:2])
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        poisoned = named(*run(case, functional, inputs)[:2])
        with torch.no_grad():
            plain = case.call(functional, inputs)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert_same(poisoned, expected)
    for i, x in enumerate(plain):
        assert torch.equal(x, expected[f"output {i}"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_not_written(backend, case):
    inputs = case.inputs(14, torch.float32, backend.device)
    before = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    run(case, functional, inputs)
    for x, y in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(before), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_twice(backend, case):
    """With retain_graph, the second backward has the first one's bits: backward wears nothing out."""
    inputs = fresh(case.inputs(15, torch.float32, backend.device), case.constant)
    outputs = [o for o in case.call(functional, inputs) if o.requires_grad]
    grads, wanted = cotangents(tuple(outputs), 1), list(leaves(inputs, case.constant).values())
    first = torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is loaded")
def test_one_openmp_runtime_is_loaded():
    """torch's own: a second one has threads of its own, and `torch.set_num_threads` rules one of the two."""
    program = """
import re, torch, sage_ext
torch.set_num_threads(2)
x = torch.randn(64, 300, 4)
sage_ext.functional.stage_filter(x, torch.eye(4))
sage_ext.functional.ccc(x, x)
print(len(set(re.findall("/\\\\S*lib[gi]?omp5?[^/]*so\\\\S*", open("/proc/self/maps").read()))))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout.strip()) == (0, "1"), found.stderr
    with open(_C.__file__, "rb") as file:
        assert b"libgomp" not in file.read()  # nor asked for: a tool that repairs wheels would bundle it
