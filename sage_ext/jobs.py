"""Independent jobs on a few processes. A job that fails, even one that takes its process down, costs only itself."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from types import TracebackType
from typing import Any

from ._arguments import check_int
from .allocator import keep_freed_memory
from .extras import require


@dataclass(frozen=True)
class Job:
    """`function(*arguments)`; all of it must pickle. `name` is for people."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value, or in `error` what went wrong (None: nothing)."""

    job: Job
    value: Any = None
    error: str | None = None


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when the new process loads its libraries
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        self.pipe.send((job.function, job.arguments))

    def finish(self) -> Outcome:
        """The outcome of the job in hand; call when the pipe has something, be it its end."""
        assert self.job is not None
        job, self.job = self.job, None
        try:
            good, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Outcome(job, error=f"its process ended ({cause})")
        return Outcome(job, value) if good else Outcome(job, error=value)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


class Workers:
    """`processes` fresh (spawned) interpreters of one thread each, started when needed, ended on leaving the context.

    They end with this process too, whatever ends it.
    """

    def __init__(self, processes: int) -> None:
        check_int("processes", processes, 1)
        self.processes, self._workers = processes, list[_Worker]()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Outcomes in the order in which jobs finish; jobs are begun in the order given."""
        waiting = collections.deque(jobs)
        while True:
            for worker in self._workers:
                if waiting and worker.job is None:
                    worker.begin(waiting.popleft())
            while waiting and len(self._workers) < self.processes:
                self._workers.append(_Worker())
                self._workers[-1].begin(waiting.popleft())
            busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
            if not busy:
                return
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                outcome = worker.finish()
                if not worker.process.is_alive():
                    self._workers.remove(worker)
                yield outcome


def _work(pipe: connection.Connection) -> None:
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_attempt(function, arguments))


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """(True, the value), or (False, what went wrong)."""
    try:
        return True, function(*arguments)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend
        return False, str(error) or type(error).__name__
    except Exception:
        return False, traceback.format_exc()


class JoblibWorkers:
    """Runs jobs on joblib's active backend: loky's processes, or what `joblib.parallel_config` names (dask, ray, one's own).

    `processes`: joblib's n_jobs; None: all that the backend has; with 1 joblib runs the jobs in this process. A job that raises
    costs only itself; one that takes its process down costs all that were not finished, where the backend gives up then, as loky
    does. ImportError without joblib; ValueError, from `run`, for a backend of threads: jobs change what belongs to a process.
    """

    def __init__(self, processes: int | None = None) -> None:
        if processes is not None:
            check_int("processes", processes, 1)
        self.processes, self._joblib = processes, require("joblib", "video")

    def __enter__(self) -> JoblibWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        """Processes are the backend's, and stay."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Outcomes in the order in which jobs finish; jobs are begun in the order given."""
        waiting = dict(enumerate(jobs))
        backend = self._joblib.parallel.get_active_backend()[0]
        sequential = isinstance(backend, self._joblib._parallel_backends.SequentialBackend)
        if getattr(backend, "uses_threads", False) and not sequential:
            raise ValueError(
                f"launcher: expected a joblib backend of processes, got {type(backend).__name__}, of threads"
            )
        if not waiting:
            return
        how = "generator_unordered" if getattr(backend, "supports_return_generator", False) else "list"
        parallel = self._joblib.Parallel(n_jobs=self.processes or -1, batch_size=1, return_as=how)
        call = self._joblib.delayed(_numbered)
        try:
            for place, good, value in parallel([call(i, job.function, job.arguments) for i, job in waiting.items()]):
                job = waiting.pop(place)
                yield Outcome(job, value) if good else Outcome(job, error=value)
        except Exception as error:  # the backend's own; a job's are answers
            for job in waiting.values():
                yield Outcome(job, error=f"joblib's {type(backend).__name__} failed ({type(error).__name__}: {error})")


def _numbered(place: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, bool, Any]:
    return (place, *_attempt(function, arguments))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


__all__ = ["Job", "JoblibWorkers", "Outcome", "Workers"]
