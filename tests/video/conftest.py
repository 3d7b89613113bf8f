"""Small videos of which everything is known, shared by the tests of extraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

FPS, SIZE, BOX = (
    30.0,
    (96, 128),
    (32, 16, 56, 56),
)  # of the made videos: height and width; left, top, width, height of the face


def make(
    path: Path, seconds: float = 2.0, seed: int = 0, *, flash: float | None = None, told: bool = True, **options
) -> Path:
    """A textured patch that wobbles in front of a wall, a tone whose loudness varies; the patch's box beside it. `flash`: a bright
    picture and a click at that moment."""
    from media import write

    rng = np.random.default_rng(seed)
    count = round(seconds * FPS)
    wall = rng.integers(60, 90, (*SIZE, 3), dtype=np.uint8)
    left, top, width, height = BOX
    patch = np.kron(rng.integers(40, 220, (14, 14, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    pictures = []
    for i in range(count):
        picture = wall.copy()
        shade = np.clip(patch * (0.8 + 0.2 * np.sin(i / 5 + seed)), 0, 255)
        picture[top : top + height, left : left + width] = shade
        if flash is not None and i == round(flash * FPS):
            picture[:] = 250
        pictures.append(picture)
    t = np.arange(round(seconds * 48_000)) / 48_000
    sound = 0.2 * (1 + np.sin(2 * np.pi * 0.7 * t + seed)) * np.sin(2 * np.pi * (180 + 20 * seed) * t)
    if flash is not None:
        sound *= 0.02
        sound[round(flash * 48_000) :][:480] = 0.9
    write(path, pictures, fps=FPS, **{"sound": sound, **options})
    if told:
        rows = [f"{i / FPS:.6f},{left},{top},{width},{height}" for i in range(count)]
        path.with_suffix(".faces.csv").write_text("\n".join(["time,left,top,width,height", *rows]) + "\n")
    return path


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
