"""What several modules check about the arguments that a caller gave, and the few things they then do with them.

Errors speak one dialect, `NAME: expected X, got Y`: the argument, what would have been right, what came. TypeError is for a
wrong type or dtype, ValueError for a wrong shape, device or value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils import _pytree

from . import _C

Features = Mapping[str, Tensor] | Sequence[Tensor]  # a tensor a modality, by name or in order
QualityValues = Mapping[str, Tensor] | Sequence[Tensor | None]  # likewise, of the modalities that have any
Present = Tensor | Mapping[str, Tensor]  # which modalities are there: (*, M), or (*) by name

MAX_MODALITIES: int = _C.max_modalities
MAX_STAGES: int = _C.max_stages
MAX_MEMORY: int = _C.max_memory  # half-lives
CONSTANTS = _C.constants  # of the formulas in csrc/math and csrc/stream, by name

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DOUBLE = (torch.float64,)
BOOL = (torch.bool,)
HALVES = (torch.float16, torch.bfloat16)

# What casts a module to a dtype, for messages.
CASTS = {torch.float32: ".float()", torch.float64: ".double()", torch.float16: ".half()", torch.bfloat16: ".bfloat16()"}
# Of a frame: with a larger one the sum of its squares has overflowed float32 (kLargestSum of csrc/math/frame.h).
LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)

Class = TypeVar("Class", bound=type)


def storable(result: Class) -> Class:
    """For a named tuple that a module returns: `torch.export.save` and AOTInductor find it again by its name."""
    if hasattr(_pytree, "_register_namedtuple"):  # there is no public way
        _pytree._register_namedtuple(result, serialized_type_name=f"sage_ext.{result.__name__}")
    return result


# -------------------------------------------------------------------------------------------------------- numbers
def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """An int of at least `low`, and at most `high` if there is one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name}: expected an int {f'>= {low}' if high is None else f'in [{low}, {high}]'}, got {value}"
        )


def check_number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    """An int or float for which `fits` holds; `expected` says the same in words, as in "> 0"."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not fits(value):
        raise ValueError(f"{name}: expected a number {expected}, got {value}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_dropout(dropout: object) -> None:
    check_number("dropout", dropout, "in [0, 1)", lambda p: 0 <= p < 1)


def check_kappa(kappa: object) -> None:
    """The error scale of confidence."""
    check_number("kappa", kappa, "> 0 and finite", lambda k: 0 < k < math.inf)


def check_window(window: object, halflife: object) -> None:
    """What a running CCC looks back on: the last `window` frames, or all, weighted by `halflife`; not both."""
    if window is not None and halflife is not None:
        raise ValueError(f"window, halflife: expected at most one of the two, got {window} and {halflife}")
    if window is not None:
        check_int("window", window, 2)
    if halflife is not None:
        check_number("halflife", halflife, "> 0", lambda frames: frames > 0)


def check_pool(pool: object) -> None:
    """Over what a CCC is taken."""
    if pool not in ("batch", "sequence"):
        raise ValueError(f"pool: expected 'batch' or 'sequence', got {pool!r}")


# -------------------------------------------------------------------------------------------------------- tensors
def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        *others, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        raise TypeError(f"{name}: expected dtype {', '.join(others)}{' or ' if others else ''}{last}, got {x.dtype}")


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """`letters` says what the numbers of `expected` mean, as in "(B, T)"."""
    if x.shape != expected:
        raise ValueError(f"{name}: expected shape {letters} = {tuple(expected)}, got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of {like_name}), got {x.device}")


def check_optional(
    name: str,
    x: object,
    expected: tuple[int, ...],
    letters: str,
    like: Tensor,
    like_name: str,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """None, or a tensor of one of `dtypes`, of this shape, on the device of `like`."""
    if x is None:
        return
    check_tensor(name, x, dtypes)
    assert isinstance(x, Tensor)
    check_shape(name, x, expected, letters)
    check_device(name, x, like, like_name)


def read_flags(
    features: Sequence[Tensor], names: tuple[str, ...] | None, present: Present | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`present` (B, T, M) and `mask` (B, T), or (N, M) and (N,), of checked features, both checked; None: all True."""
    first, lead = features[0], tuple(features[0].shape[:-1])
    sizes = "B, T" if len(lead) == 2 else "N"
    each = "(B, T)" if len(lead) == 2 else "(N,)"
    flags = ordered_present(present, names, lead, each, first, "the features")
    check_optional("present", flags, (*lead, len(features)), f"({sizes}, M)", first, "the features", BOOL)
    check_optional("mask", mask, lead, each, first, "the features", BOOL)
    return flags, mask


def ordered_present(
    present: Present | None,
    names: tuple[str, ...] | None,
    lead: tuple[int, ...],
    letters: str,
    like: Tensor,
    like_name: str,
) -> Tensor | None:
    """A mapping name -> (*) bool as the tensor (*, M) in the order of `names`, checked; whatever else is given back as it
    is. Every modality has to be named: one that is left out could be meant as missing, or as present."""
    if not isinstance(present, Mapping):
        return present
    if names is None:
        raise TypeError("present: expected a tensor (the modalities have no names), got a mapping")
    if set(present) != set(names):
        raise ValueError(f"present: expected the modalities {list(names)}, got {list(present)}")
    flags = [present[name] for name in names]
    for name, x in zip(names, flags):
        check_tensor(f"present[{name}]", x, BOOL)
        check_optional(f"present[{name}]", x, lead, letters, like, like_name, BOOL)
    return torch.stack(flags, -1)


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """What numbers are computed in: float64 if one of the tensors is, float32 for all else."""
    for x in tensors:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


@overload
def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def to_dtype(x: None, dtype: torch.dtype) -> None: ...
@overload
def to_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def to_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


# ----------------------------------------------------------------------------------------- features a modality
def named_dims(in_dims: Mapping[str, int] | Sequence[int]) -> tuple[tuple[str, ...] | None, list[int]]:
    """A constructor's `in_dims` -> (names or None, sizes), checked."""
    if isinstance(in_dims, Mapping):
        names, sizes = tuple(in_dims), list(in_dims.values())
    elif isinstance(in_dims, Sequence) and not isinstance(in_dims, str):
        names, sizes = None, list(in_dims)
    else:
        raise TypeError(f"in_dims: expected a sequence of int or a mapping name -> int, got {type(in_dims).__name__}")
    if names is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"in_dims: expected names of modalities that are str, got {names}")
    if not 1 <= len(sizes) <= MAX_MODALITIES:
        raise ValueError(f"in_dims: expected 1 to {MAX_MODALITIES} modalities, got {len(sizes)}")
    for size in sizes:
        check_int("in_dims", size, 1)
    return names, sizes


def ordered_features(
    features: Features,
    names: tuple[str, ...] | None,
    dims: Sequence[int | None],
    what: str = "features",
    weights: torch.dtype | None = None,
) -> list[Tensor]:
    """The caller's features in modality order, checked: floating, one dtype and device, (B, T, d) or (N, d).

    dims: the size of each modality's features; None: any. weights: the dtype of the weights that they meet, which is theirs
    too unless autocast casts both; None: any.
    """
    if isinstance(features, Mapping):
        if names is None:
            raise TypeError(f"{what}: expected a sequence (in_dims was one, without names), got a mapping")
        if set(features) != set(names):
            raise ValueError(f"{what}: expected the modalities {list(names)}, got {list(features)}")
        tensors = [features[name] for name in names]
    elif isinstance(features, Sequence):
        tensors = list(features)
    else:
        raise TypeError(f"{what}: expected a sequence or a mapping of tensors, got {type(features).__name__}")
    if len(tensors) != len(dims):
        raise ValueError(f"{what}: expected {len(dims)} modalities, got {len(tensors)}")
    labels = [f"{what}[{label}]" for label in names or range(len(dims))]
    first = tensors[0]
    for label, dim, x in zip(labels, dims, tensors):
        check_tensor(label, x)
        if x.dim() not in (2, 3) or (dim is not None and x.shape[-1] != dim):
            size = "d" if dim is None else dim
            raise ValueError(f"{label}: expected shape (B, T, {size}) or (N, {size}), got {tuple(x.shape)}")
        if x.shape[:-1] != first.shape[:-1]:
            lead = tuple(first.shape[:-1])
            raise ValueError(f"{label}: expected leading shape {lead} (that of {labels[0]}), got {tuple(x.shape[:-1])}")
        if weights is not None and x.dtype != weights and not _autocast_joins(x, weights):
            raise TypeError(
                f"{label}: expected dtype {dtype_name(weights)} (that of the module's weights; cast the features, or the "
                f"module with {CASTS[x.dtype]}), got {dtype_name(x.dtype)}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"{label}: expected dtype {first.dtype} (that of {labels[0]}), got {x.dtype}")
        check_device(label, x, first, labels[0])
    if first.dim() == 3 and first.shape[1] == 0:
        raise ValueError(f"{labels[0]}: expected at least one frame, got {tuple(first.shape)}")
    return tensors


def ordered_values(values: Features, present: Present | None) -> tuple[Sequence[Tensor], Tensor | None]:
    """The modalities of an op in order, that of the mapping if they are one, and `present` as a tensor (*, M). Of the two
    only what becomes of a mapping is checked here."""
    if not isinstance(values, Mapping):
        if isinstance(present, Mapping):
            raise TypeError("present: expected a tensor (values is a sequence, without names), got a mapping")
        return values, present
    names, tensors = tuple(values), list(values.values())
    if not isinstance(present, Mapping):
        return tensors, present
    if not names:
        return tensors, None
    check_tensor(f"values[{names[0]}]", tensors[0])
    lead = tuple(tensors[0].shape[:-1])
    return tensors, ordered_present(present, names, lead, "(*,)", tensors[0], f"values[{names[0]}]")


def _autocast_joins(x: Tensor, weights: torch.dtype) -> bool:
    """Autocast is on, and casts both to its own dtype: it leaves float64 as it is."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weights)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def join_flags(present: Tensor | None, mask: Tensor | None, modalities: int) -> Tensor | None:
    """`present` (B, T, M) and `mask` (B, T) -> `known` (B, T, M): the modality is present and the frame no padding.

    None stands for True everywhere, in the arguments and in the result.
    """
    if mask is None:
        return present
    rows = mask.unsqueeze(-1)
    return rows.expand(*rows.shape[:-1], modalities) if present is None else present & rows


def finite_frames(tensors: Sequence[Tensor]) -> Tensor:
    """M tensors (*, d) -> (*, M) bool: the frame is finite, and so is the sum of its squares in float32. The rule of
    docs/math.md ("Missing frames"), and of `judge_frame` in csrc/math/frame.h."""
    norms = [torch.linalg.vector_norm(x.detach(), dim=-1, dtype=arithmetic_dtype(x)) for x in tensors]
    return torch.stack(norms, -1) <= LARGEST_NORM  # False for NaN


def by_modality(argument: str, given: object, names: tuple[str, ...] | None, count: int, default: Any) -> list[Any]:
    """One value for each of `count` modalities of a caller's mapping, in which those left out have the `default`, or sequence."""
    if isinstance(given, Mapping):
        if names is None:
            raise TypeError(f"{argument}: expected a sequence (in_dims was one, without names), got a mapping")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"{argument}: expected some of the modalities {list(names)}, got {unknown}")
        return [given.get(name, default) for name in names]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{argument}: expected a mapping, a sequence or None, got {type(given).__name__}")
    if len(given) != count:
        raise ValueError(f"{argument}: expected a number for each of the {count} modalities, got {len(given)}")
    return list(given)


def quality_sizes(
    quality_dims: Mapping[str, int] | Sequence[int] | None, names: tuple[str, ...] | None, count: int
) -> list[int]:
    """The columns of quality of each of `count` modalities, 0 for none."""
    sizes = [0] * count if quality_dims is None else by_modality("quality_dims", quality_dims, names, count, 0)
    for m, size in enumerate(sizes):
        check_int(f"quality_dims[{names[m] if names else m}]", size, 0)
    return sizes


def quality_by_modality(quality: object, names: tuple[str, ...] | None, sizes: Sequence[int]) -> list[Any]:
    """A caller's quality of each modality, None where it is unknown or the modality, by its size, has none; its arrays are
    still to be checked."""
    if not sum(sizes) and isinstance(quality, (Mapping, Sequence)) and len(quality):
        raise ValueError("quality: expected None (built without quality_dims), got some")
    if quality is None:
        return [None] * len(sizes)
    if isinstance(quality, Mapping):
        if names is None:
            raise TypeError("quality: expected a sequence (in_dims was one, without names), got a mapping")
        have = [name for name, size in zip(names, sizes) if size]
        for name in quality:
            if name not in have:
                raise ValueError(f"quality: expected some of {have}, which have quality_dims, got {name!r}")
        return [quality.get(name) for name in names]
    if not isinstance(quality, Sequence):
        raise TypeError(f"quality: expected a mapping, a sequence or None, got {type(quality).__name__}")
    if sum(sizes) and len(quality) != len(sizes):
        raise ValueError(f"quality: expected an array or None for each of {len(sizes)} modalities, got {len(quality)}")
    for m, (size, x) in enumerate(zip(sizes, quality)):
        if x is not None and not size:
            raise ValueError(f"quality[{names[m] if names else m}]: expected None (no quality_dims), got an array")
    return list(quality) or [None] * len(sizes)


def ordered_quality(
    quality: QualityValues | None,
    names: tuple[str, ...] | None,
    sizes: Sequence[int],
    like: Tensor,
    known: Tensor | None,
) -> Tensor | None:
    """(B, T, sum of sizes) of the caller's quality, NaN where it is unknown; None where no modality has any.

    like: features (B, T, d) or (N, d), to whose leading shape and device quality must fit; known (B, T, M): where a modality is
    missing its quality is unknown. Quality keeps its own dtype, float32 at least."""
    given, lead, parts = quality_by_modality(quality, names, sizes), tuple(like.shape[:-1]), []
    if not sum(sizes):
        return None
    for m, (size, x) in enumerate(zip(sizes, given)):
        if x is None:
            parts.append(torch.full((*lead, size), math.nan, device=like.device))
            continue
        label = f"quality[{names[m] if names else m}]"
        check_tensor(label, x)
        check_shape(label, x, (*lead, size), "(B, T, Q)" if len(lead) == 2 else "(N, Q)")
        check_device(label, x, like, "the features")
        x = x.detach().to(arithmetic_dtype(x))
        parts.append(x if known is None else torch.where(known[..., m, None], x, math.nan))
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return torch.cat([part.to(dtype) for part in parts], -1)


def take_finite(
    tensors: Sequence[Tensor],
    known: Tensor | None,
    names: tuple[str, ...] | None = None,
    *,
    finite: Tensor | None = None,
    strict: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Frames that are not finite are missing: M tensors (B, T, d) zeroed where missing, `known` (B, T, M) without those
    frames, and (M,) int64, how many of them `known` held (None: all True).

    `finite` (B, T, M): the frames that are, where the caller knows. `strict`: ValueError for the first that is not, by
    modality, then sequence, then frame; the host waits for the device.
    """
    if finite is None:
        finite = finite_frames(tensors)
    refused = ~finite if known is None else known & ~finite
    if strict and bool(refused.any()):
        m = int(refused.flatten(0, -2).any(0).int().argmax())
        place = refused[..., m].nonzero()[0].tolist()
        where = f"sequence {place[0]}, frame {place[1]}" if len(place) == 2 else f"row {place[0]}"
        raise nonfinite_error(names[m] if names else m, tensors[m][tuple(place)], where)
    known = finite if known is None else known & finite
    return blank_missing(tensors, known), known, refused.flatten(0, -2).sum(0)


def nonfinite_error(label: str | int, frame: Tensor, where: str) -> ValueError:
    """What is wrong with a frame of features that is not finite."""
    if bool(frame.isnan().any()):
        got = "NaN"
    elif bool(frame.isinf().any()):
        got = "Inf"
    else:
        got = "numbers whose squares overflow float32"
    return ValueError(f"features[{label}]: expected finite numbers where it is present (strict), got {got} in {where}")


def blank_missing(tensors: Sequence[Tensor], known: Tensor | None) -> list[Tensor]:
    """M tensors (B, T, d), zeroed where `known` (B, T, M) is False; NaN there reaches neither values nor gradients."""
    if known is None:
        return list(tensors)
    return [torch.where(known[..., m, None], x, 0.0) for m, x in enumerate(tensors)]
