"""The video with the estimates drawn onto it: its clock, its sound, its pictures, and what is left when it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("av")

import av
from media import write

from sage_ext.data.targets import VALENCE_AROUSAL, Target
from sage_ext.video import overlay
from sage_ext.video.decode import Media, Picture
from sage_ext.video.overlay import frame_of, write_overlay
from sage_ext.video.result import Result

SIZE = (320, 240)
BOX = (100.0, 60.0, 80.0, 90.0)


def tone(seconds, rate=44_100, channels=2):
    """Its loudness rises from second to second."""
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([(0.1 + 0.2 * np.floor(t)) * np.sin(2 * np.pi * 440 * t)] * channels, 1).astype(np.float32)


def film(tmp_path, seconds=2.0, fps=25.0, size=SIZE, name="film.mp4", sound=True, rate=44_100, **options):
    pictures = [np.full((size[1], size[0], 3), 60 + i % 100, np.uint8) for i in range(round(seconds * fps))]
    heard = tone(seconds, rate) if sound else None
    return write(tmp_path / name, pictures, fps=fps, sound=heard, rate=rate, **options)


def result_of(
    source, seconds=2.0, fps=30.0, size=SIZE, targets=VALENCE_AROUSAL, run=True, modalities=("audio", "visual")
):
    frames = round(seconds * fps)
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, (frames, len(modalities)))
    estimated = {
        "targets": targets,
        "prediction": np.stack([t.unscaled(np.sin(np.arange(frames) / 9 + c)) for c, t in enumerate(targets)], 1),
        "deviation": np.full((frames, len(targets)), 0.2),
        "weights": (weights / weights.sum(1, keepdims=True)).astype(np.float32),
        "confidence": rng.uniform(0, 1, (frames, len(modalities))).astype(np.float32),
        "stage": rng.dirichlet((1, 1, 1), frames).astype(np.float32),
        "run": "runs/a",
    }
    faces = np.tile(np.float32(BOX), (frames, 1))
    return Result(
        "film", Path(source), fps, modalities, np.ones((frames, len(modalities)), bool), {}, {}, faces, size,
        **(estimated if run else {}),
    )  # fmt: skip


def pictures(path):
    with Media(path) as media:
        return [(item.time, item.rgb.copy()) for item in media.play(sound=False) if isinstance(item, Picture)]


def heard(path):
    """(channels, n) of the sound and its rate, and when it begins."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    return np.concatenate([frame.to_ndarray() for frame in frames], 1), frames[0].sample_rate, frames[0].time


def loudness(path, second):
    sound, rate, begins = heard(path)
    first = round((second + 0.2 - begins) * rate)
    return float(np.sqrt(np.mean(sound[:, first : first + round(0.6 * rate)] ** 2)))


def has_box(picture, size=SIZE, box=BOX):
    """Whether orange, as the modality of the face is drawn, is on all four sides of where the box should be."""
    height, width = picture.shape[:2]
    across, down = width / size[0], height / size[1]
    left, top, right, bottom = box[0] * across, box[1] * down, (box[0] + box[2]) * across, (box[1] + box[3]) * down
    middle = ((left + right) / 2, (top + bottom) / 2)
    sides = [(left, middle[1]), (right, middle[1]), (middle[0], top), (middle[0], bottom)]
    found = []
    for x, y in sides:
        part = picture[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].astype(int)
        found.append((part[..., 0] - part[..., 2]).max() > 60)
    assert len(set(found)) == 1, found
    return found[0]


@pytest.mark.parametrize("fps", [25.0, 30_000 / 1001])
def test_clock_and_sound_are_kept(tmp_path, fps):
    source = film(tmp_path, fps=fps)
    out = write_overlay(result_of(source), tmp_path / "out.mp4")
    assert out == tmp_path / "out.mp4"
    before, after = pictures(source), pictures(out)
    assert [t for t, _ in after] == pytest.approx([t for t, _ in before], abs=1e-4)
    with av.open(str(source)) as a, av.open(str(out)) as b:
        assert float(b.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)
        assert b.duration == pytest.approx(a.duration, abs=60_000)
        assert (b.streams.video[0].codec_context.name, b.streams.audio[0].codec_context.name) == ("h264", "aac")
        assert b.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert (b.streams.audio[0].rate, b.streams.audio[0].channels) == (44_100, 2)
    for second in (0, 1):
        assert loudness(out, second) == pytest.approx(loudness(source, second), rel=0.03)
    assert loudness(out, 1) > 2.5 * loudness(out, 0)


def test_times_of_pictures_that_are_not_even(tmp_path):
    times = [0, 0.04, 0.5, 0.52, 1.3, 1.9]
    grey = [np.full((SIZE[1], SIZE[0], 3), 40 * i + 20, np.uint8) for i in range(6)]
    source = write(tmp_path / "film.mp4", grey, times, sound=tone(2.0), rate=44_100)
    after = pictures(write_overlay(result_of(source), tmp_path / "out.mp4"))
    assert [t for t, _ in after] == pytest.approx(times, abs=1e-3)
    assert [int(p[5, 5, 0]) for _, p in after] == pytest.approx([p[0, 0, 0] for p in grey], abs=4)


@pytest.mark.parametrize("begins", [0.5, -0.5])
def test_sound_that_begins_elsewhere(tmp_path, begins):
    """What comes before the first picture is not shown by players either."""
    grey = [np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)] * 50
    shift = max(-begins, 0)
    sound = tone(3.0)
    source = write(
        tmp_path / "film.mkv",
        grey,
        [shift + i / 25 for i in range(50)],
        sound=sound,
        begins=begins + shift,
        rate=44_100,
    )
    out = write_overlay(result_of(source), tmp_path / "out.mp4")
    samples, rate, start = heard(out)
    power = np.abs(samples[0])
    step = np.flatnonzero(power > 0.2)[0] / rate + start  # where the tone's second second begins
    assert step == pytest.approx(1 + begins, abs=0.03)


def test_box_where_the_face_is_and_when(tmp_path):
    source = film(tmp_path)
    result = result_of(source)
    result.faces[21:40] = np.nan  # from 0.7 s on, to 1.333 s
    for t, picture in pictures(write_overlay(result, tmp_path / "out.mp4")):
        assert picture.shape == (480, 640, 3)
        assert has_box(picture) == (not 0.69 < t < 1.31), t


def test_box_is_in_the_results_pixels(tmp_path):
    """Whatever the size that the pictures are drawn at."""
    source = film(tmp_path, size=(640, 480), seconds=0.4)
    result = result_of(source, seconds=0.4, size=SIZE)
    assert all(has_box(p) for _, p in pictures(write_overlay(result, tmp_path / "out.mp4")))


def test_turned_pictures_are_upright(tmp_path):
    source = film(tmp_path, seconds=0.4, rotation=90)
    upright = (SIZE[1], SIZE[0])
    out = pictures(write_overlay(result_of(source, seconds=0.4, size=upright), tmp_path / "out.mp4"))
    assert out[0][1].shape == (640, 480, 3)
    assert all(has_box(p, upright) for _, p in out)


@pytest.mark.parametrize(
    ("targets", "modalities", "changed"),
    [
        (VALENCE_AROUSAL, ("audio", "visual"), True),
        ((Target("stress", 0, 100), Target("naïve <b>" * 9, 1, 7)), ("audio", "visual", "text"), True),
        (tuple(Target(f"t{i}") for i in range(64)), tuple(f"m{i}" for i in range(30)), True),
        ((), ("audio", "visual"), False),
    ],
)
def test_estimates_are_drawn(tmp_path, targets, modalities, changed):
    """At the left, in the corner; without a run nothing is there. The modalities are at the right in any case."""
    source = film(tmp_path, seconds=0.4)
    result = result_of(source, 0.4, targets=targets or VALENCE_AROUSAL, run=bool(targets), modalities=modalities)
    before = pictures(source)[4][1]
    after = pictures(write_overlay(result, tmp_path / "out.mp4"))[4][1]
    corner = after[430:465, 20:150].astype(int)
    assert (np.abs(corner - int(before[0, 0, 0])).mean() > 10) == changed
    assert np.abs(after[430:465, 470:620].astype(int) - int(before[0, 0, 0])).mean() > 10
    assert np.abs(after[5, 5].astype(int) - before[5, 5]).max() <= 4


def test_point_moves(tmp_path):
    source = film(tmp_path, seconds=0.4)
    result = result_of(source, 0.4)
    places = []
    for valence in (-0.8, 0.8):
        result.prediction[:, 0], result.prediction[:, 1] = valence, 0.0
        picture = pictures(write_overlay(result, tmp_path / "out.mp4"))[5][1][330:470, 15:155].astype(int)
        green = (picture[..., 1] - picture[..., 0] > 60).nonzero()
        places.append((green[1].mean(), green[0].mean()))
    assert places[1][0] - places[0][0] == pytest.approx(1.6 * 63, abs=6)
    assert places[1][1] == pytest.approx(places[0][1], abs=3)


def test_nan_is_left_out(tmp_path):
    source = film(tmp_path, seconds=0.4)
    result = result_of(source, 0.4)
    for values in (result.prediction, result.deviation, result.weights, result.confidence, result.stage, result.faces):
        values[3:9] = np.nan
    result.present[3:9] = False
    result.weights[3:9] = 0
    assert len(pictures(write_overlay(result, tmp_path / "out.mp4"))) == 10


@pytest.mark.parametrize("color", [(200, 60, 40), (40, 160, 60), (50, 70, 190)])
def test_colors_are_kept(tmp_path, color):
    source = write(tmp_path / "film.mp4", [np.full((SIZE[1], SIZE[0], 3), color, np.uint8)] * 5)
    before, after = pictures(source)[2][1], pictures(write_overlay(result_of(source, 0.2), tmp_path / "out.mp4"))[2][1]
    assert after[20, 20].astype(int) == pytest.approx(before[20, 20].astype(int), abs=5)


def test_without_sound(tmp_path):
    source = film(tmp_path, sound=False, seconds=0.4)
    with av.open(str(write_overlay(result_of(source, 0.4), tmp_path / "out.mp4"))) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_source_rate_that_aac_lacks_and_odd_size(tmp_path):
    source = film(tmp_path, size=(322, 246), name="film.mkv", rate=37_800, audio_codec="flac", seconds=1.0)
    out = write_overlay(result_of(source, 1.0, size=(322, 246)), tmp_path / "out.mp4")
    sound, rate, _ = heard(out)
    assert rate == 48_000
    assert sound.shape[1] / rate == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("when", ["drawing", "sound"])
def test_nothing_is_left_when_it_fails(tmp_path, monkeypatch, when):
    source = film(tmp_path)
    (tmp_path / "out.mp4").write_bytes(b"old")

    def fail(*arguments, **options):
        raise RuntimeError("full")

    if when == "drawing":
        monkeypatch.setattr(overlay._Canvas, "_modalities", fail)
    else:
        monkeypatch.setattr(overlay, "_frames", fail)
    with pytest.raises(RuntimeError, match="full"):
        write_overlay(result_of(source), tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.mp4", "out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


def test_errors(tmp_path):
    source = film(tmp_path, seconds=0.4)
    before = source.read_bytes()
    with pytest.raises(ValueError, match="path: expected another file than the video itself"):
        write_overlay(result_of(source, 0.4), source)
    assert source.read_bytes() == before
    sound = write(tmp_path / "sound.m4a", sound=tone(1.0), rate=44_100)
    with pytest.raises(ValueError, match=r"result\.source: expected a video with pictures"):
        write_overlay(result_of(sound, 1.0), tmp_path / "out.mp4")
    with pytest.raises(FileNotFoundError):
        write_overlay(result_of(tmp_path / "gone.mp4"), tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_frame_of():
    """A picture goes with the first frame whose middle it is on show in."""
    assert [frame_of(t, 30.0, 60) for t in (0, 1 / 30, 0.0166, 0.0167, 0.5 / 30, 1.99, 5)] == [0, 1, 0, 1, 0, 59, 59]
    assert [frame_of(round(i / 30, 3), 30.0, 60) for i in range(60)] == list(range(60))
