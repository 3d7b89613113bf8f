"""What the processes of a group know together: a few numbers of each, gathered once and merged alike on every rank.

All merge what they gathered in the order of ranks, so they have the same bits. **Gradients follow the convention of
DistributedDataParallel**, which averages parameters' gradients over ranks: what a rank sends back to its own numbers is the
gradient of the common result times the number of ranks, so that this average is the gradient of the common result.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from . import reference

# Imported later, as an optimizer's first step does, its functions would have the process group for a default argument: it would
# outlive destroy_process_group, and its threads the interpreter, which aborts the process now and then.
if dist.is_available():
    importlib.import_module("torch.distributed.nn")

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_warned: set[str] = set()
_whole = False  # whether this process computes losses of the rows of all ranks


def check_group(group: object) -> None:
    """A process group that this process is a member of; the caller has seen that it is not None."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        # What torch gives to processes outside a new group is no ProcessGroup.
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup that this process belongs to, or None, got "
            f"{type(group).__name__}"
        )


def initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def warn_apart(name: str) -> None:
    """Says once that each of several processes has a loss of its own batch. To be called by the `forward` of a module."""
    if torch.compiler.is_compiling() or name in _warned or not initialised() or dist.get_world_size() == 1 or _whole:
        return
    _warned.add(name)
    warnings.warn(
        f"{name} was given no process_group, so each of the {dist.get_world_size()} processes takes the concordance of its own "
        "batch, and the mean of these is not that of the global batch (process_group=torch.distributed.group.WORLD is).",
        stacklevel=5,  # of whoever called the module
    )


def losses_are_whole() -> None:
    """For a process that goes on to the losses of all ranks' rows, as training does: none of them is said to be apart."""
    global _whole
    _whole = True


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """(ranks, *x.shape), in the order of ranks; a constant. `group`: None for the default one."""
    x = x.detach().contiguous()
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, x, group=group)
    return torch.stack(rows)


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup | None) -> Tensor:
        rows = gather(own, group)
        ctx.ranks = len(rows)
        return rows.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.ranks * grad, None


class _MergeRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup | None) -> Tensor:
        rows = gather(own, group)
        ctx.ranks = len(rows)
        while len(rows) > 1:  # in pairs: as few operations as ranks have bits
            half = len(rows) // 2
            merged = reference.merge_moments(rows[:half], rows[half : 2 * half])
            rows = torch.cat([merged, rows[2 * half :]])
        ctx.save_for_backward(own, rows[0])
        return rows[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """docs/math.md, "Concordance", "Many processes". A count has no gradient."""
        own, whole = ctx.saved_tensors
        none, mean_p, mean_t, m2_p, m2_t, c_pt = (ctx.ranks * grad).unbind(-1)
        count = own[..., 0]
        share = count / whole[..., 0].clamp(min=1)
        gap_p, gap_t = (own - whole)[..., 1:3].unbind(-1)
        own_p = share * mean_p + count * (2 * m2_p * gap_p + c_pt * gap_t)
        own_t = share * mean_t + count * (2 * m2_t * gap_t + c_pt * gap_p)
        return torch.stack([torch.zeros_like(none), own_p, own_t, m2_p, m2_t, c_pt], -1), None


def sum_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks. Differentiable in this rank's numbers, by the convention above."""
    return _SumRanks.apply(x, group)


def merge_ranks(moments: Tensor, group: ProcessGroup | None) -> Tensor:
    """All ranks' moments (..., 6), as `functional.ccc_moments` gives them, merged exactly. Differentiable as `sum_ranks`."""
    return _MergeRanks.apply(moments, group)
