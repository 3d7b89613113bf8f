"""Checkpoints: exact round trip, nothing half-written, nothing damaged is loaded, nothing is executed."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sage_ext.files import write_atomic
from sage_ext.training import checkpoint
from sage_ext.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def make_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 5, generator=g)
    return {
        "model": {
            "w": weight,
            "half": weight.bfloat16(),
            "t": weight.T,
            "flag": torch.tensor(True),
            "none": torch.zeros(0, 3),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}],
        },
        "rng": torch.get_rng_state(),
        "numbers": {"third": 1 / 3, "inf": -math.inf, "big": 2**62, "text": "naïve\n", "none": None, "yes": True},
        "moments": None,
        "shared": [weight, weight],
    }


def assert_same(a, b, path="root"):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def test_round_trip_is_exact(tmp_path):
    state = make_state()
    save_checkpoint(tmp_path / "a.safetensors", state)
    assert_same(load_checkpoint(tmp_path / "a.safetensors"), state)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_optimizer_state_survives(tmp_path):
    """AdamW's own state dict has integer keys and tensors inside lists; it must load and go on identically."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def steps(model, optimizer, n):
        for i in range(n):
            optimizer.zero_grad()
            model(torch.full((2, 4), float(i + 1))).square().sum().backward()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, 3)
    save_checkpoint(tmp_path / "a.safetensors", {"m": model.state_dict(), "o": optimizer.state_dict()})
    steps(model, optimizer, 4)
    other, other_optimizer = make()
    state = load_checkpoint(tmp_path / "a.safetensors")
    other.load_state_dict(state["m"])
    other_optimizer.load_state_dict(state["o"])
    steps(other, other_optimizer, 4)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1.0), b"raw"], ids=["object", "set", "numpy", "bytes"])
def test_unknown_leaf_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match="checkpoint: /a/0"):
        save_checkpoint(tmp_path / "a.safetensors", {"a": [value]})
    assert os.listdir(tmp_path) == []


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, make_state())
    whole = path.read_bytes()
    for size in sorted(
        {0, 1, 7, 8, 9, 100, *np.random.default_rng(0).integers(0, len(whole), 40).tolist(), len(whole) - 1}
    ):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_every_flipped_byte_is_refused(tmp_path):
    """In the tensors' bytes as in the header: the digest covers both."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"w": torch.arange(40.0), "lr": 0.125, "names": ["audio", "visual"]})
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except CheckpointError:
            continue
        # The only harmless flips are in the JSON's insignificant places: what is read must still be what was written.
        assert_same(state, {"w": torch.arange(40.0), "lr": 0.125, "names": ["audio", "visual"]})


def test_two_files_cannot_be_mixed(tmp_path):
    """The header of one checkpoint in front of another's tensors (same shapes) is not a checkpoint."""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(a, {"w": torch.zeros(8), "step": 1})
    save_checkpoint(b, {"w": torch.ones(8), "step": 2})
    one, two = a.read_bytes(), b.read_bytes()
    assert len(one) == len(two)
    a.write_bytes(one[:-32] + two[-32:])
    with pytest.raises(CheckpointError, match="digest"):
        load_checkpoint(a)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a sage_ext checkpoint"):
        load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path, {"sage_ext": json.dumps({"format": 99, "tree": "{}", "digest": ""})})
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such"):
        load_checkpoint(tmp_path / "absent.safetensors")

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    torch.save({"w": Bomb()}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def signed(path, tree, metadata=None):
    """A safetensors file with this tree and the digest that goes with it: what only somebody who means it writes."""
    from safetensors.torch import save_file

    text, tensors = json.dumps(tree), {"/w": torch.zeros(2)}
    header = {"format": 1, "digest": checkpoint._digest(text, tensors), "tree": text}
    save_file(tensors, path, metadata or {"sage_ext": json.dumps(header)})


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1, "b": 2}, {}, {"tensor": "/absent"}, {"tensor": []}, {"dict": 3}, {"dict": [1]}, {"dict": [[[], 1]]},
        {"bag": []}, {"list": 3}, {"tuple": None}, {"list": [1]}, 17, None, "text", {"dict": [["a", {"x": 1}]]},
    ],
)  # fmt: skip
def test_odd_trees_are_refused(tmp_path, tree):
    path = tmp_path / "a.safetensors"
    signed(path, tree)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        load_checkpoint(path)


def test_deep_trees_and_headers_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    deep = "[" * 50_000 + "]" * 50_000
    tensors = {"/w": torch.zeros(2)}
    for header in (
        json.dumps({"format": 1, "digest": checkpoint._digest(deep, tensors), "tree": deep}), deep, "[]", "3", "null",
        json.dumps({"format": 1, "digest": 3, "tree": 4}), json.dumps({"format": 1}), "{",
    ):  # fmt: skip
        signed(path, {}, {"sage_ext": header})
        with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
            load_checkpoint(path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


_WRITER = """
import sys, torch
from sage_ext.training.checkpoint import save_checkpoint
i = 0
while True:
    save_checkpoint(sys.argv[1], {"i": i, "w": torch.full((200_000,), float(i))})
    if i == 0: print("ready", flush=True)
    i += 1
"""


def test_a_killed_writer_leaves_one_whole_checkpoint(tmp_path):
    path = tmp_path / "a.safetensors"
    rng, seen = np.random.default_rng(0), set()
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE)
        try:
            writer.stdout.readline()
            for _ in range(20):  # read while it writes
                time.sleep(float(rng.uniform(0, 0.005)))
                state = load_checkpoint(path)
                assert torch.equal(state["w"], torch.full((200_000,), float(state["i"])))
                seen.add(state["i"])
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
        state = load_checkpoint(path)
        assert torch.equal(state["w"], torch.full((200_000,), float(state["i"])))
    assert len(seen) > 3  # the file did change under the reader
