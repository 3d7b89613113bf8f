"""Reliability-weighted multimodal fusion and concordance (CCC) as fused C++/CUDA kernels for PyTorch."""

import torch  # noqa: F401  (first: the compiled module shares its OpenMP runtime)

from . import functional

__version__ = "0.2.0"
__all__ = ["functional"]
