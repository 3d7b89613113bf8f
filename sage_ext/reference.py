"""Every op of sage_ext in plain PyTorch, written for reading.

These functions define what the kernels compute: the tests compare the kernels with them in float64, the benchmarks call
them "eager", and a device without kernels runs them. They assume well-formed arguments; `sage_ext.functional` checks.
docs/math.md derives each formula; names are the same there, here and in csrc/math/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import CONSTANTS, Features, Present, ordered_values

# Bounds d log-odds / d stage[s] by exp(60) where a stage of (next to) no probability would explain the frame better than
# all likely ones; no value depends on it.
MAX_LOG_RATIO = 60.0
# Stands for a logit of -inf (an impossible stage, a forbidden transition), whose gradient is then 0 and not NaN.
IMPOSSIBLE = -1e30


# ---------------------------------------------------------------------------------------------------- stage_filter
def stage_filter(
    emission: Tensor, transition: Tensor, initial: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Forward pass of a hidden Markov model. See `sage_ext.functional.stage_filter`."""
    batch, frames, stages = emission.shape
    log_a = F.log_softmax(transition.clamp(min=IMPOSSIBLE), dim=1)
    belief = emission.new_zeros(batch, stages) if initial is None else initial.expand(batch, stages)
    belief = F.log_softmax(belief.clamp(min=IMPOSSIBLE), dim=-1)
    posterior = []
    for t in range(frames):
        prior = torch.logsumexp(belief[:, :, None] + log_a, dim=1)
        evidence = emission[:, t].clamp(min=IMPOSSIBLE)
        evidence = evidence - evidence.detach().amax(-1, keepdim=True)  # it is relative: log 0 for every stage is none
        if mask is not None:
            evidence = torch.where(mask[:, t, None], evidence, 0.0)
        belief = F.log_softmax(prior + evidence, dim=-1)
        posterior.append(belief.exp())
    return (torch.stack(posterior, 1) if frames else emission.clone()), belief


# ---------------------------------------------------------------------------------------------- reliability_fusion
def _log_mixture(stage: Tensor, log_p: Tensor) -> Tensor:
    """log sum_s stage[s] exp(log_p[s]), with gradients that stay finite where stage[s] is 0 or next to it."""
    total = torch.logsumexp(log_p + stage.detach().log(), -1)
    slope = (log_p - total[..., None]).detach().clamp(max=MAX_LOG_RATIO).exp()  # d total / d stage[s]
    return total + (slope * (stage - stage.detach())).sum(-1)


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
    """Stage-adaptive, calibrated, reliability-weighted sum. See `sage_ext.functional.reliability_fusion`."""
    values, present = ordered_values(values, present)
    dtype = values[0].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    reliability = reliability.to(compute)
    stages = reliability.shape[-1]

    logit = reliability if present is None else torch.where(present[..., None], reliability, 0.0)  # (*, M, S)
    if log_temperature is not None:
        logit = logit * torch.exp(-log_temperature.to(compute))
    if bias is not None:
        logit = logit + bias.to(compute)
    stage = reliability.new_full((stages,), 1.0 / stages) if stage is None else stage.to(compute)
    if present is not None:  # a frame with no modality does not need a stage
        stage = torch.where(present.any(-1, keepdim=True), stage, 1.0 / stages)
    stage = stage[..., None, :]  # (*, 1, S), against (*, M, S)

    confidence = (stage * torch.sigmoid(logit)).sum(-1)  # (*, M)
    log_odds = _log_mixture(stage, F.logsigmoid(logit)) - _log_mixture(stage, F.logsigmoid(-logit))
    score = log_odds if sharpness is None else log_odds * sharpness.to(compute)
    if present is None:
        weights = torch.softmax(score, -1)
    else:
        score = score.masked_fill(~present, -torch.inf)
        any_present = present.any(-1, keepdim=True)
        weights = torch.softmax(torch.where(any_present, score, 0.0), -1) * any_present
        confidence = confidence * present

    fused = torch.zeros_like(values[0], dtype=compute)
    for m, value in enumerate(values):
        x = value.to(compute)
        if present is not None:
            x = torch.where(present[..., m, None], x, 0.0)
        if norm_weight is not None and norm_bias is not None:
            x = F.layer_norm(x, x.shape[-1:], norm_weight[m].to(compute), norm_bias[m].to(compute), eps)
        fused = fused + weights[..., m, None] * x
    return fused.to(dtype), weights, confidence


# --------------------------------------------------------------------------------- what a frame says about itself
def typicality(
    inputs: Features,
    mean: Tensor,
    var: Tensor,
    present: Present | None = None,
    *,
    window: int = 16,
    components: Sequence[Tensor] | None = None,
) -> Tensor:
    """How usual a modality's energy and motion of the last `window` frames are: see `sage_ext.nn.Typicality`.

    inputs: M whole sequences (B, T, d), also by name; mean, var: (M, E) of the averaged log energy of a frame, of its step from
    the frame before, and, with `components`, M matrices (k, d) of orthonormal rows or zeros, of what is left of it outside
    them; present: (B, T, M), or (B, T) by name. Returns (B, T, M, 2 E): asinh of the E z-scores, and their sizes.
    """
    inputs, present = ordered_values(inputs, present)
    result = []
    for m, x in enumerate(inputs):
        here = torch.ones_like(x[..., 0], dtype=torch.bool) if present is None else present[..., m]
        x = torch.where(here[..., None], x, 0.0)
        parts = [x, x - F.pad(x, (0, 0, 1, 0))[:, :-1]]
        counted = [here, here & F.pad(here, (1, 0))[:, :-1]]  # a step needs both its frames
        if components is not None:
            basis = components[m].to(x.dtype)
            parts.append(x - torch.einsum("btd,kd,ke->bte", x, basis, basis))
            counted.append(here)
        counts = torch.stack(counted, -1)  # (B, T, E)

        square = torch.stack([part.square().mean(-1) for part in parts], -1)
        energy = torch.where(counts, (square + CONSTANTS["energy_floor"]).log(), 0.0)
        total = F.pad(energy, (0, 0, window - 1, 0)).unfold(1, window, 1).sum(-1)
        count = F.pad(counts.to(x.dtype), (0, 0, window - 1, 0)).unfold(1, window, 1).sum(-1)

        z = (total / count.clamp(min=1) - mean[m]) / var[m].clamp(min=CONSTANTS["variance_floor"]).sqrt()
        z = torch.where(here[..., None] & (count > 0), z, 0.0)
        level = z.asinh().clamp(-CONSTANTS["typicality_limit"], CONSTANTS["typicality_limit"])
        result.append(torch.cat([level, level.abs()], -1))
    return torch.stack(result, 2)


# --------------------------------------------------------------------------------------------- concordance (CCC)
def ccc_moments(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, *, pool: str = "batch", state: Tensor | None = None
) -> Tensor:
    """Count, means and centred second moments of each group. See `sage_ext.functional.ccc_moments`."""
    x, y = pred.double(), target.double()
    valid = torch.ones_like(x) if mask is None else _expand_mask(mask, x).double()
    if mask is not None:
        x, y = torch.where(valid > 0, x, 0.0), torch.where(valid > 0, y, 0.0)
    dims = (-2,) if pool == "sequence" else tuple(range(x.dim() - 1))
    count = valid.sum(dims)  # (..., C)
    (mean_p, dp), (mean_t, dt) = (_centred(v, valid, dims) for v in (x, y))
    moments = torch.stack(
        [count, mean_p, mean_t, (dp * dp).sum(dims), (dt * dt).sum(dims), (dp * dt).sum(dims)], dim=-1
    )
    return moments if state is None else merge_moments(state, moments)


def _centred(x: Tensor, valid: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean of the valid numbers over `dims`, and their distances to it, 0 where not valid. Taken from one of the numbers,
    so that equal numbers have distances of exactly 0, whatever the rounding of their sum."""
    some = torch.where(valid > 0, x.detach(), -torch.inf)
    one = some.amax(dims, keepdim=True) if some.numel() else some.sum(dims, keepdim=True)
    one = torch.where(one == -torch.inf, 0.0, one)  # nothing is valid
    distance = (x - one) * valid
    mean = distance.sum(dims, keepdim=True) / valid.sum(dims, keepdim=True).clamp(min=1)
    return (one + mean).squeeze(dims), (distance - mean) * valid


def _expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    return (mask if mask.dim() == like.dim() else mask.unsqueeze(-1)).expand_as(like)


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """Exact parallel merge of two (..., 6) moments (Chan, Golub & LeVeque 1979)."""
    na, nb = a[..., 0], b[..., 0]
    n = na + nb
    share = nb / n.clamp(min=torch.finfo(a.dtype).tiny)  # of b; 0 where both are empty
    dp, dt = b[..., 1] - a[..., 1], b[..., 2] - a[..., 2]
    # An empty side's means are zeros, not data: take the other side's.
    mean_p = torch.where(na > 0, a[..., 1] + dp * share, b[..., 1])
    mean_t = torch.where(na > 0, a[..., 2] + dt * share, b[..., 2])
    cross = na * share
    return torch.stack(
        [
            n,
            mean_p,
            mean_t,
            a[..., 3] + b[..., 3] + dp * dp * cross,
            a[..., 4] + b[..., 4] + dt * dt * cross,
            a[..., 5] + b[..., 5] + dp * dt * cross,
        ],
        dim=-1,
    )


def ccc_from_moments(moments: Tensor) -> Tensor:
    """(..., C, 6) -> (..., C): Lin's concordance; 0 with gradient 0 where it is undefined."""
    return _concordance(moments, (moments[..., 0] >= 2) & ~(_denominator(moments) <= 0))


def _denominator(moments: Tensor) -> Tensor:
    count, mean_p, mean_t, m2_p, m2_t, _ = moments.unbind(-1)
    return m2_p + m2_t + count * (mean_p - mean_t) ** 2


def _concordance(moments: Tensor, defined: Tensor) -> Tensor:
    return torch.where(defined, 2 * moments[..., 5] / torch.where(defined, _denominator(moments), 1.0), 0.0)


def ccc(pred: Tensor, target: Tensor, mask: Tensor | None = None, *, pool: str = "batch") -> Tensor:
    """Concordance correlation coefficient, Lin 1989. See `sage_ext.functional.ccc`."""
    return ccc_from_moments(ccc_moments(pred, target, mask, pool=pool)).to(pred.dtype)


# ---------------------------------------------------------------------------------------------------- temporal_ccc
def temporal_ccc(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    window: int | None = None,
    halflife: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Running concordance. See `sage_ext.functional.temporal_ccc`.

    The window mode looks at every window (O(T window)); the others run frame by frame.
    """
    x, y = pred.double(), target.double()
    valid = torch.ones_like(x) if mask is None else _expand_mask(mask, x).double()
    x, y = torch.where(valid > 0, x, 0.0), torch.where(valid > 0, y, 0.0)
    if window is not None:
        moments, seen, state = _sliding(x, y, valid, window, state)
    else:
        moments, seen, state = _running(x, y, valid, halflife, state)
    defined = (seen >= 2) & ~(_denominator(moments) <= 0)
    return _concordance(moments, defined).to(pred.dtype), state


def _sliding(x: Tensor, y: Tensor, valid: Tensor, window: int, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Moments (B, T, C, 6) of the last `window` frames; state: the last window - 1 frames (B, C, L, 3)."""
    frames = x.shape[1]
    joined = torch.stack([x, y, valid], -1).transpose(1, 2)  # (B, C, T, 3)
    if state is not None:
        joined = torch.cat([state, joined], 2)
    keep = min(window - 1, joined.shape[2])
    new_state = joined[:, :, joined.shape[2] - keep :].detach().clone()
    padded = F.pad(joined, (0, 0, window - 1, 0))
    if frames == 0:
        return x.new_zeros(*x.shape, 6), valid, new_state
    xs, ys, w = padded.unfold(2, window, 1)[:, :, -frames:].transpose(1, 2).unbind(-2)  # (B, T, C, window) each
    count = w.sum(-1)
    (mean_p, dp), (mean_t, dt) = (_centred(v, w, (-1,)) for v in (xs, ys))
    sums = [(a * b).sum(-1) for a, b in ((dp, dp), (dt, dt), (dp, dt))]
    return torch.stack([count, mean_p, mean_t, *sums], -1), count, new_state


def _running(
    x: Tensor, y: Tensor, valid: Tensor, halflife: float | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments (B, T, C, 6) of all frames so far, the past decaying when a valid frame arrives; state: (B, C, 8)."""
    batch, _, channels = x.shape
    state = x.new_zeros(batch, channels, 8) if state is None else state
    seen, moments, gap = state[..., 0], state[..., 1:7], state[..., 7]
    all_moments, all_seen = [], []
    for x_t, y_t, valid_t in zip(x.unbind(1), y.unbind(1), valid.unbind(1)):
        age = gap + 1
        decay = torch.ones_like(age) if halflife is None else 0.5 ** (age / halflife)
        aged = torch.cat(
            [moments[..., :1] * decay[..., None], moments[..., 1:3], moments[..., 3:] * decay[..., None]], -1
        )
        zero = torch.zeros_like(x_t)
        frame = torch.stack([torch.ones_like(x_t), x_t, y_t, zero, zero, zero], -1)
        moments = torch.where(valid_t[..., None] > 0, merge_moments(aged, frame), moments)
        seen = seen + valid_t
        gap = torch.where(valid_t > 0, 0.0, age)
        all_moments.append(moments)
        all_seen.append(seen)
    new_state = torch.cat([seen[..., None], moments, gap[..., None]], -1).detach()
    if not all_moments:
        return x.new_zeros(*x.shape, 6), valid, new_state
    return torch.stack(all_moments, 1), torch.stack(all_seen, 1), new_state


# --------------------------------------------------------------------------------------------------- leaky_average
def leaky_average(
    x: Tensor,
    precision: Tensor,
    halflife: Tensor,
    prior: Tensor,
    state: Tensor | None = None,
    *,
    causal: bool = True,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalised precision-weighted leaky averages. See `sage_ext.functional.leaky_average`."""
    return _leaky_average(_leaky_sums, x, precision, halflife, prior, state, causal, relative)


def _leaky_average(
    leaky_sums: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    precision: Tensor,
    halflife: Tensor,
    prior: Tensor,
    state: Tensor | None,
    causal: bool,
    relative: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence `leaky_sums` is given: `sage_ext.export` has it for a number of frames that is not known."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    decay, p = 0.5 ** (1.0 / halflife.to(dtype)), precision.to(dtype).unsqueeze(-1)
    unread = p <= 0
    p = torch.where(unread, 0.0, p)
    # What a frame adds to the sum, to the weight and to the count: (B, T, D + 2).
    term = torch.cat([p * torch.where(unread, 0.0, x.to(dtype)), p, 1.0 - unread.to(dtype)], -1)
    if state is None:
        state = term.new_zeros(x.shape[0], len(halflife), term.shape[-1])
    sums, state = leaky_sums(term, decay, state)
    if not causal:
        later, _ = leaky_sums(term.flip(1), decay, torch.zeros_like(state))
        sums = sums + later.flip(1) - term.unsqueeze(2)
    weight, count = sums[..., -2], sums[..., -1]
    if relative:
        prior = prior.to(dtype) * torch.where(count <= 0, 0.0, weight / torch.where(count <= 0, 1.0, count))
    total = (prior.to(dtype) + weight).unsqueeze(-1)
    average = torch.where(total <= 0, 0.0, sums[..., :-2] / torch.where(total <= 0, 1.0, total))
    return average.to(x.dtype), state


def _leaky_sums(term: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """term (B, T, n), decay (R,), state (B, R, n) -> sums (B, T, R, n), and the last of them (B, R, n)."""
    sums = []
    for now in term.unbind(1):
        state = decay[:, None] * state + now.unsqueeze(1)
        sums.append(state)
    return (torch.stack(sums, 1) if sums else term.new_zeros(len(term), 0, *state.shape[1:])), state
