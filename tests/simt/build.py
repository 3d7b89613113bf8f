"""Builds the CUDA kernels for CPU emulation: the unchanged csrc/cuda/*.cu, through g++ and the shim headers.

    python tests/simt/build.py [--sanitize | --races]        prints the module's path

Objects are kept under build/simt by the hash of everything that goes into them, so only what changed is compiled, and by
one process: another that wants to build meanwhile waits, and finds it done.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "simt"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
# In the plain build: simt.cpp answers the call for a misaligned access, and the sanitizer's library is not linked.
ALIGNED = ["-fsanitize=alignment"]
# For the calls before every access: races.cpp answers them, and the sanitizer's library is not linked. Guards of static
# variables in the host's part would be atomic calls besides.
WATCH = ["-fsanitize=thread", "-fno-threadsafe-statics"]
DEFINES = ["-DSAGE_SIMT", "-DSAGE_WITH_CUDA", "-DSAGE_CUDA_ONLY"]
BUILD_INFO = '#define SAGE_BUILD_INFO "{\\"simt\\": true}"\n'


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def _includes(csrc: Path) -> list[str]:
    import pybind11

    return [
        f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{csrc}", f"-I{CACHE}", f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]  # fmt: skip


def _headers(csrc: Path, cpu: bool = False) -> list[Path]:
    found = [*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *HERE.rglob("*.h")]
    return sorted(p for p in found if cpu or "cpu" not in p.parts)


@contextmanager
def alone(folder: Path = CACHE) -> Iterator[None]:
    """One process at a time, of all that build in `folder` (made if it is not there)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, write) -> Path:
    """`write(temporary)`, then the rename: another process never sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)
    return path


def _run(command: Sequence[str]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(c) for c in command)}\n{done.stdout}{done.stderr}")


def compile_object(source: Path, csrc: Path, flags: Sequence[str], headers: Sequence[Path] | None = None) -> Path:
    command = [*compiler(), *FLAGS, *flags, *_includes(csrc)]
    digest = hashlib.sha256(repr([c for c in command if not c.startswith(f"-I{csrc}")]).encode())
    for path in [source, *(_headers(csrc) if headers is None else headers)]:
        digest.update(path.name.encode() + path.read_bytes())
    out = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    if not out.exists():
        _write(out, lambda to: _run([*command, "-x", "c++", "-c", source, "-o", to]))
    return out


def build(sanitize: bool = False, csrc: Path = ROOT / "csrc", bindings: Path | None = None, name: str = "_C_simt",
          kernels: Sequence[Path] | None = None, races: bool = False) -> Path:  # fmt: skip
    """The module's path. `csrc`: another copy of the sources; `bindings`, `kernels`: other sources than the project's;
    `races`: every access of the kernels goes by races.cpp."""
    sanitizers = SANITIZE if sanitize else []
    watched = WATCH if races else [] if sanitize else ALIGNED
    named = csrc / "bindings.cpp" if bindings is None else bindings  # the one source that holds the module's name
    kernels = sorted((csrc / "cuda").glob("*.cu")) if kernels is None else kernels
    others = [csrc / "stream" / "session.cpp"] if bindings is None else []
    # The kernels come first: the linker keeps the first copy of an inline function, which should be a watched one.
    others += [HERE / "simt.cpp", HERE / "control.cpp", *([HERE / "races.cpp"] if races else [])]
    sources = [*kernels, named, *others]

    def compiled(source: Path) -> Path:
        if source == named:  # addresses and sizes alone pass through it
            return compile_object(source, csrc, [*DEFINES, f"-DSAGE_MODULE_NAME={name}"])
        if source == HERE / "control.cpp" and races:
            return compile_object(source, csrc, [*sanitizers, *DEFINES, "-DSAGE_SIMT_RACES"])
        return compile_object(source, csrc, [*sanitizers, *DEFINES, *(watched if source in kernels else [])])

    with alone(), ThreadPoolExecutor(os.cpu_count()) as pool:
        _write_build_info()
        return _link(name, list(pool.map(compiled, sources)), sanitizers)


def _write_build_info() -> None:
    if not (CACHE / "build_info.h").exists():
        _write(CACHE / "build_info.h", lambda to: to.write_text(BUILD_INFO))


def _link(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    digest = hashlib.sha256(repr([o.name for o in objects]).encode()).hexdigest()[:20]
    module = CACHE / f"{name}-{digest}" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        _write(module, lambda to: _run([*compiler(), "-shared", *flags, *objects, "-o", to]))
    return module


def build_native(flags: Sequence[str]) -> Path:
    """The package's `_C` with the CPU kernels alone, as their baseline but with `flags`, under the sanitizers; its path."""
    csrc = ROOT / "csrc"
    sources = [csrc / "bindings.cpp", *sorted(csrc.glob("cpu/*.cpp")), csrc / "stream" / "session.cpp"]
    flags = [*flags, "-O0", "-fopenmp", "-DSAGE_ISA=baseline", "-Wno-maybe-uninitialized", "-Wno-psabi"]

    def compiled(source: Path) -> Path:
        named = source.name == "bindings.cpp"
        more = ["-DSAGE_MODULE_NAME=_C"] if named else SANITIZE
        return compile_object(source, csrc, [*flags, *more], _headers(csrc, cpu=True))

    with alone(), ThreadPoolExecutor(os.cpu_count()) as pool:
        _write_build_info()
        return _link("_C", list(pool.map(compiled, sources)), [*SANITIZE, "-fopenmp"])


def build_program(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """A program of csrc/ and other sources, kept in the same way. The compiler gets FLAGS, then `flags`."""
    command = [*compiler(), *FLAGS, *flags, f"-I{ROOT / 'csrc'}"]
    digest = hashlib.sha256(repr(command).encode())
    for path in [*sources, *sorted((ROOT / "csrc").rglob("*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    program = CACHE / f"{name}-{digest.hexdigest()[:20]}"
    with alone():
        if not program.exists():
            _write(program, lambda to: _run([*command, *sources, "-o", to, "-pthread"]))
    return program


def sanitizer_environment() -> dict[str, str]:
    """For a Python process that loads a sanitized module: the sanitizer's library first, and libstdc++ before it looks for
    the function that throws exceptions; leaks (Python's own) aside."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*compiler(), f"-print-file-name={name}"]
        libraries.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    options = {"ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options, "LD_PRELOAD": " ".join(libraries)}


def load(path: Path, name: str = "_C_simt"):
    """Imports a built module by its path."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="under AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--races", action="store_true", help="under the race detector")
    options = parser.parse_args()
    name = "_C_simt_races" if options.races else "_C_simt"  # one process may load both: submodules go by name
    print(build(options.sanitize, name=name, races=options.races))
