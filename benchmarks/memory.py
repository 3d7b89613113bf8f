"""Peak memory of the leaky average, forward and backward, at the size of SAGE's training: each implementation in a process of
its own, the growth of the peak resident set over what the inputs and a first, small call took.

    python benchmarks/memory.py [--repeat 4]       repeat: so many times the 24 sequences of a training step
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch

NAMES = ("kernel", "einsum")


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, repeat: int) -> int:
    from problems import einsum_leaky_average, fused_leaky_average

    torch.set_num_threads(1)
    op = {"kernel": fused_leaky_average, "einsum": einsum_leaky_average}[name]
    halflife, prior = torch.tensor([8.0, 32.0, 128.0]), torch.ones(3, requires_grad=True)

    def run(x: torch.Tensor, precision: torch.Tensor, grad: torch.Tensor) -> None:
        torch.autograd.grad(op(x, precision, halflife, prior), [x, precision, prior], grad)

    def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.randn(batch, 300, 128, requires_grad=True),
            torch.rand(batch, 300, requires_grad=True),
            torch.randn(batch, 300, 3, 128),
        )

    run(*inputs(1))
    large = inputs(24 * repeat)
    before = peak()
    run(*large)
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(measure(options.only, options.repeat))
        return
    found = {}
    for name in NAMES:
        command = [sys.executable, __file__, "--only", name, "--repeat", str(options.repeat)]
        found[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{name}: {found[name] / 2**20:.1f} MiB")
    print(f"kernel / einsum: {found['kernel'] / found['einsum']:.3f}")


if __name__ == "__main__":
    main()
