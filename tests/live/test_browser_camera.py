"""The browser's camera and microphone, in headless Chromium with its own fake devices: a turning disc, two beeps a second."""

import base64
import itertools
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from streams import DIMS, NAMES, WAIT
from test_page import Browser

from sage_ext.live.estimator import Estimator
from sage_ext.live.page import Page
from sage_ext.live.server import RATE
from sage_ext.models import SAGE

cv2 = pytest.importorskip("cv2")

DEVICES = "--use-fake-device-for-media-stream=fps=30"
ALLOWED = "--use-fake-ui-for-media-stream"
SECONDS = 4.0


@pytest.fixture(scope="module")
def binary():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium")
    return found


class Media:
    """What the page sends, (kind, seconds, payload, when it came); pictures are shown on the page again."""

    def __init__(self):
        self.records, self.more, self.page = [], threading.Condition(), None

    def __call__(self, kind, seconds, payload):
        with self.more:
            self.records.append((kind, seconds, payload, time.time()))
            self.more.notify_all()
        if kind == "picture":
            self.page.picture(payload, (220.0, 80.0, 200.0, 200.0), (640, 360))

    def until(self, condition, seconds=WAIT):
        with self.more:
            return self.more.wait_for(lambda: condition(self.records), seconds)

    def of(self, kind):
        with self.more:
            return [record[1:] for record in self.records if record[0] == kind]


@pytest.fixture
def media():
    return Media()


@pytest.fixture
def page(media):
    torch.manual_seed(0)
    model = SAGE(dict(zip(NAMES, DIMS)), dim=8, stages=3, blocks=2).eval()
    estimator = Estimator(model, NAMES)
    with Page("127.0.0.1", 0, "run", estimator, browser_camera=True, on_media=media) as media.page:
        yield media.page


def lasts(records):
    times = Counter(kind for kind, *_ in records)
    if min(times["picture"], times["sound"]) < 2:
        return False
    return all(
        max(at for kind, at, *_ in records if kind == which) - next(at for kind, at, *_ in records if kind == which)
        > SECONDS
        for which in ("picture", "sound")
    )


@pytest.mark.slow
def test_camera_and_microphone(page, media, binary, tmp_path):
    with Browser(binary, tmp_path / "profile", DEVICES, ALLOWED) as browser:
        browser.call("Page.navigate", url=page.url + "#camera")
        assert media.until(lasts), browser.text("said")
        assert "The camera and microphone are on." in browser.text("said")
        browser.until("document.getElementById('picture').naturalWidth === 640", "the picture is shown")
        assert browser.value("!document.getElementById('face').hidden && document.getElementById('preview').hidden")
        over = "(() => { const [a, b] = ['face', 'screen'].map((id) => document.getElementById(id).getBoundingClientRect());"
        over += "return [(a.left - b.left) / b.width, (a.top - b.top) / b.height, a.width / b.width, a.height / b.height]; })()"
        assert browser.value(over) == pytest.approx([220 / 640, 80 / 360, 200 / 640, 200 / 360], abs=0.01)
        shot = base64.b64decode(
            browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        )
        (tmp_path / "page.png").write_bytes(shot)
        assert browser.complaints() == []
        assert browser.requests() <= {page.url + "#camera", page.url, page.url + "events", page.url + "media"} | {
            url for url in browser.requests() if url.startswith("blob:" + page.url)
        }
        browser.value("document.getElementById('stop').click()")
        assert browser.text("said") == "The camera is off."
        time.sleep(0.3)
        first = list(media.records)
        time.sleep(0.5)
        count = len(media.records)
        assert count == len(first)
        browser.value("document.getElementById('start').click()")  # and again, on the same clock
        assert media.until(lambda records: len({kind for kind, *_ in records[count:]}) == 2), browser.text("said")
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        count = len(media.records)
        browser.call("Page.reload")
        assert media.until(lambda records: len({kind for kind, *_ in records[count:]}) == 2), browser.text("said")
        page.end("end of input")
        browser.until(
            "document.getElementById('said').textContent.includes('stream has ended')", "the camera ends with it"
        )
    for kind in ("picture", "sound"):
        assert (np.diff([at for _, at, *_ in filter(lambda r: r[0] == kind, media.records)]) > 0).all()
    pictures = [record[1:] for record in first if record[0] == "picture"]
    sounds = [record[1:] for record in first if record[0] == "sound"]
    for records in (pictures, sounds):  # one clock, and nothing waits for long
        assert -0.05 < np.median([came - at for at, _, came in records]) < 0.7

    decoded = [cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_COLOR) for _, payload, _ in pictures]
    assert {picture.shape for picture in decoded} == {(360, 640, 3)}
    assert 10 < (len(pictures) - 1) / (pictures[-1][0] - pictures[0][0]) < 41
    blue, green, red = decoded[-1].reshape(-1, 3).mean(0)
    assert green > 100 > 3 * max(blue, red)  # Chromium's fake camera is green
    changed = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(decoded)]
    assert np.median(changed) > 0.3  # and its disc turns

    assert_beeps(sounds)


def assert_beeps(sounds):
    """Two a second, 16,000 samples a second, none of them twice and hardly one lost."""
    first_at, last_at, last = sounds[0][0], sounds[-1][0], len(sounds[-1][1]) // 4
    wave = np.full(round((last_at - first_at) * RATE) + last, np.nan, np.float32)
    for at, payload, _ in sounds:
        begin = round((at - first_at) * RATE)
        assert np.isnan(wave[begin : begin + len(payload) // 4]).all()
        wave[begin : begin + len(payload) // 4] = np.frombuffer(payload, "<f4")
    assert np.isnan(wave).mean() < 0.1
    loud = np.flatnonzero(np.abs(np.nan_to_num(wave)) > 0.1 * np.nanmax(np.abs(wave)))
    beeps = loud[np.r_[True, np.diff(loud) > RATE // 8]] / RATE
    assert len(beeps) >= 4
    assert np.median(np.diff(beeps)) == pytest.approx(0.5, abs=0.02)


def test_a_microphone_that_is_read_at_its_own_rate_alone(page, media, binary, tmp_path):
    """As Firefox does."""
    refuse = """
    const given = AudioContext.prototype.createMediaStreamSource;
    AudioContext.prototype.createMediaStreamSource = function (stream) {
      if (this.sampleRate === 16000) throw new DOMException("different sample-rate", "NotSupportedError");
      globalThis.rate = this.sampleRate;
      return given.call(this, stream);
    };"""
    with Browser(binary, tmp_path / "profile", DEVICES, ALLOWED) as browser:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=refuse)
        browser.call("Page.navigate", url=page.url + "#camera")
        assert media.until(lambda records: sum(len(x[2]) for x in records if x[0] == "sound") > 2.5 * 4 * RATE)
        assert browser.value("rate") > 40_000
        assert browser.complaints() == []
    assert_beeps(media.of("sound"))


def test_a_camera_that_is_not_allowed(page, media, binary, tmp_path):
    with Browser(binary, tmp_path / "profile", DEVICES, "--deny-permission-prompts") as browser:
        browser.call("Page.navigate", url=page.url)
        browser.until("document.getElementById('camera')?.hidden === false", "the camera is offered")
        assert browser.text("said") == ""
        assert browser.value("document.getElementById('screen').hidden")
        browser.value("document.getElementById('start').click()")
        browser.until(
            "document.getElementById('said').textContent.includes('did not allow the camera')", "it says why not"
        )
        assert browser.value("!document.getElementById('start').disabled")
    assert media.records == []


# -------------------------------------------------------------------------------------------------- the whole of it
def as_devices(video, folder):
    """Chromium's flags that make a video file its camera and microphone."""
    import wave

    av = pytest.importorskip("av")
    pictures, sound = folder / "camera.y4m", folder / "microphone.wav"
    with av.open(str(video)) as source, open(pictures, "wb") as out:
        stream = source.streams.video[0]
        out.write(f"YUV4MPEG2 W{stream.width} H{stream.height} F30:1 Ip A1:1 C420jpeg\n".encode())
        for frame in source.decode(stream):
            out.write(b"FRAME\n" + frame.to_ndarray(format="yuv420p").tobytes())
    with av.open(str(video)) as source, wave.open(str(sound), "wb") as out:
        out.setparams((1, 2, 48_000, 0, "NONE", ""))
        resampler = av.AudioResampler("s16", "mono", 48_000)
        for frame in source.decode(audio=0):
            for block in resampler.resample(frame):
                out.writeframes(block.to_ndarray().tobytes())
    return [
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={pictures}",
        f"--use-file-for-fake-audio-capture={sound}",
    ]


@pytest.mark.slow
def test_the_command_estimates_what_the_browser_sees(binary, tmp_path):
    """A drawn person before Chromium's camera, through the page, the extraction and the model, and back onto the page."""
    import json
    import shutil
    import signal
    import subprocess
    import sys

    for package in ("av", "librosa", "safetensors"):
        pytest.importorskip(package)
    from sage_ext.training.trainer import TrainConfig, train
    from sage_ext.video import extract
    from sage_ext.video.synth import write_videos

    write_videos(tmp_path / "world", train=1, validation=1, test=1, seconds=(6, 7), clean=True)
    extract(tmp_path / "world/videos", tmp_path / "data", processes=1)
    shutil.copytree(tmp_path / "world/annotations", tmp_path / "data/annotations")
    config = TrainConfig(str(tmp_path / "data"), dim=16, batch_size=2, window=2.0, epochs=1, max_steps=3)
    train(config, tmp_path / "run", progress=False)
    command = [
        sys.executable,
        "-m",
        "sage_ext",
        "stream",
        "--run",
        str(tmp_path / "run"),
        "--browser-camera",
        "--serve",
        "0",
    ]
    with open(tmp_path / "answers", "w") as answers, open(tmp_path / "said", "w") as said:
        stream = subprocess.Popen(command, stdout=answers, stderr=said)
    try:
        until = time.monotonic() + WAIT
        while "live at" not in (text := (tmp_path / "said").read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        url = text.split("live at ")[1].split()[0]
        with Browser(
            binary, tmp_path / "profile", *as_devices(tmp_path / "world/videos/test_01.mp4", tmp_path), ALLOWED
        ) as browser:
            browser.call("Page.navigate", url=url + "#camera")
            while (tmp_path / "answers").read_text().count("\n") < 240 and time.monotonic() < until:
                time.sleep(0.2)
            assert browser.value("!document.getElementById('face').hidden"), "the face has a box on the page"
            shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
            (tmp_path / "page.png").write_bytes(base64.b64decode(shot))
            assert browser.complaints() == []
    finally:
        stream.terminate()  # SIGINT may be ignored by whoever started the tests
        assert stream.wait(WAIT) == 128 + signal.SIGTERM
    found = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()][30:]
    assert len(found) >= 200
    assert [b["frame"] - a["frame"] for a, b in itertools.pairwise(found)] == [1] * (len(found) - 1)
    assert np.mean([answer["present"]["visual"] for answer in found]) > 0.9
    assert np.mean([answer["present"]["audio"] for answer in found]) > 0.9
    assert np.median([answer["delay_ms"] for answer in found]) < 250
    assert "end to end" in (tmp_path / "said").read_text()
