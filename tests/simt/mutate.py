"""Takes each __syncthreads() and __syncwarp() out of the kernels in turn: the tests must notice every time.

    python tests/simt/mutate.py [FILE...]       exit status 1 if a mutant survives

Each mutant is a copy of csrc/ with one statement blanked, built for emulation and put under TESTS. A barrier that stands
beside a shuffle for the sake of memory alone, and says so (`// orders memory`), changes no bit here, where shuffles order
memory too: it is put under the race detector (tests/simt/test_races.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import build

# What notices a mistake in a file; in the others: tests/simt/test_kernels.py.
TESTS = dict.fromkeys(("stream.cu", "product.cuh", "session.cu"), "tests/stream/test_cuda_session.py")
BARRIER = re.compile(r"__sync(?:threads|warp)\(\);(?! *// orders memory)")
MEMORY = re.compile(r"__syncwarp\(\);(?= *// orders memory)")
DETECTOR = "tests/simt/test_races.py"


def mutants(csrc: Path, files: list[str], barrier: re.Pattern[str]) -> list[tuple[Path, int, int]]:
    """(file, line, offset) of every such barrier."""
    found = []
    for path in sorted((csrc / "cuda").glob("*.cu*")):
        if files and path.name not in files:
            continue
        text = path.read_text()
        found += [(path, text.count("\n", 0, m.start()) + 1, m.start()) for m in barrier.finditer(text)]
    return found


def survives(csrc: Path, path: Path, offset: int, barrier: re.Pattern[str]) -> tuple[bool, str]:
    """Whether the tests pass with the barrier at `offset` blanked, and the test that caught it."""
    text = path.read_text()
    path.write_text(text[:offset] + ";" + text[barrier.match(text, offset).end() :])
    where = DETECTOR if barrier is MEMORY else TESTS.get(path.name, "tests/simt/test_kernels.py")
    tests = [where, "-q", "-x", "-p", "no:cacheprovider"]
    env = {**os.environ, "SAGE_TEST_SIMT_CSRC": str(csrc), "OMP_NUM_THREADS": "1"}
    if barrier is MEMORY:
        env["SAGE_TEST_SIMT"] = "0"  # the detector's build is another
    command = [sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(command, env=env, cwd=build.ROOT, capture_output=True, text=True)
    path.write_text(text)
    failed = re.search(r"^FAILED \S+::(.*?)( - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode > 0 and not failed:
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 0, failed.group(1) if failed else "a crash"


def main() -> int:
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(build.ROOT / "csrc", csrc)
        all_mutants = [(*m, barrier) for barrier in (MEMORY, BARRIER) for m in mutants(csrc, sys.argv[1:], barrier)]
        for path, line, offset, barrier in all_mutants:
            started = time.time()
            survived, caught_by = survives(csrc, path, offset, barrier)
            alive += survived
            verdict = "SURVIVED" if survived else f"caught by {caught_by}"
            print(f"{path.name}:{line}: {verdict} ({time.time() - started:.0f} s)", flush=True)
    print(f"{len(all_mutants)} barriers, {alive} survived")
    return 1 if alive or not all_mutants else 0


if __name__ == "__main__":
    sys.exit(main())
