"""What a type checker tells a user of sage_ext: the results of its modules are theirs, not nn.Module's Any."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """\
import torch
from typing import TYPE_CHECKING
from sage_ext import functional
from sage_ext.metrics import StreamingCCC, TorchMetricsCCC
from sage_ext.models import SAGE
from sage_ext.models.sage import SAGELoss
from sage_ext.nn import (
    CCCLoss, ExplainedVarianceNLL, ReliabilityFusion, ReliabilityHead, ReliabilityNLL, TemporalCCCLoss, UniformFusion,
)

features = {"audio": torch.randn(2, 9, 5), "visual": torch.randn(2, 9, 7)}
labels = torch.rand(2, 9, 2)
fuse = ReliabilityFusion({"audio": 5, "visual": 7}, dim=4)
out = fuse(features, quality=None)
model = SAGE({"audio": 5, "visual": 7})
estimate = model(features)


def step(pred: torch.Tensor) -> torch.Tensor:
    total, parts = SAGELoss()(estimate, labels)
    return total + parts["prediction"] + CCCLoss()(pred, labels) + ReliabilityHead(fuse, num_targets=2)(features, out, labels)


if TYPE_CHECKING:
"""
# Expression -> its type, as mypy writes it without modules. reveal_type is for the type checker alone.
TYPES = {
    "out": "FusionOutput",
    "out.fused": "Tensor",
    "UniformFusion([5, 7], 4)(list(features.values()))": "FusionOutput",
    "estimate": "SAGEOutput",
    "estimate.confidence": "Tensor",
    "model.fusion.names": "tuple[str, ...] | None",
    "CCCLoss()(labels, labels)": "Tensor",
    "TemporalCCCLoss(window=5)(labels, labels)": "Tensor",
    "ReliabilityNLL()(labels, labels)": "Tensor",
    "ExplainedVarianceNLL()(labels, labels)": "Tensor",
    "SAGELoss()(estimate, labels)": "tuple[Tensor, dict[str, Tensor]]",
    "ReliabilityHead(fuse, num_targets=2)(features, out, labels)": "Tensor",
    "StreamingCCC()(labels, labels)": "Tensor",
    "TorchMetricsCCC()(labels, labels)": "Tensor",
    "functional.ccc(labels, labels)": "Tensor",
    "model.stream(batch_size=1).step(features).prediction": "Tensor",
}
WRONG = "fuse(features, qualities=None)"  # no such argument: with Any it would pass


def written(folder: Path) -> Path:
    """A user's program: PROGRAM, a reveal_type of each expression, and WRONG as the last line."""
    program = folder / "program.py"
    program.write_text(PROGRAM + "".join(f"    reveal_type({e})\n" for e in TYPES) + f"    {WRONG}\n")
    return program


def plain(kind: str) -> str:
    """`builtins.tuple[torch._tensor.Tensor, ...]` -> `tuple[Tensor, ...]`."""
    kind = re.sub(r"\w+\.(?=\w)", "", kind)
    found = re.fullmatch(r"tuple\[(.*), fallback=(\w+)\]", kind)  # a named tuple
    return found[2] if found else kind


def checked(revealed: list[str], errors: list[str]) -> None:
    assert dict(zip(TYPES, map(plain, revealed), strict=True)) == TYPES
    assert len(errors) == 1, errors
    assert "qualities" in errors[0]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy")
def test_mypy_strict(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--python-executable",
        sys.executable,
    ]
    out = subprocess.run(
        [*command, "--cache-dir", ROOT / ".mypy_cache" / "strict", written(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert not out.stderr
    checked(re.findall(r'Revealed type is "(.*)"', out.stdout), re.findall(r"error: .*", out.stdout))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright")
def test_pyright(tmp_path):
    program = written(tmp_path)
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    out = subprocess.run(
        ["pyright", "--outputjson", "--pythonpath", sys.executable, program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    said = json.loads(out.stdout)["generalDiagnostics"]
    revealed = [re.search(r'Type of ".*" is "(.*)"', d["message"]) for d in said if d["severity"] == "information"]
    checked([found[1] for found in revealed if found], [d["message"] for d in said if d["severity"] == "error"])


def test_the_program_runs(tmp_path):
    """So that what the type checkers read is what a user may write."""
    program = written(tmp_path)
    run = "exec(open('program.py').read()); step(labels).backward()"
    out = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert program.exists()
    assert out.returncode == 0, out.stderr
