"""A study so small that it takes seconds, and its results."""

from __future__ import annotations

import csv

from sage_ext.study.plan import Study

SIZES = {"dim": 8, "stages": 2, "blocks": 2, "window": 2, "hop": 4 / 3, "batch_size": 4, "max_steps": 6, "epochs": 9}
METHODS = ("sage", "concat", "audio-only", "visual-only", "sage+q", "concat+q", "sage-told")
CORRUPTIONS = ("noise", "dead-zeroed", "foreign", "stage-zeroed", "missing")


def tiny(data, **changes):
    values = {
        "methods": METHODS, "seeds": 2, "rates": (2e-3, 5e-3),
        "severities": (5,), "corruptions": CORRUPTIONS, "train": SIZES,
    }  # fmt: skip
    return Study(str(data), **{**values, **changes})


def rows_of(out):
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))
