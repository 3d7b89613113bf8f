"""Bad input to every op: the type of the error, what its message names, and that nothing ran or changed before it."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Random, filter_inputs, fusion_inputs, moments_inputs, pair_inputs

from sage_ext import functional
from sage_ext._ops import _door

GOOD = {
    "stage_filter": lambda r: filter_inputs(r, 2, 5, 3),
    "reliability_fusion": lambda r: fusion_inputs(r, (2, 5), 2, 6, 3),
    "ccc": lambda r: pair_inputs(r, 2, 5, 3, mask="frame"),
    "ccc_moments": lambda r: {**pair_inputs(r, 2, 5, 3, mask="frame"), "state": moments_inputs(r, 3)},
    "merge_moments": lambda r: {"a": moments_inputs(r, 3), "b": moments_inputs(r, 3)},
    "ccc_from_moments": lambda r: {"moments": moments_inputs(r, 3)},
    "temporal_ccc": lambda r: pair_inputs(r, 2, 5, 3, mask="frame"),
}
F, D, I, B = torch.float32, torch.float64, torch.int64, torch.bool
META = "meta"


def zeros(*shape, dtype=F, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


class Values:
    """Replaces some of the fusion's values: `Values({1: x})`, or all of them: `Values([x, y])`."""

    def __init__(self, new):
        self.new = new


# op, the change to good arguments, the error, and what its message must say: the argument's name, what was expected, what came
CASES = [
    # -- stage_filter
    ("stage_filter", {"emission": [1.0]}, TypeError, ["emission", "torch.Tensor", "list"]),
    ("stage_filter", {"emission": zeros(2, 5, 3, dtype=I)}, TypeError, ["emission", "float32", "torch.int64"]),
    ("stage_filter", {"emission": zeros(2, 5, 3, dtype=torch.complex64)}, TypeError, ["emission", "complex64"]),
    ("stage_filter", {"emission": zeros(5, 3)}, ValueError, ["emission", "(B, T, S)", "(5, 3)"]),
    ("stage_filter", {"emission": zeros(2, 5, 0)}, ValueError, ["emission", "1 to 16", "0"]),
    ("stage_filter", {"emission": zeros(2, 5, 17)}, ValueError, ["emission", "1 to 16", "17"]),
    ("stage_filter", {"transition": None}, TypeError, ["transition", "torch.Tensor", "NoneType"]),
    ("stage_filter", {"transition": zeros(3, 3, dtype=I)}, TypeError, ["transition", "torch.int64"]),
    ("stage_filter", {"transition": zeros(3, 4)}, ValueError, ["transition", "(S, S)", "(3, 3)", "(3, 4)"]),
    ("stage_filter", {"transition": zeros(3, 3, device=META)}, ValueError, ["transition", "device", "meta"]),
    ("stage_filter", {"initial": 0.5}, TypeError, ["initial", "torch.Tensor", "float"]),
    ("stage_filter", {"initial": zeros(3, dtype=B)}, TypeError, ["initial", "torch.bool"]),
    ("stage_filter", {"initial": zeros(1, 3)}, ValueError, ["initial", "(S,)", "(B, S)", "(2, 3)", "(1, 3)"]),
    ("stage_filter", {"initial": zeros(4)}, ValueError, ["initial", "(3,)", "(4,)"]),
    ("stage_filter", {"initial": zeros(3, device=META)}, ValueError, ["initial", "device", "meta"]),
    ("stage_filter", {"mask": zeros(2, 5)}, TypeError, ["mask", "bool", "torch.float32"]),
    ("stage_filter", {"mask": zeros(2, 5, dtype=torch.uint8)}, TypeError, ["mask", "bool", "torch.uint8"]),
    ("stage_filter", {"mask": zeros(2, 4, dtype=B)}, ValueError, ["mask", "(B, T)", "(2, 5)", "(2, 4)"]),
    ("stage_filter", {"mask": zeros(2, 5, dtype=B, device=META)}, ValueError, ["mask", "device", "meta"]),
    # -- reliability_fusion
    ("reliability_fusion", {"values": zeros(2, 2, 5, 6)}, TypeError, ["values", "sequence", "Tensor"]),
    ("reliability_fusion", {"values": None}, TypeError, ["values", "sequence", "NoneType"]),
    ("reliability_fusion", {"values": []}, ValueError, ["values", "1 to 8", "0"]),
    ("reliability_fusion", {"values": [zeros(2, 5, 6)] * 9}, ValueError, ["values", "1 to 8", "9"]),
    ("reliability_fusion", {"values": Values({1: 3.0})}, TypeError, ["values[1]", "torch.Tensor", "float"]),
    ("reliability_fusion", {"values": Values({0: zeros(2, 5, 6, dtype=I)})}, TypeError, ["values[0]", "torch.int64"]),
    (
        "reliability_fusion",
        {"values": Values({1: zeros(2, 5, 6, dtype=D)})},
        TypeError,
        ["values[1]", "float32", "float64"],
    ),
    (
        "reliability_fusion",
        {"values": Values({1: zeros(2, 5, 7)})},
        ValueError,
        ["values[1]", "(2, 5, 6)", "(2, 5, 7)"],
    ),
    (
        "reliability_fusion",
        {"values": Values({1: zeros(2, 5, 6, device=META)})},
        ValueError,
        ["values[1]", "device", "meta"],
    ),
    ("reliability_fusion", {"values": [zeros(), zeros()]}, ValueError, ["values[0]", "(*, D)"]),
    ("reliability_fusion", {"reliability": None}, TypeError, ["reliability", "torch.Tensor", "NoneType"]),
    ("reliability_fusion", {"reliability": zeros(2, 5, 2, 3, dtype=I)}, TypeError, ["reliability", "torch.int64"]),
    ("reliability_fusion", {"reliability": zeros(2, 5, 3)}, ValueError, ["reliability", "(*, M, S)", "(2, 5, 3)"]),
    (
        "reliability_fusion",
        {"reliability": zeros(2, 5, 3, 3)},
        ValueError,
        ["reliability", "(*, M, S)", "(2, 5, 3, 3)"],
    ),
    ("reliability_fusion", {"reliability": zeros(2, 5, 2, 0)}, ValueError, ["reliability", "1 to 16", "0"]),
    ("reliability_fusion", {"reliability": zeros(2, 5, 2, 17)}, ValueError, ["reliability", "1 to 16", "17"]),
    (
        "reliability_fusion",
        {"reliability": zeros(2, 5, 2, 3, device=META)},
        ValueError,
        ["reliability", "device", "meta"],
    ),
    ("reliability_fusion", {"stage": zeros(2, 5, 4)}, ValueError, ["stage", "(*, S)", "(2, 5, 3)", "(2, 5, 4)"]),
    ("reliability_fusion", {"stage": zeros(5, 3)}, ValueError, ["stage", "(*, S)", "(5, 3)"]),
    ("reliability_fusion", {"stage": zeros(2, 5, 3, dtype=I)}, TypeError, ["stage", "torch.int64"]),
    ("reliability_fusion", {"stage": zeros(2, 5, 3, device=META)}, ValueError, ["stage", "device", "meta"]),
    (
        "reliability_fusion",
        {"log_temperature": zeros(3, 2)},
        ValueError,
        ["log_temperature", "(M, S)", "(2, 3)", "(3, 2)"],
    ),
    ("reliability_fusion", {"log_temperature": 1.0}, TypeError, ["log_temperature", "torch.Tensor", "float"]),
    ("reliability_fusion", {"bias": zeros(3)}, ValueError, ["bias", "(M, S)", "(2, 3)", "(3,)"]),
    ("reliability_fusion", {"bias": zeros(2, 3, dtype=B)}, TypeError, ["bias", "torch.bool"]),
    ("reliability_fusion", {"sharpness": 1.0}, TypeError, ["sharpness", "torch.Tensor", "float"]),
    ("reliability_fusion", {"sharpness": zeros(1)}, ValueError, ["sharpness", "()", "(M,)", "(2,)", "(1,)"]),
    ("reliability_fusion", {"sharpness": zeros(2, device=META)}, ValueError, ["sharpness", "device", "meta"]),
    ("reliability_fusion", {"present": zeros(2, 5, 2)}, TypeError, ["present", "bool", "torch.float32"]),
    (
        "reliability_fusion",
        {"present": zeros(2, 5, 3, dtype=B)},
        ValueError,
        ["present", "(*, M)", "(2, 5, 2)", "(2, 5, 3)"],
    ),
    (
        "reliability_fusion",
        {"present": zeros(2, 5, 2, dtype=B, device=META)},
        ValueError,
        ["present", "device", "meta"],
    ),
    ("reliability_fusion", {"norm_weight": None}, ValueError, ["norm_weight", "norm_bias", "both", "None"]),
    ("reliability_fusion", {"norm_bias": None}, ValueError, ["norm_bias", "norm_weight", "both", "None"]),
    ("reliability_fusion", {"norm_weight": zeros(2, 5)}, ValueError, ["norm_weight", "(M, D)", "(2, 6)", "(2, 5)"]),
    ("reliability_fusion", {"norm_bias": zeros(6)}, ValueError, ["norm_bias", "(M, D)", "(2, 6)", "(6,)"]),
    ("reliability_fusion", {"norm_bias": zeros(2, 6, dtype=I)}, TypeError, ["norm_bias", "torch.int64"]),
    ("reliability_fusion", {"eps": -1e-5}, ValueError, ["eps", ">= 0", "-1e-05"]),
    ("reliability_fusion", {"eps": float("nan")}, ValueError, ["eps", ">= 0", "nan"]),
    ("reliability_fusion", {"eps": "small"}, TypeError, ["eps", "number", "str"]),
    ("reliability_fusion", {"eps": None}, TypeError, ["eps", "number", "NoneType"]),
    # -- ccc and ccc_moments
    *[
        (op, change, error, words)
        for op in ("ccc", "ccc_moments", "temporal_ccc")
        for change, error, words in [
            ({"pred": 1.0}, TypeError, ["pred", "torch.Tensor", "float"]),
            ({"pred": zeros(2, 5, 3, dtype=I)}, TypeError, ["pred", "torch.int64"]),
            ({"target": None}, TypeError, ["target", "torch.Tensor", "NoneType"]),
            ({"target": zeros(2, 5, 3, dtype=I)}, TypeError, ["target", "torch.int64"]),
            ({"pred": zeros(3)}, ValueError, ["pred", "(B, T, C)", "(3,)"]),
            ({"pred": zeros(2, 2, 5, 3)}, ValueError, ["pred", "(B, T, C)", "(2, 2, 5, 3)"]),
            ({"target": zeros(2, 5, 2)}, ValueError, ["target", "(2, 5, 3)", "(2, 5, 2)"]),
            ({"target": zeros(2, 5, 3, device=META)}, ValueError, ["target", "device", "meta"]),
            ({"mask": zeros(2, 5)}, TypeError, ["mask", "bool", "torch.float32"]),
            ({"mask": zeros(2, 6, dtype=B)}, ValueError, ["mask", "(2, 5)", "(2, 5, 3)", "(2, 6)"]),
            ({"mask": zeros(5, dtype=B)}, ValueError, ["mask", "(2, 5)", "(5,)"]),
            ({"mask": zeros(2, 5, 1, dtype=B)}, ValueError, ["mask", "(2, 5, 3)", "(2, 5, 1)"]),
            ({"mask": zeros(2, 5, dtype=B, device=META)}, ValueError, ["mask", "device", "meta"]),
        ]
    ],
    ("ccc", {"pool": "frame"}, ValueError, ["pool", "'batch'", "'sequence'", "'frame'"]),
    ("ccc", {"pool": None}, ValueError, ["pool", "'batch'", "'sequence'", "None"]),
    ("ccc_moments", {"pool": "mean"}, ValueError, ["pool", "'batch'", "'sequence'", "'mean'"]),
    ("ccc_moments", {"state": [0.0] * 6}, TypeError, ["state", "torch.Tensor", "list"]),
    ("ccc_moments", {"state": zeros(3, 6)}, TypeError, ["state", "float64", "float32"]),
    ("ccc_moments", {"state": zeros(2, 6, dtype=D)}, ValueError, ["state", "(3, 6)", "(2, 6)"]),
    ("ccc_moments", {"state": zeros(3, 5, dtype=D)}, ValueError, ["state", "(..., 6)", "(3, 5)"]),
    ("ccc_moments", {"state": zeros(3, 6, dtype=D, device=META)}, ValueError, ["state", "device", "meta"]),
    ("merge_moments", {"a": 0}, TypeError, ["a", "torch.Tensor", "int"]),
    ("merge_moments", {"a": zeros(3, 6)}, TypeError, ["a", "float64", "float32"]),
    ("merge_moments", {"b": zeros(3, 6)}, TypeError, ["b", "float64", "float32"]),
    ("merge_moments", {"a": zeros(3, 5, dtype=D)}, ValueError, ["a", "6", "(3, 5)"]),
    ("merge_moments", {"b": zeros(2, 6, dtype=D)}, ValueError, ["b", "(3, 6)", "(2, 6)"]),
    ("merge_moments", {"b": zeros(3, 6, dtype=D, device=META)}, ValueError, ["b", "device", "meta"]),
    ("ccc_from_moments", {"moments": None}, TypeError, ["moments", "torch.Tensor", "NoneType"]),
    ("ccc_from_moments", {"moments": zeros(3, 6)}, TypeError, ["moments", "float64", "float32"]),
    ("ccc_from_moments", {"moments": zeros(6, 3, dtype=D)}, ValueError, ["moments", "6", "(6, 3)"]),
    ("ccc_from_moments", {"moments": zeros(dtype=D)}, ValueError, ["moments", "6", "()"]),
    # -- temporal_ccc
    (
        "temporal_ccc",
        {"pred": zeros(5, 3), "target": zeros(5, 3), "mask": None},
        ValueError,
        ["pred", "(B, T, C)", "(5, 3)"],
    ),
    ("temporal_ccc", {"window": 1}, ValueError, ["window", ">= 2", "1"]),
    ("temporal_ccc", {"window": 0}, ValueError, ["window", ">= 2", "0"]),
    ("temporal_ccc", {"window": -3}, ValueError, ["window", ">= 2", "-3"]),
    ("temporal_ccc", {"window": 4.0}, TypeError, ["window", "int", "float"]),
    ("temporal_ccc", {"window": True}, TypeError, ["window", "int", "bool"]),
    ("temporal_ccc", {"window": torch.tensor(4)}, TypeError, ["window", "int", "Tensor"]),
    ("temporal_ccc", {"halflife": 0}, ValueError, ["halflife", "> 0", "0"]),
    ("temporal_ccc", {"halflife": -1.5}, ValueError, ["halflife", "> 0", "-1.5"]),
    ("temporal_ccc", {"halflife": float("nan")}, ValueError, ["halflife", "> 0", "nan"]),
    ("temporal_ccc", {"halflife": "10"}, TypeError, ["halflife", "number", "str"]),
    ("temporal_ccc", {"window": 4, "halflife": 2.0}, ValueError, ["window", "halflife", "at most one", "4", "2.0"]),
    ("temporal_ccc", {"state": [0.0]}, TypeError, ["state", "torch.Tensor", "list"]),
    ("temporal_ccc", {"state": zeros(2, 3, 8)}, TypeError, ["state", "float64", "float32"]),
    ("temporal_ccc", {"state": zeros(2, 2, 8, dtype=D)}, ValueError, ["state", "(2, 3, 8)", "(2, 2, 8)"]),
    ("temporal_ccc", {"state": zeros(2, 3, 8, dtype=D, device=META)}, ValueError, ["state", "device", "meta"]),
    ("temporal_ccc", {"state": zeros(2, 3, 4, 3, dtype=D)}, ValueError, ["state", "(2, 3, 8)", "(2, 3, 4, 3)"]),
    (
        "temporal_ccc",
        {"state": zeros(2, 3, 8, dtype=D), "window": 4},
        ValueError,
        ["state", "(B, C, L, 3)", "(2, 3, 8)"],
    ),
    (
        "temporal_ccc",
        {"state": zeros(2, 3, 4, 3, dtype=D), "window": 4},
        ValueError,
        ["state", "at most 3", "(2, 3, 4, 3)"],
    ),
    (
        "temporal_ccc",
        {"state": zeros(1, 3, 3, 3, dtype=D), "window": 4},
        ValueError,
        ["state", "(2, 3", "(1, 3, 3, 3)"],
    ),
]


def case_id(value):
    if isinstance(value, dict):
        return ",".join(value)
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("op", "change", "error", "words"), CASES, ids=case_id)
def test_message(backend, monkeypatch, op, change, error, words):
    """The error's type, that its message starts with the argument, and that it says what was expected and what came."""
    good = GOOD[op](Random(0, device=backend.device))
    bad = dict(good)
    for name, value in change.items():
        if isinstance(value, Values):
            value = [value.new.get(i, v) for i, v in enumerate(good["values"])]
        if isinstance(value, torch.Tensor) and value.device.type != META:
            value = value.to(backend.device)
        bad[name] = value
    if error is ValueError and "device" not in words:  # everything on one device, or that is what the error is about
        bad = {n: to_device(x, backend.device) for n, x in bad.items()}

    class Refuse:
        def __getattr__(self, kernel):
            raise AssertionError(f"{kernel} was reached")

    monkeypatch.setitem(_door.kernels, backend.device.type, Refuse())
    with pytest.raises(error) as caught:
        call(op, bad)
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.match(r"[\w\[\], ]+: ", message), message
    assert message.startswith(words[0]), message
    for word in words:
        assert word in message, message


def to_device(x, device):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return [to_device(v, device) for v in x] if isinstance(x, list) else x


def call(op, inputs):
    inputs = dict(inputs)
    if op == "reliability_fusion":
        return functional.reliability_fusion(
            inputs.pop("values"), inputs.pop("reliability"), inputs.pop("stage"), **inputs
        )
    return getattr(functional, op)(**inputs)


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(backend, op):
    """Else every test above could pass for the wrong reason."""
    call(op, GOOD[op](Random(0, device=backend.device)))


def test_an_error_says_which_device_was_expected(backend):
    good = GOOD["ccc"](Random(0, device=backend.device))
    with pytest.raises(
        ValueError, match=re.escape(f"target: expected device {backend.device} (that of pred), got meta")
    ):
        functional.ccc(good["pred"], good["target"].to("meta"))


def test_a_null_address_where_there_is_work_is_refused(cpu_only):
    """The boundary's own check, below Python's (house rule 4)."""
    kernels = _door.kernels["cpu"]
    x = torch.zeros(64, dtype=torch.float64)
    a = x.data_ptr()
    with pytest.raises(ValueError, match="emission"):
        kernels.stage_filter_forward(1, 1, 2, 2, 0, a, 0, 0, 0, a, 0, a, 1, 0)
    with pytest.raises(ValueError, match="pred"):
        kernels.ccc_forward(1, 1, 4, 1, 0, a, 0, 0, a, a, a, 1, 0)
    with pytest.raises(ValueError, match="mask"):
        kernels.ccc_forward(1, 1, 4, 1, a, a, 0, 1, a, a, a, 1, 0)
    with pytest.raises(ValueError, match="values"):
        kernels.reliability_fusion_forward(1, 1, 2, 1, (0,), (2,), a, 0, 0, 0, 0, 0, 0, 0, 1e-5, a, a, a, 0, 1, 0)
    with pytest.raises(ValueError, match="rho"):
        kernels.temporal_ccc_forward(1, 1, 4, 1, a, a, 0, 0, 0, 1.0, 0, 0, 0, 0, 0, a, a, 1, 0)
    with pytest.raises(ValueError, match="dtype code"):
        kernels.ccc_forward(7, 1, 4, 1, a, a, 0, 0, a, a, a, 1, 0)
