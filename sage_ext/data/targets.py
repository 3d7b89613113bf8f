"""What is estimated: names and ranges of the targets. Inside, every target is on [-1, 1]; outside, in its own units."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

_COLUMN = re.compile(r"(?P<name>.*?)\s*\[(?P<low>[^\[\]:]+):(?P<high>[^\[\]:]+)\]")
_SCORES = {"valence": "CCC_V", "arousal": "CCC_A"}  # the challenge's names
MAX_TARGETS = 64
_TAKEN = ("video", "frame", "time")  # the first columns of a table of predictions


class Target(NamedTuple):
    """A column of the annotations."""

    name: str
    low: float = -1.0  # the ends of its range, in its own units
    high: float = 1.0

    @property
    def score(self) -> str:
        """The name of its concordance in tables and files: CCC_V, CCC_A, else CCC_<name>."""
        return _SCORES.get(self.name, f"CCC_{self.name}")

    @property
    def digits(self) -> int:
        """Decimals that a value in its own units is written with: six for a range of 2, more or fewer as it is narrower or
        wider."""
        return max(0, 6 - math.floor(math.log10((self.high - self.low) / 2)))

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """From its own units to [-1, 1]."""
        if (self.low, self.high) == (-1.0, 1.0):
            return values
        return (values - (self.low + self.high) / 2) * (2 / (self.high - self.low))

    def unscaled(self, values: Any) -> Any:
        """From [-1, 1] to its own units: of an array, or of a number."""
        if (self.low, self.high) == (-1.0, 1.0):
            return values
        return values * ((self.high - self.low) / 2) + (self.low + self.high) / 2


Targets = tuple[Target, ...]
VALENCE_AROUSAL: Targets = (Target("valence"), Target("arousal"))


def make_targets(pairs: Iterable[tuple[str, Any]], where: str) -> Targets:
    """(name, [low, high]) of each -> targets. ValueError, which begins with `where`, for what cannot be."""
    found: list[Target] = []
    for name, ends in pairs:
        shown = f"{where}: {name!r:.60}"
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or set(name) & set(",[]\"'"):
            raise ValueError(f"{shown}: expected the name of a target, without commas, quotes and brackets")
        if len(name) > 100 or name.strip() in _TAKEN:
            raise ValueError(f"{shown}: expected a name of at most 100 characters that is not {', '.join(_TAKEN)}")
        if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2 or not all(map(_number, ends)):
            raise ValueError(f"{shown}: expected its range, two numbers [low, high], got {ends!r:.60}")
        low, high = float(ends[0]), float(ends[1])
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f"{shown}: expected low < high, got [{low:g}, {high:g}]")
        found.append(Target(name.strip(), low, high))
    names = [target.name for target in found]
    if len({target.score for target in found}) < len(set(names)):
        raise ValueError(
            f"{where}: expected names whose scores differ (V and A are short for valence and arousal), got {names}"
        )
    if not 1 <= len(found) <= MAX_TARGETS or len(set(names)) != len(names):
        raise ValueError(
            f"{where}: expected 1 to {MAX_TARGETS} targets of different names, got {', '.join(names)!r:.100}"
        )
    return tuple(found)


def _number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1e300  # an integer of thousands of digits compares, but is no float


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text  # an empty name is none either
    return True


def header_columns(header: str) -> list[tuple[str, tuple[str, str] | None]]:
    """Of an annotation's header: each column's name, and the two ends where it says `[low:high]` behind it."""
    found: list[tuple[str, tuple[str, str] | None]] = []
    for column in header.split(","):
        match = _COLUMN.fullmatch(column.strip())
        found.append((column.strip(), None) if match is None else (match["name"], (match["low"], match["high"])))
    return found


def header_range(ends: tuple[str, str] | None) -> Any:
    """(low, high) of what `header_columns` gives, (-1, 1) for None; what is no number stays text."""
    if ends is None:
        return (-1.0, 1.0)
    try:
        return (float(ends[0]), float(ends[1]))
    except ValueError:
        return f"[{ends[0]}:{ends[1]}]"


def header_targets(header: str, where: str) -> Targets:
    """All columns of a header as targets."""
    columns = header_columns(header)
    if all(_is_number(name) for name, _ in columns):
        raise ValueError(f"{where} numbers: {header!r:.60}")
    return make_targets(((name, header_range(ends)) for name, ends in columns), f"{where} {header!r:.60}")


def scaled(values: np.ndarray, targets: Targets) -> np.ndarray:
    """(T, C) in the targets' own units -> float64 on [-1, 1]."""
    return np.stack([target.scaled(values[..., c]) for c, target in enumerate(targets)], -1)


def unscaled(values: np.ndarray, targets: Targets) -> np.ndarray:
    """(..., C) on [-1, 1] -> in the targets' own units."""
    return np.stack([target.unscaled(values[..., c]) for c, target in enumerate(targets)], -1)


def described(targets: Targets) -> str:
    """For people: "stress [0, 100], valence [-1, 1]"."""
    return ", ".join(f"{target.name} [{target.low:g}, {target.high:g}]" for target in targets)


def scores(concordances: Sequence[float], targets: Targets) -> dict[str, float]:
    """{"CCC_V", "CCC_A", "P"}, or {"CCC_<name>" ..., "P"}: one a target, and P, their mean."""
    values = [float(value) for value in concordances]
    return {**{t.score: value for t, value in zip(targets, values)}, "P": sum(values) / len(values)}
