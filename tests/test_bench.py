"""benchmarks/bench.py and problems.py: no time is taken of a wrong answer, and the pages say what the file of results says."""

from __future__ import annotations

import ast
import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
from problems import OPS, TOLERANCE, Op, error  # noqa: E402

SMALL = {"batch": 2, "frames": 9}


def small(op: Op, changes: dict | None = None) -> dict:
    few = {"dim": 8} if "dim" in op.usual else {}
    return {**op.usual, **SMALL, **few, **({"window": 4} if "window" in op.usual else {}), **(changes or {})}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backward", [True, False])
def test_all_implementations_are_right(name, backward):
    runs, errors = OPS[name].runs(small(OPS[name], {"backward": backward}), compiled=False)
    assert list(runs)[:2] == ["sage_ext", "eager"]
    for way in ("sage_ext", "eager"):  # torchmetrics divides by N - 1: another estimator where N is small
        assert errors[way] <= TOLERANCE[torch.float32], errors
    assert len(runs["sage_ext"]()) > 1 if backward else len(runs["sage_ext"]()) == 1


def test_the_eager_model_runs_without_our_kernels(monkeypatch):
    """Or it would be compared with itself."""
    from sage_ext._ops import _door

    calls = []

    class Counted:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(_door._C.cpu, name)

    monkeypatch.setitem(_door.kernels, "cpu", Counted())
    runs, _ = OPS["SAGE"].runs(small(OPS["SAGE"]), compiled=False)
    calls.clear()
    runs["eager"]()
    assert calls == []
    runs["sage_ext"]()
    assert len(calls) > 5


def test_a_wrong_kernel_stops_and_a_wrong_opponent_is_not_timed(monkeypatch):
    ccc = OPS["ccc"]
    wrong = Op(ccc.make, lambda *given: 1.01 * ccc.ours(*given), ccc.eager, small(ccc))
    with pytest.raises(ValueError, match=r"sage_ext is off by 0.01"):
        wrong.runs(wrong.usual, compiled=False)
    opponent = Op(ccc.make, ccc.ours, wrong.ours, small(ccc), truth=ccc.eager, moved=lambda p: 800)
    monkeypatch.setitem(OPS, "ccc", opponent)
    by = {row["implementation"]: row for row in bench.measure("ccc", "usual", 0.01, compiled=False)}
    assert [way for way, row in by.items() if "in_turn_us" in row] == ["sage_ext", "copy"]
    assert float(by["eager"]["error"]) >= 0.01


def test_the_error_sees_small_gradients():
    """A CCC's gradients are a millionth of its value; a gradient that is zero but for rounding has no error of its own."""
    truth = tuple(torch.full((5,), x).double() for x in (1.0, 1e-6, 1e-19))

    def of(*values: float) -> float:
        return error(tuple(torch.full((5,), x) for x in values), truth)

    assert of(1, 1.1e-6, 0) == pytest.approx(0.1, rel=1e-3)
    assert of(1.001, 1e-6, 0) == pytest.approx(1e-3, rel=1e-3)
    assert of(1, 1e-6, 1e-15) == pytest.approx(1e-5, rel=0.1)
    assert error(truth[:2], truth) == float("inf")


@pytest.fixture
def results(tmp_path):
    """Two sittings: of one the middle of three runs is 20 us, of the other, at a later commit, ours takes 40."""
    path = tmp_path / "bench.csv"
    common = {"date": "2026-01-01", "cpu": "one", "cores": 2, "isa": "avx2", "python": "3.11", "torch": "2.13", "op": "ccc",
              "problem": "usual", "rounds": 9, "bytes": 800}  # fmt: skip
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, bench.FIELDS)
        rows.writeheader()
        for commit, times in (("aaa", (30, 10, 20)), ("bbb", (40,))):
            for run, ours in enumerate(times, 1):
                for way, ratio in (("sage_ext", 1), ("eager", 4.5), ("compile", 2)):
                    rows.writerow({**common, "commit": commit, "run": run, "allocator": "keep", "implementation": way,
                                   "in_turn_us": ours * ratio, "alone_us": ours * ratio / 2, "ratio": ratio})  # fmt: skip
                rows.writerow({**common, "commit": commit, "run": run, "allocator": "keep", "implementation": "torchmetrics",
                               "error": 0.3})  # fmt: skip
    return bench.read(path)


def test_the_tables(results, tmp_path):
    table = bench.table(results)
    assert "| ccc | usual | 40 us | 20 us | 4.5x | 2.0x | off by 0.3 |" in table
    assert "commit bbb" in table
    assert "aaa" not in table
    assert "| ccc | keep | 40 us | 4.5x (4: met) | 2.0x (2.5: **missed**) | - |" in bench.targets(results)
    assert "| ccc | usual | 20 us | 40 us | 2.00 |" in bench.compare(results, "aa")
    with pytest.raises(SystemExit, match=r"aaa, bbb"):
        bench.compare(results, "c")
    bench.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_appends(results, tmp_path):
    path = tmp_path / "bench.csv"
    before = path.read_text()
    bench.measure_all(["temporal_ccc window 10"], ["keep"], 3, 0.05, "none", path)
    assert path.read_text().startswith(before)
    rows = bench.read(path)[len(results) :]
    assert [(row["problem"], row["implementation"], row["run"]) for row in rows] == [
        ("window 10", "sage_ext", "1"),
        ("window 10", "eager", "1"),
    ]
    assert all(float(row["in_turn_us"]) > 0 and row["commit"] for row in rows)


def test_the_pages_say_what_the_file_says():
    for page, text in bench.pages(bench.read(bench.CSV)).items():
        assert page.read_text() == text, f"{page.name}: run `python benchmarks/bench.py --write`"
    with pytest.raises(ValueError, match="expected the marks"):
        bench.put("a page", "table", "")


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_a_script_imports_is_there(script, monkeypatch):
    """Scripts import each other, and one the reader of compiled CUDA code beside its tests, by their bare names."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "cuda")
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        for name in names:
            assert importlib.util.find_spec(name.partition(".")[0]) is not None, name
