"""The page's script in Node with a document of stubs: which figures it writes, for any targets; that nothing throws.

How it looks is for a browser (test_page.py); this runs where there is none.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sage_ext.live import page

STUBS = r"""
const made = {}, listeners = {};
function node(tag) {
  const self = {
    tag, children: [], textContent: "", className: "", hidden: false, dataset: {}, attributes: {}, clientWidth: 300,
    clientHeight: 200, width: 0, height: 0, style: { setProperty() {} }, classes: new Set(),
    append(...more) { self.children.push(...more); }, prepend(...more) { self.children.unshift(...more); },
    replaceChildren(...more) { self.children = more; }, setAttribute(key, value) { self.attributes[key] = String(value); },
    addEventListener() {},
    getContext: () => new Proxy({}, { get: (o, key) => o[key] ?? (() => {}), set: (o, k, v) => (o[k] = v, true) }),
  };
  self.classList = { toggle: (name, on) => on ? self.classes.add(name) : self.classes.delete(name) };
  return self;
}
globalThis.document = {
  body: node("body"), documentElement: node("html"), title: "", createElement: node, addEventListener() {},
  getElementById: (id) => made[id] ??= node(id), querySelectorAll: () => [],
};
globalThis.matchMedia = () => ({ matches: true, addEventListener() {} });
globalThis.addEventListener = () => {};
globalThis.getComputedStyle = () => ({ getPropertyValue: (name) => name });
globalThis.devicePixelRatio = 1;
let draw = null;
globalThis.requestAnimationFrame = (call) => { draw = call; };
globalThis.EventSource = class { addEventListener(name, call) { listeners[name] = call; } close() {} };
globalThis.setTimeout = () => {};
"""
CHECK = r"""
for (const [name, value] of MESSAGES) { listeners[name]({ data: JSON.stringify(value) }); draw(); }
const texts = (id) => made[id].children.map((row) => row.children.map((cell) => cell.textContent));
console.log(JSON.stringify({
  values: texts("values"), scores: texts("scores"), title: made["h-plane"].textContent, plane: !made["plane"].hidden,
  label: made["strip"].attributes["aria-label"], status: made["status"].textContent, count: made["count"].textContent,
  keys: made["key"].children.map((entry) => entry.textContent.trim()),
}));
"""


def run(*parts):
    """What this prints, after the stubs and the page's script."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    html = Path(page.__file__).with_name("page.html").read_text()
    (script,) = re.findall(r"<script>\n(.*?)</script>", html, re.DOTALL)
    done = subprocess.run(
        [node, "-"], input="\n".join([STUBS, script, *parts]), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hello(targets=(), past=(), **more):
    return {
        "id": "a", "run": "run", "modalities": ["audio", "text"], "stages": 2, "labels": True, "targets": targets,
        "recent": 75, "past": list(past), **more,
    }  # fmt: skip


def shown(targets, frames, past=()):
    """What the page says after these messages."""
    messages = [
        ["hello", hello(targets, past)],
        *(["frame", frame] for frame in frames),
        ["end", {"why": "end of input"}],
    ]
    return run(f"const MESSAGES = {json.dumps(messages)};", CHECK)


def frame(count, names, point, truth):
    by_modality = {"audio": 0.25, "text": 0.75}
    score = dict.fromkeys(names, -0.125)
    return {
        "count": count, "clock": float(count), "point": point, "truth": truth and dict(zip(names, truth)), "malformed": 0,
        "weights": by_modality, "confidence": by_modality, "present": {"audio": True, "text": False}, "stage": [0.25, 0.75],
        "latency_us": 41.5, "p50": 40.0, "p99": 900.0, "ccc": score, "ccc_recent": None,
    }  # fmt: skip


def test_valence_and_arousal():
    names = ["valence", "arousal"]
    found = shown(
        [[name, -1, 1] for name in names],
        [frame(1, names, [0.1, -0.2], [0.5, 0.5]), frame(2, names, [0.256, -0.3], None)],
        past=[[0.5, 1, [0.0, 0.1], None]],
    )
    assert found["title"] == "Valence and arousal"
    assert found["plane"]
    assert found["values"] == [["+0.26", "valence"], ["−0.30", "arousal"]]
    assert found["scores"] == [
        ["CCC", "so far", "last 75 frames"],
        ["valence", "−0.125", "–"],
        ["arousal", "−0.125", "–"],
    ]
    assert found["label"] == "valence +0.26, arousal −0.30"
    assert (found["status"], found["count"]) == ("stream ended", "2")


@pytest.mark.parametrize("count", [1, 5])
def test_other_targets(count):
    """No plane; values in their own units."""
    targets = [["stress", 0, 100], ["a", -1, 1], ["b", 0, 1], ["c", 0, 0.01], ["d", -4000, 0]][:count]
    names = [name for name, _, _ in targets]
    found = shown(targets, [frame(7, names, [62.54, 0.5, 0.5, 0.00567, -1234.5][:count], None)])
    assert found["title"] == "Estimate"
    assert not found["plane"]
    said = [["62.5", "stress"], ["+0.50", "a"], ["0.500", "b"], ["0.00567", "c"], ["−1234", "d"]]
    assert [row[1] for row in found["values"]] == names == found["keys"]
    assert found["values"][:4] == said[:count][:4]
    assert len(found["scores"]) == count + 1


LOOK = r"""
const see = () => ({
  view: !made["view"].hidden, screen: !made["screen"].hidden, face: !made["face"].hidden, box: { ...made["face"].style },
  ratio: made["screen"].style.aspectRatio, source: made["picture"].src, still: made["screen"].classes.has("still"),
});
const seen = [];
for (const id of ["view", "screen", "face", "camera", "preview", "picture"])  // as in the page
  document.getElementById(id).hidden = true;
const real = performance.now.bind(performance);
for (const [name, value] of MESSAGES) {
  listeners[name]({ data: JSON.stringify(value) });
  seen.push(see());
}
performance.now = () => real() + 60_000;
draw();
seen.push(see());
console.log(JSON.stringify(seen));
"""


def test_a_picture_is_shown_with_the_face_in_it():
    """Nothing before the first one; the box where there is a face; pale where no picture follows."""
    pictures = [
        {"jpeg": "AAAA", "face": [160, 90, 320, 180], "size": [640, 360]},
        {"jpeg": "BBBB", "face": None, "size": [300, 400]},
    ]
    messages = [["hello", hello()], *(["picture", picture] for picture in pictures)]
    none, first, second, later = run(f"const MESSAGES = {json.dumps(messages)};", LOOK)
    assert not none["view"]
    assert (first["view"], first["screen"], first["face"]) == (True, True, True)
    assert first["source"] == "data:image/jpeg;base64,AAAA"
    box = {side: first["box"][side] for side in ("left", "top", "width", "height")}
    assert box == {"left": "25%", "top": "25%", "width": "50%", "height": "50%"}
    assert (second["source"], second["ratio"], second["face"]) == ("data:image/jpeg;base64,BBBB", "300 / 400", False)
    assert (second["still"], later["still"]) == (False, True)


ASK = r"""
globalThis.location = { hash: HASH };
const asked = [];
const getUserMedia = async (wanted) => {
  asked.push(Object.keys(wanted));
  throw Object.assign(new Error("a reason"), { name: FAILURE });
};
Object.defineProperty(globalThis, "navigator", { value: FAILURE ? { mediaDevices: { getUserMedia } } : {} });
for (const id of ["view", "screen", "camera"]) document.getElementById(id).hidden = true;
listeners["hello"]({ data: JSON.stringify(HELLO) });
const offered = !made["view"].hidden && !made["camera"].hidden;
(async () => {
  for (let i = 0; i < 50; i++) await null;
  console.log(JSON.stringify({ offered, asked, said: document.getElementById("said").textContent,
                               again: document.getElementById("start").disabled === false }));
})();
"""


def asked(failure, hash="#camera", **more):
    names = [("HASH", hash), ("FAILURE", failure), ("HELLO", hello(**more))]
    return run(*(f"const {name} = {json.dumps(value)};" for name, value in names), ASK)


@pytest.mark.parametrize(
    ("failure", "times", "said"),
    [
        ("NotAllowedError", 1, "did not allow the camera and microphone"),
        ("NotFoundError", 3, "found neither a camera nor a microphone"),
        ("NotReadableError", 1, "another program may be using it"),
        ("OtherError", 1, "could not be started: a reason"),
        (None, 0, "only for pages of this machine"),
    ],
)
def test_a_camera_that_cannot_be_had(failure, times, said):
    """It is said why, and the button can be pressed again; a lone camera or microphone is taken."""
    found = asked(failure, camera="token")
    assert found["offered"]
    assert found["asked"] == [["video", "audio"], ["video"], ["audio"]][:times]
    assert said in found["said"]
    assert found["again"]


@pytest.mark.parametrize(("hash", "more"), [("", {"camera": "token"}), ("#camera", {})])
def test_a_camera_that_nobody_asked_for(hash, more):
    """It is not started unless the address says so, nor where the program wants none."""
    found = asked("NotAllowedError", hash, **more)
    assert found["offered"] == bool(more)
    assert (found["asked"], found["said"]) == ([], "")


TAPPED = r"""
const found = [];
for (const rate of [8000, 16000, 44100, 48000]) {
  const pieces = {}, start = Math.floor(1000 * rate / 16000);
  globalThis.sampleRate = rate;
  globalThis.AudioWorkletProcessor = class { port = { postMessage: ([number, piece]) => { pieces[number] = [...piece]; } }; };
  let Tap;
  globalThis.registerProcessor = (name, made) => { Tap = made; };
  new Function(TAP)();
  const tap = new Tap();
  for (globalThis.currentFrame = start; currentFrame < start + rate; globalThis.currentFrame += 128) {
    if (currentFrame > start + rate / 2 && currentFrame < start + 0.55 * rate) { tap.process([[]]); continue; }
    const sound = Float32Array.from({ length: 128 }, (_, i) => FREQUENCIES.reduce(
      (sum, f) => sum + 0.4 * Math.sin(2 * Math.PI * f * (currentFrame + i) / rate), 0));
    tap.process([[sound]]);
  }
  found.push([rate, pieces]);
}
console.log(JSON.stringify(found));
"""


@pytest.mark.parametrize(("frequencies", "kept"), [([440, 3000], {440, 3000}), ([440, 9500], {440}), ([11000], set())])
def test_sound_at_any_rate_becomes_16_000_samples_a_second(frequencies, kept):
    """Each sample at its number's time; what is above half the rate is left out; a pause of the sound is a gap."""
    for rate, pieces in run(f"const FREQUENCIES = {json.dumps(frequencies)};", TAPPED):
        if max(frequencies) > rate / 2 - 500:  # 8,000 a second hold none of these; 16,000 not what is above 8,000
            continue
        numbers = np.array([int(number) for number in pieces])
        assert numbers[0] == 1000
        assert len(numbers) in (28, 29)  # of 0.95 s, in 512s
        steps = np.diff(numbers)
        assert steps.min() == 512
        assert (steps != 512).sum() == 1  # the pause
        for number, piece in [*zip(numbers, pieces.values())][1:14]:  # past the sound's sudden beginning
            time = (number + np.arange(512)) / 16000
            want = sum((0.4 * np.sin(2 * np.pi * f * time) for f in frequencies if f in kept), np.zeros(512))
            np.testing.assert_allclose(piece, want, atol=1e-6 if rate == 16000 else 2e-3)
