"""Whether an installed sage_ext works, far from its sources: `python smoke.py`, with torch and nothing else of this project.

Each op against the reference in float64, a training step, a step of a stream, the command line, and the files that belong
to the package. cibuildwheel runs it for each wheel, tests/test_package.py for the one that it builds.
"""

import subprocess
import sys
from importlib import metadata, resources

import torch

import sage_ext
from sage_ext import functional, reference
from sage_ext.models import SAGE
from sage_ext.nn import CCCLoss, ReliabilityFusion

FILES = ("py.typed", "_C.pyi", "live/page.html", "video/report.html")


def close(got: object, expected: object) -> bool:
    """Whether tensors, or tuples of them, are equal to 1e-10."""
    if isinstance(expected, tuple):
        return all(close(a, b) for a, b in zip(got, expected, strict=True))
    return torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


def ops() -> None:
    x, y = (torch.randn(3, 20, 2, dtype=torch.float64) for _ in range(2))
    emission, transition = torch.randn(3, 20, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    values = [torch.randn(3, 20, 8, dtype=torch.float64) for _ in range(2)]
    logits = torch.randn(3, 20, 2, 4, dtype=torch.float64)
    halflives, prior = torch.tensor([4.0, 16.0]), torch.tensor([1.0, 2.0])
    calls = {
        "ccc": (x, y),
        "ccc_moments": (x, y),
        "temporal_ccc": (x, y),
        "stage_filter": (emission, transition.log_softmax(-1)),
        "reliability_fusion": (values, logits, emission.softmax(-1)),
        "leaky_average": (values[0], logits[..., 0, 0].exp(), halflives, prior),
    }
    for name, arguments in calls.items():
        assert close(getattr(functional, name)(*arguments), getattr(reference, name)(*arguments)), name


def modules() -> None:
    fuse = ReliabilityFusion({"audio": 5, "visual": 7}, dim=4)
    out = fuse({"audio": torch.randn(2, 9, 5), "visual": torch.randn(2, 9, 7)})
    CCCLoss()(out.fused, torch.randn(2, 9, 4)).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in fuse.parameters())
    model = SAGE({"audio": 5, "visual": 7}).eval()
    frames = {"audio": torch.randn(1, 3, 5), "visual": torch.randn(1, 3, 7)}
    with torch.no_grad():
        whole = model(frames).prediction
    session = model.stream(batch_size=1)
    for t in range(3):
        step = session.step({name: x[:, t] for name, x in frames.items()})
        assert torch.allclose(step.prediction, whole[:, t], atol=1e-5)


def package() -> None:
    missing = [name for name in FILES if not resources.files("sage_ext").joinpath(name).is_file()]
    assert not missing, missing
    assert metadata.version("sage-ext") == sage_ext.__version__
    told = subprocess.run([sys.executable, "-m", "sage_ext", "--version"], capture_output=True, text=True)
    assert told.stdout.strip() == f"sage-ext {sage_ext.__version__}", told


if __name__ == "__main__":
    torch.manual_seed(0)
    ops()
    modules()
    package()
    print(f"sage_ext {sage_ext.__version__} works: {sage_ext.__file__}, torch {torch.__version__}")
