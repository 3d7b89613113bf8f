"""What is kept of a stream, in bounded memory: the last frames, and the latency of all."""

import numpy as np
import pytest

from sage_ext.live.estimator import Latency, Trace


def test_trace_keeps_the_last_frames():
    for keep, taken in ((10, 7), (10, 25), (5000, 3000), (2000, 4500)):
        trace = Trace(2, 3, keep)
        for i in range(taken):
            trace.add([i, *[i / 10] * 9, 1, 0])
        kept = trace.recording()
        assert kept.number.tolist() == list(range(taken))[-keep:]
        assert len(trace.rows) <= keep
        assert kept.prediction[-1].tolist() == [(taken - 1) / 10] * 2
        assert kept.present.tolist()[-1] == [True, False]


def test_latency_quantiles():
    rng = np.random.default_rng(0)
    us = np.exp(rng.normal(4, 1, 5000))
    latency = Latency()
    for x in us:
        latency.add(float(x))
    for q in (0.5, 0.9, 0.99):
        assert latency.quantile(q) == pytest.approx(np.quantile(us, q), rel=0.025)
    counts, edges = latency.bars()
    assert counts.sum() == len(us)
    assert edges[0] <= us.min() < edges[1]
    assert edges[-2] <= us.max() < edges[-1]
    for odd in (0.0, 1e12):
        latency.add(odd)
    assert latency.largest == 1e12
    assert Latency().text() == []
