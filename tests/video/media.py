"""Media files for tests, made with PyAV: what is in them is known to the sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TICKS = 90_000  # a second
GRID = Path(__file__).parents[3] / "shared" / "data" / "grid"


def write(
    path: Path,
    pictures: Iterable[np.ndarray] = (),
    times: Sequence[float] | None = None,
    *,
    fps: float = 25.0,
    sound: np.ndarray | None = None,
    rate: int = 48_000,
    begins: float = 0.0,
    codec: str | None = None,
    audio_codec: str | None = None,
    rotation: int = 0,
    container: str | None = None,
) -> Path:
    """Pictures (H, W, 3) uint8 shown from `times` (s; default: `fps` a second), and a sound (n,) or (n, channels) float32 that
    `begins` (s). NaN in the sound: no packets there."""
    with av.open(str(path), "w", format=container) as file:
        pictures = list(pictures)
        video = audio = None
        if pictures:
            video = file.add_stream(codec or "libx264", rate=Fraction(fps).limit_denominator(1001))
            height, width = pictures[0].shape[:2]
            video.width, video.height = width, height
            video.pix_fmt = "yuv444p" if codec is None else video.codec_context.codec.video_formats[0].name
            if codec is None:
                video.options = {"crf": "10", "preset": "ultrafast"}
            if rotation:
                video.set_display_rotation(rotation)
            video.codec_context.time_base = (
                1 / Fraction(fps).limit_denominator(1001) if codec == "mpeg1video" else Fraction(1, TICKS)
            )
        if sound is not None:
            sound = np.atleast_2d(np.asarray(sound, np.float32).T)
            layout = {1: "mono", 2: "stereo"}[len(sound)]
            audio = file.add_stream(audio_codec or "aac", rate=rate, layout=layout)
        at = [i / fps for i in range(len(pictures))] if times is None else times
        jobs = [(t, "picture", i) for i, t in enumerate(at[: len(pictures)])]
        if sound is not None:
            size = 1024
            jobs += [(begins + k / rate, "sound", k) for k in range(0, sound.shape[1], size)]
        for t, kind, i in sorted(jobs):
            if kind == "picture" and video is not None:
                frame = av.VideoFrame.from_ndarray(pictures[i], "rgb24")
                frame.pts, frame.time_base = round(t * TICKS), Fraction(1, TICKS)
                file.mux(video.encode(frame))
            elif audio is not None and sound is not None:
                block = sound[:, i : i + size]
                if np.isnan(block).any():
                    continue
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", layout)
                frame.rate, frame.pts, frame.time_base = rate, round(t * rate), Fraction(1, rate)
                file.mux(audio.encode(frame))
        for stream in (video, audio):
            if stream is not None:
                file.mux(stream.encode(None))
    return path


def grey(value: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def tone(seconds: float, hz: float = 440.0, rate: int = 48_000, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


FPS, SIZE, BOX = (
    30.0,
    (96, 128),
    (32, 16, 56, 56),
)  # of the made videos: height and width; left, top, width, height of the face


def make(
    path: Path, seconds: float = 2.0, seed: int = 0, *, flash: float | None = None, told: bool = True, **options
) -> Path:
    """A textured patch that wobbles in front of a wall, a tone whose loudness varies; the patch's box beside it. `flash`: a
    bright picture and a click at that moment."""
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
