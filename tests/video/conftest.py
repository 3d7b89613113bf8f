"""Small videos of which everything is known, shared by the tests of extraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from media import make

from sage_ext.data.synthetic import write_dataset
from sage_ext.training.trainer import TrainConfig, train
from sage_ext.video import Parameters, extract


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder of three: one, two, three."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, seconds) in enumerate({"one": 2.0, "two": 2.5, "three": 1.5}.items()):
        make(folder / f"{name}.mp4", seconds, seed)
    return folder


@pytest.fixture(scope="session")
def trained(videos, tmp_path_factory) -> Path:
    """A folder with `data`, the videos' features with annotations of two, and `run`, which has seen two steps of them."""
    root = tmp_path_factory.mktemp("trained")
    extract(videos, root / "data", Parameters(told=True), processes=1)
    rng = np.random.default_rng(0)
    for split, name, frames in (("Train_Set", "one", 60), ("Validation_Set", "two", 75)):
        (root / "data/annotations" / split).mkdir(parents=True)
        rows = [f"{v:.3f},{a:.3f}" for v, a in np.tanh(rng.normal(size=(frames, 2)).cumsum(0) / 5)]
        (root / "data/annotations" / split / f"{name}.txt").write_text("\n".join(["valence,arousal", *rows]) + "\n")
    config = TrainConfig(str(root / "data"), dim=16, batch_size=2, window=2.0, epochs=1, max_steps=2)
    train(config, root / "run", progress=False)
    return root


@pytest.fixture(scope="session")
def foreign_run(tmp_path_factory) -> Path:
    """A run of features that no extraction made."""
    root = tmp_path_factory.mktemp("foreign")
    write_dataset(root / "data", train=2, validation=1, test=0, frames=(40, 60), modalities={"audio": 9, "visual": 8})
    config = TrainConfig(str(root / "data"), dim=8, batch_size=1, window=1.0, epochs=1, max_steps=1)
    train(config, root / "run", progress=False)
    return root / "run"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Extraction begins no processes but where a test asks for them: each takes seconds to begin."""
    from sage_ext.video import extraction

    monkeypatch.setattr(extraction, "_cores", lambda: 1)
