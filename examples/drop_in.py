"""ReliabilityFusion in somebody's own model: train it, calibrate its confidence, and see whom it trusts.

    python examples/drop_in.py

Two modalities hear and see the same two targets. The picture is bad in the second half of every sequence, and nothing tells the
model so but the data themselves.
"""

import torch
from torch import nn

from sage_ext.calibration import calibrate
from sage_ext.nn import CCCLoss, ReliabilityFusion, ReliabilityHead


def recordings(count: int, frames: int = 80):
    """Features by name, and what is to be estimated, (count, frames, 2) in [-1, 1]."""
    targets = torch.sin(torch.linspace(0, 9, frames)[None, :, None] + 6 * torch.rand(count, 1, 2))
    seen = torch.arange(frames) < frames // 2
    noise = torch.where(seen, 0.2, 3.0)[:, None]
    mixing = torch.Generator().manual_seed(7)  # the same sensors for every recording
    audio = targets @ torch.randn(2, 12, generator=mixing) + torch.randn(count, frames, 12)
    visual = targets @ torch.randn(2, 16, generator=mixing) + noise * torch.randn(count, frames, 16)
    return {"audio": audio, "visual": visual}, targets


class Mine(nn.Module):
    """Any model: the fusion stands where the concatenation stood."""

    def __init__(self):
        super().__init__()
        self.fuse = ReliabilityFusion({"audio": 12, "visual": 16}, dim=32)
        self.out = nn.Linear(32, 2)
        self.confidence = ReliabilityHead(self.fuse, num_targets=2)  # only its loss is used

    def forward(self, features):
        fused = self.fuse(features)
        return self.out(fused.fused).tanh(), fused


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model, ccc_loss = Mine(), CCCLoss()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        features, targets = recordings(16)
        prediction, fused = model(features)
        loss = ccc_loss(prediction, targets) + model.confidence(features, fused, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    validation = [recordings(16) for _ in range(2)]
    report = calibrate(model, [(features,) for features, _ in validation], [targets for _, targets in validation])
    for name, before, after in zip(model.fuse.names, report.ece_before, report.ece_after):
        print(f"calibration error of {name}: {before:.3f} -> {after:.3f}")

    features, targets = recordings(64)
    model.eval()
    with torch.no_grad():
        prediction, fused = model(features)
    ccc = 1 - ccc_loss(prediction, targets).item()
    good, bad = fused.weights[:, :40, 1].mean().item(), fused.weights[:, 40:, 1].mean().item()
    print(f"CCC {ccc:.3f}; weight of the picture {good:.2f} while it is good, {bad:.2f} while it is bad")
    return {"ccc": ccc, "good": good, "bad": bad}


if __name__ == "__main__":
    main()
