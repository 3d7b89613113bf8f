"""The live page: one HTML file and a stream of server-sent events, from the standard library's HTTP server.

The stream never waits for a browser: it leaves its latest record here, and each browser's thread takes what is newest
when the last message has gone out. What came in between is not sent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.resources
import io
import ipaddress
import json
import re
import secrets
import socket
import socketserver
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from .estimator import Estimator

INTERVAL = 1 / 40  # seconds between messages to a browser
KEEP_ALIVE = 10.0  # seconds without a frame after which a comment shows whether the browser is still there
TIMEOUT = 10.0  # seconds that a browser may take to send its whole request, or to take a message
FAREWELL = 1.0  # seconds for the end to reach the browsers
VIEWERS = 16
CONNECTIONS = 64
MAKING_ROOM = 0.5  # seconds that a new connection waits for the place of a slow one
SEND_BUFFER = 1 << 14  # bytes: how far a slow browser's picture may lie behind
PAST = 600  # frames that a browser gets when it comes


class Page:
    """Serves the page at `url` from construction until `end` or the end of the `with` block.

    host, port: where to listen; port 0: a free one. OSError where that is not possible. `loopback`: others cannot watch.
    """

    def __init__(self, host: str, port: int, title: str, estimator: Estimator) -> None:
        self.estimator, self.host = estimator, host
        self.hello = {
            "id": secrets.token_hex(8), "run": title, "modalities": estimator.names, "stages": estimator.session.stages,
            "labels": estimator.quality is not None,
        }  # fmt: skip
        self._changed = threading.Condition()
        self._latest: tuple[int, dict[str, Any], int, float] = (0, {}, 0, 0.0)  # frames, record, malformed, when
        self._past: deque[tuple[Any, ...]] = deque(maxlen=PAST)  # when, number, valence, arousal, the true two or None
        self._why: str | None = None
        self._viewers = 0
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
            self._server = _Server(family, address, self)
        except OSError as error:
            raise OSError(
                f"--serve, --host: expected an address to listen on, got {port}, {host}: {error.strerror or error}"
            ) from None
        bound, self.port = self._server.server_address[:2]
        self.loopback = ipaddress.ip_address(str(bound)).is_loopback
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end("the program has ended")

    def publish(self, record: dict[str, Any], malformed: int) -> None:
        """Show this record. Waits for nobody."""
        with self._changed:
            count, when, truth = self._latest[0] + 1, round(time.monotonic(), 4), record.get("truth")
            self._latest = (count, record, malformed, when)
            self._past.append((when, count, record["valence"], record["arousal"], truth and list(truth.values())))
            self._changed.notify_all()

    def end(self, why: str) -> None:
        """Tell the browsers, and stop serving."""
        with self._changed:
            if self._why is not None:
                return
            self._why = why
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._viewers, FAREWELL)
        self._server.shutdown()
        self._server.server_close()
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
            if self._viewers >= VIEWERS:
                return
            self._viewers += 1
        try:
            with self._changed:
                seen, past = 0, list(self._past)
            yield _event("hello", {**self.hello, "past": past})
            while True:
                with self._changed:
                    self._changed.wait_for(self._newer_than(seen), KEEP_ALIVE)
                    (count, record, malformed, when), why = self._latest, self._why
                if count == seen and why is None:
                    yield b": here\n\n"
                if count > seen:
                    seen = count
                    latency = self.estimator.latency
                    more = {
                        "count": count, "malformed": malformed, "clock": when,
                        "p50": round(latency.quantile(0.5), 1), "p99": round(latency.quantile(0.99), 1),
                    }  # fmt: skip
                    yield _event("frame", {**record, **more})
                if why is not None:
                    yield _event("end", {"why": why})
                    return
                time.sleep(INTERVAL)
        finally:
            with self._changed:
                self._viewers -= 1
                self._changed.notify_all()


def _event(name: str, value: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value, allow_nan=False, separators=(',', ':'))}\n\n".encode()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = CONNECTIONS  # those not accepted yet; a browser beyond them would try again after a second
    block_on_close = False

    def __init__(self, family: int, address: Any, page: Page) -> None:
        self.address_family, self.page = family, page
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
        super().process_request(request, client_address)

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
        self.connection.settimeout(TIMEOUT)
        if not self.server.page.allows(self.headers.get("Host", "")):
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
        events = self.server.page.viewer()
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
    html = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")

    def digest(tag: str) -> str:
        inline = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in inline)

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy
