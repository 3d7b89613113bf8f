"""What needs no GPU: every kernel compiles for sm_90 without spills and without a stack frame, by ptxas's own report."""

from __future__ import annotations

import pytest
from sass import FILES, NVCC, ROOT, usage, written


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("file", FILES)
def test_no_spills_and_no_stack(file):
    path = ROOT / "csrc" / "cuda" / file
    kernels = usage(path)
    assert len(kernels) >= path.read_text().count("__global__"), "the report was not understood"
    bad = {name: used for name, used in kernels.items() if used.stack or used.spills}
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
    loop = "for (int k = 0; k < 64; ++k) a[x[k] & 63] += k;"
    with written(f"__global__ void f(int* x, int i) {{ int a[64] = {{}}; {loop} x[0] = a[i & 63]; }}\n") as source:
        [used] = usage(source).values()
    assert used.stack > 0
