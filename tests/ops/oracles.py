"""Slow float64 oracles in numpy, written from the specification and sharing nothing with sage_ext.

One loop a frame or row, no attempt at speed: what the ops must compute, said a second time.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import expit, log_expit, log_softmax, logsumexp


def array(x):
    """float64 (or bool) numpy copy of a tensor; None stays None."""
    if x is None:
        return None
    return x.detach().cpu().numpy().copy() if x.dtype == torch.bool else x.detach().cpu().double().numpy()


def stage_filter(emission, transition, initial=None, mask=None):
    emission, transition, initial, mask = map(array, (emission, transition, initial, mask))
    batch, frames, stages = emission.shape
    log_a = log_softmax(transition, axis=1)
    posterior = np.zeros((batch, frames, stages))
    final = np.zeros((batch, stages))
    for b in range(batch):
        start = np.zeros(stages) if initial is None else initial if initial.ndim == 1 else initial[b]
        belief = log_softmax(start)
        for t in range(frames):
            prior = logsumexp(belief[:, None] + log_a, axis=0)
            evidence = emission[b, t] if mask is None or mask[b, t] else 0.0
            belief = log_softmax(prior + evidence)
            posterior[b, t] = np.exp(belief)
        final[b] = belief
    return posterior, final


def reliability_fusion(
    values, reliability, stage=None, *, log_temperature=None, bias=None, sharpness=None, present=None, norm_weight=None,
    norm_bias=None, eps=1e-5,
):  # fmt: skip
    values = [array(v) for v in values]
    reliability, stage, log_temperature, bias, sharpness, present, norm_weight, norm_bias = map(
        array, (reliability, stage, log_temperature, bias, sharpness, present, norm_weight, norm_bias)
    )
    modalities, stages = reliability.shape[-2:]
    lead, dim = values[0].shape[:-1], values[0].shape[-1]
    fused, weights, confidence = np.zeros((*lead, dim)), np.zeros((*lead, modalities)), np.zeros((*lead, modalities))
    tau = np.ones((modalities, stages)) if log_temperature is None else np.exp(-log_temperature)
    bias = np.zeros((modalities, stages)) if bias is None else bias
    sharpness = np.broadcast_to(np.ones(()) if sharpness is None else sharpness, (modalities,))
    for row in np.ndindex(*lead):
        pi = np.full(stages, 1 / stages) if stage is None else stage[row]
        here = [m for m in range(modalities) if present is None or present[row][m]]
        if not here:
            continue
        score = []
        for m in here:
            logit = reliability[row][m] * tau[m] + bias[m]
            confidence[row][m] = np.sum(pi * expit(logit))
            score.append(sharpness[m] * (logsumexp(log_expit(logit), b=pi) - logsumexp(log_expit(-logit), b=pi)))
        for m, w in zip(here, np.exp(log_softmax(np.array(score)))):
            weights[row][m] = w
            x = values[m][row]
            if norm_weight is not None:
                x = (x - x.mean()) / np.sqrt(x.var() + eps) * norm_weight[m] + norm_bias[m]
            fused[row] += w * x
    return fused, weights, confidence


def _element_mask(mask, like):
    if mask is None:
        return np.ones(like.shape, bool)
    mask = array(mask)
    return np.broadcast_to(mask if mask.ndim == like.ndim else mask[..., None], like.shape)


def _ccc(p, t, w):
    """CCC of the frames with weight w > 0 (1-D); 0 for fewer than two frames or a zero denominator."""
    p, t, w = p[w > 0], t[w > 0], w[w > 0]
    if len(p) < 2 or (np.ptp(p) == 0 and np.ptp(t) == 0 and p[0] == t[0]):
        return 0.0
    w = w / w.sum()
    mp, mt = np.sum(w * p), np.sum(w * t)
    # A constant has no covariance with anything, whatever the rounding of its mean.
    dp = p - mp if np.ptp(p) else np.zeros_like(p)
    dt = t - mt if np.ptp(t) else np.zeros_like(t)
    # mean_p - mean_t as the mean of the difference: exact where p and t are large and close.
    return 2 * np.sum(w * dp * dt) / (np.sum(w * dp**2) + np.sum(w * dt**2) + np.sum(w * (p - t)) ** 2)


def ccc_moments(pred, target, mask=None, *, pool="batch"):
    p, t = array(pred), array(target)
    valid = _element_mask(mask, p)
    channels = p.shape[-1]
    if p.ndim == 2 or pool == "batch":
        p, t, valid = (a.reshape(1, int(np.prod(a.shape[:-1])), channels) for a in (p, t, valid))
    out = np.zeros((p.shape[0], channels, 6))
    for b, c in np.ndindex(p.shape[0], channels):
        x, y = p[b, valid[b, :, c], c], t[b, valid[b, :, c], c]
        if len(x):
            dx, dy = x - x.mean(), y - y.mean()
            out[b, c] = len(x), x.mean(), y.mean(), dx @ dx, dy @ dy, dx @ dy
    return out[0] if pred.dim() == 2 or pool == "batch" else out


def ccc(pred, target, mask=None, *, pool="batch"):
    p, t = array(pred), array(target)
    valid = _element_mask(mask, p)
    channels = p.shape[-1]
    if p.ndim == 2 or pool == "batch":
        p, t, valid = (a.reshape(1, int(np.prod(a.shape[:-1])), channels) for a in (p, t, valid))
    out = np.array(
        [[_ccc(x[:, c], y[:, c], v[:, c].astype(float)) for c in range(channels)] for x, y, v in zip(p, t, valid)]
    )
    out = out.reshape(p.shape[0], channels)
    return out[0] if pred.dim() == 2 or pool == "batch" else out


def temporal_ccc(pred, target, mask=None, *, window=None, halflife=None):
    """rho by recomputing the weighted CCC of the whole past at each frame: O(T^2)."""
    p, t = array(pred), array(target)
    valid = _element_mask(mask, p)
    batch, frames, channels = p.shape
    rho = np.zeros(p.shape)
    for b, c in np.ndindex(batch, channels):
        for now in range(frames):
            first = 0 if window is None else max(0, now + 1 - window)
            index = np.flatnonzero(valid[b, first : now + 1, c]) + first
            if len(index) < 2:
                continue
            # Ages from the newest valid frame: the common factor of all weights cancels.
            age = index[-1] - index
            w = np.ones(len(index)) if halflife is None else 0.5 ** (age / halflife)
            rho[b, now, c] = _ccc(p[b, index, c], t[b, index, c], w)
    return rho


def leaky_average(x, precision, halflife, prior, state=None, *, causal=True, relative=False):
    """Every average by its own sum over all frames: O(T^2)."""
    x, precision, halflife, prior, state = map(array, (x, precision, halflife, prior, state))
    batch, frames, dim = x.shape
    average = np.zeros((batch, frames, len(halflife), dim))
    after = np.zeros((batch, len(halflife), dim + 2))
    for b, r in np.ndindex(batch, len(halflife)):
        decay = 0.5 ** (1 / halflife[r])
        past = np.zeros(dim + 2) if state is None else state[b, r]
        seen = np.flatnonzero(precision[b] > 0)

        def total(now, index):
            """Sum, weight and count of the frames `index`, as frame `now` sees them."""
            share = decay ** np.abs(now - index)  # noqa: B023
            p = precision[b, index]  # noqa: B023
            return np.concatenate([(share * p) @ x[b, index], [np.sum(share * p), np.sum(share)]])  # noqa: B023

        for t in range(frames):
            whole = past * decay ** (t + 1) + total(t, seen[seen <= t] if causal else seen)
            weight, count = whole[-2:]
            mean = (weight / count if count > 0 else 0.0) if relative else 1.0
            if prior[r] * mean + weight > 0:
                average[b, t, r] = whole[:-2] / (prior[r] * mean + weight)
        after[b, r] = past * decay**frames + (total(frames - 1, seen) if frames else 0)
    return average, after
