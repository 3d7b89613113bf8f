"""One training by several processes, as torchrun starts them: each reads and computes its share of every batch.

Which windows are in a batch and what is decided is the same in all of them; reading, rehearsal and the model's forward and
backward pass are shared out. The loss is that of the whole batch, since CCC is no mean over its parts: what the loss reads of
the outputs and of the labels is small, and is gathered, so that every process computes the same loss and, from it, the
gradient of its own rows. The sum over processes of those gradients is the gradient of the whole.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from .._distributed import gather, losses_are_whole
from ..models.layers import Share

TIMEOUT = "SAGE_EXT_TIMEOUT"  # environment: seconds after which a process that does not answer counts as lost
SECONDS = 600.0
Rows = TypeVar("Rows", Tensor, list[int])
_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, what torchrun sets


class LostError(ValueError):
    """Another process of the job ended or does not answer, or this one is told to end."""


class Group:
    """The processes of one training. As it stands: this process alone, for which every method is free.

    Every method that asks the others has to be called by all of them, in the same order. LostError where one is gone.
    """

    rank, size, local_rank = 0, 1, 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Of this process, where the configuration says `name`."""
        return torch.device(name)

    def share(self, rows: int) -> Share | None:
        """This process's part of a batch of `rows` sequences; None: all of it."""
        return None

    def own(self, x: Rows) -> Rows:
        """This process's rows of `x`."""
        return x

    def whole(self, outputs: Sequence[Tensor], rows: int) -> list[Tensor]:
        """`outputs` (own rows, ...) with the rows of all processes, `rows` of them, in the batch's order, each in its dtype,
        of which the widest holds all numbers of the others. Each process has to
        go on with all the rows in the same way: the gradient that reaches the own ones is that of one such computation."""
        return list(outputs)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by the sum over all processes, the same bits in each."""

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` by those of the first process."""

    def broadcast(self, value: Any) -> Any:
        """The first process's `value`, a small object."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The `value`, a small object, of each process."""
        return [value]


ALONE = Group()


class _Several(Group):
    """More than one process. `store`: what they all can reach, the launcher's where that is torchrun."""

    def __init__(self, rank: int, size: int, local_rank: int, store: dist.Store) -> None:
        self.rank, self.size, self.local_rank, self.store = rank, size, local_rank, store
        losses_are_whole()

    def device(self, name: str) -> torch.device:
        if name not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda with {self.size} processes, each has its own, got {name!r}")
        if name == "cpu":
            return torch.device(name)
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device: expected a GPU for each process of this machine, got {torch.cuda.device_count()} for number "
                f"{self.local_rank + 1} of them"
            )
        return torch.device(name, self.local_rank)

    def share(self, rows: int) -> Share | None:
        return Share(self.rank, self.size, rows)

    def own(self, x: Rows) -> Rows:
        return x[self.rank :: self.size]

    def whole(self, outputs: Sequence[Tensor], rows: int) -> list[Tensor]:
        widest = functools.reduce(torch.promote_types, [x.dtype for x in outputs])
        packed = torch.cat([x.flatten(1).to(widest) for x in outputs], 1)
        parts = _Whole.apply(packed, self, rows).split([x[0].numel() for x in outputs], 1)
        return [part.reshape(rows, *x.shape[1:]).to(x.dtype) for part, x in zip(parts, outputs)]

    def rows(self, own: Tensor, count: int) -> Tensor:
        """(count, F) of all processes from the own rows."""
        padded = own.new_zeros(-(-count // self.size), own.shape[1])
        padded[: len(own)] = own
        with answers(self.size):
            found = gather(padded, None)
        return found.transpose(0, 1).flatten(0, 1)[:count]  # what was padded comes last

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        with answers(self.size):
            dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(total.view_as(gradient))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        with answers(self.size):
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with answers(self.size):
            dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with answers(self.size):
            dist.all_gather_object(found, value)
        return found

    def claim(self) -> bool:
        """Whether this process is the one to say what went wrong: the first that asks."""
        try:
            return self.store.add("sage_ext/said", 1) == 1
        except RuntimeError:  # the store is gone too
            return True


class _Whole(torch.autograd.Function):
    """The rows of all processes; backwards the own ones, since every process computes the same from them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: _Several, count: int) -> Tensor:
        ctx.group = group
        return group.rows(own, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.own(gradients[0]).contiguous(), None, None


@contextlib.contextmanager
def answers(size: int) -> Iterator[None]:
    """For a block that waits for the others of `size` processes: LostError where one does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(f"another of the {size} processes ended or does not answer") from error


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group that torchrun's environment variables describe: over gloo, and nccl for what is on GPUs. Without WORLD_SIZE,
    or with 1: this process alone.

    An error that ends the block ends the job, and is raised in one process only, the first that meets it. The others, which
    lose that one, leave with SystemExit.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"WORLD_SIZE: expected a number of processes, got {count!r}")
    if count == "1":
        yield ALONE
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE: expected 1, or the other variables that torchrun sets, got {count} without {', '.join(missing)}"
        )
    wait = os.environ.get(TIMEOUT, str(SECONDS))
    try:
        timeout = datetime.timedelta(seconds=float(wait))
    except (ValueError, OverflowError):
        raise ValueError(f"{TIMEOUT}: expected seconds, got {wait!r}") from None
    with _told_to_end():
        with answers(int(count)):
            store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
            # torchrun's store outlives a restart, with the addresses of the processes before it.
            store = dist.PrefixStore(f"sage_ext/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        group = _Several(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)
        try:
            with warnings.catch_warnings():
                if not group.leads:
                    warnings.simplefilter("ignore")  # the first process meets the same
                yield group
            group.gather(None)  # nobody leaves while another waits
        except (Exception, KeyboardInterrupt) as error:
            _deaf()
            if not group.claim():
                raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
            raise
        dist.destroy_process_group()  # after an error it might wait for the others


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM, which torchrun sends to every process once one failed, is a LostError in this block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:  # a process that reads windows
            os._exit(128 + number)
        _deaf()
        raise LostError("told to end (SIGTERM), as torchrun tells all processes when one of them failed")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # else deaf
            signal.signal(signal.SIGTERM, before)


def _deaf() -> None:
    """This process is about to end, and has to say why: it is not to be told again."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


__all__ = ["Group", "LostError", "joined"]
