"""What can be compared: SAGE, SAGE without one of its parts, one modality alone, and every registered fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models import FUSIONS

REFERENCE = "sage"  # the method that the others are compared with
ORACLE = "oracle"  # no method: what fusion could reach if the true noise were known (synthetic data only)
QUICK = ("sage", "concat", "uniform")  # and every single modality
ALONE = "-only"  # "audio-only": the same model with that one input


@dataclass(frozen=True)
class Method:
    """A method of the comparison: a name, and what it changes in a `TrainConfig`."""

    name: str
    title: str  # for tables and pictures
    overrides: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainConfig
    note: str = ""


VARIANTS = {
    method.name: method
    for method in (
        Method(REFERENCE, "SAGE"),
        Method("uniform", "SAGE, uniform weights", {"fusion": "uniform"},
               "SAGE's values, memory and stuck rule, equal weights"),
        Method("sage-one-stage", "SAGE, one stage", {"stages": 1}),
        Method("sage-no-calibration", "SAGE, no calibration loss", {"reliability_weight": 0.0},
               "the weights learn from the prediction alone"),
        Method("sage-undetached", "SAGE, undetached evidence", {"fusion_options": {"detach_evidence": False}},
               "the reliability path also shapes the encoders"),
        Method("sage-no-filter", "SAGE, no stage filter", {"fusion_options": {"filter_stages": False}},
               "each frame's stage from its own evidence"),
        Method("sage-no-mask", "SAGE, no presence mask", {"use_present": False},
               "missing inputs are the mean frame, and look present"),
        Method("sage-no-norm", "SAGE, no norm", {"fusion_options": {"norm": False}}),
        Method("sage-no-memory", "SAGE, no memory", {"memory": ()}),
        Method("sage-no-stuck", "SAGE, stuck frames present", {"stuck": 0}),
        Method("can-plus", "CAN attention, SAGE's memory and stuck rule",
               {"fusion": "can", "peer_memory": True},
               "what is left of SAGE's lead is its reliability's"),
    )
}  # fmt: skip


def methods() -> dict[str, Method]:
    """All methods that are not a single modality, by name: `VARIANTS`, then the fusions registered by now.

    ValueError where a fusion was registered under the name of a variant.
    """
    taken = [name for name in FUSIONS if name in VARIANTS]
    if taken:
        raise ValueError(f"name: expected a fusion to have one that no method of the study has, got {', '.join(taken)}")
    peers = {name: Method(name, peer.title, {"fusion": name}, peer.note) for name, peer in FUSIONS.items()}
    return {**VARIANTS, **peers}


def find(name: str) -> Method:
    """The method behind a name of `default_methods`."""
    if name in (known := methods()):
        return known[name]
    return Method(name, name.replace("-", " "), {"modalities": (name.removesuffix(ALONE),)})


def title(name: str) -> str:
    """Of a method or the oracle, for tables and pictures."""
    return "oracle (true noise known)" if name == ORACLE else find(name).title


def default_methods(modalities: Sequence[str]) -> tuple[str, ...]:
    """All there are for data with these modalities."""
    left = unfit(modalities)
    return (*(name for name in methods() if name not in left), *single_methods(modalities))


def unfit(modalities: Sequence[str]) -> tuple[str, ...]:
    """The methods that these modalities leave out: defined for two of them."""
    if len(modalities) == 2:
        return ()
    return tuple(method.name for method in methods().values() if _pairwise(method.overrides.get("fusion")))


def quick_methods(modalities: Sequence[str]) -> tuple[str, ...]:
    """The few that tell most."""
    return (*QUICK, *single_methods(modalities))


def single_methods(modalities: Sequence[str]) -> tuple[str, ...]:
    """Each modality alone."""
    return tuple(f"{name}{ALONE}" for name in modalities)


def _pairwise(fusion: str | None) -> bool:
    return fusion in FUSIONS and FUSIONS[fusion].pairwise
