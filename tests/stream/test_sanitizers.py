"""csrc/stream under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

import os
import platform
import shutil
import subprocess

import pytest
from simt import build

from sage_ext import _C

HERE = build.ROOT / "tests" / "stream"
VARIANTS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "threads": ["-fsanitize=thread"],
}
SUPPORTED = [name for name, _, supported in _C.isa_variants() if supported]
# The narrowest and the widest vectors; who shares what is the same in all.
CASES = [(isa, "memory") for isa in {SUPPORTED[0]: 0, SUPPORTED[-1]: 0}] + [(SUPPORTED[-1], "threads")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(build.compiler()[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize(("isa", "sanitizer"), CASES)
def test_harness_runs_clean(isa, sanitizer):
    """The one variant that a build without SAGE_X86_ISAS has, "baseline", compiled with the flags of `isa`."""
    flags = [*SANITIZERS[sanitizer], *(VARIANTS[isa] if platform.machine() in ("x86_64", "AMD64") else [])]
    sources = [build.ROOT / "csrc" / name for name in ("cpu/stream.cpp", "stream/session.cpp", "cpu/session.cpp")]
    sources.append(HERE / "harness.cpp")
    flags += ["-DSAGE_ISA=baseline", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    program = build.build_program("harness", sources, flags)
    # Without address randomisation: older ThreadSanitizers fail to map their shadow under large entropy.
    prefix = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    command = [*prefix, str(program)]
    if prefix and subprocess.run([*prefix, "true"], capture_output=True).returncode:
        command = [str(program)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
