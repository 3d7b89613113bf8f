"""The live page as the stream sees it: a process of its own (server.py) that is told what is new.

The stream waits for nobody: it leaves its record here, and a thread sends the newest to the page, at most 40 a second.
"""

from __future__ import annotations

import contextlib
import json
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
from .server import FAREWELL, GONE, INTERVAL, PAST, TIMEOUT

PATIENCE = 5.0  # seconds more than its own that the page's process may take to end


class Page:
    """Serves the page at `url` from construction until `end` or the end of the `with` block.

    host, port: where to listen; port 0: a free one. OSError where that is not possible. `loopback`: others cannot watch.
    `tell`: called, in another thread, where the page's process ends before it should.
    """

    def __init__(
        self, host: str, port: int, title: str, estimator: Estimator, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self.estimator, self._tell = estimator, tell
        self._changed = threading.Condition()
        self._latest: tuple[int, dict[str, Any], int, float] = (0, {}, 0, 0.0)  # frames, record, malformed, when
        self._points: deque[tuple[Any, ...]] = deque(maxlen=PAST)  # not yet sent: when, number, values, truth
        self._why: str | None = None
        hello = {
            "id": secrets.token_hex(8), "run": title, "modalities": estimator.names, "stages": estimator.session.stages,
            "labels": estimator.quality is not None, "targets": estimator.targets, "recent": estimator.recent,
        }  # fmt: skip
        self._thread = threading.Thread(target=self._forward, daemon=True)
        program = Path(__file__).with_name("server.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self._send({"host": host, "port": port, "hello": hello})
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process has ended"}')
        if "error" in answer:
            self._finish()
            raise OSError(f"--serve, --host: expected an address to listen on, got {port}, {host}: {answer['error']}")
        self.port: int = answer["port"]
        self.loopback: bool = answer["loopback"]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        self._thread.start()

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
        self._process.stdout.close()

    def _forward(self) -> None:
        seen = 0
        try:
            while True:
                with self._changed:
                    while self._latest[0] == seen and self._why is None:
                        self._changed.wait()
                    (count, record, malformed, when), why = self._latest, self._why
                    points = list(self._points)
                    self._points.clear()
                if count > seen:
                    seen, latency = count, self.estimator.latency
                    more = {
                        "point": self.estimator.values(record), "count": count, "malformed": malformed, "clock": when,
                        "p50": round(latency.quantile(0.5), 1), "p99": round(latency.quantile(0.99), 1),
                    }  # fmt: skip
                    self._send({"frame": {**record, **more}, "points": points})
                if why is not None:
                    self._send({"end": why})
                    return
                time.sleep(INTERVAL)
        except OSError:  # the process is gone
            if self._why is None:
                self._tell("the live page has ended; the stream goes on")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message, allow_nan=False, separators=(",", ":")) + "\n")
        self._process.stdin.flush()
