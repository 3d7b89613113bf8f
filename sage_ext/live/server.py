"""The live page's own process: one HTML file and a stream of server-sent events, from the standard library's HTTP server.

    python -I server.py     started by page.py, which says over standard input what to serve and what is new

It imports nothing but the standard library, so it starts at once and stays small; what browsers do is this process's
business and cannot hold the stream's interpreter. Each browser's thread takes what is newest when its last message has gone
out; what came in between is not sent.

Where the page may use the browser's camera, what it posts to /media goes to standard output, a RECORD's head before each
picture or piece of sound.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import math
import os
import re
import secrets
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

INTERVAL = 1 / 40  # seconds between messages to a browser
KEEP_ALIVE = 10.0  # seconds without a frame after which a comment shows whether the browser is still there
TIMEOUT = 10.0  # seconds that a browser may take to send its whole request, or to take a message
FAREWELL = 1.0  # seconds for the end to reach the browsers
VIEWERS = 16
CONNECTIONS = 64
MAKING_ROOM = 0.5  # seconds that a new connection waits for the place of a slow one
SEND_BUFFER = 1 << 14  # bytes: how far a slow browser's picture may lie behind
PAST = 600  # frames that a browser gets when it comes
GONE = "the program has ended"
BODY = 1 << 20  # bytes that may be posted at once
PIXELS = 1920 * 1080  # of a posted picture
RATE = 16_000  # samples a second of posted sound
QUIET = 2.0  # seconds without anything from one sender after which another may send
RECORD = struct.Struct("<cdI")  # kind, seconds on the browser's clock, bytes that follow
KINDS = {b"p": "picture", b"s": "sound"}  # a JPEG; float32, little-endian, mono, its time that of its first sample


class Board:
    """What the browsers see, and the server that shows it, from construction until `end`.

    host, port: where to listen; port 0: a free one. OSError where that is not possible. `loopback`: others cannot watch,
    and only then are pictures shown or taken. `hello`: what a browser is told first. `deliver`: takes the records of the
    browser's camera, and may wait; None: the page has none.
    """

    def __init__(
        self, host: str, port: int, hello: dict[str, Any], deliver: Callable[[bytes], None] | None = None
    ) -> None:
        self.host, self.hello = host, hello
        self._changed = threading.Condition()
        self._latest: tuple[int, bytes] = (0, b"")  # number of messages, the last as an event
        self._picture: tuple[int, bytes] = (0, b"")
        self._past: deque[list[Any]] = deque(maxlen=PAST)
        self._why: str | None = None
        self.viewers = 0
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.server = _Server(family, address, self)
        bound, self.port = self.server.server_address[:2]
        self.loopback = ipaddress.ip_address(str(bound)).is_loopback
        self._deliver = deliver if self.loopback else None
        self.token = secrets.token_urlsafe(24) if self._deliver is not None else ""  # who knows it has read `hello`
        self.server.policy, self.server.permissions = _policies(self.server.html, self.camera)
        self._sending = threading.Lock()
        self._sender: tuple[str, float] = ("", 0.0)  # who sends, until when nobody else may
        self._sent: dict[str, float] = {}  # the time of the last record of each kind
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def publish(self, frame: dict[str, Any], points: list[list[Any]]) -> None:
        """Show this frame; `points`: of the curve, since the last one."""
        with self._changed:
            self._latest = (self._latest[0] + 1, _event("frame", frame))
            self._past.extend(points)
            self._changed.notify_all()

    def show(self, picture: dict[str, Any]) -> None:
        """Show this picture in place of the last one, on this machine alone."""
        if self.loopback:
            with self._changed:
                self._picture = (self._picture[0] + 1, _event("picture", picture))
                self._changed.notify_all()

    @property
    def camera(self) -> bool:
        """Whether a browser's camera is taken."""
        return self._deliver is not None

    def take(self, sender: str, kind: str, seconds: float, payload: bytes) -> str | None:
        """Hand on what a browser has sent; or why not. A kind's times rise; one browser at a time."""
        code = next((code for code, name in KINDS.items() if name == kind), None)
        if code is None or self._deliver is None:
            return f"kind: expected picture or sound, got {kind!r}"
        if kind == "picture" and not 0 < _pixels(payload) <= PIXELS:
            return f"picture: expected a JPEG of at most {PIXELS:,} pixels"
        if kind == "sound" and not _is_sound(payload):
            return f"sound: expected 1 to {RATE:,} float32 samples within [-1, 1], got {len(payload):,} bytes"
        with self._sending:
            last, until = self._sender
            if sender != last and time.monotonic() < until:
                return "another page's camera is in use already"
            if seconds <= self._sent.get(kind, -math.inf):
                return f"seconds: expected more than the last {kind}'s, {self._sent[kind]:.6f}, got {seconds:.6f}"
            self._deliver(RECORD.pack(code, seconds, len(payload)) + payload)
            self._sent[kind] = seconds
            self._sender = (sender, time.monotonic() + QUIET)
        return None

    def end(self, why: str) -> None:
        """Tell the browsers, and stop serving."""
        with self._changed:
            self._why = why
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.viewers, FAREWELL)
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def allows(self, host: str) -> bool:
        """Whether a request with this Host header may be answered: an address, this machine's name or `host`.

        Any other name may be a stranger's that was made to point here, whose page would then read this one's data.
        """
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::\d*)?", host)
        if match is None:
            return False
        name = (match[1] or match[2]).lower().rstrip(".")
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            mine = {"localhost", self.host.lower()}
            return name in (mine if self.loopback else {*mine, socket.gethostname().lower()})

    def _newer_than(self, seen: int, pictured: int) -> Callable[[], bool]:
        return lambda: self._latest[0] > seen or self._picture[0] > pictured or self._why is not None

    def viewer(self) -> Iterator[bytes]:
        """The events for one browser, as it takes them."""
        with self._changed:
            if self.viewers >= VIEWERS:
                return
            self.viewers += 1
        try:
            with self._changed:
                seen, pictured, past = 0, 0, list(self._past)
            yield _event("hello", {**self.hello, "past": past, **({"camera": self.token} if self.camera else {})})
            while True:
                with self._changed:
                    self._changed.wait_for(self._newer_than(seen, pictured), KEEP_ALIVE)
                    (count, latest), (pictures, picture), why = self._latest, self._picture, self._why
                if count == seen and pictures == pictured and why is None:
                    yield b": here\n\n"
                if count > seen:
                    seen = count
                    yield latest
                if pictures > pictured:
                    pictured = pictures
                    yield picture
                if why is not None:
                    yield _event("end", {"why": why})
                    return
                time.sleep(INTERVAL)
        finally:
            with self._changed:
                self.viewers -= 1
                self._changed.notify_all()


def _event(name: str, value: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value, allow_nan=False, separators=(',', ':'))}\n\n".encode()


def _pixels(jpeg: bytes) -> int:
    """Width times height, as the JPEG's own header says; 0 where there is none. So much its reader will allocate."""
    at = 2 if jpeg[:2] == b"\xff\xd8" else len(jpeg)
    while len(jpeg) >= at + 9 and jpeg[at] == 0xFF:
        mark, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if 0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(jpeg[at + 5 : at + 7], "big") * int.from_bytes(jpeg[at + 7 : at + 9], "big")
        if not 0xC0 <= mark <= 0xFE or 0xD0 <= mark <= 0xDA:  # no segment, or the picture's data already
            return 0
        at += 2 + length
    return 0


def _is_sound(payload: bytes) -> bool:
    count, rest = divmod(len(payload), 4)
    return 0 < count <= RATE and not rest and all(-1 <= x <= 1 for x in struct.unpack(f"<{count}f", payload))


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = CONNECTIONS  # those not accepted yet; a browser beyond them would try again after a second
    block_on_close = False

    def __init__(self, family: int, address: Any, board: Board) -> None:
        self.address_family, self.board = family, board
        self.html = Path(__file__).with_name("page.html").read_text("utf-8").encode()  # lines end as browsers hash them
        self.policy = self.permissions = ""
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        self.asking: dict[Any, None] = {}  # connections whose request is not there yet, the oldest first
        self.lock = threading.Lock()  # of `asking`
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A connection more than CONNECTIONS takes the place of the one that has kept its request back for longest."""
        if not self.free.acquire(blocking=False):
            with self.lock:
                slowest = next(iter(self.asking), None)
                if slowest is not None:
                    self.asking.pop(slowest)
                    with contextlib.suppress(OSError):
                        slowest.shutdown(socket.SHUT_RDWR)  # its thread wakes up and ends
            if slowest is None or not self.free.acquire(timeout=MAKING_ROOM):
                self.shutdown_request(request)
                return
        self.waits(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread more is to be had
            self.asked(request)
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.asked(request)
            self.free.release()

    def waits(self, request: Any) -> None:
        """This connection's request, or its next one, is not there yet."""
        with self.lock:
            self.asking[request] = None

    def asked(self, request: Any) -> None:
        """The request of this connection is there, or will not come."""
        with self.lock:
            self.asking.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error of ours."""


class _Until(io.RawIOBase):
    """What a connection sends until a moment of time.monotonic(), however it is cut; then TimeoutError."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self.connection, self.until = connection, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in time")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "sage-ext", ""
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def setup(self) -> None:
        super().setup()
        self.deadline = _Until(self.connection, time.monotonic() + TIMEOUT)
        self.rfile = io.BufferedReader(self.deadline)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked(self.connection)
        if self.request_version == "HTTP/0.9":  # knows no headers, and so not the page's policy
            return
        self.connection.settimeout(TIMEOUT)
        if not self.server.board.allows(self.headers.get("Host", "")):
            self._text(HTTPStatus.FORBIDDEN, "Host: expected localhost, an IP address or the name given by --host\n")
        elif self.path == "/events":
            self._events()
        elif self.path == "/":
            self._head(HTTPStatus.OK, "text/html; charset=utf-8", len(self.server.html))
            if self.command == "GET":
                self.wfile.write(self.server.html)
        else:
            self._text(HTTPStatus.NOT_FOUND, "expected / or /events\n")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """A picture or a piece of sound from the page itself; the connection is kept for the next one."""
        if not self.server.board.camera:
            self.send_error(HTTPStatus.NOT_IMPLEMENTED, f"Unsupported method ({self.command!r})")
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,20}", length) or "Transfer-Encoding" in self.headers:
            self._text(HTTPStatus.LENGTH_REQUIRED, "Content-Length: expected the body's bytes\n")
            return
        if int(length) > BODY:
            self._text(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {BODY} bytes\n")
            return
        refusal = self._stranger()
        body = b""
        if refusal is None:
            body = self.rfile.read(int(length))
        else:  # an answer is lost where the connection is closed with something unread
            left = int(length)
            while left and (piece := self.rfile.read(min(left, 1 << 16))):
                left -= len(piece)
        self.server.asked(self.connection)
        self.connection.settimeout(TIMEOUT)
        if refusal is not None:
            self._text(*refusal)
            return
        if len(body) < int(length):  # it has gone
            self.close_connection = True
            return
        try:
            seconds = float(self.headers.get("Sage-Seconds", ""))
        except ValueError:
            seconds = math.nan
        if not abs(seconds) < 1e11:  # NaN neither
            self._text(HTTPStatus.BAD_REQUEST, "Sage-Seconds: expected the capture's time in seconds\n")
            return
        sender, kind = self.headers.get("Sage-Sender", ""), self.headers.get("Sage-Kind", "")
        problem = self.server.board.take(sender[:64], kind[:64], seconds, body)
        if problem is not None:
            self._text(HTTPStatus.CONFLICT, problem + "\n")
            return
        self._head(HTTPStatus.NO_CONTENT, None, None, keep=True)
        self.server.waits(self.connection)
        self.deadline.until = time.monotonic() + TIMEOUT

    def _stranger(self) -> tuple[HTTPStatus, str] | None:
        """Why what is posted does not come from the page."""
        host = self.headers.get("Host", "")
        token = self.headers.get("Sage-Token", "").encode("utf-8", "surrogateescape")
        if not self.server.board.allows(host):
            return HTTPStatus.FORBIDDEN, "Host: expected localhost, an IP address or the name given by --host\n"
        if self.path != "/media":
            return HTTPStatus.NOT_FOUND, "expected /media\n"
        if (
            self.headers.get("Origin", "").lower() != f"http://{host}".lower()
            or self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin"
        ):
            return HTTPStatus.FORBIDDEN, "only the page itself may send its camera's pictures\n"
        if not secrets.compare_digest(token, self.server.board.token.encode()):
            return HTTPStatus.FORBIDDEN, "Sage-Token: expected the one that the page was given\n"
        return None

    def _events(self) -> None:
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            self._text(HTTPStatus.FORBIDDEN, "another site's page may not read this\n")
            return
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        events = self.server.board.viewer()
        try:
            first = next(events, None)
            if first is None:
                self._text(HTTPStatus.SERVICE_UNAVAILABLE, f"{VIEWERS} are watching already\n")
                return
            self._head(HTTPStatus.OK, "text/event-stream", None)
            if self.command == "GET":
                self.wfile.write(first)
                for event in events:
                    self.wfile.write(event)
        finally:
            events.close()  # type: ignore[attr-defined]

    def _text(self, status: HTTPStatus, text: str) -> None:
        body = text.encode("ascii", "backslashreplace")
        self._head(status, "text/plain; charset=utf-8", len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str | None, length: int | None, keep: bool = False) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if not keep:
            self.send_header("Connection", "close")
        for name, value in (
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", self.server.policy),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Permissions-Policy", self.server.permissions),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()


def _policies(page: bytes, camera: bool) -> tuple[str, str]:
    """The policy that lets the page run its own script and style, and nothing else, and the devices that it may ask for.

    With a camera its script may make one more, in a blob: what takes the sound runs in a thread of its own.
    """
    html = page.decode("utf-8")

    def digest(tag: str) -> str:
        inline = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in inline)

    policy = (
        f"default-src 'none'; script-src {digest('script')}{' blob:' if camera else ''}; style-src {digest('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return policy, "camera=(self), microphone=(self)" if camera else "camera=(), microphone=()"


def _write(fd: int, begun: threading.Event) -> Callable[[bytes], None]:
    """Writes everything to `fd` once that has `begun`, past Python's buffers: who waits here does not hold the end."""

    def write(record: bytes) -> None:
        begun.wait()
        left = memoryview(record)
        while left:
            left = left[os.write(fd, left) :]

    return write


def main() -> None:
    """The lines of standard input: {"host", "port", "hello", "camera"}; {"frame", "points"} or {"picture"} as often as there
    is something new; {"end"}. The first is answered with {"port", "loopback"} or {"error"}, after it come the records of
    the browser's camera where "camera" is true."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the end of the input is what ends this process
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # the stream first, then those who watch it
    asked, begun = json.loads(sys.stdin.readline()), threading.Event()
    try:
        deliver = _write(sys.stdout.fileno(), begun) if asked["camera"] else None
        board = Board(asked["host"], asked["port"], asked["hello"], deliver)
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
        print(json.dumps({"error": getattr(error, "strerror", None) or str(error)}), flush=True)
        return
    print(json.dumps({"port": board.port, "loopback": board.loopback}), flush=True)
    begun.set()
    why = GONE
    for line in sys.stdin:
        message = json.loads(line)
        if "end" in message:
            why = message["end"]
            break
        if "picture" in message:
            board.show(message["picture"])
        else:
            board.publish(message["frame"], message["points"])
    board.end(why)


if __name__ == "__main__":
    main()
