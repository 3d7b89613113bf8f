"""Drawn people who talk: what is written is what is said of it, and picture, sound and truth keep step."""

import argparse
import csv
import functools

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

from sage_ext.data.affwild2 import read_annotation  # noqa: E402
from sage_ext.video import synth  # noqa: E402
from sage_ext.video.synth import BREAKAGES, break_video, write_videos  # noqa: E402

SOUND_FRAME = 1024 / 16_000  # seconds: the last one of a file is padded


@functools.cache
def decoded(path):
    """(times, pictures (T, H, W, 3), sound at 16 kHz, seconds of the last picture's end)"""
    times, pictures, sound = [], [], []
    with av.open(str(path)) as file:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
        end, begins = 0.0, None
        for frame in file.decode(*file.streams):
            if isinstance(frame, av.VideoFrame):
                times.append(frame.time)
                pictures.append(frame.to_ndarray(format="rgb24"))
                end = frame.time + float(frame.duration * frame.time_base)
            else:
                begins = frame.time if begins is None else begins
                sound += [out.to_ndarray()[0] for out in resampler.resample(frame)]
    assert not begins
    return np.array(times), np.stack(pictures), np.concatenate(sound), end


def table(path):
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def truth_of(path):
    return table(path.parents[1] / "truth" / f"{path.stem}.csv")


def faces_of(path):
    return table(path.with_suffix(".faces.csv"))


def levels(sound, times, step):
    """Decibels of the sound that is heard during each picture."""
    parts = [sound[round(t * 16_000) : round((t + step) * 16_000)] for t in times]
    return np.array([10 * np.log10(np.mean(part**2) + 1e-9) if len(part) else -90.0 for part in parts])


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth") / "clean"
    return write_videos(root, train=1, validation=1, test=1, seconds=(7, 8), clean=True)


COARSE = {"train": 4, "validation": 0, "test": 0, "seconds": (24, 28), "fps": 10, "size": (160, 120)}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("synth") / "broken", **COARSE)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("synth") / "unbroken", **COARSE, clean=True)


# ------------------------------------------------------------------------------------------------------------ write_videos
def test_a_world_has_videos_boxes_annotations_and_truth_of_one_length(clean):
    root = clean[0].parents[1]
    assert [path.name for path in clean] == ["train_01.mp4", "validation_01.mp4", "test_01.mp4"]
    assert not [path for path in root.parent.iterdir() if path != root]
    for path, split in zip(clean, ("Train_Set", "Validation_Set", "Test_Set")):
        times, pictures, sound, end = decoded(path)
        labels, valid = read_annotation(root / "annotations" / split / f"{path.stem}.txt")
        truth, faces = truth_of(path), faces_of(path)
        assert len(times) == len(labels) == len(truth["time"]) == len(faces["time"])
        assert 7 <= end <= 8.05
        assert valid.all()
        assert pictures.shape[1:] == (240, 320, 3)
        assert len(sound) / 16_000 == pytest.approx(end, abs=0.03)
        np.testing.assert_allclose(times, truth["time"], atol=1e-3)
        np.testing.assert_allclose(times, faces["time"], atol=1e-3)
        np.testing.assert_allclose(labels, np.stack([truth["valence"], truth["arousal"]], 1), atol=1e-6)
        assert list(truth) == ["time", "valence", "arousal", *BREAKAGES, "speaking"]
        assert not any(truth[kind].any() for kind in BREAKAGES)


def test_the_sound_is_loud_while_the_person_speaks(clean):
    for path in clean:
        times, _, sound, _ = decoded(path)
        speaking = truth_of(path)["speaking"]
        level = levels(sound, times, 1 / 30)
        assert correlation(speaking, level) > 0.75
        assert correlation(speaking, level) > correlation(speaking[15:], level[:-15]) + 0.05
        assert correlation(speaking, level) > correlation(speaking[:-15], level[15:]) + 0.05


def test_the_mouth_opens_with_the_sound(clean):
    for path in clean:
        times, pictures, sound, _ = decoded(path)
        faces = faces_of(path)
        dark = []
        for t, picture in enumerate(pictures):
            face = _crop(picture, faces, t)
            high, wide = face.shape[:2]
            mouth = face[int(0.6 * high) : int(0.9 * high), int(0.3 * wide) : int(0.7 * wide)]
            dark.append(np.mean(mouth.sum(axis=2) < 120))
        loud = (levels(sound, times, 1 / 30).clip(-50) + 50).clip(0)
        now = correlation(dark, loud)
        assert now > 0.55
        assert all(correlation(dark[lag:], loud[:-lag]) < now for lag in (5, 15))
        assert all(correlation(dark[:-lag], loud[lag:]) < now for lag in (5, 15))


def test_boxes_hold_the_face_that_a_stock_detector_finds(clean):
    detector = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")
    hits = []
    for path in clean:
        faces = faces_of(path)
        for t in range(0, len(faces["time"]), 20):
            grey = cv2.cvtColor(decoded(path)[1][t], cv2.COLOR_RGB2GRAY)
            found = detector.detectMultiScale(grey, 1.1, 3, minSize=(50, 50))
            middle = faces["left"][t] + faces["width"][t] / 2, faces["top"][t] + faces["height"][t] / 2
            hits.append(
                any(abs(x + w / 2 - middle[0]) < 15 and abs(y + h / 2 - middle[1]) < 20 for x, y, w, h in found)
            )
    assert np.mean(hits) > 0.8


def _crop(picture, faces, t):
    left, top, wide, high = (faces[name][t] for name in ("left", "top", "width", "height"))
    return picture[int(top) : int(top + high), int(left) : int(left + wide)]


@pytest.mark.slow
def test_face_and_voice_show_what_is_felt_and_not_all_of_it(unbroken):
    shown = {"valence": [], "arousal": []}
    heard = []
    for path in unbroken:
        times, pictures, sound, _ = decoded(path)
        truth, faces = truth_of(path), faces_of(path)
        crops = np.stack(
            [cv2.resize(_crop(picture, faces, t), (24, 24)).mean(axis=2) for t, picture in enumerate(pictures)]
        )
        rows = crops.reshape(len(crops), -1)
        rows = (rows - rows.mean(axis=0)) / rows.std()
        seen, asked = np.arange(len(rows)) % 80 < 50, np.arange(len(rows)) % 80 >= 60
        kernel = rows @ rows.T / rows.shape[1]
        for name, found in shown.items():
            weights = np.linalg.solve(kernel[np.ix_(seen, seen)] + 0.03 * np.eye(seen.sum()), truth[name][seen])
            found.append(correlation(kernel[np.ix_(asked, seen)] @ weights, truth[name][asked]))
        speaking = truth["speaking"] == 1
        level = levels(sound, times, 0.1)
        level = np.array([level[max(0, t - 5) : t + 6].max() for t in range(len(level))])  # of the syllables
        heard.append(correlation(level[speaking], truth["arousal"][speaking]))
    for found in (*shown.values(), heard):
        assert 0.4 < np.mean(found) < 0.97


def test_valence_and_arousal_wander_over_the_whole_range(broken):
    truths = [truth_of(path) for path in broken]
    for name in ("valence", "arousal"):
        values = np.concatenate([truth[name] for truth in truths])
        assert values.min() < -0.8
        assert values.max() > 0.8
        assert np.abs(values).max() <= 1
        assert max(np.abs(np.diff(truth[name])).max() for truth in truths) < 0.25  # in a tenth of a second
    assert 0.3 < np.mean([truth["speaking"].mean() for truth in truths]) < 0.8


def test_what_is_broken_is_what_the_truth_says(broken, unbroken):
    seen, share = set(), []
    for path, whole in zip(broken, unbroken):
        times, pictures, sound, _ = decoded(path)
        _, cleanly, own, _ = decoded(whole)
        truth, faces = truth_of(path), faces_of(path)
        assert (path.parents[1] / "annotations/Train_Set" / f"{path.stem}.txt").read_bytes() == (
            whole.parents[1] / "annotations/Train_Set" / f"{path.stem}.txt"
        ).read_bytes()
        np.testing.assert_array_equal(np.isnan(faces["left"]), truth["face_lost"] == 1)
        assert (faces["left"] + faces["width"])[truth["face_lost"] == 0].max() <= 160.01
        seen |= {kind for kind in BREAKAGES if truth[kind].any()}
        share.append(np.any([truth[kind] for kind in BREAKAGES], axis=0).mean())

        inner = {kind: _eroded(truth[kind] == 1, 5) for kind in BREAKAGES}
        difference = np.abs(pictures.astype(float) - cleanly).mean(axis=(1, 2, 3))
        hidden = inner["face_lost"] | inner["occluded"] | inner["dark"]
        near = ~_eroded(~np.any([truth[kind] for kind in ("face_lost", "occluded", "dark")], axis=0).astype(bool), 8)
        assert difference[hidden].min(initial=99) > 1.5
        assert difference[~near].max() < 1.5

        level, change = levels(sound, times, 0.1), levels(sound - own, times, 0.1)
        assert level[inner["dropout"]].max(initial=-99) < -80
        assert change[inner["noise"]].min(initial=0) > -45
        other = inner["foreign_voice"]
        assert not other.any() or np.median(level[other]) > -45  # speaks, whosever turn it is
        touched = ~_eroded(
            ~np.any([truth[kind] for kind in ("noise", "dropout", "foreign_voice")], axis=0).astype(bool), 3
        )
        assert np.median(change[~touched]) < -50
    assert seen == set(BREAKAGES)
    assert 0.15 < np.mean(share) < 0.35


def _eroded(mask, steps):
    """True where everything within `steps` is."""
    return np.array([mask[max(0, i - steps) : i + steps + 1].all() for i in range(len(mask))])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_world_and_another_one_another(tmp_path):
    small = {"train": 1, "validation": 0, "test": 1, "seconds": (3, 4), "size": (160, 120)}
    worlds = [write_videos(tmp_path / name, seed=seed, **small) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    alone = write_videos(tmp_path / "d", seed=5, **small | {"train": 0})
    for first, second in [*zip(worlds[0], worlds[1]), (worlds[0][1], alone[0])]:
        a, b = decoded(first), decoded(second)
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(a[2], b[2])
    texts = [
        {p.relative_to(w[0].parents[1]): p.read_bytes() for p in w[0].parents[1].rglob("*.[tc]*v")} for w in worlds
    ]
    assert len(texts[0]) == 4
    assert texts[0] == texts[1] != texts[2]
    assert len({path.read_bytes() for path in (tmp_path / "a/annotations").rglob("*.txt")}) == 2


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
        ({"train": 1.0}, TypeError, "train: expected an int, got float"),
        ({"train": 0, "validation": 0, "test": 0}, ValueError, "train, validation, test: expected a video at least"),
        ({"seconds": (5, 4)}, ValueError, "seconds: expected 2 <= shortest <= longest, got (5, 4)"),
        ({"seconds": (1, 4)}, ValueError, "seconds: expected"),
        ({"seconds": 5}, ValueError, "seconds: expected two numbers, got 5"),
        ({"seconds": ("a", 5)}, TypeError, "seconds: expected two numbers"),
        ({"fps": 1}, ValueError, "fps: expected a number in [5, 120], got 1"),
        ({"size": (321, 240)}, ValueError, "size: expected even"),
        ({"size": (240, 320)}, ValueError, "size: expected even width >= height"),
        ({"clean": 1}, TypeError, "clean: expected a bool, got int"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, wrong, error, message):
    with pytest.raises(error) as raised:
        write_videos(tmp_path / "out", **wrong)
    assert message in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="out: expected a folder that is empty or new"):
        write_videos(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_a_world_that_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no more")

    monkeypatch.setattr(synth, "_write", fail)
    with pytest.raises(OSError, match="no more"):
        write_videos(tmp_path / "out", train=1, seconds=(2, 2), size=(64, 64))
    assert not any(tmp_path.iterdir())


def test_the_command_line_says_what_it_wrote(tmp_path):
    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    defaults = parser.parse_args(["there"])
    assert (defaults.train, defaults.validation, defaults.test, defaults.size) == (8, 4, 2, (320, 240))
    out = str(tmp_path / "out")
    args = [
        "--seed",
        "3",
        "--train",
        "0",
        "--validation",
        "1",
        "--test",
        "0",
        "--seconds",
        "2,2.5",
        "--size",
        "64x64",
        "--clean",
    ]
    said = synth.run(parser.parse_args([out, *args]))
    assert said.startswith(f"{out}: 1 videos")
    assert decoded(tmp_path / "out/videos/validation_01.mp4")[1].shape[1:] == (64, 64, 3)
    with pytest.raises(SystemExit):
        parser.parse_args([out, "--size", "64"])


# ------------------------------------------------------------------------------------------------------------- break_video
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sound", "picture"), [(None, None), ("babble", "occluded"), ("silence", "dark"), ("foreign", "frozen")]
)
def test_a_broken_video_keeps_its_clock(clean, tmp_path, sound, picture):
    path, out = clean[0], tmp_path / "out.mp4"
    break_video(path, out, sound=sound, picture=picture)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    times, pictures, heard, end = decoded(path)
    new_times, new_pictures, new_heard, new_end = decoded(out)
    np.testing.assert_allclose(new_times, times, atol=1e-3)
    assert new_end == pytest.approx(end, abs=1e-3)
    assert abs(len(new_heard) - len(heard)) / 16_000 <= SOUND_FRAME
    level, speaking = levels(new_heard, times, 1 / 30), truth_of(path)["speaking"]
    listening = np.median(level[speaking == 0])
    change = np.abs(new_pictures.astype(float) - pictures).mean(axis=(1, 2, 3))
    if sound is None:
        assert correlation(level, levels(heard, times, 1 / 30)) > 0.98
    elif sound == "silence":
        assert level.max() < -80
    else:
        assert listening > -45  # others are heard while the person is silent
        assert correlation(level, levels(heard, times, 1 / 30)) < 0.7
    if picture is None:
        assert change.max() < 3
    elif picture == "dark":
        assert new_pictures.mean(axis=(1, 2, 3)).max() < 50
    elif picture == "frozen":
        assert np.abs(new_pictures.astype(float) - new_pictures[0]).mean() < 1
        assert change[30:].mean() > 1
    else:
        faces = faces_of(path)
        for t in range(0, len(times), 25):
            x, y = int(faces["left"][t] + faces["width"][t] / 2), int(faces["top"][t] + 0.72 * faces["height"][t])
            mouth = slice(y - 5, y + 6), slice(x - 8, x + 9)
            eyes = slice(y - 50, y - 35), slice(x - 25, x + 26)
            assert np.abs(new_pictures[t][mouth].astype(float) - pictures[t][mouth]).mean() > 15
            assert np.abs(new_pictures[t][eyes].astype(float) - pictures[t][eyes]).mean() < 15


def test_pictures_at_uneven_times_keep_them(tmp_path):
    path, out = tmp_path / "uneven.mp4", tmp_path / "out.mp4"
    ticks = [0, 3, 4, 9, 10, 16]
    with (
        open(path, "wb") as file,
        synth._Film(file, (98, 64), synth.Fraction(10), None, synth.Fraction(1, 100)) as film,
    ):
        for tick, until in zip(ticks, [*ticks[1:], 20]):
            film.picture(np.full((64, 98, 3), 10 * tick, np.uint8), tick * 10, (until - tick) * 10)
    break_video(path, out, picture="dark")
    np.testing.assert_allclose(_times(out), [tick / 10 for tick in ticks], atol=1e-3)


def _times(path):
    with av.open(str(path)) as file:
        return [frame.time for frame in file.decode(video=0)]


def test_break_video_names_what_is_wrong(clean, tmp_path):
    with pytest.raises(ValueError, match="sound: expected None, babble, silence or foreign, got 'loud'"):
        break_video(clean[0], tmp_path / "out.mp4", sound="loud")
    with pytest.raises(ValueError, match="picture: expected None, occluded, dark or frozen, got 'x'"):
        break_video(clean[0], tmp_path / "out.mp4", picture="x")
    with pytest.raises(ValueError, match="out: expected another file than path"):
        break_video(clean[0], clean[0], sound="silence")
    with pytest.raises(FileNotFoundError):
        break_video(tmp_path / "none.mp4", tmp_path / "out.mp4")
    silent = tmp_path / "silent.mp4"
    with open(silent, "wb") as file, synth._Film(file, (64, 64), synth.Fraction(10), None) as film:
        for t in range(5):
            film.picture(np.zeros((64, 64, 3), np.uint8), t)
    with pytest.raises(ValueError, match="sound: expected None for a video without sound, got 'silence'"):
        break_video(silent, tmp_path / "out.mp4", sound="silence")
    assert [path.name for path in tmp_path.iterdir()] == ["silent.mp4"]
