"""Every CUDA kernel once on small problems, forward and backward: what compute-sanitizer watches (gpu_session.sh).

    python benchmarks/gpu_kernels.py [--device cpu]      on the CPU it is a check of the script

Inputs are made on the CPU and copied: initcheck does not see what kernels that it does not watch have written.
"""

from __future__ import annotations

import argparse

import torch

from sage_ext import functional as F
from sage_ext.models import SAGE


def grads(outputs, inputs) -> None:
    outputs = [o for o in outputs if o.requires_grad]
    for g in torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs], allow_unused=True):
        assert g is None or torch.isfinite(g).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(dtype).to(device).requires_grad_()

    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for modalities, dim in ((2, 64), (2, 512), (3, 256), (2, 7), (5, 1032)):
            gate = torch.float64 if dtype == torch.float64 else torch.float32
            values = [randn(75, dim, dtype=dtype) for _ in range(modalities)]
            r, w, b = (
                randn(75, modalities, 4, dtype=gate),
                randn(modalities, dim, dtype=gate),
                randn(modalities, dim, dtype=gate),
            )
            present = (torch.rand(75, modalities) > 0.2).to(device)
            grads(F.reliability_fusion(values, r, present=present, norm_weight=w, norm_bias=b), [*values, r, w, b])
    for dtype in (torch.float32, torch.float64):
        for stages in (4, 6):
            for frames in (40, 1100):
                e, t = randn(3, frames, stages, dtype=dtype), randn(stages, stages, dtype=dtype)
                grads(F.stage_filter(e, t), [e, t])
        for channels in (1, 2, 3):
            for frames in (301, 9001):
                p, y = randn(2, frames, channels, dtype=dtype), randn(2, frames, channels, dtype=dtype)
                mask = (torch.rand(2, frames) > 0.2).to(device)
                for m in (None, mask):
                    grads([F.ccc(p, y, m)], [p, y])
        for mode in ({}, {"halflife": 30.0}, {"window": 50}):
            p, y = randn(2, 700, 2, dtype=dtype), randn(2, 700, 2, dtype=dtype)
            grads(F.temporal_ccc(p, y, **mode), [p, y])
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        gate = torch.float64 if dtype == torch.float64 else torch.float32
        for averages, frames, dim in ((3, 333, 40), (6, 130, 7), (1, 1100, 128)):
            for causal in (True, False):
                x, p = randn(2, frames, dim, dtype=dtype), randn(2, frames, dtype=gate)
                halflife, prior = torch.arange(1, averages + 1, dtype=gate).to(device), randn(averages, dtype=gate)
                grads(F.leaky_average(x, p.square(), halflife, prior.square(), causal=causal), [x, p, prior])
    processors = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 1
    for options in ({}, {"fusion": "uniform", "dim": 70}):
        model = SAGE({"audio": 19, "visual": 40}, **options).eval()
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, processors + 1, 4 * processors):  # 1, 2 and 4 streams a block
                session = model.stream(rows, dtype, device)
                for t in range(3):
                    x = {"audio": torch.randn(rows, 19), "visual": torch.randn(rows, 40)}
                    out = session.step(x, torch.rand(rows, 2) > 0.2, torch.arange(rows) % 3 != t)
                    assert torch.isfinite(out.prediction).all()
    if device == "cuda":
        torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
