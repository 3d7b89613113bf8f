"""What calibration does to a confidence: reliability diagrams before and after, on frames that were not fitted.

    python examples/calibration.py

An over-confident fusion is made on purpose: it learns from recordings of little noise, and meets noisier ones. The diagram
compares what confidence says with what the errors show, in bins of equally many frames. It is drawn as calibration.png, or the
file given as an argument (needs matplotlib).
"""

import sys

import torch

from sage_ext.calibration import calibrate, collect, diagrams, expected_calibration_error
from sage_ext.nn import ReliabilityFusion, ReliabilityHead


def recordings(count: int, noise: float, frames: int = 60):
    """Features by name and targets (count, frames, 1): the noise of a modality changes from frame to frame, and shows."""
    targets, features = torch.randn(count, frames, 1), {}
    for name in ("one", "two"):
        spread = noise * (0.3 + 1.5 * torch.rand(count, frames, 1))
        features[name] = torch.cat([targets + spread * torch.randn(count, frames, 1), spread], -1)
    return features, targets


def main(picture: str | None = None) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    fuse = ReliabilityFusion({"one": 2, "two": 2}, dim=8)
    head = ReliabilityHead(fuse, num_targets=1, kappa=0.5, weight=1.0)
    optimiser = torch.optim.Adam([*fuse.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(150):
        features, targets = recordings(16, noise=0.5)
        optimiser.zero_grad()
        head(features, fuse(features), targets).backward()
        optimiser.step()

    features, targets = recordings(32, noise=1.5)  # the world is worse than the training data
    report = calibrate(fuse, [features], [targets], head=head)
    features, targets = recordings(32, noise=1.5)  # a fit is not to be judged by the frames that it was made on
    evidence = collect(fuse, [features], [targets], head=head)
    identity = torch.zeros_like(report.bias)
    before = diagrams(evidence, identity, identity, kappa=head.kappa, bins=8)
    after = diagrams(evidence, report.log_temperature, report.bias, kappa=head.kappa, bins=8)
    for name, old, calibrated in zip(fuse.names, before, after):
        print(f"{name}: confidence said / the errors show, before and after")
        for b, a in zip(zip(old.predicted, old.observed), zip(calibrated.predicted, calibrated.observed)):
            print("    {:.2f} / {:.2f}    {:.2f} / {:.2f}".format(*b, *a))
    errors = [[expected_calibration_error(d) for d in found] for found in (before, after)]
    for name, old, calibrated in zip(fuse.names, *errors):
        print(f"calibration error of {name}: {old:.3f} -> {calibrated:.3f}")
    if picture:
        draw(before, after, fuse.names, picture)
    return errors[0], errors[1]


def draw(before, after, names, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(names), figsize=(8, 4), sharey=True)
    for axis, name, old, new in zip(axes, names, before, after):
        axis.plot([0, 1], [0, 1], "k:")
        axis.plot(old.predicted, old.observed, "o-", label="before")
        axis.plot(new.predicted, new.observed, "s-", label="after")
        axis.set(title=name, xlabel="confidence", ylabel="reliability that the errors show")
    axes[0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "calibration.png")
