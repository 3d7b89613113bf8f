"""Tables of a finished study against the rows of its results.csv, and reliability diagrams pooled by hand."""

import numpy as np
import pytest
from studies import CORRUPTIONS, rows_of

from sage_ext.study.methods import ORACLE
from sage_ext.study.report import pooled_diagram
from sage_ext.study.results import calibration_error


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
    assert (frames / y).sum() == pytest.approx((many[:, 2] / many[:, 1]).sum())  # mean squared errors are averaged


def test_every_method_seed_and_condition_has_a_row(finished):
    out, tables = finished
    rows = rows_of(out)
    # noise: audio, visual, both; dead-zeroed, foreign, missing: each; stage-zeroed: both orders; and clean
    assert len(rows) == 5 * 2 * (3 + 2 + 2 + 2 + 2 + 1)
    blank = {row["condition"] for row in rows if row["P"] == ""}
    assert blank == {"noise-5-audio+visual"}
    assert {row["method"] for row in rows if row["P"] == ""} == {ORACLE}
    for row in rows:
        if row["P"]:
            assert float(row["P"]) == pytest.approx((float(row["CCC_V"]) + float(row["CCC_A"])) / 2, abs=1e-6)
    titles = [table.title for table in tables]
    for wanted in ("Methods", "Claims", "By corruption", "SAGE against the best peer", "Calibration error by corruption",
                   "Confidence and stages against the truth, clean"):  # fmt: skip
        assert wanted in titles
    assert "By severity" not in titles  # there is one
    text = (out / "report.md").read_text()
    assert all(f"## {title}\n" in text for title in titles)
    for picture in ("methods", "differences", "corruptions", "calibration", "calibration-corruptions", "stages"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({picture}.png)" in text
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
    # concat to oracle where there is one and frames hit are empty: not with noise
    known = {kind: [m for (name, k, m) in p if name == ORACLE and k == kind] for kind in CORRUPTIONS}
    assert set(known.pop("noise")) == {"audio", "visual"}
    sage, concat, oracle = (
        np.mean([np.mean([mean(name, kind, m) for m in known[kind]]) for kind in known])
        for name in ("sage", "concat", ORACLE)
    )
    (share,) = (row for name, row in table["Claims"].items() if name.startswith("share of the gap"))
    assert first(share[1]) == pytest.approx((sage - concat) / (oracle - concat), abs=2e-3)
