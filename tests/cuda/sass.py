"""What nvcc makes of the CUDA kernels for one architecture, read from the compiled code: no GPU is needed.

    python tests/cuda/sass.py [--write]        prints the table of hot kernels, and writes it into docs/kernels.md

ptxas's report gives registers, stack and spills; the disassembly gives instructions, loops and loads in flight.
Both come from one compilation, kept under build/cubin by the hash of what went into it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "cubin"
ARCHITECTURE = "sm_90"
FILES = sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

# Of one multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
REGISTERS, WARPS, BLOCKS = 65536, 64, 32


def _disassembler() -> str | None:
    """nvdisasm of PATH, of the toolkit, or of the wheel nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec and not found else []:
        found = next((str(p) for p in sorted(Path(folder).glob("*/bin/nvdisasm"))), None)
    return found


NVDISASM = _disassembler()


# --------------------------------------------------------------------------------------------------------- compilation
@dataclass(frozen=True)
class Usage:
    """ptxas's report of a kernel: registers a thread, bytes of stack frame, bytes of spill stores and loads."""

    registers: int
    stack: int
    spills: int


REPORT = re.compile(
    rf"Compiling entry function '(?P<name>\w+)' for '{ARCHITECTURE}'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compiled(source: Path) -> tuple[Path, str]:
    """The cubin of a file and what ptxas said about it."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", f"-arch={ARCHITECTURE}", "-cubin", "-Xptxas", "-v", str(source), "-o"]
    digest = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True).stdout)
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    for path in [source, *sorted(p for p in headers if "cpu" not in p.parts)]:
        digest.update(path.read_bytes())
    cubin = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = cubin.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, str(temporary)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        temporary.replace(cubin)
        temporary.write_text(done.stdout + done.stderr)
        temporary.replace(report)
    return cubin, report.read_text()


@contextmanager
def written(text: str) -> Iterator[Path]:
    """A file of its own with this text, for the block's time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / f"written-{os.getpid()}.cu"
    source.write_text(text)
    try:
        yield source
    finally:
        source.unlink()


def usage(source: Path) -> dict[str, Usage]:
    """By mangled name."""
    return {
        m["name"]: Usage(int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in REPORT.finditer(compiled(source)[1])
    }


# --------------------------------------------------------------------------------------------------------- disassembly
@dataclass(frozen=True)
class Instruction:
    """`reads` and `writes` are numbers of vector registers."""

    op: str
    operands: str
    reads: frozenset[int]
    writes: frozenset[int]

    @property
    def bytes(self) -> int:
        """Loaded from global memory by one lane."""
        if not self.op.startswith(("LDG", "LD.")):
            return 0
        for size, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if size in self.op:
                return width
        return 4


@dataclass
class Kernel:
    """A function of a cubin: its instructions in order, and where its labels stand among them."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def code_bytes(self) -> int:
        return 16 * len(self.instructions)

    @cached_property
    def loops(self) -> list[range]:
        """The stretches of code from a backward branch's target to the branch, inner ones before outer ones."""
        found = []
        for at, i in enumerate(self.instructions):
            target = re.search(r"`\((\.L_x_\d+)\)", i.operands) if i.op.startswith("BRA") else None
            if target and self.labels.get(target[1], at + 1) < at:  # an endless loop after EXIT branches to itself
                found.append(range(self.labels[target[1]], at + 1))
        return sorted(found, key=len)

    def part(self, span: range) -> list[Instruction]:
        return self.instructions[span.start : span.stop]


LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*$")
REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?\b")
NO_RESULT = ("ST", "RED", "BRA", "EXIT", "BAR", "MEMBAR", "ISETP", "FSETP", "DSETP", "NOP", "BSSY", "BSYNC", "WARPSYNC", "CALL",
             "RET", "VOTE")  # fmt: skip


def _width(op: str) -> int:
    """Registers of an instruction's result."""
    if op.startswith(("LD", "ATOM")):
        return 4 if ".128" in op else 2 if ".64" in op else 1
    wide = op.startswith(("DADD", "DMUL", "DFMA", "CS2R", "F2F.F64", "I2F.F64")) or ".WIDE" in op or op == "LDC.64"
    return 2 if wide and op != "CS2R.32" else 1


def _instruction(line: re.Match) -> Instruction:
    op, operands = line.groups()
    first, _, rest = operands.partition(",")
    writes: set[int] = set()
    store = op.startswith(NO_RESULT)
    own = re.match(r"\s*R(\d+)\b", first)
    if own and not store:
        writes = {int(own[1]) + k for k in range(_width(op))}
    reads = set()
    for number, pair in REGISTER.findall(operands if store else rest):
        reads |= {int(number), int(number) + 1} if pair or op.startswith(("D", "IMAD.WIDE")) else {int(number)}
    data = re.search(r"\],\s*R(\d+)", operands) if op.startswith("ST") else None
    if data:
        reads |= {int(data[1]) + k for k in range(4 if ".128" in op else 2 if ".64" in op else 1)}
    return Instruction(op, operands, frozenset(reads), frozenset(writes))


@cache
def disassembled(cubin: Path) -> dict[str, Kernel]:
    """The functions of a cubin by mangled name."""
    assert NVDISASM is not None
    done = subprocess.run([NVDISASM, "-c", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, Kernel] = {}
    now = Kernel()
    for line in done.stdout.splitlines():
        if line.startswith(".text."):
            now = kernels.setdefault(line[6:].rstrip(":"), Kernel())
        elif label := re.match(r"(\.L_x_\d+):", line):
            now.labels[label[1]] = len(now.instructions)
        elif found := LINE.match(line):
            now.instructions.append(_instruction(found))
    return kernels


def bytes_in_flight(instructions: list[Instruction], least: int = 8) -> int:
    """The most bytes that a lane has asked global memory for, by loads of at least `least` bytes, before it waits for one.

    Read in the order of the code: a load is under way from its instruction to the first one that reads, or writes
    again, a register of its result. Branches over a load count as not taken.
    """
    under_way: list[tuple[frozenset[int], int]] = []
    most = 0
    for i in instructions:
        touched = i.reads | i.writes
        waits = [k for k, (registers, _) in enumerate(under_way) if registers & touched]
        if waits:  # loads come back in order: those before the one that is waited for are there too
            under_way = under_way[waits[-1] + 1 :]
        if i.bytes >= least:
            under_way.append((i.writes, i.bytes))
            most = max(most, sum(size for _, size in under_way))
    return most


# ------------------------------------------------------------------------------------------------------------ hot kernels
@dataclass(frozen=True)
class Hot:
    """A kernel that users wait for: its title in the table, its file, a pattern in its mangled name, threads of a block, and
    the instruction that tells its main loop from others.

    What is asked of it: `flight`, the bytes that a lane has under way in a loop (loads narrower than `least` bytes do not
    count); `warps`, those a multiprocessor has registers for; `code`, the most kilobytes of code;
    `narrow`, the most loads of 2 bytes in the loop (a mask's two bytes are its vector).
    """

    title: str
    file: str
    pattern: str
    threads: int
    holds: str
    flight: int
    warps: int
    code: int
    least: int = 8
    narrow: int = 0


FORWARD, BACKWARD = "reliability_fusion_forward.cu", "reliability_fusion_backward.cu"
FILTER, CCC, STREAM = "stage_filter.cu", "ccc.cu", "stream.cu"
HOT = [
    Hot("fusion, float32, D 256", FORWARD, "fusion_kernelIfLi16ELi4ELb1ELb1E", 128, "SHFL", 96, 16, 56),
    Hot("fusion, float32, D 128", FORWARD, "fusion_kernelIfLi16ELi2ELb1ELb1E", 128, "SHFL", 64, 16, 56),
    Hot("fusion, float32, D 512", FORWARD, "fusion_kernelIfLi32ELi4ELb1ELb1E", 128, "SHFL", 96, 16, 56),
    Hot("fusion, bfloat16, D 256", FORWARD, "fusion_kernelI13__nv_bfloat16Li8ELi4ELb1ELb1E", 128, "SHFL", 128, 12, 56),
    Hot("fusion, bfloat16, D 128", FORWARD, "fusion_kernelI13__nv_bfloat16Li8ELi2ELb1ELb1E", 128, "SHFL", 64, 12, 56),
    Hot(
        "fusion, bfloat16, other D to 256",
        FORWARD,
        "fusion_kernelI13__nv_bfloat16Li8ELi4ELb1ELb0E",
        128,
        "SHFL",
        96,
        12,
        56,
    ),
    Hot("fusion backward, float32, D 256", BACKWARD, "gradient_kernelIfLi2ELi2ELb1ELb1E", 128, "SHFL", 96, 12, 80),
    Hot("fusion backward, float32, other D", BACKWARD, "gradient_kernelIfLi2ELi2ELb1ELb0E", 128, "SHFL", 96, 12, 80),
    Hot(
        "fusion backward, bfloat16, D 256",
        BACKWARD,
        "gradient_kernelI13__nv_bfloat16Li2ELi1ELb1ELb1E",
        128,
        "SHFL",
        96,
        12,
        90,
    ),
    Hot("stage_filter, S 4", FILTER, r"filter_kernelIfLi4ELNS1_4PassE0ELb0E", 32, "SHFL", 32, 8, 64, least=4),
    Hot(
        "stage_filter, S 4, backward follows",
        FILTER,
        r"filter_kernelIfLi4ELNS1_4PassE0ELb1E",
        32,
        "SHFL",
        32,
        8,
        64,
        least=4,
    ),
    Hot("stage_filter, S 16", FILTER, r"filter_kernelIfLi16ELNS1_4PassE0ELb0E", 32, "SHFL", 32, 8, 100, least=4),
    Hot("streaming, one stream, float32", STREAM, "stream_kernelIfLi1E", 512, "FFMA", 128, 16, 80),
    Hot("streaming, one stream, bfloat16", STREAM, "stream_kernelI13__nv_bfloat16Li1E", 512, "FFMA", 64, 16, 80),
    Hot("streaming, four streams, float32", STREAM, "stream_kernelIfLi4E", 512, "FFMA", 64, 16, 80),
    Hot("ccc, float32, 2 channels", CCC, r"ccc_flat_kernelIfLi2ELNS_4MaskE0E", 256, "DFMA", 128, 24, 32),
    Hot("ccc, a mask a frame", CCC, r"ccc_flat_kernelIfLi2ELNS_4MaskE1E", 256, "DFMA", 128, 16, 32, narrow=4),
    Hot("ccc, merging chunks", CCC, r"ccc_merge_kernelIfE", 256, "nothing", 128, 24, 16),
    Hot("ccc backward", CCC, r"flat_gradient_kernelIfLi2ELNS_4MaskE0E", 256, "nothing", 128, 24, 24),
    Hot("stage_filter backward, S 4", FILTER, r"gradient_kernelIfLi4ELNS1_4PassE0E", 32, "SHFL", 64, 8, 80, least=4),
]


@dataclass(frozen=True)
class Compiled:
    hot: Hot
    kernel: Kernel
    usage: Usage

    @property
    def warps(self) -> int:
        """Of a multiprocessor, as registers allow; they are given to a warp 256 at a time."""
        per_warp = -(-self.usage.registers * 32 // 256) * 256
        per_block = self.hot.threads // 32
        return min(REGISTERS // per_warp // per_block, WARPS // per_block, BLOCKS) * per_block

    @cached_property
    def hot_loop(self) -> range:
        """The shortest of the main loops with the most bytes in flight, or the whole code if nothing is repeated."""
        main = [l for l in self.kernel.loops if any(i.op.startswith(self.hot.holds) for i in self.kernel.part(l))]
        flight = lambda loop: bytes_in_flight(self.kernel.part(loop), self.hot.least)  # noqa: E731
        return max(main, key=lambda loop: (flight(loop), -len(loop)), default=range(len(self.kernel.instructions)))

    @cached_property
    def flight(self) -> int:
        return bytes_in_flight(self.kernel.part(self.hot_loop), self.hot.least)

    @property
    def narrow_loads(self) -> int:
        """Loads of 2 bytes in the hot loop."""
        return sum(i.bytes == 2 for i in self.kernel.part(self.hot_loop))

    @property
    def kilobytes(self) -> float:
        return self.kernel.code_bytes / 1024


@cache
def look(hot: Hot) -> Compiled:
    source = ROOT / "csrc" / "cuda" / hot.file
    matching = {name: u for name, u in usage(source).items() if re.search(hot.pattern, name)}
    assert len(matching) == 1, f"{hot.pattern} is found in {len(matching)} kernels of {hot.file}"
    [(name, used)] = matching.items()
    return Compiled(hot, disassembled(compiled(source)[0])[name], used)


# -------------------------------------------------------------------------------------------------------------- the table
BEGIN, END = "<!-- made by tests/cuda/sass.py -->", "<!-- end -->"


def table() -> Iterator[str]:
    flight = "in flight: a lane / a multiprocessor"
    yield f"| kernel | registers | warps | {flight} | instructions of the loop | code |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for found in map(look, HOT):
        whole = found.flight * 32 * found.warps / 1024
        cells = [found.hot.title, found.usage.registers, found.warps, f"{found.flight} B / {whole:.0f} KB"]
        yield "| " + " | ".join(map(str, [*cells, len(found.hot_loop), f"{found.kilobytes:.0f} KB"])) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table in its place in docs/kernels.md")
    made = "\n".join(table()) + "\n"
    if parser.parse_args().write:
        page = ROOT / "docs" / "kernels.md"
        before, rest = page.read_text().split(BEGIN + "\n")
        page.write_text(before + BEGIN + "\n" + made + END + rest.split(END, 1)[1])
    print(made, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
