"""A model as a folder that others can load: config.json, model.safetensors and README.md, as on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from ..files import one_line, write_atomic

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def write_folder(folder: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write config and weights, each whole or not at all, the config last: with the digests of both. A README.md that is there
    stays."""
    safetensors = require("safetensors.torch", "train")
    folder = Path(folder)
    try:
        text = json.dumps(config, sort_keys=True)
    except TypeError as error:
        raise TypeError(f"config: expected numbers, text, lists and mappings, got {one_line(error)}") from error
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.save({name: x.detach().cpu().contiguous() for name, x in state.items()}, {"format": "pt"})
    about = {
        "library_name": "sage_ext",
        "format": FORMAT,
        "config": config,
        "sha256": {"config": _digest(text.encode()), WEIGHTS: _digest(data)},
    }
    if not (folder / CARD).exists():
        write_atomic(folder / CARD, card(config, sum(x.numel() for x in state.values())))
    write_atomic(folder / WEIGHTS, data)
    write_atomic(folder / CONFIG, json.dumps(about, indent=2) + "\n")
    return folder


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_folder` wrote, tensors on the CPU. FileNotFoundError for what is not there, ValueError that names the file for
    what is damaged, or of two models."""
    safetensors = require("safetensors.torch", "train")
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: expected a folder of SAGE.save_pretrained (huggingface_hub.snapshot_download fetches one from "
                f"the Hub), got none with {name}"
            )
    try:
        about = json.loads((folder / CONFIG).read_bytes())
        version, config, digests = about["format"], about["config"], about["sha256"]
        digest_of_config, digest_of_weights = digests["config"], digests[WEIGHTS]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: expected what SAGE.save_pretrained writes, got a damaged file "
                         f"({type(error).__name__}: {one_line(error)})") from error  # fmt: skip
    if version != FORMAT:
        raise ValueError(f"{folder / CONFIG}: expected format {FORMAT}, which this version reads, got {version!r:.60}")
    if digest_of_config != _digest(json.dumps(config, sort_keys=True).encode()):
        raise ValueError(f"{folder / CONFIG}: expected the config of its own digest, got a damaged or edited file")
    data = (folder / WEIGHTS).read_bytes()
    if digest_of_weights != _digest(data):
        raise ValueError(
            f"{folder / WEIGHTS}: expected the weights of the digest in {CONFIG}, got a damaged file, or another's"
        )
    return config, safetensors.load(data)


def card(config: Mapping[str, Any], numbers: int) -> str:
    """A short model card: what goes in, what comes out, how to load it, what is to be said by whoever trained it."""
    sizes, causal = config["in_dims"], "yes" if config["causal"] else "no"
    names = sizes.items() if isinstance(sizes, Mapping) else enumerate(sizes)
    rows = "\n".join(f"| {name} | {size} |" for name, size in names)
    return f"""---
library_name: sage_ext
tags: [multimodal, reliability, valence-arousal]
---
# SAGE: stage-adaptive gated estimation

{numbers:,} numbers, width {config["dim"]}, {config["num_targets"]} targets in (-1, 1),
fusion "{config["fusion"]}", causal: {causal}.

| modality | features a frame |
| --- | --- |
{rows}

```python
from sage_ext.models import SAGE

model = SAGE.from_pretrained(".")  # this folder
```

Of the data that it was trained on, its scores and their limits: to be written by whoever trained it. Its confidence is
calibrated only if `sage_ext.calibration` was run.
"""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def precision_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a model's weights, by one of them."""
    return next(x.dtype for name, x in state.items() if name.endswith(".weight"))
