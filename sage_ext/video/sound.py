"""What is measured of sound, a hundred rows a second: prosody or what a network says, and how far it can be relied on."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..extras import require
from .plugins import Network, function_of, names_a_function, open_network, short

RATE = 16_000  # samples a second
ROWS = 100  # a second
WINDOW = 1024  # samples that a row is measured on, the last ones before the row's end
BANDS = 40
FLOOR = -80.0  # dB: less is not told from silence
QUALITY = ("level", "snr", "speech", "clipping", "pitch_confidence")

_HOP = RATE // ROWS
_BLOCK = 1000  # rows that are worked on at a time, so that a long push needs no more memory than a short one
_LOWEST, _HIGHEST = 60.0, 500.0  # Hz, of the pitch
_VOICED = 0.5  # pitch confidence from which on a row has a pitch
_CLIPPED = 0.99
_RUMBLE = 100.0  # Hz: what is lower counts neither as signal nor as noise
_VOICE = 4000.0  # Hz, up to which the greater part of speech is
_SMOOTH, _HANG = 8, 15  # rows that the power is a mean of, and on which speech is heard in the last one still
_MEMORY, _RECENT = 500, 100  # rows among which the noise floor is looked for, and what is not periodic
_SECOND, _STEP = RATE, 10  # samples that a plug-in is given, rows from one call to the next
_PROSODY = ("level", "pitch", "pitch_confidence")
_SHAPE = ("centroid", "bandwidth", "flatness", "rolloff", "flux", "zero_crossings")
_SPECS = "prosody, opensmile, onnx:FILE, module:function or hf:DIR"

Array = np.ndarray


@contextlib.contextmanager
def _compiling_alone() -> Iterator[None]:
    """No other process of ours that has this librosa is in such a block. At its first use on a machine numba compiles parts of it
    and keeps them beside it; where two processes do that at once, what they leave can end every process that reads it
    (SIGSEGV). The lock is librosa's own file, so it is of this installation, and nothing is written for it."""
    found = importlib.util.find_spec("librosa")
    if found is None or found.origin is None:  # the caller says so
        yield
        return
    with open(found.origin, "rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Description(Protocol):
    """What describes a second of sound by as many numbers as it has columns, at least one."""

    columns: tuple[str, ...]

    def __call__(self, samples: Array) -> Array:
        """(D,) of the samples, float32 (16000,); NaN where it finds nothing to describe."""


class SoundFeatures:
    """The rows of one video's sound. Row j covers [j / 100, (j + 1) / 100) s and is measured on the 1024 samples before its end.

    What is before the start, or missing, counts as zeros there; a row that itself misses samples is NaN. A row depends on its
    past alone, and not on how the sound is cut into pushes. The columns of prosody:

        mel_0 .. mel_39    power in 40 mel bands from 0 to 8 kHz, dB, at least -80: a full-scale sine has 0 in its band
        level              of the root of the mean square, dB: a full-scale sine has -3, at least -80
        pitch              log2(f0 / 100 Hz) by YIN, 60 to 500 Hz; where unvoiced that of the last voiced row, 0 before the first
        pitch_confidence   normalised autocorrelation at the period found, 0..1
        centroid           mean frequency of the magnitudes, Hz
        bandwidth          standard deviation of the frequency about it, Hz
        flatness           geometric by arithmetic mean of the power spectrum, 0..1: 0 a tone, 1 silence, noise in between
        rolloff            frequency under which 85 % of the magnitudes lie, Hz
        flux               mean rise of the mel bands since the row before, dB
        zero_crossings     share of samples that differ in sign from the one before

    With a `description` they are its columns, which are renewed ten times a second and held in between, then level, pitch and
    pitch_confidence. Where it is NaN, so is the row. Quality:

        level              as above
        snr                power above 100 Hz of the last 80 ms, above the noise floor, dB, 0..60; 0 in the first ones
        speech             voice activity, 0..1: by `silero` if given; else of a periodic sound in the range of speech above the
                           noise, for 150 ms after it too
        clipping           share of the row's samples of at least 0.99 of full scale
        pitch_confidence   as above

    The noise floor is the least power within the last 5 s, or, so that noise which sets in is known earlier, within the last
    second the least power of what is not periodic, whichever is more.
    """

    def __init__(self, description: Description | None = None, silero: Silero | None = None) -> None:
        with _compiling_alone():
            self._prepare(description, silero)

    def _prepare(self, description: Description | None, silero: Silero | None) -> None:
        self._librosa: Any = require("librosa", "video")
        self._signal: Any = require("scipy.signal", "video")
        self._description, self._silero = description, silero
        bands = tuple(f"mel_{i}" for i in range(BANDS))
        self.columns: tuple[str, ...] = (
            (*bands, *_PROSODY, *_SHAPE) if description is None else (*description.columns, *_PROSODY)
        )
        self.quality: tuple[str, ...] = QUALITY
        self._frequencies = self._librosa.fft_frequencies(sr=RATE, n_fft=WINDOW)
        full = (WINDOW / 4) ** 2  # power of a full-scale sine in its bin, behind Hann's window
        self._mel = self._librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=BANDS, norm=None, dtype=np.float64) / full
        self._high = self._signal.butter(2, _RUMBLE, "highpass", fs=RATE, output="sos")
        self._spoken = (self._frequencies >= _RUMBLE) & (self._frequencies <= _VOICE)
        # samples that a row needs from before itself
        self._before = (WINDOW if description is None else _SECOND) - _HOP
        self._begin()
        self.push(np.zeros(_HOP, np.float32))  # compiles what librosa compiles at its first use
        self._begin()

    def _begin(self) -> None:
        self._samples = np.zeros(self._before, np.float32)  # those before the next row, and those of it that are there
        self._row = 0  # the next one
        self._bands = np.full((1, BANDS), FLOOR)  # of the row before
        self._pitch = 0.0
        self._described: Array | None = None
        self._filtered = np.zeros((len(self._high), 2))
        # power, smoothed power and that of what is not periodic, of the rows before that had sound; activity of all
        self._power = np.full(_SMOOTH - 1, np.inf)  # not known yet
        self._smooth = np.full(_MEMORY - 1, np.inf)
        self._noise = np.full(_RECENT - 1, np.inf)
        self._speech = np.zeros(_HANG - 1)
        if self._silero is not None:
            self._silero.begin()

    def push(self, samples: Array) -> tuple[Array, Array]:
        """The rows (k, D) and their quality (k, Q), float32, that are complete with these samples, which may be any number.

        `samples`: (n,) of the sound that follows, -1..1, at 16 kHz. NaN or infinite: no sound there.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind != "f":
            raise ValueError(f"samples: expected floats of shape (n,), got {samples.dtype} of shape {samples.shape}")
        heard = np.concatenate([self._samples, samples.astype(np.float32, copy=False)])
        rows = (len(heard) - self._before) // _HOP
        self._samples = heard[rows * _HOP :].copy()
        features = np.empty((rows, len(self.columns)), np.float32)
        quality = np.empty((rows, len(QUALITY)), np.float32)
        for first in range(0, rows, _BLOCK):
            last = min(first + _BLOCK, rows)
            block = heard[first * _HOP : self._before + last * _HOP]
            features[first:last], quality[first:last] = self._measure(block, last - first)
        return features, quality

    def _measure(self, heard: Array, rows: int) -> tuple[Array, Array]:
        there = np.isfinite(heard)
        sound = np.where(there, heard, np.float32(0))
        present = there[self._before :].reshape(rows, _HOP).all(axis=1)
        own = sound[self._before :].reshape(rows, _HOP)
        windowed = sound[self._before + _HOP - WINDOW :].astype(np.float64)

        windows = np.lib.stride_tricks.sliding_window_view(windowed, WINDOW)[::_HOP]
        level = _decibel(np.einsum("ij,ij->i", windows, windows) / WINDOW)
        pitch, confidence = self._pitches(windowed)
        pitch = self._held(pitch, present & (confidence >= _VOICED) & (level > FLOOR))
        prosody = np.column_stack([level, pitch, confidence])
        magnitudes = np.abs(self._librosa.stft(windowed, n_fft=WINDOW, hop_length=_HOP, center=False))
        power = magnitudes**2

        if self._description is None:
            bands = _decibel(self._mel @ power).T
            features = np.hstack([bands, prosody, self._shape(windowed, magnitudes, bands)])
        else:
            features = np.hstack([self._describe(self._description, sound, rows), prosody])
            features[np.isnan(features).any(axis=1)] = np.nan

        quality = np.full((rows, len(QUALITY)), np.nan)
        high, self._filtered = self._signal.sosfilt(self._high, own.ravel(), zi=self._filtered)
        snr = self._snr(np.square(high).reshape(rows, _HOP)[present].mean(axis=1), confidence[present])
        if self._silero is not None:
            speech = self._silero.push(own)[present]
        else:
            spoken = power[self._spoken].sum(axis=0) / np.maximum(power.sum(axis=0), 1e-30)
            active = np.zeros(rows)
            active[present] = _ramp(snr, 2, 6) * (_ramp(confidence, 0.3, 0.6) * _ramp(spoken, 0.3, 0.6))[present]
            activity, self._speech = _last(np.maximum, self._speech, active)
            speech = activity[present]
        clipping = (np.abs(own) >= _CLIPPED).mean(axis=1)
        quality[present] = np.column_stack([level[present], snr, speech, clipping[present], confidence[present]])
        features[~present] = np.nan
        self._row += rows
        return features, quality

    # ------------------------------------------------------------------------------------------------------ a row's window
    def _pitches(self, sound: Array) -> tuple[Array, Array]:
        """log2(f0 / 100 Hz) and the normalised autocorrelation at that period, of each window."""
        f0 = self._librosa.yin(
            sound, fmin=_LOWEST, fmax=_HIGHEST, sr=RATE, frame_length=WINDOW, hop_length=_HOP, center=False
        )
        longest = math.ceil(RATE / _LOWEST) + 1
        size = WINDOW - longest - 1
        pieces = np.lib.stride_tricks.sliding_window_view(sound, size)
        last = np.arange(len(f0)) * _HOP + WINDOW - size
        period = np.clip(np.rint(RATE / f0).astype(int), 1, longest)
        now = _centred(pieces[last])
        # at the whole numbers of samples about the period, and at the top of the parabola through them
        before, at, after = (_correlation(now, _centred(pieces[last - period - shift])) for shift in (-1, 0, 1))
        bend = before - 2 * at + after
        slope = (after - before) / 2
        top = at - np.where(bend < 0, slope**2 / np.where(bend < 0, 2 * bend, 1), 0)
        inside = np.abs(slope) <= np.abs(bend)
        confidence = np.where(inside, top, np.maximum(np.maximum(before, after), at))
        # what only falls from the shortest period on, as that of rumble does, has none
        confidence[(period <= RATE // _HIGHEST + 1) & (before > at)] = 0
        return np.log2(f0 / 100), np.clip(confidence, 0, 1)

    def _held(self, pitch: Array, voiced: Array) -> Array:
        which = np.maximum.accumulate(np.where(voiced, np.arange(1, len(pitch) + 1), 0))
        held = np.concatenate([[self._pitch], pitch])[which]
        self._pitch = held[-1]
        return held

    def _shape(self, sound: Array, magnitudes: Array, bands: Array) -> Array:
        measure = self._librosa.feature
        rises = np.maximum(np.diff(bands, axis=0, prepend=self._bands), 0)
        self._bands = bands[-1:].copy()
        centroid = measure.spectral_centroid(S=magnitudes, freq=self._frequencies)
        return np.column_stack([
            centroid[0],
            measure.spectral_bandwidth(S=magnitudes, freq=self._frequencies, centroid=centroid)[0],
            measure.spectral_flatness(S=magnitudes)[0],
            measure.spectral_rolloff(S=magnitudes, freq=self._frequencies)[0],
            rises.mean(axis=1),
            measure.zero_crossing_rate(sound, frame_length=WINDOW, hop_length=_HOP, center=False)[0],
        ])  # fmt: skip

    def _describe(self, description: Description, sound: Array, rows: int) -> Array:
        """The description at the ends of rows 0, 10, 20 ..., each held until the next one."""
        described = np.empty((rows, len(description.columns)))
        for i in range(rows):
            if (self._row + i) % _STEP == 0 or self._described is None:
                self._described = description(sound[i * _HOP :][:_SECOND])
            described[i] = self._described
        return described

    def _snr(self, power: Array, confidence: Array) -> Array:
        """Of rows that have sound, by those before them that had."""
        if not len(power):
            return power
        powers = np.concatenate([self._power, np.maximum(power, 10 ** (FLOOR / 10))])
        smooth = np.lib.stride_tricks.sliding_window_view(powers, _SMOOTH).mean(axis=1)
        least, self._smooth = _last(np.minimum, self._smooth, smooth)
        noise, self._noise = _last(np.minimum, self._noise, smooth * np.maximum(1 - confidence, 1e-6))
        self._power = powers[len(power) :]
        known = np.isfinite(smooth)
        return np.where(known, np.clip(_decibel(np.where(known, smooth, 1) / np.maximum(least, noise)), 0, 60), 0)


def _decibel(power: Array) -> Array:
    return 10 * np.log10(np.maximum(power, 10 ** (FLOOR / 10)))


def _ramp(values: Array, low: float, high: float) -> Array:
    """0 up to `low`, 1 from `high` on."""
    return np.clip((values - low) / (high - low), 0, 1)


def _last(best: np.ufunc, before: Array, values: Array) -> tuple[Array, Array]:
    """The least or greatest of each value and as many before it as `before` holds, and what holds those for the next call."""
    if not len(values):
        return values, before
    seen = np.concatenate([before, values])
    found = best.reduce(np.lib.stride_tricks.sliding_window_view(seen, len(before) + 1), axis=1)
    return found, seen[len(values) :]


def _centred(pieces: Array) -> Array:
    return pieces - pieces.mean(axis=1, keepdims=True)


def _correlation(one: Array, other: Array) -> Array:
    scale = np.sqrt(np.einsum("ij,ij->i", one, one) * np.einsum("ij,ij->i", other, other))
    return np.einsum("ij,ij->i", one, other) / np.where(scale > 1e-12, scale, math.inf)


# ------------------------------------------------------------------------------------------------------------- networks
class Silero:
    """Silero's voice activity detector, version 5 or 6, as its ONNX file (`silero_vad.onnx` of the package silero-vad, MIT).

    It hears 512 samples at a time, and with them the 64 before; until the first ones are there, activity is 0.
    """

    SIZE, CONTEXT, STATE = 512, 64, (2, 1, 128)

    def __init__(self, path: str | Path) -> None:
        self._session = open_network("silero", "an ONNX file of Silero's voice activity detector", path)
        inputs = {one.name for one in self._session.get_inputs()}
        outputs = {one.name for one in self._session.get_outputs()}
        if not (inputs in ({"input", "state"}, {"input", "state", "sr"}) and {"output", "stateN"} <= outputs):
            raise ValueError(
                "silero: expected a network of version 5 or later, with inputs input, state and sr and outputs output and "
                f"stateN, got {str(path)!r} with {', '.join(sorted(inputs))} and {', '.join(sorted(outputs))}"
            )
        self._rate = {"sr": np.array(RATE, np.int64)} if "sr" in inputs else {}
        self.begin()

    def begin(self) -> None:
        self._state = np.zeros(self.STATE, np.float32)
        self._waiting = np.zeros(self.CONTEXT, np.float32)
        self._said = 0.0

    def push(self, rows: Array) -> Array:
        """The voice activity (k,) that is known at the end of each of the rows (k, 160)."""
        said = np.empty(len(rows))
        for i, row in enumerate(rows):
            self._waiting = np.concatenate([self._waiting, row])
            if len(self._waiting) >= self.CONTEXT + self.SIZE:
                given = self._waiting[None, : self.CONTEXT + self.SIZE]
                self._waiting = self._waiting[self.SIZE :]
                try:
                    output, self._state = self._session.run(
                        ["output", "stateN"], {"input": given, "state": self._state, **self._rate}
                    )
                except Exception as error:
                    raise ValueError(
                        f"silero: expected a network that takes 512 samples after 64, got an error: {short(error)}"
                    ) from None
                self._said = min(max(float(np.reshape(output, -1)[0]), 0.0), 1.0)
            said[i] = self._said
        return said


class _Described:
    """What is common to descriptions: how many numbers, and what silence gets."""

    columns: tuple[str, ...]

    def __init__(self, spec: str, name: str, columns: Any = None) -> None:
        self._spec = spec
        self._silent: Array | None = None
        silent = self(np.zeros(_SECOND, np.float32))
        if silent.ndim != 1 or not len(silent):
            raise ValueError(
                f"spec: expected {spec} to give numbers of shape (D,), at least one, got shape {silent.shape}"
            )
        self.columns = tuple(f"{name}_{i}" for i in range(len(silent))) if columns is None else tuple(map(str, columns))
        if len(self.columns) != len(silent) or len({*self.columns, *_PROSODY}) != len(silent) + len(_PROSODY):
            raise ValueError(
                f"spec: expected {spec} to name {len(silent)} columns, each once and none of them {', '.join(_PROSODY)}, "
                f"got {len(self.columns)}: {', '.join(self.columns[:8])}"
            )
        self._silent = silent

    def __call__(self, samples: Array) -> Array:
        if self._silent is not None and not samples.any():
            return self._silent
        found = self.described(samples)
        if self._silent is not None and found.shape != self._silent.shape:
            raise ValueError(f"spec: expected {self._spec} to give {self._silent.shape} each time, got {found.shape}")
        return found

    def described(self, samples: Array) -> Array:
        raise NotImplementedError


class Onnx(_Described):
    """A network as an ONNX file, by onnxruntime on one core: float32 (1, n) of the last samples -> numbers, flattened.

    n is 16000, unless the file fixes it to fewer.
    """

    def __init__(self, path: str | Path) -> None:
        self._network = Network(
            path,
            "(1, 16000)",
            lambda sizes: len(sizes) == 2 and sizes[0] in (None, 1) and (sizes[1] is None or 1 <= sizes[1] <= _SECOND),
        )
        self._size = self._network.sizes[1] or _SECOND
        super().__init__(f"onnx:{path}", "onnx")

    def described(self, samples: Array) -> Array:
        return self._network(np.ascontiguousarray(samples[None, -self._size :]))


class Function(_Described):
    """A function of a module that can be imported: samples (16000,) float32 -> (D,) numbers.

    Its attribute `columns`, where it has one, names them.
    """

    def __init__(self, spec: str) -> None:
        function = function_of(spec)
        self._function: Callable[[Array], Any] = function
        super().__init__(spec, spec.partition(":")[2], getattr(function, "columns", None))

    def described(self, samples: Array) -> Array:
        return np.asarray(self._function(samples.copy()), np.float32)


def _installed(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported, {error}; it comes with: pip install {package}") from error


class Opensmile(_Described):
    """The low-level descriptors of eGeMAPS (v02) by the package opensmile, means over the last tenth of a second.

    Those that are 0 where unvoiced (named ...nz) are means over what is voiced of it, 0 where nothing is.

    openSMILE is free for private, research and educational use alone: its licence has no commercial use, so it is not among the
    packages that sage-ext installs (`pip install opensmile`).
    """

    def __init__(self) -> None:
        smile: Any = _installed("opensmile", "opensmile")
        self._smile = smile.Smile(smile.FeatureSet.eGeMAPSv02, smile.FeatureLevel.LowLevelDescriptors)
        super().__init__("opensmile", "opensmile", self._smile.feature_names)

    def described(self, samples: Array) -> Array:
        rows = self._smile.process_signal(samples, RATE).to_numpy(np.float32)[-_STEP:]
        voiced = [name.endswith("nz") for name in self._smile.feature_names]
        return rows.sum(axis=0) / np.where(voiced, np.maximum((rows != 0).sum(axis=0), 1), len(rows))


class HuggingFace(_Described):
    """A model of transformers from a local folder: the mean of `last_hidden_state` over the last second.

    The folder's preprocessor, if it has one, prepares the samples. Of a model of two parts the encoder is taken.
    """

    def __init__(self, folder: str | Path) -> None:
        spec = f"hf:{folder}"
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"spec: expected hf:DIR with a folder that holds a model's config.json, got {spec!r}")
        transformers: Any = _installed("transformers", "transformers")
        self._torch: Any = importlib.import_module("torch")
        try:
            model = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True)
            self._prepare = None
            if (Path(folder) / "preprocessor_config.json").is_file():
                self._prepare = transformers.AutoFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # of many kinds
            raise ValueError(
                f"spec: expected hf:DIR with a model of transformers, got {spec!r}: {short(error)}"
            ) from None
        self._model = (model.get_encoder() if model.config.is_encoder_decoder else model).eval()
        super().__init__(spec, "hf")

    def described(self, samples: Array) -> Array:
        torch = self._torch
        if self._prepare is None:
            given = {"input_values": torch.from_numpy(samples.copy())[None]}
        else:
            given = dict(self._prepare(samples, sampling_rate=RATE, return_tensors="pt"))
        try:
            with torch.inference_mode():
                state = self._model(**given).last_hidden_state
        except Exception as error:
            raise ValueError(
                f"spec: expected {self._spec} to be a model of sound that has a last_hidden_state, got an error: {short(error)}"
            ) from None
        return state[0].mean(dim=0).float().numpy()


def make_sound(spec: str = "prosody", silero: str | Path | None = None) -> SoundFeatures:
    """The features of a sound that has yet to begin.

    "prosody" needs no weights; "opensmile" are eGeMAPS's low-level descriptors (openSMILE's licence has no commercial use);
    "onnx:FILE" is a network, float32 (1, 16000) of the last second -> numbers; "module:function" a function of yours that takes
    those samples, (16000,), and returns (D,) numbers; "hf:DIR" a model of transformers in a local folder. All but prosody are
    renewed ten times a second. `silero`: an ONNX file of Silero's voice activity detector, which then tells speech.
    """
    kind, _, rest = spec.partition(":")
    description: Description | None = None
    if spec == "opensmile":
        description = Opensmile()
    elif kind == "onnx" and rest:
        description = Onnx(rest)
    elif kind == "hf" and rest:
        description = HuggingFace(rest)
    elif kind not in ("onnx", "hf") and names_a_function(kind, rest):
        description = Function(spec)
    elif spec != "prosody":
        raise ValueError(f"spec: expected {_SPECS}, got {spec!r}")
    return SoundFeatures(description, None if silero is None else Silero(silero))
