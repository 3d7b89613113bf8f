"""Freed memory is kept by the commands that train, in their own processes; importing the library changes nothing."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from sage_ext import allocator, cli
from sage_ext.jobs import Job, Workers

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another's")

# Counts the pages that the system hands out anew for a block that is allocated and freed again and again; above the
# largest threshold that glibc's own adaptation reaches (32 MiB), so that without being told it never keeps the block.
FAULTS = """
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(48 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
"""
# Names every module of sage_ext, and then says which C functions of the allocator were looked up meanwhile.
IMPORTS = """
import importlib, pkgutil, sys
found = []
sys.addaudithook(lambda event, args: found.append(args[1]) if event == "ctypes.dlsym" else None)
import sage_ext
for module in pkgutil.walk_packages(sage_ext.__path__, "sage_ext."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "mallopt" not in found, found
from sage_ext.allocator import keep_freed_memory
keep_freed_memory()
print("mallopt" in found)
"""


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@GLIBC
def test_no_import_touches_the_allocator():
    assert python(IMPORTS) == "True\n"


@GLIBC
def test_freed_blocks_are_kept():
    default = int(python(FAULTS + "print(faults())"))
    told = "from sage_ext.allocator import keep_freed_memory\nassert keep_freed_memory()\nfaults()\n"
    kept = int(python(FAULTS + told + "print(faults())"))
    assert kept < 1000 < default  # 8 times 48 MiB are 98,304 pages of 4 KiB, 192 of 2 MiB


def test_another_c_library_is_left_alone(monkeypatch):
    class Musl:
        def mallopt(self, *_):
            raise AssertionError("not glibc's")

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Musl())
    assert allocator.keep_freed_memory() is False

    def windows(_):
        raise TypeError("bad argument type")

    monkeypatch.setattr(allocator.ctypes, "CDLL", windows)
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_commands_that_train_keep_freed_memory(monkeypatch, tmp_path, command):
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(command) or True)
    where = ["--run", str(tmp_path / "run")] if command == "train" else ["--out", str(tmp_path / "out")]
    assert (
        cli.main([command, "--data", str(tmp_path / "none"), *where]) == 2
    )  # no data there; the allocator was told first
    assert calls == [command]
    assert cli.main(["info"]) == 0
    assert calls == [command]


def _kept() -> int:
    """Pages handed out anew, as FAULTS counts them."""
    names: dict = {}
    exec(FAULTS, names)
    return names["faults"]()


@GLIBC
def test_so_do_the_processes_of_a_study():
    with Workers(1) as workers:
        (outcome,) = workers.run([Job("faults", _kept)])
    assert outcome.error is None
    assert outcome.value < 1000
