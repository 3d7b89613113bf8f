"""Data: reader of the Aff-Wild2 layout, for anybody's targets and rates; tables; windows; synthetic data."""

from .affwild2 import AffWild2, Clip, write_submission
from .synthetic import SyntheticSpec, oracle_predictions, write_dataset
from .table import import_table
from .targets import Target
from .windows import OverlapAverage, Windows, clip_tensors, collate

__all__ = [
    "AffWild2",
    "Clip",
    "OverlapAverage",
    "SyntheticSpec",
    "Target",
    "Windows",
    "clip_tensors",
    "collate",
    "import_table",
    "oracle_predictions",
    "write_dataset",
    "write_submission",
]
