"""A `ReliabilityFusion` away from its start, and features for it."""

import torch

from sage_ext.nn import ReliabilityFusion

DIMS = {"audio": 6, "visual": 9}
BATCH, FRAMES, STAGES = 3, 40, 4


def build(seed=0, **options):
    """A module in evaluation mode whose every parameter and buffer is away from its neutral start."""
    torch.manual_seed(seed)
    module = ReliabilityFusion(options.pop("in_dims", DIMS), 8, **{"evidence_dim": 12, **options})
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
        module.log_temperature.normal_(0, 0.3)
        module.bias.normal_(0, 0.3)
        module.typicality.mean.normal_()
        module.typicality.var.uniform_(0.5, 2)
    return module.eval()


def draw(seed=0, batch=BATCH, frames=FRAMES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    features = {k: torch.randn(batch, frames, d, generator=g, dtype=torch.float64).to(dtype) for k, d in DIMS.items()}
    present = torch.rand(batch, frames, len(DIMS), generator=g) > 0.25
    mask = torch.rand(batch, frames, generator=g) > 0.15
    return features, present, mask
