"""examples/: each script runs as a reader would run it and does what its text says; the notebook's cells run in their order."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "first_steps.ipynb"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_it_was():
    """Examples seed torch, whose state other tests may go by; one thread each is enough for them."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def test_all_are_tested_and_short():
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {"drop_in", "own_targets", "streaming_server", "ddp", "calibration"}
    for name, text in scripts.items():
        assert 30 <= text.count("\n") <= 80, name
        assert f"    python examples/{name}.py\n" in text


def test_drop_in():
    found = load("drop_in").main()
    assert found["ccc"] > 0.9
    assert found["good"] > 0.5 > 2 * found["bad"]


def test_own_targets():
    report, predictions = load("own_targets").main(steps=3)
    assert [(name, target.source) for name, target in report.targets.items()] == [
        ("stress", "asked for"), ("calm", "of the table"),
    ]  # fmt: skip
    assert {name: values.shape for name, values in predictions.items()} == {"talk0": (60, 2)}
    for column, target in enumerate(report.targets.values()):
        values = predictions["talk0"][:, column]
        assert target.low < values.min() < values.max() < target.high


def test_streaming_server():
    """Each client's answers are those of the model on its frames alone, whatever the other one sends at the same time."""
    model, sent, answers = asyncio.run(load("streaming_server").main())
    for frames, answered in zip(sent, answers, strict=True):
        missing = float("nan")
        features = {
            name: torch.tensor([[frame[name] or [missing] * size for frame in frames]])
            for name, size in load("streaming_server").SIZES.items()
        }
        with torch.no_grad():
            whole = model(features)
        estimates = torch.tensor([[answer["estimate"] for answer in answered]])
        torch.testing.assert_close(estimates, whole.prediction, atol=1e-5, rtol=0)
        weights = torch.tensor([[answer["weights"] for answer in answered]])
        torch.testing.assert_close(weights, whole.weights, atol=1e-5, rtol=0)
    assert all(answer["weights"][1] == 0 for answer in answers[1][10:20])


def test_calibration(tmp_path):
    pytest.importorskip("matplotlib")
    before, after = load("calibration").main(str(tmp_path / "calibration.png"))
    assert (tmp_path / "calibration.png").stat().st_size > 1000
    assert all(new < old for old, new in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drop_in", "own_targets", "streaming_server", "ddp", "calibration"])
def test_as_a_script(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr
    if name == "ddp":
        [apart] = re.findall(r"the weights differ by (\S+)$", done.stdout, re.MULTILINE)
        assert float(apart) < 1e-10


def test_the_notebook_is_one_without_outputs():
    """What nbformat asks of version 4.5, and nothing that was run is kept."""
    book = json.loads(NOTEBOOK.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert 8 <= len(book["cells"]) <= 12
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell["id"])
        code = cell["cell_type"] == "code"
        keys = {"cell_type", "id", "metadata", "source"} | ({"execution_count", "outputs"} if code else set())
        assert set(cell) == keys
        assert all(isinstance(line, str) for line in cell["source"])
        if code:
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_the_notebook_runs(capsys):
    space: dict = {}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"first_steps.ipynb:{number}", "exec"), space)
    said = capsys.readouterr().out
    assert "weight of the picture" in said
