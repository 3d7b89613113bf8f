"""The page's script in Node with a document of stubs: which figures it writes, for any targets; that nothing throws.

How it looks is for a browser (test_page.py); this runs where there is none.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

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


def shown(targets, frames, past=()):
    """What the page says after these messages."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    html = Path(page.__file__).with_name("page.html").read_text()
    (script,) = re.findall(r"<script>\n(.*?)</script>", html, re.DOTALL)
    hello = {
        "id": "a", "run": "run", "modalities": ["audio", "text"], "stages": 2, "labels": True, "targets": targets,
        "recent": 75, "past": list(past),
    }  # fmt: skip
    messages = [["hello", hello], *(["frame", frame] for frame in frames), ["end", {"why": "end of input"}]]
    program = "\n".join([STUBS, script, f"const MESSAGES = {json.dumps(messages)};", CHECK])
    done = subprocess.run([node, "-"], input=program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
