"""pytest-benchmark cases: `pytest benchmarks/test_ops.py`. For ratios between implementations use report.py."""

import pytest
import torch
from cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("implementation", ["kernel", "eager", "compile"])
def test_op(benchmark, case, implementation):
    if implementation == "compile" and not case.compiled:
        pytest.skip("torch.compile would unroll the frame loop")
    torch.set_num_threads(2)
    run = case.implementations(compiled=implementation == "compile")[implementation]
    run()
    benchmark.group = case.name
    benchmark(run)
