"""Values and gradients of every op against the float64 reference, and float64 gradcheck in every mode."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, MOMENT_CASES, compare, fresh, leaves

from sage_ext import functional

ALL = pytest.mark.parametrize("case", CASES + MOMENT_CASES, ids=str)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_values_and_gradients(backend, case, dtype):
    for seed in range(backend.size(5, 1)):
        compare(case, case.inputs(seed, dtype, backend.device))


@ALL
def test_each_output_alone(backend, case):
    """The kernels take a missing gradient for zero: each output differentiated with none for the others."""
    inputs = case.inputs(3, torch.float64, backend.device)
    outputs = case.call(functional, fresh(inputs, case.constant))
    for i, output in enumerate(outputs):
        if output.requires_grad:
            compare(case, inputs, through=(i,))


@ALL
def test_gradcheck(backend, case):
    inputs = fresh(case.inputs(5, torch.float64, backend.device), case.constant)
    wanted = leaves(inputs, case.constant)

    def function(*_):
        # gradcheck perturbs the leaves in place, so the call reads them through `inputs`
        return tuple(o for o in case.call(functional, inputs) if o.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(wanted.values()), fast_mode=backend.small, atol=1e-7, rtol=1e-5)
