"""What is given to others: the sdist, the wheel built from it, and the wheel installed far from the sources.

SAGE_TEST_DIST=DIR takes the sdist and wheel that lie there in place of building them, which takes minutes.
"""

from __future__ import annotations

import email
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import sage_ext

ROOT = Path(__file__).parents[1]
TOOLS = ("build", "auditwheel", "patchelf")
slow = pytest.mark.slow
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about the wheel of Linux")


def run(*command: object, **options) -> str:
    out = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=1800, **options)
    assert out.returncode == 0, f"{command}\n{out.stdout[-3000:]}\n{out.stderr[-3000:]}"
    return out.stdout + out.stderr


def environment(home: Path) -> Path:
    """The Python of a new, empty environment."""
    venv.create(home, with_pip=True)
    return home / "bin" / "python"


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    python = environment(tmp_path_factory.mktemp("tools"))
    out = subprocess.run([python, "-m", "pip", "install", "-q", *TOOLS], capture_output=True, text=True)
    if out.returncode:
        pytest.skip(f"pip finds no {', '.join(TOOLS)} here")
    return python


@pytest.fixture(scope="module")
def dist(tmp_path_factory, request) -> Path:
    """A folder with the sdist, and the wheel built of what is in it."""
    if given := os.environ.get("SAGE_TEST_DIST"):
        return Path(given)
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a folder of all the processes that test: one builds
        shared = shared.parent
    folder, tools = shared / "dist", request.getfixturevalue("tools")
    with open(shared / "dist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = tmp_path_factory.mktemp("dist")
            run(tools, "-m", "build", "-q", "-o", made, "-C", "cmake.define.SAGE_EXT_CUDA=OFF", ROOT)
            made.rename(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def module(wheel, tmp_path_factory) -> Path:
    """The compiled module of the wheel."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".so"))
        return Path(file.extract(name, tmp_path_factory.mktemp("module")))


def tracked(folder: str) -> set[str]:
    return set(run("git", "ls-files", folder, cwd=ROOT).split())


# ------------------------------------------------------------------------------------------------------- the wheel
@slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    expected = tracked("sage_ext")
    assert {"sage_ext/py.typed", "sage_ext/live/page.html", "sage_ext/video/report.html"} <= expected
    inside = {n for n in names if n.startswith("sage_ext/") and not n.endswith(".so")}
    assert inside == expected
    about = f"sage_ext-{sage_ext.__version__}.dist-info/"
    assert {n.removeprefix(about) for n in names if not n.startswith("sage_ext/")} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


@slow
def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as file:
        said = email.message_from_bytes(file.read(f"sage_ext-{sage_ext.__version__}.dist-info/METADATA"))
    assert (said["Name"], said["Version"], said["Requires-Python"]) == ("sage-ext", sage_ext.__version__, ">=3.10")
    assert (said["License-Expression"], said["License-File"]) == ("Apache-2.0", "LICENSE")
    assert said["Keywords"]
    needed = [r for r in said.get_all("Requires-Dist") if "extra ==" not in r]
    assert needed == ["torch>=2.6", "numpy"]
    versions = {c.rpartition(" ")[2] for c in said.get_all("Classifier") if ":: Python :: 3." in c}
    built = re.findall(r'"cp3(\d+)-\*"', (ROOT / "pyproject.toml").read_text())
    assert versions == {f"3.{minor}" for minor in built}  # wheels are made for what is promised


@slow
@linux
def test_the_module_exports_its_entry_alone(module):
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", module).splitlines()]
    assert exported == ["PyInit__C"]


@slow
@linux
def test_the_module_asks_for_no_library_but_the_compilers_and_the_systems(module):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", module))
    assert set(needed) <= {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    undefined = run("nm", "-D", "--undefined-only", module)
    assert "GOMP_parallel" in undefined  # it has OpenMP; torch's runtime gives it


@slow
@linux
def test_auditwheel_has_nothing_to_add(wheel, tools, tmp_path):
    """It gets a manylinux tag, and no library is put into it."""
    path = {**os.environ, "PATH": f"{tools.parent}{os.pathsep}{os.environ['PATH']}"}
    said = " ".join(run(tools, "-m", "auditwheel", "show", wheel, env=path).split())
    assert re.search(r'following platform tag: "manylinux_2_\d+_x86_64"', said), said
    run(tools, "-m", "auditwheel", "repair", "-w", tmp_path, wheel, env=path)
    (repaired,) = tmp_path.glob("*.whl")
    assert "manylinux_2_" in repaired.name
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(repaired) as after:
        assert {n for n in after.namelist() if not n.endswith("/")} == set(before.namelist())


@slow
def test_sizes(dist, wheel):
    """Of both in MB; 1.5 and 1.7 when this was written. A build with debug symbols, or with results, is far beyond."""
    (sdist,) = dist.glob("*.tar.gz")
    assert wheel.stat().st_size < 2.5e6
    assert sdist.stat().st_size < 2.5e6


@slow
def test_the_installed_wheel_works_without_the_sources(wheel, tmp_path):
    python = environment(tmp_path / "fresh")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(
        str(Path(torch.__file__).parents[1])
    )  # torch as it is here, after the wheel on the path
    shutil.copy(ROOT / "tests" / "smoke.py", tmp_path)
    said = run(python, "smoke.py", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert str(site / "sage_ext") in said
    assert run(tmp_path / "fresh/bin/sage-ext", "--version", cwd=tmp_path).strip() == f"sage-ext {sage_ext.__version__}"


# -------------------------------------------------------------------------------------------------------- the sdist
@slow
def test_the_sdist_holds_sources_alone(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    assert not {n for n in names if re.match(r"(benchmarks/results|tests/fuzz/corpus|build|dist|\.)", n)}
    assert not {n for n in names if n.endswith((".so", ".pyc", ".npy", ".csv"))}
    assert names - {"PKG-INFO"} <= tracked(".")
    assert tracked("csrc") | tracked("sage_ext") | {"CMakeLists.txt", "pyproject.toml", "LICENSE"} <= names


# ------------------------------------------------------------------------------------------------------- the release
def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = (ROOT / "CITATION.cff").read_text()
    assert newest is not None
    assert newest[1] == sage_ext.__version__
    assert f"\nversion: {newest[1]}\n" in cited
    assert f"\ndate-released: {newest[2]}\n" in cited
