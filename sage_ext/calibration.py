"""Post-hoc calibration of confidence, and how to measure it.

A confidence `r` states how large an estimate's error is. That of a `SAGE` is the share of the target's variance that the
estimate explains: the error has variance `1 - r` of the target's. In a foreign model (`ReliabilityNLL`) it states an error
of variance `kappa^2 (1 - r) / r`. It is calibrated when that is true on average over the frames that share an `r`; read as a
reliability, `r = 1 - E[e^2 | r] / var`, or `r = 1 / (1 + E[e^2 | r] / kappa^2)`. Confidence is learnt on training clips, where
errors are smaller than on new ones; `fit_calibration` corrects it on validation clips, by a temperature and a bias for each
expert and stage, against the same proper score that trained it.

The measure is the counterpart of classification's expected calibration error for a predicted *variance*: Levi, Gispan,
Giladi & Fetaya 2022 ("Evaluating and calibrating uncertainty prediction in regression tasks") bin by predicted
variance and compare it with the mean squared error in the bin, relative to the predicted (ENCE). Here both sides are
mapped to [0, 1] by the same formula, so a bin cannot dominate by a large ratio and the number
reads like the usual ECE; bins hold equal numbers of frames (equal mass), so none is empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._arguments import (
    BOOL,
    Features,
    Present,
    QualityValues,
    arithmetic_dtype,
    check_int,
    check_kappa,
    check_number,
    check_shape,
    check_tensor,
)
from .models.sage import SAGE, explained_error, moved
from .nn import ExplainedVarianceNLL, ReliabilityFusion, ReliabilityHead, ReliabilityNLL, calibrated_confidence
from .nn.head import annotated_frames, check_labels

__all__ = [
    "CalibrationReport",
    "ReliabilityDiagram",
    "calibrate",
    "calibrated_confidence",
    "collect",
    "expected_calibration_error",
    "fit_calibration",
    "reliability_diagram",
    "spearman",
]


class ReliabilityDiagram(NamedTuple):
    """Equal-mass bins of one modality's confidence, in rising order; float64 on the CPU. `K` bins."""

    predicted: Tensor  # (K,) mean confidence of the bin
    observed: Tensor  # (K,) the reliability that the mean squared error shows, see `observed_reliability`
    frames: Tensor  # (K,) int64 frames in the bin
    lower: Tensor  # (K,) smallest confidence in the bin
    upper: Tensor  # (K,) largest


class CalibrationReport(NamedTuple):
    """What `calibrate` did; one entry an expert in each list: the joint one, where the fusion has it, then the modalities."""

    log_temperature: Tensor  # (K, S) now in the model
    bias: Tensor  # (K, S) now in the model
    before: list[ReliabilityDiagram]
    after: list[ReliabilityDiagram]
    ece_before: list[float]
    ece_after: list[float]


class Evidence(NamedTuple):
    """A model's raw reliability and errors on `N` frames, on the CPU: of the `K` experts of a `SAGE`, the joint one first, or of
    the modalities of another model."""

    reliability: Tensor  # (N, K, S) logits before calibration
    stage: Tensor  # (N, S)
    squared_error: Tensor  # (N, K, C) of each one's own estimate; of a SAGE relative to the targets' variance
    mask: Tensor  # (N, K) bool: annotated frames in which it has something to say


def fit_calibration(
    reliability: Tensor,
    stage: Tensor,
    squared_error: Tensor,
    mask: Tensor | None = None,
    *,
    kappa: float | None,
    prior: float = 100.0,
    max_iter: int = 200,
) -> tuple[Tensor, Tensor]:
    """Fit `log_temperature` and `bias`, (M, S) float32 each, by the proper score on held-out frames.

    Minimises the mean over counted frames of `ReliabilityNLL(kappa)`, or without kappa of `ExplainedVarianceNLL`, plus
    `prior / (2 n)` times the squared distance from identity (0, 0): the weight of `prior` frames, which decides where a stage
    hardly occurs. L-BFGS in float64 on the CPU, deterministic; the score is never worse than at identity.

    Args:
        reliability: (*, M, S) raw logits, before any calibration.
        stage: (*, S) posterior.
        squared_error: (*, M), or (*, M, C) for C targets, of the modality's own prediction.
        mask: (*, M) bool; False: not counted (not read).
        kappa: error scale of confidence; None: errors are relative to the target's variance, and confidence is what the rest
            of it is.
    """
    score = ExplainedVarianceNLL() if kappa is None else ReliabilityNLL(kappa)
    *lead, modalities, stages = reliability.shape
    check_shape("stage", stage, (*lead, stages), "(*, S)")
    if tuple(squared_error.shape[: len(lead) + 1]) != (*lead, modalities):
        raise ValueError(
            f"squared_error: expected shape {(*lead, modalities)}, or that and targets at the end, got "
            f"{tuple(squared_error.shape)}"
        )
    if mask is None:
        mask = torch.ones(*lead, modalities, dtype=torch.bool)
    check_tensor("mask", mask, BOOL)
    check_shape("mask", mask, (*lead, modalities), "(*, M)")
    check_number("prior", prior, ">= 0", lambda frames: frames >= 0)
    mask = mask.cpu().reshape(-1, modalities)
    logit = torch.where(mask[..., None], reliability.detach().cpu().double().reshape(-1, modalities, stages), 0.0)
    belief = stage.detach().cpu().double().reshape(-1, stages)
    error = squared_error.detach().cpu().double().reshape(len(mask), modalities, -1).mean(-1)
    error = torch.where(mask, error, 0.0)
    if not bool(logit.isfinite().all() and belief.isfinite().all() and error.isfinite().all()):
        raise ValueError("reliability, stage, squared_error: expected finite numbers wherever mask is True, got others")
    count = int(mask.sum())
    parameters = torch.zeros(2, modalities, stages, dtype=torch.float64)
    if not count:
        raise ValueError("mask: expected a frame or more to calibrate on, got none")

    def objective(p: Tensor) -> Tensor:
        nll = score(calibrated_confidence(logit, belief, p[0], p[1]), error, mask)
        return nll + prior / (2 * count) * p.square().sum()

    with torch.enable_grad():
        fitted = parameters.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [fitted], max_iter=max_iter, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = objective(fitted)
            loss.backward()
            return loss

        optimiser.step(closure)
    fitted = fitted.detach()
    if not bool(objective(fitted) <= objective(parameters)):  # also where it is not finite
        fitted = parameters
    return fitted[0].float(), fitted[1].float()


def observed_reliability(mean_squared_error: Tensor, kappa: float | None) -> Tensor:
    """What confidence should have been: of errors relative to the target's variance (kappa None) the explained share of it,
    below 0 where the mean would have been better; else `1 / (1 + error / kappa^2)`."""
    if kappa is None:
        return 1 - mean_squared_error
    return 1 / (1 + mean_squared_error / kappa**2)


def reliability_diagram(
    confidence: Tensor, squared_error: Tensor, mask: Tensor | None = None, *, kappa: float | None, bins: int = 15
) -> ReliabilityDiagram:
    """Confidence of one modality against the reliability that its errors show.

    confidence: (*,) in [0, 1]; squared_error: (*,), or (*, C); mask: (*,) bool. Frames are sorted by confidence and cut
    into `bins` equal parts (at most one frame of difference; fewer bins where there are fewer frames).
    """
    if kappa is not None:
        check_kappa(kappa)
    check_int("bins", bins, 1)
    error = squared_error.detach().cpu().double()
    if error.dim() > confidence.dim():
        error = error.mean(-1)
    if error.shape != confidence.shape:
        raise ValueError(
            f"squared_error: expected shape {tuple(confidence.shape)}, or that and targets at the end, got "
            f"{tuple(squared_error.shape)}"
        )
    r = confidence.detach().cpu().double()
    if mask is not None:
        check_tensor("mask", mask, BOOL)
        check_shape("mask", mask, tuple(confidence.shape), "(*,)")
        r, error = r[mask.cpu()], error[mask.cpu()]
    r, order = r.flatten().sort(stable=True)
    error = error.flatten()[order]
    if not len(r):
        raise ValueError("mask: expected a frame or more to measure on, got none")
    parts = list(zip(r.tensor_split(min(bins, len(r))), error.tensor_split(min(bins, len(r)))))
    return ReliabilityDiagram(
        predicted=torch.stack([p.mean() for p, _ in parts]),
        observed=torch.stack([observed_reliability(e.mean(), kappa) for _, e in parts]),
        frames=torch.tensor([len(p) for p, _ in parts]),
        lower=torch.stack([p[0] for p, _ in parts]),
        upper=torch.stack([p[-1] for p, _ in parts]),
    )


def expected_calibration_error(diagram: ReliabilityDiagram) -> float:
    """Mean over bins, by frames, of |mean confidence - observed reliability|: 0 is perfect, 1 the worst; NaN without frames.
    An observed share of variance below 0 counts as 0: an estimate worse than the mean is to have no confidence at all."""
    gap = (diagram.predicted - diagram.observed.clamp(min=0)).abs()
    return float((gap * diagram.frames).sum() / diagram.frames.sum())


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two 1-d tensors, ties averaged; nan where one of them is constant."""
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(f"a, b: expected two 1-d tensors of one length, got {tuple(a.shape)} and {tuple(b.shape)}")
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean."""
    _, where, count = torch.unique(x.detach().cpu(), return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count - 1) / 2)[where]


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Iterable[Any] | None = None,
    *,
    head: ReliabilityHead | None = None,
    scale: bool = False,
) -> Evidence:
    """Run a model in evaluation mode over batches, and gather what calibration needs of its `ReliabilityFusion`.

    Without `targets` the model is a `SAGE`, and a batch what `sage_ext.data.windows.collate` makes: "features" by name,
    "labels" (B, T, C), "valid" (B, T) bool, optionally "present" and "frame". With them it is any module that holds one
    `ReliabilityFusion` (or is one, or holds a `SAGE`) and calls it once a batch; that one's inputs are read as they pass.

    Each row is a sequence of its own. Whole clips (B = 1) show the confidence that a running stream has; windows start cold.

    Args:
        model: see above. Its modules' modes are restored, and nothing is left on it.
        batches: what the model takes, on its device. A mapping is passed as keyword arguments where the forward takes its keys
            as such, else as the one positional argument; a tuple or list as positional arguments; anything else as the one
            positional argument. (A mapping within a tuple of one is positional, whatever its keys.)
        targets: in step with the batches, labels (B, T, C), or (N, C) where the fusion is given (N, d); or pairs (labels,
            valid) with (B, T) or (N,) bool. Frames whose labels are not finite are not annotated.
        head: whose predictions are each modality's own. Default: a SAGE's unimodal predictions; the one `ReliabilityHead` that
            the model holds; where it holds none, ridge regressions on what the fusion is given, cross-fitted on these batches:
            each half of the batches is predicted by the fit on the other half (of a single batch, each half of its sequences;
            of a single sequence, of its frames). All inputs of the fusion are then held in memory.
        scale: first put a SAGE's estimates to scale by these frames (`SAGE.own_gain` and its like, in place): their errors are
            those of the regression of the labels on them.

    Raises TypeError or ValueError naming the argument for anything malformed, a model with no `ReliabilityFusion` or with two
    included.
    """
    _check_batches("batches", batches)
    if head is not None and not isinstance(head, ReliabilityHead):
        raise TypeError(f"head: expected a ReliabilityHead or None, got {type(head).__name__}")
    if targets is None:
        return _collect_clips(model, batches, head, scale)
    _check_batches("targets", targets)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    place, fusion = _find(model)
    _no_head_for(place, head)
    head = None if isinstance(place, SAGE) else _own_head(model, fusion, head)
    seen: list[_Seen] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(
            _look_at_sage(place, *args, **kwargs) if isinstance(place, SAGE) else _look_at(fusion, *args, **kwargs)
        )

    found: list[_Seen] = []
    labels: list[tuple[Tensor, Tensor]] = []
    modes = [(module, module.training) for module in model.modules()]
    handle = place.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.eval()
        for index, (batch, target) in enumerate(_in_step(batches, targets)):
            seen.clear()
            _run(model, batch, f"batches[{index}]")
            if len(seen) != 1:
                raise ValueError(
                    f"model: expected one call of its {type(place).__name__} a batch, got {len(seen)} for batches[{index}]"
                )
            labels.append(_labels(target, seen[0], f"targets[{index}]"))
            if head is not None:
                _check_targets(labels[-1][0], head.num_targets, "head")
                seen[0] = seen[0]._replace(features=[], own=head.predict(seen[0].features))
            found.append(_Seen([x.cpu() for x in seen[0].features], *(x.cpu() for x in seen[0][1:])))
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    if not found:
        raise ValueError("batches: expected one or more, got none")
    counts = {y.shape[-1] for y, _ in labels}
    if len(counts) > 1:
        raise ValueError(f"targets: expected one number of targets in all batches, got {sorted(counts)}")
    masks = [s.known & annotated.unsqueeze(-1) for s, (_, annotated) in zip(found, labels)]
    own = [s.own for s in found]
    if isinstance(place, SAGE):
        _check_targets(labels[0][0], place.num_targets, "model")
        return _evidence(
            place, [(s.reliability, s.stage, s.own, y, m) for s, (y, _), m in zip(found, labels, masks)], scale
        )
    if head is None:
        own = _cross_fitted([s.features for s in found], [y for y, _ in labels], masks, fusion.names)
    parts = []
    for s, mine, (y, _), mask in zip(found, own, labels, masks):
        error = (mine - y.unsqueeze(-2)).square()
        parts.append([x.flatten(0, mask.dim() - 2) for x in (s.reliability, s.stage, error, mask)])
    return Evidence(*(torch.cat(column) for column in zip(*parts)))


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Iterable[Any] | None = None,
    *,
    head: ReliabilityHead | None = None,
    kappa: float | None = None,
    prior: float = 100.0,
    bins: int = 15,
) -> CalibrationReport:
    """Fit the calibration of a model's `ReliabilityFusion` in place on validation batches, whatever it held before.

    `calibrate(sage, batches)` for a `SAGE` and batches of clips; `calibrate(model, batches, targets)` for any module that holds
    one `ReliabilityFusion`: see `collect` for `model`, `batches`, `targets` and `head`, and for the errors.

    Args:
        kappa: error scale at which confidence is 1/2; not for a `SAGE`, whose confidence is a share of variance. Default: that
            of the head; 0.25, that of `ReliabilityNLL`, where there is none.
        prior: see `fit_calibration`. bins: of the report's diagrams.

    The report measures on the frames that were fitted; measure on others with `collect` and `diagrams`.
    """
    if kappa is not None:
        check_kappa(kappa)
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    place, fusion = _find(inner)
    if isinstance(place, SAGE) and kappa is not None:
        raise ValueError(f"kappa: expected None (a SAGE's confidence is a share of variance), got {kappa}")
    evidence = collect(model, batches, targets, head=head, scale=True)
    if not isinstance(place, SAGE) and kappa is None:
        told = _own_head(inner, fusion, head)
        kappa = ReliabilityNLL().kappa if told is None else told.kappa
    # Outside a SAGE nobody knows the joint expert's errors, and its calibration stays as it is.
    kept = [buffer[-evidence.mask.shape[1] :] for buffer in (fusion.log_temperature, fusion.bias)]
    before = diagrams(evidence, *kept, kappa=kappa, bins=bins)
    log_temperature, bias = fit_calibration(*evidence, kappa=kappa, prior=prior)
    with torch.no_grad():
        kept[0].copy_(log_temperature)
        kept[1].copy_(bias)
    after = diagrams(evidence, log_temperature, bias, kappa=kappa, bins=bins)
    return CalibrationReport(
        log_temperature,
        bias,
        before,
        after,
        [expected_calibration_error(d) for d in before],
        [expected_calibration_error(d) for d in after],
    )


def diagrams(
    evidence: Evidence, log_temperature: Tensor, bias: Tensor, *, kappa: float | None, bins: int = 15
) -> list[ReliabilityDiagram]:
    """One reliability diagram an expert, of collected evidence under a calibration; without a bin, and with the error NaN,
    where no frame of the modality is counted."""
    confidence = calibrated_confidence(
        evidence.reliability.double(), evidence.stage.double(), log_temperature.cpu().double(), bias.cpu().double()
    )
    none = confidence.new_zeros(0)
    empty = ReliabilityDiagram(none, none, none.long(), none, none)
    return [
        reliability_diagram(confidence[:, m], evidence.squared_error[:, m], mask, kappa=kappa, bins=bins)
        if bool((mask := evidence.mask[:, m]).any())
        else empty
        for m in range(confidence.shape[1])
    ]


# ------------------------------------------------------------------------------------------------- in anybody's model
class _Seen(NamedTuple):
    """What passed the fusion in one batch; `(*)` is `(B, T)`, or `(N,)`."""

    features: list[Tensor]  # M tensors (*, d), zero where not `known`
    known: Tensor  # (*, M) bool
    reliability: Tensor  # (*, M, S)
    stage: Tensor  # (*, S)
    own: Tensor  # (*, K, C) of a SAGE; else empty


def _find(model: nn.Module) -> tuple[nn.Module, ReliabilityFusion]:
    """The module whose inputs tell all, and the one fusion: the `SAGE` around it, or the fusion itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    sages = [module for module in model.modules() if isinstance(module, SAGE)]
    if isinstance(model, SAGE) and not isinstance(model.fusion, ReliabilityFusion):
        raise ValueError(
            f"model: expected fusion='reliability', with a confidence to calibrate, got {model.config['fusion']!r}"
        )
    fusions = [module for module in model.modules() if isinstance(module, ReliabilityFusion)]
    if len(fusions) != 1:
        raise ValueError(
            f"model: expected a module that holds one ReliabilityFusion, got {type(model).__name__} with {len(fusions)}"
        )
    return next((sage for sage in sages if sage.fusion is fusions[0]), fusions[0]), fusions[0]


def _own_head(model: nn.Module, fusion: ReliabilityFusion, head: ReliabilityHead | None) -> ReliabilityHead | None:
    """The head that is given, or the one in the model; None where there is none."""
    if head is None:
        heads = [module for module in model.modules() if isinstance(module, ReliabilityHead)]
        if len(heads) > 1:
            raise ValueError(f"model: expected at most one ReliabilityHead in it (head= chooses), got {len(heads)}")
        head = heads[0] if heads else None
    if head is not None and (head.in_dims, head.names) != (fusion.in_dims, fusion.names):
        raise ValueError(
            f"head: expected one for the fusion's in_dims {fusion.in_dims} and names {fusion.names}, got {head.in_dims} and "
            f"{head.names}"
        )
    return head


def _no_head_for(place: nn.Module, head: ReliabilityHead | None) -> None:
    if head is not None and isinstance(place, SAGE):
        raise ValueError("head: expected None (a SAGE predicts from each modality by itself), got a ReliabilityHead")


def _look_at(
    fusion: ReliabilityFusion,
    features: Features,
    present: Present | None = None,
    mask: Tensor | None = None,
    state: Any = None,
    *,
    typicality_inputs: Features | None = None,
    quality: QualityValues | None = None,
    strict: bool = False,
) -> _Seen:
    """The arguments of the fusion's forward, and its raw reliability for them, of the modalities alone."""
    given = fusion.admit(features, present, mask, state, typicality_inputs, quality, strict)
    assessed = fusion.assess_checked(given.features, given.known, state, given.typicality_inputs, given.quality)
    reliability = assessed.reliability[..., -len(given.features) :, :]
    seen = [given.known, reliability, assessed.stage, reliability.new_empty(0)]
    x = given.features
    if given.single:
        x, seen[:3] = [v.squeeze(1) for v in x], [v.squeeze(1) for v in seen[:3]]
    return _Seen([v.detach() for v in x], *seen)


def _look_at_sage(
    sage: SAGE,
    features: Features,
    present: Present | None = None,
    mask: Tensor | None = None,
    state: Any = None,
    *,
    quality: QualityValues | None = None,
    strict: bool = False,
) -> _Seen:
    """The same of a SAGE, with its experts' estimates."""
    if state is not None:
        raise ValueError(f"state: expected None (a SAGE is calibrated on whole sequences), got {type(state).__name__}")
    reliability, stage, own, known = sage.assess(features, present, mask, quality=quality)
    return _Seen([], known, reliability, stage, own)


def _check_batches(name: str, batches: object) -> None:
    """Something to iterate over, and not one batch alone."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"{name}: expected an iterable with an item a batch, got {type(batches).__name__}")


def _in_step(batches: Iterable[Any], targets: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    nothing, rest, count = object(), iter(targets), 0
    for count, batch in enumerate(batches, 1):
        target = next(rest, nothing)
        if target is nothing:
            raise ValueError(f"targets: expected one for each of the batches, got {count - 1} for {count} or more")
        yield batch, target
    if next(rest, nothing) is not nothing:
        raise ValueError(f"targets: expected one for each of the {count} batches, got more")


def _run(model: nn.Module, batch: Any, name: str) -> None:
    """The model on a batch, passed as `collect` says."""
    signature = inspect.signature(model.forward)

    def fits(*args: Any, **kwargs: Any) -> bool:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    if isinstance(batch, Mapping):
        if all(isinstance(key, str) for key in batch) and fits(**batch):
            model(**batch)
            return
        args: tuple[Any, ...] = (batch,)
        got = f"keys {list(batch)}"
    else:
        args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        got = f"{len(args)} positional arguments"
    if not fits(*args):
        raise TypeError(f"{name}: expected what {type(model).__name__}.forward{signature} takes, got {got}")
    model(*args)


def _labels(target: Any, seen: _Seen, name: str) -> tuple[Tensor, Tensor]:
    """Labels (*, C) in float32 or float64, 0 where not annotated, and (*) bool, where they are; on the CPU."""
    valid = None
    if isinstance(target, (tuple, list)):
        if len(target) != 2:
            raise ValueError(f"{name}: expected labels or a pair (labels, valid), got {len(target)} items")
        target, valid = target
    lead = tuple(seen.known.shape[:-1])
    check_tensor(name, target)
    labels = target.detach().cpu()
    check_labels(name, labels, lead, None, labels)
    if isinstance(valid, Tensor):
        valid = valid.cpu()
    annotated = annotated_frames(labels, valid, f"{name}[1]")
    return torch.where(annotated.unsqueeze(-1), labels, 0.0).to(arithmetic_dtype(labels)), annotated


def _check_targets(labels: Tensor, expected: int, whose: str) -> None:
    if labels.shape[-1] != expected:
        raise ValueError(f"targets: expected the {expected} targets of the {whose}, got {labels.shape[-1]}")


def _cross_fitted(
    features: list[list[Tensor]], labels: list[Tensor], masks: list[Tensor], names: tuple[str, ...] | None
) -> list[Tensor]:
    """Each modality's predictions (*, M, C) of batches of M tensors (*, d), labels (*, C) and flags (*, M), all on the CPU:
    ridge regressions, each half of the data predicted by the fit on the other half."""
    modalities, shapes = len(features[0]), [mask.shape for mask in masks]
    sizes = [mask[..., 0].numel() for mask in masks]
    # Which half each frame belongs to: of the batches, of the sequences, or of the frames.
    if len(sizes) > 1:
        parts = [torch.full((n,), 2 * i >= len(sizes)) for i, n in enumerate(sizes)]
    else:
        *lead, _ = shapes[0]
        rows = lead[0] if len(lead) == 2 and lead[0] > 1 else sizes[0]
        parts = [(2 * torch.arange(rows) >= rows).repeat_interleave(sizes[0] // rows)]
    second = torch.cat(parts)
    y = torch.cat([label.flatten(0, -2).double() for label in labels])
    result = torch.zeros(len(y), modalities, y.shape[-1], dtype=torch.float64)
    for m in range(modalities):
        x = torch.cat([batch[m].cpu().flatten(0, -2).double() for batch in features])
        counted = torch.cat([mask[..., m].flatten() for mask in masks])
        halves = [counted & ~second, counted & second]
        if not all(bool(half.any()) for half in halves):
            raise ValueError(
                f"batches: expected annotated frames with modality {names[m] if names else m} in both halves (to fit its own "
                "predictions on one for the other), got a half without"
            )
        # The penalty, the only thing that both halves decide, is that of the least error.
        tried = [_ridge(x[fit], y[fit], x[~half]) for fit, half in ((halves[0], ~second), (halves[1], second))]
        predicted = x.new_zeros(len(PENALTIES), len(x), y.shape[-1])
        predicted[:, second], predicted[:, ~second] = tried
        error = (predicted - y).square().mean(-1)[:, counted].mean(-1)
        result[:, m] = predicted[int(error.argmin())]
    return [part.unflatten(0, shape[:-1]) for part, shape in zip(result.split(sizes), shapes)]


# Of the ridge regressions, as shares of the number of frames; features are standardised.
PENALTIES = tuple(10.0**e for e in range(-5, 3))


def _ridge(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """(n, d), (n, C) -> predictions of `new` (k, d) under each of `PENALTIES`, (P, k, C)."""
    mean, std, offset = x.mean(0), x.std(0, correction=0), y.mean(0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0.0)
    x, new = (x - mean) * scale, (new - mean) * scale
    values, vectors = torch.linalg.eigh(x.t() @ x / len(x))
    along = vectors.t() @ (x.t() @ (y - offset) / len(x))
    return (
        torch.stack([new @ (vectors @ (along / (values.clamp(min=0) + p).unsqueeze(-1))) for p in PENALTIES]) + offset
    )


# --------------------------------------------------------------------------------------------------- SAGE and its clips
def _collect_clips(model: nn.Module, batches: Iterable[Any], head: ReliabilityHead | None, scale: bool) -> Evidence:
    place, fusion = _find(model)
    if place is not model or not isinstance(model, SAGE):
        raise TypeError("targets: expected the labels of each batch (only a SAGE finds them in it), got None")
    _no_head_for(place, head)
    device = fusion.log_temperature.device
    training = model.training
    model.eval()
    parts = []
    try:
        for batch in batches:
            features, present = moved(batch["features"], device), moved(batch.get("present"), device)
            quality = {name: x.to(device) for name, x in batch.get("quality", {}).items() if model.reads_quality(name)}
            found = model.assess(features, present, moved(batch.get("frame"), device), quality=quality or None)
            reliability, stage, estimates, known = (x.cpu() for x in found)
            parts.append((reliability, stage, estimates, batch["labels"], batch["valid"].unsqueeze(-1) & known))
    finally:
        model.train(training)
    if not parts:
        raise ValueError("batches: expected one or more, got none")
    return _evidence(model, parts, scale)


def _evidence(model: SAGE, parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]], scale: bool) -> Evidence:
    """Of batches of logits (*, K, S), stage (*, S), estimates (*, K, C), labels (*, C) and flags (*, K), all on the CPU."""
    columns = zip(*parts)
    reliability, stage, own, labels, mask = (
        torch.cat([x.flatten(0, x.dim() - 1 - rest) for x in column]) for column, rest in zip(columns, (2, 1, 2, 1, 1))
    )
    labels = torch.where(mask.any(-1, keepdim=True), labels, 0.0)  # NaN where not annotated
    if scale:
        model.put_to_scale(own, labels, mask)
    buffers = (model.own_gain, model.own_shift, model.target_variance)
    error = explained_error(own, labels, *(x.cpu() for x in buffers))
    return Evidence(reliability, stage, error, mask)
