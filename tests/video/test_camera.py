"""A file through the live path gives the frames that `extract` makes of it; late sound, devices that are not there, real time."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("librosa")
pytest.importorskip("safetensors")

from media import make

from sage_ext.cli import main
from sage_ext.data import AffWild2
from sage_ext.live.camera import PATIENCE, Browser, Camera, Extraction, FrameMaker, Inbox, Microphone, Played, Source
from sage_ext.video import Parameters, extract
from sage_ext.video.decode import RATE
from sage_ext.video.faces import ToldTracker

TOLD = Parameters(told=True)
NAMES = ("audio", "visual")


def maker(path, names=NAMES):
    none = {name: None for name in NAMES if name not in names}
    return FrameMaker(tuple(names), Parameters(told=True, **none), ToldTracker(path.with_suffix(".faces.csv")), 30.0)


def live_frames(path, *, paced=False):
    source = Played(path, paced=paced)
    inbox = Inbox(source)
    source.start(inbox)
    inbox.begin()
    return [frame for frame, _ in Extraction(inbox, maker(path))]


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_live_equals_offline(videos, tmp_path, name):
    path = videos / f"{name}.mp4"
    extract(path, tmp_path / "data", TOLD)
    clip = AffWild2(tmp_path / "data", "test")[0]
    frames = live_frames(path)
    assert len(frames) == clip.num_frames
    assert [f.echo["t"] for f in frames] == pytest.approx([t / 30 for t in range(len(frames))], abs=1e-6)
    for m, modality in enumerate(NAMES):
        got = np.concatenate([f.features[m] for f in frames])
        want = np.asarray(clip.features[modality][0 : clip.num_frames], np.float32)
        assert got == pytest.approx(np.nan_to_num(want), abs=2e-4, rel=1e-4)
        assert np.concatenate([f.present for f in frames])[:, m].tolist() == clip.present[modality].tolist()
        quality = np.concatenate([f.quality[modality] for f in frames])
        assert quality == pytest.approx(
            np.asarray(clip.quality[modality][0 : clip.num_frames]), abs=2e-4, rel=1e-4, nan_ok=True
        )


class Quiet(Source):
    """A source whose deliveries the test makes itself."""

    said = "the test"

    def start(self, inbox):
        pass

    def stop(self):
        pass


def test_sound_that_does_not_come_is_missing_and_the_frame_is_not_late(videos):
    source, path = Quiet(), videos / "one.mp4"
    inbox = Inbox(source)
    frames = Extraction(inbox, maker(path, ("audio",)))
    inbox.begin()
    inbox.samples(0.0, np.full(RATE // 10, 0.1, np.float32))
    found = [frames.next(2.0) for _ in range(6)]
    late = inbox.clock() - 6 / 30
    assert [bool(f.present[0, 0]) for f, _ in found] == [True] * 3 + [False] * 3
    assert PATIENCE - 0.01 <= late < PATIENCE + 2
    inbox.samples(0.1, np.full(RATE // 2, 0.1, np.float32))  # what comes of the past is dropped, and the clock goes on
    more = [frames.next(2.0) for _ in range(9)]
    assert sum(bool(f.present[0, 0]) for f, _ in more) >= 3
    inbox.end("enough")
    while not frames.over:
        frames.next(1.0)


def test_the_newest_picture_wins(videos):
    """Pictures that come faster than they can be looked at cost nothing, and no frame waits for an old one."""
    looked = []

    def picture(k):
        looked.append(k)
        time.sleep(0.1)  # three frames
        return np.full((96, 128, 3), k, np.uint8)

    source, path = Quiet(), videos / "one.mp4"
    source.sound = False
    inbox = Inbox(source)
    frames = Extraction(inbox, maker(path, ("visual",)))
    inbox.begin()

    def deliver():
        for k in range(60):
            time.sleep(max(k / 60 - inbox.clock(), 0))
            inbox.picture(k / 60, lambda k=k: picture(k), 1 / 60)
        inbox.end("enough")

    thread = threading.Thread(target=deliver)
    thread.start()
    began = time.monotonic()
    count = sum(1 for _ in frames)
    took = time.monotonic() - began
    thread.join()
    assert 28 <= count <= 31
    assert took < 3.5  # one second of pictures, sixty of which would have taken six
    assert len(looked) <= 25
    assert looked == sorted(looked)


def test_devices_that_are_not_there():
    with pytest.raises(OSError, match="--camera: expected the number of a camera of this machine, got 77"):
        Camera(77)
    with pytest.raises(
        OSError, match="--microphone: expected a microphone of this machine, got 'nothing-of-this-name'"
    ):
        Microphone("nothing-of-this-name")


def test_a_browsers_media_come_in_on_one_clock(videos):
    import cv2

    source = Browser()
    inbox = Inbox(source)
    source.start(inbox)
    assert inbox.clock() == 0
    good, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 99, np.uint8))
    assert good
    source.take("sound", 1000.0, np.zeros(RATE // 50, "<f4").tobytes())
    assert inbox.begun is not None
    source.take("sound", 1000.02, np.ones(RATE // 50, "<f4").tobytes())
    source.take("picture", 1000.04, jpeg.tobytes())
    source.take("picture", 1000.08, b"no JPEG")
    assert inbox.heard / RATE == pytest.approx(0.02, abs=0.003)  # what was heard before time 0 is cut
    times = [at for at, _, _ in inbox.pictures]
    assert times[1] - times[0] == pytest.approx(0.04)
    assert times[0] == pytest.approx(0.02, abs=0.003)
    assert inbox.pictures[0][2]().mean() == pytest.approx(99, abs=2)
    assert inbox.pictures[1][2]().shape == (16, 16, 3)


# ------------------------------------------------------------------------------------------------------- the command
def test_a_video_played_in_real_time(trained, tmp_path, capfd):
    path = make(tmp_path / "live.mp4", 1.5, 7)
    began = time.monotonic()
    assert main(["stream", "--run", str(trained / "run"), "--video", str(path)]) == 0
    took = time.monotonic() - began
    out, err = capfd.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 45
    assert [a["frame"] for a in answers] == list(range(1, 46))
    assert np.mean([a["present"]["audio"] for a in answers]) > 0.7  # a busy machine may be late now and then
    assert took > 1.4  # not before it is seen
    delays = [a["delay_ms"] for a in answers]
    assert min(delays) >= 1000 / 30 - 1  # a frame is not over before its end
    assert "end to end" in err
    assert "the video is over" in err


@pytest.mark.parametrize(("flags", "message"), [
    (["--camera", "0", "--video", "x.mp4"], "expected one of --camera, --video and --browser-camera"),
    (["--video", "x.mp4", "--microphone"], "--microphone: expected --camera with it"),
    (["--browser-camera"], "--browser-camera: expected --serve PORT"),
    (["--camera", "0", "--pace", "30"], "expected none of them beside a camera"),
    (["--video", "nothing.mp4"], "expected a media file, got nothing.mp4"),
    (["--camera", "77"], "--camera: expected the number of a camera"),
])  # fmt: skip
def test_requests_that_cannot_be_met(trained, capsys, flags, message):
    assert main(["stream", "--run", str(trained / "run"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_other_features_is_refused(foreign_run, capsys):
    assert main(["stream", "--run", str(foreign_run), "--camera", "0"]) == 2
    assert "--run: expected a run that was trained on features of sage-ext extract" in capsys.readouterr().err
