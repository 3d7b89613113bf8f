"""A row a frame of a constant grid, whatever the pictures' times; the voice and the face."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("cv2")

from media import grey

from sage_ext.video.faces import Face
from sage_ext.video.tracks import HOLD, CroppedRows, PictureRows, VoiceMatch
from sage_ext.video.visual import make_visual


class Whole:
    """A tracker for which all of the picture is the face; None of black ones."""

    def __init__(self):
        self.times = []

    def track(self, picture, time):
        self.times.append(time)
        height, width = picture.shape[:2]
        return Face((0, 0, width, height), None, 1.0, time, 0.0) if picture.any() else None


def shown(times, fps, end, values=None, durations=None):
    """Brightness 0..255 of each frame's picture, NaN without one, and the times at which pictures were looked at."""
    tracker = Whole()
    visual = make_visual()
    rows = PictureRows(fps, tracker, visual)
    found = []
    for i, t in enumerate(times):
        value = 10 * (i + 1) if values is None else values[i]
        found += rows.push(t, lambda value=value: grey(value), 0.0 if durations is None else durations[i])
    found += rows.end(end)
    brightness = visual.quality.index("brightness")
    return [float(row.quality[brightness] * 255) for row in found], tracker.times


def test_a_picture_a_frame():
    values, looked = shown([i / 30 for i in range(6)], 30, 6 / 30, durations=[1 / 30] * 6)
    assert values == pytest.approx([10, 20, 30, 40, 50, 60], abs=0.1)
    assert looked == pytest.approx([i / 30 for i in range(6)])


def test_times_rounded_to_milliseconds_fall_on_their_frames():
    times = [round(i / 30, 3) for i in range(60)]
    values, _ = shown(times, 30, 2.0, values=list(range(1, 61)), durations=[1 / 30] * 60)
    assert values == pytest.approx(list(range(1, 61)), abs=0.1)


def test_25_a_second_on_a_grid_of_30_repeats_every_fifth_picture():
    values, looked = shown([i / 25 for i in range(5)], 30, 0.2, durations=[1 / 25] * 5)
    assert values == pytest.approx([10, 20, 30, 30, 40, 50], abs=0.1)
    assert len(looked) == 5  # a picture that two frames show is looked at once


def test_60_a_second_on_a_grid_of_30_looks_at_every_other_picture():
    values, looked = shown([i / 60 for i in range(8)], 30, 8 / 60, durations=[1 / 60] * 8)
    assert values == pytest.approx([20, 40, 60, 80], abs=0.1)
    assert len(looked) == 4


def test_a_gap_is_held_for_a_while_and_then_missing():
    values, _ = shown([0.0, 3.0], 10, 3.1, durations=[0.1, 0.1])
    held = [v for v in values if not math.isnan(v)]
    assert len(values) == 31
    assert held == pytest.approx([10] * round(HOLD * 10) + [20], abs=0.1)


def test_the_last_picture_lasts_as_long_as_the_file_says():
    values, _ = shown([0.0], 10, 1.0, durations=[0.3])
    assert [math.isnan(v) for v in values] == [False] * 3 + [True] * 7


def test_before_the_first_picture_and_without_a_face_there_is_nothing():
    values, _ = shown([0.2, 0.3], 10, 0.4, values=[50, 0], durations=[0.1, 0.1])
    assert np.isnan(values[:2]).all()
    assert values[2] == pytest.approx(50, abs=0.1)
    assert math.isnan(values[3])


def test_crops_that_were_made_before(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "00001.jpg"), grey(100, 112, 112))
    cv2.imwrite(str(tmp_path / "00003.jpg"), grey(200, 112, 112))
    rows = CroppedRows(30, tmp_path, make_visual())
    found = [*rows.push(1 / 30, lambda: grey(0)), *rows.end(4 / 30)]
    assert [row.crop is None for row in found] == [False, True, False, True]
    assert found[2].crop.mean() == pytest.approx(200, abs=1)
    assert np.isfinite(found[0].features).all()
    assert np.isnan(found[1].features).all()
    (tmp_path / "00005.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00005\.jpg: expected a JPEG"):
        list(rows.end(5 / 30))
    with pytest.raises(FileNotFoundError, match="cropped: expected a folder"):
        CroppedRows(30, tmp_path / "nothing", make_visual())


def match(mouth, level, fps=30.0):
    voice = VoiceMatch(fps)
    return np.array([voice.push(float(m), float(v)) for m, v in zip(mouth, level)])


def test_a_mouth_that_goes_with_the_voice_and_one_that_does_not():
    rng = np.random.default_rng(0)
    speaks = np.repeat(rng.random(60) < 0.5, 10)  # on and off, thirds of a second
    mouth = 0.05 * speaks * rng.uniform(0.3, 1, 600) + 0.002
    level = -50 + 30 * speaks + rng.normal(0, 2, 600)
    other = np.roll(level, 217)
    own, late, foreign = match(mouth, level), match(mouth, np.roll(level, 3)), match(mouth, other)
    assert np.nanmedian(own) > 0.7
    assert np.nanmedian(late) > 0.7  # a sound track that is 100 ms late
    assert np.nanmedian(foreign) < 0.4


def test_where_nothing_can_be_said_it_is_not_known():
    steady = match(np.full(120, 0.02), np.full(120, -30.0))
    assert np.isnan(steady).all()
    rng = np.random.default_rng(1)
    mouth, level = rng.random(120), -40 + 20 * rng.random(120)
    mouth[30:] = np.nan  # the face is lost
    found = match(mouth, level)
    assert np.isnan(found[:25]).all()  # less than half a span has come
    assert np.isnan(found[100:]).all()


def test_correlation_is_the_textbook_one():
    rng = np.random.default_rng(2)
    mouth, level = rng.random(64), -40 + 20 * rng.random(64)
    voice = VoiceMatch(30.0)
    got = [voice.push(m, v) for m, v in zip(mouth, level)][-1]
    x, y, n, lag = np.sqrt(mouth), level, 60 + voice.delay, voice.delay
    x, y = x[-n:], y[-n:]
    pairs = [(x[k:], y[: len(y) - k]) if k >= 0 else (x[:k], y[-k:]) for k in range(-lag, lag + 1)]
    want = max(np.corrcoef(a, b)[0, 1] for a, b in pairs)
    assert got == pytest.approx(want, abs=1e-9)
