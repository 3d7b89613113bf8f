"""Picture and sound on one clock: what a file says of times, gaps, offsets and rotations arrives as it was meant."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")

from media import GRID, grey, tone, write

from sage_ext.video.decode import RATE, Media, Picture, duration


def read(path, **options):
    """(pictures, samples, damage): all of a file."""
    pictures, sounds = [], []
    with Media(path) as media:
        for item in media.play(**options):
            (pictures if isinstance(item, Picture) else sounds).append(item)
    samples = np.concatenate([s.samples for s in sounds]) if sounds else np.zeros(0, np.float32)
    ends = [s.time + len(s.samples) / RATE for s in sounds]
    assert all(abs(s.time - end) < 1e-9 for s, end in zip(sounds[1:], ends)), "sound without gaps"
    assert not sounds or sounds[0].time == 0
    return pictures, samples, media.damage


def test_constant_rate(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(10 * i) for i in range(20)], sound=tone(0.8))
    pictures, samples, damage = read(path)
    assert [p.time for p in pictures] == pytest.approx([i / 25 for i in range(20)], abs=1e-4)
    assert [int(p.rgb.mean().round()) for p in pictures] == pytest.approx([10 * i for i in range(20)], abs=3)
    assert pictures[0].rgb.shape == (48, 64, 3)
    assert len(samples) / RATE == pytest.approx(0.8, abs=0.05)
    assert damage == []
    spectrum = np.abs(np.fft.rfft(samples[: RATE // 2]))
    assert np.argmax(spectrum) * 2 == pytest.approx(440, abs=4)


def test_variable_rate_keeps_its_times(tmp_path):
    times = [0.0, 0.04, 0.3, 0.31, 1.0]
    pictures, _, _ = read(write(tmp_path / "a.mkv", [grey(50 * i) for i in range(5)], times))
    assert [p.time for p in pictures] == pytest.approx(times, abs=1e-3)
    assert [int(p.rgb.mean().round()) for p in pictures] == pytest.approx([0, 50, 100, 150, 200], abs=3)


def test_time_0_is_the_first_picture(tmp_path):
    path = write(tmp_path / "a.mkv", [grey(9)] * 5, [7.0, 7.1, 7.2, 7.3, 7.4], sound=tone(1.0), begins=6.75)
    pictures, samples, _ = read(path)
    assert [p.time for p in pictures] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=2e-3)
    assert len(samples) / RATE == pytest.approx(0.75, abs=0.03)  # a quarter of a second came before the picture
    assert not np.isnan(samples).any()


def test_a_sound_that_begins_late_and_has_a_hole(tmp_path):
    sound = tone(1.5)
    sound[24_000:48_000] = np.nan
    path = write(tmp_path / "a.mkv", [grey(9)] * 60, sound=sound, begins=0.5, audio_codec="pcm_s16le")
    _, samples, _ = read(path)
    missing = np.isnan(samples)
    edges = np.flatnonzero(np.diff(missing.astype(int), prepend=0, append=0)) / RATE
    assert edges == pytest.approx([0, 0.5, 1.0, 1.5], abs=0.03)  # packets are 21 ms
    assert len(samples) / RATE == pytest.approx(2.0, abs=0.03)


@pytest.mark.parametrize(("name", "codec", "audio"), [
    ("a.mp4", None, "aac"), ("a.mkv", None, "pcm_s16le"), ("a.mpg", "mpeg1video", "mp2"), ("a.mov", None, "aac"),
    ("a.webm", "libvpx", "libopus"),
])  # fmt: skip
def test_a_flash_and_a_click_are_in_step(tmp_path, name, codec, audio):
    """The clap test: both at 1.2 s."""
    pictures = [grey(220 if i == 30 else 16) for i in range(60)]
    sound = np.zeros(round(2.4 * 48_000), np.float32)
    sound[round(1.2 * 48_000) :][:240] = 0.9
    found, samples, _ = read(write(tmp_path / name, pictures, sound=sound, codec=codec, audio_codec=audio))
    flash = found[int(np.argmax([p.rgb.mean() for p in found]))].time
    envelope = np.convolve(np.abs(np.nan_to_num(samples)), np.ones(40) / 40, "same")
    click = float(np.flatnonzero(envelope > 0.5 * envelope.max())[0]) / RATE
    assert flash == pytest.approx(1.2, abs=1e-3)
    assert click == pytest.approx(1.2, abs=5e-3 if audio != "mp2" else 2e-2)  # mp2 has no word for its encoder's delay


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation(tmp_path, degrees):
    """A phone held upright: the display matrix turns the picture."""
    picture = grey(20, 40, 80)
    picture[:, :40] = (230, 20, 20)  # red at the left
    ((*_, shown),) = [read(write(tmp_path / "a.mp4", [picture] * 3, rotation=degrees))[0]]
    red = shown.rgb[..., 0].astype(int) - shown.rgb[..., 1]
    height, width = red.shape
    sides = {
        "left": red[:, : width // 4],
        "right": red[:, -width // 4 :],
        "top": red[: height // 4],
        "bottom": red[-height // 4 :],
    }
    side = max(sides, key=lambda name: sides[name].mean())
    assert (width, height) == ((80, 40) if degrees == 180 else (40, 80))
    assert side == {90: "bottom", 180: "right", -90: "top"}[degrees]  # counter-clockwise, as FFmpeg counts


def test_odd_sizes_and_large_ones(tmp_path):
    pictures, _, _ = read(write(tmp_path / "a.mkv", [grey(7, 101, 67)] * 2, codec="ffv1"))
    assert pictures[0].rgb.shape == (101, 67, 3)
    pictures, _, _ = read(write(tmp_path / "b.mp4", [grey(7, 1080, 1920)] * 2))
    assert pictures[0].rgb.shape == (540, 960, 3)


def test_pixels_that_are_not_square(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey(9), "rgb24")))
        file.mux(stream.encode(None))
    assert read(path)[0][0].rgb.shape == (48, 128, 3)


def test_no_sound_and_no_picture(tmp_path):
    with Media(write(tmp_path / "a.mp4", [grey(1)] * 5)) as media:
        assert (media.picture, media.sound, media.rate) == (True, False, 25.0)
    path = write(tmp_path / "a.wav", sound=tone(1.0), audio_codec="pcm_s16le")
    with Media(path) as media:
        assert (media.picture, media.sound, media.rate) == (False, True, 0.0)
    pictures, samples, _ = read(path)
    assert pictures == []
    assert len(samples) == pytest.approx(RATE, abs=20)


def test_stereo_is_mixed(tmp_path):
    left = tone(0.5, 440)
    path = write(tmp_path / "a.wav", sound=np.stack([left, np.zeros_like(left)], 1), audio_codec="pcm_s16le")
    samples = read(path)[1]
    assert np.abs(samples).max() == pytest.approx(0.25, abs=0.01)


def test_a_file_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path):
    whole = write(tmp_path / "a.mkv", [grey(i) for i in range(100)], sound=tone(4.0)).read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole[: len(whole) // 2])
    pictures, samples, _ = read(tmp_path / "b.mkv")
    assert 10 < len(pictures) < 90
    assert 0.5 < len(samples) / RATE < 3.5


def test_damage_inside_is_passed_by_and_said(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(50)]
    data = bytearray(
        write(tmp_path / "a.avi", pictures, codec="mjpeg", sound=tone(2.0), audio_codec="pcm_s16le").read_bytes()
    )
    for at in range(len(data) // 3, len(data) // 3 + 4000):
        data[at] = 0xFF
    (tmp_path / "b.avi").write_bytes(bytes(data))
    found, _, _ = read(tmp_path / "b.avi")
    assert len(found) >= 35


@pytest.mark.parametrize("content", [b"", b"not a video", bytes(range(256)) * 40])
def test_what_is_no_media_file(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"path: expected a media file.*a\.mp4"):
        Media(tmp_path / "a.mp4")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: expected a media file, got .*nothing\.mp4"):
        Media(tmp_path / "nothing.mp4")


@pytest.mark.skipif(not GRID.is_dir(), reason="no GRID clips")
def test_real_clips():
    for path in sorted(GRID.glob("*.mpg")):
        pictures, samples, damage = read(path)
        assert (len(pictures), pictures[-1].time, pictures[0].rgb.shape) == (75, pytest.approx(2.96), (288, 360, 3))
        assert 2.9 < len(samples) / RATE < 3.0
        assert not np.isnan(samples).any()
        assert damage == []


def test_titles_in_another_encoding(tmp_path):
    """Latin-1, which is not UTF-8."""
    path = write(tmp_path / "a.mkv", [grey(v) for v in range(5)], sound=tone(0.2))
    written = path.read_bytes()
    assert b"Lavf" in written  # the name of the program that wrote it, of which we spoil a letter
    path.write_bytes(written.replace(b"Lavf", b"L\xe9vf"))
    assert duration(path) > 0
    pictures, _, damage = read(path)
    assert len(pictures) == 5
    assert damage == []
