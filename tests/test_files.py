"""Files that are there whole or not at all, and folders in which one process works at a time."""

import contextlib
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from sage_ext.data.synthetic import read_spec, read_truth
from sage_ext.files import LOCK, BusyError, alone, naming, replacing, replacing_folder, write_atomic
from sage_ext.report import read_log
from sage_ext.study.results import read_evaluation

HOLDER = """
import sys, time
from pathlib import Path
from sage_ext.files import alone
with alone(Path(sys.argv[1]), "holding"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "work"."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "work")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_another_process_is_refused_and_told_who_holds_it(holder, tmp_path):
    with (
        pytest.raises(BusyError, match=f"held by process {holder.pid} on .*, holding since 2"),
        alone(tmp_path / "work", "x"),
    ):
        pytest.fail("two at once")


def test_a_lock_ends_with_its_process_however_it_ends(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with alone(tmp_path / "work", "working"):
        assert f"process {os.getpid()} " in (tmp_path / "work" / LOCK).read_text()
    assert (tmp_path / "work" / LOCK).read_text() == ""


def test_another_thread_is_refused(tmp_path):
    found = []

    def work():
        try:
            with alone(tmp_path, "second"):
                found.append(None)
        except BusyError as error:
            found.append(error)

    with alone(tmp_path, "first"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert isinstance(found[0], BusyError)
    assert f"held by process {os.getpid()} on " in str(found[0])


def test_a_child_that_lives_on_holds_nothing(tmp_path):
    with alone(tmp_path, "first"):
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
    try:
        with alone(tmp_path, "second"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    with full_disk(1000), pytest.raises(OSError, match=r"file\.bin'$") as error:
        write_atomic(path, b"x" * 100_000)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_full_disk_names_the_file_of_a_folder(tmp_path):
    """The file that could not be written where its name is known, else the folder; both as they would have been called."""

    def save(part):
        np.save(part / "rows.npy", np.zeros(5_000))  # NumPy's error has no number and no name

    def copy(part):
        os.link(part / "nothing", part / "copy")

    for write, name in ((save, "data"), (copy, "data/nothing")):
        with full_disk(1000), pytest.raises(OSError) as error, replacing_folder(tmp_path / "data") as part:
            write(part)
        assert error.value.filename == str(tmp_path / name)
        assert error.value.errno
        assert os.listdir(tmp_path) == []


def test_a_full_disk_and_a_lock(tmp_path):
    with full_disk(0), pytest.raises(OSError, match=re.escape(f"'{tmp_path / LOCK}'")), alone(tmp_path, "testing"):
        pass
    (tmp_path / LOCK).write_bytes(b"\xff\xfe")
    with alone(tmp_path, "testing"), pytest.raises(BusyError, match="testing since"), alone(tmp_path, "testing"):
        pass


def test_a_place_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=re.escape(f"'{tmp_path / 'file' / 'x.txt'}'")):
        write_atomic(tmp_path / "file" / "x.txt", b"")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04junk", b"junk", b"[]", b'{"a": 1}', b"\xff", b"a,b\nx,1", b"a\n1"]
)
def test_damage_in_files_of_our_own_is_named(tmp_path, content):
    for name, read in (
        ("truth/clip.npz", lambda: read_truth(tmp_path, "clip")),
        ("truth/spec.json", lambda: read_spec(tmp_path)),
        ("study.npz", lambda: read_evaluation(tmp_path / "study.npz")),
        ("log.csv", lambda: read_log(tmp_path / "log.csv")),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if (name, content) == ("log.csv", b"a\n1"):
            assert read()["a"].tolist() == [1]
            continue
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            read()
        assert "\n" not in str(error.value)


def test_errors_that_have_a_name_keep_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other'$"), naming(tmp_path / "file"):
        open(tmp_path / "other")  # noqa: SIM115
    with pytest.raises(ValueError, match=r"^not about files$"), naming(tmp_path / "file"):
        raise ValueError("not about files")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/file\.bin'$"), replacing(tmp_path / "nowhere" / "file.bin"):
        pass
