"""pytest-benchmark of the problems that have a target: `pytest benchmarks/test_ops.py`. Ratios and tables: bench.py."""

import pytest
import torch
from problems import OPS

PROBLEMS = [(name, label) for name, op in OPS.items() for label in dict.fromkeys(["usual", *op.targets])]


@pytest.mark.parametrize(("name", "label"), PROBLEMS, ids=lambda x: x.replace(", ", "-").replace(" ", "_"))
@pytest.mark.parametrize("implementation", ["sage_ext", "eager", "compile"])
def test_op(benchmark, name, label, implementation):
    op = OPS[name]
    if implementation == "compile" and not op.compiled:
        pytest.skip("torch.compile would unroll the loop over frames")
    problem = dict(op.problems())[label]
    torch.set_num_threads(problem["threads"])
    runs, _ = op.runs(problem, compiled=implementation == "compile")
    benchmark.group = f"{name}, {label}"
    benchmark(runs[implementation])
