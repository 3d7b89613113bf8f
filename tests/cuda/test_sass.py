"""What needs no GPU: that the hot kernels' machine code does what their comments say (sass.py reads it)."""

from __future__ import annotations

import re

import pytest
from sass import (
    BEGIN,
    END,
    HOT,
    NVCC,
    NVDISASM,
    ROOT,
    Hot,
    bytes_in_flight,
    compiled,
    disassembled,
    look,
    table,
    written,
)

pytestmark = pytest.mark.skipif(NVCC is None or NVDISASM is None, reason="no nvcc, or no nvdisasm")


@pytest.mark.slow
@pytest.mark.parametrize("hot", HOT, ids=lambda hot: hot.title)
def test_hot_kernels(hot: Hot):
    found = look(hot)
    assert found.flight >= hot.flight, f"{found.flight} bytes in flight a lane"
    assert found.narrow_loads <= hot.narrow
    assert found.warps >= hot.warps, f"{found.usage.registers} registers leave room for {found.warps} warps"
    assert found.kilobytes <= hot.code
    assert not found.usage.stack
    assert not found.usage.spills


@pytest.mark.slow
def test_the_documented_table_is_the_present_one():
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert page.split(BEGIN + "\n")[1].split(END)[0] == "\n".join(table()) + "\n", "run tests/cuda/sass.py --write"


def kernel_of(body: str):
    head = "__global__ void f(const uint4* x, uint4* y, int n, const unsigned short* h) {\n"
    with written(head + body + "\n}\n") as source:
        [kernel] = disassembled(compiled(source)[0]).values()
    return kernel


def test_loads_that_go_out_together_and_loads_that_wait_are_told_apart():
    together = kernel_of(
        "for (int i = 0; i < n; ++i) { uint4 a = x[4 * i], b = x[4 * i + 1], c = x[4 * i + 2], d = x[4 * i + 3];"
        "y[i] = {a.x ^ b.x ^ c.x ^ d.x, a.y ^ b.y ^ c.y ^ d.y, a.z ^ b.z ^ c.z ^ d.z, a.w ^ b.w ^ c.w ^ d.w}; }"
    )
    waiting = kernel_of("int at = 0;\n#pragma unroll 1\nfor (int i = 0; i < n; ++i) at = x[at].y;\ny[0].x = at;")
    assert max(bytes_in_flight(together.part(loop)) for loop in together.loops) >= 64
    assert max(bytes_in_flight(waiting.part(loop), least=4) for loop in waiting.loops) == 4


def test_loops_narrow_loads_and_code_size_are_read():
    kernel = kernel_of("unsigned s = 0;\n#pragma unroll 1\nfor (int i = 0; i < n; ++i) s = s * 3 + h[i];\ny[0].x = s;")
    [loop] = [loop for loop in kernel.loops if any(i.bytes for i in kernel.part(loop))]
    assert sum(i.bytes == 2 for i in kernel.part(loop)) == 1
    assert kernel.code_bytes == 16 * len(kernel.instructions)
    assert re.search(r"EXIT", " ".join(i.op for i in kernel.instructions))
