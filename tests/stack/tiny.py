"""The small models and the data of these tests; `python tests/stack/tiny.py FOLDER` writes the fixture of a release."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sage_ext.models import SAGE
from sage_ext.nn import ReliabilityFusion

DIMS = {"audio": 5, "visual": 6}
FIELDS = ("prediction", "unimodal", "weights", "confidence", "stage")


def draw(seed=0, batch=2, frames=20):
    """Features and flags, with frames that repeat for longer than a model of `tiny` lets them."""
    g = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(batch, frames, d, generator=g) for name, d in DIMS.items()}
    features["audio"][0, frames // 3 :] = 0.25
    return features, torch.rand(batch, frames, 2, generator=g) > 0.2


def moved(module, seed=0):
    """With weights and buffers away from where they begin."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    model = SAGE(DIMS, **{"dim": 8, "evidence_dim": 4, "stages": 3, "blocks": 2, "memory": [4.0, 16.0], **options})
    moved(model, seed)
    features, present = draw(99)
    batch = {"features": features, "present": present}
    if model.quality_dims != [0, 0]:
        batch["quality"] = {"visual": torch.randn(2, 20, 3)}
    model.fit_statistics([batch])
    model.stuck_limit.copy_(torch.tensor([4, 0]))
    return model


def tiny_fusion(seed=0, **options):
    torch.manual_seed(seed)
    return moved(ReliabilityFusion(DIMS, 8, **{"evidence_dim": 4, "stages": 3, **options}), seed)


def close(a, b, tol=1e-5, fields=FIELDS):
    for field in fields:
        x, y = (out[field] if isinstance(out, dict) else getattr(out, field) for out in (a, b))
        torch.testing.assert_close(
            x, y, atol=tol, rtol=tol, msg=lambda message, field=field: f"{field}: {message}"
        )  # fmt: skip


if __name__ == "__main__":
    from safetensors.torch import save_file

    folder = Path(sys.argv[1])
    model = tiny(7)
    model.save_pretrained(folder)
    features, present = draw(8, frames=12)
    with torch.no_grad():
        out = model(features, present)
    answers = {field: getattr(out, field).contiguous() for field in FIELDS}
    save_file({**features, "present": present, **answers}, folder / "answers.safetensors")
