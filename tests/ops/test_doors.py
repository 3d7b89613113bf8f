"""The two doors to a kernel (direct, and registered with torch.library), who uses which, and what is refused at both."""

from __future__ import annotations

import ast
import gc
import re
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from cases import CASES, MOMENT_CASES, OPS, cases, converted, cotangents, error, fresh, leaves, named, run
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sage_ext import _ops, functional, reference
from sage_ext._ops import _door

ALL = pytest.mark.parametrize("case", CASES, ids=str)
ONE_EACH = pytest.mark.parametrize("case", [cases(op)[1] for op in OPS], ids=str)
DOORS = pytest.mark.parametrize("door", ["direct", "registered"])


@pytest.fixture
def backend(native):
    """Not under emulation: what is tested here is Python around the kernels."""
    return native


@pytest.fixture
def registered(monkeypatch):
    """Sends every call through the registered operators."""
    return lambda: monkeypatch.setattr(_door, "fast", lambda *tensors: False)


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def map_tensors(f, tree):
    return pytree.tree_map(lambda x: f(x) if is_tensor(x) else x, tree)


# --------------------------------------------------------------------------------------- torch.library's own checks
def registered_calls(case, inputs):
    """(op, arguments) of what a case runs: the forward op, and its backward op on random gradients."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sage_ext":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    wanted = fresh(inputs, case.constant)
    outputs = case.call(functional, fresh(inputs, case.constant))
    grads = cotangents(outputs, 1)
    with Record():
        outputs = case.call(functional, wanted)
        pairs = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad]
        torch.autograd.grad([o for o, _ in pairs], list(leaves(wanted, case.constant).values()), [g for _, g in pairs],
                            allow_unused=True)  # fmt: skip
    return calls


def test_every_operator_is_registered():
    wanted = {name for op in OPS for name in (op, f"{op}_backward")} - {"ccc_moments_backward"}  # ccc's serves both
    assert {name for name in torch.ops.sage_ext.__dict__ if not name.startswith("_") and name != "name"} >= wanted


def test_the_stub_types_every_entry_point(backend):
    """_C.pyi is written by hand: the compiled kernels have the names, and take as many arguments, as its `Kernels` says."""
    stub = ast.parse((Path(functional.__file__).parent / "_C.pyi").read_text())
    (kernels,) = [node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "Kernels"]
    said = {f.name: len(f.args.posonlyargs) - 1 for f in kernels.body if isinstance(f, ast.FunctionDef)}
    compiled = _door.kernels[backend.device.type]
    found = {name: len(re.findall(r"\barg\d+: ", getattr(compiled, name).__doc__)) for name in dir(compiled)
             if name.endswith(("_forward", "_backward"))}  # fmt: skip
    assert said == found


# one or two a mode now, the rest with the slow tests: a second each
QUICK = (
    "stage_filter-shared",
    "fusion-full",
    "fusion-bare",
    "ccc-frame",
    "moments-sequence",
    "window-chunk",
    "halflife-chunk",
)


@pytest.mark.parametrize(
    "case", [c if str(c).endswith(QUICK) else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=str
)
def test_opcheck(backend, case):
    inputs = case.inputs(1, torch.float32, backend.device)
    calls = registered_calls(case, inputs)
    assert [f"{func.name()}" for func, _ in calls] == [
        f"sage_ext::{case.op}", f"sage_ext::{'ccc' if case.op == 'ccc_moments' else case.op}_backward"
    ]  # fmt: skip
    for func, args in calls:
        backward = "backward" in func.name()
        args = map_tensors(lambda x: x.detach().clone().requires_grad_(x.requires_grad and not backward), args)  # noqa: B023
        torch.library.opcheck(func, args)


# ------------------------------------------------------------------------------------------------------- two doors
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_doors_give_the_same_bits(backend, registered, case, dtype):
    inputs = case.inputs(2, dtype, backend.device)
    direct = named(*run(case, functional, inputs)[:2])
    registered()
    for (name, a), b in zip(named(*run(case, functional, inputs)[:2]).items(), direct.values(), strict=True):
        assert torch.equal(a, b), name


@ALL
def test_plain_eager_takes_the_direct_door(backend, monkeypatch, case):
    """Tensors and Parameters, with and without a gradient, under no_grad and inference_mode: never the dispatcher."""
    inputs = case.inputs(3, torch.float32, backend.device)
    with torch.inference_mode():
        expected = case.call(functional, inputs)

    class Closed:
        def __call__(self, *args):
            raise AssertionError("the registered operator was called")

    for module in [getattr(_ops, name) for name in _ops.__all__]:
        for name in ("_op", "_backward_op", "_ccc_op", "_moments_op"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Closed())
    with torch.no_grad():
        for a, b in zip(case.call(functional, inputs), expected, strict=True):
            assert torch.equal(a, b)
    run(case, functional, inputs)
    parameters = map_tensors(
        lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
        {n: x for n, x in inputs.items() if n not in case.constant},
    )
    constants = {n: inputs[n] for n in case.constant if n in inputs}
    for a, b in zip(case.call(functional, {**parameters, **constants}), expected, strict=True):
        assert torch.equal(a, b)


@ALL
@DOORS
def test_no_gradient_is_wanted(backend, registered, case, door):
    inputs = case.inputs(4, torch.float32, backend.device)
    if door == "registered":
        registered()
    wanted = case.call(functional, fresh(inputs, case.constant))
    assert any(o.requires_grad for o in wanted)
    assert all(o.grad_fn is None or o.requires_grad for o in wanted)
    with torch.no_grad():
        outputs = case.call(functional, fresh(inputs, case.constant))
    with torch.inference_mode():
        inferred = case.call(functional, inputs)
        assert all(o.is_inference() for o in inferred)
    for a, b, c in zip(outputs, inferred, wanted, strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@ALL
@DOORS
def test_any_subset_of_the_inputs_may_want_a_gradient(backend, registered, case, door):
    """Each input alone: the same bits as when all of them do, and nothing for the others."""
    inputs = case.inputs(5, torch.float64, backend.device)
    if door == "registered":
        registered()
    _, expected, grads = run(case, functional, inputs)
    for name in leaves(inputs, case.constant):
        alone = fresh(inputs, requires_grad=False)
        wanted = leaves(alone)[name].requires_grad_()
        outputs = case.call(functional, alone)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        (grad,) = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])
        assert torch.equal(grad, expected[name]), name


# -------------------------------------------------------------------------------------------------- second derivatives
@ALL
@DOORS
def test_a_second_derivative_is_a_clear_error(backend, registered, case, door):
    if door == "registered":
        registered()
    inputs = fresh(case.inputs(6, torch.float64, backend.device), case.constant)
    wanted = list(leaves(inputs, case.constant).values())
    outputs = [o for o in case.call(functional, inputs) if o.requires_grad]
    grads = torch.autograd.grad(sum(o.sum() for o in outputs), wanted, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in grads if g is not None)
    with pytest.raises(NotImplementedError, match=r"sage_ext::\w+_backward is not differentiable.*second derivatives"):
        # even where another term is differentiable: not a constant in silence
        (total + wanted[0].sum()).backward()


@ALL
def test_create_graph_alone_changes_no_bit(backend, case):
    inputs = fresh(case.inputs(7, torch.float64, backend.device), case.constant)
    wanted = list(leaves(inputs, case.constant).values())
    outputs = [o for o in case.call(functional, inputs) if o.requires_grad]
    grads = cotangents(tuple(outputs), 1)
    plain = torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)
    graph = torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True)
    for a, b in zip(plain, graph, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@ALL
def test_forward_mode_is_a_clear_error(backend, case):
    """PyTorch would take the missing tangent for zero. (torch.func.jvp runs the reference: tests/stack.)"""
    inputs = case.inputs(8, torch.float64, backend.device)
    name, x = next(iter(leaves(inputs, case.constant).items()))

    def call(x):
        changed = dict(inputs)
        if name == "values.0":
            changed["values"] = [x, *inputs["values"][1:]]
        else:
            changed[name] = x
        return case.call(functional, changed)[0]

    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.equal(call(x), case.call(functional, inputs)[0])


# ------------------------------------------------------------------------------------------------------- the gate
def described(x):
    return tuple(x.shape), x.dtype


@ALL
def test_fake_tensors(backend, case):
    """Shapes, dtypes and device of the fakes are those of the real outputs; backward too."""
    inputs = case.inputs(9, torch.float32, backend.device)
    real, real_grads, _ = run(case, functional, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = map_tensors(mode.from_tensor, inputs)
        fakes = fresh(fakes, case.constant)
        outputs = case.call(functional, fakes)
        assert all(isinstance(o, FakeTensor) for o in outputs)
        assert [described(o) for o in outputs] == [described(o) for o in real]
        assert all(o.device == backend.device for o in outputs)
        wanted = leaves(fakes, case.constant)
        grads = torch.autograd.grad(
            [o for o in outputs if o.requires_grad], list(wanted.values()),
            [torch.empty_like(o) for o in outputs if o.requires_grad], allow_unused=True,
        )  # fmt: skip
    for name, g in zip(wanted, grads, strict=True):
        assert g is None or described(g) == described(real_grads[name]), name


@ALL
def test_a_fake_tensor_outside_its_mode(backend, case):
    """Handed over by a tracer that has left: never its address."""
    inputs = case.inputs(10, torch.float32, backend.device)
    mode = FakeTensorMode()
    outputs = case.call(functional, map_tensors(mode.from_tensor, inputs))
    assert all(isinstance(o, FakeTensor) for o in outputs)


@ALL
def test_meta_tensors(backend, case):
    inputs = case.inputs(11, torch.float32, backend.device)
    meta = map_tensors(lambda x: x.to("meta"), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs, grads, _ = run(case, functional, meta)
    real, real_grads, _ = run(case, functional, inputs)
    assert all(o.device.type == "meta" for o in outputs)
    assert [described(o) for o in outputs] == [described(o) for o in real]
    assert {n: described(g) for n, g in grads.items()} == {n: described(g) for n, g in real_grads.items()}


@ALL
def test_a_dispatch_mode_sees_the_operators(backend, case):
    """And changes nothing about the numbers."""
    inputs = case.inputs(12, torch.float32, backend.device)
    expected = named(*run(case, functional, inputs)[:2])
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Watch():
        got = named(*run(case, functional, inputs)[:2])
    assert seen.count("sage_ext") == 2  # forward and backward
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@ALL
def test_a_plain_subclass(backend, case):
    """Without behaviour of its own: the same numbers, and PyTorch's rule for the result's class."""

    class Marked(torch.Tensor):
        pass

    inputs = case.inputs(13, torch.float32, backend.device)
    expected = case.call(functional, inputs)
    outputs = case.call(functional, map_tensors(lambda x: x.as_subclass(Marked), inputs))
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a.as_subclass(torch.Tensor), b)


class Wrapper(torch.Tensor):
    """Holds its numbers elsewhere; its own address means nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda x: x.inner if isinstance(x, Wrapper) else x  # noqa: E731
        out = func(*pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs or {}))
        return pytree.tree_map(lambda x: Wrapper(x) if is_tensor(x) else x, out)


@ALL
def test_a_wrapper_subclass(backend, case):
    inputs = case.inputs(14, torch.float32, backend.device)
    expected = case.call(functional, inputs)
    outputs = case.call(functional, map_tensors(Wrapper, inputs))
    for a, b in zip(outputs, expected, strict=True):
        assert isinstance(a, Wrapper)
        assert torch.equal(a.inner, b)


@ALL
def test_vmap(backend, case):
    """A batch of calls, of which the direct door would read one address for all: the reference runs."""
    first, second = (case.inputs(seed, torch.float64, backend.device) for seed in (15, 16))
    tensors = [x for x in pytree.tree_leaves(first) if is_tensor(x)]
    others = [x for x in pytree.tree_leaves(second) if is_tensor(x)]
    stacked = [torch.stack(pair) for pair in zip(tensors, others, strict=True)]
    flat, spec = pytree.tree_flatten(first)

    def call(*batch):
        batch = iter(batch)
        return case.call(functional, pytree.tree_unflatten([next(batch) if is_tensor(x) else x for x in flat], spec))

    outputs = torch.vmap(call)(*stacked)
    for i, inputs in enumerate((first, second)):
        for a, b in zip(outputs, case.call(functional, inputs), strict=True):
            assert error(a[i], b) <= 1e-9


@ONE_EACH
def test_functorch_grad(backend, case):
    """torch.func.grad, vjp, jacrev: the reference runs."""
    inputs = case.inputs(17, torch.float64, backend.device)
    name, x = next(iter(leaves(inputs, case.constant).items()))

    def loss(functions, x):
        changed = {**inputs, name: x} if name != "values.0" else {**inputs, "values": [x, *inputs["values"][1:]]}
        return case.call(functions, changed)[0].sin().sum()

    expected = torch.func.grad(lambda x: loss(reference, x))(x)
    for transform in (
        torch.func.grad,
        torch.func.jacrev,
        lambda f: lambda x: torch.func.vjp(f, x)[1](x.new_ones(()))[0],
    ):
        got = transform(lambda x: loss(functional, x))(x)
        assert error(got, expected) <= 1e-9


@ONE_EACH
def test_a_batch_of_cotangents(backend, case):
    """autograd.grad(is_grads_batched=True) on a graph from the direct door: right, or refused."""
    inputs = fresh(case.inputs(18, torch.float64, backend.device), case.constant)
    wanted = next(iter(leaves(inputs, case.constant).values()))
    output = case.call(functional, inputs)[0]
    batch = torch.stack([cotangents((output,), seed)[0] for seed in (1, 2)])
    expected = torch.stack([torch.autograd.grad(output, wanted, g, retain_graph=True)[0] for g in batch])
    try:
        (got,) = torch.autograd.grad(output, wanted, batch, is_grads_batched=True)
    except RuntimeError as refusal:
        assert "data pointer" in str(refusal) or "Batching rule" in str(refusal)
    else:
        assert torch.equal(got, expected)


@ALL
def test_negative_views(backend, case):
    """A lazily negated view has the un-negated numbers at its address."""
    inputs = case.inputs(19, torch.float64, backend.device)
    flipped = map_tensors(lambda x: torch._neg_view(-x) if x.is_floating_point() else x, inputs)
    assert any(x.is_neg() for x in pytree.tree_leaves(flipped) if is_tensor(x))
    a, b = named(*run(case, functional, inputs)[:2]), named(*run(case, functional, flipped)[:2])
    for name in a:
        assert torch.equal(a[name], b[name]), name


@ONE_EACH
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace(backend, case):
    """The op is in the graph, not a constant of the numbers it was traced with."""
    first, second = (case.inputs(seed, torch.float32, backend.device) for seed in (20, 21))
    flat, spec = pytree.tree_flatten(first)
    tensors = [x for x in flat if is_tensor(x)]

    def call(*given):
        given = iter(given)
        return case.call(functional, pytree.tree_unflatten([next(given) if is_tensor(x) else x for x in flat], spec))

    traced = torch.jit.trace(call, tuple(tensors))
    assert f"sage_ext::{case.op}" in str(traced.graph)
    outputs = traced(*[x for x in pytree.tree_leaves(second) if is_tensor(x)])
    for a, b in zip(outputs, case.call(functional, second), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ autograd's machinery
@ALL
@DOORS
def test_an_input_changed_in_place_before_backward_is_an_error(backend, registered, case, door):
    if door == "registered":
        registered()
    inputs = fresh(case.inputs(22, torch.float32, backend.device), case.constant)
    wanted = leaves(inputs, case.constant)
    copies = {n: (x * 1) if n in wanted else x for n, x in inputs.items() if n != "values"}
    if "values" in inputs:
        copies["values"] = [v * 1 for v in inputs["values"]]
    output = case.call(functional, copies)[0]
    name = {"stage_filter": "transition", "reliability_fusion": "reliability", "leaky_average": "x"}.get(
        case.op, "pred"
    )
    copies[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@ALL
def test_checkpointing(backend, case):
    """Activation checkpointing runs the forward again: the same bits."""
    inputs = case.inputs(23, torch.float32, backend.device)
    expected = named(*run(case, functional, inputs)[:2])

    class Checkpointed:
        def __getattr__(self, op):
            return lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
                getattr(functional, op), *args, use_reentrant=False, **kwargs
            )

    got = named(*run(case, Checkpointed(), inputs)[:2])
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@ALL
@DOORS
def test_nothing_is_kept_alive(backend, registered, case, door):
    """Outputs and saved tensors make no reference cycle: all is freed with the last reference, without the collector."""
    if door == "registered":
        registered()
    inputs = fresh(case.inputs(24, torch.float32, backend.device), case.constant)
    gc.disable()
    try:
        outputs = case.call(functional, inputs)
        refs = [weakref.ref(o) for o in outputs]
        sum(o.sum() for o in outputs if o.requires_grad).backward()
        del outputs
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()


# Numbers an op may save for backward besides its inputs, for inputs of B sequences, T frames, ...
SAVED = {
    "stage_filter": lambda i: 2 * i["emission"].numel(),  # posterior and log-belief
    "reliability_fusion": lambda i: 2 * i["reliability"].shape[:-1].numel(),  # a LayerNorm's mean and 1/std
    "ccc": lambda i: 6 * i["pred"].shape[0] * i["pred"].shape[-1],  # moments of each group
    "ccc_moments": lambda i: 6 * i["pred"].shape[0] * i["pred"].shape[-1],
    "leaky_average": lambda i: i["x"].numel() * len(i["halflife"]),  # the average
    "temporal_ccc": lambda i: 0,
}


@ALL
@DOORS
def test_what_is_saved_for_backward(backend, registered, case, door):
    if door == "registered":
        registered()
    inputs = fresh(case.inputs(25, torch.float64, backend.device), case.constant)
    given = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(inputs) if is_tensor(x)}
    saved = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in given and type(x.grad_fn).__name__ != "StackBackward0":
            saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    if case.op == "ccc_moments" and "state" in inputs:
        inputs["state"] = None  # the merge is plain PyTorch and saves its own
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.call(functional, inputs)
    assert sum(saved.values()) <= SAVED[case.op](inputs), saved


# -------------------------------------------------------------------------------------------------------- autocast
@ALL
@DOORS
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_of_the_arithmetic(backend, registered, case, door, amp):
    """Values as they come, gating in float32 (float64 stays): no input is cast down, no output differs."""
    if door == "registered":
        registered()
    for dtype in (torch.float32, torch.float64):
        inputs = case.inputs(26, dtype, backend.device)
        expected = named(*run(case, functional, inputs)[:2])
        with torch.autocast(backend.device.type, amp):
            outputs, grads, _ = run(case, functional, inputs)
        for (name, a), b in zip(named(outputs, grads).items(), expected.values(), strict=True):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


@DOORS
def test_autocast_in_a_model(backend, registered, door):
    """Linear layers under autocast give bfloat16 values and logits: bfloat16 fused, float32 weights, float32 master grads."""
    if door == "registered":
        registered()
    torch.manual_seed(0)
    value = torch.nn.ModuleList([torch.nn.Linear(6, 8) for _ in range(2)]).to(backend.device)
    gate = torch.nn.Linear(6, 2 * 3).to(backend.device)
    weight, bias = (torch.nn.Parameter(torch.rand(2, 8, device=backend.device)) for _ in range(2))
    x = torch.randn(4, 5, 6, device=backend.device)
    with torch.autocast(backend.device.type, torch.bfloat16):
        values = [layer(x) for layer in value]
        logits = gate(x).view(4, 5, 2, 3)
        assert logits.dtype == torch.bfloat16
        posterior, _ = functional.stage_filter(logits[..., 0, :], torch.zeros(3, 3, device=backend.device))
        fused, weights, confidence = functional.reliability_fusion(
            values, logits, posterior, norm_weight=weight, norm_bias=bias
        )
        rho = functional.ccc(fused, fused.detach() + x.mean())
    assert (posterior.dtype, fused.dtype, weights.dtype, confidence.dtype) == (
        torch.float32, torch.bfloat16, torch.float32, torch.float32
    )  # fmt: skip
    assert rho.dtype == torch.float32
    (fused.float().sum() + weights[..., 0].sum() + confidence.sum() + rho.sum()).backward()
    for p in [*value.parameters(), *gate.parameters(), weight, bias]:
        assert p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad).all()
        assert (p.grad != 0).any()


# ------------------------------------------------------------------------------------------- a device without kernels
@pytest.fixture
def no_kernels(backend, monkeypatch):
    monkeypatch.setattr(_door, "kernels", {})
    monkeypatch.setattr(_door, "_warned", set())
    monkeypatch.delenv("SAGE_EXT_STRICT", raising=False)
    return backend


@ALL
def test_without_kernels_the_reference_runs(no_kernels, case):
    """With one warning in all, however many calls; values and gradients are the reference's."""
    inputs = case.inputs(27, torch.float32, no_kernels.device)
    with pytest.warns(RuntimeWarning, match=f"no kernels for device '{no_kernels.device.type}'") as caught:
        got = named(*run(case, functional, inputs)[:2])
        case.call(functional, inputs)
        for other in (cases("ccc")[0], cases("stage_filter")[0]):
            other.call(functional, other.inputs(0, torch.float32, no_kernels.device))
    assert len(caught) == 1
    expected = named(*run(case, reference, inputs)[:2])
    for name in expected:
        assert error(got[name], expected[name]) <= 4 * 2.0**-23, name
    assert caught[0].filename == __file__.replace("test_doors", "cases")  # points at the caller


@ALL
def test_strict_makes_missing_kernels_an_error(no_kernels, monkeypatch, case):
    monkeypatch.setenv("SAGE_EXT_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"no kernels for device '{no_kernels.device.type}'.*SAGE_EXT_STRICT"):
        case.call(functional, case.inputs(28, torch.float32, no_kernels.device))


def test_strict_is_about_devices_without_kernels_only(backend, monkeypatch):
    monkeypatch.setenv("SAGE_EXT_STRICT", "1")
    for case in CASES + MOMENT_CASES:
        case.call(functional, case.inputs(29, torch.float64, backend.device))


@ALL
def test_half_inputs_without_kernels(no_kernels, case):
    """The dtypes of the outputs are those that the kernels give."""
    inputs = converted(case.inputs(30, torch.float32, no_kernels.device), torch.bfloat16)
    for name in ("state",):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = case.call(functional, inputs)
    _door.kernels.update(with_kernels())
    for a, b in zip(without, case.call(functional, inputs), strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) <= (1e-2 if a.dtype == torch.bfloat16 else 1e-5)


def with_kernels():
    from sage_ext import _C

    return {"cpu": _C.cpu, **({"cuda": _C.cuda} if hasattr(_C, "cuda") else {})}
