"""Fixtures shared by all tests: the backend an op test runs on, and hypothesis without randomness of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: one thread each, before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch  # noqa: F401  (before the compiled module, as the package does)
from simt import build

if module := os.environ.get("SAGE_TEST_NATIVE"):  # tests/ops/test_sanitized.py: another build of the kernels
    sys.modules["sage_ext._C"] = build.load(Path(module), "sage_ext._C")

from backends import BACKENDS, Backend, open_backend
from hypothesis import HealthCheck, settings

settings.register_profile(
    "sage_ext",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("sage_ext")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> Backend:
    """The kernels under test, each in turn."""
    return open_backend(request.param, monkeypatch)


@pytest.fixture(params=[name for name in BACKENDS if name != "simt"])
def native(request, monkeypatch) -> Backend:
    """The same for what Python does around the kernels: nothing new under emulation."""
    return open_backend(request.param, monkeypatch)


@pytest.fixture(params=["cpu"])
def cpu_only(request, monkeypatch) -> Backend:
    """For what concerns the CPU kernels alone: threads, instruction sets, fork."""
    return open_backend(request.param, monkeypatch)
