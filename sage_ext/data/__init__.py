"""Data: Aff-Wild2-format reader, windows, and a synthetic data set in the same format."""

from .affwild2 import AffWild2, Clip, write_submission
from .synthetic import SyntheticSpec, oracle_predictions, write_dataset
from .windows import OverlapAverage, Windows, clip_tensors, collate

__all__ = [
    "AffWild2",
    "Clip",
    "OverlapAverage",
    "SyntheticSpec",
    "Windows",
    "clip_tensors",
    "collate",
    "oracle_predictions",
    "write_dataset",
    "write_submission",
]
