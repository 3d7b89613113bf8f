"""The corruption protocol: named failures of a modality, five severities each, exactly defined, seeded, reusable.

docs/robustness.md is the definition in words and formulas; this is the same in NumPy. It works on features, one array
a modality, and (`apply_waveform`, `apply_images`) on sound and faces before features are taken from them.

    condition = Condition("noise", 3, ("audio",))
    features, present = apply(condition, {"audio": x}, clip="video-7", seed=0)     # x (T, D), yours
    for condition in conditions(["audio", "visual"]):                              # the whole protocol
        clips = corrupted(dataset, condition, seed=0)                              # a sequence of Clip like `dataset`

What a corruption does depends on the condition, the clip's name, the seed and the arrays alone: not on the order of
clips, the process or the machine. Severities of one corruption, and corruptions of one kind, share their random
numbers, so that differences between them are not the luck of the draw. A frame that was absent stays absent, and
corruptions neither see nor change it. Quality of clips that have it goes with rows that are moved, see `corrupted`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .._arguments import check_number
from ..data.affwild2 import Clip, bare_name
from ..data.quality import Meter
from ..data.rates import FPS, default_frames, nearest

VERSION = 1  # of the protocol: part of every random number's key
SEVERITIES = (1, 2, 3, 4, 5)
SPAN = 60  # frames of a span, about, at 30 a second: 2 s
STAGES = 4  # of the stage chain, where no stage is given
STAGE_FRAMES = 90  # of a visit in it, on average, at 30 a second

_SNR = (15.0, 10.0, 5.0, 0.0, -5.0)
_SPANS = (0.1, 0.2, 0.3, 0.4, 0.5)
_TAIL = (0.2, 0.4, 0.6, 0.8, 1.0)

Domain = Literal["feature", "waveform", "image"]
Scopes = Literal["each", "each+all", "rotations"]


# ------------------------------------------------------------------------------------------------------------- numbers


class Draws:
    """Random numbers anyone can reproduce: Philox4x64-10, keyed by the first 128 bits of the SHA-256 of `key`.

    The key's parts are written in decimal or as they are, joined by newlines, in UTF-8, and read as two little-endian
    64-bit words; the first block's counter is 1. Each call takes the next words of the stream.
    """

    def __init__(self, *key: str | int):
        digest = hashlib.sha256("\n".join(str(part) for part in key).encode()).digest()
        self._words = np.random.Philox(key=np.frombuffer(digest[:16], "<u8").astype(np.uint64))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1): the upper 53 bits of a word each."""
        words = self._words.random_raw(math.prod(shape))
        return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def normal(self, *shape: int) -> np.ndarray:
        """float32, standard normal, by Box and Muller: words 2i and 2i + 1 make numbers 2i (cos) and 2i + 1 (sin)."""
        count = math.prod(shape)
        out = np.empty(count + count % 2, np.float32)
        for start in range(0, len(out), 1 << 18):
            pairs = self.uniform(len(out[start : start + (1 << 18)]) // 2, 2)
            radius, angle = np.sqrt(-2 * np.log1p(-pairs[:, 0])), 2 * np.pi * pairs[:, 1]
            out[start : start + 2 * len(pairs)] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
        return out[:count].reshape(shape)

    def coins(self, count: int) -> np.ndarray:
        """(count,) int64: -1 or 1, evenly (-1 where the uniform number is below 1/2)."""
        return np.where(self.uniform(count) < 0.5, -1, 1)


@dataclass(frozen=True)
class Track:
    """What a corruption is given: the n present frames of one modality of a clip, in time order.

    rows     (n, D) float32 features, (n,) float32 samples of a waveform, or (n, H, W, C) float32 images in [0, 1]
    frames   (n,) int64: where in the clip each row is
    level    the severity's entry in the corruption's `levels`
    key      (clip, modality, seed)
    hit      (n,) bool: where the corruption acts at all: all True unless it depends on the stage
    stage    (n,) int64 interaction stage, for corruptions that depend on it; else None
    donors   the present rows of other clips, (n_i, ...) each, for corruptions that need them; else empty
    stretch  rows for each frame at 30 a second: what a corruption says in such frames it multiplies by this
    """

    rows: np.ndarray
    frames: np.ndarray
    level: float
    key: tuple[str, str, int]
    hit: np.ndarray
    stage: np.ndarray | None = None
    donors: tuple[np.ndarray, ...] = ()
    stretch: float = 1.0

    @property
    def span(self) -> int:
        """Rows in a span, about."""
        return self.rows_for(SPAN)

    def rows_for(self, thirtieths: float) -> int:
        """Rows for so many frames at 30 a second, one at least."""
        return max(1, nearest(thirtieths * self.stretch))

    def draws(self, purpose: str) -> Draws:
        """This clip's and modality's random numbers for `purpose`: the same at every severity."""
        return Draws("robustness", VERSION, purpose, *self.key)

    def spans(self, share: float) -> np.ndarray:
        """(n,) int64: the number of the span that a row is in, from 0, or -1: random spans that hold exactly
        max(1, floor(share n + 1/2)) rows, one for every `span` rows of them. Every row is equally likely to be hit:
        the spans lie on a ring, and one may end at the clip's beginning."""
        total, chosen = len(self.rows), _count(share, len(self.rows))
        number = max(1, int(chosen / self.span + 0.5))
        lengths = np.full(number, chosen // number)
        lengths[: chosen % number] += 1
        turn, *places = self.draws("spans").uniform(1 + number)
        free = np.floor(np.sort(places) * (total - chosen + 1)).astype(np.int64)  # rows outside spans before each
        index = np.repeat(free, lengths) + np.arange(chosen)
        inside = np.full(total, -1, np.int64)
        inside[(index + int(turn * total)) % total] = np.repeat(np.arange(number), lengths)
        return inside

    def tail(self, share: float) -> np.ndarray:
        """(n,) bool: the last max(1, floor(share n + 1/2)) rows."""
        inside = np.zeros(len(self.rows), bool)
        inside[len(inside) - _count(share, len(inside)) :] = True
        return inside

    def visits(self, share: float) -> np.ndarray:
        """(n,) bool: `hit` in max(1, floor(share V + 1/2)) of its V visits. A visit is a run of one stage."""
        stage = np.asarray(self.stage)
        visit = np.cumsum(np.diff(stage, prepend=stage[:1]) != 0)
        numbers = np.unique(visit[self.hit])
        if len(numbers) == 0:
            return self.hit
        order = np.argsort(self.draws("visits").uniform(len(numbers)), kind="stable")
        return np.isin(visit, numbers[order[: _count(share, len(numbers))]])

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (population) of each feature over the clip's present frames, (D,) float64."""
        return self.rows.mean(0, dtype=np.float64), self.rows.std(0, dtype=np.float64)

    def foreign(self) -> np.ndarray:
        """(n, D) the donor's rows that run beside the clip: from a random one on, and back and forth at its ends."""
        donor = self.donors[0]
        last = len(donor) - 1
        index = self.frames + int(self.draws("donor-start").uniform(1)[0] * len(donor))
        index = index % max(1, 2 * last)
        return donor[np.where(index > last, 2 * last - index, index)]


def _count(share: float, total: int) -> int:
    return min(total, max(1, math.floor(share * total + 0.5)))


# ------------------------------------------------------------------------------------------------------------ registry


@dataclass(frozen=True)
class Corruption:
    """A named way to fail.

    name, about  what it is called and what it does, in a sentence
    levels       what severities 1 to 5 mean, in `unit`
    function     Track -> the changed rows, shape and dtype of `track.rows`; a feature row that holds NaN in the result
                 is a missing frame whose mask says so
    domain       "feature", "waveform" or "image"
    moves        it does nothing but put rows in other rows' places: their quality goes with them
    scopes       which modalities `conditions` lets fail: "each" alone, "each+all": also all at once, or "rotations":
                 all, in turn by stage: modality k of K fails in the stages s with s mod K = k
    donors       it needs other clips
    moves        every row of the result is a row of the clip or of the donor, chosen whatever they hold: quality goes with it
    """

    name: str
    about: str
    levels: tuple[float, ...]
    unit: str
    function: Callable[[Track], np.ndarray]
    domain: Domain = "feature"
    scopes: Scopes = "each"
    donors: bool = False
    moves: bool = False

    def __post_init__(self) -> None:
        if len(self.levels) != len(SEVERITIES):
            raise ValueError(f"levels: expected {len(SEVERITIES)}, mildest first, got {self.levels}")
        for name, allowed in (
            ("domain", ("feature", "waveform", "image")),
            ("scopes", ("each", "each+all", "rotations")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")


CORRUPTIONS: dict[str, Corruption] = {}


def corruption(
    name: str,
    about: str,
    levels: Sequence[float],
    unit: str,
    *,
    domain: Domain = "feature",
    scopes: Scopes = "each",
    donors: bool = False,
    moves: bool = False,
) -> Callable[[Callable[[Track], np.ndarray]], Callable[[Track], np.ndarray]]:
    """Decorator that adds a function of a `Track` to `CORRUPTIONS`; arguments as in `Corruption`.

    Raises ValueError if the name is taken.
    """

    def register(function: Callable[[Track], np.ndarray]) -> Callable[[Track], np.ndarray]:
        if name in CORRUPTIONS:
            raise ValueError(f"name: expected one that no corruption has, got {name!r}")
        CORRUPTIONS[name] = Corruption(name, about, tuple(levels), unit, function, domain, scopes, donors, moves)
        return function

    return register


@dataclass(frozen=True)
class Condition:
    """A corruption at a severity (1 to 5) in some modalities. Their order means something only where the corruption
    depends on the stage. Raises ValueError for what does not exist."""

    corruption: str
    severity: int
    modalities: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", _names("modalities", self.modalities))
        if self.corruption not in CORRUPTIONS:
            raise ValueError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got {self.corruption!r}")
        if isinstance(self.severity, bool) or not isinstance(self.severity, int | np.integer):
            raise TypeError(f"severity: expected an integer, got {self.severity!r}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity: expected 1 to 5, got {self.severity}")
        object.__setattr__(self, "severity", int(self.severity))
        if CORRUPTIONS[self.corruption].scopes == "rotations" and len(self.modalities) < 2:
            raise ValueError(
                f"modalities: expected two or more, which {self.corruption} hits in turn, got {self.modalities}"
            )

    @property
    def name(self) -> str:
        """`<corruption>-<severity>-<modality>+<modality>`, safe in a file name (odd characters %-quoted)."""
        modalities = "+".join(urllib.parse.quote(modality, safe="") for modality in self.modalities)
        return f"{urllib.parse.quote(self.corruption, safe='')}-{self.severity}-{modalities}"


def conditions(
    modalities: Sequence[str], corruptions: Iterable[str] | None = None, severities: Iterable[int] = SEVERITIES
) -> list[Condition]:
    """The conditions of a study: every corruption, in the modalities that its `scopes` say, at every severity.

    corruptions  names; default `PROTOCOL`, all the built-in ones of features. For two modalities these are 43
                 conditions a severity, 215 in all; `severities=(3,)` is the obvious smaller study.
    """
    modalities = _names("modalities", modalities)
    chosen = PROTOCOL if corruptions is None else _names("corruptions", corruptions)
    severities = tuple(severities)
    found = []
    for name in chosen:
        if name not in CORRUPTIONS:
            raise ValueError(f"corruptions: expected names among {', '.join(CORRUPTIONS)}, got {name!r}")
        found += [
            Condition(name, severity, scope)
            for scope in _scopes(CORRUPTIONS[name].scopes, modalities)
            for severity in severities
        ]
    return found


def _scopes(scopes: Scopes, modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    if len(modalities) == 1:
        return [] if scopes == "rotations" else [modalities]
    if scopes == "rotations":
        return [modalities[k:] + modalities[:k] for k in range(len(modalities))]
    return [(modality,) for modality in modalities] + ([modalities] if scopes == "each+all" else [])


def _names(argument: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError(f"{argument}: expected a sequence of names, got the string {values!r}")
    values = tuple(values)
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{argument}: expected names, got {values!r}")
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{argument}: expected one or more different names, got {values!r}")
    return values


# ----------------------------------------------------------------------------------------------------------- application


def apply(
    condition: Condition,
    features: Mapping[str, Any],
    present: Mapping[str, np.ndarray] | None = None,
    *,
    clip: str,
    seed: int,
    donor: Mapping[str, Any] | None = None,
    stage: np.ndarray | None = None,
    fps: float = FPS,
    span: float | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Corrupts the features of one clip.

    features  modality -> (T_m, D_m) floating point; computed in and returned as float32
    present   modality -> (T,) bool: the frame has that modality; default: it has where there is a row. A frame beyond
              T_m, or whose row holds NaN, has not, whatever this says; rows beyond T are passed on as they are
    clip      the clip's name, `seed` an int: with the modality's name they key every random number
    donor     modality -> (n, D_m) rows of another clip (rows that hold NaN are left out), n >= 1; for `foreign`,
              `foreign-spans` and `stage-foreign`
    stage     (T,) integers >= 0: the interaction stage of each frame, for the corruptions that depend on it; default:
              a random chain (docs/robustness.md)
    fps       frames a second
    span      seconds of a span; shifts and stages are in proportion to it. Default: 2 s, as the protocol says, and more
              below 7.5 frames a second (`data.rates`)

    Returns new (features, present) with the same keys; nothing given is changed. A frame that becomes absent has
    `present` False and a row of zeros.

    Raises TypeError for a wrong type or dtype; ValueError for a wrong shape or value, infinite features, a modality or
    donor that is not there.
    """
    out, masks, _ = _applied(condition, features, present, {}, clip, seed, donor, {}, stage, fps, span, None)
    return out, masks


def _applied(
    condition: Condition,
    features: Mapping[str, Any],
    present: Mapping[str, np.ndarray] | None,
    quality: Mapping[str, np.ndarray],
    clip: str,
    seed: int,
    donor: Mapping[str, Any] | None,
    donor_quality: Mapping[str, np.ndarray],
    stage: np.ndarray | None,
    fps: float,
    span: float | None,
    meter: Meter | None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `apply` gives, and the quality, for the modalities of which `quality` has it: (T_m, Q_m) float32, a row for each
    row of the features; `donor_quality` (n, Q_m) has one for each row of the donor."""
    spec, key, stretch = _spec(condition, "feature"), _key(clip, seed), _stretch(fps, span)
    for argument, value in (("features", features), ("present", present), ("donor", donor)):
        if not isinstance(value, Mapping) and (value is not None or argument == "features"):
            raise TypeError(f"{argument}: expected a mapping from modality to array, got {type(value).__name__}")
    out = {name: _floating(f"features[{name!r}]", value, 2) for name, value in features.items()}
    known = {name: np.array(rows, np.float32) for name, rows in quality.items()}
    for name in condition.modalities:
        if name not in out:
            raise ValueError(
                f"features: expected the modality {name!r} of {condition.name}, got {', '.join(out) or 'none'}"
            )
    if present is None:
        frames = max(len(rows) for rows in out.values())
        present = {name: np.arange(frames) < len(rows) for name, rows in out.items()}
    masks = {name: _mask(present, name) for name in out}
    frames = len(next(iter(masks.values())))
    for name, mask in masks.items():
        if len(mask) != frames:
            raise ValueError(f"present: expected masks of one length, got {frames} and {len(mask)} ({name!r})")
    if spec.scopes == "rotations":
        stage = _chain(*key, frames, stretch) if stage is None else _stage(stage, frames)
    for position, name in enumerate(condition.modalities):
        rows, mask = out[name], masks[name]
        covered = min(frames, len(rows))
        where = np.flatnonzero(mask[:covered] & ~np.isnan(rows[:covered]).any(axis=1))
        seen = rows[where]
        if not np.isfinite(seen).all():
            row = int(where[np.argmax(~np.isfinite(seen).all(axis=1))])
            raise ValueError(f"features[{name!r}]: expected finite float32 values, got infinity in row {row}")
        donors: tuple[np.ndarray, ...] = ()
        if spec.donors:
            theirs, kept = _donor(donor, name, rows.shape[1])
            donors = (theirs,)
        if len(where) == 0:
            continue
        here = None if spec.scopes != "rotations" or stage is None else stage[where].astype(np.int64)
        hit = np.ones(len(where), bool) if here is None else here % len(condition.modalities) == position
        level = spec.levels[condition.severity - 1]
        track = Track(seen, where, level, (key[0], name, key[1]), hit, here, donors, stretch)
        changed = _checked(spec, track)
        gone = np.isnan(changed).any(axis=1)
        mask[where[gone]] = False
        rows[where] = np.where(gone[:, None], np.float32(0), changed)
        if name in known:
            measured = known[name][where]
            if spec.moves:
                others = (donor_quality[name][kept],) if spec.donors else ()
                measured = _checked(spec, dataclasses.replace(track, rows=measured, donors=others))
            elif meter is not None:
                measured = meter(name, measured, seen, changed, track.moments()[1])
            known[name][where] = np.where(gone[:, None], np.float32(np.nan), measured)
    return out, masks, known


def _stretch(fps: float, span: float | None) -> float:
    """Frames for each frame at 30 a second."""
    for name, value in (("fps", fps), ("span", span)):
        if value is not None:
            check_number(name, value, "> 0 and finite", lambda x: 0 < x < math.inf)
    return default_frames(1.0, fps) if span is None else span * fps / SPAN


def corrupted(
    clips: Sequence[Clip],
    condition: Condition,
    seed: int,
    *,
    stages: Mapping[str, np.ndarray] | None = None,
    span: float | None = None,
    donors: Sequence[Clip] = (),
    meter: Meter | None = None,
) -> Sequence[Clip]:
    """`clips` under `condition`: a sequence of the same length whose clips have their features, `present` and quality
    replaced, computed whenever a clip is asked for; labels and the modalities that do not fail are passed on.

    A donor is drawn for each clip and modality among the clips of other videos (`_left` and `_right` of one video are
    no donors of each other: they share a track) that have that modality at all, by a hash of the names: which one
    does not depend on the order of clips.

    stages: clip name -> (T,) integers, the true stages where they are known (synthetic data: truth/<name>.npz). `span`: as
    in `apply`; the rate is the clip's own. `donors`: clips beside `clips` that may be donors too.

    Quality goes with rows that are moved (frozen, foreign, misaligned) and is unknown in frames that become absent. Where
    numbers are altered it stays, or is what `meter` says: a function of the modality, the quality of the present rows
    (n, Q), NaN where unknown, their features before and after (n, D), NaN in rows that are lost, and the features'
    standard deviations (D,) before.

    Raises ValueError where a donor is needed and all clips are of one video; on access what `apply` raises.
    """
    return _Corrupted(clips, condition, operator.index(seed), stages, span, donors, meter)


class _Corrupted(Sequence[Clip]):
    def __init__(
        self,
        clips: Sequence[Clip],
        condition: Condition,
        seed: int,
        stages: Mapping[str, np.ndarray] | None,
        span: float | None,
        donors: Sequence[Clip],
        meter: Meter | None,
    ):
        self._meter = meter
        self._clips, self._condition, self._seed, self._stages, self._span = clips, condition, seed, stages, span
        self._meter = meter
        self._needs_donor = _spec(condition, "feature").donors
        self._others = [(clips, i) for i in range(len(clips))] + [(donors, i) for i in range(len(donors))]
        self._names = [source[i].name for source, i in self._others] if self._needs_donor else []
        if self._needs_donor and len({bare_name(name) for name in self._names}) == 1:
            raise ValueError(
                f"clips: expected clips of two videos or more, for {condition.name} needs a donor, got {self._names}"
            )

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override]
        clip, names = self._clips[operator.index(index)], self._condition.modalities
        for name in names:
            if name not in clip.features:
                raise ValueError(
                    f"clips: expected the modality {name!r} in {clip.name}, got {', '.join(clip.features)}"
                )
        features = {name: clip.features[name][:] for name in names}
        quality = {name: _beside(clip.quality[name], len(features[name])) for name in names if name in clip.quality}
        donor: dict[str, np.ndarray] = {}
        donor_quality: dict[str, np.ndarray] = {}
        for name in names if self._needs_donor else ():
            donor[name], measured = self._donor(clip.name, name)
            if name in quality:
                unknown = np.full((len(donor[name]), quality[name].shape[1]), np.nan, np.float32)
                donor_quality[name] = unknown
                if measured is not None and measured.shape == unknown.shape:
                    donor_quality[name] = measured
        features, present, quality = _applied(
            self._condition,
            features,
            {name: clip.present[name] for name in names},
            quality,
            clip.name,
            self._seed,
            donor if self._needs_donor else None,
            donor_quality,
            None if self._stages is None else self._stages.get(clip.name),
            clip.fps,
            self._span,
            self._meter,
        )
        return dataclasses.replace(
            clip,
            features={name: features.get(name, value) for name, value in clip.features.items()},
            present={name: present[name] if name in present else clip.present[name] for name in clip.features},
            quality={name: quality.get(name, value) for name, value in clip.quality.items()},
        )

    def _donor(self, clip: str, modality: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(n, D) the rows that another video's clip has, and (n, Q) their quality, if the clip has any."""
        others = [k for k, name in enumerate(self._names) if bare_name(name) != bare_name(clip)]
        for k in sorted(others, key=lambda k: donor_rank(clip, self._names[k], modality, self._seed)):
            source, place = self._others[k]
            other = source[place]
            rows = np.asarray(other.features[modality][: other.num_frames])
            here = np.asarray(other.present[modality])[: len(rows)]
            if here.any():
                measured = other.quality.get(modality)
                return rows[here], None if measured is None else _beside(measured, len(rows))[here]
        raise ValueError(f"clips: expected {modality!r} in a clip of another video than {clip}, got none")


def _beside(quality: Any, count: int) -> np.ndarray:
    """(count, Q) float32 quality of `count` rows of features, unknown beyond its end."""
    known = np.asarray(quality[:count], dtype=np.float32)
    return np.concatenate([known, np.full((count - len(known), known.shape[1]), np.nan, np.float32)])


def apply_waveform(
    condition: Condition, waveform: np.ndarray, rate: float, *, clip: str, seed: int, donors: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Corrupts one waveform, before features are taken from it.

    condition  of a corruption of the domain "waveform" in one modality, whose name is part of the random numbers' key
    waveform   (N,) floating point, finite; computed in float32
    rate       samples a second
    donors     other waveforms of that rate, (n_i,) each, not silent: for `waveform-babble`, which sums them all

    Returns a new (N,) float32 array. It is not clipped to [-1, 1]. Raises TypeError for a wrong type or dtype,
    ValueError for a wrong shape or value, or where donors are needed and none are given.
    """
    spec = _spec(condition, "waveform")
    samples = _finite("waveform", _floating("waveform", waveform, 1))
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"rate: expected samples a second > 0, got {rate!r}")
    others = tuple(_finite(f"donors[{k}]", _floating(f"donors[{k}]", donor, 1)) for k, donor in enumerate(donors))
    if spec.donors and not (others and all(donor.any() for donor in others)):
        raise ValueError(f"donors: expected waveforms for {spec.name}, none of them silent, got {len(others)}")
    return _whole(spec, condition, samples, clip, seed, others if spec.donors else (), rate / FPS)


def apply_images(condition: Condition, images: np.ndarray, *, clip: str, seed: int) -> np.ndarray:
    """Corrupts the images of one clip, before features are taken from them.

    condition  of a corruption of the domain "image" in one modality, whose name is part of the random numbers' key
    images     (T, H, W, C) uint8, or floating point in [0, 1]; computed in float32

    Returns a new array of that shape, uint8 for uint8 and float32 otherwise. Raises TypeError for a wrong type or
    dtype, ValueError for a wrong shape or value.
    """
    spec, given = _spec(condition, "image"), np.asarray(images)
    if given.dtype == np.uint8:
        images = given.astype(np.float32) / np.float32(255)
    else:
        images = given
    pixels = _floating("images", images, 4)
    if not ((pixels >= 0) & (pixels <= 1)).all():
        raise ValueError(f"images: expected floating point in [0, 1], got {pixels.min()} to {pixels.max()}")
    out = _whole(spec, condition, pixels, clip, seed, (), 1.0)
    return np.rint(out * 255).astype(np.uint8) if given.dtype == np.uint8 else out


def _whole(
    spec: Corruption, condition: Condition, rows: np.ndarray, clip: str, seed: int, donors: tuple, stretch: float
) -> np.ndarray:
    """`rows` without gaps under `condition`."""
    if len(condition.modalities) != 1:
        raise ValueError(f"condition: expected one modality, got {len(condition.modalities)} in {condition.name}")
    if rows.size == 0:
        return rows
    name, seed = _key(clip, seed)
    every, level = np.ones(len(rows), bool), spec.levels[condition.severity - 1]
    key = (name, condition.modalities[0], seed)
    return _checked(spec, Track(rows, np.arange(len(rows)), level, key, every, None, donors, stretch))


def _key(clip: str, seed: int) -> tuple[str, int]:
    if not isinstance(clip, str):
        raise TypeError(f"clip: expected a name, got {type(clip).__name__}")
    try:
        return clip, operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}") from None


def _finite(argument: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ValueError(f"{argument}: expected finite values, got {array[~np.isfinite(array)][0]}")
    return array


def donor_rank(clip: str, other: str, modality: str, seed: int) -> str:
    """The donor of a clip is the clip `other` with the least rank: a SHA-256 in hexadecimal digits."""
    key = "\n".join(["robustness", str(VERSION), "donor", clip, modality, str(seed), other])
    return hashlib.sha256(key.encode()).hexdigest()


def _spec(condition: Condition, domain: Domain) -> Corruption:
    if not isinstance(condition, Condition):
        raise TypeError(f"condition: expected a Condition, got {type(condition).__name__}")
    spec = CORRUPTIONS.get(condition.corruption)
    if spec is None:  # it came from another process
        raise ValueError(
            f"condition: expected a corruption that is registered in this process, got {condition.corruption!r}"
        )
    if spec.domain != domain:
        raise ValueError(
            f"condition: expected a corruption of the domain {domain!r}, got {spec.name} of {spec.domain!r}"
        )
    return spec


def _checked(spec: Corruption, track: Track) -> np.ndarray:
    changed = np.asarray(spec.function(track))
    if changed.shape != track.rows.shape:
        raise ValueError(
            f"{spec.name}: expected rows of the shape {track.rows.shape}, got {changed.shape} from its function"
        )
    return changed.astype(np.float32, copy=False)


def _floating(argument: str, value: Any, axes: int) -> np.ndarray:
    """A new float32 array."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{argument}: expected floating point, got {array.dtype}")
    if array.ndim != axes:
        raise ValueError(f"{argument}: expected {axes} axes, got the shape {array.shape}")
    return np.array(array, np.float32)


def _mask(present: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in present:
        raise ValueError(f"present: expected a mask for {name!r}, got {', '.join(present) or 'none'}")
    mask = np.array(present[name])
    if mask.dtype != bool:
        raise TypeError(f"present[{name!r}]: expected bool, got {mask.dtype}")
    if mask.ndim != 1:
        raise ValueError(f"present[{name!r}]: expected the shape (T,), got {mask.shape}")
    return mask


def _stage(stage: np.ndarray, frames: int) -> np.ndarray:
    stage = np.asarray(stage)
    if not np.issubdtype(stage.dtype, np.integer):
        raise TypeError(f"stage: expected integers, got {stage.dtype}")
    if stage.shape != (frames,):
        raise ValueError(f"stage: expected the shape ({frames},), got {stage.shape}")
    if (stage < 0).any():
        raise ValueError(f"stage: expected integers >= 0, got {stage.min()}")
    return stage


def _chain(clip: str, seed: int, frames: int, stretch: float) -> np.ndarray:
    """(T,) a Markov chain that leaves its stage with probability 1 / STAGE_FRAMES, for any other one evenly."""
    mean = max(1.0, STAGE_FRAMES * stretch)
    leave, which = Draws("robustness", VERSION, "stage", clip, "", seed).uniform(frames, 2).T
    steps = np.where(leave < 1 / mean, 1 + np.floor(which * (STAGES - 1)), 0)
    steps[:1] = np.floor(which[:1] * STAGES)
    return np.cumsum(steps.astype(np.int64)) % STAGES


def _donor(donor: Mapping[str, Any] | None, name: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, dim) its rows, and which of those that were given they are."""
    if donor is None or name not in donor:
        raise ValueError(f"donor: expected another clip's rows of {name!r}, got none")
    rows = _floating(f"donor[{name!r}]", donor[name], 2)
    kept = ~np.isnan(rows).any(axis=1)
    rows = rows[kept]
    if len(rows) == 0 or rows.shape[1] != dim or not np.isfinite(rows).all():
        raise ValueError(f"donor[{name!r}]: expected one or more finite rows of {dim} features, got {rows.shape}")
    return rows, kept


# ------------------------------------------------------------------------------------------------- corruptions: features


def _where(inside: np.ndarray, instead: np.ndarray | float, rows: np.ndarray) -> np.ndarray:
    return np.where(inside[:, None], instead, rows).astype(np.float32, copy=False)


def _noisy(track: Track) -> np.ndarray:
    out, (_, deviation) = track.rows.copy(), track.moments()
    noise = track.draws("noise").normal(len(out), out.shape[1])[track.hit]
    if len(noise):
        scale = deviation * 10 ** (-track.level / 20) / np.sqrt(np.mean(np.square(noise, dtype=np.float64), axis=0))
        out[track.hit] += noise * scale.astype(np.float32)
    return out


def _held(track: Track, inside: np.ndarray) -> np.ndarray:
    """The rows stand still, in each run of `inside`, at the row before it (at its first where there is none)."""
    source = np.arange(len(inside))
    source[inside] = 0
    return track.rows[np.maximum.accumulate(source)]


@corruption("noise", "white noise at a signal-to-noise ratio, clip-long", _SNR, "dB", scopes="each+all")
def _noise(track: Track) -> np.ndarray:
    return _noisy(track)


@corruption("occluded", "spans in which the features are an occluder's", _SPANS, "share of frames", scopes="each+all")
def _occluded(track: Track) -> np.ndarray:
    span, (mean, deviation) = track.spans(track.level), track.moments()
    count, dim = span.max() + 1, track.rows.shape[1]
    looks = track.draws("occluder").normal(int(count), dim)  # one for each span
    jitter = track.draws("occluder-jitter").normal(len(span), dim)
    return _where(span >= 0, mean + deviation * (looks[span] + 0.1 * jitter), track.rows)


@corruption("zeroed-spans", "spans of zeros, unannounced", _SPANS, "share of frames", scopes="each+all")
def _zeroed_spans(track: Track) -> np.ndarray:
    return _where(track.spans(track.level) >= 0, 0.0, track.rows)


@corruption(
    "frozen-spans", "spans in which the features stand still", _SPANS, "share of frames", scopes="each+all", moves=True
)
def _frozen_spans(track: Track) -> np.ndarray:
    return _held(track, track.spans(track.level) >= 0)


@corruption(
    "missing-spans", "spans that are absent, and the mask says so", _SPANS, "share of frames", scopes="each+all"
)
def _missing_spans(track: Track) -> np.ndarray:
    return _where(track.spans(track.level) >= 0, np.nan, track.rows)


@corruption("foreign-spans", "spans of another clip", _SPANS, "share of frames", donors=True, moves=True)
def _foreign_spans(track: Track) -> np.ndarray:
    return _where(track.spans(track.level) >= 0, track.foreign(), track.rows)


@corruption("dead-zeroed", "zeros from a moment on, unannounced", _TAIL, "share of the clip, from its end")
def _dead_zeroed(track: Track) -> np.ndarray:
    return _where(track.tail(track.level), 0.0, track.rows)


@corruption("dead-frozen", "stands still from a moment on", _TAIL, "share of the clip, from its end", moves=True)
def _dead_frozen(track: Track) -> np.ndarray:
    return _held(track, track.tail(track.level))


@corruption(
    "dead-saturated", "each feature stuck at an extreme from a moment on", _TAIL, "share of the clip, from its end"
)
def _dead_saturated(track: Track) -> np.ndarray:
    up = track.draws("extremes").coins(track.rows.shape[1]) > 0
    return _where(track.tail(track.level), np.where(up, track.rows.max(0), track.rows.min(0)), track.rows)


@corruption("dead-noise", "nothing but noise from a moment on", _TAIL, "share of the clip, from its end")
def _dead_noise(track: Track) -> np.ndarray:
    mean, deviation = track.moments()
    noise = track.draws("noise").normal(*track.rows.shape)
    return _where(track.tail(track.level), mean + deviation * noise, track.rows)


@corruption("missing", "absent from a moment on, and the mask says so", _TAIL, "share of the clip, from its end")
def _missing(track: Track) -> np.ndarray:
    return _where(track.tail(track.level), np.nan, track.rows)


@corruption(
    "foreign", "another clip from a moment on", _TAIL, "share of the clip, from its end", donors=True, moves=True
)
def _foreign(track: Track) -> np.ndarray:
    return _where(track.tail(track.level), track.foreign(), track.rows)


@corruption("misaligned", "early or late by a while", (5, 10, 20, 40, 80), "frames at 30 a second", moves=True)
def _misaligned(track: Track) -> np.ndarray:
    shift = track.rows_for(track.level)
    if track.draws("direction").coins(1)[0] < 0:  # early: the first present row at or after t + shift
        index = np.searchsorted(track.frames, track.frames + shift, side="left")
    else:  # late: the last present row at or before t - shift
        index = np.searchsorted(track.frames, track.frames - shift, side="right") - 1
    return track.rows[np.clip(index, 0, len(track.rows) - 1)]


@corruption("gain", "louder or quieter, clip-long", (3, 6, 9, 12, 15), "dB", scopes="each+all")
def _gain(track: Track) -> np.ndarray:
    return track.rows * np.float32(10 ** (track.draws("direction").coins(1)[0] * track.level / 20))


@corruption("drift", "drifts away steadily", (0.5, 1, 2, 3, 4), "standard deviations at the end", scopes="each+all")
def _drift(track: Track) -> np.ndarray:
    _, deviation = track.moments()
    since = track.frames - track.frames[0]
    ramp = since / max(1, since[-1])
    return (
        track.rows + ramp[:, None] * (track.level * deviation * track.draws("direction").coins(len(deviation)))
    ).astype(np.float32)


@corruption("stage-noise", "white noise in the modality whose stage it is", _SNR, "dB", scopes="rotations")
def _stage_noise(track: Track) -> np.ndarray:
    return _noisy(track)


@corruption("stage-zeroed", "zeros, unannounced, in turn by stage", _TAIL, "share of visits", scopes="rotations")
def _stage_zeroed(track: Track) -> np.ndarray:
    return _where(track.visits(track.level), 0.0, track.rows)


@corruption(
    "stage-foreign",
    "another clip in turn by stage",
    _TAIL,
    "share of visits",
    scopes="rotations",
    donors=True,
    moves=True,
)
def _stage_foreign(track: Track) -> np.ndarray:
    return _where(track.visits(track.level), track.foreign(), track.rows)


PROTOCOL: tuple[str, ...] = tuple(CORRUPTIONS)  # the built-in corruptions of features


# --------------------------------------------------------------------------------------- corruptions: waveforms, images


def _mixed(track: Track, noise: np.ndarray) -> np.ndarray:
    """(n,) the samples and `noise` at the level's ratio of mean squares."""
    power, disturbance = (float(np.mean(np.square(x, dtype=np.float64))) for x in (track.rows, noise))
    if disturbance == 0:
        return track.rows
    return track.rows + noise * np.float32(math.sqrt(power / disturbance) * 10 ** (-track.level / 20))


@corruption("waveform-noise", "white noise at a signal-to-noise ratio, clip-long", _SNR, "dB", domain="waveform")
def _waveform_noise(track: Track) -> np.ndarray:
    return _mixed(track, track.draws("noise").normal(len(track.rows)))


@corruption("waveform-babble", "other voices, all at once, clip-long", _SNR, "dB", domain="waveform", donors=True)
def _waveform_babble(track: Track) -> np.ndarray:
    starts, babble = track.draws("donor-start").uniform(len(track.donors)), np.zeros(len(track.rows))
    for start, donor in zip(starts, track.donors):
        loud = math.sqrt(float(np.mean(np.square(donor, dtype=np.float64))))
        babble += donor[(int(start * len(donor)) + track.frames) % len(donor)] / loud
    return _mixed(track, babble.astype(np.float32))


@corruption("waveform-clipping", "amplified, and cut off at the old peak", (6, 12, 18, 24, 30), "dB", domain="waveform")
def _waveform_clipping(track: Track) -> np.ndarray:
    peak = np.abs(track.rows).max()
    return np.clip(track.rows * np.float32(10 ** (track.level / 20)), -peak, peak)


@corruption("waveform-dropout", "spans of silence", _SPANS, "share of samples", domain="waveform")
def _waveform_dropout(track: Track) -> np.ndarray:
    return np.where(track.spans(track.level) >= 0, np.float32(0), track.rows)


@corruption(
    "image-occlusion", "spans in which a patch of one colour hides a quarter", _SPANS, "share of frames", domain="image"
)
def _image_occlusion(track: Track) -> np.ndarray:
    out, span = track.rows.copy(), track.spans(track.level)
    _, height, width, channels = out.shape
    tall, wide = (height + 1) // 2, (width + 1) // 2
    for number, draw in enumerate(track.draws("occluder").uniform(int(span.max()) + 1, 2 + channels)):
        top, left = int(draw[0] * (height - tall + 1)), int(draw[1] * (width - wide + 1))
        out[span == number, top : top + tall, left : left + wide] = draw[2:]
    return out


@corruption(
    "image-noise", "Gaussian noise, clip-long", (0.05, 0.1, 0.2, 0.3, 0.4), "standard deviation", domain="image"
)
def _image_noise(track: Track) -> np.ndarray:
    out, draws = track.rows.copy(), track.draws("noise")
    for image in out:
        image += np.float32(track.level) * draws.normal(*image.shape)
    return np.clip(out, 0, 1, out=out)


@corruption(
    "image-blur", "Gaussian blur, clip-long", (0.01, 0.02, 0.03, 0.05, 0.08), "of the shorter side", domain="image"
)
def _image_blur(track: Track) -> np.ndarray:
    width = track.level * min(track.rows.shape[1:3])
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    out = np.empty_like(track.rows)
    for start in range(0, len(out), 16):
        block = track.rows[start : start + 16]
        for axis in (1, 2):
            size = block.shape[axis]
            padded = np.pad(block, [(reach, reach) if k == axis else (0, 0) for k in range(4)], mode="edge")
            block = np.zeros_like(block)
            for k, weight in enumerate(kernel):  # in order: the same bits everywhere
                block += weight * padded[(slice(None),) * axis + (slice(k, k + size),)]
        out[start : start + 16] = block
    return np.clip(out, 0, 1, out=out)


@corruption("image-blackout", "black frames", _SPANS, "share of frames", domain="image")
def _image_blackout(track: Track) -> np.ndarray:
    return np.where((track.spans(track.level) >= 0)[:, None, None, None], np.float32(0), track.rows)
