"""A synthetic data set in the Aff-Wild2 layout, whose true reliabilities are known.

The world, per frame t and person, independent of any model:

    z_t   (6,) unit-variance latents: valence and arousal (smooth, correlated, with a mean per video), 4 nuisances
    y_t   = tanh(0.8 z_t[:2]): the annotation
    s_t   interaction stage, a Markov chain: speaking, listening, turn-taking, silence
    u_mt  = z_t + sqrt(v_mt) e_mt: what modality m sees; e is unit-variance autoregressive noise, v its *noise
            variance*: by stage (audio is good while speaking, visual while listening or silent, neither in
            turn-taking), plus bursts of corruption, plus, for the face, occlusions
    g_mt  loudness or contrast: by stage, by video, by chance; low in silence and under occlusion
    h_mt  = tanh(W [g u ; stage]): a random map; x_mt = A h + c + (offset of the video) + noise: correlated
            dimensions, a mean far from zero, some dimensions dead (constant or zero)

The amplitude of x therefore carries a trace of v (noise drives the map harder, silence and occlusion quieten it)
without telling it. True reliability is r = 1 / (1 + v / kappa^2) with kappa = 1, the standard deviation of a latent:
the share of signal in the variance of what the modality sees, 0 where it is absent. Inverse-variance weights are then
proportional to r / (1 - r).

Two persons of one video (`_left`, `_right`) have each their own face and annotation and one audio track, which
follows whoever speaks, or the mean of both; what it carries of the other person counts as noise variance.

Quality, what a detector or a meter would have said of the recording; each is noisy, at times wrong, and none is v. Errors
are drawn anew every half second and, besides, every frame (standard deviations in brackets, in this order):

    detector_score   of a view: the logistic of 1/2 - log v (1.5, 1); in 5 % of the time, in spans of 1 to 3 s, that of
                     another moment of the video
    contrast         of a view: log g (0.2, 0.1)
    voice_activity   of the audio: that somebody speaks (the stage's noise is low: with four stages and audio first,
                     speaking or turn-taking), the logistic of 2 or -2 (1, 1); the wrong way round in 10 % of the time, in
                     spans of 1 to 3 s
    loudness         of the audio: log g (0.2, 0.1) and an offset of the video (0.5)

They are unknown where the modality is absent and in 3 % of further spans. `remeasured` says what they would have been of
features that were altered: what is added to the features, relative to their spread, adds to v, and what changes their
power about the clip's mean changes g.

How hard it is, as P on validation, the mean of seeds 0 to 2 (`python benchmarks/synthetic_difficulty.py`, one small
causal network per row, none of this project's models): audio alone .45, visual alone .57, their average .63, one
network of the sum of both .67, of both joined .71, of the sum weighted by the true inverse variances .79,
`oracle_predictions` .93.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import parsing, replacing_folder
from ..functional import ccc
from .affwild2 import ANNOTATION_HEADER, SUBMISSION_HEADER, AffWild2, Clip

STAGES = ("speaking", "listening", "turn-taking", "silence")
SHARED = "audio"  # the modality that persons of one video share; every other one is a view of the person
KAPPA = 1.0

_LATENTS, _HIDDEN = 6, 24
_AFFECT_GAIN = 0.8  # y = tanh(gain z)
_DWELL = (100, 75, 75, 50)  # mean frames in a stage
_MEMORY = 0.9  # of the noise, from frame to frame
_SMOOTH = (18.0, 4.0)  # standard deviation in frames of the kernel behind affect and nuisances
_OFFSET, _LOUDNESS = 0.2, 0.2  # of a video, in the embedding; of a frame, as a factor on the latents (log)
_GOOD, _MEDIUM, _POOR, _BURST = 0.3, 1.0, 3.5, 4.5  # noise standard deviations
_JITTER = 1e-4  # variance that a filter adds to a view: numbers of a file, not exact ones

VIEW_QUALITY, SHARED_QUALITY = ("detector_score", "contrast"), ("voice_activity", "loudness")
_SCORE_LEVEL, _SCORE_SLOPE = 0.5, 1.0  # logit of a score = level - slope log v
_SCORE_ERRORS, _VOICE_ERRORS, _GAIN_ERRORS = (1.5, 1.0), (1.0, 1.0), (0.2, 0.1)  # that lasts, and of a frame
_ERROR_FRAMES = 15  # that an error lasts
_VOICE = 2.0  # logit of a voice
_MICROPHONE = 0.5  # of a video, in the loudness
_SCORE_WRONG, _VOICE_WRONG, _UNKNOWN = 0.05, 0.1, 0.03  # shares of the time
_WRONG_FRAMES, _UNKNOWN_FRAMES = (30, 90), (10, 60)  # of a span
_ADDED = 4.0  # noise variance in the latents for what is added to the features with the power that they have
_VOICE_SHARE = 0.5  # of what that takes from a score, in voice_activity
_FLOOR = 0.05  # of the power about the mean, relative to the clip's
_LOGIT = 12.0  # beyond this a logistic is 0 or 1 in single precision
_STILL = 1e-5  # spread of a feature, relative to the greatest, up to which it does not vary


@dataclass(frozen=True)
class SyntheticSpec:
    """What `write_dataset` wrote; also in truth/spec.json."""

    seed: int = 0
    train: int = 24
    validation: int = 10
    test: int = 4
    frames: tuple[int, int] = (250, 900)
    difficulty: float = 1.0
    stages: int = 4
    modalities: Mapping[str, int] = field(default_factory=lambda: {"audio": 32, "visual": 64})
    images: bool = False
    centred: bool = False
    quality: bool = True


def write_dataset(
    root: str | os.PathLike,
    *,
    seed: int = 0,
    train: int = 24,
    validation: int = 10,
    test: int = 4,
    frames: tuple[int, int] = (250, 900),
    difficulty: float = 1.0,
    stages: int = 4,
    modalities: Mapping[str, int] | None = None,
    images: bool = False,
    centred: bool = False,
    quality: bool = True,
) -> SyntheticSpec:
    """Writes a data set below `root`, which must not exist or be empty. The same arguments give the same bytes.

    train, validation, test  annotations a split (a split of four or more has a `_left`/`_right` pair, one of three or
                             more a video of fewer than 300 frames)
    frames                   shortest and longest length of the others
    difficulty               factor on the noise standard deviations
    stages                   1 to 16
    modalities               name -> D (at least 8); "audio" is shared by the persons of a video
    images                   also writes empty cropped_aligned/<video>/<frame>.jpg files and lets the missing ones,
                             instead of NaN rows, say where there is no face (for reader tests: one file a frame)
    centred                  zero is the middle of the embeddings (by default it is far out, as for real ones): a zeroed
                             modality then looks like an ordinary one
    quality                  also writes quality; features, annotations and truth are the same without

    Layout as `affwild2` describes, and truth/<name>.npz, which training never reads: stage (T,), reliability (T, M),
    variance (T, M), latents (T, 2), noisy (T, M, 2), present (T, M), labels (T, 2, without the -5), modalities (M,).
    Raises FileExistsError where root holds something, ValueError for arguments out of range.
    """
    spec = SyntheticSpec(
        seed=seed,
        train=train,
        validation=validation,
        test=test,
        frames=(int(frames[0]), int(frames[1])),
        difficulty=float(difficulty),
        stages=stages,
        modalities={"audio": 32, "visual": 64} if modalities is None else dict(modalities),
        images=images,
        centred=centred,
        quality=quality,
    )
    _check(spec)
    root = Path(os.path.abspath(root))
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"root: expected a folder that is empty or new, got {root}, which holds something")
    with replacing_folder(root) as part:
        _write(part, spec)
    return spec


def _check(spec: SyntheticSpec) -> None:
    for name in ("train", "validation", "test"):
        if getattr(spec, name) < 0:
            raise ValueError(f"{name}: expected a number of annotations >= 0, got {getattr(spec, name)}")
    if not 16 <= spec.frames[0] <= spec.frames[1]:
        raise ValueError(f"frames: expected 16 <= shortest <= longest, got {spec.frames}")
    if not spec.difficulty > 0:
        raise ValueError(f"difficulty: expected a positive factor, got {spec.difficulty}")
    if not 1 <= spec.stages <= 16:
        raise ValueError(f"stages: expected 1 to 16, got {spec.stages}")
    if not 1 <= len(spec.modalities) <= 8 or min(spec.modalities.values()) < 8:
        raise ValueError(f"modalities: expected 1 to 8 names with D >= 8, got {dict(spec.modalities)}")


# -------------------------------------------------------------------------------------------------------------- world


class _World:
    """The random maps that all videos share."""

    def __init__(self, spec: SyntheticSpec):
        rng = np.random.default_rng([spec.seed, 0])
        self.spec, self.names = spec, list(spec.modalities)
        count = len(self.names)
        stage, modality = np.arange(spec.stages)[:, None], np.arange(count)[None, :]
        good = stage % count == modality
        self.noise = np.where(stage == 2, _MEDIUM, np.where(good, _GOOD, _POOR)) * spec.difficulty  # (S, M)
        self.loudness = np.where((stage == 3) & ~good, 0.4, 1.0)  # (S, M)
        leave = 1 / np.array([_DWELL[s % len(_DWELL)] for s in range(spec.stages)])
        self.transition = np.repeat(leave[:, None] / max(1, spec.stages - 1), spec.stages, axis=1)  # (S, S)
        np.fill_diagonal(self.transition, 1 - leave if spec.stages > 1 else 1.0)
        self.maps = [_Map(rng, dim, spec.stages, spec.centred) for dim in spec.modalities.values()]

    def stage_path(self, rng: np.random.Generator, frames: int) -> np.ndarray:
        cumulative = self.transition.cumsum(axis=1)[:, :-1].tolist()
        now, path = int(rng.integers(self.spec.stages)), []
        for draw in rng.random(frames).tolist():
            now = bisect.bisect_right(cumulative[now], draw)
            path.append(now)
        return np.array(path)


class _Map:
    """Latents and stage -> embedding of one modality."""

    def __init__(self, rng: np.random.Generator, dim: int, stages: int, centred: bool):
        inward = rng.standard_normal((_LATENTS, _HIDDEN))
        self.inward = 0.8 * inward / np.linalg.norm(inward, axis=0)
        self.stage = 0.5 * rng.standard_normal((stages, _HIDDEN))
        self.bias = 0.3 * rng.standard_normal(_HIDDEN)
        spectrum = np.arange(1, _HIDDEN + 1) ** -0.25  # a few strong directions: correlated dimensions
        self.outward = rng.standard_normal((_HIDDEN, dim)) * spectrum[:, None] / np.sqrt(np.sum(spectrum**2) / 4)
        self.mean = 1.5 * rng.standard_normal(dim)
        if centred:
            seen = rng.standard_normal((4096, _LATENTS))
            self.mean = -np.einsum("tk,kd->d", self.hidden(seen, rng.integers(stages, size=4096)), self.outward) / 4096
        dead = rng.choice(dim, size=max(2, dim // 12), replace=False)
        self.constant, self.zero = dead[::2], dead[1::2]

    def hidden(self, seen: np.ndarray, stage: np.ndarray) -> np.ndarray:
        # einsum, not BLAS: the same bits whatever the number of threads
        return np.tanh(np.einsum("tl,lk->tk", seen, self.inward) + self.stage[stage] + self.bias)

    def __call__(self, rng: np.random.Generator, seen: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """seen (T, 6), stage (T,) -> (T, D) float32."""
        rows = np.einsum("tk,kd->td", self.hidden(seen, stage), self.outward) + self.mean
        rows += _OFFSET * rng.standard_normal(rows.shape[1])  # this video's voice or face
        rows += 0.1 * rng.standard_normal(rows.shape)
        rows[:, self.constant], rows[:, self.zero] = self.mean[self.constant], 0
        return rows.astype(np.float32)


def _filtered(rng: np.random.Generator, frames: int, kernel: np.ndarray) -> np.ndarray:
    """(T,) white noise through a filter, of unit variance."""
    return np.convolve(rng.standard_normal(frames + len(kernel) - 1), kernel / np.linalg.norm(kernel), mode="valid")


def _smooth(rng: np.random.Generator, frames: int, width: float) -> np.ndarray:
    """(T,) unit-variance noise behind a Gaussian kernel of standard deviation `width` frames."""
    return _filtered(rng, frames, _gaussian(width))


def _gaussian(width: float) -> np.ndarray:
    reach = int(4 * width)
    return np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)


def _latents(rng: np.random.Generator, frames: int) -> np.ndarray:
    """(T, 6)."""
    columns = [_smooth(rng, frames, _SMOOTH[0] if k < 2 else _SMOOTH[1]) for k in range(_LATENTS)]
    z = np.stack(columns, axis=1)
    z[:, 1] = 0.3 * z[:, 0] + np.sqrt(1 - 0.3**2) * z[:, 1]
    z[:, :2] = np.sqrt(0.8) * z[:, :2] + np.sqrt(0.2) * rng.standard_normal(2)  # the video's mood
    return z


def _noise(rng: np.random.Generator, frames: int) -> np.ndarray:
    """(T, 6) unit-variance noise whose correlation falls by _MEMORY from frame to frame."""
    kernel = _MEMORY ** np.arange(int(np.log(1e-3) / np.log(_MEMORY)))
    return np.stack([_filtered(rng, frames, kernel) for _ in range(_LATENTS)], axis=1)


def _spans(rng: np.random.Generator, frames: int, share: float, lengths: tuple[int, int]) -> np.ndarray:
    """(T,) bool: random spans that fill about `share` of the frames."""
    inside = np.zeros(frames, bool)
    mean = (lengths[0] + lengths[1]) / 2
    for _ in range(rng.poisson(share * frames / mean)):
        start = rng.integers(frames)
        inside[start : start + rng.integers(lengths[0], lengths[1] + 1)] = True
    return inside


# ------------------------------------------------------------------------------------------------------------ writing


def _write(root: Path, spec: SyntheticSpec) -> None:
    world = _World(spec)
    truth = root / "truth"
    truth.mkdir()
    (truth / "spec.json").write_text(json.dumps(asdict(spec), indent=1) + "\n")
    task = root / "6th ABAW Annotations" / "VA_Estimation_Challenge"
    for folder in ("Train_Set", "Validation_Set"):
        (task / folder).mkdir(parents=True)
    for m in world.names:
        (root / "features" / m).mkdir(parents=True)
        meta: dict[str, Any] = {}
        if m == SHARED:
            meta["shared"] = True
        elif spec.images:
            meta["images"] = "cropped_aligned"
        if spec.quality:
            meta["quality"] = quality_names(m)
        (root / "features" / m / "meta.json").write_text(json.dumps({**meta, "about": "synthetic"}) + "\n")
    if spec.images:
        (root / "cropped_aligned").mkdir()
    sample: list[tuple[str, int]] = []
    for number, split in enumerate(("train", "validation", "test"), start=1):
        index, count = 0, getattr(spec, split)
        while index < count:
            rng = np.random.default_rng([spec.seed, number, index])
            persons = 2 if index == 1 and count >= 4 else 1
            length = spec.frames
            if index == 0 and count >= 3:
                length = (min(73, spec.frames[0]), min(299, spec.frames[1]))
            frames = int(rng.integers(length[0], length[1] + 1))
            video = f"{split}-{index:03d}"
            names = [video] if persons == 1 else [f"{video}_left", f"{video}_right"]
            errors = np.random.default_rng([spec.seed, number, index, 7]) if spec.quality else None
            _write_video(root, world, rng, errors, video, names, frames, index)
            for name in names:
                if split == "test":
                    sample.append((name, frames))
                else:
                    path = task / ("Train_Set" if split == "train" else "Validation_Set") / f"{name}.txt"
                    _write_annotation(path, rng, read_truth(root, name)["labels"], index)
            index += persons
    order = np.random.default_rng([spec.seed, 9]).permutation(len(sample))
    lines = [f"{sample[k][0]}/{i:05d}.jpg,0,0" for k in order for i in range(1, sample[k][1] + 1)]
    (root / "sample_submission.txt").write_text("\n".join([SUBMISSION_HEADER, *lines]) + "\n")


@dataclass
class _Track:
    """What one modality recorded of a video, or of one person in it."""

    rows: np.ndarray  # (T, D) float32
    seen: np.ndarray  # (T, 6) noisy latents
    variance: np.ndarray  # (T,) of the noise in them
    present: np.ndarray  # (T,) bool
    log_gain: np.ndarray | None = None  # (T,) of the latents
    quality: np.ndarray | None = None  # (T, Q) float32


def _record(
    world: _World, rng: np.random.Generator, m: int, source: np.ndarray, stage: np.ndarray, is_view: bool
) -> _Track:
    """source (T, 6) latents; is_view: of a face, which can be occluded."""
    frames, burst = len(source), (_BURST * world.spec.difficulty) ** 2
    loudness = world.loudness[stage, m] * np.exp(_LOUDNESS * (rng.standard_normal() + _smooth(rng, frames, 6.0)))
    variance = world.noise[stage, m] ** 2 + burst * _spans(rng, frames, 0.08, (15, 60))
    if is_view:
        occluded = _spans(rng, frames, 0.06, (30, 90))
        variance, loudness = np.where(occluded, burst, variance), np.where(occluded, 0.3 * loudness, loudness)
    seen = source + np.sqrt(variance)[:, None] * _noise(rng, frames)
    rows = world.maps[m](rng, loudness[:, None] * seen, stage)
    present = ~_spans(rng, frames, 0.04 if is_view else 0.01, (10, 80))
    return _Track(rows, seen, variance, present, np.log(loudness))


def quality_names(modality: str) -> tuple[str, ...]:
    """The columns of a modality's quality."""
    return SHARED_QUALITY if modality == SHARED else VIEW_QUALITY


def _measured(world: _World, rng: np.random.Generator, m: int, stage: np.ndarray, track: _Track) -> np.ndarray:
    """(T, Q) float32 quality of a track, NaN where it is unknown. `stage` (T,): that it was recorded in."""
    assert track.log_gain is not None
    frames, log_gain = len(stage), track.log_gain
    if world.names[m] == SHARED:
        voice = world.noise[stage, m] <= _MEDIUM * world.spec.difficulty
        voice ^= _spans(rng, frames, _VOICE_WRONG, _WRONG_FRAMES)
        logit = np.where(voice, _VOICE, -_VOICE) + _errors(rng, frames, _VOICE_ERRORS)
        log_gain = log_gain + _MICROPHONE * rng.standard_normal()
    else:
        logit = _SCORE_LEVEL - _SCORE_SLOPE * np.log(track.variance) + _errors(rng, frames, _SCORE_ERRORS)
        wrong, other = _spans(rng, frames, _SCORE_WRONG, _WRONG_FRAMES), rng.integers(frames)
        logit = np.where(wrong, np.roll(logit, other), logit)
    quality = np.stack([_logistic(logit), log_gain + _errors(rng, frames, _GAIN_ERRORS)], axis=1)
    quality[~track.present | _spans(rng, frames, _UNKNOWN, _UNKNOWN_FRAMES)] = np.nan
    return quality.astype(np.float32)


def _errors(rng: np.random.Generator, frames: int, deviations: tuple[float, float]) -> np.ndarray:
    """(T,) errors: of half a second, and of a frame."""
    lasting = np.repeat(rng.standard_normal(frames // _ERROR_FRAMES + 1), _ERROR_FRAMES)[:frames]
    return deviations[0] * lasting + deviations[1] * rng.standard_normal(frames)


def _logistic(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logit, -_LOGIT, _LOGIT)))


def _write_video(
    root: Path,
    world: _World,
    rng: np.random.Generator,
    errors: np.random.Generator | None,
    video: str,
    names: list[str],
    frames: int,
    index: int,
) -> None:
    """Features and truth of a video's one or two persons; also quality, where there are random `errors` for it."""
    first = world.stage_path(rng, frames)
    dialogue = world.spec.stages > 1
    stages = [first, np.where(first < 2, 1 - first, first) if dialogue else first][: len(names)]
    latents = [_latents(rng, frames) for _ in names]
    tracks: list[list[_Track]] = [[] for _ in names]
    for m, modality in enumerate(world.names):
        if modality == SHARED and len(names) == 2:
            # the share of _left in the track: all, none, half
            own = np.array([1.0, 0.0, 0.5])[np.minimum(first, 2)] if dialogue else np.full(frames, 0.5)
            heard = np.where(first < 2, 0, first) if dialogue else first  # that somebody speaks, not who
            mix = own[:, None] * latents[0] + (1 - own)[:, None] * latents[1]
            track = _record(world, rng, m, mix, heard, is_view=False)
            if errors is not None:
                track.quality = _measured(world, errors, m, heard, track)
            for person, share in enumerate((own, 1 - own)):
                # own z + (1 - own) z' differs from z by (1 - own) (z' - z), of variance 2 (1 - own)^2
                error = track.variance + 2 * (1 - share) ** 2
                tracks[person].append(replace(track, variance=error))
        else:
            for person, stage in enumerate(stages):
                track = _record(world, rng, m, latents[person], stage, is_view=modality != SHARED)
                if errors is not None:
                    track.quality = _measured(world, errors, m, stage, track)
                tracks[person].append(track)
        for person, name in enumerate(names if modality != SHARED else [video]):
            _write_features(root, world.spec.images, modality, name, tracks[person][m], index)
    for person, name in enumerate(names):
        variance = np.stack([track.variance for track in tracks[person]], axis=1)
        present = np.stack([track.present for track in tracks[person]], axis=1)
        np.savez(
            root / "truth" / f"{name}.npz",
            stage=stages[person].astype(np.uint8),
            reliability=np.where(present, 1 / (1 + variance / KAPPA**2), 0).astype(np.float32),
            variance=variance.astype(np.float32),
            latents=latents[person][:, :2].astype(np.float32),
            noisy=np.stack([track.seen[:, :2] for track in tracks[person]], axis=1).astype(np.float32),
            present=present,
            labels=np.round(np.tanh(_AFFECT_GAIN * latents[person][:, :2]), 3).astype(np.float32),
            modalities=np.array(world.names),
        )


def _write_features(root: Path, images: bool, modality: str, name: str, track: _Track, index: int) -> None:
    """Says where the modality is missing in one of the ways that the reader knows: images, a mask, NaN rows."""
    path = root / "features" / modality / f"{name}.npy"
    rows, present, quality = track.rows, track.present, track.quality
    if index % 8 == 6 and modality != SHARED:  # as if the container's frame counter were off
        present[-2:] = False
        rows = rows[:-2]
    if index % 8 == 7 and modality == SHARED:
        rows = np.concatenate([rows, np.repeat(rows[-1:], 3, axis=0)])
        quality = None if quality is None else np.concatenate([quality, np.repeat(quality[-1:], 3, axis=0)])
    if quality is not None:
        np.save(path.with_suffix(".quality.npy"), quality[: len(rows)])
    missing = np.flatnonzero(~present[: len(rows)])
    if images and modality != SHARED:
        rows[missing] = 0  # what many extractors write
        folder = root / "cropped_aligned" / name
        folder.mkdir(exist_ok=True)
        for i in np.flatnonzero(present) + 1:
            (folder / f"{i:05d}.jpg").touch()
    elif index % 4 == 3 and modality == SHARED:
        mask = np.ones(len(rows), bool)
        mask[missing] = False
        np.save(path.with_suffix(".mask.npy"), mask)
    else:
        rows[missing] = np.nan
    np.save(path, rows)


def _write_annotation(path: Path, rng: np.random.Generator, labels: np.ndarray, index: int) -> None:
    frames = len(labels)
    length = int(rng.integers(frames // 30, frames // 12 + 1)) + 1
    starts = {3: 0, 4: frames // 2, 5: frames - length, 6: frames // 3}
    values = np.asarray(labels, np.float64).copy()
    if index % 8 in starts:
        start = starts[index % 8]
        values[start : start + length, (1 if index % 8 == 6 else slice(None))] = -5
    text = "".join(f"{v:.3f},{a:.3f}\n".replace("-5.000", "-5") for v, a in values)
    path.write_text(f"{ANNOTATION_HEADER}\n{text}")


# -------------------------------------------------------------------------------------------------------------- truth


def read_spec(root: str | os.PathLike) -> SyntheticSpec:
    """The arguments that `write_dataset` was given."""
    path = Path(root) / "truth" / "spec.json"
    with parsing(path):
        values = json.loads(path.read_text())
        return SyntheticSpec(**{"quality": False, **values, "frames": tuple(values["frames"])})


def has_truth(root: str | os.PathLike) -> bool:
    """Synthetic data with a test split, whose labels are known to the synthesiser alone."""
    return (Path(root) / "truth" / "spec.json").exists() and read_spec(root).test > 0


def read_truth(root: str | os.PathLike, name: str) -> dict[str, np.ndarray]:
    """What truth/ holds of the clip `name`, see `write_dataset`. The arrays are read-only."""
    path = Path(root) / "truth" / f"{name}.npz"
    return dict(_truth(path, path.stat().st_mtime_ns if path.exists() else 0))


@functools.lru_cache(maxsize=512)  # a study asks for the same clips under every condition
def _truth(path: Path, changed: int) -> dict[str, np.ndarray]:
    with parsing(path), np.load(path) as data:
        found = {key: data[key] for key in data.files}
    for array in found.values():
        array.setflags(write=False)
    return found


def trusted_modalities(root: str | os.PathLike) -> list[frozenset[str]]:
    """Of each stage the modalities whose noise is low in it. Stages in which these are the same differ in what is said and
    heard, not in whom to trust."""
    world = _World(read_spec(root))
    low = world.noise < _MEDIUM * world.spec.difficulty
    return [frozenset(name for name, good in zip(world.names, stage) if good) for stage in low]


class TruthClips(Sequence[Clip]):
    """The test split of a synthetic data set with the labels that only the synthesiser knows; every frame counts."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root, self.data = root, AffWild2(root, "test")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override]
        clip = self.data[index]  # IndexError at the end
        labels = read_truth(self.root, clip.name)["labels"]
        return replace(clip, labels=labels, valid=np.ones(len(labels), bool))


# -------------------------------------------------------------------------------------------------------------- meter


def remeasured(
    names: Sequence[str], quality: np.ndarray, before: np.ndarray, after: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """What the quality of a clip would have been, had its features been altered before it was measured.

    names    of the columns of quality; those that are none of VIEW_QUALITY and SHARED_QUALITY stay as they are
    quality  (n, Q) floating point, NaN where unknown, which it stays
    before   (n, D) features, in time order, and `after` (n, D) what they became
    spread   (D,) standard deviations of the features over the clip; those that do not vary tell nothing

    With a = mean_d ((after - before) / spread)^2, noise of the variance 4 a is added to the latents: the logit of
    detector_score falls by log(1 + 4 a / v), v what the score itself says on average, that of voice_activity by half of
    this; contrast and loudness rise by half the logarithm of the ratio of the powers about the clip's mean, both of
    them over a floor. No new error is made, and where a row is what it was its quality is the same to the bit. Returns a
    new array.
    """
    out = np.array(quality)
    if out.ndim != 2 or out.shape[1] != len(names):
        raise ValueError(f"quality: expected the shape (n, {len(names)}) of {', '.join(names)}, got {out.shape}")
    varies = spread > _STILL * spread.max(initial=0)
    if not (len(out) and varies.any()):
        return out
    mean, scale = before[:, varies].mean(axis=0, dtype=np.float64), spread[varies].astype(np.float64)
    old, new = ((rows[:, varies] - mean) / scale for rows in (before, after))
    added = np.mean((new - old) ** 2, axis=1)
    louder = 0.5 * np.log((np.mean(new**2, axis=1) + _FLOOR) / (np.mean(old**2, axis=1) + _FLOOR))
    for q, name in enumerate(names):
        column = out[:, q].astype(np.float64)
        if name in ("detector_score", "voice_activity"):
            share = 1.0 if name == "detector_score" else _VOICE_SHARE
            inside = np.clip(column, _logistic(np.array(-_LOGIT)), _logistic(np.array(_LOGIT)))
            logit = np.log(inside / (1 - inside))
            variance = np.exp((_SCORE_LEVEL - logit) / _SCORE_SLOPE)
            column = _logistic(logit - share * _SCORE_SLOPE * np.log1p(_ADDED * added / variance))
        elif name in ("contrast", "loudness"):
            column = column + louder
        out[:, q] = np.where((before == after).all(axis=1), out[:, q], column)
    return out


def meter(modality: str, quality: np.ndarray, before: np.ndarray, after: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """`remeasured` for a modality of a synthetic data set."""
    return remeasured(quality_names(modality), quality, before, after, spread)


class ToldClips(Sequence[Clip]):
    """Clips of a synthetic data set whose quality is the truth: one column a modality, the log variance of the noise in the
    latents that it saw. All else is as `clips` has it."""

    def __init__(self, clips: AffWild2) -> None:
        self.clips, self.quality_dims = clips, dict.fromkeys(clips.modalities, 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.clips, name)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override]
        clip = self.clips[index]  # IndexError at the end
        return told(self.clips.root, clip, clip)


def told(root: str | os.PathLike, before: Clip, after: Clip) -> Clip:
    """`after`, which is `before` as it was altered, with the true log noise variance of each frame for quality. An alteration
    counts as noise of its power relative to that of the features."""
    truth = read_truth(root, before.name)
    quality = {}
    for m, name in enumerate(str(x) for x in truth["modalities"]):
        if name not in after.features:
            continue
        variance = truth["variance"][:, m].astype(np.float64)
        rows, changed = (np.asarray(clip.features[name], np.float64) for clip in (before, after))
        count = min(len(rows), len(changed), len(variance))
        spread = np.nanstd(rows, axis=0)
        varying = spread > 0
        step = (changed[:count] - rows[:count])[:, varying] / spread[varying]
        added = np.zeros(len(variance))
        added[:count] = np.nan_to_num(np.square(step).mean(axis=1))
        quality[name] = np.log(variance + added).astype(np.float32)[:, None]
    return replace(after, quality=quality)


# ------------------------------------------------------------------------------------------------------------- oracle


class Oracle:
    """Fusion with the true noise known: the upper line of a comparison.

    It knows, from truth/: each modality's noisy view of valence and arousal *before* the random map to embeddings,
    and the true noise variance of every frame. It does not know the clean latents or labels of the split it predicts.
    It fuses by inverse variance, smooths over time (both directions) with a Gaussian kernel weighted by precision and
    a prior, and maps to labels; the kernel's width, the prior's weight and an affine map a target are fitted on the
    train split's labels, here.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        train = [read_truth(self.root, name) for name in AffWild2(self.root, "train").names]
        target = np.concatenate([clip["labels"] for clip in train])
        options = []
        for width in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0):
            joined = np.concatenate([_smoothed(clip, width) for clip in train])
            for prior in (0.0, 0.1, 0.3, 1.0, 3.0):
                options.append((_concordance(_affect(joined, prior), target), width, prior))
        _, self.width, self.prior = max(options)
        fitted = _affect(np.concatenate([_smoothed(clip, self.width) for clip in train]), self.prior)
        self.scale = target.std(axis=0) / fitted.std(axis=0)
        self.shift = target.mean(axis=0) - self.scale * fitted.mean(axis=0)

    def predict(self, name: str, useless: np.ndarray | None = None) -> np.ndarray:
        """(T, 2) float32 labels of clip `name`. `useless` (T, M) bool, modalities in the order of the spec: True where
        something that truth/ does not know of spoilt a modality, which is then taken as absent."""
        clip = read_truth(self.root, name)
        if useless is not None:
            clip["present"] = _without(clip["present"], useless)
        affect = _affect(_smoothed(clip, self.width), self.prior)
        return np.clip(self.scale * affect + self.shift, -1, 1).astype(np.float32)

    def predict_together(self, names: Sequence[str], useless: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """`predict` of each."""
        return [self.predict(name, None if useless is None else useless[i]) for i, name in enumerate(names)]


class CausalOracle:
    """The same knowledge, used forward only: a Bayes filter, the upper line of what a causal fusion could reach.

    A Kalman filter whose state is, for each of two independent combinations of valence and arousal, a mood that stays, a
    smooth process (Matern of order 5/2: value and two derivatives) and each modality's autoregressive noise, which the
    known variance scales. The variances of mood and process, the process's time scale and the noise's memory are those of
    the train split's latents and views, the affine map to labels that of its labels. Like `Oracle` it does not know the
    latents or labels of the split that it predicts.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        train = [read_truth(self.root, name) for name in AffWild2(self.root, "train").names]
        latents = [clip["latents"].astype(np.float64) for clip in train]
        joined = np.concatenate(latents)
        self.turn = np.linalg.eigh(joined.T @ joined)[1]  # noise is alike in both: what is turned stays independent
        self.rate, self.mood, self.process = _smoothness([z @ self.turn for z in latents])
        self.memory = _noise_memory(train)
        target = np.concatenate([clip["labels"] for clip in train])
        fitted = np.concatenate(self._affect(train))
        self.scale = target.std(axis=0) / fitted.std(axis=0)
        self.shift = target.mean(axis=0) - self.scale * fitted.mean(axis=0)

    def predict(self, name: str, useless: np.ndarray | None = None) -> np.ndarray:
        """As `Oracle.predict`."""
        return self.predict_together([name], None if useless is None else [useless])[0]

    def predict_together(self, names: Sequence[str], useless: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """`predict` of each, side by side."""
        clips = [read_truth(self.root, name) for name in names]
        if useless is not None:
            for clip, bad in zip(clips, useless):
                clip["present"] = _without(clip["present"], bad)
        return [np.clip(self.scale * y + self.shift, -1, 1).astype(np.float32) for y in self._affect(clips)]

    def _affect(self, clips: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
        """(T, 2) labels of the filtered latents of each clip."""
        longest, count = max(len(clip["present"]) for clip in clips), clips[0]["present"].shape[1]
        seen = np.zeros((longest, len(clips), 2, count))
        spread, there = np.ones((longest, len(clips), count)), np.zeros((longest, len(clips), count), bool)
        for i, clip in enumerate(clips):
            frames = len(clip["present"])
            seen[:frames, i] = np.einsum("tmc,ck->tkm", clip["noisy"].astype(np.float64), self.turn)
            spread[:frames, i], there[:frames, i] = np.sqrt(clip["variance"]), clip["present"]
        mean = self._filtered(seen, spread, there) @ self.turn.T  # (T, V, 2)
        return [np.tanh(_AFFECT_GAIN * mean[: len(clip["present"]), i]) for i, clip in enumerate(clips)]

    def _filtered(self, seen: np.ndarray, spread: np.ndarray, there: np.ndarray) -> np.ndarray:
        """seen (T, V, 2, M), spread and there (T, V, M) -> (T, V, 2) means of mood and process together."""
        frames, clips, _, count = seen.shape
        size = 4 + count  # process and its derivatives, mood, noises
        move, steady = np.eye(size), np.zeros((2, size, size))
        move[:3, :3], shape = _matern(self.rate)
        move[4:, 4:] *= self.memory
        for k in range(2):
            steady[k, :3, :3] = self.process[k] * shape
            steady[k, 3, 3] = self.mood[k]
            steady[k, 4:, 4:] = np.eye(count)
        added = steady - move @ steady @ move.T
        mean, cov = np.zeros((clips, 2, size)), np.broadcast_to(steady, (clips, 2, size, size)).copy()
        out = np.empty((frames, clips, 2))
        for t in range(frames):
            if t:
                mean, cov = mean @ move.T, move @ cov @ move.T + added
            for m in range(count):
                sd = spread[t, :, m, None]
                # the view is process + mood + sd * noise: what the state adds to it, and its gain
                towards = cov[..., 0] + cov[..., 3] + sd[..., None] * cov[..., 4 + m]
                variance = towards[..., 0] + towards[..., 3] + sd * towards[..., 4 + m] + _JITTER
                gain = towards / variance[..., None] * there[t, :, m, None, None]
                miss = seen[t, :, :, m] - mean[..., 0] - mean[..., 3] - sd * mean[..., 4 + m]
                mean = mean + gain * miss[..., None]
                cov = cov - gain[..., :, None] * towards[..., None, :]
            out[t] = mean[..., 0] + mean[..., 3]
        return out


def oracle_predictions(root: str | os.PathLike, split: str) -> dict[str, np.ndarray]:
    """{clip name: (T, 2) float32} of `Oracle` on a split."""
    oracle = Oracle(root)
    return {name: oracle.predict(name) for name in AffWild2(root, split).names}


def _smoothed(clip: Mapping[str, np.ndarray], width: float) -> np.ndarray:
    """(T, 3): sums of precision times view (2 targets) and of precision, over modalities and a Gaussian window."""
    precision = clip["present"] / clip["variance"].astype(np.float64)  # (T, M)
    sums = np.concatenate([np.einsum("tm,tmc->tc", precision, clip["noisy"]), precision.sum(axis=1)[:, None]], axis=1)
    kernel = _gaussian(width)
    reach, frames = len(kernel) // 2, len(sums)
    return np.stack([np.convolve(column, kernel)[reach : reach + frames] for column in sums.T], axis=1)


def _without(present: np.ndarray, useless: np.ndarray) -> np.ndarray:
    """(T, M) bool: what is present and not useless."""
    if useless.dtype != bool or useless.shape != present.shape:
        raise ValueError(f"useless: expected bool of the shape {present.shape}, got {useless.dtype} {useless.shape}")
    return present & ~useless


def _matern(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) transition over one frame and (3, 3) stationary covariance of a Matern process of order 5/2 and unit variance
    with its derivatives; correlation (1 + x + x^2 / 3) exp(-x) at x = rate * frames."""
    change = np.array([[0, 1, 0], [0, 0, 1], [-(rate**3), -3 * rate**2, -3 * rate]])
    rest = change + rate * np.eye(3)  # whose third power is 0
    transition = np.exp(-rate) * (np.eye(3) + rest + rest @ rest / 2)
    k = rate**2 / 3
    return transition, np.array([[1, 0, -k], [0, k, 0], [-k, 0, rate**4]])


def _smoothness(latents: Sequence[np.ndarray]) -> tuple[float, np.ndarray, np.ndarray]:
    """Rate, and variances (2,) of mood and process: mood + process * matern(lag) nearest to the mean products of the
    latents (T, 2), `lag` frames apart."""
    lags = np.arange(0, 61, 2)
    pairs = [[z[: len(z) - lag] * z[lag:] for z in latents if len(z) > lag] for lag in lags]
    measured = np.stack([np.concatenate(pair).mean(axis=0) if pair else np.full(2, np.nan) for pair in pairs])
    known = ~np.isnan(measured[:, 0])
    best = None
    for rate in 1 / np.geomspace(3, 60, 40):
        x = rate * lags[known]
        design = np.stack([np.ones_like(x), (1 + x + x**2 / 3) * np.exp(-x)], axis=1)
        variances = np.maximum(np.linalg.lstsq(design, measured[known], rcond=None)[0], 1e-3)
        error = float(np.square(design @ variances - measured[known]).sum())
        if best is None or error < best[0]:
            best = error, float(rate), variances[0], variances[1]
    assert best is not None
    return best[1:]


def _noise_memory(clips: Sequence[Mapping[str, np.ndarray]]) -> float:
    """The correlation of a modality's noise from frame to frame."""
    above, below = 0.0, 0.0
    for clip in clips:
        noise = (clip["noisy"].astype(np.float64) - clip["latents"][:, None]) / np.sqrt(clip["variance"])[..., None]
        above, below = above + float((noise[1:] * noise[:-1]).sum()), below + float(np.square(noise[:-1]).sum())
    return min(max(above / below, 0.0), 0.999)


def _affect(sums: np.ndarray, prior: float) -> np.ndarray:
    """(T, 2) labels for the precision-weighted mean; `prior` is the precision of the latents' mean, 0."""
    return np.tanh(_AFFECT_GAIN * sums[:, :2] / (sums[:, 2:] + prior + 1e-6))


def _concordance(prediction: np.ndarray, target: np.ndarray) -> float:
    """CCC of (T, 2) arrays, its mean over valence and arousal."""
    return float(ccc(torch.from_numpy(prediction), torch.from_numpy(target.astype(np.float64))).mean())
