"""What needs no GPU: every kernel compiles for sm_90 without spills and without a stack frame, by ptxas's own report."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "ptxas"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FILES = sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_90'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill "
    r"stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack: int
    spills: int


def report(source: Path) -> list[Kernel]:
    """ptxas's report of a file, kept by the hash of what went into it."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", str(source), "-o", os.devnull]
    digest = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True).stdout)
    for path in [source, *sorted((ROOT / "csrc").rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.cuh"))]:
        digest.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.txt"
    if not kept.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(done.stdout + done.stderr)
        temporary.replace(kept)
    return [
        Kernel(m["name"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in REPORT.finditer(kept.read_text())
    ]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("file", FILES)
def test_no_spills_and_no_stack(file):
    path = ROOT / "csrc" / "cuda" / file
    kernels = report(path)
    assert len(kernels) >= path.read_text().count("__global__"), "the report was not understood"
    bad = [k for k in kernels if k.stack or k.spills]
    assert not bad, bad


def test_every_file_is_built():
    assert FILES
    text = (ROOT / "CMakeLists.txt").read_text()
    for file in FILES:
        assert f"csrc/cuda/{file}" in text


def test_the_report_is_understood():
    """A kernel that must have a stack frame is seen to have one."""
    if NVCC is None:
        pytest.skip("no nvcc")
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / f"stack-{os.getpid()}.cu"
    loop = "for (int k = 0; k < 64; ++k) a[x[k] & 63] += k;"
    source.write_text(f"__global__ void f(int* x, int i) {{ int a[64] = {{}}; {loop} x[0] = a[i & 63]; }}\n")
    try:
        [kernel] = report(source)
    finally:
        source.unlink()
    assert kernel.stack > 0
