"""A small synthetic data set, and the smallest configuration that has every part of the model."""

import pytest

from sage_ext.data.synthetic import write_dataset
from sage_ext.training.trainer import TrainConfig


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    write_dataset(
        root, seed=3, train=6, validation=4, test=4, frames=(120, 260), modalities={"audio": 12, "visual": 16}
    )
    return root


@pytest.fixture
def tiny(data):
    """A run of 3 epochs of 6 steps."""
    return TrainConfig(
        str(data), dim=8, stages=2, blocks=2, window=2, hop=4 / 3, batch_size=4, epochs=3, lr=3e-3, warmup=3, threads=1,
        checkpoint_every=2,
    )  # fmt: skip
