"""Work done ahead: the next items of an iterator, made in one background thread while the caller uses the last one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
THREAD = "sage-ext prefetch"  # its name


class Prefetch(Generic[Item]):
    """The items of `source`, in their order; a context manager, in which one thread makes them.

    At most `ahead` items are there (or in the making) beside the one that the caller took last; 0: no thread, each is made
    when it is asked for. What `source` raises is raised in the caller after the items before it, with the traceback of
    where it happened. When the block ends, however it does, the thread ends with the item it is at: it is waited for,
    and `source` is closed where it can be. Nothing here draws random numbers.
    """

    def __init__(self, source: Iterator[Item], ahead: int = 1) -> None:
        self._source, self._ahead = source, ahead
        self._ready: deque[Item] = deque()
        self._stop = False  # the thread is to end
        self._error: BaseException | None = None  # StopIteration: the end
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Prefetch[Item]:
        if self._ahead > 0:
            self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._ready.clear()
        self._error = None  # its traceback holds the frames of `source`
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._thread is None:
            return next(self._source)
        with self._change:
            self._change.wait_for(lambda: self._ready or self._error is not None or self._stop)
            if self._ready:
                item = self._ready.popleft()
                self._change.notify_all()
                return item
            error = self._error
        try:
            if error is None or isinstance(error, StopIteration):
                raise StopIteration
            raise error
        finally:
            del error  # it holds this frame

    def _work(self) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._stop or len(self._ready) < self._ahead)
                    if self._stop:
                        return
                item = next(self._source)
                with self._change:
                    self._ready.append(item)
                    del item
                    self._change.notify_all()
        except BaseException as error:  # all of it is the caller's
            with self._change:
                self._error = error
                self._change.notify_all()


def pinned(tree: Any, device: torch.device) -> Any:
    """`tree`, a nesting of dicts, with its tensors in page-locked memory, from which a copy to the CUDA `device` runs beside
    everything else. Other leaves stay."""
    if isinstance(tree, Tensor):
        with torch.cuda.device(device):  # else a context would be made on the first GPU, whichever is used
            return tree.pin_memory()
    if isinstance(tree, dict):
        return {key: pinned(value, device) for key, value in tree.items()}
    return tree
