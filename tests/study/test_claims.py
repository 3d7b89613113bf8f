"""The table of claims on made-up scores: each target met and missed, counted and compared within its half."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from studies import tiny

from sage_ext.study.corruptions import PROTOCOL, conditions
from sage_ext.study.methods import HALVES
from sage_ext.study.report import ALL, Scores, _claims
from sage_ext.study.results import control_name

PEERS = ("concat", "can")
SHARES = {"sage": 0.0, "concat": -0.06, "can": -0.05, "can-plus": -0.02, "sage-one-stage": -0.01, "sage-told": 0.03}


def diagrams(error, failing=()):
    """(2, M, 3, 1): before and after fitting, a confidence that is off by `error`; `failing` ones by .2."""
    found = np.full((2, 2, 3, 1), 100.0)
    found[..., 0, 0], found[..., 1, 0] = 0.5, 0.5 + error
    for m in failing:
        found[1, m, 1, 0] = 0.7
    return found


def made(data, half="", changes=None, worse=(), error=0.02, seeds=2):
    """P of every method in every condition: .6 and its entry in `SHARES`, with `changes`; in the kinds in `worse` SAGE has
    less than its peers."""
    every = [None, *conditions(["audio", "visual"], None, (3,))]
    shares = {**SHARES, **(changes or {})}
    measured, drawn = {}, {}
    for name, share in shares.items():
        value = np.full((seeds, len(every)), 0.6 + share)
        for k, condition in enumerate(every):
            if name == "sage" and condition is not None and condition.corruption in worse:
                value[:, k] = 0.5
        key = name if name == "sage-told" else name + half
        measured[key] = value
        drawn[key] = value[:1] + np.zeros((20, 1))
    for control, cost in (("another", 0.08), ("shuffled", 0.04), ("held", 0.01)):
        key = control_name("sage" + half, control)
        measured[key], drawn[key] = (values["sage" + half] - cost for values in (measured, drawn))
    names = [name if name == "sage-told" else name + half for name in shares]
    kinds, groups = {}, {"clean": [[0]]}
    for k, condition in enumerate(every[1:], start=1):
        kinds.setdefault(condition.corruption, []).append(k)
    groups[ALL] = list(kinds.values())
    groups |= {kind: [index] for kind, index in kinds.items()}
    clean = {
        "contingency": np.array([[40, 0, 0, 0], [0, 30, 0, 30]]), "spearman": np.array([0.7, 0.9, 0.85]),
        "trust": np.array([[40, 30, 20, 10], [60, 50, 10, 40.0]]), "stage_diagram": diagrams(error)[None],
    }  # fmt: skip
    confidence = {}
    for n in range(seeds):
        for k, condition in enumerate(every):
            failing = [] if condition is None or condition.corruption != "foreign" else [0, 1]
            confidence[n, k] = {"diagram": diagrams(error, failing), **(clean if k == 0 else {})}
    results = SimpleNamespace(
        study=dataclasses.replace(tiny(data), seeds=seeds), modalities=["audio", "visual"], methods=names,
        conditions=every, groups=["a", "b"], confidence={"sage" + half: confidence}, fits=seeds,
        trusts=[frozenset({"audio"}), frozenset({"visual"}), frozenset(), frozenset({"visual"})],
    )  # fmt: skip
    return Scores(results, measured, drawn, groups, half)


def said(scores):
    """{claim: (measured, target, met or missed)}."""
    (table,) = _claims(scores)
    assert len({row[0] for row in table.rows}) == len(table.rows)
    return {row[0]: row[1:] for row in table.rows}


def found(claims, start):
    (row,) = (row for claim, row in claims.items() if claim.startswith(start))
    return row


@pytest.mark.parametrize("half", HALVES)
def test_what_is_well_meets_its_targets(data, half):
    claims = said(made(data, half))
    end = f", {HALVES[half]}" if half else ""
    assert found(claims, f"SAGE less the best peer (CAN attention{end}), clean") == (
        "+0.050 [+0.050, +0.050]", ">= +0.012, interval above 0", "met",
    )  # fmt: skip
    assert found(claims, f"SAGE less the best peer (CAN attention{end}), all")[1:] == (
        ">= +0.04, interval above 0", "met",
    )  # fmt: skip
    assert found(claims, "kinds of corruption") == ("18 of 18", f">= {12 if half else 10} of 18", "met")
    assert found(claims, "the worst of these")[2] == ("met" if half else "")
    for kind in ("noise", "occluded", "gain"):
        for title in (f"concatenation{end}", f"CAN attention{end}"):
            assert claims[f"SAGE less {title}, {kind} in all modalities"][1:] == ("above 0", "met")
    assert found(claims, "SAGE less CAN attention, SAGE's memory")[1:] == (">= +0.01, interval above 0", "met")
    assert found(claims, "SAGE less SAGE with one stage")[2] == "met"
    assert found(claims, "share of the gap") == ("+0.667 [+0.667, +0.667]", ">= +0.6", "met")
    assert found(claims, "permuted confidence costs, clean (its own shares") == (
        "+0.040 [+0.040, +0.040]", ">= +0.03, interval above 0", "met",
    )  # fmt: skip
    assert found(claims, "calibration error after fitting, clean") == ("0.020", "<= 0.03", "met")
    assert found(claims, "the same, the worst corruption but foreign") == ("0.020", "<= 0.1", "met")
    assert found(claims, "agreement of the stages") == ("1.000 ± 0.000", ">= 0.5", "met")
    assert found(claims, "rank correlation") == ("0.850 ± 0.000", ">= 0.8", "met")


def test_what_is_not_is_missed(data):
    changes = {"can": -0.011, "can-plus": -0.009, "sage-one-stage": 0.0, "sage-told": 0.05}
    claims = said(made(data, "+q", changes, error=0.15))
    assert found(claims, "SAGE less the best peer (CAN attention, with quality), clean")[2] == "missed"
    assert found(claims, "SAGE less the best peer (CAN attention, with quality), all")[2] == "missed"
    assert found(claims, "SAGE less CAN attention, SAGE's memory")[2] == "missed"
    assert found(claims, "SAGE less SAGE with one stage")[2] == "missed"
    assert found(claims, "share of the gap")[2] == "missed"
    assert found(claims, "calibration error after")[2] == "missed"
    assert found(claims, "the same, the worst corruption")[2] == "missed"


def test_kinds_in_which_a_peer_is_ahead_are_counted(data):
    claims = said(made(data, "+q", worse=(*PROTOCOL[:6], "gain")))
    behind = len({*PROTOCOL[:6], "gain"})
    assert found(claims, "kinds of corruption") == (f"{18 - behind} of 18", ">= 12 of 18", "missed")
    assert found(claims, "the worst of these")[0] == "-0.050 [-0.050, -0.050]"
    assert found(claims, "the worst of these")[2] == "missed"
    assert claims["SAGE less CAN attention, with quality, gain in all modalities"][2] == "missed"
    claims = said(made(data, "", worse=(*PROTOCOL[:6], "gain")))
    assert found(claims, "kinds of corruption")[1:] == (">= 10 of 18", "met")


def test_a_ceiling_below_concat_leaves_no_gap_to_share(data):
    claims = said(made(data, changes={"sage-told": -0.1}))
    assert found(claims, "share of the gap")[2] == ""


def test_a_half_is_compared_with_its_own_peers(data):
    """The second half's best peer is far ahead in the first one, and changes nothing there."""
    first, second = made(data), made(data, "+q", {"can": 0.2})
    results = SimpleNamespace(**vars(first.results))
    results.methods = [*first.results.methods[:-1], *second.results.methods]
    results.confidence = {**first.results.confidence, **second.results.confidence}
    both = dataclasses.replace(
        first, results=results, measured={**second.measured, **first.measured}, drawn={**second.drawn, **first.drawn}
    )
    plain, quality = both.halves()
    assert (plain.reference, quality.reference) == ("sage", "sage+q")
    assert plain.peers() == list(PEERS)
    assert quality.peers() == [f"{name}+q" for name in PEERS]
    assert "sage-told" in plain.methods
    assert "sage-told" in quality.methods
    assert said(plain) == said(first)
    assert said(quality) == said(second)
    assert found(said(quality), "SAGE less the best peer (CAN attention, with quality), clean")[2] == "missed"


def test_tables_of_both_halves_have_titles_of_their_own(finished):
    titles = [table.title for table in finished[1]]
    first = titles.index("Methods, with quality")
    assert all(title.endswith(", with quality") for title in titles[first:])
    assert not any(title.endswith(", with quality") for title in titles[:first])
