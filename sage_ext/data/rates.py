"""Frames a second, and spans of time in frames.

Spans are stated in seconds. A default is stated in thirtieths of a second, the frames of most videos. At fewer than
`SLOW` frames a second a default stretches, so that it holds as many frames as it does at `SLOW`: what changes over
seconds in a face changes over minutes in what is looked at once a second, and no average is over less than a frame.
"""

from __future__ import annotations

import math

FPS = 30.0
SLOW = FPS / 4


def default_frames(thirtieths: float, fps: float) -> float:
    """A default span of so many thirtieths of a second, in frames at `fps`: a quarter as many below `SLOW`."""
    return thirtieths * max(fps, SLOW) / FPS


def nearest(frames: float) -> int:
    """The nearest whole number; of two the greater."""
    return math.floor(frames + 0.5)


def whole_frames(seconds: float, fps: float) -> int:
    """The whole number of frames nearest to `seconds`; may be 0."""
    return nearest(seconds * fps)
