"""Videos to a data set: what lies where, on which clock, whole or not at all, and the same whatever happened on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("librosa")

from media import FPS, GRID, grey, make, tone, write

from sage_ext.cli import main
from sage_ext.data import AffWild2
from sage_ext.video import Parameters, extract
from sage_ext.video.extraction import find_videos, names_of

TOLD = Parameters(told=True)


def files_of(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def data(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "data"
    done = extract(videos, out, TOLD, processes=2)
    assert done.failed == {}
    assert sorted(done.videos) == ["one", "three", "two"]
    return out


def test_the_reader_finds_unlabelled_videos(data):
    found = AffWild2(data, "test")
    assert found.names == ["one", "three", "two"]
    assert found.unlabelled
    assert found.mismatches == []
    assert [clip.num_frames for clip in found] == [60, 45, 75]
    assert found.frame_rate == FPS
    columns, quality = found.columns, found.quality_columns
    assert set(columns) == {"audio", "visual"}
    assert {name: len(c) for name, c in columns.items()} == dict(found.modalities)
    assert quality["visual"][-1] == quality["audio"][-1] == "voice_match"
    for clip in found:
        assert clip.present["visual"].all()
        assert clip.present["audio"].all()
        assert clip.quality["audio"][0 : clip.num_frames].shape == (clip.num_frames, len(quality["audio"]))
    assert found.about["visual"]["parameters"]["told"] is True


def test_rows_have_the_length_of_the_video(data, videos):
    index = json.loads((data / "index.json").read_text())
    assert {name: v["seconds"] for name, v in index["videos"].items()} == pytest.approx(
        {"one": 2.0, "two": 2.5, "three": 1.5}, abs=1e-3
    )
    assert len(np.load(data / "features/audio/one.npy")) == 200
    assert np.load(data / "faces/one.npy")[:, :4] == pytest.approx(np.tile([32, 16, 56, 56], (60, 1)))


def test_annotated_videos_are_a_split_and_the_others_the_test_split(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "annotations/Train_Set").mkdir(parents=True)
    (root / "annotations/Train_Set/two.txt").write_text("\n".join(["valence,arousal", *["0.1,0.2"] * 75]) + "\n")
    assert AffWild2(root, "train").names == ["two"]
    assert AffWild2(root, "train").mismatches == []
    assert AffWild2(root, "test").names == ["one", "three"]


def test_a_flash_and_a_click_land_on_the_same_frame(tmp_path):
    make(tmp_path / "clap.mp4", flash=1.2)
    extract(tmp_path / "clap.mp4", tmp_path / "data", TOLD)
    clip = AffWild2(tmp_path / "data", "test")[0]
    visual, audio = (AffWild2(tmp_path / "data", "test").quality_columns[m] for m in ("visual", "audio"))
    bright = np.asarray(clip.quality["visual"][0:60])[:, visual.index("brightness")]
    loud = np.asarray(clip.features["audio"][0:60])[
        :, AffWild2(tmp_path / "data", "test").columns["audio"].index("level")
    ]
    assert int(np.argmax(bright)) == round(1.2 * FPS)
    rise = np.diff(loud)
    assert int(np.argmax(rise)) + 1 == round(1.2 * FPS)
    assert audio[0] == "level"


def test_the_same_input_gives_the_same_bytes(data, videos, tmp_path):
    extract(videos, tmp_path / "again", TOLD, processes=1)
    first, second = files_of(data), files_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.slow
def test_a_killed_extraction_goes_on_to_the_same_bytes(data, videos, tmp_path):
    out = tmp_path / "data"
    command = [
        sys.executable,
        "-m",
        "sage_ext",
        "extract",
        str(videos),
        "--out",
        str(out),
        "--told",
        "--processes",
        "1",
        "--quiet",
    ]
    child = subprocess.Popen(command, start_new_session=True)
    until = time.monotonic() + 60
    while not (out / "index.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    before = set(json.loads((out / "index.json").read_text())["videos"])
    assert before
    done = extract(videos, out, TOLD)
    assert set(done.skipped) == before
    assert files_of(out) == files_of(data)


def test_what_was_extracted_is_not_read_again_unless_it_changed(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "videos")
    out = tmp_path / "data"
    extract(tmp_path / "videos" / "one.mp4", out, TOLD)
    done = extract(tmp_path / "videos", out, TOLD)
    assert done.skipped == ["one"]
    make(tmp_path / "videos" / "one.mp4", 1.0, 5)
    done = extract(tmp_path / "videos", out, TOLD)
    assert sorted(done.skipped) == ["three", "two"]
    assert done.videos["one"]["frames"] == 30


def test_one_bad_file_is_named_and_stops_no_other(videos, tmp_path, capsys):
    shutil.copy(videos / "one.mp4", tmp_path / "good.mp4")
    shutil.copy(videos / "one.faces.csv", tmp_path / "good.faces.csv")
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    code = main(["extract", str(tmp_path), "--out", str(tmp_path / "data"), "--told", "--quiet"])
    said = capsys.readouterr().out
    assert code == 1
    assert "bad.mp4: FAILED: path: expected a media file" in said
    assert AffWild2(tmp_path / "data", "test").names == ["good"]
    assert not list((tmp_path / "data").rglob("*bad*"))


def test_without_sound_and_without_picture(videos, tmp_path):
    write(tmp_path / "silent.mp4", [grey(i) for i in range(30)], fps=30)
    write(tmp_path / "heard.wav", sound=tone(1.5), audio_codec="pcm_s16le")
    shutil.copy(videos / "one.mp4", tmp_path / "both.mp4")
    done = extract(tmp_path, tmp_path / "data")
    assert done.failed == {}
    assert "has no sound" in done.videos["silent"]["notes"][0]
    found = AffWild2(tmp_path / "data", "test")
    clips = dict(zip(found.names, found))
    assert clips["heard"].num_frames == 45
    assert not clips["heard"].present["visual"].any()
    assert clips["heard"].present["audio"].all()
    assert not clips["silent"].present["audio"].any()
    assert clips["both"].present["audio"].all()


def test_the_videos_own_rate_has_a_row_a_picture(tmp_path):
    times = [0.0, 0.03, 0.09, 0.1, 0.25, 0.3]
    write(tmp_path / "a.mkv", [grey(9, 96, 96)] * 6, times, sound=tone(0.4))
    done = extract(tmp_path / "a.mkv", tmp_path / "data", Parameters(fps=None))
    assert done.videos["a"]["frames"] == 6
    assert len(np.load(tmp_path / "data/features/visual/a.npy")) == 6
    assert json.loads((tmp_path / "data/fps.json").read_text()) == {"a": done.videos["a"]["fps"]}


def test_crops_are_written_and_can_be_read_back(videos, tmp_path):
    own = Parameters(fps=None, told=True, audio=None)
    extract(videos / "one.mp4", tmp_path / "data", own, crops=tmp_path / "crops")
    assert sorted(p.name for p in (tmp_path / "crops/one").iterdir()) == [f"{i:05d}.jpg" for i in range(1, 61)]
    (tmp_path / "crops/one/00010.jpg").unlink()
    extract(videos / "one.mp4", tmp_path / "again", Parameters(fps=None, audio=None, cropped=str(tmp_path / "crops")))
    first, second = (np.load(tmp_path / d / "features/visual/one.npy") for d in ("data", "again"))
    assert np.flatnonzero(np.isnan(second).any(1)).tolist() == [9]
    hog = [i for i, name in enumerate(AffWild2(tmp_path / "data", "test").columns["visual"]) if name.startswith("hog")]
    close = np.delete(np.arange(60), 9)
    r = [np.corrcoef(first[t, hog], second[t, hog])[0, 1] for t in close]
    assert min(r) > 0.95  # a JPEG's loss


def test_other_parameters_are_refused_and_overwrite_begins_anew(videos, tmp_path):
    out = tmp_path / "data"
    extract(videos / "one.mp4", out, TOLD)
    with pytest.raises(ValueError, match=r"out: expected the parameters .*fps 30\.0 there and 25\.0 here.*--overwrite"):
        extract(videos / "two.mp4", out, Parameters(fps=25.0, told=True))
    done = extract(videos / "two.mp4", out, Parameters(fps=25.0, told=True), overwrite=True)
    assert list(done.videos) == ["two"]
    assert AffWild2(out, "test").names == ["two"]
    assert not (out / "features/visual/one.npy").exists()


def test_features_of_others_are_not_touched(videos, tmp_path):
    (tmp_path / "features/visual").mkdir(parents=True)
    np.save(tmp_path / "features/visual/mine.npy", np.zeros((3, 2), np.float32))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"expected .*extraction wrote"):
            extract(videos, tmp_path, TOLD, overwrite=overwrite)
    assert [p.name for p in (tmp_path / "features/visual").iterdir()] == ["mine.npy"]


@pytest.mark.parametrize(("wrong", "message"), [
    ({"person": "tallest"}, "person: expected largest, left, right or a number"),
    ({"processes": 0}, "processes"),
    ({"parameters": {"fps": 0.1}}, "fps: expected 1 to 240"),
    ({"parameters": {"visual": None, "audio": None}}, "expected at least one of the two"),
    ({"parameters": {"cropped": "x"}}, "cropped: expected fps None"),
    ({"parameters": {"visual": "deepface"}}, "deepface"),
    ({"parameters": {"audio": "onnx:/nothing.onnx"}}, "nothing.onnx"),
])  # fmt: skip
def test_arguments_that_cannot_be_right(videos, tmp_path, wrong, message):
    parameters = wrong.pop("parameters", {})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        extract(videos, tmp_path / "data", Parameters(**parameters), **wrong)
    assert not (tmp_path / "data" / "index.json").exists()


def test_names(tmp_path):
    for name in ("a.mp4", "b/a.mkv", "c,d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"different names, got .*a\.mp4 and .*a\.mkv"):
        names_of([tmp_path / "a.mp4", tmp_path / "b/a.mkv"], "largest")
    with pytest.raises(ValueError, match="without comma"):
        names_of([tmp_path / "c,d.mp4"], "largest")
    assert list(names_of([tmp_path / "a.mp4"], "left")) == ["a_left"]
    assert list(names_of([tmp_path / "a.mp4"], "2")) == ["a_person2"]
    assert [p.name for p in find_videos([tmp_path])] == ["a.mp4", "a.mkv", "c,d.mp4"]
    with pytest.raises(FileNotFoundError, match="which is not there"):
        find_videos([tmp_path / "none.mp4"])


@pytest.mark.skipif(not GRID.is_dir(), reason="no GRID clips")
def test_real_clips_with_the_stock_detector(tmp_path):
    done = extract(sorted(GRID.glob("*.mpg"))[:2], tmp_path / "data")
    assert done.failed == {}
    found = AffWild2(tmp_path / "data", "test")
    assert found.mismatches == []
    for clip in found:
        assert clip.num_frames == 90  # 3 s
        assert clip.present["visual"].mean() > 0.95
        assert clip.present["audio"].mean() > 0.95
    speech = found.quality_columns["audio"].index("speech")
    clip = found[0]
    active = np.asarray(clip.quality["audio"][0:90])[:, speech]
    assert active[30:60].mean() > active[:8].mean()
