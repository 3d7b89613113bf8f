"""`sage-ext import`: what each kind of column becomes, the time grid, splits, dialects, every fault by line, whole or not."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import tracemalloc
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sage_ext.data.columns as columns_module
import sage_ext.data.table as table_module
from sage_ext.data import AffWild2, clip_tensors
from sage_ext.data.table import MARK, ImportReport, add_arguments, import_table, read_map, run

SIMPLE = """video,time,a_loud,a_pitch,v_smile,valence,arousal
anna,0,0.5,110,0.1,0.2,-0.1
anna,1,0.6,115,,0.3,0
anna,2,0.7,120,0.3,,0.1
ben,0,0.1,90,0.9,-0.5,0.4
ben,1,0.2,95,0.8,-0.4,0.5
"""


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(columns: dict[str, list], path: Path, delimiter: str = ",") -> Path:
    """Columns as a CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))
    return path


def plain(frames: int = 6, **more) -> dict[str, list]:
    """Two videos of one modality and one target, a row a second."""
    n = 2 * frames
    columns = {
        "video": ["a"] * frames + ["b"] * frames, "time": list(range(frames)) * 2, "x_one": [k / 8 for k in range(n)],
        "stress": [k * 5 % 7 for k in range(n)],
    }  # fmt: skip
    return {**columns, **more}


def imported(tmp_path: Path, columns: dict[str, list] | str, /, **options) -> tuple[ImportReport, Path]:
    """A table imported into tmp_path/data; options as `import_table`'s, the target is `stress` where there is one."""
    path = tmp_path / "table.csv"
    if isinstance(columns, str):
        write(path, columns)
    else:
        rows_of(columns, path)
        if "stress" in columns:
            options.setdefault("targets", ["stress"])
    return import_table(path, tmp_path / "data", **options), tmp_path / "data"


def refused(
    tmp_path: Path, columns: dict[str, list] | str, words: str, kind: type[Exception] = ValueError, /, **options
) -> str:
    """The message of what must fail and leave nothing behind."""
    with pytest.raises(kind, match=words) as error:
        imported(tmp_path, columns, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["table.csv"], [])
    assert "\n" not in str(error.value)
    return str(error.value)


def labels(root: Path, name: str, split: str = "Train_Set") -> list[str]:
    return (root / "annotations" / split / f"{name}.txt").read_text().splitlines()


def load(root: Path, name: str) -> dict:
    """A clip by its name, from whatever split."""
    for split in ("train", "validation", "test"):
        try:
            data = AffWild2(root, split)
        except FileNotFoundError:
            continue
        if name in data.names:
            clip = data[data.names.index(name)]
            return {"clip": clip, "split": split, **clip_tensors(clip, list(clip.features))}
    raise KeyError(name)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------- what it writes
def test_the_files(tmp_path):
    report, root = imported(tmp_path, SIMPLE)
    found = contents(root)
    record = json.loads(found.pop(MARK))
    assert sorted(record["files"]) == sorted(found)
    train, validation = ("anna", "ben") if (root / "annotations/Train_Set/anna.txt").exists() else ("ben", "anna")
    assert sorted(found) == sorted([
        f"annotations/Train_Set/{train}.txt", f"annotations/Validation_Set/{validation}.txt",
        "features/a/anna.npy", "features/a/ben.npy", "features/a/meta.json",
        "features/v/anna.npy", "features/v/ben.npy", "features/v/meta.json", "fps.json", "groups.json", "targets.json",
    ])  # fmt: skip
    assert json.loads(found["targets.json"]) == {"valence": [-1, 1], "arousal": [-1, 1]}
    assert json.loads(found["fps.json"]) == 1.0
    assert json.loads(found["groups.json"]) == {"video": {"anna": "anna", "ben": "ben"}}
    assert json.loads(found["features/a/meta.json"]) == {
        "columns": ["a_loud", "a_pitch"],
        "about": {"source": "table.csv"},
    }
    split = "Train_Set" if train == "anna" else "Validation_Set"
    assert labels(root, "anna", split) == ["valence,arousal", "0.2,-0.1", "0.3,0.0", "nan,0.1"]
    rows = np.load(root / "features/a/anna.npy")
    assert rows.dtype == np.float32
    assert rows.tolist() == np.float32([[0.5, 110], [0.6, 115], [0.7, 120]]).tolist()
    assert np.isnan(np.load(root / "features/v/anna.npy")).tolist() == [[False], [True], [False]]
    assert (report.rows, report.frames, report.fps) == (5, 5, 1.0)
    assert report.modalities["v"].missing == 1
    assert report.targets["valence"].annotated == 4


def test_the_reader_reads_it(tmp_path):
    columns = {
        "video": ["a"] * 3 + ["b"] * 3 + ["c"] * 2, "time": [0, 0.5, 1, 5, 5.5, 6, 0, 0.5], "x_one": range(8),
        "y_one": ["1", "", "3", "4", "5", "6", "7", "8"], "stress": [0, 25, 50, 75, 100, "", 5, 5],
        "split": ["train"] * 3 + ["val"] * 3 + ["test"] * 2, "subject": ["p"] * 3 + ["q"] * 5,
    }  # fmt: skip
    report, root = imported(tmp_path, columns, ranges={"stress": (0, 100)})
    assert {s: AffWild2(root, s).names for s in ("train", "validation", "test")} == {
        "train": ["a"], "validation": ["b"], "test": ["c"],
    }  # fmt: skip
    data = AffWild2(root, "train")
    assert data.mismatches == []
    assert [tuple(target) for target in data.targets] == [("stress", 0.0, 100.0)]
    assert data.frame_rate == 2.0
    assert data.group("a", "subject") == "p"
    a, b = load(root, "a"), load(root, "b")
    assert a["labels"][:, 0].tolist() == [-1.0, -0.5, 0.0]
    assert a["present"].tolist() == [[True, True], [True, False], [True, True]]
    assert b["valid"].tolist() == [True, True, False]
    assert report.groupings == {"subject": 2, "video": 3}
    assert {name: (s.videos, s.frames, s.annotated) for name, s in report.splits.items()} == {
        "train": (1, 3, 3), "validation": (1, 3, 2), "test": (1, 2, 2),
    }  # fmt: skip


def test_interleaved_videos_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    header, *rows = SIMPLE.splitlines()
    (tmp_path / "one").mkdir()
    _, first = imported(tmp_path / "one", SIMPLE)
    for attempt in range(4):
        folder = tmp_path / f"mixed{attempt}"
        folder.mkdir()
        order = rng.permutation([0, 0, 0, 1, 1])
        own = [iter(rows[:3]), iter(rows[3:])]
        _, root = imported(folder, "\n".join([header, *(next(own[k]) for k in order)]) + "\n")
        mixed, straight = contents(root), contents(first)
        mixed.pop(MARK), straight.pop(MARK)
        assert {k: json.loads(v) if k == "groups.json" else v for k, v in mixed.items()} == {
            k: json.loads(v) if k == "groups.json" else v for k, v in straight.items()
        }


def test_the_same_whatever_is_held_at_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    n = 700
    columns = {
        "video": [f"v{k // 100}" for k in range(n)], "time": [k % 100 + (k % 100 > 60) * 20 for k in range(n)],
        "text": ["a, \"b\"\nc"] * n, **{f"x_{d}": rng.standard_normal(n).round(4) for d in range(3)},
        "valence": rng.uniform(-1, 1, n),
    }  # fmt: skip
    (tmp_path / "one").mkdir()
    _, usual = imported(tmp_path / "one", columns)
    monkeypatch.setattr(columns_module, "_CHUNK", 20)
    monkeypatch.setattr(table_module, "_BLOCK", 50)
    (tmp_path / "two").mkdir()
    _, small = imported(tmp_path / "two", columns)
    assert contents(usual) == contents(small)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(numbers, numbers, st.floats(-1, 1), st.sampled_from(["", "NaN", "-", None])), min_size=4, max_size=30
    )
)
def test_numbers_survive(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("numbers")
    columns = {
        "time": range(len(rows)), "x_1": [row[0] for row in rows],
        "x_2": [row[1] if row[3] is None else row[3] for row in rows], "valence": [row[2] for row in rows],
        "y_1": [0.5] * len(rows),
    }  # fmt: skip
    if all(row[3] is not None for row in rows):
        columns.pop("x_2")
    _, root = imported(folder, columns)
    found = np.concatenate([np.load(root / f"features/x/table-{part}.npy") for part in ("train", "validation")])
    assert found[:, 0].tolist() == [np.float32(row[0]) for row in rows]
    if "x_2" in columns:
        wanted = [np.float32(row[1]) if row[3] is None else np.float32("nan") for row in rows]
        np.testing.assert_array_equal(found[:, 1], wanted)
    said = [line for part, s in (("train", "Train_Set"), ("validation", "Validation_Set"))
            for line in labels(root, f"table-{part}", s)[1:]]  # fmt: skip
    assert [float(line) for line in said] == [row[2] for row in rows]


# ----------------------------------------------------------------------------------------------------- columns and roles
def test_only_what_is_asked_for_becomes_an_input(tmp_path):
    """As in the table of a film with its annotators' columns beside the targets: av_ begins with a, and is not a_."""
    rng = np.random.default_rng(2)
    names = [
        "a_rms",
        "a_music",
        "v_light",
        "l_words",
        "av_arousal",
        "av_valence",
        "obs_cue_face",
        "ao_arousal",
        "ao_valence",
    ]
    columns = {name: rng.uniform(-1, 1, 40).round(3) for name in names}
    columns |= {"t_s": range(40), "run": [1 + k // 10 for k in range(40)]}
    report, root = imported(
        tmp_path, columns, video="run", targets=["av_valence", "av_arousal"],
        modalities={"audio": "a_", "picture": "v_", "speech": ["l_"]},
    )  # fmt: skip
    assert {name: m.columns for name, m in report.modalities.items()} == {
        "audio": ["a_rms", "a_music"], "picture": ["v_light"], "speech": ["l_words"],
    }  # fmt: skip
    assert list(report.ignored) == ["obs_cue_face", "ao_arousal", "ao_valence"]
    assert report.groupings == {"run": 4}
    assert json.loads((root / "targets.json").read_text()).keys() == {"av_valence", "av_arousal"}
    assert sorted(path.name for path in (root / "features").iterdir()) == ["audio", "picture", "speech"]


def test_a_prefix_that_takes_more_than_it_says_is_noted(tmp_path):
    columns = plain(ao_x=list(range(12)), av_y=list(range(12)), a_z=[k % 5 for k in range(12)])
    report, _ = imported(tmp_path, columns, modalities={"audio": "a"})
    assert any("audio: its columns begin with a, ao, av" in note for note in report.notes)


def test_modalities_by_their_names_alone(tmp_path):
    columns = plain(
        **{
            "x.two": [k % 5 for k in range(12)],
            "xx_three": [k % 4 for k in range(12)],
            "y:four": [k % 3 for k in range(12)],
        }
    )
    report, _ = imported(tmp_path, columns, modalities=["x", "y"])
    assert {name: m.columns for name, m in report.modalities.items()} == {"x": ["x_one", "x.two"], "y": ["y:four"]}
    assert report.ignored == {"xx_three": "in no modality"}
    assert not any("begin with" in note for note in report.notes)


def test_modalities_by_default(tmp_path):
    columns = plain(
        temperature=[k % 5 for k in range(12)], y_words=["hello"] * 12, y_two=[k % 4 for k in range(12)], y_off=[""] * 12,
        _z=[1.5] * 12, site_id=[7] * 6 + [8] * 6, place=["north"] * 6 + ["south"] * 6, y_dead=[3] * 12,
    )  # fmt: skip
    report, _ = imported(tmp_path, columns)
    assert {name: m.columns for name, m in report.modalities.items()} == {"x": ["x_one"], "y": ["y_two", "y_dead"]}
    assert report.groupings == {"site_id": 2, "place": 2, "video": 2}
    assert report.ignored == {
        "y_words": "not numbers", "y_off": "without any number", "temperature": "without _, . or : in the name",
        "_z": "without _, . or : in the name",
    }  # fmt: skip
    assert any("groupings and no inputs: site_id" in note for note in report.notes)
    assert any("constant, so nothing is learnt from: y_dead" in note for note in report.notes)


def test_a_map(tmp_path):
    columns = plain(
        **{
            "heart rate": [k % 5 for k in range(12)],
            "a[0]": [k % 4 for k in range(12)],
            "a[1]": [k % 3 for k in range(12)],
        }
    )
    report, root = imported(tmp_path, columns, columns={"body": ["heart rate"], "voice": ["a[0]", "a?1*", "x_*"]})
    assert {name: m.columns for name, m in report.modalities.items()} == {
        "body": ["heart rate"], "voice": ["a[0]", "a[1]", "x_one"],
    }  # fmt: skip
    assert np.load(root / "features/voice/a.npy").shape == (6, 3)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"m": ["y_*"]}, "columns: 'm': expected a column of .*table.csv, got 'y_\\*'; .*video, time, x_one, stress"),
        ({"m": ["x_ome"]}, "got 'x_ome'; did you mean x_one\\?"),
        ({"m": ["stress"]}, "columns: 'm': expected features, got stress, the target"),
        ({"m": ["time"]}, "got time, the time"),
        ({"m": ["x_one"], "n": ["x_*"]}, "expected a column in one modality, got x_one in m and n"),
        ({"m": []}, "columns: 'm': expected a list of names"),
        ({"m": "x_one"}, "columns: 'm': expected a list of names"),
        ({}, "columns: expected 1 to 8 modalities, got 0"),
        ({"m": ["word"]}, ":2: word: expected a number, or nothing"),
        ({"m": ["off"]}, "off: expected a column of numbers, got one without any number"),
        ({"__m": ["x_one"]}, "do not begin with __"),
    ],
)  # fmt: skip
def test_a_wrong_map(tmp_path, columns, words):
    refused(tmp_path, plain(word=["x"] * 12, off=[""] * 12), words, columns=columns)


@pytest.mark.parametrize(
    ("modalities", "words"),
    [
        ({"m": "y_"}, "modalities: 'm': expected columns that begin with 'y_', got none among x_one, w_word"),
        ({"m": ""}, "modalities: 'm': expected a list of names"),
        ({"m": "w_"}, "modalities: 'm': expected columns of numbers, got none"),
        ({"a/b": "x_"}, "modalities: expected a name that a file can have .*got 'a/b'"),
        ({".m": "x_"}, "expected a name that a file can have"),
        ({"m": "x_", "n": "x"}, "expected a column in one modality, got x_one in m and n"),
        (["x"] * 9, "expected 1 to 8 modalities, got 9"),
    ],
)  # fmt: skip
def test_wrong_modalities(tmp_path, modalities, words):
    if isinstance(modalities, list):
        modalities = {f"{name}{k}": name for k, name in enumerate(modalities)}
    refused(tmp_path, plain(w_word=["x"] * 12), words, modalities=modalities)


def test_more_than_eight_modalities_say_how_to_choose(tmp_path):
    columns = plain(**{f"m{k}_x": [j % 5 for j in range(12)] for k in range(9)})
    message = refused(tmp_path, columns, "expected 1 to 8 in .*, got 10: x \\(1 column\\), m0 \\(1 column\\)")
    assert "--modalities NAME,NAME" in message
    assert "--map FILE" in message
    report, _ = imported(tmp_path, columns, modalities=["m0", "m1"])
    assert list(report.modalities) == ["m0", "m1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["mood"]}, "targets: expected a column of .*, got 'mood'; it has video, time, x_one, stress, who"),
        ({"targets": ["stress", "stress"]}, "different names"),
        ({"targets": []}, "expected 1 to 64 targets"),
        ({"video": "vidoe"}, "video: expected a column of .* did you mean video\\?"),
        ({"group": ["who", "who"]}, "group: expected different columns"),
        ({"group": "stress"}, "group: expected a column that is nothing else, got stress, the target too"),
        ({"split": "time"}, "split: expected a column that is nothing else, got time, the time too"),
        ({"time": "time", "frame": "time"}, "time, frame: expected at most one of the two"),
        ({"modalities": ["x"], "columns": {"x": ["x_one"]}}, "modalities, columns: expected at most one"),
        ({"ranges": {"mood": (0, 1)}}, "ranges: expected targets \\(stress\\), got 'mood'"),
        ({"ranges": {"stress": (1, 0)}}, "ranges: 'stress': expected low < high"),
        ({"fps": 0}, "fps: expected a number of 1e-06 to 1e\\+06 frames a second, got 0"),
        ({"pieces": 0}, "pieces: expected an int in \\[1, 1000\\], got 0"),
        ({"pieces": 7}, "pieces: expected at most 6, the frames of video 'a', got 7"),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path, options, words):
    refused(tmp_path, plain(who=["p"] * 6 + ["q"] * 6), words, **options)


@pytest.mark.parametrize("options", [{"targets": "stress"}, {"modalities": "x"}])
def test_a_string_is_no_sequence_of_names(tmp_path, options):
    refused(tmp_path, plain(), "got the string", TypeError, **options)


def test_targets_are_needed(tmp_path):
    refused(tmp_path, "time,x_a\n0,1\n1,2\n", "targets: expected the columns to be estimated")
    refused(tmp_path, 'time,x_a,"a[0:1]"\n0,1,1\n1,2,3\n', "without commas, quotes and brackets", targets=["a[0:1]"])
    refused(tmp_path, "time,x_a,7\n0,1,1\n1,2,3\n", "expected names that are no numbers", targets=["7"])


def test_valence_alone_is_a_target(tmp_path):
    report, _ = imported(tmp_path, "time,x_a,valence\n0,1,0.5\n1,2,0.25\n2,3,-0.5\n3,3,0\n4,0,0\n")
    assert {name: (t.low, t.high, t.source) for name, t in report.targets.items()} == {"valence": (-1, 1, "usual")}


# ---------------------------------------------------------------------------------------------------------------- ranges
def test_ranges(tmp_path):
    columns = plain(valence=[-0.5, 0.5] * 6, arousal=[1, 5] * 6)
    report, root = imported(tmp_path, columns, targets=["valence", "arousal", "stress"], ranges={"stress": [-2, 9.5]})
    assert {name: (t.low, t.high, t.source) for name, t in report.targets.items()} == {
        "valence": (-1, 1, "usual"), "arousal": (1, 5, "of the table"), "stress": (-2, 9.5, "asked for"),
    }  # fmt: skip
    assert (root / "targets.json").read_text().split() == json.dumps(
        {"valence": [-1, 1], "arousal": [1, 5], "stress": [-2, 9.5]}, indent=1
    ).split()
    assert "as asked for" in report.text()


def test_a_value_outside_its_range(tmp_path):
    refused(tmp_path, plain(), "table.csv:3: stress: expected a value in \\[0, 4\\], got 5", ranges={"stress": (0, 4)})


def test_a_target_that_never_changes_needs_a_range(tmp_path):
    refused(
        tmp_path, plain(stress=[3] * 12), "expected a target that varies, or its range \\(--range stress=LOW:HIGH\\)"
    )
    report, _ = imported(tmp_path, plain(stress=[3] * 12), ranges={"stress": (0, 5)})
    assert report.targets["stress"].high == 5


@pytest.mark.parametrize("options", [{}, {"ranges": {"valence": (-1, 1)}}])
def test_minus_five_is_not_annotated(tmp_path, options):
    """Aff-Wild2's mark would else be the range's end, and every other value squeezed into a third of it."""
    report, root = imported(tmp_path, plain(valence=[-5, 0.5, -0.5] * 4), targets=["valence"], **options)
    assert (report.targets["valence"].low, report.targets["valence"].annotated) == (-1, 8)
    assert any("4 rows of -5" in note for note in report.notes)
    assert load(root, "a")["valid"].tolist() == [False, True, True] * 2


def test_minus_five_can_be_a_value(tmp_path):
    columns = plain(valence=[-5, 0.5, 3] * 4, arousal=[-1, 0, 1] * 4)
    _, root = imported(tmp_path, columns, targets=["valence", "arousal"], ranges={"valence": (-5, 5)})
    item = load(root, "a")
    assert item["valid"].all()
    assert item["labels"][:3].tolist() == [[-1.0, -1.0], [pytest.approx(0.1), 0.0], [pytest.approx(0.6), 1.0]]


# ----------------------------------------------------------------------------------------------------------------- cells
def test_what_is_missing(tmp_path):
    cells = ["", " ", "NaN", "nan", "NA", "N/A", "null", "None", "-", "<NA>", "1.5", " 2 "]
    report, root = imported(tmp_path, plain(x_one=cells, x_two=["1"] * 11 + ["-"]))
    found = np.concatenate([np.load(root / f"features/x/{name}.npy")[:, 0] for name in "ab"])
    assert np.isnan(found).tolist() == [True] * 10 + [False] * 2
    assert found[10:].tolist() == [1.5, 2.0]
    x = report.modalities["x"]
    assert (x.missing, x.partial, x.worst, x.worst_missing) == (11, 11, "x_one", 10)
    assert any(
        "x: 11 frames without it for want of some of its columns only; x_one is missing in 10" in note
        for note in report.notes
    )


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("abc", "expected a number, or nothing .*got 'abc'"), ("1_000", "got '1_000'"), ("inf", "expected a finite number"),
        ("-Infinity", "expected a finite number, got '-inf'"), ("1e39", "at most 3.4e38"), ("1e999", "finite"),
        ("0x10", "got '0x10'"), ("1;2", "got '1;2'"), ("y" * 200, "got 'y{57}\\.\\.\\.'$"), ("1,5", "got '1,5'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["x_one", "stress"])
def test_a_cell_that_is_no_number(tmp_path, cell, words, column):
    if column == "stress" and cell == "1e39":
        pytest.skip("float64 holds it")
    columns = plain()
    columns[column][7] = cell
    message = refused(tmp_path, columns, words)
    assert message.startswith(f"{tmp_path / 'table.csv'}:9: {column}: ")


def test_a_target_is_never_text(tmp_path):
    refused(tmp_path, plain(stress=["low"] * 12), "table.csv:2: stress: expected a number")


def test_no_row_is_complete(tmp_path):
    columns = plain(x_one=["", 1] * 6, x_two=[1, ""] * 6, y_one=list(range(12)))
    refused(
        tmp_path,
        columns,
        "expected rows with all columns of x, got none, for x_one is missing in 6 of them: leave it out",
    )


# ------------------------------------------------------------------------------------------------------------------ time
def timed(times: list, **more) -> dict[str, list]:
    n = len(times)
    return {"time": times, "x_one": [k * 7 % 11 for k in range(n)], "stress": [k * 5 % 7 for k in range(n)], **more}


@pytest.mark.parametrize(
    ("times", "fps"),
    [
        ([round(k / 30, 3) for k in range(3000)], 30),  # steps of 33 and 34 ms: a grid by their median would leave them
        ([round(k * 1001 / 30000, 3) for k in range(3000)], 30000 / 1001),
        ([1.7e9 + round(k / 25, 2) for k in range(500)], 25), ([3600 * k for k in range(50)], 1 / 3600),
        ([k * 0.1 + 0.02 * (k % 2) for k in range(50)], pytest.approx(10, rel=1e-2)), ([7.5, 8, 8.5, 9, 9.5, 10], 2),
    ],
)  # fmt: skip
def test_the_rate_of_the_times(tmp_path, times, fps):
    report, root = imported(tmp_path, timed(times))
    assert report.fps == fps
    assert report.frames == len(times)
    assert AffWild2(root, "train").frame_rate == fps
    assert not any("gap" in note for note in report.notes)


def test_gaps_are_missing_and_not_annotated(tmp_path):
    columns = timed([10, 11, 12, 15, 16, 17, 18, 19])
    report, root = imported(tmp_path, columns)
    assert report.frames == 10
    assert any(note.startswith("1 gap between rows, of 2 frames (20.0%)") for note in report.notes)
    item = load(root, "table-train")
    assert item["present"][:, 0].tolist() == item["valid"].tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert item["features"]["x"][:, 0].tolist() == [0, 7, 3, 0, 0, 10, 6, 2]
    assert report.modalities["x"].missing == 2


def test_a_rate_that_does_not_fit_the_rows_is_noted(tmp_path):
    report, _ = imported(tmp_path, timed([float(k) for k in range(20)]), fps=30)
    assert any("is the rate right?" in note for note in report.notes)
    assert report.frames == 571


def hourly(count: int, zone=None) -> list[str]:
    begin = datetime(2024, 3, 1, 22, tzinfo=zone)
    return [(begin + timedelta(hours=k)).isoformat() for k in range(count)]


@pytest.mark.parametrize(
    "times",
    [
        hourly(30), hourly(30, timezone.utc), [time.replace("T", " ") for time in hourly(30)],
        [f"{time}Z" for time in hourly(30)], [f"{time}.000000000" for time in hourly(30)], [time[:16] for time in hourly(30)],
        [f"{time}+0530" for time in hourly(30)],
    ],
)  # fmt: skip
def test_date_times(tmp_path, times):
    del times[7:9]
    report, root = imported(tmp_path, timed(times))
    assert report.fps == pytest.approx(1 / 3600)
    assert report.frames == 30
    assert json.loads((root / "fps.json").read_text()) == report.fps
    assert "one frame in 3600 seconds" in report.text()


def test_days(tmp_path):
    report, _ = imported(tmp_path, timed([f"2024-02-{day:02d}" for day in range(1, 30)]))
    assert report.fps == pytest.approx(1 / 86400)


@pytest.mark.parametrize(
    ("line", "cell", "words"),
    [
        (4, "2024-03-02T00:30:00", "table.csv:4: time: expected a time within .* grid of one frame in 3600 seconds"),
        (4, "2024-03-01T22:00:00", ":4: time: expected a later time .*csv:3\\), got one 3600 s earlier; does the table hold"),
        (4, "2024-03-01T23:00:00", "got the same"), (4, "2024-03-02T00:00:00Z", "offset from UTC in all date-times or in none"),
        (4, "", "expected seconds, or an ISO 8601 date and time"), (4, "2024-13-01T00:00:00", "ISO 8601"),
        (4, "02.03.2024 00:00", "ISO 8601"),
        (2, "", "expected a number"),
    ],
)  # fmt: skip
def test_wrong_date_times(tmp_path, line, cell, words):
    times = hourly(9)
    times[line - 2] = cell
    refused(tmp_path, timed(times), words)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0, 1, 2, 3.5, 4, 5], ":5: time: expected a time within .*got 3.5 frames after it; say the rate with --fps"),
        ([0, 1, 2, 3.3, 4, 5, 6, 7], ":5: time: .*got 3.3 frames after it"),
        ([0, 1, 2, 2, 3, 4], ":5: time: expected a later time .*table.csv:4\\), got the same"),
        ([0, 1, 2, 1.5, 3, 4], ":5: time: .*got one 0.5 s earlier"),
        ([0, 1, 2, "", 3, 4], ":5: time: expected the time of the row, got ''"),
        ([0, 1, 2, "late", 3, 4], ":5: time: expected a number"),
        ([0, 1, 2, 3, 2e7, 2e7 + 1], ":6: time: expected gaps of together at most 10,000,000 frames, got 19,999,996"),
        ([0, 1, 2, 3, 4, 1e300], "time"),
        ([0, 1e9, 2e9], "expected 1e-06 to 1e\\+06 frames a second, got 1e-09"),
        ([0, 5e-324, 1e-323], "expected 1e-06 to 1e\\+06 frames a second, got inf"),
        ([-1e308, 1e308, 1.1e308], "expected 1e-06 to 1e\\+06 frames a second, got"),
    ],
)  # fmt: skip
def test_wrong_times(tmp_path, times, words):
    refused(tmp_path, timed(times), words)


def test_two_rows_of_one_frame(tmp_path):
    refused(
        tmp_path, timed([0, 1, 2, 2.9, 3.1, 4]), ":6: time: .*got 3.1 frames after it, where .*:5 is already", fps=1
    )


def test_one_row_has_no_rate(tmp_path):
    words = "fps: expected the rate, as no video of .* has two rows, got none"
    refused(tmp_path, timed([5]), words, ranges={"stress": (0, 9)})


def test_each_video_has_a_grid_of_its_own(tmp_path):
    columns = plain(time=[0, 1, 2, 3, 4, 5, 100.4, 101.4, 102.4, 103.4, 104.4, 106.4])
    report, root = imported(tmp_path, columns)
    assert report.frames == 13
    assert load(root, "b")["clip"].num_frames == 7


def test_frame_numbers(tmp_path):
    columns = timed([0] * 6)
    columns["frame"] = [41, 42, 43, 46, 47, 48]
    del columns["time"]
    report, root = imported(tmp_path, columns)
    assert (report.fps, report.frames) == (30.0, 8)
    assert any("taken as 30 a second" in note for note in report.notes)
    assert load(root, "table-train")["present"][:, 0].tolist() == [True, True, True, False, False, True]
    columns["frame"] = [41, 42, 43, 46, 46, 48]
    (tmp_path / "two").mkdir()
    refused(tmp_path / "two", columns, ":6: frame: expected a later frame .*got the same")
    columns["frame"] = [41, 42, 43, 46, 45, 48]
    refused(tmp_path / "two", columns, ":6: frame: .*got one 1 frame earlier")
    columns["frame"] = [41, 42, 43, 46.5, 47, 48]
    refused(tmp_path / "two", columns, ":5: frame: expected a whole number, the frame's, got '46.5'")
    columns["frame"] = [1, 2, 3, 4, 5, 10**8]
    refused(tmp_path / "two", columns, ":7: frame: expected gaps")
    columns["frame"] = [1, 2, 3, 4, 5, 6]
    report, _ = imported(tmp_path / "two", columns, fps=25)
    assert report.fps == 25.0


def test_rows_in_order(tmp_path):
    columns = timed([0] * 10)
    del columns["time"]
    refused(
        tmp_path,
        columns,
        "expected a column of times .* or the rate of the rows \\(--fps\\), got none; its columns are x_one, stress",
    )
    report, _ = imported(tmp_path, columns, fps=0.5)
    assert (report.fps, report.frames) == (0.5, 10)


# ---------------------------------------------------------------------------------------------------------------- splits
def many(videos: int, frames: int = 4, **more) -> dict[str, list]:
    n = videos * frames
    return {
        "video": [f"v{k // frames:03d}" for k in range(n)], "time": [k % frames for k in range(n)],
        "x_one": [k * 7 % 11 for k in range(n)], "stress": [k * 5 % 7 for k in range(n)], **more,
    }  # fmt: skip


def names(root: Path, split: str) -> list[str]:
    return AffWild2(root, split).names


def test_a_fifth_of_the_groups_validates(tmp_path):
    columns = many(40, person=[f"p{k // 8}" for k in range(160)])  # two videos each
    report, root = imported(tmp_path, columns, group="person")
    assert {name: s.videos for name, s in report.splits.items()} == {"train": 32, "validation": 8}
    data = {split: AffWild2(root, split) for split in ("train", "validation")}
    sides = {split: {d.group(name) for name in d.names} for split, d in data.items()}
    assert not sides["train"] & sides["validation"]
    assert report.groupings == {"person": 20, "group": 20, "video": 40}
    columns["x_one"] = columns["x_one"][::-1]  # other numbers, the same names: the same split
    (tmp_path / "again").mkdir()
    _, again = imported(tmp_path / "again", columns, group="person")
    assert names(again, "validation") == data["validation"].names


def test_a_column_named_group_is_the_group(tmp_path):
    report, root = imported(tmp_path, many(6, group=["one"] * 12 + ["two"] * 12))
    assert report.groupings == {"group": 2, "video": 6}
    assert {name[-1] for name in names(root, "train")} in ({"0", "1", "2"}, {"3", "4", "5"})


def test_one_group_is_cut_in_time(tmp_path):
    columns = timed(list(range(23)))
    report, root = imported(tmp_path, columns)
    assert names(root, "train") == ["table-train"]
    assert names(root, "validation") == ["table-validation"]
    assert [report.splits[s].frames for s in ("train", "validation")] == [18, 5]
    both = [load(root, f"table-{part}")["features"]["x"][:, 0].tolist() for part in ("train", "validation")]
    assert both[0] + both[1] == columns["x_one"]
    assert any("cut in time: of each the first four fifths train" in note for note in report.notes)
    assert report.groupings == {}
    assert not (root / "groups.json").exists()


def test_videos_of_one_group_are_all_cut(tmp_path):
    report, root = imported(tmp_path, many(3, 5, group=["one"] * 15))
    assert names(root, "train") == ["v000-train", "v001-train", "v002-train"]
    assert names(root, "validation") == ["v000-validation", "v001-validation", "v002-validation"]
    assert report.groupings == {}  # none that the cut did not tear


def test_groups_without_annotation_train(tmp_path):
    """They are no use for validation: of the annotated ones a fifth validates, and one alone is cut."""
    columns = many(5, 10)
    columns["stress"] = [value if k < 20 else "" for k, value in enumerate(columns["stress"])]
    report, _ = imported(tmp_path, columns)
    assert (report.splits["validation"].videos, report.splits["validation"].annotated) == (1, 10)
    columns["stress"] = [value if k < 10 else "" for k, value in enumerate(columns["stress"])]
    (tmp_path / "one").mkdir()
    report, root = imported(tmp_path / "one", columns)
    assert names(root, "validation") == ["v000-validation"]
    assert names(root, "train") == ["v000-train", "v001", "v002", "v003", "v004"]


def test_the_words_of_a_split(tmp_path):
    words = ["train", "Training", "val", "valid", "DEV", "validation", "test"]
    report, root = imported(tmp_path, many(7, split=[word for word in words for _ in range(4)]))
    assert names(root, "train") == ["v000", "v001"]
    assert names(root, "validation") == ["v002", "v003", "v004", "v005"]
    assert names(root, "test") == ["v006"]
    assert labels(root, "v006", "Test_Set")[0] == "stress"
    assert report.splits["test"].annotated == 4


def test_train_and_test_alone_get_a_validation_split(tmp_path):
    report, root = imported(tmp_path, many(12, fold=["train"] * 40 + ["test"] * 8), split="fold")
    assert {name: s.videos for name, s in report.splits.items()} == {"train": 8, "validation": 2, "test": 2}
    assert names(root, "test") == ["v010", "v011"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"split": ["train"] * 3 + ["test"] + ["train"] * 8},
            ":5: split: expected one split in all rows of a video, 'train' as in .*:2, got 'test'",
        ),
        ({"split": ["train"] * 4 + [""] + ["train"] * 7}, ":6: split: expected a split, got ''"),
        ({"split": ["tran"] * 12}, ":2: split: expected train, validation \\(val, valid, dev\\) or test, got 'tran'"),
        ({"split": ["test"] * 12}, "split: expected rows of the train split, got none"),
        (
            {"split": ["train"] * 4 + ["val"] * 8, "group": ["p"] * 8 + ["q"] * 4},
            ":6: split: expected the group 'p' in one split, train as in .*:2, got validation",
        ),
        ({"group": ["p"] * 3 + ["q"] * 9}, ":5: group: expected one group in all rows of a video"),
        (
            {"stress": [1, 2, 3, 4] + [""] * 8, "split": ["train"] * 4 + ["val"] * 8},
            "expected frames in the validation split that are annotated with all targets, got none",
        ),
        ({"video": ["a"] * 4 + [""] + ["b"] * 7}, ":6: video: expected the name of a video, got ''"),
        ({"stress": [""] * 12}, "stress: expected rows that are annotated, got none"),
    ],
)  # fmt: skip
def test_wrong_splits_and_groups(tmp_path, more, words):
    refused(tmp_path, many(3, **more), words)


def test_pieces_of_one_recording(tmp_path):
    report, root = imported(tmp_path, timed(list(range(103))), pieces=10)
    assert names(root, "train") == [f"table-p{k:02d}" for k in range(1, 9)]
    assert names(root, "validation") == ["table-p09", "table-p10"]
    assert report.groupings == {"piece": 10}
    data = AffWild2(root, "train")
    assert data.group("table-p01", "piece") == data.group("table-p01") == "table-p01"
    assert sum(load(root, name)["clip"].num_frames for name in (*data.names, *names(root, "validation"))) == 103
    assert any("neighbouring pieces" in note for note in report.notes)
    assert any("cut in time: of each the first 8 of 10 pieces train" in note for note in report.notes)


def test_pieces_of_a_video_stay_on_one_side(tmp_path):
    report, root = imported(tmp_path, many(5, 9), pieces=3)
    data = {split: AffWild2(root, split) for split in ("train", "validation")}
    sides = {split: {d.group(name) for name in d.names} for split, d in data.items()}
    assert len(sides["train"]) == 4
    assert len(sides["validation"]) == 1
    assert report.groupings == {"piece": 15, "video": 5, "group": 5}
    assert data["train"].names[0] == f"{sorted(sides['train'])[0]}-p01"


# ----------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "name", ["a/b", ".", "..", ".hidden", "x_left", "x_right", "x.mask", "x.quality", "a\\b", "a,b", "a\x07", "n" * 200]
)
def test_videos_that_cannot_be_files(tmp_path, name):
    message = refused(
        tmp_path, plain(video=[name] * 6 + ["b"] * 6), "video: expected (a name that a file can have|names of videos)"
    )
    assert message.isprintable()


def test_a_file_that_cannot_be_a_video(tmp_path):
    path = rows_of(timed(list(range(9))), tmp_path / "john_left.csv")
    with pytest.raises(
        ValueError, match=r"john_left.csv: its name: expected names of videos that end neither in _left"
    ):
        import_table(path, tmp_path / "data", targets=["stress"])


def test_parts_that_would_have_one_name(tmp_path):
    columns = many(2, 6, group=["one"] * 12)
    columns["video"] = ["a"] * 6 + ["a-train"] * 6
    columns["stress"] = columns["stress"][:6] + [""] * 6
    refused(tmp_path, columns, "expected videos and parts of different names, got 'a-train' twice")


def test_names_of_columns_may_be_anything(tmp_path):
    words = ["x_é\x1b[31m", 'x_"quoted", with, commas', "x_", "x_line\nbreak", ""]
    strange = {name: [k % (j + 2) for k in range(12)] for j, name in enumerate(words)}
    report, root = imported(tmp_path, plain(**strange))
    assert json.loads((root / "features/x/meta.json").read_text())["columns"] == report.modalities["x"].columns
    assert len(report.modalities["x"].columns) == 5
    assert "\x1b" not in report.text()
    assert report.ignored[""] == "without a name"


# -------------------------------------------------------------------------------------------------------------- dialects
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_dialects(tmp_path, delimiter, end, encoding):
    text = SIMPLE.replace(",", delimiter).replace("\n", end).replace("anna", '"an na"') + end
    write(tmp_path / "t.tsv", text, encoding)
    report = import_table(tmp_path / "t.tsv", tmp_path / "data")
    assert report.rows == 5
    assert load(tmp_path / "data", "an na")["clip"].num_frames == 3


def test_lines_are_those_of_the_file(tmp_path):
    """Quotes may hold line breaks, and blank lines are passed by."""
    text = 'time,"a ""b"",\nc",x_one,valence\n0,"p,q",1,0.5\n\n1,"two\nlines",2,0.5\n2,"p",oops,0.1\n'
    refused(tmp_path, text, "table.csv:7: x_one: expected a number")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "table.csv:1: expected a header and rows, got an empty file"),
        ("\n\n", ":1: expected a header with the names of the columns"),
        (f"time,{'A' * 140_000}\n1,2\n", ":1: expected a header with the names of the columns, got text that is none"),
        ("1,2,3\n4,5,6\n", ":1: expected a header with the names of the columns, got numbers"),
        ("time,x_a,valence\n", "expected rows below the header, got none"),
        ("time,x_a,x_a,valence\n0,1,1,1\n", "table.csv:1: expected columns of different names, got x_a twice, columns 2 and 3"),
        ("time,x_a,valence\n0,1,0.5\n1,2\n", ":3: expected 3 cells, as in the header, got 2"),
        ("time,x_a,valence\n0,1,0.5\n1,2,0,5\n", ":3: expected 3 cells, as in the header, got 4: is a comma in a number"),
        ("time;x_a;valence\n0;1,5;0\n", ":2: x_a: expected a number with a decimal point"),
        ("time;x_a;valence\n0;1;0,5\n", ":2: valence: expected a number with a decimal point"),
        ("time\tx_a\tvalence\n0,5\t1\t0\n", ":2: time: .*(decimal point|ISO 8601)"),
        ('time,x_a,valence\n0,"1,0.5\n1,2,3\n', ":2: expected CSV, got what is none from here on"),
        ('time,x_a,valence\n0,"1"2,0.5\n', ":2: expected CSV, got what is none"),
    ],
)  # fmt: skip
def test_what_is_no_table(tmp_path, text, words):
    refused(tmp_path, text, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (SIMPLE.encode().replace(b"ben", b"b\xe9n", 1), ":5: expected text in UTF-8, got the byte 0xe9"),
        (SIMPLE.encode("utf-16"), ":1: expected text in UTF-8, got UTF-16"),
        (b"PK\x03\x04 a spreadsheet", "got a ZIP archive, as spreadsheets are"),
        (b"\x1f\x8b\x08 packed", "got a gzip archive"),
        (b"PAR1 cut short", "expected a Parquet file, got one that cannot be read"),
    ],
)  # fmt: skip
def test_other_files(tmp_path, data, words):
    if data.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        import_table(tmp_path / "t.csv", tmp_path / "data")
    with pytest.raises(FileNotFoundError):
        import_table(tmp_path / "none.csv", tmp_path / "data")


# --------------------------------------------------------------------------------------------------------------- Parquet
def test_parquet_is_read_like_csv(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(3)
    n = 60
    when = [datetime(2024, 1, 1) + timedelta(hours=k % 20) for k in range(n)]
    one = rng.standard_normal(n).astype(np.float32)
    columns = {
        "video": arrow.array([f"v{k // 20}" for k in range(n)]).dictionary_encode(),
        "time": arrow.array(when, arrow.timestamp("ns")),
        "x_float": arrow.array([None if k % 9 == 4 else float(one[k]) for k in range(n)], arrow.float32()),
        "x_int": arrow.array([None if k % 7 == 5 else k for k in range(n)], arrow.int16()),
        "x_bool": arrow.array([k % 3 == 0 for k in range(n)]),
        "x_text": arrow.array([f"{k / 4}" for k in range(n)]),
        "x_nan": arrow.array([np.nan if k == 3 else 1.5 + k for k in range(n)]),
        "y_list": arrow.array([[1.0, 2.0]] * n), "room": arrow.array([float(k // 20) for k in range(n)]),
        "y_word": arrow.array(["b"] * n),
        "y_one": arrow.array(rng.standard_normal(n).astype(np.float16), arrow.float16()),
        "stress": arrow.array(rng.uniform(0, 9, n)),
    }  # fmt: skip
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet", row_group_size=13)
    report = import_table(tmp_path / "t.parquet", tmp_path / "parquet", targets=["stress"])
    assert report.fps == pytest.approx(1 / 3600)
    assert report.ignored == {"y_list": "not numbers", "y_word": "not numbers"}
    assert report.groupings == {"room": 3, "video": 3}
    assert json.loads((tmp_path / "parquet/groups.json").read_text())["room"] == {"v0": "0", "v1": "1", "v2": "2"}
    as_text = {
        name: [int(x) if isinstance(x, bool) else "" if x is None or x != x else x for x in column.to_pylist()]
        for name, column in columns.items()
    }  # fmt: skip
    as_text["time"] = [time.isoformat() for time in when]
    as_text["room"] = [int(x) for x in as_text["room"]]
    again = import_table(rows_of(as_text, tmp_path / "t.csv"), tmp_path / "csv", targets=["stress"])
    assert again.text().replace("t.csv", "t.parquet").replace("/csv", "/parquet") == report.text()
    found, wanted = contents(tmp_path / "parquet"), contents(tmp_path / "csv")
    for name in (MARK, "features/x/meta.json", "features/y/meta.json"):
        found.pop(name), wanted.pop(name)
    assert found == wanted


def test_parquet_names_the_row(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"time": np.arange(9.0), "x_one": np.arange(9.0), "valence": np.linspace(-1, 1, 9)}
    columns["x_one"][6] = np.inf
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t.parquet: row 7: x_one: expected a finite number, got 'inf'"):
        import_table(tmp_path / "t.parquet", tmp_path / "data")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pip install sage-ext\[parquet\]"):
        import_table(tmp_path / "t.parquet", tmp_path / "data")


# ---------------------------------------------------------------------------------------------------------------- doubts
def test_a_target_among_the_features_is_noted(tmp_path):
    rng = np.random.default_rng(4)
    stress = rng.uniform(0, 10, 60)
    columns = many(
        3, 20, stress=stress, x_copy=stress, y_scaled=-2 * stress + 1, y_honest=stress + rng.standard_normal(60)
    )
    report, _ = imported(tmp_path, columns)
    leaks = [note for note in report.notes if "is the target" in note]
    assert len(leaks) == 2
    assert leaks[0].startswith("x: x_copy is the target stress, or nearly (correlation 1.0000)")
    assert leaks[1].startswith("y: y_scaled is the target stress, or nearly (correlation -1.0000)")


def test_a_column_too_small_for_its_modality_is_noted(tmp_path):
    columns = many(3, 20, x_tiny=[(k % 7) * 1e-9 for k in range(60)])
    report, _ = imported(tmp_path, columns)
    assert any("dead to the model: x_tiny" in note for note in report.notes)


# ------------------------------------------------------------------------------------------------------------ the folder
def test_an_existing_folder_is_not_touched(tmp_path):
    table = write(tmp_path / "t.csv", SIMPLE)
    out = tmp_path / "data"
    out.mkdir()
    import_table(table, out)  # an empty one is fine
    before = contents(out)
    with pytest.raises(FileExistsError, match="holds something; --overwrite replaces a data set that an import wrote"):
        import_table(table, out)
    assert contents(out) == before
    write(table, SIMPLE.replace("110", "111"))
    import_table(table, out, overwrite=True)
    assert contents(out) != before
    before = contents(out)
    (out / "features/a/mine.npy").write_text("precious")
    with pytest.raises(FileExistsError, match=r"got .*mine.npy besides"):
        import_table(table, out, overwrite=True)
    assert contents(out) == {**before, "features/a/mine.npy": b"precious"}
    (out / "features/a/mine.npy").unlink()
    (out / "runs").mkdir()
    with pytest.raises(FileExistsError, match=r"got .*runs besides"):
        import_table(table, out, overwrite=True)
    (out / "runs").rmdir()
    (out / "fps.json").unlink()
    (out / "fps.json").symlink_to(table)
    with pytest.raises(FileExistsError, match=r"got .*fps.json besides"):
        import_table(table, out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["data", "t.csv"]


@pytest.mark.parametrize(
    "mark", [None, "{", "[]", '{"what": "sage-ext import"}', '{"what": "x", "files": ["notes.txt"]}']
)
def test_a_folder_of_somebody_else_is_not_replaced(tmp_path, mark):
    out = tmp_path / "data"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    if mark is not None:
        (out / MARK).write_text(mark)
    before = contents(out)
    with pytest.raises(FileExistsError, match="expected a folder that"):
        import_table(write(tmp_path / "t.csv", SIMPLE), out, overwrite=True)
    assert contents(out) == before


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(FileExistsError):
        import_table(write(tmp_path / "t.csv", SIMPLE), tmp_path / "data", overwrite=True)
    assert (tmp_path / "data").read_text() == "mine"


@pytest.mark.parametrize("when", ["write", "replace"])
def test_whole_or_not_at_all(tmp_path, monkeypatch, when):
    """Whatever goes wrong, the old data set stands, and nothing is left beside it."""
    table, out = write(tmp_path / "t.csv", SIMPLE), tmp_path / "data"
    import_table(table, out)
    before = contents(out)
    if when == "write":
        monkeypatch.setattr(table_module.np.lib.format, "write_array_header_1_0", lambda *_: 1 / 0)
        wrong: type[BaseException] = ZeroDivisionError
    else:
        replace = os.replace

        def fail(source, target):
            if Path(target) == out:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        wrong = KeyboardInterrupt
    with pytest.raises(wrong):
        import_table(table, out, overwrite=True)
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ["data", "t.csv"]


def test_what_came_into_the_folder_meanwhile_is_not_lost(tmp_path, monkeypatch):
    table, out = write(tmp_path / "t.csv", SIMPLE), tmp_path / "data"
    import_table(table, out)
    usual = table_module._Import.write

    def slow(self, root):
        (out / "notes.txt").write_text("mine")
        return usual(self, root)

    monkeypatch.setattr(table_module._Import, "write", slow)
    with pytest.raises(FileExistsError, match=r"got .*notes.txt besides"):
        import_table(table, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["data", "t.csv"]


def test_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    import_table(write(tmp_path / "t.csv", SIMPLE), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / MARK).exists()


# -------------------------------------------------------------------------------------------------------------- command
def command(*words: str) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_the_command(tmp_path):
    columns = many(
        6, 5, person=["p"] * 10 + ["q"] * 10 + ["r"] * 10, site=["n"] * 20 + ["s"] * 10, v_one=[k * 3 % 8 for k in range(30)],
        w_one=[k * 3 % 7 for k in range(30)], obs=[1, 2, 3] * 10,
    )  # fmt: skip
    columns["mood, self-rated"] = columns.pop("stress")
    columns["clock"] = columns.pop("time")
    rows_of(columns, tmp_path / "t.csv")
    out = tmp_path / "data"
    with pytest.raises(ValueError, match="targets: 'mood, self-rated': expected the name of a target, without commas"):
        command(str(tmp_path / "t.csv"), "--out", str(out), "--targets", '"mood, self-rated"', "--fps", "1/60")
    columns["mood"] = columns.pop("mood, self-rated")
    rows_of(columns, tmp_path / "t.csv")
    text = command(
        str(tmp_path / "t.csv"), "--out", str(out), "--targets", "mood", "--range", "mood=-1:7", "--modalities",
        "picture=v_+w_,x", "--group", "person,site", "--time", "clock",
    )  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == f"{out}: 6 videos, 30 frames, 0.00833 hours at 1 frame a second, from 30 rows of t.csv"
    words = [line.split() for line in lines]
    assert ["picture", "2", "0%", "v_one,", "w_one"] in words
    assert ["mood", "[-1,", "7]", "100%", "as", "asked", "for"] in words
    assert "groupings: person (3 groups), site (2 groups), group (3 groups), video (6 groups)" in lines
    assert "ignored, in no modality: obs" in lines
    assert lines[-1] == f"next: sage-ext check {out}, then sage-ext train --data {out} --run RUN"
    record = json.loads((out / MARK).read_text())
    assert record["options"]["modalities"] == {"picture": ["v_", "w_"], "x": ["x_", "x.", "x:"]}
    (tmp_path / "map.json").write_text('{"all": ["*_one"]}')
    text = command(
        str(tmp_path / "t.csv"), "--out", str(out), "--targets", "mood", "--map", str(tmp_path / "map.json"), "--time", "clock",
        "--overwrite", "--pieces", "2", "--fps", "1",
    )  # fmt: skip
    assert "x_one, v_one, w_one" in text


@pytest.mark.parametrize(
    "words",
    [
        ["--range", "mood"], ["--range", "mood=1"], ["--range", "=0:1"],
        ["--modalities", "a=,b=x"], ["--modalities", "a=x,a=y"], ["--modalities", ""],
        ["--targets", ","], ["--fps", "fast"], ["--fps", "1/0"], ["--pieces", "x"],
    ],
)  # fmt: skip
def test_arguments_that_are_none(tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        command("t.csv", "--out", "data", *words)
    assert "expected" in capsys.readouterr().err or words[0] == "--pieces"


def test_a_range_twice(tmp_path):
    with pytest.raises(ValueError, match="--range: expected one a target, got mood, mood"):
        command("t.csv", "--out", "data", "--range", "mood=0:1", "--range", "mood=0:2")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", ":1: expected JSON"), *((text, 'expected {"modality"') for text in ("[]", '{"a": "x"}', '{"a": [1]}'))],
)  # fmt: skip
def test_a_map_that_is_none(tmp_path, text, words):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'map.json'}") + ".*" + re.escape(words)):
        read_map(write(tmp_path / "map.json", text))


def test_help_can_be_printed():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    text = parser.format_help()
    assert "(default: None)" not in text
    assert "--range NAME=LOW:HIGH" in text


# ---------------------------------------------------------------------------------------------------------------- memory
def test_numbers_are_not_kept_as_objects(tmp_path):
    rng = np.random.default_rng(5)
    rows, width = 12000, 40
    text = io.StringIO()
    np.savetxt(text, np.c_[np.arange(rows), rng.standard_normal((rows, width)), rng.uniform(-1, 1, rows)], "%.4f", ",")
    header = ",".join(["time", *(f"x_{d}" for d in range(width)), "valence"])
    path = write(tmp_path / "t.csv", f"{header}\n{text.getvalue()}")
    tracemalloc.start()
    import_table(path, tmp_path / "data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * rows * width  # float32 of all features; as objects of Python 14 times as much


# -------------------------------------------------------------------------------------------------------------- quality
def test_quality_is_no_feature(tmp_path):
    """Of columns that begin so, also where a modality would take them; gaps and empty cells are NaN."""
    columns = {
        "video": ["a"] * 4 + ["b"] * 4,
        "time": [0, 1, 2, 4] * 2,
        "v_smile": [0.1, 0.2, 0.3, 0.4] * 2,
        "v_score": [0.9, "", 0.7, 0.6] * 2,
        "v_score_of_blur": [1, 2, 3, "NaN"] * 2,
        "w_level": [-1, -2, -3, -4] * 2,
        "voice_loud": [5, 6, 7, 8] * 2,
        "stress": [1, 2, 3, 4, 5, 6, 7, 8],
    }
    for options in (
        {},
        {"modalities": {"v": "v_", "voice": "voice_"}},
        {"columns": {"v": ["v_*"], "voice": ["voice_loud"]}},
    ):
        report, root = imported(tmp_path, columns, quality={"v": ["v_score"], "voice": "w_"}, overwrite=True, **options)
        assert {name: m.columns for name, m in report.modalities.items()} == {"v": ["v_smile"], "voice": ["voice_loud"]}
        assert report.quality == {"v": ["v_score", "v_score_of_blur"], "voice": ["w_level"]}
        assert not report.ignored
        assert "quality of v: v_score, v_score_of_blur\n" in report.text()
        data = AffWild2(root, "train")
        assert data.mismatches == []
        assert data.quality_dims == {"v": 2, "voice": 1}
        assert data.quality_columns == {"v": ("v_score", "v_score_of_blur"), "voice": ("w_level",)}
        clip = data[0]
        expected = np.array([[0.9, 1], [np.nan, 2], [0.7, 3], [np.nan, np.nan], [0.6, np.nan]], np.float32)
        np.testing.assert_array_equal(clip.quality["v"][:], expected)
        assert clip.present["v"].tolist() == [True, True, True, False, True]  # quality makes nothing absent
    record = json.loads((root / MARK).read_text())
    assert record["options"]["quality"] == {"v": ["v_score"], "voice": ["w_"]}
    assert any(name.endswith("a.quality.npy") for name in record["files"])


def test_wrong_quality(tmp_path):
    columns = plain(x_q=[0.5] * 12, y_two=list(range(12)))
    refused(
        tmp_path, columns, r"quality: 'x': expected columns that begin with 'q_', got none among ", quality={"x": "q_"}
    )
    refused(tmp_path, columns, r"quality: expected modalities \(x, y\), got 'z'", quality={"z": "x_q"})
    refused(tmp_path, columns, "quality: 'x': expected columns that begin with '', got none among", quality={"x": ""})
    words = "quality: expected a column of one modality, got x_q in y, the quality of x too"
    refused(tmp_path, columns, words, quality={"x": "x_q", "y": "x_"})
    refused(
        tmp_path, columns, "columns: 'x': expected features, got x_q, the quality of x",
        quality={"x": "x_q"}, columns={"x": ["x_one", "x_q"]},
    )  # fmt: skip
    text = {**columns, "x_q": ["good"] * 12}
    assert "table.csv:2: x_q: " in refused(tmp_path, text, "expected a number", quality={"x": "x_q"})


def test_quality_on_the_command_line(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    path = rows_of(plain(x_q=[0.5] * 12), tmp_path / "table.csv")
    out = ["--out", str(tmp_path / "data"), "--targets", "stress", "--quality"]
    assert "quality of x: x_q" in run(parser.parse_args([str(path), *out, "x=x_q+x_r"]))
    for words in ("x", "x=a_,y", "x="):
        with pytest.raises(SystemExit):
            parser.parse_args([str(path), *out, words])
        assert "argument --quality: expected NAME=PREFIX" in capsys.readouterr().err
