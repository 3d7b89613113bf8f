"""Files and folders that are there whole or not at all, and folders in which one process works at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


class BusyError(ValueError):
    """Another process works in the folder; the message says which."""


@contextlib.contextmanager
def alone(folder: Path, work: str, *, shared: bool = False) -> Iterator[None]:
    """The folder, made if it is not there, for this caller alone until the block ends; `shared`: for all callers that share it,
    and for nobody who wants it alone.

    BusyError, which says who holds it, where another one has it: of another process, or in another thread of this one.
    A lock ends with its process, however that ends; the file FOLDER/.lock stays and holds nothing back. `work`: what is
    done there, for the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(300).strip() or "another process"
            raise BusyError(
                f"{folder}: expected a folder in which no other process works, got one held by {holder}"
            ) from None
        try:
            with naming(folder / LOCK):
                os.ftruncate(file.fileno(), 0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                others = " and perhaps others" if shared else ""
                held = f"process {os.getpid()} on {socket.gethostname()}{others}, {work} since {since}\n"
                os.write(file.fileno(), held.encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                if not shared:  # the words may be another's
                    os.ftruncate(file.fileno(), 0)
            fcntl.flock(file, fcntl.LOCK_UN)  # children that inherited the file would hold it on


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Gives an OSError that names no file (a full disk, a quota) the name `path`; one below `temporary` too."""
    try:
        yield
    except OSError as error:
        name = error.filename
        hidden = temporary is not None and str(name).startswith(str(temporary))  # nobody knows that one
        if name is not None and not hidden:
            raise
        if hidden and str(name) != str(temporary):
            path = path / Path(str(name)).relative_to(temporary or "")
        # np.save says "N requested and M written" and gives no number
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def one_line(text: object, most: int = 100) -> str:
    """The beginning of an error's text, for a message of one line."""
    return " ".join(str(text).split())[:most]


@contextlib.contextmanager
def parsing(path: str | os.PathLike[str]) -> Iterator[None]:
    """For a block that reads a file of our own making: what damage makes a parser raise becomes a ValueError that names it."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # zipfile, zlib, json and NumPy each have their own
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        why = one_line(f"{type(error).__name__}: {error}", 200)
        raise ValueError(f"{path}: expected what this version writes there, got a damaged file ({why})") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and else leaves nothing behind.

    A reader, or a crash at any moment, sees the old file or the whole new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")  # machines share folders
    try:
        with naming(path, temporary):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # where it could not even be made
            temporary.unlink()
    directory = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path` in the manner of `replacing`."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder that becomes `path` when the block ends well, and else leaves nothing behind.

    By then `path` must not exist, or be an empty folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        with naming(path, temporary):
            temporary.mkdir(parents=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
