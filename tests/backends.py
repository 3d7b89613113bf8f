"""The backends that op tests run on: CPU, CUDA, and the CUDA kernels under emulation on a CPU (tests/simt)."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from simt import build

from sage_ext._ops import _door


def load_simt() -> ModuleType | None:
    """The CUDA kernels compiled for CPU emulation (tests/simt): `.cuda` is a table of functions like `_C.cpu`.

    Built where it is not yet (under a minute, then cached). SAGE_TEST_SIMT: 0 does without, `sanitize` takes the build
    under AddressSanitizer and UndefinedBehaviorSanitizer. None without a compiler.
    """
    choice = os.environ.get("SAGE_TEST_SIMT", "1")
    if choice == "0" or shutil.which(build.compiler()[0]) is None:
        return None
    csrc = Path(
        os.environ.get("SAGE_TEST_SIMT_CSRC", build.ROOT / "csrc")
    )  # tests/simt/mutate.py: a copy with a mistake
    return build.load(build.build(sanitize=choice == "sanitize", csrc=csrc))


SIMT_MODULE = load_simt()
SIMT = None if SIMT_MODULE is None else SIMT_MODULE.cuda
CUDA = "cuda" in _door.kernels and torch.cuda.is_available()


@dataclass(frozen=True)
class Backend:
    """Where an op test runs. `small`: emulated, so sizes should be a few dozen rows (`size` picks)."""

    name: str
    device: torch.device
    small: bool

    def size(self, full: int, small: int) -> int:
        return small if self.small else full


BACKENDS = (
    ["cpu"] + ["simt"] * (SIMT is not None) + ["cuda"] * CUDA
)  # what is missing is skipped once, in test_backends


def open_backend(name: str, monkeypatch) -> Backend:
    """The emulated kernels stand in the CPU's place for the duration of a test."""
    if name == "cuda":
        return Backend(name, torch.device("cuda", torch.cuda.current_device()), False)
    if name == "simt":
        monkeypatch.setitem(_door.kernels, "cpu", SIMT)
    return Backend(name, torch.device("cpu"), name == "simt")
