"""A team of processes in one group of torch.distributed: started once, then given functions to run on every rank."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import distributed as dist

TIMEOUT = 60  # seconds that a rank waits for another one in a collective


class Team:
    """`Team(3)` starts three processes on gloo; `team(function, *arguments)` runs `function(rank, *arguments)` on each and gives
    what they return, by rank. The function is named by its module, which every process imports. AssertionError with the
    traceback of a rank that raised. A context manager."""

    def __init__(self, size: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        before = dict(os.environ)
        os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")  # for the children alone
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                store = (Path(self.folder.name) / "store").as_uri()
                self.processes.append(context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True))
                self.processes[-1].start()
                theirs.close()
                self.pipes.append(ours)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self.pipes]  # of all, so that the next call finds nothing of this one
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"rank {rank}: {error}"
        return [value for value, _ in answers]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()  # what ends a rank
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
