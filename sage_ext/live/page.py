"""The live page as the stream sees it: a process of its own (server.py) that is told what is new.

The stream waits for nobody: it leaves its record here, and a thread sends the newest to the page, at most 40 a second, and
the newest picture, at most PICTURES a second. What the browser's camera and microphone give comes in another thread.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .estimator import Estimator
from .server import BODY, FAREWELL, GONE, INTERVAL, KINDS, PAST, RECORD, TIMEOUT

PATIENCE = 5.0  # seconds more than its own that the page's process may take to end
PICTURES = 12.5  # a second, at most


class Page:
    """Serves the page at `url` from construction until `end` or the end of the `with` block.

    host, port: where to listen; port 0: a free one. OSError where that is not possible. `loopback`: others cannot watch.
    `tell`: called, in another thread, where the page's process ends before it should.
    `browser_camera`: the page offers to send the browser's own camera and microphone; `on_media(kind, seconds, payload)`
    then takes what comes, in a thread that reads no further meanwhile. A "picture" is a JPEG of at most 1920 x 1080 pixels;
    "sound" is at most a second of float32 samples, little-endian, mono, 16,000 a second, within [-1, 1]. `seconds`: when it
    was taken, of sound its first sample, on the browser's clock, the same for both; it rises for each kind, also where
    another page goes on. That is for this machine alone: ValueError for an address that others can reach.
    """

    def __init__(
        self,
        host: str,
        port: int,
        title: str,
        estimator: Estimator,
        tell: Callable[[str], None] = lambda text: None,
        *,
        browser_camera: bool = False,
        on_media: Callable[[str, float, bytes], None] | None = None,
    ) -> None:
        if browser_camera and on_media is None:
            raise ValueError("on_media: expected a function that takes what the browser's camera gives, got None")
        self.estimator, self._tell = estimator, tell
        self._changed = threading.Condition()
        self._latest: tuple[int, dict[str, Any], int, float] = (0, {}, 0, 0.0)  # frames, record, malformed, when
        self._picture: tuple[int, dict[str, Any], bytes] = (0, {}, b"")  # pictures, what the page is told, the JPEG
        self._points: deque[tuple[Any, ...]] = deque(maxlen=PAST)  # not yet sent: when, number, values, truth
        self._why: str | None = None
        hello = {
            "id": secrets.token_hex(8), "run": title, "modalities": estimator.names, "stages": estimator.session.stages,
            "labels": estimator.quality is not None, "targets": estimator.targets, "recent": estimator.recent,
        }  # fmt: skip
        self._thread = threading.Thread(target=self._forward, daemon=True)
        program = Path(__file__).with_name("server.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._media: threading.Thread | None = None
        self._send({"host": host, "port": port, "hello": hello, "camera": browser_camera})
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process has ended"}')
        if "error" in answer:
            self._finish()
            raise OSError(f"--serve, --host: expected an address to listen on, got {port}, {host}: {answer['error']}")
        self.port: int = answer["port"]
        self.loopback: bool = answer["loopback"]
        if browser_camera and not self.loopback:
            self._send({"end": GONE})
            self._finish()
            raise ValueError(
                f"--host: expected an address of this machine alone, as 127.0.0.1, for the browser's camera, got {host}"
            )
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        self._thread.start()
        if browser_camera and on_media is not None:
            self._media = threading.Thread(target=self._receive, args=(on_media,), daemon=True)
            self._media.start()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end(GONE)

    def publish(self, record: dict[str, Any], malformed: int) -> None:
        """Show this record. Waits for nobody."""
        with self._changed:
            count, when, truth = self._latest[0] + 1, round(time.monotonic(), 4), record.get("truth")
            self._latest = (count, record, malformed, when)
            self._points.append((when, count, self.estimator.values(record), truth and list(truth.values())))
            self._changed.notify()

    def picture(self, jpeg: bytes, face: tuple[float, float, float, float] | None, size: tuple[int, int]) -> None:
        """Show this picture, and the face's box over it. Waits for nobody. Shown on this machine alone (`loopback`).

        face: left, top, width and height in pixels of a picture of this `size`, its width and height.
        """
        if not 0 < len(jpeg) <= BODY:
            raise ValueError(f"jpeg: expected 1 to {BODY:,} bytes, got {len(jpeg):,}")
        if not (len(size) == 2 and all(1 <= side < math.inf for side in size)):
            raise ValueError(f"size: expected width and height in pixels, got {size!r}")
        if face is not None and not (len(face) == 4 and all(math.isfinite(side) for side in face)):
            raise ValueError(f"face: expected left, top, width and height in pixels or None, got {face!r}")
        if not self.loopback:
            return
        box = None if face is None else [round(float(side), 1) for side in face]
        with self._changed:
            self._picture = (self._picture[0] + 1, {"face": box, "size": [int(side) for side in size]}, bytes(jpeg))
            self._changed.notify()

    def end(self, why: str) -> None:
        """Tell the browsers, and stop serving."""
        with self._changed:
            if self._why is not None:
                return
            self._why = why
            self._changed.notify()
        self._thread.join(TIMEOUT)  # it may be writing to a process that does not read
        self._finish()

    def _finish(self) -> None:
        """The process has been told to end, or is made to."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._thread.is_alive():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(FAREWELL + PATIENCE)
        self._process.kill()
        self._process.wait()
        if self._thread.is_alive():
            self._thread.join()  # its pipe is broken now
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._media is None:
            self._process.stdout.close()
        elif self._media is not threading.current_thread():
            self._media.join(PATIENCE)  # `on_media` may be at work

    def _receive(self, on_media: Callable[[str, float, bytes], None]) -> None:
        assert self._process.stdout is not None
        try:
            with self._process.stdout as records:
                while len(head := records.read(RECORD.size)) == RECORD.size:
                    kind, seconds, length = RECORD.unpack(head)
                    payload = records.read(length)
                    if len(payload) < length or self._why is not None:
                        return
                    on_media(KINDS[kind], seconds, payload)
        except Exception as error:
            self._tell(f"the browser's camera is not read any more: {error}")
            raise

    def _forward(self) -> None:
        seen, pictured, next_picture = 0, 0, 0.0
        try:
            while True:
                with self._changed:
                    while self._latest[0] == seen and self._why is None:
                        due = next_picture - time.monotonic() if self._picture[0] > pictured else None
                        if due is not None and due <= 0:
                            break
                        self._changed.wait(due)
                    (count, record, malformed, when), why = self._latest, self._why
                    pictures, picture, jpeg = self._picture
                    points = list(self._points)
                    self._points.clear()
                if count > seen:
                    seen, latency = count, self.estimator.latency
                    more = {
                        "point": self.estimator.values(record), "count": count, "malformed": malformed, "clock": when,
                        "p50": round(latency.quantile(0.5), 1), "p99": round(latency.quantile(0.99), 1),
                    }  # fmt: skip
                    self._send({"frame": {**record, **more}, "points": points})
                now = time.monotonic()
                if pictures > pictured and now >= next_picture:
                    pictured, next_picture = pictures, now + 1 / PICTURES
                    self._send({"picture": {**picture, "jpeg": base64.b64encode(jpeg).decode()}})
                if why is not None:
                    self._send({"end": why})
                    return
                time.sleep(INTERVAL)
        except OSError:  # the process is gone
            if self._why is None:
                self._tell("the live page has ended; the stream goes on")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(message, allow_nan=False, separators=(",", ":")) + "\n").encode())
        self._process.stdin.flush()
