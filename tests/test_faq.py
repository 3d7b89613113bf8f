"""docs/faq.md: each message that it explains is one that the package really says, to the letter."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sage_ext import cli, extras, functional
from sage_ext._ops import _door
from sage_ext.calibration import calibrate
from sage_ext.models import SAGE
from sage_ext.nn import ReliabilityFusion

FAQ = Path(__file__).parents[1] / "docs/faq.md"


def no_kernels(monkeypatch) -> None:
    monkeypatch.delenv("SAGE_EXT_STRICT", raising=False)
    monkeypatch.delitem(_door.kernels, "cuda", raising=False)
    monkeypatch.setattr(_door, "_warned", set())
    _door.has_kernels(torch.device("cuda"))


def second_derivative(monkeypatch) -> None:
    pred, target = torch.randn(2, 5, 2, requires_grad=True), torch.randn(2, 5, 2)
    [slope] = torch.autograd.grad(functional.ccc(pred, target).sum(), pred, create_graph=True)
    slope.sum().backward()


def dtypes(monkeypatch) -> None:
    functional.reliability_fusion([torch.randn(4, 8), torch.randn(4, 8).half()], torch.randn(4, 2, 1))


def size(monkeypatch) -> None:
    fuse = ReliabilityFusion({"audio": 128, "visual": 512}, dim=16)
    fuse({"audio": torch.randn(8, 300, 128), "visual": torch.randn(8, 300, 256)})


def nonfinite(monkeypatch) -> None:
    features = torch.zeros(2, 5, 3)
    features[1, 4, 2] = torch.nan
    ReliabilityFusion({"audio": 3}, dim=4)({"audio": features}, strict=True)


def not_causal(monkeypatch) -> None:
    SAGE({"audio": 8, "visual": 8}, dim=8, causal=False).stream()


def no_fusion(monkeypatch) -> None:
    calibrate(torch.nn.Linear(2, 2), [torch.randn(1, 2)], [torch.randn(1, 2)])


def missing_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    extras.require("safetensors", "train")


def table(text: str, *arguments: str) -> Callable:
    def run(monkeypatch) -> None:
        Path("table.csv").write_text(text)
        assert cli.main(["import", "table.csv", "--out", "DATA", *arguments]) == 2

    return run


def run_exists(monkeypatch) -> None:
    from sage_ext.data import write_dataset

    write_dataset("DATA", train=1, validation=1, test=1, frames=(60, 61))
    Path("RUN").mkdir()
    Path("RUN/config.json").write_text("{}")
    assert cli.main(["train", "--data", "DATA", "--run", "RUN"]) == 2


PROVOKED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "On a GPU it is slow, and warns": no_kernels,
    "A loss with a gradient penalty": second_derivative,
    "Modalities of different dtypes": dtypes,
    "Features of another size": size,
    "NaN in the features": nonfinite,
    "Streaming a model that looks ahead": not_causal,
    "Calibration finds nothing to calibrate": no_fusion,
    "A package is not there": missing_extra,
    "A table without times": table("video,voice_loudness,stress\na,1,2\n", "--targets", "stress"),
    "A table without targets": table("video,time,voice_loudness,stress\na,0,1,2\n"),
    "A cell that is no number": table("video,time,voice_loudness,stress\na,0,1,2\na,1,x,2\n", "--targets", "stress"),
    "No modality in the table": table("video,time,loudness,stress\na,0,1,2\na,1,1,2\n", "--targets", "stress"),
    "The run is there already": run_exists,
}


def explained() -> dict[str, str]:
    """Heading of each section of the page -> its message, on one line."""
    found = re.findall(r"^## (.*?)\n\n```text\n(.*?)\n```$", FAQ.read_text(), re.DOTALL | re.MULTILINE)
    return {heading: " ".join(message.split()) for heading, message in found}


def test_every_section_has_its_test():
    assert set(explained()) == set(PROVOKED) == set(re.findall(r"^## (.*)$", FAQ.read_text(), re.MULTILINE))


@pytest.mark.parametrize("heading", PROVOKED)
def test_the_message_is_said(heading, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            PROVOKED[heading](monkeypatch)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = capsys.readouterr().err
    assert " ".join(said.split()) == explained()[heading]
