"""Training, evaluation and prediction on Aff-Wild2-format data."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .evaluate import ClipPrediction, evaluate, mean_filter, predict_clip, score
from .rehearsal import Rehearsal
from .runs import Evaluation, Run, calibrate_run, evaluate_clips, evaluate_run, predict_run
from .trainer import RunError, TrainConfig, read_config, train

__all__ = [
    "CheckpointError",
    "ClipPrediction",
    "Evaluation",
    "Rehearsal",
    "Run",
    "RunError",
    "TrainConfig",
    "calibrate_run",
    "evaluate",
    "evaluate_clips",
    "evaluate_run",
    "load_checkpoint",
    "mean_filter",
    "predict_clip",
    "predict_run",
    "read_config",
    "save_checkpoint",
    "score",
    "train",
]
