"""The CPU kernels' op tests under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import pytest
from simt import build

from sage_ext import _C

FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
SUPPORTED = [name for name, _, supported in _C.isa_variants() if supported and name in FLAGS][-1:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(build.compiler()[0]) is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64")
@pytest.mark.parametrize("isa", SUPPORTED)
def test_op_tests_under_the_sanitizers(isa):
    """In a build of the kernels with the flags of `isa`; every op, dtype and layout once."""
    module = build.build_native(FLAGS[isa])
    env = {
        **build.sanitizer_environment(),
        "SAGE_TEST_NATIVE": str(module),
        "SAGE_TEST_SIMT": "0",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "tests/ops/test_values.py", "-k", "cpu"], env=env, cwd=build.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
