"""Frames of features from bytes that come in pieces: JSON lines, or raw float32."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

FORMATS = ("jsonl", "f32")
ECHOED = ("frame", "t")
QUALITY = "quality"
ECHO_LIMIT = 200  # characters
Block = bytes | None  # None: the input begins anew, what is pending of it will not be completed


class MalformedFrame(ValueError):
    """A record that is not a frame. `kind`: in a few words, for counting; the message: what was expected, what came."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Frame:
    """One frame: `features`, M arrays (1, D_m) float32; `present` (1, M) bool; `echo`, what the answer repeats; `quality`, by
    name (1, Q_m) float32, NaN where unknown."""

    features: list[np.ndarray]
    present: np.ndarray
    echo: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, np.ndarray] = field(default_factory=dict)


class Format(Protocol):
    """How records are cut out of a stream of bytes, and read."""

    unit: str

    def records(self, blocks: Iterable[Block]) -> Iterator[bytes | MalformedFrame]: ...

    def read(self, record: bytes) -> Frame | None: ...  # None: nothing there; raises MalformedFrame


def make_format(
    name: str, names: Sequence[str], dims: Sequence[int], quality_dims: Mapping[str, int] | None = None
) -> Format:
    return JsonLines(names, dims, quality_dims) if name == "jsonl" else RawFloats(dims)


class JsonLines:
    """An object a line: {"audio": [...], "visual": [...] or null or left out, "frame": ..., "t": ...}; blank lines skipped.

    NaN and Infinity, as Python writes them, are taken: the session counts that modality as absent. "quality": {"visual": [...]}
    is the quality evidence of modalities that have it, null or left out, whole or a number of it, where it is unknown.
    """

    unit = "line"

    def __init__(
        self, names: Sequence[str], dims: Sequence[int], quality_dims: Mapping[str, int] | None = None
    ) -> None:
        self.names, self.dims = tuple(names), tuple(dims)
        self.quality_dims = {name: q for name, q in (quality_dims or {}).items() if q}
        self.limit = max(1 << 16, 64 * sum(dims))  # bytes of a line: 64 a number, which is some three times the need
        self.echoed = tuple(key for key in ECHOED if key not in self.names)
        self.takes_quality = QUALITY not in self.names
        self.known = {*self.names, *self.echoed, *([QUALITY] if self.takes_quality else [])}
        self.missing = [np.zeros((1, dim), np.float32) for dim in dims]

    def records(self, blocks: Iterable[Block]) -> Iterator[bytes | MalformedFrame]:
        pending, skipping = bytearray(), False  # skipping: the rest of a line that is too long
        for block in blocks:
            if block is None:
                pending.clear()
                skipping = False
                continue
            start = 0
            while (end := block.find(b"\n", start)) >= 0:
                if not skipping:
                    line = bytes(pending + block[start:end]) if pending else block[start:end]
                    yield line if len(line) <= self.limit else self._too_long()
                pending.clear()
                skipping, start = False, end + 1
            if not skipping:
                pending += block[start:]
                if len(pending) > self.limit:
                    yield self._too_long()
                    pending.clear()
                    skipping = True
        if pending:
            yield bytes(pending)

    def _too_long(self) -> MalformedFrame:
        return MalformedFrame("too long", f"expected at most {self.limit:,} bytes, got more; skipped to the line's end")

    def read(self, record: bytes) -> Frame | None:
        try:
            text = record.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            got = f"the byte {error.object[error.start]:#04x} at byte {error.start + 1}"
            raise MalformedFrame("not UTF-8", f"expected text in UTF-8, got {got}") from None
        if not text.strip():
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise MalformedFrame("not JSON", f"expected a JSON object, got {_shown(text)} ({what})") from None
        if not isinstance(value, dict):
            raise MalformedFrame("not an object", f"expected a JSON object, got {_kind(value)}: {_shown(text)}")
        if not self.known.issuperset(value):
            wrong = next(key for key in value if key not in self.known)
            raise MalformedFrame(
                "unknown key", f"expected the modalities {', '.join(self.names)}, got the key {_shown(wrong)}"
            )
        features, present = list(self.missing), np.zeros((1, len(self.names)), bool)
        for m, (name, dim) in enumerate(zip(self.names, self.dims)):
            given = value.get(name)
            if given is not None:
                features[m], present[0, m] = _numbers(name, dim, given), True
        echo = {key: _echo(key, value[key]) for key in self.echoed if key in value}
        return Frame(features, present, echo, self._quality(value.get(QUALITY)) if self.takes_quality else {})

    def _quality(self, given: Any) -> dict[str, np.ndarray]:
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise MalformedFrame("quality no object", f"quality: expected an object of lists, got {_kind(given)}")
        if not set(self.quality_dims).issuperset(given):
            wrong = next(key for key in given if key not in self.quality_dims)
            expected = f"that of {', '.join(self.quality_dims)}" if self.quality_dims else "none (the model reads none)"
            raise MalformedFrame("unknown quality", f"quality: expected {expected}, got the key {_shown(wrong)}")
        found = {}
        for name, numbers in given.items():
            if isinstance(numbers, list):
                numbers = [math.nan if x is None else x for x in numbers]
            if numbers is not None:
                found[name] = _numbers(f"quality of {name}", self.quality_dims[name], numbers)
        return found


def _numbers(name: str, dim: int, given: Any) -> np.ndarray:
    """(1, dim) float32. A list of Python floats and ints only: NumPy would take strings and booleans too."""
    if not isinstance(given, list):
        raise MalformedFrame(f"{name} no list", f"{name}: expected a list of {dim} numbers, got {_kind(given)}")
    if len(given) != dim:
        raise MalformedFrame(f"{name} of wrong length", f"{name}: expected {dim} numbers, got {len(given)}")
    if not {int, float}.issuperset(map(type, given)):
        at = next(i for i, x in enumerate(given) if type(x) not in (int, float))
        raise MalformedFrame(
            f"{name} not numbers", f"{name}: expected numbers, got {_kind(given[at])} at place {at + 1} of {dim}"
        )
    try:
        with np.errstate(over="ignore"):  # beyond float32: infinite, and so absent
            return np.array(given, np.float64).astype(np.float32)[None]
    except OverflowError:
        raise MalformedFrame(f"{name} not numbers", f"{name}: a whole number is too large for a float") from None


def _echo(key: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        if not isinstance(value, int) or abs(value) < 1 << 63:
            return value
    elif isinstance(value, str) and len(value) <= ECHO_LIMIT:
        return value
    got = _kind(value) if isinstance(value, (dict, list)) else _shown(json.dumps(value))  # of a list or object: no walk
    raise MalformedFrame(f"bad {key}", f"{key}: expected a number or at most {ECHO_LIMIT} characters, got {got}")


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}[type(value)]


def _shown(text: str) -> str:
    """Of a stranger's text, little, and no control characters."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


class RawFloats:
    """sum(dims) little-endian float32 a frame, the modalities in the model's order; NaN: missing. Quality is unknown."""

    unit = "frame"

    def __init__(self, dims: Sequence[int]) -> None:
        self.size = 4 * sum(dims)
        ends = np.cumsum(dims).tolist()
        self.spans = [slice(end - dim, end) for dim, end in zip(dims, ends)]
        self.present = np.ones((1, len(dims)), bool)

    def records(self, blocks: Iterable[Block]) -> Iterator[bytes | MalformedFrame]:
        pending = bytearray()
        for block in blocks:
            if block is None:
                pending.clear()
                continue
            pending += block
            whole = len(pending) - len(pending) % self.size
            for start in range(0, whole, self.size):
                yield bytes(pending[start : start + self.size])
            del pending[:whole]
        if pending:
            yield MalformedFrame(
                "incomplete",
                f"expected {self.size} bytes ({self.size // 4} float32), the input ends after {len(pending)}",
            )

    def read(self, record: bytes) -> Frame | None:
        values = np.frombuffer(record, "<f4").astype(np.float32)[None]
        return Frame([values[:, span] for span in self.spans], self.present)
