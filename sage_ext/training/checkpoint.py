"""Checkpoints: one safetensors file, scalars as JSON in its metadata, a digest over both. Nothing is pickled.

A checkpoint is any nesting of dicts, lists and tuples whose leaves are tensors, numbers, strings, booleans or None. It
is one file, written beside its place and renamed into it, so what stands under the name is always one whole
checkpoint: the old one or the new one, whenever the process dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from ..files import one_line, write_atomic

FORMAT = 1
_KEY = "sage_ext"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not one of ours; the message names the file."""


# ------------------------------------------------------------------------------------------------------------ tree
def _pack(node: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The JSON form of `node`; its tensors go to `tensors`, named by their path. One-key dicts tag what JSON lacks."""
    if isinstance(node, Tensor):
        tensors[path] = node.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(node, dict):
        return {"dict": [[key, _pack(value, tensors, f"{path}/{key}")] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        tag = "list" if isinstance(node, list) else "tuple"
        return {tag: [_pack(value, tensors, f"{path}/{i}") for i, value in enumerate(node)]}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"checkpoint: {path or 'root'} is a {type(node).__name__}; expected tensors, numbers, text or None")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((tag, value),) = node.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "dict":
        return {key: _unpack(item, tensors) for key, item in value}
    if tag not in ("list", "tuple"):
        raise ValueError(f"the tag {tag!r:.60}")
    items = [_unpack(item, tensors) for item in value]
    return items if tag == "list" else tuple(items)


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically. TypeError for a leaf that is neither a tensor, a number, text nor None."""
    safetensors_torch = require("safetensors.torch", "train")
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, tensors, ""))
    header = {"format": FORMAT, "digest": _digest(tree, tensors), "tree": tree}
    write_atomic(path, safetensors_torch.save(tensors, {_KEY: json.dumps(header)}))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, tensors on the CPU. CheckpointError if the file is missing, cut or altered."""
    safetensors_torch = require("safetensors.torch", "train")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        data = path.read_bytes()  # at once: a library that opens the file twice may meet two files
        tensors = safetensors_torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    except OSError:
        raise
    except Exception as error:  # whatever the library raises for bytes that are not its own
        raise CheckpointError(f"{path}: not a readable checkpoint ({one_line(error)})") from error
    if not isinstance(metadata, dict) or _KEY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a sage_ext checkpoint")
    try:
        header = json.loads(metadata[_KEY])
        version, tree, digest = header["format"], str(header["tree"]), header["digest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header ({one_line(error)})") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {version!r:.60}; this version reads format {FORMAT}")
    try:
        if _digest(tree, tensors) != digest:
            raise CheckpointError(f"{path}: damaged (the contents do not match their digest)")
        state = _unpack(json.loads(tree), tensors)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged tree ({one_line(error)})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dict of its parts, got {type(state).__name__}")
    return state


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """For a block that takes a checkpoint apart: what is missing in it, or is of another kind, size or value than `what`
    has there, becomes a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else one_line(error, 300)
        raise CheckpointError(f"{path}: expected {what} of this version, got another file ({got})") from error
