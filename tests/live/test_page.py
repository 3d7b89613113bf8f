"""The live page, over HTTP and in a real browser."""

import base64
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
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import DIMS, NAMES, WAIT, Process, line

from sage_ext.live.estimator import Estimator, Quality
from sage_ext.live.frames import RawFloats
from sage_ext.live.page import Page
from sage_ext.live.server import CONNECTIONS, VIEWERS, Board
from sage_ext.models import SAGE


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


@pytest.fixture
def board():
    """The page's server, in this process."""
    board = Board("127.0.0.1", 0, {"run": "a <run>"})
    yield board
    board.end("the test is over")


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
    hello = {"past": []}
    while not hello["past"]:  # until the page's process has heard of it
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


def test_requests_that_come_byte_by_byte(board, monkeypatch):
    """They are cut off after TIMEOUT in all, whatever the gaps; until then they make room for others."""
    monkeypatch.setattr("sage_ext.live.server.TIMEOUT", 3.0)
    began = time.monotonic()
    slow = [socket.create_connection(("127.0.0.1", board.port)) for _ in range(CONNECTIONS)]
    try:
        for connection in slow:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        time.sleep(0.2)
        for _ in range(3):  # somebody else is served at once
            assert get(board).read()
        assert time.monotonic() - began < 2.5
        ended = set()
        while len(ended) < len(slow) and time.monotonic() - began < 10:
            for connection in slow:
                try:
                    connection.sendall(b"x")
                    if select.select([connection], [], [], 0)[0] and not connection.recv(1000):
                        ended.add(connection)
                except OSError:
                    ended.add(connection)
            time.sleep(0.2)
        assert len(ended) == len(slow)
        assert 2.5 < time.monotonic() - began < 8
    finally:
        for connection in slow:
            connection.close()


def test_browsers_that_go_away_are_forgotten(board):
    for _ in range(40):  # more than may watch at once
        response = get(board, "/events")
        if response.status == 503:
            time.sleep(0.05)
        response.close()
        board.publish({}, [])
    until = time.monotonic() + 20
    while board.viewers and time.monotonic() < until:
        board.publish({}, [])
        time.sleep(0.05)
    assert board.viewers == 0
    assert get(board, "/events").status == 200


def test_other_hosts_are_allowed_to_watch_only_if_asked(model):
    board = Board("0.0.0.0", 0, {})
    assert not board.loopback
    assert board.allows(f"{socket.gethostname()}:80")
    assert not board.allows("evil.example")
    assert get(board).status == 200
    board.end("the test is over")
    with Page("0.0.0.0", 0, "run", Estimator(model, NAMES)) as page:
        assert not page.loopback
        assert get(page).status == 200


def test_a_page_that_dies_leaves_the_stream_alone(model):
    """Whether its process is killed or stands still: the stream goes on, is told, and ends."""
    told = []
    with Page("127.0.0.1", 0, "run", Estimator(model, NAMES), told.append) as page:
        page._process.kill()
        page._process.wait()
        until = time.monotonic() + 5
        while not told and time.monotonic() < until:
            page.publish(answer(page), 0)
            time.sleep(0.01)
    assert told == ["the live page has ended; the stream goes on"]


@pytest.mark.parametrize("path", [b"/", b"/events"])
def test_a_request_without_a_version_gets_nothing(board, path):
    with socket.create_connection(("127.0.0.1", board.port), timeout=5) as connection:
        connection.sendall(b"GET " + path + b"\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100) == b""


def test_a_name_that_cannot_be_one_is_refused(model):
    with pytest.raises(OSError, match=r"^--serve, --host: expected an address to listen on, got 0, a\.\.b: "):
        Page("a..b", 0, "run", Estimator(model, NAMES))


def test_threads_that_cannot_be_had_hold_no_place(board, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(CONNECTIONS + 2):
            with socket.create_connection(("127.0.0.1", board.port), timeout=5) as connection:
                assert connection.recv(1) == b""
    assert get(board).status == 200


def test_a_page_that_stands_still_holds_nobody(model, monkeypatch):
    monkeypatch.setattr("sage_ext.live.page.TIMEOUT", 0.5)
    monkeypatch.setattr("sage_ext.live.page.FAREWELL", 0.5)
    monkeypatch.setattr("sage_ext.live.page.PATIENCE", 0.0)
    page = Page("127.0.0.1", 0, "run", Estimator(model, NAMES))
    record = {**answer(page), "frame": "x" * 100_000}  # more than a pipe holds
    page._process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for _ in range(3):
        page.publish(record, 0)
        time.sleep(0.05)
    assert time.monotonic() - began < 1
    page.end("end of input")
    assert time.monotonic() - began < 4
    assert page._process.poll() is not None


def test_browsers_are_another_process_s_business(page):
    """So what they do cannot hold the interpreter that the stream needs."""
    before = threading.active_count()
    watching = [get(page, "/events") for _ in range(VIEWERS)]
    page.publish(answer(page), 0)
    assert [event(response)[0] for response in watching] == ["hello"] * VIEWERS
    assert get(page, "/events").status == 503
    assert threading.active_count() == before
    for response in watching:
        response.close()


def test_the_page_ends_with_the_process_that_began_it(trained):
    """However that ends."""
    program = f"""
import time, sys
from sage_ext.live.estimator import Estimator
from sage_ext.live.page import Page
from sage_ext.training.runs import Run
run = Run.load({str(trained)!r})
page = Page("127.0.0.1", 0, "run", Estimator(run.model, run.names))
print(page.port, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        assert get(types.SimpleNamespace(port=port)).status == 200
        process.kill()
    until, refused = time.monotonic() + 5, False
    while not refused and time.monotonic() < until:
        try:
            get(types.SimpleNamespace(port=port)).close()
        except ConnectionRefusedError:
            refused = True
        except (OSError, http.client.HTTPException):  # just ending
            time.sleep(0.05)
    assert refused


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
            seen.add(browser.value("document.querySelector('#values b').textContent"))
        assert len(seen - {"–"}) >= 3  # it moves
        browser.until("document.getElementById('count').textContent === '60'", "all frames are shown")
        time.sleep(0.2)
        live.feed("oops\n" + line(features, present & [True, False], 60))
        said = live.answers(61)[-1]
        browser.until("document.getElementById('count').textContent === '61'", "the last frame is shown")
        shown = browser.value("[...document.querySelectorAll('#values b')].map((e) => e.textContent)")
        assert shown == [signed(said["valence"]), signed(said["arousal"])]
        assert browser.text("malformed") == "1"
        first = browser.value("document.querySelector('#scores td').textContent")
        assert first.replace("−", "-") == f"{said['ccc']['valence']:.3f}"
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
