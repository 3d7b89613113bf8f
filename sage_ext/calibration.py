"""Post-hoc calibration of confidence, and how to measure it.

A confidence `r` states that its modality's error has variance `kappa^2 (1 - r) / r`. It is calibrated when that is true
on average over the frames that share an `r`: `E[e^2 | r] = kappa^2 (1 - r) / r`, or, read as a reliability,
`r = 1 / (1 + E[e^2 | r] / kappa^2)`. Confidence is learnt on training clips, where errors are smaller than on new ones;
`fit_calibration` corrects it on validation clips, by a temperature and a bias for each modality and stage, against the
same proper score that trained it (`sage_ext.nn.ReliabilityNLL`).

The measure is the counterpart of classification's expected calibration error for a predicted *variance*: Levi, Gispan,
Giladi & Fetaya 2022 ("Evaluating and calibrating uncertainty prediction in regression tasks") bin by predicted
variance and compare it with the mean squared error in the bin, relative to the predicted (ENCE). Here both sides are
mapped to [0, 1] by the same `1 / (1 + variance / kappa^2)`, so a bin cannot dominate by a large ratio and the number
reads like the usual ECE; bins hold equal numbers of frames (equal mass), so none is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import BOOL, check_int, check_kappa, check_number, check_shape, check_tensor
from .models.sage import SAGE
from .nn import ReliabilityFusion, ReliabilityNLL, calibrated_confidence

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
    observed: Tensor  # (K,) 1 / (1 + mean squared error / kappa^2)
    frames: Tensor  # (K,) int64 frames in the bin
    lower: Tensor  # (K,) smallest confidence in the bin
    upper: Tensor  # (K,) largest


class CalibrationReport(NamedTuple):
    """What `calibrate` did; one entry a modality in each list."""

    log_temperature: Tensor  # (M, S) now in the model
    bias: Tensor  # (M, S) now in the model
    before: list[ReliabilityDiagram]
    after: list[ReliabilityDiagram]
    ece_before: list[float]
    ece_after: list[float]


class Evidence(NamedTuple):
    """A model's raw reliability and errors on `N` frames, on the CPU."""

    reliability: Tensor  # (N, M, S) logits before calibration
    stage: Tensor  # (N, S)
    squared_error: Tensor  # (N, M, C) of the unimodal predictions
    mask: Tensor  # (N, M) bool: annotated frames in which the modality is present


def fit_calibration(
    reliability: Tensor,
    stage: Tensor,
    squared_error: Tensor,
    mask: Tensor | None = None,
    *,
    kappa: float,
    prior: float = 100.0,
    max_iter: int = 200,
) -> tuple[Tensor, Tensor]:
    """Fit `log_temperature` and `bias`, (M, S) float32 each, by the proper score on held-out frames.

    Minimises the mean over counted frames of `ReliabilityNLL(kappa)` plus `prior / (2 n)` times the squared distance
    from identity (0, 0): the weight of `prior` frames, which decides where a stage hardly occurs. L-BFGS in float64 on
    the CPU, deterministic; the score is never worse than at identity.

    Args:
        reliability: (*, M, S) raw logits, before any calibration.
        stage: (*, S) posterior.
        squared_error: (*, M), or (*, M, C) for C targets, of the modality's own prediction.
        mask: (*, M) bool; False: not counted (not read).
        kappa: error scale of confidence (`model.kappa`).
    """
    score = ReliabilityNLL(kappa)
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


def reliability_diagram(
    confidence: Tensor, squared_error: Tensor, mask: Tensor | None = None, *, kappa: float, bins: int = 15
) -> ReliabilityDiagram:
    """Confidence of one modality against the reliability that its errors show.

    confidence: (*,) in [0, 1]; squared_error: (*,), or (*, C); mask: (*,) bool. Frames are sorted by confidence and cut
    into `bins` equal parts (at most one frame of difference; fewer bins where there are fewer frames).
    """
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
        observed=torch.stack([1 / (1 + e.mean() / kappa**2) for _, e in parts]),
        frames=torch.tensor([len(p) for p, _ in parts]),
        lower=torch.stack([p[0] for p, _ in parts]),
        upper=torch.stack([p[-1] for p, _ in parts]),
    )


def expected_calibration_error(diagram: ReliabilityDiagram) -> float:
    """Mean over bins, by frames, of |mean confidence - observed reliability|: 0 is perfect, 1 the worst."""
    gap = (diagram.predicted - diagram.observed).abs()
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
def collect(model: SAGE, batches: Iterable[Mapping[str, Any]]) -> Evidence:
    """Run the model in evaluation mode over batches of `sage_ext.data.windows.collate`; gather what calibration needs.

    A batch holds "features" by name, "labels" (B, T, C), "valid" (B, T) bool, optionally "present" and "frame"; each
    row is a sequence of its own. Whole clips (B = 1) show the confidence that a running stream has; windows start cold.
    """
    device = _fusion(model).log_temperature.device
    training = model.training
    model.eval()
    parts = []
    try:
        for batch in batches:
            features = {name: x.to(device) for name, x in batch["features"].items()}
            present, frame = (batch[key].to(device) if key in batch else None for key in ("present", "frame"))
            reliability, stage, unimodal, known = model.assess(features, present, frame)
            error = (unimodal - batch["labels"].to(device).unsqueeze(2)).square()
            mask = batch["valid"].to(device).unsqueeze(-1) & known
            parts.append([x.flatten(0, 1).cpu() for x in (reliability, stage, error, mask)])
    finally:
        model.train(training)
    if not parts:
        raise ValueError("batches: expected one or more, got none")
    return Evidence(*(torch.cat(column) for column in zip(*parts)))


def calibrate(
    model: SAGE, batches: Iterable[Mapping[str, Any]], *, prior: float = 100.0, bins: int = 15
) -> CalibrationReport:
    """Fit the model's calibration in place on validation batches (see `collect`), whatever it held before.

    The report measures on the frames that were fitted; measure on others with `collect` and `diagrams`.
    """
    fusion = _fusion(model)
    evidence = collect(model, batches)
    before = diagrams(evidence, fusion.log_temperature, fusion.bias, kappa=model.kappa, bins=bins)
    log_temperature, bias = fit_calibration(*evidence, kappa=model.kappa, prior=prior)
    with torch.no_grad():
        fusion.log_temperature.copy_(log_temperature)
        fusion.bias.copy_(bias)
    after = diagrams(evidence, log_temperature, bias, kappa=model.kappa, bins=bins)
    return CalibrationReport(
        log_temperature,
        bias,
        before,
        after,
        [expected_calibration_error(d) for d in before],
        [expected_calibration_error(d) for d in after],
    )


def diagrams(
    evidence: Evidence, log_temperature: Tensor, bias: Tensor, *, kappa: float, bins: int = 15
) -> list[ReliabilityDiagram]:
    """One reliability diagram a modality, of collected evidence under a calibration."""
    confidence = calibrated_confidence(
        evidence.reliability.double(), evidence.stage.double(), log_temperature.cpu().double(), bias.cpu().double()
    )
    return [
        reliability_diagram(confidence[:, m], evidence.squared_error[:, m], evidence.mask[:, m], kappa=kappa, bins=bins)
        for m in range(confidence.shape[1])
    ]


def _fusion(model: SAGE) -> ReliabilityFusion:
    if not isinstance(model, SAGE):
        raise TypeError(f"model: expected a SAGE, got {type(model).__name__}")
    if not isinstance(model.fusion, ReliabilityFusion):
        raise ValueError(
            f"model: expected fusion='reliability', with a confidence to calibrate, got {model.config['fusion']!r}"
        )
    return model.fusion
