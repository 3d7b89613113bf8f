"""Small videos of which everything is known, shared by the tests of extraction."""

from __future__ import annotations

from pathlib import Path

import pytest
from media import make


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder of three: one, two, three."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, seconds) in enumerate({"one": 2.0, "two": 2.5, "three": 1.5}.items()):
        make(folder / f"{name}.mp4", seconds, seed)
    return folder


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Extraction begins no processes but where a test asks for them: each takes seconds to begin."""
    from sage_ext.video import extraction

    monkeypatch.setattr(extraction, "_cores", lambda: 1)
