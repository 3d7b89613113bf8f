"""The whole way on synthetic data: synthesise, train, calibrate, evaluate, predict, report, stream; minutes on two cores.

What is compared is trained alike: the same windows in the same order, the same rehearsed failures, steps, learning
rates, sizes, loss and choice of the best epoch on the validation split. Scores are on the test split, which nothing was
fitted to: the submission file that `predict` wrote, against the truth that only the synthesiser knows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from .calibration import expected_calibration_error
from .data.affwild2 import Clip
from .data.synthetic import TruthClips, oracle_predictions, read_truth, write_dataset
from .data.windows import clip_tensors
from .files import LOCK, alone, write_atomic
from .jobs import Job, Workers
from .live.estimator import Estimator, microseconds
from .live.frames import Frame
from .report import Table, write_report
from .training.evaluate import score
from .training.runs import (
    Run,
    calibrate_run,
    calibration_pictures,
    clip_pictures,
    evaluate_clips,
    predict_run,
    training_pictures,
)
from .training.trainer import RunError, TrainConfig, train

MARKER = "demo.json"
DATA = {"train": 160, "validation": 24, "test": 24, "frames": (250, 900)}
MODEL = {"dim": 32, "batch_size": 8, "lr": 2e-3, "epochs": 1000, "max_steps": 700, "patience": 1000, "threads": 1}


def _configurations(data: Path, seed: int, modalities: list[str]) -> dict[str, TrainConfig]:
    base = TrainConfig(str(data), seed=seed, **MODEL)  # type: ignore[arg-type]
    alone = {f"{name} alone": dataclasses.replace(base, modalities=(name,)) for name in modalities}
    return {"SAGE": base, "uniform weights": dataclasses.replace(base, fusion="uniform"), **alone}


def _train_one(config: TrainConfig, run: str) -> None:
    """In a process of its own."""
    train(config, run, resume=True, live=False)
    calibrate_run(run)


def read_submission(path: Path) -> dict[str, np.ndarray]:
    """{clip name: (T, 2)} of a submission file whose rows are in frame order."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text().splitlines()[1:]:
        location, valence, arousal = line.split(",")
        rows.setdefault(location.rpartition("/")[0], []).append((float(valence), float(arousal)))
    return {name: np.array(values, np.float32) for name, values in rows.items()}


def _best_weights(root: Path, name: str) -> np.ndarray:
    """(T, M) inverse-variance weights under the true noise."""
    truth = read_truth(root, name)
    precision = truth["present"] / truth["variance"]
    return precision / np.maximum(precision.sum(1, keepdims=True), 1e-12)


def _say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)


def demo(out: str | os.PathLike[str], *, seed: int = 0, overwrite: bool = False) -> list[Table]:
    """Run the demonstration in directory `out` and return its tables.

    A directory that holds something is an error, except that `overwrite` replaces an earlier demo. BusyError while
    another process runs one there.
    """
    out = Path(out)
    _check_there(out, overwrite)
    with alone(out, "demonstrating"):
        _check_there(out, overwrite)  # again: another process may have been at work until now
        for entry in out.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        return _demo(out, seed)


def _check_there(out: Path, overwrite: bool) -> None:
    taken = out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir()))
    earlier = (out / MARKER).exists()
    if taken and not (overwrite and earlier):
        holds = "an earlier demo (--overwrite replaces it)" if earlier else "something else"
        raise RunError(f"out: expected a directory that is empty or new, got {out}, which holds {holds}")


def _demo(out: Path, seed: int) -> list[Table]:
    began = time.monotonic()
    write_atomic(out / MARKER, json.dumps({"seed": seed, "data": DATA, "model": MODEL}, indent=1) + "\n")

    data = out / "data"
    spec = write_dataset(data, seed=seed, **DATA)  # type: ignore[arg-type]
    names = list(spec.modalities)
    _say(began, f"synthesised {spec.train} training, {spec.validation} validation, {spec.test} test videos in {data}")

    configs = _configurations(data, seed, names)
    runs = {name: out / name.replace(" ", "-").lower() for name in configs}
    jobs = [Job(name, _train_one, (config, str(runs[name]))) for name, config in configs.items()]
    with Workers(min(len(jobs), os.cpu_count() or 1, 4)) as workers:
        for outcome in workers.run(jobs):
            if outcome.error is not None:
                raise RunError(f"training of {outcome.job.name} failed: {outcome.error}")
    _say(began, f"trained and calibrated {', '.join(configs)} ({MODEL['max_steps']} steps each)")

    tables, page = _score(out, data, seed, runs)
    _say(began, f"predicted, scored and streamed the test split; pictures: {page}")
    return tables


def stream_clip(run: Run, clip: Clip, lines: int = 5) -> Table:
    """Every frame of `clip`, one at a time as a camera would bring them; the last few estimates, and the latency."""
    item = clip_tensors(clip, run.names)
    features = [item["features"][name].numpy() for name in run.names]
    present = item["present"].numpy()
    estimator = Estimator(run.model, run.names)
    records = [
        estimator.take(t + 1, Frame([x[t : t + 1] for x in features], present[t : t + 1]))
        for t in range(clip.num_frames)
    ]
    rows = []
    for record in records[-lines:]:
        stage = int(np.argmax(record["stage"]))
        rows.append(
            [
                str(record["frame"]),
                *estimator.values(record),
                *record["weights"].values(),
                f"{stage + 1} ({record['stage'][stage]:.2f})",
                microseconds(record["latency_us"]),
            ]
        )
    return Table(
        f"The test video {clip.name} frame by frame, its last lines",
        (
            "frame",
            *(target.name for target in run.targets),
            *(f"weight {name}" for name in run.names),
            "stage",
            "latency",
        ),
        rows,
        f"One stream, float32, on the CPU, {clip.num_frames} frames: latency {estimator.latency.line()}.",
    )


def _score(out: Path, data: Path, seed: int, runs: dict[str, Path]) -> tuple[list[Table], Path]:
    truth = TruthClips(data)
    rows: list[tuple[str, float, float, float]] = []

    def add(name: str, predictions: dict[str, np.ndarray]) -> None:
        found = score(predictions, truth)
        rows.append((name, found["CCC_V"], found["CCC_A"], found["P"]))

    for name, path in runs.items():
        submission = out / "submissions" / f"{path.name}.txt"
        submission.parent.mkdir(exist_ok=True)
        predict_run(path, None, submission)
        add(name, read_submission(submission))
    add("oracle (true noise known)", oracle_predictions(data, "test"))

    run = Run.load(runs["SAGE"])
    found = evaluate_clips(run, TruthClips(data))
    parameters = sum(p.numel() for p in run.model.parameters())
    frames = sum(clip.num_frames for clip in truth.data)
    tables = [
        Table(
            "Expected calibration error of SAGE's confidence, test split",
            ("", "before", "after"),
            [
                (name, expected_calibration_error(before), expected_calibration_error(after))
                for name, before, after in zip(run.names, found.before, found.after)
            ],
            "Mean gap between stated and observed reliability, 0 is perfect; calibrated on the validation split.",
        ),
        Table(
            "Concordance on the test split",
            ("", "CCC_V", "CCC_A", "P"),
            rows,
            f"{frames} frames of {len(truth.data)} videos. All rows but the oracle: models of the same size a modality "
            f"(SAGE: {parameters:,} parameters),\ntrained separately with the same data, failures, steps and rates. "
            "'alone': the same model with that one input.",
        ),
    ]
    chosen = sorted(truth, key=lambda clip: -clip.num_frames)[:3]
    best = {clip.name: _best_weights(data, clip.name) for clip in chosen}
    pictures = [*clip_pictures(run, found, chosen, best), *calibration_pictures(run, found), *training_pictures(run)]
    result = {table.title: [dict(zip(table.header, row)) for row in table.rows] for table in tables}
    write_atomic(out / "result.json", json.dumps(result, indent=1) + "\n")
    tables.append(stream_clip(run, chosen[0]))
    return tables, write_report(
        out / "report", f"SAGE demonstration, seed {seed}", pictures, [tables[1], tables[0], tables[2]]
    )
