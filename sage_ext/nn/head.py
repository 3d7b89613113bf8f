"""Confidence in somebody else's model: each modality's own prediction, and the loss that teaches confidence by its errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._arguments import (
    BOOL,
    Features,
    Present,
    arithmetic_dtype,
    blank_missing,
    check_bool,
    check_device,
    check_int,
    check_number,
    check_optional,
    check_tensor,
    finite_frames,
    named_dims,
    ordered_features,
    read_flags,
)
from .._distributed import check_group
from .._typing import called_as
from .fusion import Fusion, FusionOutput
from .losses import ReliabilityNLL, mean_counted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReliabilityHead(nn.Module):
    """What gives a `ReliabilityFusion` in any model a confidence that means something: add `head(...)` to the loss.

    A Linear a modality predicts the targets from that modality's features alone. With its squared error `e2` (the mean over
    the targets) and the fusion's confidence `r`, the loss is `weight` times the mean over the counted frames of all modalities
    of

        e2 / (2 kappa^2)  +  (odds(r) e2 / kappa^2 - log(odds(r) / kappa^2)) / 2

    Both parts are the negative log-likelihood of one Gaussian model, error variance `kappa^2 / odds(r)` (`ReliabilityNLL`;
    docs/math.md, "The proper score"). The first is it at confidence 1/2, up to a constant, and teaches the prediction; the
    second is it with the error held fixed, and teaches the confidence. Were the prediction to learn from the second too, hard
    frames would hardly count in it, and would stay hard (Seitzer et al. 2022, "On the pitfalls of heteroscedastic uncertainty
    estimation": its beta-NLL with beta = 1 has the gradients of this sum). Both are of the order of 1, and so is 1 - CCC.

    The Linears begin at zero: their first error is the labels' own size, whatever the scale of the features, and confidence
    begins to learn from there.

    A frame of a modality counts where it is annotated, present and finite, and where the fusion took it as present (its
    confidence is not 0). Nothing else of it is read.

    Args:
        fusion: the fusion whose confidence is taught (its `in_dims` and names are taken; it is not made a part of this
            module), or the feature size a modality, a mapping name -> size or a sequence.
        num_targets: number C of targets, 2 for valence and arousal.
        kappa: error scale, in units of the labels, at which confidence is 1/2.
        weight: of the loss. The default is that of the score in `models.SAGELoss`: confidence also decides the fusion, and a
            score as strong as the model's own loss leaves that one little say in it. Raise it in proportion where the model's
            own loss is not of the order of 1.
        detach_features: the Linears' gradient stops at the features, so that unimodal prediction never bends your encoders;
            False: it goes on into them, as an auxiliary loss of each modality.
        process_group: as in `ReliabilityNLL`: the mean is over the counted frames of all ranks. A model with a head that holds a
            group can be neither copied by `deepcopy` nor pickled; the attribute can be set, and set back to None.

    Raises TypeError or ValueError naming the argument for anything malformed.
    """

    def __init__(
        self,
        fusion: Fusion | Mapping[str, int] | Sequence[int],
        num_targets: int = 2,
        kappa: float = 0.25,
        *,
        weight: float = 0.1,
        detach_features: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if isinstance(fusion, Fusion):
            self.names, self.in_dims = fusion.names, list(fusion.in_dims)
        elif isinstance(fusion, (Mapping, Sequence)):
            self.names, self.in_dims = named_dims(fusion)
        else:
            raise TypeError(
                f"fusion: expected a Fusion, or in_dims as a mapping or a sequence, got {type(fusion).__name__}"
            )
        check_int("num_targets", num_targets, 1)
        check_number("weight", weight, ">= 0 and finite", lambda number: 0 <= number < math.inf)
        check_bool("detach_features", detach_features)
        if process_group is not None:
            check_group(process_group)
        self.process_group = process_group
        self.num_targets, self.weight, self.detach_features = num_targets, float(weight), detach_features
        self.score = ReliabilityNLL(kappa)
        self.heads = nn.ModuleList(nn.Linear(d, num_targets) for d in self.in_dims)
        with torch.no_grad():
            for p in self.heads.parameters():
                p.zero_()

    @property
    def kappa(self) -> float:
        """Error scale at which confidence is 1/2."""
        return self.score.kappa

    def extra_repr(self) -> str:
        dims = dict(zip(self.names, self.in_dims)) if self.names else self.in_dims
        options = f"weight={self.weight}, detach_features={self.detach_features}"
        return f"in_dims={dims}, num_targets={self.num_targets}, {options}"

    def predict(self, features: Features) -> Tensor:
        """Each modality's own prediction, (B, T, M, C), or (N, M, C) for features (N, d); float32 (float64 for float64
        features), finite everywhere, meaningful where the modality is present and finite."""
        x = self._ordered(features)
        return self._predict(x, finite_frames(x))

    def forward(
        self,
        features: Features,
        out: FusionOutput,
        labels: Tensor,
        valid: Tensor | None = None,
        present: Present | None = None,
    ) -> Tensor:
        """The loss, a scalar (0, with gradient 0, where nothing counts).

        Args:
            features: what the fusion was given: M tensors (B, T, d) or (N, d), a sequence, or a mapping by name.
            out: what the fusion gave for them.
            labels: (B, T, C) or (N, C). A frame with a label that is not finite is not annotated.
            valid: (B, T) or (N,) bool; False: not annotated, or padding. None: every frame is annotated.
            present: as given to the fusion: (B, T, M) or (N, M) bool, or a mapping name -> (B, T) or (N,). None: as the fusion
                has it.
        """
        x = self._ordered(features)
        lead, modalities = tuple(x[0].shape[:-1]), len(x)
        if not isinstance(out, FusionOutput):
            raise TypeError(f"out: expected the FusionOutput of these features, got {type(out).__name__}")
        if tuple(out.confidence.shape) != (*lead, modalities):
            expected = (*lead, modalities)
            raise ValueError(f"out: expected a confidence of shape {expected}, got {tuple(out.confidence.shape)}")
        check_labels("labels", labels, lead, self.num_targets, x[0])
        flags, _ = read_flags(x, self.names, present, None)
        annotated = annotated_frames(labels, valid)
        finite = finite_frames(x)
        counted = finite & annotated.unsqueeze(-1) & (out.confidence.detach() > 0)
        if flags is not None:
            counted = counted & flags
        predicted = self._predict(x, finite)
        target = torch.where(annotated.unsqueeze(-1), labels, 0.0).to(predicted.dtype)
        error = (predicted - target.unsqueeze(-2)).square()
        loss = error.mean(-1) / (2 * self.kappa**2) + self.score.scores(out.confidence, error, counted)
        return self.weight * mean_counted(loss, counted, self.process_group)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self) -> Any: ...

    def _ordered(self, features: Features) -> list[Tensor]:
        weights = getattr(
            self.heads[0].weight, "dtype", None
        )  # of a dynamically quantised Linear the weight is a method
        return ordered_features(features, self.names, self.in_dims, "features", weights)

    def _predict(self, x: list[Tensor], finite: Tensor) -> Tensor:
        if self.detach_features:
            x = [v.detach() for v in x]
        own = [head(v) for head, v in zip(self.heads, blank_missing(x, finite))]
        return torch.stack([v.to(arithmetic_dtype(v)) for v in own], -2)


def check_labels(name: str, labels: Tensor, lead: tuple[int, ...], targets: int | None, like: Tensor) -> None:
    """(B, T, C) or (N, C) floating labels of features with these leading dimensions; `targets` None: of any number."""
    check_tensor(name, labels)
    letters = "(B, T, C)" if len(lead) == 2 else "(N, C)"
    if labels.dim() != len(lead) + 1 or tuple(labels.shape[:-1]) != lead or targets not in (None, labels.shape[-1]):
        expected = f"{letters} = {(*lead, targets)}" if targets is not None else f"{letters} = {(*lead, 'C')}"
        hint = "" if targets is None else " (C: num_targets of the head)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(labels.shape)}{hint}")
    check_device(name, labels, like, "the features")


def annotated_frames(labels: Tensor, valid: Tensor | None, name: str = "valid") -> Tensor:
    """(*) bool: `valid`, and with finite labels (*, C)."""
    lead = tuple(labels.shape[:-1])
    check_optional(name, valid, lead, "(B, T)" if len(lead) == 2 else "(N,)", labels, "labels", BOOL)
    finite = labels.isfinite().all(-1)
    return finite if valid is None else valid & finite
