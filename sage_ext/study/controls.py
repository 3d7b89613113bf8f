"""Does the confidence matter? What a model would have predicted with other shares of its experts.

A prediction is the sum of its experts' estimates, each times its share. Here the estimates stay and the shares are replaced:
by those of another clip, by the clip's own in another order, by the clip's own mean. What that costs is the value of knowing
when to trust whom. An expert that is missing in a frame stays missing, and the shares sum to 1 as before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..data.affwild2 import bare_name
from ..training.evaluate import ClipPrediction

CONTROLS = {
    "another": "the shares of another clip",
    "shuffled": "its own shares, shuffled in time",
    "held": "each expert's mean share",
}
PERMUTED = ("another", "shuffled")
BLOCK = 2.0  # seconds that a shuffle leaves together, about

Array = np.ndarray


def donors(names: Sequence[str]) -> list[int | None]:
    """For each clip the place of the one whose shares it gets: the next of another video in the order of a hash of the
    names. None where there is no other video."""
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    place = {i: rank for rank, i in enumerate(order)}
    found = list[int | None]()
    for i, name in enumerate(names):
        ring = order[place[i] + 1 :] + order[: place[i]]
        found.append(next((j for j in ring if bare_name(names[j]) != bare_name(name)), None))
    return found


def controlled(said: ClipPrediction, shares: Array) -> Array:
    """(T, C) what `said` would be with other `shares` (T, K), which count where the expert is there and are scaled to the
    sum of the shares in their place. Where they leave nothing the experts that are there share alike."""
    assert said.experts is not None
    assert said.shares is not None
    there = said.shares > 0
    kept: Array = np.where(there, shares, 0.0).astype(np.float64)
    kept = np.where(kept.sum(1, keepdims=True) > 0, kept, there.astype(np.float64))
    kept *= said.shares.sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1e-12)
    found = np.einsum("tk,tkc->tc", kept, said.experts)
    return np.where(there.any(1, keepdims=True), found, said.prediction).astype(np.float32)


def another(shares: Array, frames: int) -> Array:
    """(frames, K): the shares of a clip cropped, or repeated from its beginning."""
    return np.resize(shares, (frames, shares.shape[1]))


def shuffled(shares: Array, block: int, key: str) -> Array:
    """(T, K): blocks of `block` frames, the last one shorter, in an order drawn for `key`; no block stays in its place
    where there are two or more."""
    blocks = np.split(shares, range(block, len(shares), block))
    rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()[:8]))
    order = rng.permutation(len(blocks))
    turned = np.empty_like(order)
    turned[order] = np.roll(order, 1)  # one cycle through all of them
    return np.concatenate([blocks[i] for i in turned])


def held(shares: Array) -> Array:
    """(T, K): each expert's mean share over the frames in which it is there."""
    count = np.maximum((shares > 0).sum(0), 1)
    return np.broadcast_to(shares.sum(0) / count, shares.shape)


def control_predictions(
    said: Sequence[ClipPrediction], names: Sequence[str], fps: Sequence[float], seed: int
) -> dict[str, list[Array | None]]:
    """{control: what each clip's prediction would be}, of all clips of a split under one condition; None where there is
    no other video."""
    found: dict[str, list[Array | None]] = {control: [] for control in CONTROLS}
    for i, (one, donor) in enumerate(zip(said, donors(names))):
        assert one.shares is not None
        theirs = None if donor is None else said[donor].shares
        block = max(round(BLOCK * fps[i]), 1)
        found["another"].append(None if theirs is None else controlled(one, another(theirs, len(one.shares))))
        found["shuffled"].append(controlled(one, shuffled(one.shares, block, f"{names[i]}\n{seed}")))
        found["held"].append(controlled(one, held(one.shares)))
    return found
