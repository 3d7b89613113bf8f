"""sage-ext check: a sound data set has nothing wrong, every planted fault is said, one does not hide another."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from sage_ext import cli
from sage_ext.data.synthetic import write_dataset
from sage_ext.inspection import inspect

TASK = "6th ABAW Annotations/VA_Estimation_Challenge"


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "data"
    write_dataset(
        path,
        seed=4,
        train=6,
        validation=3,
        test=2,
        frames=(90, 140),
        modalities={"audio": 8, "visual": 9},
        quality=False,
    )
    return path


def rows(root, modality, name, change):
    """Rewrites a file of features as `change` of its array."""
    path = root / "features" / modality / f"{name}.npy"
    np.save(path, change(np.load(path)))
    return path


def names(root, split="Train_Set"):
    return sorted(path.stem for path in (root / TASK / split).glob("*.txt"))


def test_a_sound_data_set(root, capsys, tmp_path):
    assert cli.main(["check", str(root), "--report", str(tmp_path / "report")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{root}: nothing is wrong" in out
    for words in ("Data set", "frames a second", "audio missing", "visual missing", "Features of the training split"):
        assert words in out
    assert re.search(r"^train +6 ", out, re.MULTILINE)
    assert re.search(r"^valence, validation +-1 to 1 ", out, re.MULTILINE)
    assert (tmp_path / "report" / "check.png").read_bytes().startswith(b"\x89PNG")
    found = inspect(root)
    assert len(found.coverage) == 11
    assert all(0 <= cover.min() <= cover.max() <= 1 for _, _, cover in found.coverage)


def test_what_the_tables_say_is_so(root):
    """Missing share, constant features, values and targets, against NumPy."""
    gone, kept = 0, []
    for name in names(root):
        path = rows(root, "visual", name, lambda x: np.where(np.arange(x.shape[1]) == 2, np.float32(3), x))
        x = np.load(path)
        x[5:17] = np.nan
        np.save(path, x)
        mask = path.with_suffix(".mask.npy")
        absent = np.isnan(x).any(1) | (~np.load(mask) if mask.exists() else False)
        gone += int(absent.sum())
        kept.append(x[~absent])
    found = inspect(root)
    assert found.wrong == []
    constant = int((np.ptp(np.concatenate(kept), 0) == 0).sum())
    assert constant >= 1
    assert f"visual: {constant} of 9 features never change in the training split: they are not used" in found.notes
    first, features, targets = found.tables
    cells = dict(zip(first.header, first.rows[0]))
    frames = int(cells["frames"].replace(",", ""))
    assert cells["visual missing"] == f"{gone / frames:.1%}"
    assert cells["hours"] == f"{frames / 30 / 3600:.2f}"
    assert features.rows[1][:4] == ["visual", 9, constant, f"{frames - gone:,}"]
    labels = np.concatenate([
        np.loadtxt(root / TASK / "Validation_Set" / f"{name}.txt", delimiter=",", skiprows=1)
        for name in names(root, "Validation_Set")
    ])  # fmt: skip
    labels = labels[(labels != -5).all(1)]
    row = next(row for row in targets.rows if row[0] == "arousal, validation")
    assert row[3:] == [f"{labels[:, 1].mean():.4g}", f"{labels[:, 1].std():.4g}"]


def test_quality_is_counted_and_its_faults_are_said(root):
    """Known shares of the frames that have the modality, ranges, columns that never vary, a file that does not fit."""
    (root / "features" / "visual" / "meta.json").write_text('{"quality": ["score", "blur", "never"]}')
    train = names(root)
    low, known, there = np.inf, 0, 0
    for name in train:
        path = root / "features" / "visual" / f"{name}.npy"
        features = np.load(path)
        rows = np.random.default_rng(len(features)).standard_normal((len(features), 3))
        rows[:, 1], rows[::5, 0], rows[:, 2] = 4, np.nan, np.inf
        present = np.isfinite(features).all(1)
        there += int(present.sum())
        if name == train[2]:
            rows = rows[:-1]
        else:
            low = min(low, np.nanmin(rows[present, 0]))
            known += int((present & np.isfinite(rows[:, 0])).sum())
        np.save(path.with_suffix(".quality.npy"), rows)
    found = inspect(root)
    (wrong,) = found.wrong
    assert re.search(rf"{train[2]}\.quality\.npy: expected \d+ rows, as many as {train[2]}\.npy, got \d+$", wrong)
    (table,) = (table for table in found.tables if table.title.startswith("Quality"))
    cells = {row[0]: row[1:] for row in table.rows if row[0].startswith("visual")}
    assert cells["visual: score, train"][0] == f"{known / there:.1%}"
    assert cells["visual: score, train"][1].startswith(f"{low:.4g} to ")
    assert cells["visual: blur, train"][1] == "4 to 4"
    assert cells["visual: never, train"] == ["0.0%", "-"]
    assert cells["visual: score, validation"] == ["0.0%", "-"]
    assert "visual: quality that never varies in the training split: blur" in found.notes
    assert "visual: quality that is unknown in the whole training split: never" in found.notes


def test_everything_that_is_wrong_is_said(root, capsys):
    """Faults of many kinds at once, in files of their own."""
    train, validation = names(root), names(root, "Validation_Set")
    infinite = rows(root, "audio", train[0], lambda x: np.where(np.arange(len(x))[:, None] == 11, np.inf, x))
    rows(root, "visual", train[1], np.zeros_like)
    transposed = rows(root, "visual", train[2], np.transpose)
    rows(root, "visual", train[3], lambda x: x[: len(x) // 2])
    (root / TASK / "Validation_Set" / f"{validation[0]}.txt").write_text("valence,arousal\n0,2\n")
    (root / TASK / "Validation_Set" / f"{train[4]}.txt").write_text("valence,arousal\n0,0.1\n0.2,0\n")
    (root / TASK / "Train_Set" / "extra.csv").write_text("valence,arousal\n0,0\n")
    np.save(root / "features" / "audio" / "stranger.npy", np.zeros((9, 8), np.float32))
    assert cli.main(["check", str(root)]) == 1
    out = capsys.readouterr().out
    assert f"{root}: something is wrong" in out
    for words in (
        f"{infinite.stem}: audio: infinity in row 11 (0-based)",
        f"{train[1]}: visual: zeros in all",
        f"{transposed}: expected D = 9",
        "rows of",
        "transposed?",
        f"{train[3]}: visual has",
        f"{validation[0]}.txt:2: arousal: expected a value in [-1, 1] or -5 (invalid), got 2",
        "not read, for they do not end in .txt: extra.csv",
        "features without an annotation: stranger",
        f"video: 1 in more than one split, the first is {train[4]}",
    ):
        assert words in out


def test_a_wrong_rate_is_guessed(root):
    """Features of 25 rows a second beside frames of 30, which trained without a word."""
    for name in names(root):
        rows(root, "visual", name, lambda x: x[np.linspace(0, len(x) - 1, round(len(x) * 25 / 30)).astype(int)])
    wrong = inspect(root).wrong
    (text,) = (text for text in wrong if "is their rate" in text)
    assert re.search(r"0\.83\d? times the rows that 30 \(a frame each\) a second would give: is their rate 25", text)
    meta = root / "features" / "visual" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text() if meta.exists() else "{}"), "rate": 25}))
    assert not any("/Train_Set" in text or "train-" in text for text in inspect(root).wrong)


def test_groups_and_ranges(root):
    train, validation = names(root), names(root, "Validation_Set")
    groups = {name: f"person {i}" for i, name in enumerate([*train, *validation])}
    groups[validation[1]] = groups[train[0]]
    (root / "groups.json").write_text(json.dumps({"group": groups, "sex": dict.fromkeys(groups, "f")}))
    (root / "targets.json").write_text('{"valence": [-100, 100]}')
    for folder in ("Train_Set", "Validation_Set"):
        for path in (root / TASK / folder).glob("*.txt"):
            path.write_text(path.read_text().replace("-5.0", "nan").replace("-5", "nan"))
    found = inspect(root)
    assert "group: 1 in more than one split, the first is person 0: the score flatters" in found.wrong
    assert "sex: 1 in more than one split, the first is f" in found.notes
    assert any("of the range [-100, 100]: state a range" in text for text in found.notes)


def test_nothing_there(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path / "nowhere")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path)]) == 1
    assert "something is wrong" in capsys.readouterr().out


def test_splits_that_differ_are_said_and_not_tripped_over(root):
    """A modality of one split alone; other sizes; other targets; nothing annotated."""
    validation = names(root, "Validation_Set")
    for name in validation:
        rows(root, "visual", name, lambda x: x[:, :4])
    found = inspect(root)
    assert any(
        "expected the same modalities in both splits, got {'audio': 8, 'visual': 9} in train" in x for x in found.wrong
    )
    for name in validation:
        (root / "features" / "visual" / f"{name}.npy").unlink()
    found = inspect(root)
    assert found.modalities == ["audio", "visual"]
    assert found.tables[0].rows[1][-1] == "100.0%"
    for path in (root / TASK / "Validation_Set").glob("*.txt"):
        path.write_text("stress\n" + "nan\n" * 50)
    found = inspect(root)
    assert any("expected the same targets in both splits" in text for text in found.wrong)
    assert "validation: no frame is annotated with all targets" in found.wrong
    assert all(row[0] != "valence, validation" for row in found.tables[2].rows)
    assert "something is wrong" in found.text()


def test_a_column_of_another_unit(root):
    for name in names(root):
        rows(root, "visual", name, lambda x: x * np.where(np.arange(x.shape[1]) == 5, np.float32(1e-9), np.float32(1)))
    assert any(
        "visual: 1 of 9 features move less than 1e-05 of what the others do" in text for text in inspect(root).notes
    )
