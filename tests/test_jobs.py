"""Jobs on processes of their own: what fails, and how, costs only itself."""

import os
import signal
import sys

import joblib
import pytest
from joblib._parallel_backends import MultiprocessingBackend

from sage_ext.jobs import Job, JoblibWorkers, Workers


def _answer(value):
    return value, os.environ["OMP_NUM_THREADS"]


def _fail(kind):
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no such thing") if kind == "mistake" else AssertionError("a bug")


def test_a_job_that_fails_costs_only_itself():
    jobs = [Job("one", _answer, (1,)), *(Job(kind, _fail, (kind,)) for kind in ("killed", "mistake", "bug"))]
    jobs += [Job(str(i), _answer, (i,)) for i in range(3)]
    before = os.environ.get("OMP_NUM_THREADS")
    with Workers(1) as workers:
        outcomes = {outcome.job.name: outcome for outcome in workers.run(jobs)}
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert len(outcomes) == len(jobs)
    for i in range(3):
        assert outcomes[str(i)].value == (i, "1")
        assert outcomes[str(i)].error is None
    assert "SIGKILL" in outcomes["killed"].error
    assert outcomes["mistake"].error == "no such thing"
    assert "Traceback" in outcomes["bug"].error
    with pytest.raises(ValueError, match="processes"):
        Workers(0)


class _Users(MultiprocessingBackend):
    """A backend that a user has registered: of processes, and without generators."""


def _process(value):
    return value, os.getpid()


def test_joblib_runs_jobs_on_the_backend_that_is_active():
    jobs = [
        *(Job(str(i), _process, (i,)) for i in range(3)),
        *(Job(kind, _fail, (kind,)) for kind in ("mistake", "bug")),
    ]
    joblib.register_parallel_backend("users", _Users)
    for backend, here in (("sequential", True), ("users", False)):
        with joblib.parallel_config(backend), JoblibWorkers(2) as workers:
            outcomes = {outcome.job.name: outcome for outcome in workers.run(jobs)}
            assert list(workers.run([])) == []
        assert len(outcomes) == len(jobs)
        for i in range(3):
            value, process = outcomes[str(i)].value
            assert value == i
            assert (process == os.getpid()) is here
        assert outcomes["mistake"].error == "no such thing"
        assert "Traceback" in outcomes["bug"].error
    with (
        joblib.parallel_config("threading"),
        JoblibWorkers() as workers,
        pytest.raises(ValueError, match="launcher: expected a joblib backend of processes, got ThreadingBackend"),
    ):
        next(workers.run(jobs))
    with pytest.raises(ValueError, match="processes"):
        JoblibWorkers(0)


@pytest.mark.slow
def test_a_process_that_dies_under_joblib_costs_what_was_not_finished():
    """Two processes: with one, joblib does jobs in this process."""
    jobs = [Job("killed", _fail, ("killed",)), *(Job(str(i), _process, (i,)) for i in range(3))]
    with JoblibWorkers(2) as workers:
        outcomes = {outcome.job.name: outcome for outcome in workers.run(jobs)}
    assert set(outcomes) == {"killed", "0", "1", "2"}
    assert "joblib's LokyBackend failed" in outcomes["killed"].error
    for i in range(3):
        outcome = outcomes[str(i)]
        assert outcome.value[0] == i if outcome.error is None else "LokyBackend failed" in outcome.error


def test_without_joblib_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ImportError, match=r"joblib is not installed; it comes with: pip install sage-ext\[video\]"):
        JoblibWorkers()
