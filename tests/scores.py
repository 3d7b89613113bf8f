"""Concordance by its definition, in numpy."""

import numpy as np


def numpy_ccc(p, t):
    p, t = np.asarray(p, np.float64).ravel(), np.asarray(t, np.float64).ravel()
    if len(p) < 2:
        return 0.0
    denominator = p.var() + t.var() + (p.mean() - t.mean()) ** 2
    return 2 * np.mean((p - p.mean()) * (t - t.mean())) / denominator if denominator > 0 else 0.0
