"""Temporary: reference-backed. Replaced by the kernels."""
from .reference import *  # noqa: F403
from . import reference as _r

reliability_fusion = _r.reliability_fusion
stage_filter = _r.stage_filter
ccc, ccc_moments, merge_moments, ccc_from_moments = _r.ccc, _r.ccc_moments, _r.merge_moments, _r.ccc_from_moments


def temporal_ccc(pred, target, mask=None, *, window=None, halflife=None, state=None):
    return _r.temporal_ccc(pred, target, mask, window=window, halflife=halflife), None
