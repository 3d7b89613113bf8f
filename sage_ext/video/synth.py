"""Videos of drawn people who talk, with known truth: valence, arousal, and when the picture or the sound deceives.

Every video has a person of its own. Valence and arousal are slow random walks on [-1, 1]. What shows them, each with the
person's own expressiveness, habit and a wandering error:

    face    mouth corners, brows and narrowed eyes follow valence; eye and brow opening and the liveliness of the head follow
            arousal. Speech moves the mouth, and so hides a part of a smile.
    voice   a source and a filter: harmonics of a gliding pitch under formants that change with each syllable, and noise for
            unvoiced consonants. Pitch, level, brightness and the rate of syllables follow arousal; formants, the size of pitch
            movements and breathiness follow valence. It is heard in turns of some seconds only: in between the person listens,
            silently, and the face is all there is.

Breakages, spans of 2 to 6 s that take a quarter of the time in all: see `BREAKAGES`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .._arguments import check_bool, check_int, check_number
from ..data.affwild2 import ANNOTATION_HEADER
from ..extras import require
from ..files import replacing, replacing_folder, write_atomic

# What breaks, and the column of truth/<name>.csv that says when.
BREAKAGES = {
    "face_lost": "the person leaves the picture",
    "occluded": "a hand or a board hides the mouth, the eyes or all of the face",
    "dark": "the picture is dark, or out of focus",
    "noise": "other people talk beside the person, as loudly or louder",
    "dropout": "no sound at all",
    "foreign_voice": "somebody else talks in place of the person, in another mood",
}
SOUNDS, PICTURES = ("babble", "silence", "foreign"), ("occluded", "dark", "frozen")  # of break_video
SPLITS = {"train": "Train_Set", "validation": "Validation_Set", "test": "Test_Set"}

_CONTROL = 200  # values a second of what steers the voice and the face
_RATE = 16_000  # samples a second of the voices; files have 44,100 or 48,000
_BROKEN = 0.25  # share of the time
_SPAN = (2.0, 6.0)  # seconds
_EASE = 0.3  # seconds in which the person or the hand moves in or out
_SHORTEST = 2.0  # seconds of a video
_SOUND_FRAME = 1024  # samples
_CLOCK = Fraction(1, 90_000)  # seconds: of the pictures' times in files that are written again

_VOWELS = np.array([  # formants of a man in Hz, opening and width of the mouth
    (730, 1090, 2440, 1.00, 0.0), (530, 1840, 2480, 0.65, 0.3), (270, 2290, 3010, 0.35, 0.6), (570, 840, 2410, 0.75, -0.5),
    (300, 870, 2240, 0.35, -1.0), (660, 1720, 2410, 0.90, 0.2), (490, 1350, 1690, 0.50, 0.0), (640, 1190, 2390, 0.80, 0.0),
])  # fmt: skip
_NOISES = ((3800, 7600), (1800, 5000), (800, 7000))  # Hz: s, sh, and a burst such as t


# ------------------------------------------------------------------------------------------------------------ random walks
def _walk(rng: np.random.Generator, count: int, seconds: float, rate: float = _CONTROL) -> np.ndarray:
    """(count,) unit-variance smooth noise, stationary, whose autocorrelation falls to 1/e within `seconds`."""
    lag = np.arange(int(6 * seconds * rate) + 2) * 2.15 / (seconds * rate)
    kernel = lag * np.exp(-lag)
    length = _even(count + 2 * len(kernel), 1024)
    noise = np.fft.rfft(rng.standard_normal(count + len(kernel)), length) * np.fft.rfft(kernel, length)
    return np.fft.irfft(noise, length)[len(kernel) :][:count] / np.sqrt(np.sum(kernel**2))


def _even(length: int, step: int) -> int:
    """The next multiple of `step`: a length whose Fourier transform is quick."""
    return -(-length // step) * step


def _affect(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) on [-1, 1]; every value is as likely as any other."""
    walk = _walk(rng, count, rng.uniform(3.0, 6.0))
    return np.array([math.erf(z / math.sqrt(2)) for z in walk])


def _smooth(track: np.ndarray, seconds: float) -> np.ndarray:
    """Each column averaged over a window of `seconds`, Hann's."""
    window = np.hanning(max(3, round(seconds * _CONTROL) | 1) + 2)[1:-1]
    pad = len(window) // 2
    padded = np.pad(track, [(pad, pad)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return np.apply_along_axis(np.convolve, 0, padded, window / window.sum(), mode="valid")


def _ease(inside: np.ndarray, rate: float) -> np.ndarray:
    """0 to 1: a span comes and goes within _EASE seconds, inside of itself."""
    steps = max(1, round(_EASE * rate))
    depth = np.zeros(len(inside))
    for direction in (1, -1):
        run, found = 0, np.zeros(len(inside))
        for i in range(len(inside))[::direction]:
            run = run + 1 if inside[i] else 0
            found[i] = min(1.0, run / steps)
        depth = found if direction == 1 else np.minimum(depth, found)
    return depth * depth * (3 - 2 * depth)


# ------------------------------------------------------------------------------------------------------------------ people
@dataclass(frozen=True)
class _Person:
    """How somebody looks, sounds and shows what is felt."""

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    shirt: tuple[float, float, float]
    wall: tuple[float, float, float]
    iris: tuple[float, float, float]
    lips: float  # how much redder than the skin
    width: float  # of the head, about 1
    eyes: float  # size
    brows: float  # thickness
    mouth: float  # width
    nose: float
    long_hair: bool
    size: float  # in the picture
    light: float  # -1: from the left, 1: from the right
    smile: float  # expressiveness of the face for valence
    eager: float  # of the face for arousal
    habit: tuple[float, float]  # resting smile and opening of the eyes
    pitch: float  # Hz
    tract: float  # factor on the formants
    vivid: float  # expressiveness of the voice
    level: float  # dB of full scale
    pace: float  # syllables a second

    @staticmethod
    def draw(rng: np.random.Generator) -> _Person:
        high = rng.random() < 0.5  # a voice of a woman's height
        tone = rng.uniform(0.0, 1.0)
        skin = np.array([236, 196, 170]) * (1 - tone) + np.array([150, 102, 74]) * tone + rng.uniform(-6, 6, 3)
        hairs = ((48, 34, 26), (28, 24, 24), (96, 62, 34), (150, 112, 62), (112, 106, 104))
        uniform = rng.uniform
        return _Person(
            skin=tuple(skin),
            hair=hairs[int(rng.integers(len(hairs)))],
            shirt=tuple(uniform(60, 150) + uniform(-40, 40, 3)),
            wall=tuple(uniform(90, 190) + uniform(-25, 25, 3)),
            iris=((90, 60, 36), (70, 100, 130), (84, 104, 60))[int(rng.integers(3))],
            lips=uniform(0.5, 1.0),
            width=uniform(0.92, 1.08),
            eyes=uniform(0.9, 1.15),
            brows=uniform(0.8, 1.3),
            mouth=uniform(0.9, 1.12),
            nose=uniform(0.9, 1.15),
            long_hair=bool(rng.random() < (0.8 if high else 0.2)),
            size=uniform(0.88, 1.08),
            light=uniform(-1, 1),
            smile=uniform(0.7, 1.2),
            eager=uniform(0.7, 1.2),
            habit=(uniform(-0.2, 0.2), uniform(-0.2, 0.2)),
            pitch=uniform(170, 230) if high else uniform(95, 140),
            tract=uniform(1.1, 1.2) if high else uniform(0.95, 1.06),
            vivid=uniform(0.7, 1.2),
            level=uniform(-31, -25),
            pace=uniform(3.8, 5.2),
        )


# ------------------------------------------------------------------------------------------------------------------ voices
@dataclass(frozen=True)
class _Voice:
    """sound (n,) at _RATE; opening, width (c,) of the mouth at _CONTROL, and loudness, 0 to 1, of the syllables."""

    sound: np.ndarray
    opening: np.ndarray
    width: np.ndarray
    loudness: np.ndarray


def _turns(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) bool at _CONTROL: the person's turn to speak; the first one comes within three seconds."""
    mine, at, speaking = np.zeros(count, bool), 0, bool(rng.random() < 0.5)
    while at < count:
        length = round(rng.uniform(*((2.5, 5.5) if speaking else (1.5, 3.0 if at == 0 else 4.5))) * _CONTROL)
        mine[at : at + length] = speaking
        at, speaking = at + length, not speaking
    return mine


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def _speak(
    rng: np.random.Generator, person: _Person, valence: np.ndarray, arousal: np.ndarray, turns: np.ndarray
) -> _Voice:
    """A voice that follows valence and arousal, (c,) at _CONTROL, in the turns."""
    count = len(turns)
    error = 0.25 * np.stack([_walk(rng, count, 1.5) for _ in range(4)])  # of pitch, level, brightness, formants
    vivid, felt = person.vivid, person.vivid * arousal
    formants = np.tile(_VOWELS[6, :3], (count, 1))
    mouth = np.zeros((count, 2))
    voiced, hiss = np.zeros(count), np.zeros((count, len(_NOISES)))
    accent = np.zeros(count)
    for start, stop in _runs(turns):
        at, left = start + int(0.05 * _CONTROL), int(rng.integers(4, 10))
        while at < stop - int(0.12 * _CONTROL):
            pace = person.pace * 2 ** (0.45 * felt[at] + 0.1 * rng.standard_normal())
            length = max(16, round(_CONTROL / pace))
            onset = round(length * rng.uniform(0.15, 0.35))
            end = min(at + length, stop)
            vowel = _VOWELS[rng.integers(len(_VOWELS))]
            formants[at:end], mouth[at + onset // 2 : end] = vowel[:3], vowel[3:]
            voiced[at + onset : end - 2] = rng.uniform(0.75, 1.0)
            consonant = int(rng.integers(len(_NOISES) + 2))
            if consonant < len(_NOISES):
                hiss[at : min(at + onset, end), consonant] = rng.uniform(0.15, 0.4)
            else:
                voiced[at : at + onset] = 0.35  # m, n, l
            accent[at:end] = rng.standard_normal()
            at, left = end, left - 1
            if left == 0:  # a breath
                at, left = at + round(rng.uniform(0.15, 0.4) * _CONTROL), int(rng.integers(4, 10))
    formants = _smooth(formants, 0.06) * (person.tract * (1 + 0.08 * vivid * valence + 0.06 * error[3]))[:, None]
    mouth, voiced, hiss, accent = (
        _smooth(mouth, 0.08),
        _smooth(voiced, 0.03),
        _smooth(hiss, 0.015),
        _smooth(accent, 0.1),
    )
    level = 10 ** ((person.level + 7 * (felt + error[1])) / 20)
    octaves = 0.45 * (felt + error[0]) + 0.1 * vivid * valence + accent * (0.09 + 0.07 * vivid * valence.clip(-1, 1))
    pitch = person.pitch * 2**octaves
    tilt = 1.6 - 0.6 * (felt + error[2])
    breath = 0.03 + 0.08 * (1 - vivid * valence).clip(0, 2)

    per = _RATE // _CONTROL
    sound = np.zeros(count * per)
    noises = _noises(rng, len(sound)) if count else []
    for start, stop in _runs(turns):
        times, grid = np.arange((stop - start) * per) / per, np.arange(stop - start)
        rise = functools.partial(np.interp, times, grid)
        part = slice(start, stop)
        phase = 2 * np.pi * np.cumsum(rise(pitch[part] * (1 + 0.008 * rng.standard_normal(stop - start)))) / _RATE
        gains = _harmonics(pitch[part], formants[part], tilt[part])
        gains *= (level * voiced)[part, None]
        before, now, twice = np.zeros(len(times)), np.sin(phase), 2 * np.cos(phase)
        out = np.zeros(len(times))
        for k in range(gains.shape[1]):  # sin((k + 1) phase), from the two before
            out += rise(gains[:, k]) * now
            before, now = now, twice * now - before
        place = slice(start * per, stop * per)
        for kind, noise in enumerate(noises):
            heard = hiss[part, kind] + (breath * voiced)[part] * (kind == 2)
            out += rise(level[part] * heard) * noise[place]
        sound[place] = out
    return _Voice(sound, mouth[:, 0], mouth[:, 1], voiced)


def _harmonics(pitch: np.ndarray, formants: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """(c, K) amplitudes of the harmonics of a voice whose power is 1."""
    order = np.arange(1, min(64, int(7200 / pitch.min())) + 1)
    frequency = pitch[:, None] * order
    gains = order ** -tilt[:, None] * (frequency < 7400)
    tract = np.concatenate([formants, np.full((len(formants), 1), 3500.0)], axis=1)
    for n in range(tract.shape[1]):
        ratio = (frequency / tract[:, n, None]) ** 2
        band = (60 + 40 * n) / tract[:, n, None]
        gains /= np.sqrt((1 - ratio) ** 2 + ratio * band**2)
        gains *= 1 + ratio  # keeps the sum of the formants' slopes from making all high ones inaudible
    return gains / np.sqrt(0.5 * np.sum(gains**2, axis=1, keepdims=True))


def _noises(rng: np.random.Generator, samples: int) -> list[np.ndarray]:
    length = _even(samples, 4096)
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.fft.rfftfreq(length, 1 / _RATE)
    found = []
    for low, high in _NOISES:
        noise = np.fft.irfft(spectrum * ((frequency > low) & (frequency < high)), length)[:samples]
        found.append(noise / max(noise.std(), 1e-9))
    return found


def _stranger(rng: np.random.Generator, count: int, mood: np.ndarray | None = None) -> np.ndarray:
    """(count * _RATE / _CONTROL,) of somebody who talks on; `mood`: (2, count) valence and arousal that it shall not resemble."""
    valence, arousal = _affect(rng, count), _affect(rng, count)
    if mood is not None:
        valence, arousal = 0.5 * (valence - mood[0]), 0.5 * (arousal - mood[1])
    return _speak(rng, _Person.draw(rng), valence, arousal, np.ones(count, bool)).sound


def _babble(rng: np.random.Generator, count: int) -> np.ndarray:
    """Several strangers at once, of power 1."""
    voices = []
    for _ in range(4):
        voice = _stranger(rng, count)
        voices.append(voice / max(np.sqrt(np.mean(voice**2)), 1e-9))
    babble = np.sum(voices, axis=0)
    return babble / max(np.sqrt(np.mean(babble**2)), 1e-9)


def _at_rate(sound: np.ndarray, rate: int, samples: int) -> np.ndarray:
    """(samples,) float32 at `rate` of sound at _RATE."""
    step = _RATE // math.gcd(rate, _RATE)
    length = _even(len(sound) + 200 * step, 128 * step)  # its end is silent, as the transform wraps round
    out = np.fft.irfft(np.fft.rfft(sound, length), length * rate // _RATE) * rate / _RATE
    return out[:samples].astype(np.float32)


# ------------------------------------------------------------------------------------------------------------------- faces
_CANVAS = (256, 320)  # width, height on which a head is drawn
_MIDDLE, _CHIN, _EYE, _MOUTH = (128.0, 176.0), 272.0, 156.0, 224.0  # pivot, and heights of the parts
_LEVEL = 124.0  # of the head's middle, of 240 lines
_APART = 33.0  # of an eye from the middle
_SHIFT = 4  # bits of a fraction of a pixel that OpenCV's drawing takes


def _points(points: Any) -> np.ndarray:
    return np.round(np.asarray(points, float) * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)


def _over(cv2: Any, picture: np.ndarray, layer: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The picture, on which the layer (RGBA), moved, is laid."""
    height, width = layer.shape[:2]
    corners = affine @ np.array([(0, width, 0, width), (0, 0, height, height), (1, 1, 1, 1)])
    left, top = np.floor(corners.min(axis=1)).clip(0, picture.shape[1::-1]).astype(int).tolist()
    right, bottom = np.ceil(corners.max(axis=1)).clip(0, picture.shape[1::-1]).astype(int).tolist()
    if left >= right or top >= bottom:
        return picture
    inner = affine - np.array([(0, 0, left), (0, 0, top)])
    moved = cv2.warpAffine(layer, inner, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    cover = moved[..., 3].astype(np.float32) * (1 / 255)
    place = picture[top:bottom, left:right]
    place[:] = cv2.blendLinear(cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB), np.ascontiguousarray(place), cover, 1 - cover)
    return picture


@dataclass(frozen=True)
class _Look:
    """What a face does in one picture; 0 is at rest, most go from -1 to 1."""

    smile: float
    brow: float
    frown: float
    eyes: float  # opening, 0 shut, 1 at rest
    gaze: float
    opening: float
    width: float
    x: float  # where the head is, pixels of a picture of 240 lines
    y: float
    body: float  # where the body is, from the left
    roll: float  # radians
    turn: float  # of the head to the side, canvas pixels of the nose
    nod: float  # likewise, down
    scale: float


class _Artist:
    """Draws one person in pictures of a size."""

    def __init__(self, rng: np.random.Generator, person: _Person, size: tuple[int, int]) -> None:
        self.cv2 = require("cv2", "video")
        self.person, self.size = person, size
        self.unit = size[1] / 240
        self.zoom = 0.66 * self.unit * person.size
        self.wall = self._wall(rng)
        self.head = self._head()
        self.body = self._body()
        x, y = np.meshgrid(np.arange(_CANVAS[0], dtype=np.float32), np.arange(_CANVAS[1], dtype=np.float32))
        self.grid = x, y
        self.bulge = np.exp(-(((x - 128) / 62) ** 2) - ((y - 185) / 80) ** 2).astype(np.float32)
        self.skin = self._tone(1.0)

    def _tone(self, light: float, red: float = 0.0) -> tuple[float, float, float]:
        r, g, b = self.person.skin
        return (min(255, r * light), g * light * (1 - 0.35 * red), b * light * (1 - 0.3 * red))

    def _fill(self, image: np.ndarray, points: Any, colour: Any) -> None:
        self.cv2.fillPoly(image, [_points(points)], colour, self.cv2.LINE_AA, _SHIFT)

    def _line(self, image: np.ndarray, points: Any, colour: Any, width: int) -> None:
        self.cv2.polylines(image, [_points(points)], False, colour, width, self.cv2.LINE_AA, _SHIFT)

    def _wall(self, rng: np.random.Generator) -> np.ndarray:
        width, height = self.size
        wall = np.empty((height, width, 3), np.float32)
        wall[:] = self.person.wall
        wall *= np.linspace(1.1, 0.8, width, dtype=np.float32)[None, :, None]
        picture = np.array([rng.uniform(0.02, 0.75), rng.uniform(0.05, 0.2)]) * self.size  # a picture hangs there
        left, top = picture.astype(int)
        wide, high = int(width * 0.2), int(height * 0.3)
        wall[top : top + high, left : left + wide] *= 0.8
        wall[top + 4 : top + high - 4, left + 4 : left + wide - 4] *= rng.uniform(0.9, 1.3, 3)
        return self.cv2.GaussianBlur(wall, (0, 0), 1.5 * self.unit).clip(0, 255).astype(np.uint8)

    def _outline(self, grow: float = 0.0) -> np.ndarray:
        """Of the head: an egg, its narrow end the chin."""
        angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
        x, y = np.cos(angle), np.sin(angle)
        wide = (76 * self.person.width + grow) * (1 - 0.22 * y.clip(0) ** 2.2)
        tall = np.where(y > 0, _CHIN - 160 + grow, 96 + grow)
        return np.stack([128 + wide * np.sign(x) * np.abs(x) ** 0.85, 160 + tall * y], axis=1)

    def _head(self) -> np.ndarray:
        """(H, W, 4) RGBA: hair, skin and nose; eyes, brows and mouth are drawn on a copy."""
        cv2, person = self.cv2, self.person
        width, height = _CANVAS
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))

        def spot(cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
            return np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

        def mask(points: Any, blur: float = 0.7) -> np.ndarray:
            flat = np.zeros((height, width), np.uint8)
            self._fill(flat, points, 255)
            return (cv2.GaussianBlur(flat, (0, 0), blur).astype(np.float32) / 255)[..., None]

        skin = np.empty((height, width, 3), np.float32)
        skin[:] = person.skin
        far = ((x - 128) / (84 * person.width)) ** 2
        light = 0.62 + 0.46 * np.sqrt(np.clip(1 - 0.85 * far, 0.02, 1)) + 0.07 * person.light * (x - 128) / 76
        light += 0.12 * spot(128, 112, 46, 26)  # forehead
        light -= 0.10 * spot(128, 300, 80, 32)  # under the chin
        for side in (-1, 1):
            eye = 128 + side * _APART
            light += 0.13 * spot(eye + 6 * side, 192, 22, 17)  # cheek
            light -= 0.26 * spot(eye, _EYE - 2, 23, 14)  # socket
            light -= 0.10 * spot(128 + side * 12, 166, 6, 18)  # beside the bridge of the nose
            light -= 0.22 * spot(128 + side * 8 * person.nose, 199, 5, 3.2)  # nostril
            light -= 0.08 * spot(128 + side * 15 * person.nose, 194, 4, 8)  # side of the nose
        light += 0.14 * spot(128, 166, 6, 26) + 0.10 * spot(128, 189, 9, 7)  # bridge and tip
        light -= 0.14 * spot(128, 203, 14 * person.nose, 4.5)  # shadow of the nose
        light -= 0.10 * spot(128, 244, 18, 5)  # below the lip
        light += 0.05 * spot(128, 258, 14, 8)
        skin *= light[..., None]
        red = 0.08 * (spot(128 - 44, 198, 22, 18) + spot(128 + 44, 198, 22, 18))[..., None]
        skin *= 1 - red * np.array([0.0, 1.0, 0.9], np.float32)

        hair = np.empty_like(skin)
        hair[:] = person.hair
        hair *= (0.85 + 0.3 * spot(110 + 25 * person.light, 78, 60, 30) + 0.03 * np.sin(x / 2.3 + y / 9))[..., None]
        outline = self._outline()
        cap = self._outline(9.0)
        back = mask(cap[cap[:, 1] < 178])
        if person.long_hair:
            back = np.maximum(
                back,
                mask([(48, 100), (208, 100), (222, 190), (220, 270), (198, 300), (58, 300), (36, 270), (34, 190)], 4),
            )
        face = mask(outline)
        ears = np.maximum(*(mask([(128 + s * (76 * person.width + 7 * np.cos(t)), 166 + 17 * np.sin(t))
                                  for t in np.linspace(0, 6.28, 24)]) for s in (-1, 1)))  # fmt: skip
        line = 108 if person.long_hair else 100  # of the hair on the forehead
        arc = np.linspace(0, np.pi, 30)
        brim = np.stack([128 + 70 * person.width * np.cos(arc), line + 26 - 30 * np.sin(arc) ** 0.7], axis=1)
        top = cap[cap[:, 1] < 150]
        front = mask(np.concatenate([top[np.argsort(top[:, 0])], brim]), 1.2)  # over the skull, and back along the brim

        out = np.concatenate([hair, back], axis=2)
        for colour, cover in ((skin * 0.82, ears if not person.long_hair else ears * 0), (skin, face), (hair, front)):
            out[..., :3] += (colour - out[..., :3]) * cover
            out[..., 3:] = np.maximum(out[..., 3:], cover)
        out[..., 3] *= 255
        return np.ascontiguousarray(out.clip(0, 255).astype(np.uint8))

    def _body(self) -> np.ndarray:
        width, height = _CANVAS[0] * 2, _CANVAS[1]
        body = np.zeros((height, width, 4), np.uint8)
        body[:] = (*self.person.shirt, 0)  # also where nothing is: edges are soft
        neck, shirt = (*self._tone(0.72), 255), (*self.person.shirt, 255)
        self._fill(body, [(222, 0), (290, 0), (292, 70), (220, 70)], neck)
        along = np.linspace(-1, 1, 41)
        shoulders = np.stack([256 + 226 * along, 44 + 40 * np.abs(along) ** 1.2 + 190 * np.abs(along) ** 9], axis=1)
        self._fill(body, [*shoulders, (492, 320), (20, 320)], shirt)
        self.cv2.ellipse(body, (256, 40), (40, 38), 0, 0, 360, neck, -1, self.cv2.LINE_AA)
        shade = np.linspace(1.05, 0.75, height, dtype=np.float32)[:, None, None]
        body[..., :3] = (body[..., :3] * shade).clip(0, 255).astype(np.uint8)
        return self.cv2.GaussianBlur(body, (0, 0), 1.2)

    def _affine(self, look: _Look, pivot: tuple[float, float], roll: float, drop: float = 0.0) -> np.ndarray:
        zoom = self.zoom * look.scale
        cos, sin = zoom * math.cos(roll), zoom * math.sin(roll)
        x, y = look.x * self.unit, look.y * self.unit + drop * zoom
        return np.array(
            [[cos, -sin, x - cos * pivot[0] + sin * pivot[1]], [sin, cos, y - sin * pivot[0] - cos * pivot[1]]]
        )

    def draw(self, look: _Look) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        cv2 = self.cv2
        head = self.head.copy()
        for side in (-1, 1):
            self._eye(head, look, side)
            self._brow(head, look, side)
        self._mouth(head, look)
        x, y = self.grid
        turned = cv2.remap(head, x - look.turn * self.bulge, y - look.nod * self.bulge, cv2.INTER_LINEAR)
        below = replace(look, x=look.body, y=0.4 * look.y + 0.6 * _LEVEL)
        picture = _over(cv2, self.wall.copy(), self.body, self._affine(below, (256, 0), 0.0, 70))
        return _over(cv2, picture, turned, self._affine(look, _MIDDLE, look.roll))

    def box(self, look: _Look) -> tuple[float, float, float, float]:
        """Left, top, width, height of the face, from the forehead to the chin, of the picture's pixels."""
        zoom = self.zoom * look.scale
        wide, high = 150 * self.person.width * zoom, 168 * zoom
        x, y = self._affine(look, _MIDDLE, look.roll) @ np.array([128 + look.turn * 0.5, 190, 1])
        return x - wide / 2, y - high / 2, wide, high

    def _eye(self, head: np.ndarray, look: _Look, side: int) -> None:
        cv2, person = self.cv2, self.person
        x, y, wide = 128 + side * _APART, _EYE, 16 * person.eyes
        high = 8.5 * person.eyes * max(0.0, look.eyes)
        low = 5.0 * person.eyes * min(1.0, max(0.0, look.eyes)) * (1 - 0.45 * max(0.0, look.smile))
        left, top = int(x - 26), int(y - 20)
        patch = head[top : top + 40, left : left + 52, :3]
        along = np.linspace(-1, 1, 13)
        arch = np.sqrt(np.clip(1 - np.abs(along) ** 2.2, 0, 1))
        upper = np.stack([x - left + wide * along, y - top + 2 - high * arch - 1.5 * side * along], axis=1)
        lower = np.stack([x - left + wide * along, y - top + 2 + low * arch - 1.5 * side * along], axis=1)
        if high + low > 2.5:
            ball = np.full((40, 52, 3), (226, 222, 218), np.uint8)
            centre = _points([(x - left + 5 * look.gaze, y - top)]).reshape(2).tolist()
            unit = 1 << _SHIFT
            cv2.circle(ball, centre, int(7.6 * unit), person.iris, -1, cv2.LINE_AA, _SHIFT)
            cv2.circle(ball, centre, int(3.8 * unit), (14, 12, 12), -1, cv2.LINE_AA, _SHIFT)
            cv2.circle(
                ball,
                (centre[0] - 2 * unit, centre[1] - 2 * unit),
                int(1.4 * unit),
                (250, 250, 250),
                -1,
                cv2.LINE_AA,
                _SHIFT,
            )
            inside = np.zeros((40, 52), np.uint8)
            self._fill(inside, np.concatenate([upper, lower[::-1]]), 255)
            cover = inside.astype(np.float32) * (1 / 255)
            patch[:] = cv2.blendLinear(ball, np.ascontiguousarray(patch), cover, 1 - cover)
        self._line(head, lower + (left, top), self._tone(0.55), 1)
        self._line(head, upper + (left, top), self._tone(0.16), 3)
        self._line(head, upper + (left, top - 5), self._tone(0.55), 1)

    def _brow(self, head: np.ndarray, look: _Look, side: int) -> None:
        along = np.linspace(0, 1, 9)
        x = 128 + side * (14 + 42 * along)
        y = 135 - 8 * look.brow - 7 * np.sin(along * 2.4) + (1 - along) * 9 * look.frown
        thick = 5.5 * self.person.brows * (1 - 0.75 * along**2)
        dark = tuple(0.75 * c for c in self.person.hair)
        self._fill(
            head, np.concatenate([np.stack([x, y - thick / 2], 1), np.stack([x, y + thick / 2], 1)[::-1]]), (*dark, 255)
        )
        if look.frown > 0.15:
            edge = 128 + side * 5
            self._line(head, [(edge, 128), (edge + side, 142)], (*self._tone(0.95 - 0.35 * look.frown), 255), 2)

    def _mouth(self, head: np.ndarray, look: _Look) -> None:
        person = self.person
        opening = max(0.0, look.opening)
        wide = 27 * person.mouth * (1 + 0.24 * look.smile + 0.16 * look.width)
        along = np.linspace(-1, 1, 17)
        bow = 1 - along**2
        corner = 10.0 * look.smile
        middle = _MOUTH + 2.5 * look.smile - corner * along**2  # the line between the lips
        x = 128 + wide * along
        gap = 20 * opening * bow**0.8
        top, bottom = middle - 0.25 * gap, middle + 0.75 * gap
        upper = top - bow**0.7 * (6 + 1.5 * np.cos(along * 9)) * (1 - 0.25 * look.smile) - 0.3
        lower = bottom + bow**0.6 * 8 * (1 - 0.2 * look.smile) + 0.3
        red = person.lips
        if look.smile > 0.1:  # the folds beside it
            for side in (-1, 1):
                fold = [
                    (128 + side * (19 + 20 * t + 8 * look.smile), 196 + 34 * t**1.3 - 6 * look.smile)
                    for t in np.linspace(0, 1, 8)
                ]
                self._line(head, fold, (*self._tone(0.97 - 0.2 * look.smile), 255), 2)

        def shape(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.concatenate([np.stack([x, a], 1), np.stack([x, b], 1)[::-1]])

        self._fill(head, shape(upper, top), (*self._tone(0.66, red), 255))
        self._fill(head, shape(bottom, lower), (*self._tone(0.78, red), 255))
        if opening > 0.04:
            self._fill(head, shape(top, bottom), (58, 20, 22, 255))
            teeth = np.minimum(top + 5.5 * bow**0.5, bottom)
            self._fill(head, shape(top, teeth), (222, 216, 206, 255))
        else:
            self._line(head, np.stack([x, middle], 1), (*self._tone(0.36, red), 255), 2)


_PARTS = {  # of a face: left, top, width, height in those of its box
    "mouth": (0.08, 0.55, 0.84, 0.6),
    "eyes": (-0.1, 0.05, 1.2, 0.45),
    "all": (-0.15, -0.2, 1.3, 1.4),
    "lower": (-0.05, 0.46, 1.1, 0.8),
}


class _Cover:
    """A hand, or a board with a pattern, that is held before a face."""

    def __init__(self, rng: np.random.Generator, skin: tuple[float, float, float], part: str) -> None:
        cv2 = self.cv2 = require("cv2", "video")
        self.part = _PARTS[part]
        self.tilt = rng.uniform(-0.25, 0.25)
        image = np.zeros((800, 128, 4), np.uint8)  # 128 of them before the part, an arm below
        if rng.random() < 0.5:
            image[..., :3] = tone = tuple(0.85 * c for c in skin)
            for finger in range(4):
                ends = (22 + 28 * finger, 22 + 6 * abs(finger - 1)), (26 + 25 * finger, 84)
                cv2.line(image, *ends, (*(0.62 * c for c in skin), 255), 30, cv2.LINE_AA)
                cv2.line(image, *ends, (*tone, 255), 26, cv2.LINE_AA)
            palm = [(10, 78), (118, 78), (116, 122), (98, 150), (102, 800), (28, 800), (32, 150), (12, 122)]
            cv2.fillPoly(image, [np.array(palm)], (*tone, 255), cv2.LINE_AA)
            shade = 0.72 + 0.4 * np.sin(np.linspace(0.4, 2.2, 128))[None, :, None]
            image[..., :3] = (image[..., :3] * shade).clip(0, 255).astype(np.uint8)
        else:
            coarse = rng.uniform(30, 220, (12, 12, 3)).astype(np.uint8)
            image[:128, :, :3] = cv2.resize(coarse, (128, 128), interpolation=cv2.INTER_NEAREST)
            image[:128, :, 3] = 255
        self.image = image

    def over(self, picture: np.ndarray, box: Sequence[float], depth: float) -> np.ndarray:
        """`depth`: 0 away, 1 all the way in place; it comes from below."""
        left, top, wide, high = box
        x, y, w, h = (a * b + c for a, b, c in zip(self.part, (wide, high) * 2, (left, top, 0, 0)))
        y += (1 - depth) * (picture.shape[0] - y)
        sx, sy = w / 128, h / 128
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        turn = np.array([[sx * cos, -sy * sin, 0], [sx * sin, sy * cos, 0]])
        turn[:, 2] = (x + w / 2, y + h / 2) - turn[:, :2] @ (64, 64)
        return _over(self.cv2, picture, self.image, turn)


def _darken(picture: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """An eighth of the light, and the camera's noise."""
    return np.clip(picture * np.float32(0.12) + (6 + 5 * grain), 0, 255).astype(np.uint8)


def _defocus(cv2: Any, picture: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), 7 * picture.shape[0] / 240)


# ------------------------------------------------------------------------------------------------------------------ a video
@dataclass(frozen=True)
class _Span:
    kind: str
    start: float  # seconds
    stop: float


def _spans(rng: np.random.Generator, seconds: float, kinds: Iterator[str]) -> list[_Span]:
    """A quarter of the time, spans beside one another."""
    wanted = _BROKEN * seconds
    lengths: list[float] = []
    while sum(lengths) + _SPAN[0] <= wanted + rng.uniform(0, _SPAN[0]):
        lengths.append(min(rng.uniform(*_SPAN), seconds / 2, max(_SPAN[0], wanted - sum(lengths) + 1)))
    gaps = rng.dirichlet(np.ones(len(lengths) + 1)) * (seconds - sum(lengths))
    spans, at = [], 0.0
    for gap, length in zip(gaps, lengths):
        spans.append(_Span(next(kinds), at + gap, at + gap + length))
        at += gap + length
    return spans


def _kinds(rng: np.random.Generator) -> Iterator[str]:
    """Every kind once, then every kind once more, and so on."""
    while True:
        yield from (list(BREAKAGES)[i] for i in rng.permutation(len(BREAKAGES)))


class _Scene:
    """One video: its truth, pictures and sound."""

    def __init__(self, seed: Sequence[int], seconds: tuple[float, float], fps: Fraction, size: tuple[int, int],
                 kinds: Iterator[str], clean: bool) -> None:  # fmt: skip
        lives, voices, faces, breaks, self._sensor = (
            np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5)
        )
        self.fps, self.size = fps, size
        self.frames = round(lives.uniform(*seconds) * fps)
        length = float(self.frames / fps)
        self.rate = (44_100, 48_000)[int(lives.integers(2))]
        count = math.ceil(length * _CONTROL) + 1
        person = _Person.draw(lives)
        valence, arousal = _affect(lives, count), _affect(lives, count)
        turns = _turns(lives, count)
        spans = _spans(breaks, length, kinds)
        self.spans = [] if clean else spans
        self.times = np.arange(self.frames) / float(fps)
        voice = _speak(voices, person, valence, arousal, turns)
        self.valence, self.arousal = self._sample(valence), self._sample(arousal)
        self.speaking = self._sample(turns.astype(float)) > 0.5
        self.broken = {kind: np.zeros(self.frames, bool) for kind in BREAKAGES}
        for span in self.spans:
            self.broken[span.kind] |= self._inside(span)
        self.sound = self._sound(breaks, voice.sound, np.stack([valence, arousal]))
        self._artist = _Artist(faces, person, size)
        self._covers = [_Cover(faces, person.skin, ("mouth", "eyes", "all")[int(faces.integers(3))]) for _ in spans]
        self._blurred = faces.random(len(spans)) < 0.5
        self._looks = self._live(faces, person, valence, arousal, voice)
        boxes = np.array([self._artist.box(look) for look in self._looks])
        left, top = boxes[:, :2].clip(0, size).T
        right, bottom = (boxes[:, :2] + boxes[:, 2:]).clip(0, size).T
        seen = (right - left) * (bottom - top) / (boxes[:, 2] * boxes[:, 3])
        self.broken["face_lost"] = seen < 0.5  # what is so, whatever was meant
        self.boxes = np.where(
            self.broken["face_lost"][:, None], np.nan, np.stack([left, top, right - left, bottom - top], 1)
        )

    def _sound(self, rng: np.random.Generator, own: np.ndarray, mood: np.ndarray) -> np.ndarray:
        own, room = own.copy(), 10 ** (-62 / 20) * rng.standard_normal(len(own))
        power = np.mean(own[own != 0] ** 2) if own.any() else 1e-4
        hush = np.ones(len(own))  # what is left of the room, too
        ramp = np.hanning(2 * (_RATE // 50))[: _RATE // 50]
        for span in self.spans:
            if span.kind not in ("noise", "dropout", "foreign_voice"):
                continue
            first, last = round(span.start * _CONTROL), min(round(span.stop * _CONTROL), mood.shape[1])
            place = slice(first * _RATE // _CONTROL, last * _RATE // _CONTROL)
            window = np.ones(place.stop - place.start)
            window[: len(ramp)], window[-len(ramp) :] = ramp, ramp[::-1]
            if span.kind == "noise":
                louder = 10 ** (rng.uniform(0, 5) / 20)
                own[place] += window * louder * math.sqrt(power) * _babble(rng, last - first)
            elif span.kind == "dropout":
                hush[place] -= window
            else:
                own[place] += window * (_stranger(rng, last - first, mood[:, first:last]) - own[place])
        sound = np.clip((own + room) * hush, -1, 1)
        return _at_rate(sound, self.rate, round(Fraction(self.frames) / self.fps * self.rate))

    def _live(
        self, rng: np.random.Generator, person: _Person, valence: np.ndarray, arousal: np.ndarray, voice: _Voice
    ) -> list[_Look]:
        """What the face does, picture by picture."""
        count = len(valence)
        error = 0.3 * np.stack([_walk(rng, count, 1.2) for _ in range(3)])
        talk = _smooth(voice.loudness, 0.4)
        smile = (person.smile * valence + person.habit[0] + error[0]) * (1 - 0.3 * talk)
        lively = person.eager * arousal + person.habit[1]
        brow, eyes = lively + error[1], 1 + 0.4 * (lively + error[2])
        frown = np.clip(-person.smile * valence - 0.1 + error[0], 0, 1.2)
        moving = 0.35 + 0.9 * np.clip((lively + 1) / 2, 0, 1.2)  # how lively the head is
        sway = [moving * _walk(rng, count, 0.35) + 0.8 * _walk(rng, count, 3.0) for _ in range(5)]
        sway[1] = sway[1] + 1.5 * talk * _walk(rng, count, 0.15)  # nods with the words
        away = np.zeros(count)
        for span in self.spans:
            if span.kind == "face_lost":
                inside = (np.arange(count) >= span.start * _CONTROL) & (np.arange(count) < span.stop * _CONTROL)
                away += _ease(inside, _CONTROL) * (1 if round(span.start * 10) % 2 else -1)
        blink, t = np.ones(count), rng.uniform(0.5, 3)
        while t * _CONTROL < count:
            start = int(t * _CONTROL)
            shut = np.abs(np.linspace(-1, 1, 44))[: count - start]
            blink[start : start + len(shut)] = np.clip(1.6 * shut - 0.35, 0, 1)
            t += rng.uniform(1.5, 5.0) * 2 ** (-0.4 * float(arousal[start]))
        look_at = np.round(_walk(rng, count, 1.0) * 1.2) * 0.4
        middle = self.size[0] / self.size[1] * 120
        aside = 1.9 * middle * away
        tracks = {
            "smile": np.clip(smile, -1.2, 1.2),
            "brow": np.clip(brow, -1.2, 1.3),
            "frown": frown,
            "eyes": np.clip(eyes, 0.3, 1.7) * blink,
            "gaze": _smooth(look_at, 0.06),
            "opening": voice.opening * (0.75 + 0.25 * voice.loudness),
            "width": voice.width,
            "x": middle + 5 * sway[0] + aside,
            "y": _LEVEL + 3.5 * sway[1],
            "body": middle + 1.5 * sway[0] + aside,
            "roll": 0.035 * sway[2],
            "turn": 1.5 * sway[0] + 3.5 * sway[3],
            "nod": 1.5 * sway[1] + 3.0 * sway[4],
            "scale": 1 + 0.02 * _walk(rng, count, 4.0),
        }
        rows = np.stack([self._sample(track) for track in tracks.values()], axis=1).tolist()
        return [_Look(**dict(zip(tracks, row))) for row in rows]

    def pictures(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB each."""
        cv2, artist = self._artist.cv2, self._artist
        depth = {
            i: _ease(self._inside(span), float(self.fps))
            for i, span in enumerate(self.spans)
            if span.kind == "occluded"
        }
        for t, look in enumerate(self._looks):
            picture = artist.draw(look)
            for i, span in enumerate(self.spans):
                if i in depth and depth[i][t]:
                    picture = self._covers[i].over(picture, artist.box(look), float(depth[i][t]))
                elif span.kind == "dark" and self._inside(span)[t]:
                    picture = _defocus(cv2, picture) if self._blurred[i] else _darken(picture, self._grain())
            yield picture

    def _grain(self) -> np.ndarray:
        return self._sensor.standard_normal((self.size[1], self.size[0], 1), np.float32)

    def _middles(self) -> np.ndarray:
        return self.times + 0.5 / float(self.fps)

    def _sample(self, track: np.ndarray) -> np.ndarray:
        """A track at _CONTROL in the middle of each picture's time."""
        return np.asarray(np.interp(self._middles(), np.arange(len(track)) / _CONTROL, track))

    def _inside(self, span: _Span) -> np.ndarray:
        """(T,) bool: the middle of a picture's time lies in the span."""
        return (self._middles() >= span.start) & (self._middles() < span.stop)


# ------------------------------------------------------------------------------------------------------------------- files
class _Film:
    """An MP4 file, H.264 and AAC, that is written picture by picture with its sound beside; a context manager."""

    def __init__(
        self,
        file: BinaryIO,
        size: tuple[int, int] | None,
        fps: Fraction,
        rate: int | None,
        clock: Fraction | None = None,
    ) -> None:
        self._av = require("av", "video")
        self._container = self._av.open(file, "w", format="mp4")
        self._video: Any = None
        self._audio: Any = None
        self._clock = clock or 1 / fps  # of the pictures' times
        self._heard = np.zeros(0, np.float32)
        self._samples = 0
        if size is not None:
            self._video = self._container.add_stream("libx264", rate=fps, options={"preset": "superfast", "crf": "20"})
            self._video.width, self._video.height = size
            self._video.pix_fmt = "yuv420p"
            self._video.codec_context.time_base = self._clock
            self._video.codec_context.thread_count = 1
        if rate is not None:
            self._audio = self._container.add_stream("aac", rate=rate, layout="mono", bit_rate=96_000)

    def __enter__(self) -> _Film:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self._sound(last=True)
                for stream in (self._video, self._audio):
                    if stream is not None:
                        self._container.mux(stream.encode(None))
        finally:
            self._container.close()

    def picture(self, rgb: np.ndarray, time: int, duration: int = 1) -> None:
        """`time`, `duration`: ticks of the clock."""
        frame = self._av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame.pts, frame.duration, frame.time_base = time, duration, self._clock
        self._container.mux(self._video.encode(frame))

    def sound(self, samples: np.ndarray) -> None:
        self._heard = np.concatenate([self._heard, samples])
        self._sound()

    def _sound(self, last: bool = False) -> None:
        while len(self._heard) >= (1 if last else _SOUND_FRAME):
            chunk, self._heard = self._heard[:_SOUND_FRAME], self._heard[_SOUND_FRAME:]
            frame = self._av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk[None]), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = self._audio.rate, self._samples
            frame.time_base = Fraction(1, self._audio.rate)
            self._samples += len(chunk)
            self._container.mux(self._audio.encode(frame))


def write_videos(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    train: int = 8,
    validation: int = 4,
    test: int = 2,
    seconds: tuple[float, float] = (20, 40),
    fps: float = 30.0,
    size: tuple[int, int] = (320, 240),
    clean: bool = False,
) -> list[Path]:
    """Writes videos and what is true of them below `out`, which must not exist or be empty -> the video files.

    train, validation, test  videos a split; a video stays the same whatever the numbers of the others
    seconds                  shortest and longest video
    fps, size                pictures a second; width and height in pixels, even numbers
    clean                    nothing breaks; the videos are otherwise those that they are without it

        videos/<name>.mp4                 H.264 and AAC, mono sound
        videos/<name>.faces.csv           time,left,top,width,height: a row a picture, the face's box in it in pixels, empty cells
                                          while less than half of the face is in the picture
        annotations/<Split>/<name>.txt    valence,arousal: a row a picture
        truth/<name>.csv                  time,valence,arousal, then 0 or 1: what is broken in the picture or its sound, a column
                                          for each of BREAKAGES, and whether the person speaks

    The folder appears whole or not at all. The same arguments give the same annotations, truth, pictures and sound.
    Raises FileExistsError where `out` holds something, TypeError and ValueError for arguments that do not fit.
    """
    counts = {"train": train, "validation": validation, "test": test}
    for name, value in (("seed", seed), *counts.items()):
        check_int(name, value, 0)
    if not sum(counts.values()):
        raise ValueError("train, validation, test: expected a video at least, got none")
    seconds, size = _pair("seconds", seconds), _pair("size", size)
    if not _SHORTEST <= seconds[0] <= seconds[1] < math.inf:
        raise ValueError(f"seconds: expected {_SHORTEST:g} <= shortest <= longest, got {seconds}")
    check_number("fps", fps, "in [5, 120]", lambda f: 5 <= f <= 120)
    if not all(isinstance(s, int) and 64 <= s <= 4096 and s % 2 == 0 for s in size) or size[0] < size[1]:
        raise ValueError(f"size: expected even width >= height in [64, 4096], got {size}")
    check_bool("clean", clean)
    root = Path(os.path.abspath(out))
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"out: expected a folder that is empty or new, got {root}, which holds something")
    require("cv2", "video")
    require("av", "video")
    rate = Fraction(fps).limit_denominator(1001)
    names = []
    with replacing_folder(root) as part:
        for folder in ("videos", "truth", *(f"annotations/{split}" for split in SPLITS.values())):
            (part / folder).mkdir(parents=True)
        for s, (split, folder) in enumerate(SPLITS.items()):
            kinds = _kinds(np.random.default_rng([seed, s]))
            for i in range(counts[split]):
                names.append(f"{split}_{i + 1:02d}")
                scene = _Scene((seed, s, i), seconds, rate, size, kinds, clean)
                _write(part, folder, names[-1], scene)
    return [root / "videos" / f"{name}.mp4" for name in names]


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    try:
        first, second = value
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected two numbers, got {value!r}") from None
    for number in (first, second):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name}: expected two numbers, got {value!r}")
    return first, second


def _write(root: Path, folder: str, name: str, scene: _Scene) -> None:
    with open(root / "videos" / f"{name}.mp4", "wb") as file, _Film(file, scene.size, scene.fps, scene.rate) as film:
        heard = 0
        for t, picture in enumerate(scene.pictures()):
            film.picture(picture, t)
            until = round((t + 1) / scene.fps * scene.rate)
            film.sound(scene.sound[heard:until])
            heard = until
    boxes = ["time,left,top,width,height"]
    labels = [ANNOTATION_HEADER]
    truth = [",".join(["time", "valence", "arousal", *BREAKAGES, "speaking"])]
    flags = np.stack([*scene.broken.values(), scene.speaking], axis=1).astype(int)
    for t, time in enumerate(scene.times):
        cells = ["" if math.isnan(x) else f"{x:.2f}" for x in scene.boxes[t]]
        boxes.append(",".join([f"{time:.6f}", *cells]))
        felt = f"{scene.valence[t]:.4f},{scene.arousal[t]:.4f}"
        labels.append(felt)
        truth.append(f"{time:.6f},{felt},{','.join(map(str, flags[t]))}")
    for path, lines in (
        (root / "videos" / f"{name}.faces.csv", boxes),
        (root / "annotations" / folder / f"{name}.txt", labels),
        (root / "truth" / f"{name}.csv", truth),
    ):
        write_atomic(path, "\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------------- breaking what there is
def break_video(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sound: str | None = None,
    picture: str | None = None,
    seed: int = 0,
) -> None:
    """Writes the video `path` again as `out`, an MP4 file, with its sound or its picture broken from beginning to end.

    sound    None: as it is; "babble": other people talk as loudly as what is heard; "silence"; "foreign": somebody else talks
             instead, as loudly
    picture  None: as it is; "occluded": the face is covered from below the eyes down (the middle of the picture where
             the stock detector of OpenCV finds no face); "dark"; "frozen": the first picture stays

    Pictures keep their times, counted from the first one's; they are at most as large as analysis uses them, the sound is mono of
    16 kHz. `out` appears whole or not at all. Raises ValueError where the video lacks what is to be broken.
    """
    from .decode import Media, Sound

    for name, value, known in (("sound", sound, SOUNDS), ("picture", picture, PICTURES)):
        if value is not None and value not in known:
            raise ValueError(f"{name}: expected None, {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
    check_int("seed", seed, 0)
    if os.path.realpath(path) == os.path.realpath(out):
        raise ValueError(f"out: expected another file than path, got {out}")
    with Media(path) as media:
        for name, value, there in (("sound", sound, media.sound), ("picture", picture, media.picture)):
            if value is not None and not there:
                raise ValueError(f"{name}: expected None for a video without {name}, got {value!r} for {path}")
        spoil = _Spoiler(np.random.default_rng([seed, 1]), sound, picture, path)
        rate = _RATE if media.sound else None
        fps = Fraction(media.rate or 30).limit_denominator(1001)
        with replacing(out) as file, contextlib.ExitStack() as stack:
            film = None if media.picture else stack.enter_context(_Film(file, None, fps, rate))
            early = []  # sound that comes before the first picture, which tells the size
            for piece in media.play():
                if isinstance(piece, Sound):
                    samples = spoil.sound(piece.samples)
                    if film is None:
                        early.append(samples)
                    else:
                        film.sound(samples)
                    continue
                rgb = spoil.picture(piece)
                if film is None:
                    film = stack.enter_context(_Film(file, (rgb.shape[1], rgb.shape[0]), fps, rate, _CLOCK))
                    for samples in early:
                        film.sound(samples)
                film.picture(rgb, round(piece.time / _CLOCK), round(piece.duration / _CLOCK))


class _Spoiler:
    """What break_video does to sound and pictures as they come."""

    def __init__(
        self, rng: np.random.Generator, sound: str | None, picture: str | None, path: str | os.PathLike[str]
    ) -> None:
        self._cv2 = require("cv2", "video")
        self._rng, self._how = rng, picture
        self._own = 1.0 if sound in (None, "babble") else 0.0
        self._other = np.zeros(1)
        self._at = self._seen = 0
        if sound in ("babble", "foreign"):
            count = 30 * _CONTROL  # which then comes again
            other = _babble(rng, count) if sound == "babble" else _stranger(rng, count)
            self._other = other * (_loudness(_sounds(path)) / _loudness([other]))
        self._cover = _Cover(rng, (200, 160, 130), "lower")
        self._box: Sequence[float] | None = None
        self._first: np.ndarray | None = None
        if picture == "occluded":
            self._detector = self._cv2.CascadeClassifier(
                self._cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml"
            )

    def sound(self, samples: np.ndarray) -> np.ndarray:
        place = np.arange(self._at, self._at + len(samples)) % len(self._other)
        self._at += len(samples)
        mixed = self._own * np.nan_to_num(samples) + self._other[place]
        return np.clip(mixed, -1, 1).astype(np.float32)

    def picture(self, picture: Any) -> np.ndarray:
        if self._first is not None:
            return self._first
        rgb = picture.rgb
        rgb = np.ascontiguousarray(rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2])  # as H.264 wants it
        if self._how == "frozen":
            self._first = rgb
        elif self._how == "dark":
            grain = self._rng.standard_normal((*rgb.shape[:2], 1), np.float32)
            return _darken(rgb, grain)
        elif self._how == "occluded":
            if self._seen % 5 == 0 or self._box is None:
                self._box = self._find(rgb)
            self._seen += 1
            return self._cover.over(rgb, self._box, 1.0)
        return rgb

    def _find(self, rgb: np.ndarray) -> Sequence[float]:
        """The largest face; without one the last, and without that the middle of the picture."""
        height, width = rgb.shape[:2]
        scale = min(1.0, 320 / width)
        grey = self._cv2.resize(self._cv2.cvtColor(rgb, self._cv2.COLOR_RGB2GRAY), None, fx=scale, fy=scale)
        found = self._detector.detectMultiScale(grey, 1.15, 3, minSize=(40, 40))
        if len(found):
            return [float(x) / scale for x in max(found, key=lambda box: int(box[2]))]
        return self._box or (width / 2 - height / 4, height / 4, height / 2, height / 2)


def _powers(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """Mean squares of every 20 ms."""
    block = _RATE // 50
    powers, rest = [np.zeros(0)], np.zeros(0)
    for piece in pieces:
        rest = np.concatenate([rest, np.nan_to_num(piece)])
        whole = len(rest) // block * block
        powers.append(np.mean(rest[:whole].reshape(-1, block) ** 2, axis=1))
        rest = rest[whole:]
    return np.concatenate(powers)


def _loudness(pieces: Iterable[np.ndarray]) -> float:
    """Root mean square while there is something to be heard: within 15 dB of the louder parts."""
    power = _powers(pieces)
    if not power.any():
        return 0.003  # silence: what is mixed in is soft
    loud = power[power >= power.mean()].mean()
    return math.sqrt(power[power >= loud / 30].mean())


def _sounds(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    from .decode import Media, Sound

    with Media(path) as media:
        yield from (piece.samples for piece in media.play() if isinstance(piece, Sound))


# ------------------------------------------------------------------------------------------------------------- command line
def _numbers(kind: Any, separator: str, expected: str) -> Any:
    def parse(text: str) -> tuple[Any, Any]:
        first, _, second = text.partition(separator)
        try:
            return kind(first), kind(second)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sage-ext synth-video`."""
    parser.add_argument("out", metavar="OUT", help="a directory that does not exist or is empty")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same videos")
    for split, count in (("train", 8), ("validation", 4), ("test", 2)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"videos of the {split} split")
    parser.add_argument("--seconds", type=_numbers(float, ",", "two numbers A,B"), default=(20.0, 40.0), metavar="A,B",
                        help="shortest and longest video")  # fmt: skip
    parser.add_argument("--size", type=_numbers(int, "x", "two whole numbers WxH"), default=(320, 240), metavar="WxH",
                        help="width and height of the picture in pixels")  # fmt: skip
    parser.add_argument("--clean", action="store_true", help="nothing breaks")


def run(args: argparse.Namespace) -> str:
    """Does what `sage-ext synth-video` was asked for -> a sentence about it."""
    paths = write_videos(
        args.out, seed=args.seed, train=args.train, validation=args.validation, test=args.test, seconds=args.seconds,
        size=args.size, clean=args.clean,
    )  # fmt: skip
    return (
        f"{args.out}: {len(paths)} videos in videos, of them {args.train} to train, {args.validation} to validate and "
        f"{args.test} to test with; annotations and truth beside"
    )
