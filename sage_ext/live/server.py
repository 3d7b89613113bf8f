"""The live page's own process: one HTML file and a stream of server-sent events, from the standard library's HTTP server.

    python -I server.py     started by page.py, which says over standard input what to serve and what is new

It imports nothing but the standard library, so it starts at once and stays small; what browsers do is this process's
business and cannot hold the stream's interpreter. Each browser's thread takes what is newest when its last message has gone
out; what came in between is not sent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import os
import re
import signal
import socket
import socketserver
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


class Board:
    """What the browsers see, and the server that shows it, from construction until `end`.

    host, port: where to listen; port 0: a free one. OSError where that is not possible. `loopback`: others cannot watch.
    `hello`: what a browser is told first.
    """

    def __init__(self, host: str, port: int, hello: dict[str, Any]) -> None:
        self.host, self.hello = host, hello
        self._changed = threading.Condition()
        self._latest: tuple[int, bytes] = (0, b"")  # number of messages, the last as an event
        self._past: deque[list[Any]] = deque(maxlen=PAST)
        self._why: str | None = None
        self.viewers = 0
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.server = _Server(family, address, self)
        bound, self.port = self.server.server_address[:2]
        self.loopback = ipaddress.ip_address(str(bound)).is_loopback
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def publish(self, frame: dict[str, Any], points: list[list[Any]]) -> None:
        """Show this frame; `points`: of the curve, since the last one."""
        with self._changed:
            self._latest = (self._latest[0] + 1, _event("frame", frame))
            self._past.extend(points)
            self._changed.notify_all()

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

    def _newer_than(self, seen: int) -> Callable[[], bool]:
        return lambda: self._latest[0] > seen or self._why is not None

    def viewer(self) -> Iterator[bytes]:
        """The events for one browser, as it takes them."""
        with self._changed:
            if self.viewers >= VIEWERS:
                return
            self.viewers += 1
        try:
            with self._changed:
                seen, past = 0, list(self._past)
            yield _event("hello", {**self.hello, "past": past})
            while True:
                with self._changed:
                    self._changed.wait_for(self._newer_than(seen), KEEP_ALIVE)
                    (count, latest), why = self._latest, self._why
                if count == seen and why is None:
                    yield b": here\n\n"
                if count > seen:
                    seen = count
                    yield latest
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


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = CONNECTIONS  # those not accepted yet; a browser beyond them would try again after a second
    block_on_close = False

    def __init__(self, family: int, address: Any, board: Board) -> None:
        self.address_family, self.board = family, board
        self.html, self.policy = _load()
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
        with self.lock:
            self.asking[request] = None
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
        self.rfile = io.BufferedReader(_Until(self.connection, time.monotonic() + TIMEOUT))

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
        self._head(status, "text/plain; charset=utf-8", len(text))
        if self.command == "GET":
            self.wfile.write(text.encode())

    def _head(self, status: HTTPStatus, kind: str, length: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in (
            ("Connection", "close"),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", self.server.policy),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()


def _load() -> tuple[bytes, str]:
    """The page, and the policy that lets it run its own script and style, and nothing else."""
    html = Path(__file__).with_name("page.html").read_text("utf-8")

    def digest(tag: str) -> str:
        inline = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in inline)

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def main() -> None:
    """The lines of standard input: {"host", "port", "hello"}; {"frame", "points"} as often as there is something new; {"end"}.
    The first is answered with {"port", "loopback"} or {"error"}."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the end of the input is what ends this process
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # the stream first, then those who watch it
    asked = json.loads(sys.stdin.readline())
    try:
        board = Board(asked["host"], asked["port"], asked["hello"])
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
        print(json.dumps({"error": getattr(error, "strerror", None) or str(error)}), flush=True)
        return
    print(json.dumps({"port": board.port, "loopback": board.loopback}), flush=True)
    why = GONE
    for line in sys.stdin:
        message = json.loads(line)
        if "end" in message:
            why = message["end"]
            break
        board.publish(message["frame"], message["points"])
    board.end(why)


if __name__ == "__main__":
    main()
