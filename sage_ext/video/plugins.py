"""What users bring in place of the features that are made here: networks as ONNX files, and functions of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require


def short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def open_network(argument: str, expected: str, path: str | Path) -> Any:
    """An ONNX file on one core, by onnxruntime. ValueError that names the argument and what was expected."""
    runtime: Any = require("onnxruntime", "video")
    if not Path(path).is_file():
        raise ValueError(f"{argument}: expected {expected}, got {str(path)!r}, which is no file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no common base
        raise ValueError(f"{argument}: expected {expected}, got {str(path)!r}: {short(error)}") from None


class Network:
    """A network of one float input, whose first output, flattened, describes it.

    `shape`: that of the input, for people; `fits`: whether the sizes that a file fixes (None: it leaves one open) can be it.
    `sizes`: those sizes.
    """

    def __init__(self, path: str | Path, shape: str, fits: Callable[[Sequence[int | None]], bool]) -> None:
        self._session = open_network("spec", "onnx:FILE with an ONNX network", path)
        inputs = self._session.get_inputs()
        given = list(inputs[0].shape) if len(inputs) == 1 else []
        self.sizes = [size if isinstance(size, int) else None for size in given]
        if not fits(self.sizes) or inputs[0].type != "tensor(float)":
            came = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs) or "none"
            raise ValueError(f"spec: expected a network with one float input of shape {shape}, got {path}: {came}")
        self._input, self._output = inputs[0].name, self._session.get_outputs()[0].name

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(D,) of a float32 array of the input's shape."""
        try:
            return np.asarray(self._session.run([self._output], {self._input: given})[0]).reshape(-1)
        except Exception as error:
            raise ValueError(
                f"spec: expected a network that takes an input of shape {given.shape}, got an error: {short(error)}"
            ) from None


def function_of(spec: str) -> Callable[..., Any]:
    """The function that "module:function" names. ValueError where there is none."""
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another
        raise ValueError(
            f"spec: expected module:function with a module that can be imported, got {spec!r}: no module {error.name}"
        ) from None
    function: Any = getattr(module, name, None)
    if not callable(function):
        came = f"{module_name} has no {name}" if function is None else f"{name} is {type(function).__name__}"
        raise ValueError(f"spec: expected module:function with a function in it, got {spec!r}: {came}")
    return function


def names_a_function(kind: str, rest: str) -> bool:
    """Whether "kind:rest" is of the form module:function."""
    return bool(rest) and all(part.isidentifier() for part in (*kind.split("."), rest))
