"""The public ops: arguments checked here, once, then handed to the kernels.

Formulas: docs/math.md. The same ops in plain PyTorch: `sage_ext.reference`, which runs within the transforms of `torch.func`.
Every op is differentiable once (a second derivative raises), works under `torch.compile(fullgraph=True)`, `torch.export` and
autocast, accepts non-contiguous and zero-size inputs, and gives the same bits whatever the thread count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _C, _ops, reference
from ._arguments import (
    BOOL,
    DOUBLE,
    MAX_MODALITIES,
    MAX_STAGES,
    Features,
    Present,
    arithmetic_dtype,
    check_bool,
    check_device,
    check_number,
    check_optional,
    check_pool,
    check_shape,
    check_tensor,
    check_window,
    ordered_values,
    to_dtype,
)
from ._distributed import check_group, merge_ranks
from ._ops import _door

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ccc",
    "ccc_from_moments",
    "ccc_moments",
    "leaky_average",
    "merge_moments",
    "reliability_fusion",
    "stage_filter",
    "temporal_ccc",
]

MAX_AVERAGES: int = _C.max_averages


# --------------------------------------------------------------------------------------------------- stage_filter
def stage_filter(
    emission: Tensor, transition: Tensor, initial: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal Bayes filter over latent interaction stages: the forward pass of a hidden Markov model.

    ``prior_t[j] = logsumexp_i(belief_{t-1}[i] + log_softmax(transition)[i, j])``, at the first frame too;
    ``belief_t = log_softmax(prior_t + emission_t)``. Derivation: docs/math.md, "Stage filter". A logit of -inf counts as
    -1e30 and gets no gradient; evidence that calls every stage impossible is none.

    Args:
        emission: (B, T, S), unnormalised log-evidence of each stage in each frame, S <= 16.
        transition: (S, S) logits; row i, softmaxed, is P(next stage | stage i).
        initial: (S,) or (B, S) log-belief before the first frame, up to a constant; default uniform.
        mask: (B, T) bool; False: the frame brings no evidence, and time still passes. Not read where False.

    Returns:
        posterior: (B, T, S), rows summing to 1.
        final: (B, S) log-belief after the last frame: the next chunk's ``initial``. Filtering a sequence in chunks
            equals filtering it whole.

    float64 for float64 ``emission``, otherwise float32 (half inputs are converted). Differentiable in ``emission``,
    ``transition`` and ``initial`` through both outputs.

    Raises:
        TypeError: a non-tensor, or a dtype that is not floating point (``mask``: not bool).
        ValueError: shapes or devices that do not fit, or S outside 1..16.
    """
    check_tensor("emission", emission)
    if emission.dim() != 3:
        raise ValueError(f"emission: expected shape (B, T, S), got {tuple(emission.shape)}")
    batch, frames, stages = emission.shape
    if not 1 <= stages <= MAX_STAGES:
        raise ValueError(f"emission: expected 1 to {MAX_STAGES} stages in the last dimension, got {stages}")
    check_tensor("transition", transition)
    check_shape("transition", transition, (stages, stages), "(S, S)")
    check_device("transition", transition, emission, "emission")
    if initial is not None:
        check_tensor("initial", initial)
        # Not against both shapes in turn: torch.export would take from it that B is never S.
        if initial.shape != ((stages,) if initial.dim() == 1 else (batch, stages)):
            raise ValueError(
                f"initial: expected shape (S,) = ({stages},) or (B, S) = ({batch}, {stages}), got {tuple(initial.shape)}"
            )
        check_device("initial", initial, emission, "emission")
    check_optional("mask", mask, (batch, frames), "(B, T)", emission, "emission", BOOL)
    dtype = arithmetic_dtype(emission)
    emission, transition, initial = to_dtype(emission, dtype), to_dtype(transition, dtype), to_dtype(initial, dtype)
    if not _door.has_kernels(emission.device, emission, transition, initial):
        return reference.stage_filter(emission, transition, initial, mask)
    return _ops.stage_filter.stage_filter(emission, transition, initial, mask)


# --------------------------------------------------------------------------------------------- reliability_fusion
def reliability_fusion(
    values: Features,
    reliability: Tensor,
    stage: Tensor | None = None,
    *,
    log_temperature: Tensor | None = None,
    bias: Tensor | None = None,
    sharpness: Tensor | None = None,
    present: Present | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage-adaptive, calibrated, reliability-weighted sum of M modalities.

    ``l[m, s] = reliability[m, s] exp(-log_temperature[m, s]) + bias[m, s]`` are calibrated logits,
    ``confidence r[m] = sum_s stage[s] sigmoid(l[m, s])`` a stage-mixed probability with log-odds ``g[m]``;
    ``weights = softmax over the present m of sharpness[m] g[m]``; ``fused = sum_m weights[m] LayerNorm_m(values[m])``.
    With sharpness 1 these are inverse-variance weights for errors of variance ``kappa^2 (1 - r) / r``; with S = 1 the
    ordinary softmax gate. Derivation: docs/math.md, "Reliability-weighted fusion".

    Args:
        values: M tensors (*, D) of one shape, dtype (float16, bfloat16, float32, float64) and device, 1 <= M <= 8. Read
            where they lie: rows may have any common stride, nothing is stacked. A sequence, or a mapping by name, whose order
            is then that of the modalities in all that has a dimension M, given and returned.
        reliability: (*, M, S) raw reliability logit of each modality in each stage, S <= 16.
        stage: (*, S) stage posterior, rows summing to 1; default uniform.
        log_temperature, bias: (M, S) calibration of the logits; default 0.
        sharpness: () or (M,), how strongly confidence turns into weight; default 1.
        present: (*, M) bool; False: the modality is missing in that frame. It is not read (NaN there reaches nothing);
            its confidence, weight and gradients are exactly 0. A frame with no modality gives zeros. With ``values`` by name
            it may be a mapping too, name -> (*) bool, in any order, none left out.
        norm_weight, norm_bias: (M, D) affine of a LayerNorm over D, one a modality; both or neither (no normalisation).
        eps: of the LayerNorm.

    Returns:
        fused: (*, D), dtype of ``values``.
        weights, confidence: (*, M), float32 (float64 for float64 ``values``).

    Gating arithmetic is float32 (float64 for float64 ``values``) whatever the gating tensors' dtypes. Differentiable in
    all floating-point tensors, through all three outputs; saves two numbers a row and modality for backward. A row's
    result is the same bits whatever rows surround it.

    Raises:
        TypeError: a non-tensor, a dtype that is not floating point, ``values`` of differing dtypes, ``present`` not bool,
            ``eps`` not a number.
        ValueError: shapes, devices, M, S or eps out of range, or one of norm_weight and norm_bias alone.
    """
    if isinstance(values, Tensor) or not isinstance(values, (Sequence, Mapping)):
        raise TypeError(
            f"values: expected a sequence or a mapping of tensors, one a modality, got {type(values).__name__}"
        )
    labels = [f"values[{label}]" for label in (values if isinstance(values, Mapping) else range(len(values)))]
    values, present = ordered_values(values, present)
    modalities = len(values)
    if not 1 <= modalities <= MAX_MODALITIES:
        raise ValueError(f"values: expected 1 to {MAX_MODALITIES} modalities, got {modalities}")
    first = values[0]
    for label, x in zip(labels, values):
        check_tensor(label, x)
        if x.dtype != first.dtype:
            raise TypeError(f"{label}: expected dtype {first.dtype} (that of {labels[0]}), got {x.dtype}")
        if x.shape != first.shape:
            raise ValueError(
                f"{label}: expected shape {tuple(first.shape)} (that of {labels[0]}), got {tuple(x.shape)}"
            )
        check_device(label, x, first, labels[0])
    if first.dim() < 1:
        raise ValueError(f"{labels[0]}: expected shape (*, D), got a scalar")
    lead, dim = first.shape[:-1], first.shape[-1]
    check_tensor("reliability", reliability)
    if reliability.dim() != first.dim() + 1 or reliability.shape[:-1] != (*lead, modalities):
        raise ValueError(
            f"reliability: expected shape (*, M, S) = {(*tuple(lead), modalities)} + (S,), got {tuple(reliability.shape)}"
        )
    stages = reliability.shape[-1]
    if not 1 <= stages <= MAX_STAGES:
        raise ValueError(f"reliability: expected 1 to {MAX_STAGES} stages in the last dimension, got {stages}")
    check_device("reliability", reliability, first, "values[0]")
    check_optional("stage", stage, (*lead, stages), "(*, S)", first, "values[0]")
    check_optional("log_temperature", log_temperature, (modalities, stages), "(M, S)", first, "values[0]")
    check_optional("bias", bias, (modalities, stages), "(M, S)", first, "values[0]")
    if sharpness is not None:
        check_tensor("sharpness", sharpness)
        if sharpness.dim() != 0 and sharpness.shape != (modalities,):
            raise ValueError(f"sharpness: expected shape () or (M,) = ({modalities},), got {tuple(sharpness.shape)}")
        check_device("sharpness", sharpness, first, "values[0]")
        if sharpness.dim() == 0:
            sharpness = sharpness.expand(modalities)
    check_optional("present", present, (*lead, modalities), "(*, M)", first, "values[0]", BOOL)
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing}: norm_weight and norm_bias go together: expected both or neither, got None")
    check_optional("norm_weight", norm_weight, (modalities, dim), "(M, D)", first, "values[0]")
    check_optional("norm_bias", norm_bias, (modalities, dim), "(M, D)", first, "values[0]")
    check_number("eps", eps, ">= 0", lambda number: number >= 0)
    differentiable = (*values, reliability, stage, log_temperature, bias, sharpness, norm_weight, norm_bias)
    if not _door.has_kernels(first.device, *differentiable):
        return reference.reliability_fusion(
            values, reliability, stage, log_temperature=log_temperature, bias=bias, sharpness=sharpness,
            present=present, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
        )  # fmt: skip
    dtype = arithmetic_dtype(first)
    gate = _ops.reliability_fusion.Gate(
        to_dtype(reliability, dtype),
        to_dtype(stage, dtype),
        to_dtype(log_temperature, dtype),
        to_dtype(bias, dtype),
        to_dtype(sharpness, dtype),
        present,
        to_dtype(norm_weight, dtype),
        to_dtype(norm_bias, dtype),
    )
    return _ops.reliability_fusion.reliability_fusion(values, gate, float(eps))


# ------------------------------------------------------------------------------------------------------------ ccc
def _pair(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Checks pred, target and mask; returns the pair in one arithmetic dtype."""
    check_tensor("pred", pred)
    check_tensor("target", target)
    if pred.dim() not in (2, 3):
        raise ValueError(f"pred: expected shape (B, T, C) or (T, C), got {tuple(pred.shape)}")
    if target.shape != pred.shape:
        raise ValueError(f"target: expected shape {tuple(pred.shape)} (that of pred), got {tuple(target.shape)}")
    check_device("target", target, pred, "pred")
    if mask is not None:
        check_tensor("mask", mask, BOOL)
        if mask.shape != pred.shape and mask.shape != pred.shape[:-1]:
            raise ValueError(
                f"mask: expected shape {tuple(pred.shape[:-1])} or {tuple(pred.shape)}, got {tuple(mask.shape)}"
            )
        check_device("mask", mask, pred, "pred")
    dtype = arithmetic_dtype(pred, target)
    return to_dtype(pred, dtype), to_dtype(target, dtype)


def ccc(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    pool: str = "batch",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Concordance correlation coefficient (Lin 1989), with population (1/n) moments.

    ``2 cov / (var_p + var_t + (mean_p - mean_t)^2)``; one pass over the data, accumulated in float64.

    Args:
        pred, target: (B, T, C) or (T, C).
        mask: bool, (B, T) or the shape of ``pred``; False = not counted, and not read.
        pool: "batch" counts all valid frames of all sequences together -> (C,), the Aff-Wild2 protocol;
            "sequence" -> (B, C) (for (T, C) inputs: (C,)).
        process_group: the processes (one per ``torch.distributed`` rank) that hold parts of one global batch; needs
            ``pool="batch"``. Every rank gets the ccc of the global batch, the same bits, whatever the sizes of the parts
            (none, and no valid frame, are sizes too). All ranks must call, with the same C: it is one collective of
            48 C bytes a rank, and backward has none. None: this process's frames alone.

    Returns:
        float64 if either input is, otherwise float32. A group with fewer than two valid frames, or with a zero
        denominator, has ccc 0 and gradient 0. Differentiable in ``pred`` and ``target``.

    With a process group the gradient is that of the global ccc with respect to this rank's frames **times the number of
    ranks**: DistributedDataParallel averages the parameters' gradients over ranks, so what it leaves is the gradient
    of the global ccc, as one process with the global batch has it. Whoever adds gradients up divides by the number of ranks.

    Raises:
        TypeError: a non-tensor or a wrong dtype, or a ``process_group`` that is none. ValueError: shapes, devices,
            ``pool``, or a ``process_group`` with ``pool="sequence"``.
    """
    pred, target = _pair(pred, target, mask)
    check_pool(pool)
    if process_group is not None:
        check_group(process_group)
        if pool != "batch":
            raise ValueError(
                "process_group: expected None with pool='sequence' (a sequence is whole on its rank: there is nothing to "
                f"merge), got {type(process_group).__name__}"
            )
        moments = merge_ranks(ccc_moments(pred, target, mask), process_group)
        return reference.ccc_from_moments(moments).to(pred.dtype)
    if not _door.has_kernels(pred.device, pred, target):
        return reference.ccc(pred, target, mask, pool=pool)
    return _ops.ccc.ccc(pred, target, mask, pool == "batch")


def ccc_moments(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, *, pool: str = "batch", state: Tensor | None = None
) -> Tensor:
    """Moments of each group, for CCC over data that comes in pieces.

    Args as in `ccc`; ``state``: moments to merge with, as returned before, of the same shape.

    Returns:
        (C, 6), or (B, C, 6) with ``pool="sequence"``, float64: count, mean_p, mean_t, M2_p, M2_t, C_pt, the last three
        centred sums. Differentiable in ``pred``, ``target`` and ``state``. See `merge_moments`, `ccc_from_moments`.

    Raises:
        TypeError: a non-tensor or a wrong dtype. ValueError: shapes, devices or ``pool``.
    """
    pred, target = _pair(pred, target, mask)
    check_pool(pool)
    if state is not None:
        _moments("state", state)
        if pred.dim() == 3 and pool == "sequence":
            check_shape("state", state, (pred.shape[0], pred.shape[2], 6), "(B, C, 6)")
        else:
            check_shape("state", state, (pred.shape[-1], 6), "(C, 6)")
        check_device("state", state, pred, "pred")
    if not _door.has_kernels(pred.device, pred, target):
        moments = reference.ccc_moments(pred, target, mask, pool=pool)
    else:
        moments = _ops.ccc.ccc_moments(pred, target, mask, pool == "batch")
    return moments if state is None else merge_moments(state, moments)


def _moments(name: str, m: object) -> None:
    check_tensor(name, m, DOUBLE)
    assert isinstance(m, Tensor)
    if m.dim() < 1 or m.shape[-1] != 6:
        raise ValueError(f"{name}: expected shape (..., 6), got {tuple(m.shape)}")


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """Exact parallel merge of two moments (..., 6) float64 (Chan, Golub & LeVeque 1979); associative to rounding.

    An empty side (count 0) changes nothing. Differentiable in both.
    """
    _moments("a", a)
    _moments("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b: expected shape {tuple(a.shape)} (that of a), got {tuple(b.shape)}")
    check_device("b", b, a, "a")
    return reference.merge_moments(a, b)


def ccc_from_moments(moments: Tensor) -> Tensor:
    """(..., 6) float64 moments -> (...) float64 CCC; 0 with gradient 0 where it is undefined. Differentiable."""
    _moments("moments", moments)
    return reference.ccc_from_moments(moments)


# --------------------------------------------------------------------------------------------------- temporal_ccc
def temporal_ccc(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    window: int | None = None,
    halflife: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Running concordance: ``rho[b, t, c]`` is the CCC of the valid frames up to and including t.

    All of them (default), the last ``window`` frames, or weighted by ``0.5 ** (age / halflife)``. Cost is linear in T
    whatever the window; nothing is subtracted, so long streams do not drift. Derivation: docs/math.md, "Temporal CCC".

    Args:
        pred, target: (B, T, C).
        mask: bool, (B, T) or (B, T, C); False = not counted, and not read.
        window: frames, an int >= 2, counted whether valid or not. At most one of ``window`` and ``halflife``.
        halflife: frames, > 0.
        state: what an earlier call with the same window or halflife returned: the chunk before this one. Constant:
            gradients stop at the chunk's border.

    Returns:
        rho: (B, T, C), float64 if either input is, otherwise float32; 0 with gradient 0 where fewer than two valid
            frames count or the denominator is 0.
        state: float64; (B, C, 8), or with ``window`` (B, C, L, 3), the last L <= window - 1 frames. Opaque: its layout
            is in csrc/ops.h.

    Raises:
        TypeError: a non-tensor or a wrong dtype, or a ``window`` that is not an int.
        ValueError: shapes, devices, ``window`` < 2, ``halflife`` <= 0, or both given.
    """
    check_window(window, halflife)
    pred, target = _pair(pred, target, mask)
    if pred.dim() != 3:
        raise ValueError(f"pred: expected shape (B, T, C), got {tuple(pred.shape)}")
    batch, _, channels = pred.shape
    if state is not None:
        check_tensor("state", state, DOUBLE)
        if window is None:
            check_shape("state", state, (batch, channels, 8), "(B, C, 8)")
        elif (
            state.dim() != 4 or state.shape[:2] != (batch, channels) or state.shape[3] != 3 or state.shape[2] >= window
        ):
            raise ValueError(
                f"state: expected shape (B, C, L, 3) = ({batch}, {channels}, at most {window - 1}, 3), "
                f"got {tuple(state.shape)}"
            )
        check_device("state", state, pred, "pred")
        state = state.detach()
    if not _door.has_kernels(pred.device, pred, target):
        return reference.temporal_ccc(pred, target, mask, window=window, halflife=halflife, state=state)
    decay = 1.0 if halflife is None else 0.5 ** (1.0 / halflife)
    return _ops.temporal_ccc.temporal_ccc(pred, target, mask, state, window or 0, decay)


# -------------------------------------------------------------------------------------------------- leaky_average
def leaky_average(
    x: Tensor,
    precision: Tensor,
    halflife: Tensor | Sequence[float],
    prior: Tensor | Sequence[float],
    state: Tensor | None = None,
    *,
    causal: bool = True,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalised leaky averages of a sequence, each frame counted by its precision, one for each half-life.

    ``average[b, t, r] = sum_k L^|t-k| p_k x_k / (prior_r pbar + sum_k L^|t-k| p_k)``, ``L = 0.5^(1 / halflife_r)``, over the
    frames ``k <= t`` (all frames if not ``causal``). With ``p`` the inverse variance of a frame's error this is the
    inverse-variance weighted mean under exponential forgetting, shrunk towards 0 by a prior worth ``prior_r pbar``: ``pbar``
    is 1, or, with ``relative``, the leaky mean of ``p`` over the frames that count (those of ``p > 0``). Cost is linear in
    T. Derivation: docs/math.md, "Leaky average".

    Args:
        x: (B, T, D) float16, bfloat16, float32 or float64.
        precision: (B, T), at least 0. A frame of precision 0 is not read (NaN there reaches nothing); its gradients are 0.
        halflife: (R,) in frames, above 0, R <= 8. Constant. A sequence of numbers is checked; a tensor's values are not,
            which would wait for the device.
        prior: (R,), at least 0. As ``halflife``, but differentiable.
        state: (B, R, D + 2), what an earlier call returned: the chunk before this one. Default: nothing was seen.
        causal: False: frames after t count in t's average too.
        relative: the prior in units of the mean precision.

    Returns:
        average: (B, T, R, D), dtype of ``x``; 0 where nothing was seen and the prior is 0.
        state: (B, R, D + 2): sum, weight and count after the last frame (of the frames up to it, causal or not), float32
            (float64 for float64 ``x``). Averaging a sequence in chunks equals averaging it whole.

    Arithmetic is float32 (float64 for float64 ``x``). Differentiable in ``x``, ``precision``, ``prior`` and ``state``, through
    both outputs; saves no more than its inputs and the average.

    Raises:
        TypeError: a non-tensor, a dtype that is not floating point, a flag that is not bool.
        ValueError: shapes or devices that do not fit, R outside 1..8, numbers out of range, a half-life that wants a
            gradient.
    """
    check_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape (B, T, D), got {tuple(x.shape)}")
    batch, frames, dim = x.shape
    dtype = arithmetic_dtype(x)
    check_tensor("precision", precision)
    check_shape("precision", precision, (batch, frames), "(B, T)")
    check_device("precision", precision, x, "x")
    halflife = _each_average("halflife", halflife, x, dtype, 0.0, False)
    averages = halflife.shape[0]
    if not 1 <= averages <= MAX_AVERAGES:
        raise ValueError(f"halflife: expected 1 to {MAX_AVERAGES} half-lives, got {averages}")
    prior = _each_average("prior", prior, x, dtype, 0.0, True)
    check_shape("prior", prior, (averages,), "(R,)")
    if halflife.requires_grad and torch.is_grad_enabled():
        raise ValueError("halflife: expected a constant (it has no gradient), got a tensor that requires one")
    check_optional("state", state, (batch, averages, dim + 2), "(B, R, D + 2)", x, "x")
    for name, flag in (("causal", causal), ("relative", relative)):
        check_bool(name, flag)
    precision, state = to_dtype(precision, dtype), to_dtype(state, dtype)
    if not _door.has_kernels(x.device, x, precision, prior, state):
        return reference.leaky_average(x, precision, halflife, prior, state, causal=causal, relative=relative)
    return _ops.leaky_average.leaky_average(x, precision, halflife, prior, state, causal, relative)


def _each_average(name: str, given: object, like: Tensor, dtype: torch.dtype, low: float, closed: bool) -> Tensor:
    """A number for each average, (R,): a tensor, or numbers that are checked to be finite and at least (or above) `low`."""
    if isinstance(given, Tensor):
        check_tensor(name, given)
        if given.dim() != 1:
            raise ValueError(f"{name}: expected shape (R,), got {tuple(given.shape)}")
        check_device(name, given, like, "x")
        return to_dtype(given, dtype)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name}: expected a torch.Tensor or a sequence of numbers, got {type(given).__name__}")
    for value in given:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected numbers, got {type(value).__name__}")
        if not (value >= low if closed else value > low) or value == float("inf"):
            raise ValueError(f"{name}: expected finite numbers {'>=' if closed else '>'} {low:g}, got {value}")
    return torch.tensor(given, dtype=dtype, device=like.device)
