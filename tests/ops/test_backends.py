"""Which kernels the op tests of this run exercise: one skip here stands for the same tests on a backend that is missing."""

from __future__ import annotations

import pytest
import torch
from backends import SIMT

from sage_ext import _C
from sage_ext._ops import _door

TABLE = [name for name in dir(_C.cpu) if not name.startswith("_")]


def test_the_cpu_backend_has_every_kernel():
    ops = ["stage_filter", "reliability_fusion", "ccc", "temporal_ccc", "leaky_average"]
    assert sorted(TABLE) == sorted(["open_session", *(f"{op}_{way}" for op in ops for way in ("forward", "backward"))])


def test_the_cuda_backend_has_every_kernel():
    if "cuda" not in _door.kernels:
        pytest.skip("no CUDA kernels in this build: no op test ran on them")
    assert [name for name in dir(_door.kernels["cuda"]) if not name.startswith("_")] == TABLE
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: no op test ran on one")


def test_the_emulated_cuda_backend_has_every_kernel():
    if SIMT is None:
        pytest.skip("the CUDA kernels were not built for emulation (tests/simt): no op test ran on them")
    assert [name for name in dir(SIMT) if not name.startswith("_")] == TABLE
