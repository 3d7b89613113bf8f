"""`analyze`: one video, from its file to the curves."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..data.affwild2 import AffWild2, Clip
from ..data.targets import unscaled
from ..extras import require
from ..training.evaluate import ClipPrediction
from ..training.runs import Run
from .decode import Media, Picture, jpeg
from .extraction import TOOL, Parameters, add_parameters, extract, given_parameters, said_on_stderr
from .result import Result

THUMBNAILS, THUMBNAIL = 24, 96  # pictures along the time axis, and pixels of their height


def parameters_of(run: Run | None, **given: Any) -> Parameters:
    """How the features that `run` learnt from were extracted, so far as its data said; `given` comes first."""
    said: dict[str, Any] = {}
    for about in () if run is None else run.about.values():
        if isinstance(about, dict) and about.get("tool") == TOOL:
            said = {name: about["parameters"].get(name) for name in ("fps", "visual", "audio", "yunet", "silero")}
    return Parameters(**{**said, **given})


def analyze(
    path: str | os.PathLike[str],
    run: str | os.PathLike[str] | Run | None = None,
    *,
    person: str = "largest",
    progress: Callable[[str], None] | None = None,
    **parameters: Any,
) -> Result:
    """What can be said of one video: the same as `extract` and then `predict`, in one go.

    path        a media file
    run         a run directory that `train` wrote, of features as `extract` makes them (or the loaded Run); None: nothing is
                estimated, and the result says what was seen and heard
    person      of several in the picture, see `extract`
    parameters  those of `Parameters`, where they should differ from what the run's data were extracted with

    Raises ValueError for a file that cannot be read, or a run that learnt from other features.
    """
    model = run if run is None or isinstance(run, Run) else Run.load(run)
    how = parameters_of(model, **parameters)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a media file, got {path}, which is none")
    with tempfile.TemporaryDirectory(prefix="sage-ext-") as folder:
        done = extract([path], folder, how, person=person, processes=1, progress=progress)
        if done.failed:
            raise ValueError(done.failed[str(path)])
        ((name, video),) = done.videos.items()
        data = AffWild2(folder, "test") if model is None else model.open(folder, "test")
        clip = data[0]
        faces_file = Path(folder) / "faces" / f"{name}.npy"
        faces = np.load(faces_file)[:, :4] if faces_file.exists() else np.full((clip.num_frames, 4), np.nan, np.float32)
        names = tuple(clip.features)
        columns = {m: tuple(data.quality_columns.get(m, ())) for m in names}
        result = Result(
            path.stem, path, clip.fps, names, np.stack([np.asarray(clip.present[m]) for m in names], 1),
            {m: whole(clip, m) for m in columns if columns[m]}, columns, faces, tuple(video["size"]),  # type: ignore[arg-type]
            thumbnails=thumbnails(path, clip.num_frames / clip.fps),
        )  # fmt: skip
        return result if model is None else estimated(result, model, model.predict(clip))


def whole(clip: Clip, modality: str) -> np.ndarray:
    """(T, Q) quality, NaN beyond its end."""
    rows = np.asarray(clip.quality[modality][0 : clip.num_frames], np.float32)
    missing = np.full((clip.num_frames - len(rows), rows.shape[1]), np.nan, np.float32)
    return np.concatenate([rows, missing]) if len(missing) else rows


def estimated(result: Result, run: Run, said: ClipPrediction) -> Result:
    """`result` with what the run says.

    The deviation is the root of what the confidence leaves of a target's variance: `variance * (1 - sum of share * confidence)`
    over the experts. The squared error of a weighted mean is no greater than the weighted mean of squared errors (Jensen), so
    where the confidence is calibrated this is an upper bound.
    """
    scale = np.array([(target.high - target.low) / 2 for target in run.targets])
    deviation = None
    if (
        said.shares is not None
        and said.expert_confidence is not None
        and said.shares.shape == said.expert_confidence.shape
    ):
        left = np.clip(1 - (said.shares * said.expert_confidence).sum(1, keepdims=True), 0, 1)
        deviation = np.sqrt(left * run.model.target_variance.cpu().numpy()) * scale
    fields = {**result.__dict__, "targets": run.targets, "run": str(run.path)}
    return Result(**{
        **fields, "prediction": unscaled(said.prediction.astype(np.float64), run.targets), "deviation": deviation,
        "weights": said.weights, "confidence": said.confidence, "stage": said.stage,
    })  # fmt: skip


def thumbnails(path: Path, seconds: float) -> list[tuple[float, bytes]]:
    """Small pictures, evenly apart."""
    cv2 = require("cv2", "video")
    found: list[tuple[float, bytes]] = []
    with Media(path) as media:
        if not media.picture or seconds <= 0:
            return []
        step = seconds / THUMBNAILS
        for item in media.play(sound=False):
            if isinstance(item, Picture) and item.time >= (len(found) + 0.5) * step - 1e-6 and len(found) < THUMBNAILS:
                height, width = item.rgb.shape[:2]
                small = cv2.resize(
                    item.rgb, (max(round(width * THUMBNAIL / height), 1), THUMBNAIL), interpolation=cv2.INTER_AREA
                )
                found.append((item.time, jpeg(small, 75)))
    return found


# ------------------------------------------------------------------------------------------------------- command line
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="a media file")
    parser.add_argument("--run", metavar="RUN", help="run directory that train wrote, of extracted features (default: none: "
                        "nothing is estimated)")  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write (default: VIDEO-analysis, beside the video's name)"
    )
    parser.add_argument("--overlay", metavar="MP4", help="also write the video with the estimates drawn onto it")
    parser.add_argument(
        "--person", default="largest", help="of several: largest, left, right, or 1, 2 ... from the left"
    )
    add_parameters(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> str:
    """The command: NAME.csv and NAME.html in a folder; what to print."""
    from .overlay import write_overlay
    from .report import write_report

    progress = None if args.quiet else said_on_stderr("analyze")
    video = Path(args.video)
    result = analyze(video, args.run, person=args.person, progress=progress, **given_parameters(args))
    out = Path(args.out) if args.out else Path(f"{video.stem}-analysis")
    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{video.stem}.csv", write_report(result, out / f"{video.stem}.html")]
    result.write_csv(written[0])
    if args.overlay:
        written.append(write_overlay(result, args.overlay))
    return "\n".join([*summary(result), *map(str, written)])


def summary(result: Result) -> list[str]:
    """For people, a line each."""
    lines = [
        f"{result.name}: {len(result.present) / result.fps:.1f} s, {len(result.present):,} frames at {result.fps:g} a second"
    ]
    for m, name in enumerate(result.modalities):
        weight = "" if result.weights is None else f", mean weight {result.weights[:, m].mean():.2f}"
        confidence = "" if result.confidence is None else f", mean confidence {result.confidence[:, m].mean():.2f}"
        lines.append(f"  {name}: there in {100 * result.present[:, m].mean():.0f} % of the frames{weight}{confidence}")
    for c, target in enumerate(result.targets):
        assert result.prediction is not None
        x = result.prediction[:, c]
        lines.append(
            f"  {target.name}: mean {x.mean():.3g}, {x.min():.3g} to {x.max():.3g} on [{target.low:g}, {target.high:g}]"
        )
    if result.run is None:
        lines.append(
            "  no --run: nothing is estimated. docs/video.md says how to train a model on videos with annotations."
        )
    return lines
