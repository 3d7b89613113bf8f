"""The two doors to a kernel, and who may use which.

In plain eager an op runs as a `torch.autograd.Function` that calls `_C` directly: the cheapest call PyTorch offers from
Python. Everywhere else (compile, export, fake tensors, dispatch modes, subclasses) it runs as the registered operator
`torch.ops.sage_ext.*`. Both call the same `_forward` and `_backward` of the op's file. Within the transforms of torch.func
neither door is open: `has_kernels`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import _C

if isa := os.environ.get("SAGE_EXT_CPU_ISA"):
    _C.set_isa(isa)

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# Kernel modules by device type. All have the same functions, so a test can put another backend in a slot.
kernels: dict[str, ModuleType] = {"cpu": _C.cpu}
if hasattr(_C, "cuda"):
    kernels["cuda"] = _C.cuda

_LIBRARY = torch.library.Library("sage_ext", "DEF")
_PLAIN = (Tensor, Parameter)
_warned: set[str] = set()
_peek = torch._C._functorch.peek_interpreter_stack  # None outside of the transforms of torch.func


def has_kernels(device: torch.device, *tensors: Tensor | None) -> bool:
    """Whether an op of these tensors on `device` has kernels. If not, the caller runs the reference: within transforms of
    torch.func, which cannot see into a kernel; on a device without kernels with a warning, once (or raises: strict)."""
    if not torch.compiler.is_compiling() and _peek() is not None and _transformed(tensors):
        return False
    if device.type in kernels:
        return True
    if device.type == "meta":  # shapes only: the registered op's fake
        return True
    message = f"sage_ext has no kernels for device '{device.type}' in this build"
    if os.environ.get("SAGE_EXT_STRICT") == "1":
        raise RuntimeError(message + " (SAGE_EXT_STRICT=1 forbids the PyTorch reference)")
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(message + "; using the slower PyTorch reference", RuntimeWarning, stacklevel=4)
    return False


def _transformed(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) surrounds the call, and not functionalization alone.

    The reference's first derivatives are right; its second ones are not, for it calls the slope of a mixture a constant. So
    one transform may differentiate, or autograd outside all of them.
    """
    levels = torch._C._functorch
    keys = [level.key() for level in levels.get_interpreter_stack() or ()]
    orders = sum(key in (levels.TransformType.Grad, levels.TransformType.Jvp) for key in keys)
    if orders and any(t is not None and _innermost(t).requires_grad for t in tensors):
        raise NotImplementedError(
            "sage_ext has no second derivatives: within torch.func.grad, vjp and jvp expected weights and inputs that do not "
            "require a gradient outside of it (.detach() them), got one that does"
        )
    if orders > 1:
        raise NotImplementedError(
            f"sage_ext has no second derivatives: expected one of torch.func's grad, vjp and jvp at a time, got {orders} in "
            "each other"
        )
    return any(key != levels.TransformType.Functionalize for key in keys)


def _innermost(t: Tensor) -> Tensor:
    """Without the wrappers of the transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def fast(*tensors: Tensor | None) -> bool:
    """Whether the direct door is safe: plain eager, and every tensor exactly a dense tensor.

    The caller has seen that they share a device, and that it has kernels.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if torch._C._len_torch_dispatch_stack() > 0 or _peek() is not None or torch._C._get_tracing_state() is not None:
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.layout is not torch.strided or t.is_meta or t.is_neg()):
            return False
    return True


def _refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    """Neither door knows a forward-mode derivative; PyTorch would take it for zero."""
    if any(t is not None and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "sage_ext has no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad)"
        )


def backward_door(
    direct: Callable[..., Any], registered: Callable[..., Any], *grads: Tensor | None
) -> Callable[..., Any]:
    """Which of the two runs a backward that began at the direct door, given the gradients that came in.

    With `create_graph` it is the registered op, whose own backward says that there are no second derivatives. (PyTorch's
    `once_differentiable` would make a constant of a gradient whose cotangent needs none: a penalty on it is then ignored.)
    """
    return direct if not torch.is_grad_enabled() and fast(*grads) else registered


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def placement(t: Tensor) -> tuple[int, int]:
    """The last two arguments of every kernel: (threads, 0) on the CPU, (device index, stream) on a GPU."""
    if t.is_cuda:
        index = t.device.index
        return index, torch._C._cuda_getCurrentRawStream(index)  # current_stream() makes an object first
    return torch.get_num_threads(), 0


def address(t: Tensor | None) -> int:
    """Of a tensor that the caller holds in a local until the kernel has returned."""
    return 0 if t is None else t.data_ptr()


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def workspace(doubles: int, like: Tensor) -> Tensor:
    return torch.empty(doubles, dtype=torch.float64, device=like.device)


def register(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Defines `sage_ext::<name>` for CPU and CUDA and returns it. Without `backward`: not differentiable, said clearly."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, impl, "CPU")
    _LIBRARY.impl(name, impl, "CUDA")
    qualified = f"sage_ext::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"{qualified} is not differentiable: sage_ext has no second derivatives")

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.sage_ext, name).default
