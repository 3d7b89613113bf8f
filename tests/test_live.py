"""sage-ext stream: what it answers, how it ends, what it survives; and its page, over HTTP and in a real browser."""

import base64
import contextlib
import fcntl
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import start_interruptible

from sage_ext import cli
from sage_ext.data.synthetic import write_dataset
from sage_ext.functional import ccc, temporal_ccc
from sage_ext.live.command import SHOWN
from sage_ext.live.estimator import Estimator, Latency, Quality, Trace
from sage_ext.live.frames import JsonLines, MalformedFrame, RawFloats
from sage_ext.live.page import Page
from sage_ext.models import SAGE
from sage_ext.training.runs import Run
from sage_ext.training.trainer import TrainConfig, train

NAMES, DIMS = ("audio", "visual"), (12, 16)
FRAMES = 400
WAIT = 60  # seconds for what takes three


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("live")
    write_dataset(
        root / "data", seed=3, train=3, validation=2, test=2, frames=(60, 90), modalities=dict(zip(NAMES, DIMS))
    )
    config = TrainConfig(
        str(root / "data"), dim=8, stages=3, blocks=2, window=60, hop=40, batch_size=2, max_steps=12, lr=1e-2, threads=1
    )
    train(config, root / "run", progress=False)
    return root / "run"


@pytest.fixture(scope="module")
def clip():
    """Features (T, D) a modality, NaN where `present` (T, M) is False; labels (T, 2), -5 where `valid` (T,) is not."""
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((FRAMES, d)).cumsum(0).astype(np.float32) / 8 for d in DIMS]
    present = rng.random((FRAMES, 2)) > 0.15
    for m, x in enumerate(features):
        x[~present[:, m]] = np.nan
    labels = np.round(np.sin(np.arange(FRAMES)[:, None] / 30 + np.array([0, 1])), 4)
    valid = rng.random(FRAMES) > 0.2
    labels[~valid] = -5
    return features, present, labels, valid


def line(features, present, t, /, **more):
    parts = {name: x[t].tolist() if present[t, m] else None for m, (name, x) in enumerate(zip(NAMES, features))}
    return json.dumps({**parts, **more}) + "\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory, clip):
    features, present, labels, _ = clip
    root = tmp_path_factory.mktemp("input")
    (root / "clip.jsonl").write_text("".join(line(features, present, t) for t in range(FRAMES)))
    (root / "clip.f32").write_bytes(np.concatenate(features, 1).astype("<f4").tobytes())
    (root / "labels.txt").write_text("valence,arousal\n" + "".join(f"{v:g},{a:g}\n" for v, a in labels))
    return root


@pytest.fixture(scope="module")
def offline(trained, clip):
    """The whole call on the first n of some frames: {"prediction", "weights", "confidence", "stage"} (n, ...)."""
    model = Run.load(trained).model
    features, present, _, _ = clip

    def whole(frames):
        with torch.no_grad():
            out = model([torch.from_numpy(x[frames])[None] for x in features] if model.names is None else
                        {n: torch.from_numpy(x[frames])[None] for n, x in zip(NAMES, features)},
                        torch.from_numpy(present[frames])[None])  # fmt: skip
        return {key: getattr(out, key)[0].numpy() for key in ("prediction", "weights", "confidence", "stage")}

    return whole


def strict(text):
    """JSON without NaN and Infinity, a line each."""

    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    assert text == "" or text.endswith("\n")
    return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


def columns(answers):
    return {
        "prediction": np.array([[a["valence"], a["arousal"]] for a in answers]),
        "weights": np.array([list(a["weights"].values()) for a in answers]),
        "confidence": np.array([list(a["confidence"].values()) for a in answers]),
        "stage": np.array([a["stage"] for a in answers]),
    }


def assert_equal(answers, want):
    got = columns(answers)
    for key in want:
        np.testing.assert_allclose(got[key], want[key], atol=1e-5, rtol=0, err_msg=key)


def run(capfd, *arguments):
    """(exit code, answers, stderr) of one `sage-ext stream` in this process."""
    capfd.readouterr()
    code = cli.main(["stream", *(str(a) for a in arguments)])
    out, err = capfd.readouterr()
    return code, strict(out), err


# -------------------------------------------------------------------------------------------------------- what it says
@pytest.mark.parametrize("form", ["jsonl", "f32"])
def test_answers_are_the_offline_models(capfd, trained, files, clip, offline, form):
    code, answers, err = run(capfd, "--run", trained, "--input", files / f"clip.{form}", "--format", form)
    assert code == 0
    assert [a["frame"] for a in answers] == list(range(1, FRAMES + 1))
    assert_equal(answers, offline(slice(None)))
    present = clip[1]
    assert [[a["present"][n] for n in NAMES] for a in answers] == present.tolist()
    assert all(a["latency_us"] > 0 for a in answers)
    missing = (~present).sum(0)
    refused = f", of these not finite {missing[1]}" if form == "f32" else ""
    assert re.search(rf"frames +{FRAMES} in", err)
    assert re.search(rf"visual absent +{missing[1]}{refused}\n", err)
    assert re.search(r"latency +p50 \d.* p90 .* p99 .* max ", err)
    assert sum(int(n) for n in re.findall(r"^ *[\d.]+ [um]?s #* +(\d+)$", err, re.MULTILINE)) == FRAMES


def test_labels_and_report(capfd, trained, files, clip, tmp_path):
    pytest.importorskip("matplotlib")
    _, _, labels, valid = clip
    report = tmp_path / "new" / "report"
    code, answers, err = run(
        capfd, "--run", trained, "--input", files / "clip.jsonl", "--labels", files / "labels.txt", "--report", report
    )
    assert code == 0
    said = torch.from_numpy(columns(answers)["prediction"])
    truth, mask = torch.from_numpy(labels).float().double(), torch.from_numpy(valid)
    final = list(answers[-1]["ccc"].values())
    np.testing.assert_allclose(final, ccc(said, truth, mask).numpy(), atol=1e-5)
    rho = temporal_ccc(said[None], truth[None], mask[None], window=300)[0][0].numpy()
    got = np.array([list((a["ccc_recent"] or {"v": 0, "a": 0}).values()) for a in answers])
    np.testing.assert_allclose(got, rho, atol=2e-5)
    assert [a["truth"] is not None for a in answers] == valid.tolist()
    assert [a["ccc"] is not None for a in answers] == (np.cumsum(valid) >= 2).tolist()
    assert f"valence {final[0]:.4f}  arousal {final[1]:.4f}" in err
    assert f"({valid.sum()} annotated frames)" in err
    page = (report / "report.html").read_text()
    assert {p.name for p in report.iterdir()} == {"report.html", "session.png", "latency.png"}
    assert page.count("data:image/png;base64,") == 2
    assert f"{final[0]:.4f}" in page
    assert "http" not in page


def test_labels_that_end_early_and_malformed_frames_keep_their_row(capfd, trained, files, clip, tmp_path):
    """Row i of the labels is the i-th frame of the input, malformed ones counted, blank lines not."""
    features, present, labels, _ = clip
    lines = [line(features, present, t) for t in range(6)]
    path, truth = tmp_path / "in.jsonl", tmp_path / "labels.txt"
    path.write_text(lines[0] + "\n" + "oops\n" + "".join(lines[1:]))
    truth.write_text("valence,arousal\n" + "".join(f"0.{i},-0.{i}\n" for i in range(1, 5)))
    code, answers, err = run(capfd, "--run", trained, "--input", path, "--labels", truth)
    assert code == 0
    assert [a["frame"] for a in answers] == [1, 3, 4, 5, 6, 7]
    assert [a["truth"] and a["truth"]["valence"] for a in answers] == [0.1, 0.3, 0.4, None, None, None]
    assert "line 3: expected a JSON object, got 'oops" in err
    assert "(3 annotated frames)" in err


def test_frame_and_t_are_echoed(capfd, trained, tmp_path, clip):
    features, present, _, _ = clip
    path = tmp_path / "in.jsonl"
    path.write_text(line(features, present, 0, frame="video/00001.jpg", t=1.5) + line(features, present, 1, frame=7))
    _, answers, _ = run(capfd, "--run", trained, "--input", path)
    assert [(a["frame"], a.get("t")) for a in answers] == [("video/00001.jpg", 1.5), (7, None)]


def test_pace(capfd, trained, files, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join((files / "clip.jsonl").read_text().splitlines(keepends=True)[:21]))
    began = time.monotonic()
    code, answers, _ = run(capfd, "--run", trained, "--input", path, "--pace", 50)
    assert (code, len(answers)) == (0, 21)
    assert time.monotonic() - began > 20 / 50
    assert np.median([a["latency_us"] for a in answers]) < 1e4  # waiting is not in it


# ---------------------------------------------------------------------------------------------------- what it survives
def bad_lines():
    numbers = [0.0] * DIMS[0]
    return {
        b"{": "expected a JSON object, got '{'",
        b"[1, 2]": "expected a JSON object, got a list",
        b"17": "expected a JSON object, got a number",
        b"\xff\xfe{}": "expected text in UTF-8, got the byte 0xff at byte 1",
        b'{"smell": [1]}': "expected the modalities audio, visual, got the key 'smell'",
        b'{"audio": [1, 2]}': "audio: expected 12 numbers, got 2",
        b'{"audio": 1}': "audio: expected a list of 12 numbers, got a number",
        json.dumps({"audio": [*numbers[:-1], "0"]}).encode(): "audio: expected numbers, got a string at place 12 of 12",
        json.dumps({"audio": [True, *numbers[1:]]}).encode(): "audio: expected numbers, got true at place 1 of 12",
        json.dumps({"audio": [None, *numbers[1:]]}).encode(): "audio: expected numbers, got null at place 1 of 12",
        json.dumps({"audio": [[0.0], *numbers[1:]]}).encode(): "audio: expected numbers, got a list at place 1 of 12",
        json.dumps({"audio": [10**400, *numbers[1:]]}).encode(): "audio: a whole number is too large",
        b'{"t": NaN}': "t: expected a number or at most 200 characters",
        b'{"frame": {}}': "frame: expected a number or at most 200 characters",
        b'{"frame": 9223372036854775808}': "frame: expected a number",
        b'{"frame": "' + b"x" * 201 + b'"}': "frame: expected a number or at most 200 characters",
        b"[" * 60000: "maximum recursion depth",
        b"\x00\x1b[31m": r"got '\x00\x1b[31m'",
        b"1" * 5000: "not JSON",
        b'{"audio": "' + b"x" * (1 << 16) + b'"}': "expected at most 65,536 bytes, got more",
    }


def test_malformed_lines_are_reported_and_the_stream_goes_on(capfd, trained, clip, offline, tmp_path):
    features, present, _, _ = clip
    lines, wrong = [], {}
    for t, (bad, message) in enumerate(bad_lines().items()):
        lines += [line(features, present, t).encode(), bad + b"\n"]
        wrong[len(lines)] = message
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(lines))
    code, answers, err = run(capfd, "--run", trained, "--input", path)
    assert code == 0
    assert_equal(answers, offline(slice(0, len(wrong))))
    said = dict(re.findall(r"^sage-ext stream: line (\d+): (.*)$", err, re.MULTILINE))
    assert {int(number) for number in said} == set(wrong)
    for number, message in wrong.items():
        assert message in said[str(number)] or message == "not JSON", said[str(number)]
        assert len(said[str(number)]) < 250
    assert re.search(rf"malformed +{len(wrong)}: ", err)
    assert err.isprintable() or set(err) - {"\n"} <= set(map(chr, range(32, 127)))


def test_reports_of_one_kind_become_rare_and_the_count_stays_exact(capfd, trained, clip, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("x\n" * 2345 + line(clip[0], clip[1], 0) + '{"audio": []}\n')
    code, answers, err = run(capfd, "--run", trained, "--input", path)
    assert (code, len(answers)) == (0, 1)
    reported = [int(n) for n in re.findall(r"line (\d+): ", err)]
    assert reported == [*range(1, SHOWN + 1), 10, 100, 1000, 2347]
    assert "(1000 of this kind so far)" in err
    assert "2346: 2345 not JSON, 1 audio of wrong length" in err


def test_nothing_but_garbage_is_a_wrong_request(capfd, trained, files):
    code, answers, err = run(capfd, "--run", trained, "--input", files / "clip.f32")
    assert (code, answers) == (2, [])
    assert err.splitlines()[-1].startswith(
        "sage-ext stream: error: --input: expected frames (--format jsonl), got none in "
    )
    code, answers, err = run(capfd, "--run", trained, "--input", os.devnull)
    assert (code, answers) == (0, [])


def test_raw_frames_that_end_within_a_frame(capfd, trained, files, offline, tmp_path):
    path = tmp_path / "in.f32"
    path.write_bytes((files / "clip.f32").read_bytes()[: 4 * 28 * 3 + 5])
    code, answers, err = run(capfd, "--run", trained, "--input", path, "--format", "f32")
    assert code == 0
    assert_equal(answers, offline(slice(0, 3)))
    assert "frame 4: expected 112 bytes (28 float32), the input ends after 5" in err


def test_infinite_huge_and_nan_are_absent(capfd, trained, clip, tmp_path):
    features, present = clip[0], np.ones_like(clip[1])
    rows = [json.loads(line([np.nan_to_num(x) for x in features], present, t)) for t in range(4)]
    rows[1]["audio"][3], rows[2]["audio"][3], rows[3]["visual"][0] = float("nan"), float("-inf"), 10**300
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, answers, err = run(capfd, "--run", trained, "--input", path)
    assert code == 0
    absent = [[n for n in NAMES if not a["present"][n]] for a in answers]
    assert absent == [[], ["audio"], ["audio"], ["visual"]]
    assert all(a["weights"][n] == a["confidence"][n] == 0 for a, names in zip(answers, absent) for n in names)
    assert "audio absent           2, of these not finite 2" in err


garbage = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b" ", b"{}", b'{"audio":null}', b'{"t":1}', b"null", b'"', b"\xef\xbb\xbf{}", b"\r"]),
    st.dictionaries(
        st.sampled_from(["audio", "visual", "t", "frame", "x"]),
        st.one_of(st.none(), st.lists(st.one_of(st.floats(), st.integers(), st.booleans()), max_size=4), st.text(max_size=3)),
        max_size=3,
    ).map(lambda x: json.dumps(x).encode()),
    st.lists(st.floats(width=32), min_size=3, max_size=3).map(lambda x: json.dumps({"audio": x, "visual": [1, 2]}).encode()),
)  # fmt: skip


@settings(max_examples=60)
@given(st.lists(garbage, max_size=8), st.data())
def test_any_bytes_in_any_pieces(parts, data):
    """Cuts between blocks change nothing; every line is a frame, blank, or MalformedFrame; frames are what they must be."""
    whole = b"\n".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)])]
    form = JsonLines(NAMES, (3, 2))
    records = list(form.records(pieces))
    want = whole.split(b"\n")
    assert records == (want if want[-1] else want[:-1])
    for record in records:
        try:
            frame = form.read(record)
        except MalformedFrame as error:
            assert str(error).isascii()
            continue
        if frame is not None:
            assert [x.shape for x in frame.features] == [(1, 3), (1, 2)]
            assert all(x.dtype == np.float32 for x in frame.features)
            json.dumps(frame.echo, allow_nan=False)
    raw = RawFloats((3, 2))
    cut = [r for r in raw.records(pieces) if isinstance(r, bytes)]
    assert b"".join(cut) == whole[: len(whole) // 20 * 20]
    assert all(raw.read(r).features[1].shape == (1, 2) for r in cut)


def test_a_line_without_an_end_takes_bounded_memory():
    form = JsonLines(NAMES, DIMS)
    block = b"x" * (1 << 16)
    tracemalloc.start()
    records = list(form.records([*[block] * 2000, b"\n{}\n"]))  # 131 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(r) for r in records] == [MalformedFrame, bytes]
    assert peak < 1 << 20


# ------------------------------------------------------------------------------------------------------- bounded memory
def test_trace_keeps_the_last_frames():
    for keep, taken in ((10, 7), (10, 25), (5000, 3000), (2000, 4500)):
        trace = Trace(2, 3, keep)
        for i in range(taken):
            trace.add([i, *[i / 10] * 9, 1, 0])
        kept = trace.recording()
        assert kept.number.tolist() == list(range(taken))[-keep:]
        assert len(trace.rows) <= keep
        assert kept.prediction[-1].tolist() == [(taken - 1) / 10] * 2
        assert kept.present.tolist()[-1] == [True, False]


def test_latency_quantiles():
    rng = np.random.default_rng(0)
    us = np.exp(rng.normal(4, 1, 5000))
    latency = Latency()
    for x in us:
        latency.add(float(x))
    for q in (0.5, 0.9, 0.99):
        assert latency.quantile(q) == pytest.approx(np.quantile(us, q), rel=0.025)
    counts, edges = latency.bars()
    assert counts.sum() == len(us)
    assert edges[0] <= us.min() < edges[1]
    assert edges[-2] <= us.max() < edges[-1]
    for odd in (0.0, 1e12):
        latency.add(odd)
    assert latency.largest == 1e12
    assert Latency().text() == []


# ------------------------------------------------------------------------------------------------------- wrong requests
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--follow"], "--follow: expected --input FILE"),
        (["--pace", "0"], "--pace: expected frames a second above 0, got 0.0"),
        (["--serve", "70000"], "--serve: expected a port from 0 to 65535, got 70000"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--input", os.sep], "Is a directory"),
        (["--labels", os.devnull], "got an empty file"),
        (
            ["--serve", "0", "--host", "no.such.host.invalid"],
            "--serve, --host: expected an address to listen on, got 0, no.such.host.invalid",
        ),
    ],
)
def test_wrong_requests(capfd, trained, arguments, message):
    code, answers, err = run(capfd, "--run", trained, *arguments)
    assert (code, answers) == (2, [])
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("sage-ext stream: error: ")
    assert "Traceback" not in err


def test_a_port_that_is_taken(capfd, trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run(capfd, "--run", trained, "--input", os.devnull, "--serve", port)
    assert code == 2
    assert f"--serve, --host: expected an address to listen on, got {port}, 127.0.0.1: Address already in use" in err


# --------------------------------------------------------------------------------------------------- as a process of its own
class Process:
    """`sage-ext stream` with pipes; what is waited for must come within WAIT seconds."""

    def __init__(self, *arguments, stdin=subprocess.PIPE):
        command = [sys.executable, "-m", "sage_ext", "stream", *(str(a) for a in arguments)]
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = start_interruptible(command, bufsize=0, **pipes)
        self.out = b""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        self.process.wait()

    def feed(self, data):
        self.process.stdin.write(data.encode() if isinstance(data, str) else data)

    def answers(self, count, seconds=WAIT):
        """At least `count` answers, or those that came within `seconds`."""
        until = time.monotonic() + seconds
        while self.out.count(b"\n") < count and (left := until - time.monotonic()) > 0:
            if select.select([self.process.stdout], [], [], left)[0]:
                block = os.read(self.process.stdout.fileno(), 1 << 16)
                if not block:
                    break
                self.out += block
        return strict(self.out[: self.out.rfind(b"\n") + 1].decode())

    def end(self):
        """(exit code, all answers, stderr)."""
        out, err = self.process.communicate(timeout=WAIT)
        self.out += out
        return self.process.returncode, strict(self.out.decode()), err.decode()


def test_a_pipe_that_stalls_and_sigterm(trained, clip, offline):
    features, present, _, _ = clip
    with Process("--run", trained) as live:
        third = line(features, present, 2)
        live.feed(line(features, present, 0) + line(features, present, 1) + third[:40])
        assert len(live.answers(2)) == 2  # at once, without waiting for the third or for the end
        assert len(live.answers(3, 0.3)) == 2
        live.feed(third[40:])
        assert len(live.answers(3)) == 3
        live.feed(third[:40])  # half a line that never ends
        time.sleep(0.1)
        live.process.send_signal(signal.SIGTERM)
        code, answers, err = live.end()
    assert code == 143
    assert_equal(answers, offline(slice(0, 3)))
    assert "sage-ext stream: stopped by SIGTERM\nframes " in err
    assert re.search(r"malformed +0\n", err)  # the half line is nobody's fault
    assert "Traceback" not in err


def test_a_file_that_grows_is_cut_short_and_sigint(trained, files, offline, tmp_path):
    data, path = (files / "clip.f32").read_bytes(), tmp_path / "in.f32"
    path.write_bytes(data[:300])  # two frames of 112 bytes and a part
    with Process("--run", trained, "--input", path, "--format", "f32", "--follow") as live:
        assert len(live.answers(2)) == 2
        with path.open("ab", buffering=0) as file:
            file.write(data[300:330])
            assert len(live.answers(3, 0.3)) == 2
            file.write(data[330:1120])
        assert len(live.answers(10)) == 10
        path.write_bytes(data[1120:1232] + b"x")
        assert len(live.answers(11)) == 11
        live.process.send_signal(signal.SIGINT)
        code, answers, err = live.end()
    assert code == 130
    assert_equal(answers, offline(slice(0, 11)))
    assert "the input was cut short: reading it from its start again" in err
    assert "stopped by SIGINT" in err
    assert "Traceback" not in err


def test_an_output_that_is_not_read_and_one_that_is_closed(trained, files):
    """What nobody takes does not keep the process from stopping; nor does it wait for input that nobody wants."""
    with Process("--run", trained, stdin=subprocess.PIPE) as closed, contextlib.ExitStack() as stack:
        stuck = stack.enter_context(Process("--run", trained, "--input", files / "clip.jsonl"))
        lines = (files / "clip.jsonl").read_text().splitlines(keepends=True)
        closed.feed(lines[0])
        closed.answers(1)
        closed.process.stdout.close()
        code = closed.process.wait(WAIT)  # its input is open still
        assert code == 0
        err = closed.process.stderr.read().decode()
        assert "the output is closed" in err
        assert "Traceback" not in err
        assert stuck.process.poll() is None  # 400 answers of 300 bytes are more than a pipe holds
        began = time.monotonic()
        stuck.process.send_signal(signal.SIGTERM)
        assert stuck.process.wait(WAIT) == 143
        assert time.monotonic() - began < 10


# ------------------------------------------------------------------------------------------------------ the page, by HTTP
@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SAGE(dict(zip(NAMES, DIMS)), dim=8, stages=3, blocks=2).eval()


@pytest.fixture
def page(model):
    labels = np.zeros((100, 2), np.float32)
    estimator = Estimator(model, NAMES, quality=Quality(labels, np.arange(100) % 2 == 0))
    with Page("127.0.0.1", 0, "a <run>", estimator) as page:
        yield page


def answer(page, number=1):
    features = [np.full((1, d), 0.1 * number, np.float32) for d in DIMS]
    frame = RawFloats(DIMS).read(np.concatenate(features, 1).tobytes())
    return page.estimator.take(number, frame)


def get(page, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def event(response):
    """(name, value) of the next event that is no comment."""
    name = None
    while True:
        text = response.readline().decode()
        assert text, "the connection was closed"
        if text.startswith("event: "):
            name = text[7:].strip()
        if text.startswith("data: "):
            return name, json.loads(text[6:], parse_constant=lambda x: pytest.fail(x))


def test_page_loads_nothing_from_elsewhere(page):
    response = get(page)
    html = response.read().decode()
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    assert "Python" not in response.headers["Server"]
    links = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)|https?://[^\s"']+""", html)
    assert all(a.startswith("data:") or not (a or b) for a, b in links)
    assert re.findall(r"https?://[^\s'\"%]+", html) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\sstyle=|\son\w+=|innerHTML|eval\(", html)
    assert get(page, "/", "HEAD").read() == b""
    assert get(page, "/../pyproject.toml").status == 404
    assert get(page, "/", "POST").status == 501


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:1", True), ("[::1]:80", True), ("192.168.1.2", True),
        ("evil.example", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("", False),
        ("localhost@evil.example", False), ("[::1", False),
    ],
)  # fmt: skip
def test_host_header(page, host, allowed):
    for path in ("/", "/events"):
        response = get(page, path, Host=host)
        assert response.status == (200 if allowed else 403)
        response.close()


def test_another_sites_page_may_not_read_the_events(page):
    assert get(page, "/events", **{"Sec-Fetch-Site": "cross-site"}).status == 403
    response = get(page, "/events", **{"Sec-Fetch-Site": "same-origin"})
    assert response.status == 200
    assert "Access-Control-Allow-Origin" not in response.headers
    response.close()


def test_events(page):
    page.publish(answer(page), 0)
    response = get(page, "/events")
    assert response.headers["Content-Type"] == "text/event-stream"
    name, hello = event(response)
    assert name == "hello"
    assert (hello["run"], hello["modalities"], hello["stages"], hello["labels"]) == ("a <run>", list(NAMES), 3, True)
    assert len(hello["past"]) == 1
    for number in range(1, 4):
        name, value = event(response)
        assert name == "frame"
        assert (value["count"], value["malformed"]) == (number, 4 * (number - 1))
        assert set(value["confidence"]) == set(value["weights"]) == set(value["present"]) == set(NAMES)
        assert 0 < value["p50"] <= value["p99"]
        assert (value["truth"] is None) == (number % 2 == 0)
        if number < 3:
            page.publish(answer(page, number + 1), 4 * number)
    page.end("end of input")
    assert event(response) == ("end", {"why": "end of input"})
    assert response.read().strip() == b""
    with pytest.raises(OSError):
        get(page)


def test_a_slow_browser_slows_nothing(page):
    """It reads nothing; another one gets the newest; the stream pays microseconds; the end does not wait for it."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(("127.0.0.1", page.port))
    slow.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    quick = get(page, "/events")
    event(quick)
    record, took = answer(page), []
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        began = time.perf_counter()
        page.publish(record, 0)
        took.append(time.perf_counter() - began)
        time.sleep(1e-4)
    assert np.median(took) < 1e-3
    seen = [event(quick)[1]["count"]]
    while seen[-1] < len(took):
        seen.append(event(quick)[1]["count"])
    assert seen == sorted(set(seen))
    assert len(seen) < 100  # at most 40 a second of the thousands
    began = time.monotonic()
    page.end("end of input")
    assert time.monotonic() - began < 5
    assert event(quick)[0] == "end"
    slow.close()


def test_browsers_that_go_away_are_forgotten(page):
    for _ in range(40):  # more than may watch at once
        response = get(page, "/events")
        if response.status == 503:
            time.sleep(0.05)
        response.close()
        page.publish(answer(page), 0)
    until = time.monotonic() + 20
    while page._viewers and time.monotonic() < until:
        page.publish(answer(page), 0)
        time.sleep(0.05)
    assert page._viewers == 0
    assert get(page, "/events").status == 200


def test_other_hosts_are_allowed_to_watch_only_if_asked(model):
    with Page("0.0.0.0", 0, "run", Estimator(model, NAMES)) as page:
        assert not page.loopback
        assert page.allows(f"{socket.gethostname()}:80")
        assert not page.allows("evil.example")
        assert get(page).status == 200


# --------------------------------------------------------------------------------------------------- the page, in Chromium
class Browser:
    """Headless Chromium, driven through a pair of pipes."""

    def __init__(self, binary, folder):
        theirs_in, self.writer = os.pipe()
        self.reader, theirs_out = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            f"--disable-component-update --disable-sync --user-data-dir={folder} --window-size=1200,900 "
            "--remote-debugging-pipe about:blank"
        )
        start = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]  # clear of 3 and 4
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", start, *map(str, theirs), binary, *flags.split()],
            pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *theirs):
            os.close(end)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []

    def __enter__(self):
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exc):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.reader)
        os.close(self.writer)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + WAIT
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.reader], [], [], max(until - time.monotonic(), 0))[0], f"{method}: no answer"
                block = os.read(self.reader, 1 << 16)
                assert block, f"{method}: the browser has gone"
                self.buffer += block
            text, _, self.buffer = self.buffer.partition(b"\0")
            reply = json.loads(text)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def value(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, name):
        return self.value(f"document.getElementById({name!r}).textContent")

    def until(self, script, what):
        end = time.monotonic() + WAIT
        while not self.value(script):
            assert time.monotonic() < end, f"{what}: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def complaints(self):
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [e for e in self.events if e["method"] in kinds]

    def requests(self):
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return {url for url in sent if not url.startswith("data:")}


def signed(x):
    return ("−" if x < 0 else "+") + f"{abs(x):.2f}"


def test_in_a_browser(trained, clip, files, tmp_path):
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium")
    features, present = [np.nan_to_num(x) for x in clip[0]], np.ones_like(clip[1])
    options = ("--run", trained, "--labels", files / "labels.txt")
    with Process(*options, "--serve", 0) as live, Browser(binary, tmp_path / "profile") as browser:
        url = re.search(r"live at (http://127\.0\.0\.1:(\d+)/)\n", live.process.stderr.readline().decode())
        browser.call("Page.navigate", url=url[1])
        browser.until("document.body?.dataset.state === 'waiting'", "the page is there")
        assert browser.text("run") == trained.name
        seen = set()
        for t in range(60):
            live.feed(line(features, present, t))
            said = live.answers(t + 1)[-1]
            time.sleep(1 / 60)
            seen.add(browser.text("valence"))
        assert len(seen - {"–"}) >= 3  # it moves
        browser.until("document.getElementById('count').textContent === '60'", "all frames are shown")
        time.sleep(0.2)
        live.feed("oops\n" + line(features, present & [True, False], 60))
        said = live.answers(61)[-1]
        browser.until("document.getElementById('count').textContent === '61'", "the last frame is shown")
        assert browser.text("valence") == signed(said["valence"])
        assert browser.text("arousal") == signed(said["arousal"])
        assert browser.text("malformed") == "1"
        assert browser.text("ccc-valence").replace("−", "-") == f"{said['ccc']['valence']:.3f}"
        rows = browser.value("[...document.querySelectorAll('.modality')].map((e) => e.innerText)")
        assert "present" in rows[0]
        assert f"{said['confidence']['audio']:.2f}" in rows[0]
        assert "absent" in rows[1]
        assert browser.value("document.querySelectorAll('#stages > div').length") == 3
        drawn = "(() => { const c = document.getElementById('%s'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height)"
        drawn += ".data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })()"
        assert all(browser.value(drawn % name) > 1000 for name in ("plane", "strip"))
        picture = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
        (tmp_path / "page.png").write_bytes(picture)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out on a telephone
        browser.until("document.body?.dataset.state === 'waiting'", "no frames any more")
        assert browser.complaints() == []
        assert browser.requests() == {url[1], url[1] + "events"}
        live.process.stdin.close()
        live.process.stdin = None
        browser.until("document.body?.dataset.state === 'ended'", "the stream has ended")
        assert "stream ended" in browser.text("status")
        assert "end of input" in browser.text("notice")
        assert live.end()[0] == 0
        with Process("--run", trained, "--serve", url[2]) as again:  # without labels
            again.feed(line(features, present, 0))
            browser.until("document.body?.dataset.state === 'live'", "the page has found the new stream")
            browser.until("document.getElementById('count').textContent === '1'", "and shows it")
            assert browser.value("[...document.querySelectorAll('.truth')].every((e) => e.hidden)")


def test_page_is_packaged():
    import importlib.resources

    assert importlib.resources.files("sage_ext.live").joinpath("page.html").is_file()
    assert Path(Page.__module__.replace(".", "/")).name == "page"


def test_stream_ends_its_threads(page):
    before = threading.active_count()
    page.end("end of input")
    assert threading.active_count() < before
