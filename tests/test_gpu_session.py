"""benchmarks/gpu_session.sh without a GPU: every part of it runs on the CPU, and its deadline holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests" / "cuda"))
import stream as streaming  # noqa: E402
from model import streaming_case  # noqa: E402

PARTS = ["info", "benchmarks", "streaming benchmark", "CUDA tests", "memcheck", "racecheck", "synccheck", "initcheck"]
pytestmark = pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no bash")


def session(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), str(out), "--dry-run"]
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def without_numbers(case: str) -> str:
    return re.sub(r"\d+ rows", "N rows", case)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path):
    done = session(tmp_path)
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0, summary
    for part in PARTS:
        assert f"{part}: ok" in summary
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["machine"]["dry_run"]
    assert not [row for row in kept["results"] if "error" in row]
    # The predictions stand beside the measurements by the case's name.
    predicted = json.loads((ROOT / "benchmarks" / "results" / "gpu-predictions.json").read_text())["predictions"]
    measured = {without_numbers(row["case"]): row for row in kept["results"]}
    streamed = json.loads((tmp_path / "stream.json").read_text())["steps"]
    cases = {streaming_case(*name.split(", ")) for name in streamed}
    for p in predicted:
        if p["case"].startswith("streaming"):
            assert p["case"] in cases
            continue
        row = measured[without_numbers(p["case"])]
        assert (p["unit"], p["target"], p["at_most"]) == (row["unit"], row["target"], row["at_most"])
    assert "all kernels ran" in (tmp_path / "sanitizer-memcheck.log").read_text()


def test_what_the_deadline_leaves_no_time_for_is_named(tmp_path):
    started = time.monotonic()
    done = session(tmp_path, SECONDS_IN_ALL="4")
    summary = (tmp_path / "summary.txt").read_text()
    assert time.monotonic() - started < 30
    assert done.returncode == 1
    for part in PARTS[2:]:
        assert re.search(f"{part}: (not run, out of time|FAILED with status 1(24|37))", summary), summary
    assert f"{PARTS[-1]}: not run, out of time" in summary
    if (tmp_path / "gpu.json").exists():  # what was measured before the part was stopped
        assert json.loads((tmp_path / "gpu.json").read_text())["results"]


def test_streaming_figures_are_kept_before_anything_is_compiled(monkeypatch):
    kept = []

    def unfinished(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(streaming, "LIMITS", {1: 40e-6})
    monkeypatch.setattr(streaming.torch, "compile", unfinished)
    with pytest.raises(TimeoutError):
        streaming.on_gpu(1, 2, True, lambda rows: kept.append(dict(rows)), "cpu", "NVIDIA H100 80GB HBM3")
    (rows,) = kept
    assert rows.keys() == {"float32, 1", "bfloat16, 1", "eager, 1"}
    assert rows["float32, 1"]["predicted"] > 0
    assert rows["float32, 1"]["p50"] > 0


def test_an_unknown_option_is_refused(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), str(tmp_path), "--dry"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--dry" in done.stderr
