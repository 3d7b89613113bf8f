"""A trained run, a clip of features, the same as input files, and what the model says of it offline."""

import numpy as np
import pytest
import torch
from streams import DIMS, FRAMES, NAMES, line

from sage_ext.data.synthetic import write_dataset
from sage_ext.training.runs import Run
from sage_ext.training.trainer import TrainConfig, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("live")
    write_dataset(
        root / "data", seed=3, train=3, validation=2, test=2, frames=(60, 90), modalities=dict(zip(NAMES, DIMS))
    )
    config = TrainConfig(
        str(root / "data"),
        dim=8,
        stages=3,
        blocks=2,
        window=2,
        hop=4 / 3,
        batch_size=2,
        max_steps=12,
        lr=1e-2,
        threads=1,
    )
    train(config, root / "run", progress=False)
    return root / "run"


@pytest.fixture(scope="module")
def clip():
    """Features (T, D) a modality, NaN where `present` (T, M) is False; labels (T, 2), -5 where `valid` (T,) is not."""
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((FRAMES, d)).cumsum(0).astype(np.float32) / 8 for d in DIMS]
    present = rng.random((FRAMES, 2)) > 0.15
    for m, x in enumerate(features):
        x[~present[:, m]] = np.nan
    labels = np.round(np.sin(np.arange(FRAMES)[:, None] / 30 + np.array([0, 1])), 4)
    valid = rng.random(FRAMES) > 0.2
    labels[~valid] = -5
    return features, present, labels, valid


@pytest.fixture(scope="module")
def files(tmp_path_factory, clip):
    features, present, labels, _ = clip
    root = tmp_path_factory.mktemp("input")
    (root / "clip.jsonl").write_text("".join(line(features, present, t) for t in range(FRAMES)))
    (root / "clip.f32").write_bytes(np.concatenate(features, 1).astype("<f4").tobytes())
    (root / "labels.txt").write_text("valence,arousal\n" + "".join(f"{v:g},{a:g}\n" for v, a in labels))
    return root


@pytest.fixture(scope="module")
def offline(trained, clip):
    """The whole call on the first n of some frames: {"prediction", "weights", "confidence", "stage"} (n, ...)."""
    model = Run.load(trained).model
    features, present, _, _ = clip

    def whole(frames):
        with torch.no_grad():
            out = model([torch.from_numpy(x[frames])[None] for x in features] if model.names is None else
                        {n: torch.from_numpy(x[frames])[None] for n, x in zip(NAMES, features)},
                        torch.from_numpy(present[frames])[None])  # fmt: skip
        return {key: getattr(out, key)[0].numpy() for key in ("prediction", "weights", "confidence", "stage")}

    return whole
