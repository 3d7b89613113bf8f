"""Training, evaluation and prediction on Aff-Wild2-format data."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .evaluate import ClipPrediction, evaluate, mean_filter, predict_clip, score
from .rehearsal import Rehearsal
from .trainer import RunError, TrainConfig, load_run, read_config, train

__all__ = [
    "CheckpointError",
    "ClipPrediction",
    "Rehearsal",
    "RunError",
    "TrainConfig",
    "evaluate",
    "load_checkpoint",
    "load_run",
    "mean_filter",
    "predict_clip",
    "read_config",
    "save_checkpoint",
    "score",
    "train",
]
