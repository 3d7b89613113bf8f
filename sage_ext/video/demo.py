"""The whole way from raw video: draw people and their voices, extract, train, analyze, and break the sound or the picture.

Scores are concordance with the truth that only the drawing knows, on test videos of people who are in no other split. What breaks
them is done to the files themselves, over their whole length, and the run has seen none of it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from ..files import write_atomic
from ..jobs import Job, Workers
from ..report import Table
from ..training.runs import Run, calibrate_run, evaluate_clips
from ..training.trainer import TrainConfig, train
from .analysis import analyze
from .extraction import extract
from .overlay import write_overlay
from .report import write_report
from .synth import PICTURES, SOUNDS, break_video, write_videos

WORLD = {"train": 16, "validation": 5, "test": 4, "seconds": (20.0, 30.0)}
MODEL = {"dim": 32, "batch_size": 8, "lr": 2e-3, "epochs": 1000, "max_steps": 250, "patience": 1000}
BREAKS = {f"sound: {kind}": {"sound": kind} for kind in SOUNDS} | {
    f"picture: {kind}": {"picture": kind} for kind in PICTURES
}
MARK = "demo-video.json"


def demo(out: str | os.PathLike[str], *, seed: int = 0, overwrite: bool = False) -> list[Table]:
    """Run the demonstration in the folder `out` and return its tables. ValueError where `out` holds something else."""
    root, began = Path(out), time.monotonic()
    if root.exists() and any(root.iterdir()):
        if not (overwrite and (root / MARK).exists()):
            raise ValueError(
                f"out: expected a folder that does not exist or is empty, got {root} (--overwrite replaces an earlier demo)"
            )
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(root / MARK, "{}\n")

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    world, data, run = root / "world", root / "data", root / "run"
    say(f"drawing {WORLD['train'] + WORLD['validation'] + WORLD['test']} people and their voices: {world}")  # type: ignore[operator]
    write_videos(world, seed=seed, **WORLD)  # type: ignore[arg-type]
    say(f"extracting faces and sound: {data}")
    done = extract(world / "videos", data)
    if done.failed:
        raise ValueError("; ".join(done.failed.values()))
    say(f"{done.seconds:.0f} s of video at {done.seconds / done.took:.1f} times real time")
    shutil.copytree(world / "annotations", data / "annotations")
    say(f"training: {run}")
    train(TrainConfig(str(data), seed=seed, **MODEL), run, live=False)  # type: ignore[arg-type]
    calibrate_run(run)
    say("breaking the test videos, and extracting them again")
    broken = _break(root, world, seed)
    model = Run.load(run)
    found = {"as they are": _scored(model, data), **{name: _scored(model, path) for name, path in broken.items()}}
    say("the first test video, analysed")
    first = sorted((world / "videos").glob("test_*.mp4"))[0]
    result = analyze(first, run)
    result.write_csv(root / f"{first.stem}.csv")
    write_report(result, root / f"{first.stem}.html")
    write_overlay(result, root / f"{first.stem}-overlay.mp4")
    who = [
        f"{name} {target.score.removeprefix('CCC_')}" for name in ("fused", *model.names) for target in model.targets
    ]
    trust = [f"{what} {name}" for what in ("weight", "confidence") for name in model.names]
    tables = [
        Table(
            "From raw video: concordance on people the run has not seen",
            ("test videos", *who),
            [(name, *scores) for name, (scores, _) in found.items()],
            f"CCC with the truth (V valence, A arousal) over all frames of {WORLD['test']} videos, fused and by each modality's "
            "own head.\nEach break lasts all of every video.",
        ),
        Table(
            "Who was trusted",
            ("test videos", *trust),
            [(name, *shares) for name, (_, shares) in found.items()],
            f"Means over the frames. {time.monotonic() - began:.0f} s in all; {root / first.stem}.html and -overlay.mp4 show the "
            "first of the videos.",
        ),
    ]
    write_atomic(root / "table.txt", "\n\n".join(table.text() for table in tables) + "\n")
    return tables


def _break(root: Path, world: Path, seed: int) -> dict[str, Path]:
    """The test videos, broken in each way and extracted: name of the way -> data set."""
    tests = sorted((world / "videos").glob("test_*.mp4"))
    jobs, found = [], {}
    for name, how in BREAKS.items():
        folder = root / "broken" / name.replace(": ", "-")
        (folder / "videos").mkdir(parents=True)
        found[name] = folder
        jobs += [
            Job(f"{name} {video.stem}", _broken, (video, folder / "videos" / video.name, how, seed)) for video in tests
        ]
    with Workers(2) as workers:
        for outcome in workers.run(jobs):
            if outcome.error is not None:
                raise ValueError(f"{outcome.job.name}: {outcome.error}")
    every = root / "broken" / "videos"
    every.mkdir()
    for folder in found.values():  # one extraction of all, each under a name of its own
        for video in tests:
            (folder / "videos" / video.name).rename(every / f"{folder.name}-{video.name}")
    done = extract(every, root / "broken" / "data")
    if done.failed:
        raise ValueError("; ".join(done.failed.values()))
    for folder in found.values():
        _part(root / "broken" / "data", folder, world, [video.stem for video in tests])
    return found


def _broken(video: Path, out: Path, how: dict[str, str], seed: int) -> None:
    break_video(video, out, seed=seed, **how)  # type: ignore[arg-type]


def _part(every: Path, folder: Path, world: Path, videos: list[str]) -> None:
    """A data set of the videos that were broken in one way, under their own names, with their annotations."""
    for modality in ("visual", "audio"):
        source, target = every / "features" / modality, folder / "features" / modality
        target.mkdir(parents=True)
        shutil.copy(source / "meta.json", target / "meta.json")
        for video in videos:
            for ending in (".npy", ".quality.npy"):
                if (source / f"{folder.name}-{video}{ending}").exists():
                    os.link(source / f"{folder.name}-{video}{ending}", target / f"{video}{ending}")
    shutil.copytree(world / "annotations" / "Test_Set", folder / "annotations" / "Test_Set")
    shutil.copy(every / "fps.json", folder / "fps.json")


def _scored(run: Run, data: Path) -> tuple[list[float], list[float]]:
    """The concordances, fused and of each modality's own head; and the modalities' mean weights and confidences."""
    found = evaluate_clips(run, run.open(data, "test"))
    scores = [found.scores[who][target.score] for who in ("fused", *run.names) for target in run.targets]
    said = found.predictions.values()
    shares = [np.concatenate(column).mean(0) for column in ([x.weights for x in said], [x.confidence for x in said])]
    return scores, np.concatenate(shares).tolist()
