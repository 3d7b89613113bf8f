"""What watchers of the live page cost the stream: its latency with nobody there, and with a crowd.

    python benchmarks/viewers.py [--watching 16] [--trying 500] [--frames 900] [--rounds 2]

A fresh SAGE (dim 32, audio 32 and visual 64 features) streams at 30 frames a second through `sage-ext stream --serve`; the
browsers are threads of one other process at the lowest priority. Those that find no place try again after 5 seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

DIMS = {"audio": 32, "visual": 64}
CROWD = """
import os, socket, sys, threading, time
port, watching, trying = map(int, sys.argv[1:])
os.nice(19)
def watch():
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"GET /events HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        while connection.recv(1 << 16):
            pass
def again():
    while True:
        try:
            watch()
        except OSError:
            pass
        time.sleep(5)
for number in range(watching + trying):
    threading.Thread(target=again, daemon=True).start()
    if number == watching:
        time.sleep(0.5)
time.sleep(10_000)
"""


def stream(run: Path, frames: int, watching: int, trying: int) -> str:
    """The session's latency, as its summary says it."""
    command = [sys.executable, "-m", "sage_ext", "stream", "--run", str(run), "--serve", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as session:
        said: list[str] = []
        ready = threading.Event()

        def listen() -> None:
            for line in session.stderr:
                said.append(line)
                if "ready" in line:
                    ready.set()
            ready.set()

        listener = threading.Thread(target=listen)
        listener.start()
        ready.wait()
        port = re.search(r":(\d+)/", "".join(said))[1]
        crowd = [sys.executable, "-c", CROWD, port, str(watching), str(trying)]
        browsers = subprocess.Popen(crowd) if watching + trying else None
        try:
            time.sleep(2)
            line = json.dumps({name: [0.1] * dim for name, dim in DIMS.items()}) + "\n"
            began = time.perf_counter()
            for number in range(1, frames + 1):
                session.stdin.write(line)
                session.stdin.flush()
                time.sleep(max(began + number / 30 - time.perf_counter(), 0))
            session.stdin.close()
            listener.join()
        finally:
            if browsers is not None:
                browsers.kill()
                browsers.wait()
    return next(line.split(None, 1)[1].strip() for line in said if line.lstrip().startswith("latency"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watching", type=int, default=16)
    parser.add_argument("--trying", type=int, default=500)
    parser.add_argument("--frames", type=int, default=900)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        sage = [sys.executable, "-m", "sage_ext"]
        small = ["--train", "4", "--validation", "4", "--test", "1", "--frames", "90,120"]
        subprocess.run([*sage, "synth", str(data), *small], check=True, stdout=subprocess.DEVNULL)
        train = ["train", "--data", str(data), "--run", str(run), "--dim", "32", "--epochs", "1", "--quiet"]
        subprocess.run([*sage, *train], check=True, stdout=subprocess.DEVNULL)
        for _ in range(args.rounds):
            for crowd in ((0, 0), (args.watching, args.trying)):
                print(f"{crowd[0]:3} watching, {crowd[1]:3} trying:  {stream(run, args.frames, *crowd)}", flush=True)


if __name__ == "__main__":
    main()
