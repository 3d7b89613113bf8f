"""What the tests of sage-ext stream share: lines of input, strict reading of answers, the command here or in a process."""

import json
import os
import select
import subprocess
import sys
import time

import numpy as np
from processes import start_interruptible

from sage_ext import cli

NAMES, DIMS = ("audio", "visual"), (12, 16)
FRAMES = 400
WAIT = 60  # seconds for what takes three


def line(features, present, t, /, **more):
    parts = {name: x[t].tolist() if present[t, m] else None for m, (name, x) in enumerate(zip(NAMES, features))}
    return json.dumps({**parts, **more}) + "\n"


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
