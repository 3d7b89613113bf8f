"""The names that `SAGE(fusion=...)` takes. `SAGE` looks its fusion up here; peers.py, and a user's peers, add theirs."""

from __future__ import annotations

from ..nn import Fusion, ReliabilityFusion, UniformFusion

OURS: dict[str, type[Fusion]] = {"reliability": ReliabilityFusion, "uniform": UniformFusion}
FUSIONS: dict[str, type[Fusion]] = {}  # the peers, filled by `peers.register`


def fusion_names() -> tuple[str, ...]:
    """All that `SAGE(fusion=...)` takes."""
    return (*OURS, *FUSIONS)


def fusion_class(name: str) -> type[Fusion]:
    """The module behind a name of `fusion_names`. ValueError, with those names, for any other."""
    if not isinstance(name, str) or name not in fusion_names():
        raise ValueError(f"fusion: expected one of {', '.join(fusion_names())}, got {name!r}")
    return FUSIONS[name] if name in FUSIONS else OURS[name]
