"""The fuzzers of fuzz.py on their corpora and a little more, and that they find what they look for."""

from __future__ import annotations

import fuzz
import pytest


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_bytes_from_outside_are_taken_or_refused(tmp_path, name):
    """Whatever they are: in one line that says which file it is, soon, and within little memory."""
    run = fuzz.fuzz(name, 300, 0, tmp_path)
    assert run.findings == []
    assert len(run.outcomes) >= 3
    assert any(way.startswith("taken") for way in run.outcomes)


def test_a_fault_is_found(tmp_path, monkeypatch):
    def make(folder):
        def take(data):
            if b"[[" in data:
                raise RecursionError("too deep")
            if b"NaN" in data:
                raise ValueError("two\nlines")
            if not data:
                raise ValueError("no name")
            return "read"

        return fuzz.Target(take, [b"seed"], named="file")

    monkeypatch.setitem(fuzz.TARGETS, "planted", make)
    found = {wrong.split(":")[0] for wrong, _ in fuzz.fuzz("planted", 500, 0, tmp_path).findings}
    assert found == {"RecursionError", "a message of 9 characters, 2 lines", "no file named"}
