"""sage-ext stream: what it answers, how it ends, what it survives."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import torch
from streams import DIMS, FRAMES, NAMES, WAIT, Process, assert_equal, columns, line, run

from sage_ext.functional import ccc, temporal_ccc
from sage_ext.live.command import SHOWN


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
    assert not re.search("https?:", page)  # pictures are in it, as letters in which "http" may be


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


@pytest.mark.slow
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
