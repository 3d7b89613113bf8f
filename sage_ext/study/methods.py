"""What can be compared: SAGE, SAGE without one of its parts, one modality alone, and every registered fusion.

A comparison has two halves. By its name alone a method runs without quality evidence, and as `NAME+q` with it: a fusion that
has a reliability gets it there, any other as further input features. Methods are compared within a half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..models import FUSIONS

REFERENCE = "sage"  # the method that the others of its half are compared with
WITH_QUALITY = "+q"  # ends the names of the half of a comparison in which everybody has quality evidence
HALVES = {"": "without quality", WITH_QUALITY: "with quality"}
# What fusion could reach if the true noise were known (synthetic data only): the first two are no methods, nothing is trained.
ORACLE, CAUSAL, TOLD = "oracle", "oracle-causal", "sage-told"
UNTRAINED = {CAUSAL: "causal filter (true noise known)", ORACLE: "oracle (true noise known, both directions)"}
CEILINGS = (TOLD, *UNTRAINED)
REFERENCES = tuple(REFERENCE + suffix for suffix in HALVES)
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
        Method("sage-no-calibration", "SAGE, no calibration loss",
               {"reliability_weight": 0.0, "fusion_options": {"detach_weights": False}},
               "the weights learn from the prediction alone"),
        Method("sage-undetached", "SAGE, undetached evidence", {"fusion_options": {"detach_evidence": False}},
               "the reliability path also shapes the encoders"),
        Method("sage-no-filter", "SAGE, no stage filter", {"fusion_options": {"filter_stages": False}},
               "each frame's stage from its own evidence"),
        Method("sage-no-mask", "SAGE, no presence mask", {"use_present": False},
               "missing inputs are the mean frame, and look present"),
        Method("sage-no-norm", "SAGE, no norm", {"fusion_options": {"norm": False}}),
        Method("sage-no-memory", "SAGE, no memory", {"memory": ()}),
        Method("sage-no-joint", "SAGE, no joint expert", {"joint": False}),
        Method("sage-no-stuck", "SAGE, stuck frames present", {"stuck": 0}),
        Method("can-plus", "CAN attention, SAGE's memory and stuck rule",
               {"fusion": "can", "peer_memory": True},
               "what is left of SAGE's lead is its reliability's"),
        Method(TOLD, "SAGE, told the true noise", {"told": True, "quality": True},
               "its quality is each frame's true log noise variance"),
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
    plain, known = name.removesuffix(WITH_QUALITY), methods()
    found = known.get(plain)
    if found is None:
        found = Method(plain, plain.replace("-", " "), {"modalities": (plain.removesuffix(ALONE),)})
    evidence = half(name) == WITH_QUALITY
    said = f"{found.title}, {HALVES[WITH_QUALITY]}" if evidence else found.title
    return replace(found, name=name, title=said, overrides={"quality": evidence, **found.overrides})


def half(name: str) -> str:
    """The half of the comparison that a method is in, one of `HALVES`."""
    return WITH_QUALITY if name.endswith(WITH_QUALITY) else ""


def title(name: str) -> str:
    """Of a method or a ceiling, for tables and pictures."""
    return UNTRAINED[name] if name in UNTRAINED else find(name).title


def default_methods(modalities: Sequence[str], *, quality: bool = False, truth: bool = False) -> tuple[str, ...]:
    """All there are for data with these modalities. `quality`: the data have quality evidence; `truth`: the true noise is
    known."""
    left = unfit(modalities)
    plain = (*(m for m in methods() if m not in left and (truth or m != TOLD)), *single_methods(modalities))
    return expanded(plain, None, quality)


def expanded(names: Sequence[str], wanted: str | None, quality: bool) -> tuple[str, ...]:
    """`names` as they are called in the halves that are `wanted` ("both", "with" quality evidence, "without"; None: both
    where the data have it), one half after the other. What is named for a half already stays, and so does what is told
    the true noise."""
    choices = {"both": tuple(HALVES), "with": (WITH_QUALITY,), "without": ("",)}
    if wanted is None:
        wanted = "both" if quality else "without"
    if wanted not in choices or (wanted != "without" and not quality):
        allowed = "both, with or without" if quality else "without (the data have none)"
        raise ValueError(f"quality: expected {allowed}, got {wanted}")
    found = [name if name == TOLD or half(name) else name + suffix for suffix in choices[wanted] for name in names]
    return tuple(dict.fromkeys(found))


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
