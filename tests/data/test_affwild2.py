"""Reader: layouts, labels, presence, persons, clocks, mismatches, every fault by file and line; submission writer."""

from __future__ import annotations

import io
import json
import pickle
import re
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sage_ext.data.affwild2 as affwild2
from sage_ext.data import AffWild2, clip_tensors, write_submission
from sage_ext.data.affwild2 import Quality, Resampled, bare_name, read_annotation, read_sample
from sage_ext.data.targets import unscaled

OFFICIAL = "6th ABAW Annotations/VA_Estimation_Challenge"


def annotate(
    root: Path,
    name: str,
    rows: str | int,
    split: str = "Train_Set",
    task: str = OFFICIAL,
    header: str = "valence,arousal",
) -> Path:
    """rows: the text below the header, or a number of frames."""
    path = root / task / split / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{i / 1000:.3f},{-i / 1000:.3f}\n" for i in range(rows)) if isinstance(rows, int) else rows
    path.write_text(f"{header}\n{text}")
    return path


def featurize(root: Path, modality: str, name: str, rows: np.ndarray | int, dim: int = 3, **meta) -> Path:
    """rows: the array, or a number of rows whose value is the row's number."""
    folder = root / "features" / modality
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, int):
        rows = np.repeat(np.arange(rows, dtype=np.float32)[:, None], dim, axis=1)
    np.save(folder / f"{name}.npy", rows)
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder / f"{name}.npy"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One video of ten frames with two modalities."""
    annotate(tmp_path, "clip", 10)
    featurize(tmp_path, "audio", "clip", 10, dim=2)
    featurize(tmp_path, "visual", "clip", 10, dim=3)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        (OFFICIAL, "Train_Set"),
        ("Third ABAW Annotations/VA_Estimation_Challenge", "Train_Set"),
        ("3rd ABAW Annotations/Third ABAW Annotations/VA_Estimation_Challenge", "Train_Set"),
        ("annotations/VA_Set", "Train_Set"),
        ("VA_Set", "Training_Set"),
    ],
)
def test_layouts(tmp_path, task, folder):
    annotate(tmp_path, "b", 4, folder, task)
    annotate(tmp_path, "a", 3, folder, task)
    annotate(tmp_path, "c", 5, "Validation_Set", task)
    (tmp_path / task / folder / "._a.txt").write_text("resource fork of a Mac's archiver")
    annotate(tmp_path, "a", 3, folder, "__MACOSX/VA_Set")
    for name in "abc":
        featurize(tmp_path, "audio", name, 5)
    data = AffWild2(tmp_path, "train")
    assert data.names == ["a", "b"]
    assert [clip.num_frames for clip in data] == [3, 4]
    assert AffWild2(str(tmp_path), "validation").names == ["c"]
    assert data[-1].name == "b"
    with pytest.raises(IndexError):
        data[2]


def test_folders_can_be_given(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    annotate(other, "clip", 7, task="mine")
    featurize(other, "text", "clip", 7, dim=5)
    data = AffWild2(root, "train", annotations=other / "mine", features=other / "features")
    assert data[0].num_frames == 7
    assert data.modalities == {"text": 5}


def test_modalities_are_all_or_those_named_in_order(root):
    assert list(AffWild2(root, "train").modalities.items()) == [("audio", 2), ("visual", 3)]
    data = AffWild2(root, "train", modalities=["visual", "audio"])
    assert list(data.modalities.items()) == [("visual", 3), ("audio", 2)]
    assert list(data[0].features) == list(data[0].present) == ["visual", "audio"]
    assert list(AffWild2(root, "train", modalities=("visual",))[0].features) == ["visual"]


@pytest.mark.parametrize("split", ["val", "Train", 3])
def test_split_is_checked(root, split):
    with pytest.raises(ValueError, match=re.escape(f"split: expected one of train, validation, test, got {split!r}")):
        AffWild2(root, split)


def test_what_is_not_there_is_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: expected a folder, got .*nowhere"):
        AffWild2(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"annotations: expected a folder .*Validation_Set, got none"):
        AffWild2(root, "validation")
    with pytest.raises(
        FileNotFoundError, match=r"annotations: expected a folder .*elsewhere/Train_Set or Training_Set, got none"
    ):
        AffWild2(root, "train", annotations="elsewhere")
    with pytest.raises(FileNotFoundError, match=r"features: expected a folder, got .*elsewhere"):
        AffWild2(root, "train", features="elsewhere")
    with pytest.raises(FileNotFoundError, match=r"modalities: expected folders of .* \(audio, visual\), got 'text'"):
        AffWild2(root, "train", modalities=["text"])
    with pytest.raises(TypeError, match="modalities: expected a sequence of names, got the string 'audio'"):
        AffWild2(root, "train", modalities="audio")
    with pytest.raises(ValueError, match="modalities: expected different names"):
        AffWild2(root, "train", modalities=["audio", "audio"])
    with pytest.raises(FileNotFoundError, match=r"sample_submission.txt"):
        AffWild2(root, "test")
    (root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"features: expected folders of modalities in .*, got none"):
        AffWild2(root, "train", features=root / "empty")
    (root / OFFICIAL / "Validation_Set").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Validation_Set: expected annotations \(\*\.txt\), got none"):
        AffWild2(root, "validation")


def test_two_annotation_folders_are_an_error(root):
    annotate(root, "clip", 10, task="5th ABAW Annotations/VA_Estimation_Challenge")
    with pytest.raises(
        ValueError, match=r"root: expected one annotation folder, got .*5th.*6th.*; say which with annotations="
    ):
        AffWild2(root, "train")
    assert len(AffWild2(root, "train", annotations=root / OFFICIAL)) == 1


# -------------------------------------------------------------------------------------------------------- annotations


def test_labels_and_invalid_rows(tmp_path):
    rows = "-5,-5\n0.25,-1\n-5,0.5\n0.5,-5.0\n1,0\n-0.125,1e-3\n-5,-5\n"
    labels, valid = read_annotation(annotate(tmp_path, "clip", rows))
    np.testing.assert_array_equal(valid, [False, True, False, False, True, True, False])
    np.testing.assert_array_equal(labels[valid], np.float32([[0.25, -1], [1, 0], [-0.125, 1e-3]]))
    assert np.isnan(labels[~valid]).all()
    assert labels.dtype == np.float32
    assert labels.shape == (7, 2)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(*2 * [st.one_of(st.integers(-1000, 1000).map(lambda i: i / 1000), st.just(-5.0))]),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\n", "\n\n"]),
)
def test_annotation_round_trip(tmp_path_factory, values, end, last):
    path = tmp_path_factory.mktemp("round") / "clip.txt"
    path.write_bytes(("\ufeffvalence,arousal" + end + end.join(f"{v},{a}" for v, a in values) + last).encode())
    labels, valid = read_annotation(path)
    expected = np.float32(values)
    np.testing.assert_array_equal(valid, (expected != -5).all(axis=1))
    np.testing.assert_array_equal(labels[valid], expected[valid])
    assert len(labels) == len(values)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "expected text, got an empty file"),
        (" \n\n", 1, "expected text, got an empty file"),
        ("valence,arousal\n", 2, "expected rows of 'valence,arousal', got the end of the file"),
        ("arousal,valence\n0,-5\n", 2, "valence: expected a value in [-1, 1] or nothing (not annotated), got -5"),
        ("0,0\n0,0\n", 1, "expected a header of targets, as in 'valence,arousal', got numbers: '0,0'"),
        ("valence,arousal\n0,0\n0.1\n", 3, "expected 2 columns (valence,arousal), got 1: '0.1'"),
        ("valence,arousal\n0,0,0\n", 2, "expected 2 columns (valence,arousal), got 3: '0,0,0'"),
        ("valence,arousal\n0,0\n0,0,\n0\n", 3, "expected 2 columns (valence,arousal), got 3: '0,0,'"),
        ("valence,arousal\n0 0\n", 2, "expected 2 columns (valence,arousal), got 1: '0 0'"),
        ("valence,arousal\n0,0\n0,happy\n", 3, "arousal: expected a number, got 'happy'"),
        ("valence,arousal\n,0\n", 2, "valence: expected a number, got ''"),
        ("valence,arousal\n0,0\n# 0,0\n", 3, "valence: expected a number, got '# 0'"),
        ("valence,arousal\n0,0\n1.001,0\n", 3, "valence: expected a value in [-1, 1] or -5 (invalid), got 1.001"),
        ("valence,arousal\n0,-2\n", 2, "arousal: expected a value in [-1, 1] or -5 (invalid), got -2"),
        ("valence,arousal\n0,5\n", 2, "arousal: expected a value in [-1, 1] or -5 (invalid), got 5"),
        ("valence,arousal\nnan,0\n", 2, "valence: expected a value in [-1, 1] or -5 (invalid), got nan"),
        ("valence,arousal\n0,1e400\n", 2, "arousal: expected a value in [-1, 1] or -5 (invalid), got 1e400"),
        ("valence,arousal\n0,0\n\n0,0\n", 3, "expected a row, got a blank line, which would shift every later frame"),
        ("valence,arousal\n0,0\n0_1,0\n", 3, "valence: expected a number, got '0_1'"),
    ],
)
def test_malformed_annotations(root, text, line, words):
    path = root / OFFICIAL / "Train_Set" / "clip.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}:{line}: {words}") + "$"):
        AffWild2(root, "train")


def test_annotation_that_is_not_text(root):
    path = root / OFFICIAL / "Train_Set" / "clip.txt"
    path.write_bytes(b"valence,arousal\n0,0\n0,\xff\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: expected text in UTF-8, got the byte 0xff")):
        AffWild2(root, "train")


def test_good_annotations_take_the_quick_path(tmp_path, monkeypatch):
    monkeypatch.setattr(affwild2.np, "empty", lambda *_: pytest.fail("read cell by cell"))
    rows = "".join(f"{i % 1000 / 1000},-5\n" for i in range(4700))
    assert len(read_annotation(annotate(tmp_path, "clip", rows))[0]) == 4700


# ---------------------------------------------------------------------------------------- presence, persons, lengths


def test_features_are_the_rows_of_the_file(root):
    clip = AffWild2(root, "train")[0]
    np.testing.assert_array_equal(clip.features["visual"][2:5, 0], [2, 3, 4])
    np.testing.assert_array_equal(clip.labels[:, 0], np.arange(10, dtype=np.float32) / np.float32(1000))
    assert clip.valid.all()
    assert clip.present["audio"].all()
    assert AffWild2(root, "train").mismatches == []


def test_rows_with_nan_are_absent(root):
    rows = np.ones((10, 3), np.float32)
    rows[4] = np.nan
    rows[7, 1] = np.nan
    featurize(root, "visual", "clip", rows)
    clip = AffWild2(root, "train")[0]
    np.testing.assert_array_equal(np.flatnonzero(~clip.present["visual"]), [4, 7])
    assert clip.present["audio"].all()


def test_nan_rows_are_found_across_blocks(tmp_path):
    annotate(tmp_path, "clip", 950)
    rows = np.ones((9_500, 2), np.float32)
    gone = [0, 4095, 4096, 9_499]
    rows[gone] = np.nan
    annotate(tmp_path, "clip", "0,0\n" * 9_500)
    featurize(tmp_path, "audio", "clip", rows)
    np.testing.assert_array_equal(np.flatnonzero(~AffWild2(tmp_path, "train")[0].present["audio"]), gone)


def test_companion_mask(root):
    mask = np.ones(10, bool)
    mask[[0, 9]] = False
    np.save(root / "features/audio/clip.mask.npy", mask)
    clip = AffWild2(root, "train")[0]
    np.testing.assert_array_equal(clip.present["audio"], mask)
    assert clip.present["visual"].all()


def test_frames_without_an_image_are_absent(root):
    featurize(root, "visual", "clip", 10, images="cropped_aligned")
    folder = root / "cropped_aligned" / "clip"
    folder.mkdir(parents=True)
    for i in (1, 2, 4, 10, 11):
        (folder / f"{i:05d}.jpg").touch()
    (folder / "3.jpg").touch()  # not the name of frame 3
    clip = AffWild2(root, "train")[0]
    np.testing.assert_array_equal(np.flatnonzero(clip.present["visual"]) + 1, [1, 2, 4, 10])
    assert clip.present["audio"].all()


def test_no_image_folder_is_an_absent_clip_and_reported(root):
    featurize(root, "visual", "clip", 10, images="cropped_aligned")
    (root / "cropped_aligned").mkdir()
    data = AffWild2(root, "train")
    assert not data[0].present["visual"].any()
    assert data.mismatches == [f"clip: no folder {root / 'cropped_aligned/clip'}: visual is absent in the whole clip"]


def test_all_three_signs_of_absence_together(root):
    rows = np.ones((9, 3), np.float32)  # frame 10 has no row
    rows[1] = np.nan
    featurize(root, "visual", "clip", rows, images="faces")
    np.save(root / "features/visual/clip.mask.npy", np.arange(9) != 2)
    (root / "faces/clip").mkdir(parents=True)
    for i in (1, 2, 3, 5, 6, 7, 8, 9, 10):
        (root / f"faces/clip/{i:05d}.jpg").touch()
    data = AffWild2(root, "train")
    np.testing.assert_array_equal(np.flatnonzero(~data[0].present["visual"]), [1, 2, 3, 9])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones(9, bool), r"expected the shape (10,), one value a row of clip.npy, got (9,)"),
        (np.ones((10, 1), bool), r"expected the shape (10,), one value a row of clip.npy, got (10, 1)"),
        (np.ones(10, np.uint8), "expected bool, got uint8"),
    ],
)
def test_wrong_masks(root, mask, words):
    path = root / "features/audio/clip.mask.npy"
    np.save(path, mask)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {words}")):
        AffWild2(root, "train")
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected a .npy file, got one that cannot be read: ")):
        AffWild2(root, "train")


@pytest.mark.parametrize(
    ("rows", "absent", "report"),
    [
        (8, [8, 9], "clip: visual has 8 rows for 10 frames: visual is absent in the last 2"),
        (13, [], "clip: visual has 13 rows for 10 frames: the last 3 are ignored"),
    ],
)
def test_lengths_that_differ(root, rows, absent, report):
    featurize(root, "visual", "clip", rows)
    data = AffWild2(root, "train")
    assert data.mismatches == [report]
    clip = data[0]
    np.testing.assert_array_equal(np.flatnonzero(~clip.present["visual"]), absent)
    item = clip_tensors(clip, ["visual"])
    kept = min(rows, 10)
    np.testing.assert_array_equal(item["features"]["visual"][:kept, 0], np.arange(kept))  # not shifted
    np.testing.assert_array_equal(item["features"]["visual"][kept:], 0)
    assert item["features"]["visual"].shape == (10, 3)
    np.testing.assert_array_equal(item["labels"][:, 0], clip.labels[:, 0])


def test_missing_modality_is_absent_and_reported(root):
    annotate(root, "other", 6)
    path = featurize(root, "audio", "other", 6, dim=2)
    data = AffWild2(root, "train")
    assert data.mismatches == [f"other: no {root / 'features/visual/other.npy'}: visual is absent in the whole clip"]
    clip = data[1]
    assert clip.features["visual"].shape == (0, 3)
    assert clip.present["visual"].shape == (6,)
    assert not clip.present["visual"].any()
    item = clip_tensors(clip, ["audio", "visual"], 1, 4)
    assert item["present"].tolist() == [[True, False]] * 3
    np.testing.assert_array_equal(item["features"]["visual"], np.zeros((3, 3)))
    path.unlink()
    data = AffWild2(root, "train")
    assert data.names == ["clip"]
    assert data.mismatches == ["other: annotated, but without features of any modality: left out"]
    (root / "features/audio/clip.npy").unlink()
    (root / "features/visual/clip.npy").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"^clip: expected features of a modality or more, got none \(looked for .*audio.*visual",
    ):
        AffWild2(root, "train")


def test_modality_without_any_features(root):
    (root / "features/text").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"modalities: expected features of 'text' for the train split, got none in .*text"
    ):
        AffWild2(root, "train")


@pytest.mark.parametrize(
    ("name", "bare"),
    [("v_left", "v"), ("v_right", "v"), ("v", "v"), ("v_left_b", "v_left_b"), ("a_left_right", "a_left")],
)
def test_bare_name(name, bare):
    assert bare_name(name) == bare


def test_persons_share_audio_only(tmp_path):
    """`duo` exists beside `duo_left` and `duo_right`: for the face it is another annotation."""
    for name, frames in (("duo", 4), ("duo_left", 5), ("duo_right", 6)):
        annotate(tmp_path, name, frames)
    featurize(tmp_path, "audio", "duo", np.full((6, 2), 1, np.float32), shared=True)
    for value, name in ((2, "duo"), (3, "duo_left")):
        featurize(tmp_path, "visual", name, np.full((6, 2), value, np.float32))
    data = AffWild2(tmp_path, "train")
    assert data.names == ["duo", "duo_left", "duo_right"]
    assert [clip.num_frames for clip in data] == [4, 5, 6]
    assert [clip.features["audio"][0, 0] for clip in data] == [1, 1, 1]
    assert [clip.present["audio"].all() for clip in data] == [True, True, True]
    assert [clip.features["visual"][0, 0] for clip in list(data)[:2]] == [2, 3]
    assert not data[2].present["visual"].any()
    visual = tmp_path / "features/visual"
    assert data.mismatches[-1] == (
        f"duo_right: no {visual / 'duo_right.npy'}: visual is absent in the whole clip; "
        f'if {visual / "duo.npy"} is a track that all persons share, say "shared": true in meta.json'
    )
    featurize(tmp_path, "audio", "duo_left", np.full((6, 2), 9, np.float32))
    assert [clip.features["audio"][0, 0] for clip in AffWild2(tmp_path, "train")] == [1, 9, 1]  # its own comes first


def test_shared_track_brings_its_mask(tmp_path):
    annotate(tmp_path, "duo_left", 4)
    featurize(tmp_path, "audio", "duo", 4, shared=True)
    np.save(tmp_path / "features/audio/duo.mask.npy", np.array([True, False, True, True]))
    assert AffWild2(tmp_path, "train")[0].present["audio"].tolist() == [True, False, True, True]


# ------------------------------------------------------------------------------------------------- malformed features


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.ones(10, np.float32), "expected an array (rows, D), got (10,)"),
        (np.ones((10, 2, 2), np.float32), "expected an array (rows, D), got (10, 2, 2)"),
        (np.ones((10, 3), np.int64), "expected floating point, got int64"),
        (np.ones((10, 3), bool), "expected floating point, got bool"),
        (np.ones((0, 3), np.float32), "expected rows of features, got the shape (0, 3)"),
        (np.ones((10, 0), np.float32), "expected rows of features, got the shape (10, 0)"),
        (np.full((10, 3), None), "expected a .npy file"),  # pickled objects
    ],
)
def test_wrong_arrays(root, rows, words):
    path = root / "features/visual/clip.npy"
    np.save(path, rows, allow_pickle=True)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {words}")):
        AffWild2(root, "train")


def test_unreadable_arrays(root):
    path = root / "features/visual/clip.npy"
    whole = path.read_bytes()
    unread = "expected a .npy file, got one that cannot be read: "
    archive = io.BytesIO()
    np.savez(archive, a=np.ones((10, 3), np.float32))
    for content, words in (
        (b"", unread + "it is empty"),
        (b"no array", unread),
        (archive.getvalue(), unread),
        (b"PK" + whole[2:], unread),
        (whole[:-4], "expected 120 bytes for the shape (10, 3) of float32, got 116"),
        (npy("(True, 3)"), "expected a .npy file of numbers, got the shape (True, 3)"),
        (npy("(-1, 3)"), "expected a .npy file of numbers, got the shape (-1, 3)"),
        (npy("(9223372036854775808, 3)"), "expected 110680464442257309696 bytes"),
        (npy(f"({10**40}, 3)"), "expected 12000"),
        (npy("(10, 3)", dtype="'|O'"), "expected a .npy file of numbers"),
        (npy("(10, 3)", dtype="'<f99'"), unread),
        (npy("(10, 3)", dtype="[]"), "expected "),
        (npy("(" * 3000), unread),
        (npy("None"), unread),
        (npy("(10,)"), "expected an array (rows, D), got (10,)"),
        (npy("(0, 3)"), "expected rows of features, got the shape (0, 3)"),
        (b"\x93NUMPY\x09\x00" + whole[8:], unread + "version (9, 0) of the format"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + whole[12:], unread),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {words}")):
            AffWild2(root, "train")
    path.write_bytes(whole)
    mask = root / "features/visual/clip.mask.npy"
    for content in (archive.getvalue(), npy(f"({10**15},)", dtype="'|b1'"), npy("(10,)", dtype="'|b1'")[:-120]):
        mask.write_bytes(content)
        with pytest.raises(ValueError, match="^" + re.escape(f"{mask}: expected ")):
            AffWild2(root, "train")


def npy(shape: str, dtype: str = "'<f4'") -> bytes:
    """A .npy file with this in its header, and 120 bytes of data."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(120)


def test_dimensions_must_agree(root):
    annotate(root, "other", 10)
    path = featurize(root, "visual", "other", 10, dim=4)
    featurize(root, "audio", "other", 10, dim=2)
    first = root / "features/visual/clip.npy"
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: expected D = 3, as in {first}, got 4") + "$"):
        AffWild2(root, "train")


def test_a_transposed_file_is_blamed_itself(root):
    """Also where it is the first one that is read."""
    for name in ("other", "third"):
        annotate(root, name, 10)
        featurize(root, "visual", name, 10, dim=3)
    path = featurize(root, "visual", "clip", np.ones((3, 10), np.float32))
    words = f"{path}: expected D = 3, as in {root / 'features/visual/other.npy'}, got 3 rows of 10: transposed?"
    with pytest.raises(ValueError, match="^" + re.escape(words) + "$"):
        AffWild2(root, "train")
    for frames, name in ((10, "clip"), (11, "other"), (12, "third")):
        featurize(root, "visual", name, np.ones((3, frames), np.float32))
    with pytest.raises(
        ValueError, match=r"visual: expected arrays \(rows, D\) of one D, got 3 rows in .*: transposed\?"
    ):
        AffWild2(root, "train")


def test_nine_modalities_are_refused_by_the_reader(root):
    names = [f"sensor{i}" for i in range(9)]
    for name in names:
        featurize(root, name, "clip", 10, dim=1)
    with pytest.raises(
        ValueError, match=r"modalities: expected 1 to 8 folders in .*features, got 9 .* choose among them"
    ):
        AffWild2(root, "train", modalities=names)
    assert list(AffWild2(root, "train", modalities=names[:8]).modalities) == names[:8]


def test_what_nothing_reads_is_listed(root):
    """Annotations of another ending, features of no split's videos, files that are no arrays."""
    folder = annotate(root, "clip", 10).parent
    (folder / "more.csv").write_text("valence,arousal\n0,0\n")
    for name in ("stray", "stray2"):
        featurize(root, "audio", name, 10, dim=2)
    np.save(root / "features/audio/clip.mask.npy", np.ones(10, bool))
    (root / "features/visual/clip.npz").write_bytes(b"")
    assert AffWild2(root, "train").mismatches == [
        f"{folder}: not read, for they do not end in .txt: more.csv",
        f"{root / 'features/audio'}: features without an annotation: stray, stray2",
        f"{root / 'features/visual'}: not read, for they do not end in .npy: clip.npz",
    ]


def test_faults_are_gathered_where_asked_for(root):
    """Each file that is wrong by itself, the others read."""
    for name in ("b", "c", "d"):
        annotate(root, name, 10)
        for m, dim in (("audio", 2), ("visual", 3)):
            featurize(root, m, name, 10, dim=dim)
    bad = annotate(root, "c", "0,7\n")
    short = root / "features/audio/d.npy"
    short.write_bytes(short.read_bytes()[:-4])
    wide = featurize(root, "visual", "b", 10, dim=5)
    faults: list[str] = []
    data = AffWild2(root, "train", faults=faults)
    assert data.names == ["b", "clip", "d"]
    assert [fault.split(": expected")[0] for fault in faults] == [f"{bad}:2: arousal", str(short), str(wide)]
    assert not data[0].present["visual"].any()
    assert data[0].present["audio"].all()
    assert not data[2].present["audio"].any()


# -------------------------------------------------------------------------------------------------------------- quality
def measure(root: Path, modality: str, name: str, rows: np.ndarray) -> Path:
    path = root / "features" / modality / f"{name}.quality.npy"
    np.save(path, rows)
    return path


def test_quality_is_read_beside_the_features(root):
    """A row a row; infinity and NaN unknown; a video without the file unknown throughout; other modalities without."""
    annotate(root, "other", 4)
    featurize(root, "audio", "other", 4, dim=2)
    featurize(root, "visual", "clip", 10, dim=3, quality=["score", "blur"])
    rows = np.arange(20, dtype=np.float64).reshape(10, 2)
    rows[3, 0], rows[4, 1], rows[5] = np.nan, np.inf, [1e300, -np.inf]
    measure(root, "visual", "clip", rows)
    data = AffWild2(root, "train")
    assert data.mismatches == [f"other: no {root / 'features/visual/other.npy'}: visual is absent in the whole clip"]
    assert data.quality_dims == {"visual": 2}
    assert data.quality_columns == {"visual": ("score", "blur")}
    clip, other = data
    assert list(clip.quality) == list(other.quality) == ["visual"]
    known = np.where(np.isfinite(rows) & (rows < 1e30), rows, np.nan)
    np.testing.assert_array_equal(clip.quality["visual"][:], known)
    np.testing.assert_array_equal(clip.quality["visual"][2:7], known[2:7])
    assert clip.quality["visual"][2:7].dtype == np.float32
    assert clip.quality["visual"].shape == (10, 2)
    assert other.quality["visual"].shape == (0, 2)
    assert clip.present["visual"].all()
    featurize(root, "visual", "other", 4, dim=3)
    other = AffWild2(root, "train")[1]
    assert np.isnan(np.asarray(other.quality["visual"])).all()
    assert other.quality["visual"].shape == (4, 2)
    (root / "features/visual/meta.json").unlink()
    data = AffWild2(root, "train")
    assert (data.quality_dims, data.quality_columns) == ({"visual": 2}, {})
    (root / "features/visual/clip.quality.npy").unlink()
    assert AffWild2(root, "train").quality_dims == {}
    assert AffWild2(root, "train")[0].quality == {}


@pytest.mark.parametrize(("rate", "fps"), [(50.0, 30.0), (10.0, 30.0), (30.0, 29.97), (100.0, 25.0), (1 / 3, 1.0)])
def test_quality_at_another_rate_is_the_nearest_row(rate, fps):
    rows = np.random.default_rng(0).standard_normal((40, 2))
    whole, features = Quality(rows, rate, fps), Resampled(rows, rate, fps)
    assert whole.shape == features.shape
    middle = (np.arange(len(whole)) + 0.5) / fps
    distance = np.abs(middle[:, None] - (np.arange(40) + 0.5) / rate)
    chosen = np.array([np.flatnonzero(rows[:, 0].astype(np.float32) == value)[0] for value in whole[:][:, 0]])
    assert (distance[np.arange(len(whole)), chosen] <= distance.min(1) + 1e-9).all()
    for span in (slice(3, 9), slice(len(whole) - 1, None), slice(5, 5), slice(7, 2), slice(0, 10**6)):
        np.testing.assert_array_equal(whole[span], whole[:][span])
    with pytest.raises(TypeError, match="span: expected a slice of step 1"):
        whole[::2]


def test_quality_of_a_shared_track_at_its_rate(tmp_path):
    for person in ("left", "right"):
        annotate(tmp_path, f"duo_{person}", 4)
    featurize(tmp_path, "audio", "duo", 8, shared=True, rate=60, quality=["loudness"])
    measure(tmp_path, "audio", "duo", np.arange(8.0)[:, None])
    data = AffWild2(tmp_path, "train")
    assert data.mismatches == []
    for clip in data:
        assert clip.quality["audio"][:][:, 0].tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.zeros((9, 2)), "expected 10 rows, as many as clip.npy, got 9"),
        (np.zeros(10), "expected an array (rows, Q), got (10,)"),
        (np.zeros((10, 2), int), "expected floating point, got int64"),
        (np.full((10, 2), "good"), "expected floating point, got <U4"),
        (np.zeros((10, 0)), "expected rows of quality, got the shape (10, 0)"),
        (np.zeros((10, 3)), "expected Q = 2, as in "),
        (None, "expected 160 bytes for the shape (10, 2) of float64, got 152"),
    ],
)
def test_wrong_quality(root, rows, words):
    """It is an error; where faults are asked for it is one of them, and the features are read all the same."""
    featurize(root, "visual", "clip", 10, dim=3, quality=["score", "blur"])
    path = measure(root, "visual", "clip", np.zeros((10, 2)) if rows is None else rows)
    if rows is None:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {words}")):
        AffWild2(root, "train")
    faults: list[str] = []
    clip = AffWild2(root, "train", faults=faults)[0]
    assert [fault.startswith(f"{path}: {words}") for fault in faults] == [True]
    assert clip.present["visual"].all()
    assert np.isnan(np.asarray(clip.quality["visual"])).all()


def test_quality_of_another_width_is_blamed_itself(root):
    """Without names of the columns most files are right."""
    for name in ("a", "b"):
        annotate(root, name, 10)
        featurize(root, "audio", name, 10, dim=2)
        measure(root, "audio", name, np.zeros((10, 2), np.float16))
    path = measure(root, "audio", "clip", np.zeros((10, 3)))
    like = root / "features/audio/a.quality.npy"
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: expected Q = 2, as in {like}, got 3") + "$"):
        AffWild2(root, "train")


@pytest.mark.parametrize("names", [[], ["a", 1], "score", {"score": 1}])
def test_wrong_names_of_quality(root, names):
    featurize(root, "audio", "clip", 10, dim=2, quality=names)
    with pytest.raises(ValueError, match=r"meta\.json: quality: expected a list of one name or more, got "):
        AffWild2(root, "train")


def test_quality_is_nobodys_features(root):
    """Neither a stranger's nor those of a video that is called like it; a stranger's quality is listed."""
    measure(root, "audio", "clip", np.zeros((10, 2)))
    annotate(root, "clip.quality", 10)
    data = AffWild2(root, "train")
    assert data.names == ["clip"]
    assert data.mismatches == ["clip.quality: annotated, but without features of any modality: left out"]
    path = measure(root, "audio", "stray", np.zeros((10, 2)))
    assert f"{path.parent}: features without an annotation: stray.quality" in AffWild2(root, "train").mismatches


def test_splits_with_quality_of_another_width(root):
    annotate(root, "val", 10, "Validation_Set")
    for name, columns in (("clip", 2), ("val", 3)):
        featurize(root, "audio", name, 10, dim=2)
        measure(root, "audio", name, np.zeros((10, columns)))
    splits = {split: AffWild2(root, split, modalities=["audio"]) for split in ("train", "validation")}
    words = "audio: expected as many columns of quality in both splits, got 2 in train and 3 in validation"
    assert affwild2.disagreements(splits) == [f"{root}: {words}"]


# -------------------------------------------------------------------------------------------- targets, rates and groups
@pytest.mark.parametrize("declared", [False, True])
def test_any_targets(root, declared):
    """Ranges from the header or from targets.json; labels on [-1, 1]; an empty cell or NaN is no annotation."""
    header = "stress,pain" if declared else "stress[0:100],pain[-2:6]"
    rows = ["0,6", "100,-2", "25,2", ",2", "50,nan", "NaN, "]
    annotate(root, "clip", "\n".join(rows) + "\n", header=header)
    if declared:
        (root / "targets.json").write_text('{"stress": [0, 100], "pain": [-2, 6]}')
    data = AffWild2(root, "train")
    assert [tuple(target) for target in data.targets] == [("stress", 0, 100), ("pain", -2, 6)]
    clip = data[0]
    assert clip.targets == data.targets
    assert clip.valid.tolist() == [True, True, True, False, False, False]
    np.testing.assert_array_equal(clip.labels[:3], [[-1, 1], [1, -1], [-0.5, 0]])
    assert np.isnan(clip.labels[3:]).all()
    np.testing.assert_allclose(unscaled(clip.labels[:3], data.targets), [[0, 6], [100, -2], [25, 2]])
    assert clip_tensors(clip, ["audio"])["labels"].shape == (6, 2)


def test_targets_json_chooses_columns_and_their_order(root):
    """The others are left, whatever they are called and hold; a header that says another range is an error."""
    annotate(root, "clip", "0,0.5,1,bob\n1,-0.5,0,\n", header="frame,a,b[0:1],rater")
    (root / "targets.json").write_text('{"b": [0, 1], "a": [-1, 1]}')
    np.testing.assert_array_equal(AffWild2(root, "train")[0].labels, [[1, 0.5], [-1, -0.5]])
    path = annotate(root, "clip", "0,0.5,1\n", header="frame,a,b[0:10]")
    words = f"{path}:1: b: expected the range [0, 1] that is stated elsewhere (targets.json), got the header 'frame,a,b[0:10]'"
    with pytest.raises(ValueError, match=re.escape(words)):
        AffWild2(root, "train")


def test_minus_five_is_a_value_where_the_range_holds_it(root):
    annotate(root, "clip", "-5,3\n-5,-5\n")
    (root / "targets.json").write_text('{"valence": [-10, 10], "arousal": [-1, 4]}')
    clip = AffWild2(root, "train")[0]
    assert clip.valid.tolist() == [True, False]
    np.testing.assert_allclose(unscaled(clip.labels[:1], clip.targets), [[-5, 3]], rtol=1e-6)


def test_scores_of_targets_differ(root):
    annotate(root, "clip", "0,0\n", header="valence,V")
    with pytest.raises(ValueError, match=r"clip.txt:1: .*: expected names whose scores differ"):
        AffWild2(root, "train")


def test_no_modality_is_called_fused(root):
    featurize(root, "fused", "clip", 10)
    with pytest.raises(ValueError, match="modalities: expected names other than 'fused'"):
        AffWild2(root, "train")


def test_the_file_whose_targets_differ_is_blamed(root):
    """Also where it is the first."""
    path = annotate(root, "a", "1\n", header="s[0:110]")
    for name in ("b", "clip"):
        annotate(root, name, "1\n", header="s[0:100]")
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: expected the targets s [0, 100], as in")):
        AffWild2(root, "train")


def test_persons_of_a_video_are_of_one_group(root):
    (root / "groups.json").write_text('{"duo_left": "p"}')
    assert AffWild2(root, "train").group("duo_right") == "p"
    (root / "groups.json").write_text('{"clip": "a\\ud800"}')
    with pytest.raises(ValueError, match=r"groups.json: group: clip: expected a name of characters that print"):
        AffWild2(root, "train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "expected 1 to 64 targets"),
        ("[1]", "expected a JSON object, got list"),
        ('{"a": [1, 1]}', "'a': expected low < high, got [1, 1]"),
        ('{"a": [0, Infinity]}', "'a': expected its range, two numbers [low, high], got [0, inf]"),
        ('{"a": [0, 1' + "0" * 400 + "]}", "'a': expected its range"),
        ('{"a": 1}', "'a': expected its range"),
        ('{"a": [true, 2]}', "'a': expected its range"),
        ('{"a,b": [0, 1]}', "'a,b': expected the name of a target"),
        ('{"frame": [0, 1]}', "'frame': expected a name"),
        ('{"b": [0, 1]}', "clip.txt:1: expected the columns b, got the header 'valence,arousal'"),
    ],
)
def test_malformed_targets(root, text, words):
    (root / "targets.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        AffWild2(root, "train")


def test_annotations_of_one_data_set_have_the_same_targets(root):
    first, other = annotate(root, "clip", "0\n", header="a"), annotate(root, "other", "0\n", header="b")
    featurize(root, "audio", "other", 1, dim=2)
    words = f"{other}:1: expected the targets a [-1, 1], as in {first}, got b [-1, 1]"
    with pytest.raises(ValueError, match=re.escape(words)):
        AffWild2(root, "train")


def test_one_rate_for_all(root):
    (root / "fps.json").write_text("0.5")
    data = AffWild2(root, "train")
    assert (data.fps("clip"), data.frame_rate, data[0].fps) == (0.5, 0.5, 0.5)
    (root / "fps.json").write_text("0")
    with pytest.raises(ValueError, match=r"fps.json: expected a positive number of frames a second, got 0"):
        AffWild2(root, "train")


def test_the_frame_rate_is_that_of_most_frames(root):
    for name, frames in (("slow", 30), ("fast", 25)):
        annotate(root, name, frames)
        featurize(root, "audio", name, frames, dim=2)
    (root / "fps.json").write_text('{"slow": 10, "fast": 60, "clip": 25}')  # 30, 25 and 10 frames
    assert AffWild2(root, "train").frame_rate == 25


def test_groups(root):
    (root / "groups.json").write_text('{"run": {"clip": 3}, "group": {"clip": "anna"}}')
    data = AffWild2(root, "train")
    assert (data.group("clip"), data.group("clip_left"), data.group("clip", "run")) == ("anna", "anna", "3")
    assert data.group("other_right") == "other"
    with pytest.raises(ValueError, match=r"group: expected a grouping of .*groups.json \(run, group\), got 'person'"):
        data.group("clip", "person")
    (root / "groups.json").write_text('{"clip": "bert"}')
    assert AffWild2(root, "train").group("clip") == "bert"
    (root / "groups.json").write_text('{"run": {"clip": [1]}}')
    with pytest.raises(ValueError, match=r"groups.json: run: clip: expected a name or a whole number, got \[1\]"):
        AffWild2(root, "train")


def test_a_test_split_of_annotations(root):
    """Where there is no sample file."""
    folder = annotate(root, "clip", 10).parent.with_name("Test_Set")
    folder.mkdir()
    (folder / "clip.txt").write_text("valence,arousal\n0.5,-5\n0,1\n")
    data = AffWild2(root, "test")
    assert data.names == ["clip"]
    assert data[0].valid.tolist() == [False, True]


def test_representations_are_one_line(root):
    data = AffWild2(root, "train")
    assert repr(data[0]) == "<Clip clip: 10 frames at 30 a second, 10 annotated; audio 2, visual 3>"
    assert repr(data) == f"<AffWild2 {root}, train: 1 clips; audio 2, visual 3; valence [-1, 1], arousal [-1, 1]>"


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_floating_types_become_float32(root, dtype):
    values = np.linspace(-3, 3, 30).reshape(10, 3).astype(dtype)
    values[3] = np.nan
    featurize(root, "visual", "clip", np.asfortranarray(values))
    item = clip_tensors(AffWild2(root, "train")[0], ["visual"])
    assert item["features"]["visual"].numpy().dtype == np.float32
    np.testing.assert_array_equal(item["features"]["visual"], np.nan_to_num(values.astype(np.float32)))
    assert item["present"][:, 0].tolist() == [t != 3 for t in range(10)]


def test_infinity_counts_as_missing_with_a_warning_once(root):
    rows = np.ones((10, 3), np.float32)
    rows[6, 2] = -np.inf
    featurize(root, "visual", "clip", rows)
    clip = AffWild2(root, "train")[0]
    clip_tensors(clip, ["visual"], 0, 6)
    with pytest.warns(UserWarning, match=r"clip: visual: expected finite float32 values, got infinity") as seen:
        item = clip_tensors(clip, ["visual"], 4, 10)
        clip_tensors(clip, ["visual"], 5, 10)
    assert len({str(one.message) for one in seen}) == 1
    assert item["features"]["visual"].isfinite().all()
    assert item["present"][:, 0].tolist() == [True, True, False, True, True, True]
    assert clip.present["visual"].tolist() == [t != 6 for t in range(10)]
    np.save(root / "features/visual/clip.mask.npy", np.arange(10) != 6)  # absent: not read
    assert clip_tensors(AffWild2(root, "train")[0], ["visual"])["features"]["visual"].isfinite().all()


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("", ":1: expected text, got an empty file"),
        ('{"rate":\n}', ":2: expected JSON, got something else: "),
        ("[30]", ": expected a JSON object, got list"),
        (
            '{"Rate": 30}',
            ": expected the keys rate, shared, images, columns, quality, about (notes go below 'about'), got 'Rate'",
        ),
        ('{"rate": 0}', ": rate: expected a positive number of Hz, got 0"),
        ('{"rate": "30"}', ": rate: expected a positive number of Hz, got '30'"),
        ('{"rate": true}', ": rate: expected a positive number of Hz, got True"),
        ('{"rate": 1e-320}', ": rate: expected 1e-06 to 1e+06 Hz, got 1e-320"),
        ('{"rate": 1e9}', ": rate: expected 1e-06 to 1e+06 Hz, got 1000000000.0"),
        ('{"rate": 1e400}', ": rate: expected a positive number of Hz, got inf"),
        ('{"rate": 5e5}', ": rate: expected 1e-6 to 10000 rows a frame, got 500000 Hz for 30 frames a second of clip"),
        ('{"rate": 1' + "0" * 400 + "}", ": rate: expected 1e-06 to 1e+06 Hz, got 1000"),
        ('{"rate": 1' + "0" * 5000 + "}", ": expected JSON, got what cannot be read: "),
        ('{"about": ' + "[" * 100_000, ": expected JSON, got what cannot be read: "),
        ('{"images": ".."}', ": images: expected a folder below "),
        ('{"images": "features/../.."}', ": images: expected a folder below "),
        ('{"images": "/tmp"}', ": images: expected a folder below "),
        ('{"rate": Infinity}', ": rate: expected a positive number of Hz, got inf"),
        ('{"shared": 1}', ": shared: expected true or false, got 1"),
        ('{"images": "nowhere"}', ": images: expected a folder below "),
        ('{"images": 3}', ": images: expected a folder below "),
    ],
)
def test_wrong_meta(root, meta, words):
    path = root / "features/visual/meta.json"
    path.write_text(meta)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{words}")):
        AffWild2(root, "train")


def test_wrong_fps(root):
    path = root / "fps.json"
    for content, words in (
        ('{"clip": -1}', ": clip: expected a positive number of frames a second"),
        ('{"clip": 1e308}', ": clip: expected 1e-06 to 1e+06 frames a second, got 1e+308"),
        ("x", ":1: expected JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}{words}")):
            AffWild2(root, "train")


# ------------------------------------------------------------------------------------------------------------- clocks


def resample_exactly(rows, rate: Fraction, fps: Fraction, mask) -> np.ndarray:
    """The definition, in exact time: (T, D) with NaN where nothing counts."""
    frames = -(-Fraction(len(rows)) / rate * fps // 1)
    out = np.full((abs(int(frames)), rows.shape[1]), np.nan)
    for t in range(len(out)):
        overlap = [
            max(Fraction(0), min((t + 1) / fps, (j + 1) / rate) - max(t / fps, j / rate)) for j in range(len(rows))
        ]
        overlap = [o if mask[j] and not np.isnan(rows[j]).any() else Fraction(0) for j, o in enumerate(overlap)]
        if sum(overlap):
            out[t] = sum(float(o / sum(overlap)) * rows[j].astype(np.float64) for j, o in enumerate(overlap) if o)
    return out


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["1", "10", "16", "25", "29.97", "30", "31.25", "50", "62.5", "100"]),
    st.sampled_from(["15", "20", "24", "25", "29.97", "30", "60"]),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
)
def test_resampling_against_exact_time(rate, fps, count, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, 2)).astype(np.float32)
    rows[rng.random(count) < 0.1] = np.nan
    mask = rng.random(count) > 0.1
    expected = resample_exactly(rows, Fraction(rate), Fraction(fps), mask)
    resampled = Resampled(rows, float(rate), float(fps), mask)
    assert resampled.shape == expected.shape
    np.testing.assert_allclose(resampled[:], expected, rtol=1e-6, atol=1e-7)
    a, b = sorted(rng.integers(0, len(expected) + 3, 2))
    np.testing.assert_array_equal(resampled[a:b], resampled[:][a:b])  # to the bit, whatever the span
    assert len(np.asarray(resampled)) == len(resampled)
    with pytest.raises(TypeError, match="span: expected a slice of step 1"):
        resampled[3]


def test_frame_borders_do_not_leak_over_a_long_video():
    """At 62.5 Hz and 30 fps, frame 120 k begins with row 250 k, but i * rate / fps is some 1e-11 off: not enough to let
    that row into frame 120 k - 1, whose own rows are all absent here."""
    count = 47_435 * 25 // 12
    rows = np.arange(count, dtype=np.float32)[:, None].copy()
    rows[(np.arange(count) % 250 >= 247)] = np.nan  # rows 247.9 to 250
    resampled = Resampled(rows, 62.5, 30.0)
    step = np.arange(len(resampled)) * (62.5 / 30)
    border = np.arange(len(resampled)) % 120 == 0
    assert (step[border] != np.round(step[border])).any()  # else this tests nothing
    np.testing.assert_array_equal(np.isnan(resampled[:][:, 0]), np.arange(len(resampled)) % 120 == 119)


def test_rates_and_fps(tmp_path):
    """100 Hz audio against a 25 fps and a 30 fps video; the face has a row a frame whatever the fps."""
    for name, frames in (("slow_left", 25), ("usual", 30)):
        annotate(tmp_path, name, frames)
        featurize(tmp_path, "visual", name, frames)
    for name in ("slow", "usual"):
        featurize(tmp_path, "audio", name, 100, dim=1, rate=100, shared=True, about={"model": "any"})
    (tmp_path / "fps.json").write_text('{"slow": 25}')
    data = AffWild2(tmp_path, "train")
    assert data.mismatches == []
    assert [data.fps(name) for name in data.names] == [25.0, 30.0]
    np.testing.assert_allclose(data[0].features["audio"][:][:, 0], 4 * np.arange(25) + 1.5)
    t = np.arange(30)
    exact = resample_exactly(np.arange(100, dtype=np.float32)[:, None], Fraction(100), Fraction(30), np.ones(100))[:, 0]
    np.testing.assert_allclose(data[1].features["audio"][:][:, 0], exact, rtol=1e-6)
    assert abs(exact - (t + 0.5) * 100 / 30 + 0.5).max() < 0.2
    np.testing.assert_array_equal(data[0].features["visual"][:][:, 0], np.arange(25))


def test_lengths_at_another_rate(tmp_path):
    annotate(tmp_path, "clip", 60)
    featurize(tmp_path, "audio", "clip", 190, rate=100)  # 1.9 s, 57 frames
    featurize(tmp_path, "words", "clip", 3, rate=1)  # 3 s, 90 frames
    data = AffWild2(tmp_path, "train")
    assert data.mismatches == [
        "clip: audio has 190 rows at 100 Hz (57 frames at 30 fps) for 60 frames: audio is absent in the last 3",
        "clip: words has 3 rows at 1 Hz (90 frames at 30 fps) for 60 frames: the last 1 are ignored",
    ]
    clip = data[0]
    np.testing.assert_array_equal(np.flatnonzero(~clip.present["audio"]), [57, 58, 59])
    assert clip.present["words"].all()
    item = clip_tensors(clip, ["audio", "words"], 50, 60)
    assert item["present"].tolist() == [[t < 57, True] for t in range(50, 60)]


def test_absent_rows_at_another_rate(tmp_path):
    annotate(tmp_path, "clip", 4)
    rows = np.arange(8, dtype=np.float32)[:, None].copy()  # two rows a frame
    rows[[2, 3]] = np.nan
    featurize(tmp_path, "audio", "clip", rows, rate=60)
    mask = np.ones(8, bool)
    mask[4] = False
    np.save(tmp_path / "features/audio/clip.mask.npy", mask)
    clip = AffWild2(tmp_path, "train")[0]
    assert clip.present["audio"].tolist() == [True, False, True, True]
    assert clip_tensors(clip, ["audio"])["features"]["audio"][:, 0].tolist() == [0.5, 0, 5, 6.5]


# ------------------------------------------------------------------------------------------------------------- memory


def test_features_stay_on_disk(tmp_path):
    """A window of 48 MB of features costs a window."""
    frames, dim = 12_000, 1_000
    annotate(tmp_path, "clip", "0,0\n" * frames)
    featurize(tmp_path, "frame", "clip", np.ones((frames, dim), np.float32))
    featurize(tmp_path, "other", "clip", np.ones((frames, dim), np.float32), rate=31)
    data = AffWild2(tmp_path, "train")
    tracemalloc.start()
    clip = data[0]
    clip_tensors(clip, ["frame", "other"], 6_000, 6_300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15 * 300 * dim * 4
    assert isinstance(clip.features["frame"], np.memmap)
    assert isinstance(clip.features["other"].rows, np.memmap)
    assert not clip.features["frame"].flags.writeable
    assert len(pickle.dumps(data)) < 20 * frames  # what a spawned worker is sent: labels, no features


# --------------------------------------------------------------------------------------------------------- submission


def sample(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["image_location,valence,arousal", *rows]) + "\n")
    return path


def test_test_split_is_the_sample_file(root):
    featurize(root, "visual", "b_left", 4)
    featurize(root, "visual", "a", 3)
    featurize(root, "audio", "a", 3, dim=2, shared=True)
    featurize(root, "audio", "b", 3, dim=2)
    rows = [f"b_left/{i:05d}.jpg,-5,-5" for i in (1, 2, 3)] + [f"a/{i:05d}.jpg,," for i in (1, 2)]
    path = sample(root / "sample_submission.txt", rows)
    data = AffWild2(root, "test")
    assert data.names == ["b_left", "a"]
    assert [clip.num_frames for clip in data] == [3, 2]
    assert all(clip.labels is None and not clip.valid.any() for clip in data)
    assert data.mismatches == [
        "b_left: visual has 4 rows for 3 frames: the last 1 are ignored",
        "a: audio has 3 rows for 2 frames: the last 1 are ignored",
        "a: visual has 3 rows for 2 frames: the last 1 are ignored",
    ]
    assert read_sample(path) == {"b_left": 3, "a": 2}
    assert AffWild2(root, "test", sample_file=sample(root / "x.txt", rows[3:])).names == ["a"]


def test_submission_round_trip(tmp_path, monkeypatch):
    """Videos interleaved, frames out of order and left out, five-digit overflow: the sample's rows as they stand."""
    rows = ["b/00002.jpg,0,0", "a b/00001.jpg,0,0", "b/00001.jpg,-5,x", "c_left/100000.jpg", "a b/00003.jpg,0,0"]
    path = sample(tmp_path / "sample.txt", rows)
    rng = np.random.default_rng(0)
    predictions = {
        "b": rng.uniform(-1, 1, (5, 2)).astype(np.float32),  # longer than asked for
        "a b": np.array([[3.0, -3.0], [np.nan, np.nan], [1e-9, -1.0]]),  # frame 2 is not asked for
        "c_left": rng.uniform(-1, 1, (100_000, 2)),
        "not asked for": np.full((2, 2), np.nan),
    }
    out = tmp_path / "out.txt"
    out.write_text("what stood there before")
    replaced = []

    def replace(source, target):
        replaced.append((Path(target).read_text(), len(Path(source).read_text().split("\n"))))
        Path(source).rename(target)

    monkeypatch.setattr(affwild2.os, "replace", replace)
    write_submission(out, path, predictions)
    assert replaced == [("what stood there before", len(rows) + 2)]  # whole, beside it, then in its place
    lines = out.read_text().split("\n")
    assert lines[0] == "image_location,valence,arousal"
    assert lines[-1] == ""
    assert [line.split(",")[0] for line in lines[1:-1]] == [row.split(",")[0] for row in rows]
    got = np.array([[float(cell) for cell in line.split(",")[1:]] for line in lines[1:-1]])
    expected = [predictions["b"][1], [1, -1], predictions["b"][0], predictions["c_left"][99_999], [0, -1]]
    np.testing.assert_allclose(got, expected, atol=5e-7)
    assert read_sample(out) == read_sample(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "sample.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": None}, "predictions: expected one for every video that .* names, got none for 'b'"),
        ({"b": np.zeros((2, 2))}, r"predictions\['b'\]: expected 3 frames, as .* names, got 2"),
        ({"b": np.zeros((3, 3))}, r"predictions\['b'\]: expected the shape \(T, 2\), got \(3, 3\)"),
        ({"b": np.zeros(3)}, r"predictions\['b'\]: expected the shape \(T, 2\), got \(3,\)"),
        (
            {"b": np.array([[0, 0], [0, np.nan], [0, 0]])},
            r"predictions\['b'\]: frame 2: expected numbers, got 0.0, nan",
        ),
        (
            {"b": np.array([[0, 0], [0, 0], [np.inf, 0]])},
            r"predictions\['b'\]: frame 3: expected numbers, got inf, 0.0",
        ),
    ],
)
def test_submission_faults_leave_nothing_behind(tmp_path, change, words):
    path = sample(tmp_path / "sample.txt", ["a/00001.jpg,0,0"] + [f"b/{i:05d}.jpg,0,0" for i in (1, 2, 3)])
    predictions = {"a": np.zeros((1, 2)), **{k: v for k, v in change.items() if v is not None}}
    out = tmp_path / "out.txt"
    out.write_text("before")
    with pytest.raises(ValueError, match="^" + words):
        write_submission(out, path, predictions)
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "sample.txt"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "expected text, got an empty file"),
        ("location,valence,arousal\na/00001.jpg,0,0\n", 1, "expected the header 'image_location,valence,arousal', got"),
        ("image_location,valence,arousal\n", 2, "expected rows"),
        ("image_location,valence,arousal\na/00001.jpg,0,0\na/one.jpg,0,0\n", 3, "expected <video>/<frame>.jpg"),
        ("image_location,valence,arousal\na/00000.jpg,0,0\n", 2, "expected <video>/<frame>.jpg"),
        ("image_location,valence,arousal\n00001.jpg,0,0\n", 2, "expected <video>/<frame>.jpg"),
        ("image_location,valence,arousal\na/00001.jpg,0,0\n\na/00002.jpg,0,0\n", 3, "expected <video>/<frame>.jpg"),
        ("image_location,valence,arousal\n../a/00001.jpg,0,0\n", 2, "expected the name of a video, got '../a'"),
        ("image_location,valence,arousal\n/etc/00001.jpg,0,0\n", 2, "expected the name of a video, got '/etc'"),
        (
            "image_location,valence,arousal\na/../../b/00001.jpg,0,0\n",
            2,
            "expected the name of a video, got 'a/../../b'",
        ),
        (f"image_location,valence,arousal\n{'a' * 300}/00001.jpg,0,0\n", 2, "expected the name of a video, got 'aaa"),
        ("image_location,valence,arousal\na\x1b[2J/00001.jpg,0,0\n", 2, "expected the name of a video, got"),
        ("image_location,valence,arousal\na/999999999999.jpg,0,0\n", 2, "expected a frame of at most 10,000,000, got"),
        (
            "image_location,valence,arousal\na/" + "9" * 5000 + ".jpg,0,0\n",
            2,
            "expected a frame of at most 10,000,000, got",
        ),
    ],
)
def test_malformed_samples(root, text, line, words):
    path = root / "sample_submission.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}:{line}: {words}")):
        AffWild2(root, "test")
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}:{line}: {words}")):
        write_submission(root / "out.txt", path, {"a": np.zeros((3, 2))})
    assert not (root / "out.txt").exists()
