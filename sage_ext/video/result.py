"""What is known of one video after `analyze`: the estimates, who was trusted, and what was measured of picture and sound."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.targets import Targets
from ..extras import require
from ..files import write_atomic

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Result:
    """One video of T frames. C targets, M modalities, S stages; None where no run was given, and nothing is estimated.

    name              of the video: its file's, without the ending
    source            the file
    fps               frames a second of the grid; frame t (0-based) covers [t/fps, (t+1)/fps) seconds of the video
    modalities        names of the M modalities
    present           (T, M) bool: the frame has that modality
    quality           modality -> (T, Q) float32: what was measured of the signal, NaN where unknown
    quality_columns   modality -> names of the Q columns
    faces             (T, 4) float32: left, top, width, height of the face in pixels of the picture as shown, NaN without one
    size              width and height of the picture in pixels; (0, 0) without one
    targets           names and ranges of what is estimated; empty without a run
    prediction        (T, C) float64 in the targets' own units
    deviation         (T, C) float64 in the same units: the standard deviation of the error that the confidence stands for
    weights           (T, M) float32, they sum to 1, or all are 0 where nothing is present
    confidence        (T, M) float32: the share of the targets' variance that the modality is believed to explain
    stage             (T, S) float32: posterior of the interaction stage, rows sum to 1
    thumbnails        (seconds, JPEG) of pictures along the video, small
    run               the run directory that estimated, as it was named
    """

    name: str
    source: Path
    fps: float
    modalities: tuple[str, ...]
    present: np.ndarray
    quality: Mapping[str, np.ndarray]
    quality_columns: Mapping[str, tuple[str, ...]]
    faces: np.ndarray
    size: tuple[int, int]
    targets: Targets = ()
    prediction: np.ndarray | None = None
    deviation: np.ndarray | None = None
    weights: np.ndarray | None = None
    confidence: np.ndarray | None = None
    stage: np.ndarray | None = None
    thumbnails: list[tuple[float, bytes]] = field(default_factory=list)
    run: str | None = None

    @property
    def time(self) -> np.ndarray:
        """(T,) seconds: where each frame begins."""
        return np.arange(len(self.present)) / self.fps

    def columns(self) -> dict[str, np.ndarray]:
        """name -> (T,): time, the targets, for each modality its confidence, weight, presence and quality, then the stages."""
        found: dict[str, np.ndarray] = {"time": self.time}
        for c, target in enumerate(self.targets):
            if self.prediction is not None:
                found[target.name] = self.prediction[:, c]
            if self.deviation is not None:
                found[f"{target.name} deviation"] = self.deviation[:, c]
        for m, name in enumerate(self.modalities):
            if self.confidence is not None:
                found[f"confidence {name}"] = self.confidence[:, m]
            if self.weights is not None:
                found[f"weight {name}"] = self.weights[:, m]
            found[f"present {name}"] = self.present[:, m].astype(int)
            for q, column in enumerate(self.quality_columns.get(name, ())):
                found[f"{name} {column}"] = self.quality[name][:, q]
        if self.stage is not None:
            found |= {f"stage {s + 1}": self.stage[:, s] for s in range(self.stage.shape[1])}
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """A row a frame, the columns of `columns`. ImportError without pandas."""
        return require("pandas", "video").DataFrame(self.columns())

    def write_csv(self, path: str | Path) -> None:
        """A row a frame, the columns of `columns`, six significant digits, an empty cell where unknown; whole or not at all."""
        found = self.columns()
        rows = csv.writer(text := io.StringIO(), lineterminator="\n")
        rows.writerow(found)
        decimals = 6
        columns = [
            [f"{x:.{decimals}f}" for x in values]
            if name == "time"
            else ["" if np.isnan(x) else f"{x:.6g}" for x in values]
            for name, values in found.items()
        ]
        rows.writerows(zip(*columns))
        write_atomic(path, text.getvalue())
