"""Modules: the drop-in `ReliabilityFusion`, the head that teaches its confidence, and losses that train through concordance."""

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
from .head import ReliabilityHead
from .losses import CCCLoss, ExplainedVarianceNLL, ReliabilityNLL, TemporalCCCLoss
from .moments import convert_sync_statistics
from .quality import Quality
from .typicality import Typicality

__all__ = [
    "CCCLoss",
    "ExplainedVarianceNLL",
    "Fusion",
    "FusionOutput",
    "FusionState",
    "Quality",
    "ReliabilityFusion",
    "ReliabilityHead",
    "ReliabilityNLL",
    "TemporalCCCLoss",
    "Typicality",
    "UniformFusion",
    "calibrated_confidence",
    "convert_sync_statistics",
]
