"""Modules: the drop-in `ReliabilityFusion`, and the losses that train through concordance and calibrated confidence."""

from .._arguments import Features as Features
from .._arguments import check_int as check_int
from .fusion import (
    Fusion,
    FusionOutput,
    FusionState,
    ReliabilityFusion,
    UniformFusion,
    calibrated_confidence,
)
from .losses import CCCLoss, ReliabilityNLL, TemporalCCCLoss
from .typicality import Typicality

__all__ = [
    "CCCLoss",
    "Fusion",
    "FusionOutput",
    "FusionState",
    "ReliabilityFusion",
    "ReliabilityNLL",
    "TemporalCCCLoss",
    "Typicality",
    "UniformFusion",
    "calibrated_confidence",
]
