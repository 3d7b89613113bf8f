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
from sage_ext.live.server import BODY, CONNECTIONS, PIXELS, RATE, VIEWERS, Board
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
    assert "blob:" not in policy
    assert response.headers["Permissions-Policy"] == "camera=(), microphone=()"
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


# ------------------------------------------------------------------------------------------------------------- pictures
def jpeg(width=640, height=360, rest=b"\0"):
    """A header as of a JPEG of this size; nobody decodes it here."""
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return b"\xff\xd8" + b"\xff\xe0\0\x04ab" + b"\xff\xc0\0\x11\x08" + size + bytes(10) + rest


def sent(picture):
    return base64.b64decode(picture["jpeg"])


def test_pictures(page):
    page.picture(jpeg(rest=b"one"), (10, 20.04, 30.5, 40), (640, 360))
    response = get(page, "/events")
    assert "camera" not in event(response)[1]
    name, value = event(response)
    assert (name, value["face"], value["size"]) == ("picture", [10, 20, 30.5, 40], [640, 360])
    assert sent(value) == jpeg(rest=b"one")
    page.picture(jpeg(rest=b"two"), None, (640, 360))
    name, value = event(response)
    assert (name, value["face"], sent(value)) == ("picture", None, jpeg(rest=b"two"))
    page.publish(answer(page), 0)
    assert event(response)[0] == "frame"
    response.close()


def test_the_newest_picture_wins(page):
    """A browser that reads nothing holds neither the stream nor another one; those between are not sent."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(("127.0.0.1", page.port))
    slow.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    quick = get(page, "/events")
    event(quick)
    numbers, took, seen = 0, [], []

    def read():
        while not seen or seen[-1] < 10**9:
            seen.append(int.from_bytes(sent(event(quick)[1])[-4:], "big"))

    reader = threading.Thread(target=read)
    reader.start()
    began = time.monotonic()
    while time.monotonic() < began + 1.5:
        before = time.perf_counter()
        page.picture(jpeg(rest=numbers.to_bytes(4, "big") * 10_000), None, (640, 360))
        took.append(time.perf_counter() - before)
        numbers += 1
        time.sleep(0.005)
    assert np.median(took) < 1e-3
    page.picture(jpeg(rest=(10**9).to_bytes(4, "big")), None, (640, 360))
    reader.join(WAIT)
    assert seen == sorted(set(seen))
    assert 10 <= len(seen) <= 22  # 12.5 a second, however many there were
    record = answer(page)
    page.publish(record, 0)
    assert event(quick)[1]["count"] == 1
    slow.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((b"", None, (640, 360)), "jpeg: expected 1 to 1,048,576 bytes, got 0"),
        ((bytes(BODY + 1), None, (640, 360)), "jpeg: expected 1 to 1,048,576 bytes, got 1,048,577"),
        ((b"x", (1, 2, 3, float("nan")), (640, 360)), "face: expected left, top, width and height in pixels or None"),
        ((b"x", (1, 2, 3), (640, 360)), "face: expected left, top, width and height in pixels or None"),
        ((b"x", None, (0, 360)), "size: expected width and height in pixels, got"),
    ],
)
def test_pictures_that_cannot_be_shown(page, arguments, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        page.picture(*arguments)


def test_pictures_stay_on_this_machine(model):
    board = Board("0.0.0.0", 0, {})
    response = get(board, "/events")
    event(response)
    board.show({"jpeg": "AAAA"})
    for _ in range(2):
        board.publish({}, [])
        assert event(response)[0] == "frame"
    response.close()
    board.end("the test is over")
    with Page("0.0.0.0", 0, "run", Estimator(model, NAMES)) as page:
        page.picture(jpeg(), None, (640, 360))
        assert page._picture[0] == 0


# --------------------------------------------------------------------------------------------------- the browser's camera
@pytest.fixture
def taken():
    return []


@pytest.fixture
def camera(taken):
    """The server of a page with a camera, in this process; its records."""
    board = Board("127.0.0.1", 0, {"run": "a <run>"}, taken.append)
    yield board
    board.end("the test is over")


SOUND = np.zeros(512, "<f4").tobytes()


def token(page):
    response = get(page, "/events")
    name, hello = event(response)
    response.close()
    return hello["camera"]


class Sender:
    """Posts as the page does, over one connection."""

    def __init__(self, page, sender="me"):
        self.connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
        self.headers = {
            "Origin": f"http://127.0.0.1:{page.port}", "Sec-Fetch-Site": "same-origin", "Sage-Sender": sender,
            "Sage-Token": token(page),
        }  # fmt: skip

    def post(self, kind, seconds, body, path="/media", **changed):
        """(status, text)."""
        headers = {**self.headers, "Sage-Kind": kind, "Sage-Seconds": str(seconds), **changed}
        headers = {name: value for name, value in headers.items() if value is not None}
        self.connection.request("POST", path, body, headers)
        response = self.connection.getresponse()
        return response.status, response.read().decode()


def test_a_page_with_a_camera_asks_for_little_more(camera):
    response = get(camera)
    policy = response.headers["Content-Security-Policy"]
    assert re.search(r"script-src 'sha256-[^']+' blob:;", policy)
    assert "unsafe" not in policy
    assert policy.count("blob:") == 1
    assert response.headers["Permissions-Policy"] == "camera=(self), microphone=(self)"
    assert len(token(camera)) >= 24
    assert token(camera) not in response.read().decode()


def test_records_arrive_in_order_with_their_times(model):
    taken = []
    page = Page(
        "127.0.0.1",
        0,
        "run",
        Estimator(model, NAMES),
        browser_camera=True,
        on_media=lambda *record: taken.append(record),
    )
    with page:
        sender, want = Sender(page), []
        port = None
        for number in range(100):
            kind, body = ("picture", jpeg(rest=bytes([number]))) if number % 3 == 0 else ("sound", SOUND)
            want.append((kind, 1.7e9 + number / 64, body))
            assert sender.post(*want[-1]) == (204, "")
            port = port or sender.connection.sock.getsockname()
            assert sender.connection.sock.getsockname() == port  # the connection is kept
        until = time.monotonic() + 5
        while len(taken) < len(want) and time.monotonic() < until:
            time.sleep(0.01)
        assert taken == want
        before = threading.active_count()
    assert threading.active_count() == before - 2


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"Sage-Token": None}, 403), ({"Sage-Token": "x" * 32}, 403), ({"Sage-Token": "\xe9"}, 403), ({"Sage-Token": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": None}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403), ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"path": "/"}, 404), ({"path": "/events"}, 404), ({"Transfer-Encoding": "chunked"}, 411),
        ({"Content-Length": str(BODY + 1)}, 413), ({"Content-Length": "9" * 19}, 413), ({"Content-Length": "-1"}, 411),
        ({"Sage-Seconds": "nan"}, 400), ({"Sage-Seconds": "1e300"}, 400), ({"Sage-Seconds": "soon"}, 400),
        ({"Sage-Kind": "video"}, 409), ({"Sage-Kind": "sound"}, 409),
    ],
)  # fmt: skip
def test_what_may_not_be_posted(camera, taken, changed, status):
    sender = Sender(camera)
    assert sender.post("picture", 1, jpeg(), **changed)[0] == status
    assert sender.connection.sock is None  # and the connection is closed
    assert taken == []
    assert sender.post("picture", 1, jpeg()) == (204, "")
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("picture", b""), ("picture", b"GIF89a"), ("picture", b"\xff\xd8"), ("picture", jpeg(rest=b"")[:-16]),
        ("picture", jpeg(1920, 1081)), ("picture", jpeg(65535, 65535)), ("picture", jpeg(0, 100)),
        ("picture", b"\xff\xd8\xff\xda" + jpeg()), ("picture", b"\xff\xd8\xff\xe0\0\0" + jpeg()),
        ("sound", b""), ("sound", SOUND[:-1]), ("sound", bytes(4 * RATE + 4)), ("sound", np.array([np.nan], "<f4").tobytes()),
        ("sound", np.array([0.5, 1.01], "<f4").tobytes()), ("sound", np.array([-np.inf], "<f4").tobytes()),
    ],
)  # fmt: skip
def test_pictures_and_sound_that_are_none(camera, taken, kind, body):
    status, said = Sender(camera).post(kind, 1, body)
    assert (status, taken) == (409, [])
    assert said.startswith(f"{kind}: expected ")


def test_the_largest_that_may_be_posted(camera, taken):
    sender = Sender(camera)
    largest = jpeg(1920, PIXELS // 1920)
    assert sender.post("picture", 1, largest + bytes(BODY - len(largest))) == (204, "")
    assert sender.post("sound", 1, np.ones(RATE, "<f4").tobytes()) == (204, "")
    assert len(taken) == 2


def test_times_rise(camera, taken):
    """For each kind, and also from one page to the next."""
    sender = Sender(camera)
    assert sender.post("picture", 5, jpeg())[0] == 204
    assert sender.post("sound", 4, SOUND)[0] == 204
    assert sender.post("picture", 5, jpeg()) == (
        409, "seconds: expected more than the last picture's, 5.000000, got 5.000000\n"
    )  # fmt: skip
    assert sender.post("picture", 5.25, jpeg())[0] == 204
    assert len(taken) == 3


def test_one_page_sends_at_a_time(camera, taken, monkeypatch):
    monkeypatch.setattr("sage_ext.live.server.QUIET", 0.5)
    first, second = Sender(camera), Sender(camera, "another")
    assert first.post("picture", 1, jpeg())[0] == 204
    status, said = second.post("picture", 2, jpeg())
    assert (status, said) == (409, "another page's camera is in use already\n")
    time.sleep(0.6)
    assert second.post("picture", 2, jpeg())[0] == 204
    assert first.post("picture", 3, jpeg())[0] == 409
    assert len(taken) == 2


def test_a_camera_is_not_taken_unless_it_was_asked_for(page, taken):
    """Nor by a server that others can reach."""
    assert get(page, "/media", "POST").status == 501
    board = Board("0.0.0.0", 0, {}, taken.append)
    response = get(board, "/events")
    assert "camera" not in event(response)[1]
    response.close()
    assert get(board, "/media", "POST", **{"Sage-Token": ""}).status == 501
    assert "blob:" not in get(board).headers["Content-Security-Policy"]
    board.end("the test is over")
    estimator = page.estimator
    with pytest.raises(ValueError, match=r"^--host: expected an address of this machine alone, .* got 0\.0\.0\.0$"):
        Page("0.0.0.0", 0, "run", estimator, browser_camera=True, on_media=print)
    with pytest.raises(ValueError, match=r"^on_media: expected a function .* got None$"):
        Page("127.0.0.1", 0, "run", estimator, browser_camera=True)


def test_a_stream_that_does_not_take_the_camera_s_pictures_holds_nobody(model, monkeypatch):
    """The sender waits; who watches does not, and the stream can end."""
    monkeypatch.setattr("sage_ext.live.page.PATIENCE", 0.5)
    let_go = threading.Event()
    page = Page(
        "127.0.0.1", 0, "run", Estimator(model, NAMES), browser_camera=True, on_media=lambda *record: let_go.wait(WAIT)
    )
    with page:
        sender = Sender(page)
        sender.connection.timeout = 0.5
        with pytest.raises(TimeoutError):  # more than the pipe and its reader hold
            all(sender.post("picture", number + 1, jpeg(rest=bytes(100_000))) for number in range(20))
        page.publish(answer(page), 0)
        response = get(page, "/events")
        assert [event(response)[0] for _ in range(2)] == ["hello", "frame"]
        response.close()
        began = time.monotonic()
        page.end("end of input")
        assert time.monotonic() - began < 5
    let_go.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_that_fails_on_a_picture_is_told(model):
    told = []

    def fail(kind, seconds, payload):
        raise RuntimeError("no room")

    with Page("127.0.0.1", 0, "run", Estimator(model, NAMES), told.append, browser_camera=True, on_media=fail) as page:
        sender, until = Sender(page), time.monotonic() + 5
        sender.post("picture", 1, jpeg())
        while not told and time.monotonic() < until:
            time.sleep(0.01)
        assert told == ["the browser's camera is not read any more: no room"]
        page.publish(answer(page), 0)
        assert get(page).status == 200


# --------------------------------------------------------------------------------------------------- the page, in Chromium
class Browser:
    """Headless Chromium, driven through a pair of pipes."""

    def __init__(self, binary, folder, *more):
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
            [sys.executable, "-S", "-c", start, *map(str, theirs), binary, *more, *flags.split()],
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


@pytest.mark.slow
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
