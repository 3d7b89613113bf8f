"""The committed predictions for GPUs are those of the present machine code."""

from __future__ import annotations

import json
import sys

import pytest
from sass import NVCC, NVDISASM, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import model


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or NVDISASM is None, reason="no nvcc, or no nvdisasm")
def test_the_committed_predictions_are_the_present_ones():
    kept = json.loads(model.RESULT.with_suffix(".json").read_text())["predictions"]
    found = model.all_predictions()
    assert [(p["case"], p["gpu"]) for p in kept] == [(p.case, p.gpu) for p in found]
    for old, new in zip(kept, found):  # another nvcc may count a few instructions more
        assert old["seconds"] == pytest.approx(new.seconds, rel=0.1), new.case
        assert old["met"] == new.met, f"{new.case}: run benchmarks/model.py --write"


def test_predictions_are_found_by_the_name_that_torch_gives_a_gpu():
    h100, h200 = model.by_case("NVIDIA H100 80GB HBM3"), model.by_case("NVIDIA H200")
    assert h100
    assert h100.keys() == h200.keys()
    assert h100 != h200
    assert model.by_case("NVIDIA A100-SXM4-80GB") == {}


def test_less_in_flight_or_more_bytes_take_longer():
    gpu = model.GPUS[0]
    if NVCC is None or NVDISASM is None:
        pytest.skip("no nvcc, or no nvdisasm")
    title = "ccc, float32, 2 channels"
    once, twice = (model.streamed(gpu, title, n, n, n / 4096)[0] for n in (1e9, 2e9))
    assert twice > 1.8 * once
    assert model.streamed(model.GPUS[1], title, 1e9, 1e9, 1e9 / 4096)[0] < once
