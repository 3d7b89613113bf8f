"""Fuzzing of everything that reads bytes from outside: files of a data set, checkpoints, frames, requests.

    python tests/fuzz/fuzz.py [--cases 1000000] [--seed 1] [--keep] [TARGET...]

A target gets bytes and either takes them or refuses them as documented; whatever else comes of it is a finding. Bytes are
made from the corpus by a few cuts, flips, insertions and splices. `--keep` adds to corpus/TARGET.json one input for every
way of refusing, or of taking, that the corpus did not have: the next run begins there, and the tests replay it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch

from sage_ext.data import table
from sage_ext.data.affwild2 import AffWild2, read_annotation, read_index, read_sample
from sage_ext.data.windows import clip_tensors
from sage_ext.live.frames import JsonLines, MalformedFrame
from sage_ext.live.server import Board
from sage_ext.training import checkpoint

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 2.0  # that one case may take
MEGABYTES = 300  # that all cases together may add to the process
LONGEST = 1500  # characters of a message
KEPT, MOST_KEPT = 1000, 100  # bytes of an input, inputs of a target, in the corpus
WAYS = 500  # that a run tells apart; more say little, and their inputs would be most of the memory it measures
PIECES = (
    b"", b"-", b"9" * 20, b"9" * 5000, b"1e400", b"1e-320", b"1e308", b"NaN", b"Infinity", b"\xff", b"\0", b"\n", b"\r",
    b",", b":", b"/", b"..", b"../", b"[" * 5000, b'{"a":' * 3000, b"true", b"null", b"{}", b"[]", b"(", b"'", b'"', b"\\",
    b"(True, 4)", b"PK\x03\x04", b"|O", b"\x1b[2J", b"\\ud800", b"%00", b"\r\n", b"\r\n\r\n", b"A" * 70_000,
)  # fmt: skip


def changed(rng: np.random.Generator, corpus: list[bytes]) -> bytes:
    """One of the corpus after one to four changes."""
    data = bytearray(corpus[rng.integers(len(corpus))])
    for _ in range(rng.integers(1, 5)):
        at, piece = int(rng.integers(0, len(data) + 1)), PIECES[rng.integers(len(PIECES))]
        kind = rng.integers(7)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 20))]
        elif kind == 2:
            data[at:at] = piece
        elif kind == 3:
            data[at : at + int(rng.integers(1, 12))] = piece
        elif kind == 4:
            other = corpus[rng.integers(len(corpus))]
            data[at:] = other[int(rng.integers(0, len(other) + 1)) :]
        elif kind == 5:  # one number for another
            numbers = list(re.finditer(rb"\d+", data))
            if numbers:
                found = numbers[rng.integers(len(numbers))]
                data[found.start() : found.end()] = str(int(10.0 ** rng.uniform(-1, 20))).encode()
        else:
            del data[at:]
    return bytes(data[:200_000])


# -------------------------------------------------------------------------------------------------------------- targets
@dataclass
class Target:
    """`take(data)` returns what came of it, or raises one of `refusals`; `seeds` are the corpus's first inputs."""

    take: Callable[[bytes], object]
    seeds: list[bytes]
    refusals: tuple[type[Exception], ...] = (ValueError,)
    named: str = ""  # a pattern that every refusal must hold


def npy(shape: str, dtype: str = "'<f4'", size: int = 120) -> bytes:
    """A .npy file with this in its header, and `size` bytes of data."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size)


class DataSet:
    """A small data set of which one file is replaced before it is read."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "data"
        task = self.root / "Annotations" / "VA_Estimation_Challenge" / "Train_Set"
        task.mkdir(parents=True)
        (task / "clip.txt").write_text("valence,arousal\n" + "0,0\n" * 10)
        features = self.root / "features" / "visual"
        features.mkdir(parents=True)
        (features / "clip.npy").write_bytes(npy("(10, 3)"))
        (self.root / "faces" / "clip").mkdir(parents=True)
        (self.root / "features" / "audio").mkdir()
        (self.root / "features" / "audio" / "clip.npy").write_bytes(npy("(10, 3)"))
        (self.root / "features" / "audio" / "meta.json").write_text('{"rate": 31}')

    def reading(self, name: str) -> Callable[[bytes], object]:
        """Writes the bytes to the file `name`, and reads the whole clip."""

        def read(path: Path) -> None:
            clip = AffWild2(self.root, "train", annotations=self.root / "Annotations" / "VA_Estimation_Challenge")[0]
            clip_tensors(clip, ["audio", "visual"], 0, min(clip.num_frames, 300))

        return reading_file(self.root / name, read)


def reading_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def take(data: bytes) -> str:
        path.write_bytes(data)
        read(path)
        return "read"

    return take


def signed(tree: bytes) -> bytes:
    """A checkpoint with this tree, as its writer would have signed it."""
    tensors = {"/model/weight": torch.ones(2, 3), "/model/bias": torch.zeros(2)}
    text = tree.decode(errors="replace")
    header = {"format": checkpoint.FORMAT, "digest": checkpoint._digest(text, tensors), "tree": text}
    return safetensors.torch.save(tensors, {"sage_ext": json.dumps(header)})


def reading_frames() -> Callable[[bytes], object]:
    frames = JsonLines(["audio", "visual"], [2, 3])

    def take(data: bytes) -> str:
        read, refused = 0, set()
        half = len(data) // 2
        for record in frames.records([data[:half], data[half:]]):  # a line may come in pieces
            try:
                if isinstance(record, MalformedFrame):
                    raise record
                frame = frames.read(record)
                if frame is not None:
                    read += 1
                    assert [f.shape for f in frame.features] == [(1, 2), (1, 3)]
                    assert len(json.dumps(frame.echo, allow_nan=False)) < 10_000
            except MalformedFrame as error:
                refused.add(error.kind)
                assert len(str(error)) < LONGEST
                assert "\n" not in str(error)
        return f"{min(read, 2)} read; {', '.join(sorted(refused))}"

    return take


class Browser:
    """A page and the bytes of a request to it."""

    def __init__(self, camera: bool = False) -> None:
        self.taken = 0
        self.board = Board("127.0.0.1", 0, {"run": "run"}, self._deliver if camera else None)
        self.board.token = "token"  # else drawn
        self.failed: list[BaseException] = []
        self.board.server.handle_error = self._note  # type: ignore[method-assign]

    def _deliver(self, record: bytes) -> None:
        self.taken += 1

    def _note(self, request: object, address: object) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            self.failed.append(error)

    def take(self, data: bytes) -> str:
        with socket.create_connection(("127.0.0.1", self.board.port), timeout=SECONDS) as connection:
            with contextlib.suppress(OSError):  # answered, and closed, before all of it was sent
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            got = b""
            with contextlib.suppress(ConnectionError):
                while b"\r\n" not in got and (piece := connection.recv(1000)):
                    got += piece
        if self.failed:
            raise self.failed.pop()
        if not got.startswith(b"HTTP/"):  # no request at all, or one of HTTP/0.9, which has no status
            return "no status"
        status = re.match(rb"HTTP/1\.1 (200|204|400|403|404|408|409|411|413|414|431|501|503|505) ", got)
        assert status is not None, got[:200]
        return status[1].decode()


ANNOTATION = b"valence,arousal\n0.1,-0.2\n-5,0\n1,1\n0,-1e-3\n"
SAMPLE = b"image_location,valence,arousal\nclip/00001.jpg,0,0\nclip/00002.jpg,,\nother_left/00007.png,0,0\n"
META = b'{"rate": 30, "shared": true, "images": "faces", "about": {"a": [1, 2.5e3]}}'
ARRAYS = [npy("(10, 3)"), npy("(4, 2)", "'>f8'"), npy("(3,)", "[('a', '<f4')]")]
ARRAYS += [npy("(0, 4611686018427387904)"), npy("(" + "1, " * 65 + ")"), npy("(10, 3)", "'<S0'")]
ARRAYS += [npy("(4, 2)", "'<f8'", size=0) + np.array([1e300, np.inf] * 4).tobytes()]
TREES = [
    b'{"dict": [["model", {"dict": [["weight", {"tensor": "/model/weight"}], ["bias", {"tensor": "/model/bias"}]]}],'
    b' ["at", {"tuple": [1, null, true]}], ["list", {"list": ["a", 2.5]}]]}',
    b'{"dict": []}',
]
TABLES = [
    b'video,time,a_x,a_y,b_x,group,valence,arousal\n"one",0,1,2,,g,0.5,\none,0.5,1.5,nan,3,g,-0.5,1\ntwo,7,0,0,1,h,0,0\n',
    b"split;frame;a_x;valence\ntrain;1;0.5;0\ntrain;2;0.25;1\nval;9;1;-1\n",
]
LINES = [
    b'{"audio": [1, -2.5e-3], "visual": [0, 1, NaN], "frame": 3, "t": 0.1}\n',
    b'{"visual": null, "t": "00:01"}\n\n{"audio": [1e39, 2]}\noops\n',
]
GET = b"GET %s HTTP/1.1\r\nHost: localhost:80\r\nSec-Fetch-Site: same-origin\r\n\r\n"
REQUESTS = [
    *(GET % path for path in (b"/", b"/events", b"/nothing")), b"HEAD / HTTP/1.0\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n"
]  # fmt: skip


POST = (
    b"POST /media HTTP/1.1\r\nHost: localhost:80\r\nOrigin: http://localhost:80\r\nSec-Fetch-Site: same-origin\r\n"
    b"Sage-Token: token\r\nSage-Sender: me\r\nSage-Kind: %s\r\nSage-Seconds: %s\r\nContent-Length: %d\r\n\r\n%s"
)
SOUND = np.array([0, 0.5, -1], "<f4").tobytes()
POSTS = [
    POST % (b"sound", b"1.5", len(SOUND), SOUND),
    POST % (b"picture", b"2e3", 6, b"\xff\xd8\xff\xc0\x00\x11"),
    *REQUESTS,
]


UNSIGNED = safetensors.torch.save({}, {"sage_ext": json.dumps({"format": 1, "digest": "x", "tree": "\ud800"})})


def of_file(read: Callable[[Path], object], *seeds: bytes) -> Callable[[Path], Target]:
    return lambda folder: Target(reading_file(folder / "file", read), [*seeds], named=re.escape(str(folder / "file")))


def of_data_set(name: str, *seeds: bytes) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        return Target(
            DataSet(folder).reading(name),
            [*seeds],
            (ValueError, FileNotFoundError),
            f"{re.escape(str(folder))}|^clip: (audio|visual), row",
        )

    return make


def of_table(folder: Path) -> Target:
    path = folder / "file.csv"

    def read(path: Path) -> None:
        with mock.patch.object(table, "MOST_GAPS", 100_000):  # a gap of millions is allowed, and takes seconds
            table.import_table(path, folder / "out", fps=2.0, overwrite=True)

    option = "^(targets|modalities|video|split|time|frame|fps): "
    return Target(reading_file(path, read), TABLES, named=f"{re.escape(str(path))}|{option}")


def of_tree(folder: Path) -> Target:
    path = folder / "file"
    load = reading_file(path, checkpoint.load_checkpoint)
    return Target(lambda tree: load(signed(tree)), TREES, named=re.escape(str(path)))


TARGETS: dict[str, Callable[[Path], Target]] = {
    "annotation": of_file(read_annotation, ANNOTATION),
    "annotation_targets": of_file(read_annotation, b"stress[0:100],b\n1,0.5\n,nan\n99.5,-1\n"),
    "sample": of_file(read_sample, SAMPLE),
    "array": of_data_set("features/visual/clip.npy", *ARRAYS),
    "array_resampled": of_data_set("features/audio/clip.npy", *ARRAYS),
    "mask": of_data_set("features/visual/clip.mask.npy", npy("(10,)", "'|b1'", size=10)),
    "quality": of_data_set("features/visual/clip.quality.npy", npy("(10, 3)"), npy("(10, 1)", "'<f8'", size=80)),
    "meta": of_data_set("features/visual/meta.json", META),
    "fps": of_data_set("fps.json", b'{"clip": 25, "other": 29.97}', b"0.5"),
    "targets": of_data_set("targets.json", b'{"valence": [-5, 1.5], "arousal": [-1, 1]}'),
    "groups": of_data_set("groups.json", b'{"run": {"clip": 3}, "group": {"clip": "a"}}', b'{"clip": "a"}'),
    "table": of_table,
    "checkpoint": of_file(checkpoint.load_checkpoint, *map(signed, TREES), UNSIGNED),
    "checkpoint_tree": of_tree,
    "frames": lambda folder: Target(reading_frames(), LINES),
    "http": lambda folder: Target(Browser().take, REQUESTS),
    "media": lambda folder: Target(Browser(camera=True).take, POSTS),
    "index": of_file(read_index, b'{"what": "x", "videos": {"a": {"frames": 3, "fps": 30.0}, "b": {"frames": 90}}}'),
}


# ------------------------------------------------------------------------------------------------------------------ runs
@dataclass
class Run:
    """What came of a target's cases. `outcomes`: way -> the shortest input that went it."""

    outcomes: dict[str, bytes] = field(default_factory=dict)
    findings: list[tuple[str, bytes]] = field(default_factory=list)
    cases: int = 0
    seconds: float = 0.0


def outcome(target: Target, data: bytes) -> tuple[str, str | None]:
    """(which way it went, what is wrong with it)."""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning is a line that nobody asked for, but for this one
            warnings.filterwarnings("ignore", "clip: .*: expected finite float32 values, got infinity in some rows")
            way, wrong = f"taken: {target.take(data)}", None
    except target.refusals as error:
        text = str(error)
        way = "refused: " + re.sub(
            r"'[^']*'|\"[^\"]*\"|[^ -~]+|[0-9.e+-]*[0-9][0-9.e+-]*", "#", text.split(", got")[0][:400]
        )
        wrong = None
        if len(text) > LONGEST or "\n" in text:
            wrong = f"a message of {len(text)} characters, {text.count(chr(10)) + 1} lines: {text[:200]}"
        elif not re.search(target.named, text):
            wrong = f"no file named: {text}"
    except Exception as error:
        way = wrong = f"{type(error).__name__}: {error}"[:300]
    if (took := time.process_time() - began) > SECONDS:
        wrong = f"{took:.1f} s"
    return way, wrong


def load(name: str) -> list[bytes]:
    path = CORPUS / f"{name}.json"
    return [text.encode("latin-1") for text in json.loads(path.read_text())] if path.exists() else []


def fuzz(name: str, cases: int, seed: int, folder: Path) -> Run:
    """The corpus, then `cases` inputs made from it and from what has gone a new way since."""
    target, run, rng = TARGETS[name](folder), Run(), np.random.default_rng([seed, *name.encode()])
    corpus = [*target.seeds, *load(name)]
    first, began = list(corpus), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(len(first) + cases):
        data = first[case] if case < len(first) else changed(rng, corpus)
        way, wrong = outcome(target, data)
        if wrong is not None:
            run.findings.append((wrong, data))
        if way not in run.outcomes:
            if len(run.outcomes) == WAYS:
                continue
            if case >= len(first):
                corpus.append(data)
        if len(data) < len(run.outcomes.get(way, b" " * 1_000_000)):
            run.outcomes[way] = data
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEGABYTES:
        run.findings.append((f"{grown:.0f} MB more memory", b""))
    run.cases, run.seconds = len(first) + cases, time.monotonic() - began
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add inputs that went a new way to the corpus")
    args = parser.parse_args()
    findings = 0
    for name in args.targets or TARGETS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            run = fuzz(name, args.cases, args.seed, Path(folder))
        print(
            f"{name}: {run.cases:,} cases, {run.seconds:.0f} s, {len(run.outcomes)} ways, {len(run.findings)} findings"
        )
        for wrong, data in run.findings[:10]:
            print(f"    {wrong}\n        {data[:150]!r}")
        findings += len(run.findings)
        if args.keep:
            inputs = sorted({data for data in run.outcomes.values() if len(data) <= KEPT}, key=lambda d: (len(d), d))
            text = json.dumps([data.decode("latin-1") for data in inputs[:MOST_KEPT]], indent=0)
            CORPUS.mkdir(exist_ok=True)
            (CORPUS / f"{name}.json").write_text(text + "\n")
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
