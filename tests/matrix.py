"""The tests with other versions of Python and torch: `make matrix`, or

    python tests/matrix.py [PYTHON:TORCH ...] [-- what pytest is to run]

takes each pair for which this machine has the Python (on PATH, or pyenv's), makes an environment of it below build/matrix/
(which stays, and makes the next run quick), installs that torch from wherever pip is set to look, builds the package and runs
the tests that `make test` runs. It prints the table that README.md shows; the exit code is 1 unless each pair has passed. An
environment takes 6 to 8 GB where torch's usual wheels for Linux bring CUDA. Let pip look also where there is a CPU build
(PIP_EXTRA_INDEX_URL, or PIP_FIND_LINKS for a folder of wheels) and it takes that, since 2.6.0+cpu counts as newer than 2.6.0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / "build" / "matrix"
# The oldest Python with the oldest torch, the newest with the newest, and what is between.
PAIRS = ("3.10:2.6.0", "3.11:2.13.0", "3.12:2.9.1", "3.13:2.14.1", "3.14:2.14.1")
BUILD = ["scikit-build-core>=0.11", "pybind11>=2.13", "cmake>=3.24", "ninja>=1.11"]
HEAD = "| Python | torch | passed | failed | skipped | minutes |\n| --- | --- | --- | --- | --- | --- |"


def interpreter(python: str) -> str | None:
    """The command of a Python 3.x, or None."""
    found = shutil.which(f"python{python}")
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:  # not pyenv's stand-in
        return found
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = [path / "bin" / "python" for path in versions.glob(f"{python}.*")]
    return str(max(installed)) if installed else None


def environment(python: str, torch: str) -> Path | str:
    """The Python of an environment with this torch and the package; a sentence where there is none."""
    home = ENVIRONMENTS / f"{python}-torch{torch}"
    command = home / "bin" / "python"
    if not command.exists():
        base = interpreter(python)
        if base is None:
            return "this machine lacks that Python"
        subprocess.run([base, "-m", "venv", home], check=True)
    install = [command, "-m", "pip", "install", "-q"]
    log = home / "install.log"
    with open(log, "w") as file:
        # Without pip's own environment for the build, whose place changes: then a build is there for the next one to go on from.
        package = ["--no-build-isolation", "-e", ".[test]"]
        for what in ([f"torch=={torch}", "numpy"], BUILD, package):
            if subprocess.run([*install, *what], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
                return f"pip install {' '.join(what)} failed: see {log.relative_to(ROOT)}"
    return command


def row(python: str, torch: str, arguments: list[str]) -> tuple[str, bool]:
    """A line of the table, and whether nothing failed."""
    command = environment(python, torch)
    if isinstance(command, str):
        return f"| {python} | {torch} | {command} | | | |", command.startswith("this machine")
    report = ENVIRONMENTS / f"{python}-torch{torch}.xml"
    report.unlink(missing_ok=True)
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    subprocess.run([command, "-m", "pytest", "-q", *workers, "--junitxml", report, *arguments], cwd=ROOT)
    if not report.exists():
        return f"| {python} | {torch} | pytest ended early | | | |", False
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    minutes = float(suite.get("time", 0)) / 60
    found = f"{total - failed - skipped} | {failed} | {skipped} | {minutes:.0f}"
    return f"| {python} | {torch} | {found} |", failed == 0 and total > skipped


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    pairs, rest = arguments[:at], arguments[at + 1 :]
    found = [row(*pair.split(":"), rest or ["-m", "not slow"]) for pair in pairs or PAIRS]
    print(HEAD, *(line for line, _ in found), sep="\n")
    return 0 if all(passed for _, passed in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
