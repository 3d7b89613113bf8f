"""Tables of a finished study against the rows of its results.csv, and reliability diagrams pooled by hand."""

import numpy as np
import pytest
from studies import CORRUPTIONS, rows_of

from sage_ext.study.methods import UNTRAINED
from sage_ext.study.plan import evaluation_path
from sage_ext.study.report import pooled_diagram, trust_words
from sage_ext.study.results import calibration_error, read_evaluation
from sage_ext.study.statistics import additive, adjusted_mutual_information, concordance


def test_calibration_error_and_pooled_diagrams():
    diagram = np.array([[0.2, 0.6, np.nan], [0.3, 0.5, np.nan], [10, 30, np.nan]])
    assert calibration_error(diagram) == pytest.approx(0.1)
    assert np.isnan(calibration_error(np.full((2, 3, 4), np.nan))).all()
    rng = np.random.default_rng(0)
    many = np.stack([rng.uniform(0, 1, (4, 15)), rng.uniform(0.1, 0.9, (4, 15)), np.full((4, 15), 20.0)], 1)
    x, y, frames = pooled_diagram(many)
    assert frames.tolist() == [80] * 15
    assert (np.diff(x) > 0).all()
    assert (frames * x).sum() == pytest.approx((many[:, 0] * many[:, 2]).sum())
    # 1 - error / variance is averaged as the errors are
    assert (frames * y).sum() == pytest.approx((many[:, 2] * many[:, 1]).sum())


def test_every_method_seed_and_condition_has_a_row(finished):
    out, tables = finished
    rows = rows_of(out)
    # noise: audio, visual, both; dead-zeroed, foreign, missing: each; stage-zeroed: both orders; and clean
    assert len(rows) == 9 * 2 * (3 + 2 + 2 + 2 + 2 + 1)
    blank = {row["condition"] for row in rows if row["P"] == ""}
    assert blank == {"noise-5-audio+visual"}
    assert {row["method"] for row in rows if row["P"] == ""} == set(UNTRAINED)
    for row in rows:
        if row["P"]:
            assert float(row["P"]) == pytest.approx((float(row["CCC_V"]) + float(row["CCC_A"])) / 2, abs=1e-6)
    titles = [table.title for table in tables]
    for wanted in ("Methods", "Claims", "By corruption", "SAGE against the best peer", "Calibration error by corruption",
                   "What the confidence is worth", "What the stages do, clean",
                   "Confidence and stages against the truth, clean"):  # fmt: skip
        assert wanted in titles
        assert f"{wanted}, with quality" in titles
    assert len(set(titles)) == len(titles)
    assert "By severity" not in titles  # there is one
    text = (out / "report.md").read_text()
    assert all(f"## {title}\n" in text for title in titles)
    for picture in ("methods", "differences", "corruptions", "calibration", "calibration-corruptions", "stages"):
        for name in (picture, f"{picture}-with-quality"):
            assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert f"({name}.png)" in text
    assert not list(out.rglob(".*.tmp"))


def test_the_tables_are_means_and_differences_of_the_rows(finished):
    out, tables = finished
    p: dict[tuple[str, str, str], list[float]] = {}
    for row in rows_of(out):
        if row["P"]:
            p.setdefault((row["method"], row["corruption"], row["modalities"]), []).append(float(row["P"]))

    def mean(method, kind, *modalities):
        found = [v for key, v in p.items() if key[:2] == (method, kind) and (not modalities or key[2] in modalities)]
        return np.mean(found)

    def first(cell):
        return float(cell.split()[0])

    table = {title.title: {row[0]: row for row in title.rows} for title in tables}
    everywhere = {m: np.mean([mean(m, kind) for kind in CORRUPTIONS]) for m in ("sage", "concat", "audio-only")}
    for name, method in (("SAGE", "sage"), ("concatenation", "concat"), ("audio only", "audio-only")):
        row = table["Methods"][name]
        assert first(row[3]) == pytest.approx(mean(method, ""), abs=6e-4)
        assert first(row[3].partition("±")[2]) == pytest.approx(np.std(p[method, "", ""], ddof=1), abs=6e-4)
        assert first(row[4]) == pytest.approx(everywhere[method], abs=6e-4)
        if method != "sage":
            assert first(row[6]) == pytest.approx(everywhere["sage"] - everywhere[method], abs=6e-4)
            low, high = (float(x) for x in row[6].partition("[")[2].rstrip("]").split(","))
            assert low <= first(row[6]) <= high
            assert low < high
        assert first(table["By corruption"][name][3]) == pytest.approx(mean(method, CORRUPTIONS[2]), abs=6e-4)
    dead = "one dead for the whole clip"
    (claim,) = (row for name, row in table["Claims"].items() if "surviving" in name and dead in name)
    gaps = [mean("sage", "dead-zeroed", m) - mean(f"{other}-only", "dead-zeroed", m)
            for m, other in (("audio", "visual"), ("visual", "audio"))]  # fmt: skip
    assert first(claim[1]) == pytest.approx(np.mean(gaps), abs=6e-4)
    assert claim[3] == ("met" if np.mean(gaps) >= -0.02 else "missed")
    sage, concat, told = (everywhere.get(name) or np.mean([mean(name, kind) for kind in CORRUPTIONS])
                          for name in ("sage", "concat", "sage-told"))  # fmt: skip
    (share,) = (row for name, row in table["Claims"].items() if name.startswith("share of the gap"))
    if told > concat:
        assert first(share[1]) == pytest.approx((sage - concat) / (told - concat), rel=0.02, abs=6e-4)
        assert share[3] == ("met" if (sage - concat) / (told - concat) >= 0.6 else "missed")
    else:
        assert share[3] == ""
    both = mean("sage", "noise", "audio+visual") - mean("concat", "noise", "audio+visual")
    assert first(table["Claims"]["SAGE less concatenation, noise in all modalities"][1]) == pytest.approx(
        both, abs=6e-4
    )
    gaps = [mean("sage", kind) - mean("concat", kind) for kind in CORRUPTIONS]
    counted = table["Claims"]["kinds of corruption in which SAGE is above the best peer of each"]
    assert counted[1:] == (f"{sum(gap > 0 for gap in gaps)} of 5", ">= 10 of 18", "")
    (worst,) = (row for name, row in table["Claims"].items() if name.startswith("the worst of these"))
    assert first(worst[1]) == pytest.approx(min(gaps), abs=6e-4)
    assert CORRUPTIONS[int(np.argmin(gaps))] in worst[0]
    # each half by itself
    row = table["Methods, with quality"]["concatenation, with quality"]
    everywhere |= {m: np.mean([mean(m, kind) for kind in CORRUPTIONS]) for m in ("sage+q", "concat+q")}
    assert first(row[6]) == pytest.approx(everywhere["sage+q"] - everywhere["concat+q"], abs=6e-4)
    assert set(table["Methods, with quality"]) - set(table["Methods"]) == {
        "SAGE, with quality", "concatenation, with quality",
    }  # fmt: skip
    ceilings = {"SAGE, told the true noise", "oracle (true noise known, both directions)",
                "causal filter (true noise known)"}  # fmt: skip
    assert set(table["Methods, with quality"]) & set(table["Methods"]) == ceilings


def test_the_controls_table_is_the_difference_of_their_moments(finished):
    out, tables = finished
    table = {title.title: title for title in tables}
    for method, end in (("sage", ""), ("sage+q", ", with quality")):
        held = [read_evaluation(evaluation_path(out, seed, None))[method] for seed in range(2)]
        rows = table[f"What the confidence is worth{end}"].rows
        for row, control in zip(rows, ("another", "shuffled", "held")):
            plain, other = (
                np.mean([concordance(additive(file[name]).sum(0)).mean() for file in held])
                for name in ("moments", f"moments {control}")
            )
            assert float(row[1]) == pytest.approx(other, abs=6e-4)
            assert float(row[2].split()[0]) == pytest.approx(plain - other, abs=6e-4)
        costs = [float(row[2].split()[0]) for row in rows[:2]]
        (claim,) = (row for row in table[f"Claims{end}"].rows if row[0].startswith("permuted confidence"))
        assert float(claim[1].split()[0]) == pytest.approx(min(costs), abs=1e-9)


def test_stages_that_trust_alike_are_one(finished):
    out, tables = finished
    table = {title.title: title for title in tables}
    held = read_evaluation(evaluation_path(out, 0, None))["sage"]
    counts = held["contingency"]  # true: speaking, listening, turn-taking, silence
    merged = np.stack([counts[:, 0], counts[:, 1] + counts[:, 3], counts[:, 2]], 1)
    row = table["Confidence and stages against the truth, clean"].rows[0]
    assert row[2] == pytest.approx(adjusted_mutual_information(merged))
    assert row[1] == pytest.approx(adjusted_mutual_information(counts))
    did = [r for r in table["What the stages do, clean"].rows if r[0] == "0"]
    assert sum(float(r[2]) for r in did) == pytest.approx(1, abs=2e-3)
    frames, whole, sums = held["trust"][:, 0], held["trust"][:, 1], held["trust"][:, 2:]
    np.testing.assert_allclose(frames, counts.sum(1))
    for r in did:
        s = int(r[1]) - 1
        if whole[s]:
            assert float(r[3]) == pytest.approx(sums[s, 0] / whole[s], abs=6e-4)


def test_a_stage_is_named_by_what_it_trusts():
    names, average = ["audio", "face", "text"], np.array([0.4, 0.4, 0.2])
    assert trust_words(np.array([0.3, 0.5, 0.2]), average, names) == "trusts face"
    assert trust_words(np.array([0.46, 0.46, 0.08]), average, names) == "trusts audio and face"
    assert trust_words(np.array([0.42, 0.38, 0.2]), average, names) == "as on average"
    assert trust_words(np.full(3, np.nan), average, names) == "hardly occurs"
