"""The page of a video: its structure, its numbers, what it must not do, and its script in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")  # the colours' module wants it for its own pictures alone, but is tested with it

from sage_ext.data.targets import VALENCE_AROUSAL, Target
from sage_ext.video.report import POINTS, REASONS, binned, spans, write_report
from sage_ext.video.result import Result

VISUAL = ("score", "size", "sharpness", "brightness", "contrast", "symmetry", "age", "blur", "voice_match")
AUDIO = ("level", "snr", "speech", "clipping", "pitch_confidence", "voice_match")
GOOD = {"size": 7.0, "sharpness": 2.5, "brightness": 0.5, "contrast": 0.2, "symmetry": 0.7, "blur": 0.1, "voice_match": 0.6,
        "level": -20.0, "snr": 25.0, "speech": 0.9, "clipping": 0.0}  # fmt: skip
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def walk(rng, *shape):
    return np.cumsum(rng.standard_normal(shape), 0) / np.sqrt(shape[0])


def made(frames=300, fps=30.0, targets=VALENCE_AROUSAL, name="talk", run=True, modalities=("audio", "visual"), seed=0):
    """A random walk of everything; the signals are good throughout."""
    rng = np.random.default_rng(seed)
    middle, half = np.array([((t.low + t.high) / 2, (t.high - t.low) / 2) for t in targets]).T
    weights = rng.uniform(0.1, 1, (frames, len(modalities)))
    stage = rng.uniform(0.1, 1, (frames, 3))
    columns = {m: c for m, c in (("audio", AUDIO), ("visual", VISUAL)) if m in modalities}
    quality = {
        m: np.stack([np.full(frames, GOOD.get(c, 0.5)) + 0.001 * rng.standard_normal(frames) for c in names], 1).astype(
            np.float32
        )
        for m, names in columns.items()
    }
    estimated = {
        "targets": targets,
        "prediction": middle + half * np.clip(walk(rng, frames, len(targets)), -1, 1),
        "deviation": half * rng.uniform(0.1, 0.4, (frames, len(targets))),
        "weights": (weights / weights.sum(1, keepdims=True)).astype(np.float32),
        "confidence": rng.uniform(0, 1, (frames, len(modalities))).astype(np.float32),
        "stage": (stage / stage.sum(1, keepdims=True)).astype(np.float32),
        "run": "runs/a",
    }
    return Result(
        name, Path(f"{name}.mp4"), fps, modalities, np.ones((frames, len(modalities)), bool), quality, columns,
        np.tile(np.float32([100, 50, 80, 90]), (frames, 1)), (320, 240),
        thumbnails=[(frames / fps * (i + 0.5) / 8, b"\xff\xd8 a picture \xff\xd9") for i in range(8)],
        **(estimated if run else {}),
    )  # fmt: skip


def written(result, tmp_path):
    page = write_report(result, tmp_path / "page.html").read_text("utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    return page, data


class Structure(html.parser.HTMLParser):
    """Fails where tags do not close in order; gathers them."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    structure = Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    return structure


def curve(data, plot, line=0, part="values"):
    return data["series"][data["plots"][plot]["lines"][line][part]]


@pytest.mark.parametrize("run", [True, False])
def test_structure(tmp_path, run):
    page, data = written(made(run=run), tmp_path)
    structure = parsed(page)
    assert page.startswith("<!DOCTYPE html>")
    found = [tag for tag, _ in structure.tags]
    assert {tag: found.count(tag) for tag in ("html", "head", "title", "body", "h1", "main")} == dict.fromkeys(
        ("html", "head", "title", "body", "h1", "main"), 1
    )
    plots = [a for _, a in structure.tags if "data-plot" in a]
    assert [int(a["data-plot"]) for a in plots] == list(range(len(data["plots"])))
    assert all(a["aria-label"] for a in plots)
    assert all(int(a["data-values"]) < len(data["series"]) for _, a in structure.tags if "data-values" in a)
    assert "{{" not in page


def test_loads_nothing(tmp_path):
    page, _ = written(made(), tmp_path)
    structure = parsed(page)
    loading = {"src", "href", "data", "srcset", "action", "poster"}
    assert [a[x] for _, a in structure.tags for x in loading & set(a)] == ["data:,"]
    assert not re.search(r"https?:|//\w|@import|url\(|fetch\(|XMLHttp|WebSocket|\beval\(", page)
    assert "default-src 'none'" in page


def test_numbers_are_the_results(tmp_path):
    result = made(targets=(Target("stress", 0, 100), Target("calm", 1, 7)))
    _, data = written(result, tmp_path)
    assert data["bins"] == data["span"] == 300
    assert data["seconds"] == 10
    for c, target in enumerate(result.targets):
        np.testing.assert_allclose(curve(data, c), result.prediction[:, c], rtol=1e-3)
        low, high = (data["series"][i] for i in data["plots"][c]["lines"][0]["band"])
        estimate, deviation = result.prediction[:, c], result.deviation[:, c]
        np.testing.assert_allclose(low, np.clip(estimate - deviation, target.low, target.high), rtol=1e-3)
        np.testing.assert_allclose(high, np.clip(estimate + deviation, target.low, target.high), rtol=1e-3)
        assert (data["plots"][c]["low"], data["plots"][c]["high"]) == (target.low, target.high)
    for m in range(2):
        np.testing.assert_allclose(curve(data, 2, m), result.weights[:, m], rtol=1e-3)
        np.testing.assert_allclose(curve(data, 3, m), result.confidence[:, m], rtol=1e-3)
    for s in range(3):
        np.testing.assert_allclose(curve(data, 4, s), result.stage[:, s], rtol=1e-3)
    for i, column in enumerate(AUDIO):
        np.testing.assert_allclose(curve(data, 5 + i), result.quality["audio"][:, i], rtol=1e-3, err_msg=column)


def test_summary(tmp_path):
    result = made()
    result.present[:90, 1] = False
    result.quality["audio"][:150, AUDIO.index("speech")] = 0.1
    result.prediction[:, 0] = np.linspace(-0.4, 0.8, 300)
    result.weights[:] = (0.25, 0.75)
    text = " ".join(parsed(written(result, tmp_path)[0]).text)
    row = re.split(r"\s+", re.search(r"Greatest.*?(valence.*?)arousal", text, re.S)[1])
    assert row[1:4] == ["0.20", "−0.40", "0.80"]
    assert re.search(r"Time with a face\s+70 %", text)
    assert re.search(r"Time with speech\s+50 %", text)
    assert re.search(r"visual\s+70 %\s+0\.75", text)


def lanes(page):
    """name -> [(from, to)] in percent."""
    found = {}
    for lane in re.findall(r'<div class="row lane".*?</div></div>\n?.*?<div class="plot".*?</div></div>', page, re.S):
        bars = re.findall(r"left:([\d.]+)%;width:([\d.]+)%", lane)
        found[re.search(r"<span>(.*?)</span>", lane)[1]] = [(float(a), float(a) + float(b)) for a, b in bars]
    return found


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.name)
def test_each_reason_where_it_is_and_alone(tmp_path, reason):
    result = made()
    part = slice(60, 120)
    m = result.modalities.index(reason.modality)
    if reason.column is None:
        result.present[part, m] = False
        result.quality[reason.modality][part] = np.nan
    else:
        beyond = reason.threshold + (0.005 if reason.above else -0.05)
        column = reason.column
        if column == "noise_floor":
            column, beyond = "level", beyond + result.quality["audio"][part, AUDIO.index("snr")]
        result.quality[reason.modality][part, result.quality_columns[reason.modality].index(column)] = beyond
    found = lanes(written(result, tmp_path)[0])
    assert list(found) == [reason.name]
    np.testing.assert_allclose(found[reason.name], [(20, 40)], atol=0.01)


def test_good_signals_have_no_reason(tmp_path):
    page, _ = written(made(), tmp_path)
    assert lanes(page) == {}
    assert "Nothing was found" in page


@pytest.mark.parametrize("missing", [float("nan"), -1000.0])
def test_absence_is_said_once(tmp_path, missing):
    """What was measured of a face that is not there is no reason of its own."""
    result = made()
    result.present[100:200, 1] = False
    result.quality["visual"][100:200] = missing
    assert list(lanes(written(result, tmp_path)[0])) == ["face lost"]


def test_a_pause_is_no_noise_and_has_no_voice(tmp_path):
    result = made()
    for column, value in (("level", -60), ("snr", 0), ("speech", 0), ("voice_match", -0.5)):
        result.quality["audio"][100:200, AUDIO.index(column)] = value
    assert list(lanes(written(result, tmp_path)[0])) == ["no speech"]


def test_spans():
    flags = np.zeros(100, bool)
    flags[[0, 1, 10, 11, 14, 99]] = True
    assert spans(flags, 10.0, 0.25) == [(0.0, 0.2), (1.0, 1.5), (9.9, 10.0)]
    assert spans(flags, 10.0, 0.15) == [(0.0, 0.2), (1.0, 1.2), (1.4, 1.5), (9.9, 10.0)]
    assert spans(np.zeros(3, bool), 10.0, 1.0) == []
    assert spans(np.ones(3, bool), 10.0, 1.0) == [(0.0, 0.3)]


def test_binned():
    values = np.arange(10.0)
    values[[0, 3, 4, 5]] = np.nan
    np.testing.assert_array_equal(binned(values, 4), [1.5, np.nan, 7, 9])
    np.testing.assert_array_equal(binned(values, 10), values)


def test_script_in_names_is_text(tmp_path):
    evil = "<script>alert(1)</script>\"'&{{data}}\x1b"
    result = made(name="x", targets=(Target("<b>calm</b>", 0, 1),), modalities=(evil, "visual"))
    result = replace(result, name=evil, source=Path("a<script>.mp4"), run=evil)
    page, _ = written(result, tmp_path)
    structure = parsed(page)
    assert [a.get("type") for tag, a in structure.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, a in structure.tags if tag == "b" and a == {} and "calm" in page.split("<b>")[-1][:9]]
    assert "<b>calm" not in page
    assert "\x1b" not in page
    title = "".join(structure.text).strip()
    assert title.startswith("<script>alert(1)</script>\"'&{{data}}\\x1b")


def test_nothing_estimated_without_a_run(tmp_path):
    page, data = written(made(run=False), tmp_path)
    text = " ".join(parsed(page.replace(page[page.index("<style>") : page.index("</style>")], "<style>")).text)
    said = text[: text.index('{"bins"')].lower()
    assert "no emotion is estimated" in said
    assert "sage-ext train" in said
    for word in ("valence", "arousal", "stage", "confidence 0", "weight", "trusted", "deviation of"):
        assert word not in said, word
    assert list(lanes(page)) == ["sound", "face", "speech"]
    assert not any("band" in line or plot.get("kind") for plot in data["plots"] for line in plot["lines"])
    np.testing.assert_allclose(curve(data, 0), made().quality["audio"][:, AUDIO.index("speech")], rtol=1e-3)


def test_an_hour_is_small(tmp_path):
    result = made(frames=3600 * 30, targets=tuple(Target(f"target {i}") for i in range(6)))
    result.present[::2, 1] = False  # as many spans as there can be
    result.quality["audio"][::40, AUDIO.index("speech")] = 0
    page, data = written(result, tmp_path)
    assert len(page) < 5e6
    assert max(map(len, data["series"])) <= POINTS
    means = result.prediction[: 72 * 1500, 3].reshape(1500, 72).mean(1)
    np.testing.assert_allclose(curve(data, 3), means, rtol=2e-3, atol=1e-3)


def test_gaps_are_gaps(tmp_path):
    result = made()
    result.present[10:20] = False
    result.weights[10:20] = 0
    result.prediction[30:40, 1] = np.nan
    _, data = written(result, tmp_path)
    assert curve(data, 2)[9:21].count(None) == 10
    assert curve(data, 3, 1)[9:21].count(None) == 10
    assert curve(data, 1)[29:41].count(None) == 10


def test_no_frames(tmp_path):
    with pytest.raises(ValueError, match="result: expected at least one frame"):
        write_report(made(frames=0), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


PROBE = """<script>
const all = document.getElementById("time"), ruler = document.querySelector(".ticks").getBoundingClientRect();
const first = () => document.querySelector("output").textContent, said = [first()];
all.dispatchEvent(new PointerEvent("pointermove", { clientX: ruler.left + ruler.width * .505, clientY: 400, bubbles: true }));
said.push(first(), document.getElementById("cursor").hidden);
all.dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
said.push(first());
all.dispatchEvent(new PointerEvent("pointerleave"));
said.push(first(), document.documentElement.scrollWidth <= innerWidth);
document.body.dataset.said = JSON.stringify(said);
</script></body>"""


def in_chromium(page, tmp_path, text=None):
    """The page after its script ran, and what the script complained of."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", PROBE) if text is None else text, "utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,900", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("kind", ["run", "no run", "one frame", "little"])
def test_script_runs(tmp_path, kind):
    if kind == "little":
        result = made(modalities=("text",), targets=(Target("stress", 0, 100),))
        result.present[:] = False
        result = replace(result, quality={}, quality_columns={}, thumbnails=[], size=(0, 0), deviation=None, stage=None)
        result.weights[:] = 0
    else:
        result = made(frames=1 if kind == "one frame" else 1700, run=kind != "no run")
    page, data = written(result, tmp_path)
    dom, complaints = in_chromium(page, tmp_path)
    assert complaints == []
    drawn = dom[: dom.index("application/json")]
    assert drawn.count("<svg viewBox") == len(data["plots"])
    said = json.loads(html.unescape(re.search(r'data-said="(.*?)"', dom)[1]))
    shown = data["series"][int(re.search(r'<output data-values="(\d+)"', page)[1])]
    digits = int(re.search(r'<output [^>]*data-digits="(\d+)"', page)[1])

    def number(value):
        return f"{value:.{digits}f}".replace("-", "−")

    last, middle = shown[-1], shown[int(0.505 * data["span"])]
    if all(value is not None for value in shown):
        assert float(said[0].replace("−", "-")) == pytest.approx(np.mean(shown), abs=0.51 * 10.0**-digits)
        assert said[1:4] == [number(middle), False, number(last)]
        assert said[4] == said[0]
    assert said[5] is True  # nothing is wider than the window


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_complaints_are_seen(tmp_path):
    """What the test above would see of a script that fails."""
    _, complaints = in_chromium("", tmp_path, "<!DOCTYPE html><script>undefined.x</script>")
    assert len(complaints) == 1
