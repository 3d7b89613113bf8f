"""Jobs on processes of their own: what fails, and how, costs only itself."""

import os
import signal

import pytest

from sage_ext.jobs import Job, Workers


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
