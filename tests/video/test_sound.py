"""Rows of features and quality from sound."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("librosa")
pytest.importorskip("scipy")

from sage_ext.video.sound import QUALITY, RATE, ROWS, WINDOW, SoundFeatures, make_sound

GRID = sorted((Path(__file__).parents[3] / "shared" / "data" / "grid").glob("*.mpg"))
HOP = RATE // ROWS


def noise(seconds: float, deviation: float = 0.1, seed: int = 0) -> np.ndarray:
    return (deviation * np.random.default_rng(seed).normal(size=round(seconds * RATE))).astype(np.float32)


def coloured(seconds: float, falls: float) -> np.ndarray:
    """Noise whose amplitude falls with that power of the frequency, from 20 Hz on: 0.5 pink, 1 brown."""
    spectrum = np.fft.rfft(noise(seconds))
    return np.fft.irfft(spectrum / np.maximum(np.fft.rfftfreq(round(seconds * RATE), 1 / RATE), 20) ** falls).astype(
        np.float32
    )


def sine(seconds: float, hz: float, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def voice(seconds: float, hz: float = 220.0, amplitude: float = 0.2) -> np.ndarray:
    """Harmonics that fall off as those of a voice do."""
    return sum(
        (sine(seconds, hz * k, amplitude / k) for k in range(1, 13)), np.zeros(round(seconds * RATE), np.float32)
    )


def talk(seconds: float, seed: int = 0) -> np.ndarray:
    """Syllables of changing pitch with pauses and a hole without sound, over a little noise."""
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * RATE:
        syllable = voice(rng.uniform(0.1, 0.4), rng.uniform(90, 300))
        parts += [syllable * np.hanning(len(syllable)).astype(np.float32), noise(rng.uniform(0, 0.3), 0.02, seed)]
    sound = np.concatenate(parts)[: round(seconds * RATE)]
    sound += noise(seconds, 0.002, seed)
    sound[round(0.4 * len(sound)) :][: round(0.1 * len(sound))] = np.nan
    return sound


def named(features: SoundFeatures, sound: np.ndarray) -> dict[str, np.ndarray]:
    """Each column, and those of quality under quality_..."""
    rows, quality = features.push(sound)
    names = (*features.columns, *(f"quality_{name}" for name in features.quality))
    return dict(zip(names, np.hstack([rows, quality]).T))


def cut(features: SoundFeatures, sound: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = [features.push(part) for part in np.split(sound, np.cumsum(sizes))]
    return np.vstack([rows for rows, _ in found]), np.vstack([quality for _, quality in found])


# --------------------------------------------------------------------------------------------------------------- the clock
def test_rows_are_named_and_as_many_as_are_complete():
    features = make_sound()
    assert len(features.columns) == len(set(features.columns)) == 49
    assert features.columns[:2] == ("mel_0", "mel_1")
    assert features.quality == QUALITY == ("level", "snr", "speech", "clipping", "pitch_confidence")
    counts = [len(features.push(np.zeros(n, np.float32))[0]) for n in (0, 159, 1, 1, 320, 158)]
    assert counts == [0, 0, 1, 0, 2, 0]
    rows, quality = features.push(np.zeros(1, np.float32))
    assert rows.shape == (1, 49)
    assert quality.shape == (1, 5)
    assert rows.dtype == quality.dtype == np.float32


@pytest.mark.parametrize("seed", range(3))
def test_cuts_do_not_matter(seed):
    sound = talk(12.0, seed)
    whole = make_sound().push(sound)
    assert len(whole[0]) == 1200  # more than is worked on at a time
    assert np.unique(whole[0][:, 41]).size > 10  # of pitch
    sizes = np.random.default_rng(seed).choice([0, 1, 100, 160, 533, 1024, 4000], 400)
    parts = cut(make_sound(), sound, sizes[np.cumsum(sizes) < len(sound)])
    for one, other in zip(whole, parts):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_single_samples():
    sound = talk(0.3)
    whole = make_sound().push(sound)
    parts = cut(make_sound(), sound, np.ones(len(sound) - 1, int))
    for one, other in zip(whole, parts):
        assert len(one) == 30
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_a_row_depends_on_the_1024_samples_before_its_end():
    quiet = np.zeros(2 * RATE, np.float32)
    click = quiet.copy()
    click[RATE] = 0.5  # in row 100
    one, other = make_sound().push(quiet)[0], make_sound().push(click)[0]
    changed = np.flatnonzero((one != other).any(axis=1))
    assert changed[0] == 100
    assert changed[-1] == (RATE + WINDOW) // HOP - 1
    later = talk(2.0)
    rows, quality = make_sound().push(np.concatenate([later, noise(1.0)]))
    for whole, part in zip((rows, quality), make_sound().push(later)):
        np.testing.assert_array_equal(whole[:200], part)


# ------------------------------------------------------------------------------------------------------------ what is heard
@pytest.mark.parametrize("hz", [80.0, 110.0, 220.0, 400.0])
def test_pitch_of_a_harmonic_tone(hz):
    found = named(make_sound(), voice(1.0, hz))
    np.testing.assert_allclose(100 * 2 ** found["pitch"][10:], hz, rtol=0.01)
    assert (found["pitch_confidence"][10:] > 0.9).all()
    np.testing.assert_array_equal(found["pitch_confidence"], found["quality_pitch_confidence"])


def test_noise_has_no_pitch_and_keeps_the_last_one():
    found = named(make_sound(), np.concatenate([noise(1.0), voice(1.0, 150.0), noise(1.0, seed=1)]))
    assert (found["pitch_confidence"][:100] < 0.5).all()
    assert (found["pitch_confidence"][207:] < 0.5).all()
    assert not found["pitch"][:100].any()  # none before the first
    assert len(set(found["pitch"][207:])) == 1
    assert found["pitch"][250] == pytest.approx(math.log2(1.5), abs=0.3)  # measured half in noise


@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_pitch_confidence_is_not_deceived_by_an_offset(offset):
    found = named(make_sound(), noise(1.0, 0.01) + np.float32(offset))
    assert (found["pitch_confidence"][10:] < 0.5).all()


def test_pitch_confidence_is_not_lowered_by_a_period_between_samples():
    found = named(make_sound(), voice(0.5, RATE / 44.5))
    assert (found["pitch_confidence"][10:] > 0.99).all()


def test_rumble_has_no_pitch():
    assert (named(make_sound(), sine(0.5, 10.0))["pitch_confidence"][10:] < 0.3).all()


def test_level():
    found = named(make_sound(), np.concatenate([sine(1.0, 500.0, 0.5), np.zeros(RATE, np.float32)]))
    np.testing.assert_allclose(found["level"][10:100], 20 * math.log10(0.5 / math.sqrt(2)), atol=0.1)
    assert (found["level"][110:] == -80).all()
    np.testing.assert_array_equal(found["level"], found["quality_level"])


def test_mel_bands_and_shape_of_a_tone():
    tone, hiss = named(make_sound(), sine(1.0, 1000.0, 0.5)), named(make_sound(), noise(1.0))
    bands = np.array([tone[f"mel_{i}"][50] for i in range(40)])
    assert bands.max() == pytest.approx(20 * math.log10(0.5), abs=3)
    assert bands.argmax() == pytest.approx(14, abs=1)  # 1 kHz is a third of the way up
    assert bands.min() == -80
    assert tone["centroid"][50] == pytest.approx(1000, rel=0.05)
    assert hiss["centroid"][50] == pytest.approx(4000, rel=0.1)
    assert tone["bandwidth"][50] < 300 < hiss["bandwidth"][50]
    assert tone["flatness"][50] < 0.01 < 0.3 < hiss["flatness"][50] < 1
    assert tone["rolloff"][50] == pytest.approx(1000, abs=50)
    assert hiss["rolloff"][50] == pytest.approx(0.85 * 8000, rel=0.05)
    assert tone["zero_crossings"][50] == pytest.approx(2 * 1000 / RATE, rel=0.05)
    assert hiss["zero_crossings"][50] == pytest.approx(0.5, abs=0.06)


def test_flux_is_where_the_sound_begins():
    found = named(make_sound(), np.concatenate([noise(0.5, 0.001), noise(0.5, 0.3, seed=1)]))
    assert 50 <= found["flux"][10:].argmax() + 10 <= 52
    assert found["flux"][50:53].sum() > 10 * np.median(found["flux"][60:])


def test_clipping_counts_samples_of_the_row():
    sound = sine(0.1, 300.0, 0.5)
    sound[3 * HOP : 3 * HOP + 40] = 1.0
    sound[5 * HOP : 6 * HOP] = -0.995
    np.testing.assert_allclose(named(make_sound(), sound)["quality_clipping"], [0, 0, 0, 0.25, 0, 1, 0, 0, 0, 0])


# ------------------------------------------------------------------------------------------------------------------ quality
def test_snr_of_bursts_in_noise():
    """Of tones that sound 0.4 of every second, in the middle of the sounding and of the quiet parts."""
    seconds, of_noise = 8, 0.02
    on = np.tile(np.repeat([False, True], [round(0.6 * RATE), round(0.4 * RATE)]), seconds)
    medians = []
    for snr in (0, 10, 20):
        amplitude = of_noise * math.sqrt(2) * 10 ** (snr / 20)
        sound = np.where(on, voice(seconds, 200.0, amplitude / 1.25), np.float32(0)) + noise(seconds, of_noise)
        found = named(make_sound(), sound)["quality_snr"].reshape(seconds, ROWS)[2:]
        assert ((found >= 0) & (found <= 60)).all()
        medians.append(float(np.median(found[:, 72:98])))
        assert medians[-1] == pytest.approx(snr, abs=5)
        assert np.median(found[:, 20:58]) < 1.5
    assert medians[0] + 5 < medians[1] < medians[2] - 5


def test_noise_that_sets_in_is_known_for_noise_within_a_second_and_a_bit():
    sound = noise(10.0, 0.001)
    sound[3 * RATE :] += noise(7.0, 0.1, seed=1)
    found = named(make_sound(), sound)["quality_snr"]
    assert (found[320:380] > 20).all()
    assert (found[420:] < 3).all()
    assert (found[20:300] < 3).all()


def test_rumble_is_neither_signal_nor_noise():
    sound = noise(3.0, 0.003) + sine(3.0, 30.0, 0.2) * np.repeat(np.float32([0, 1, 0]), RATE)
    found = named(make_sound(), np.where(np.arange(len(sound)) < 2 * RATE, sound, sound + voice(3.0, 200.0, 0.05)))
    steady, rumble, over = (found["quality_snr"][a + 20 : a + 95] for a in (0, 100, 200))
    assert (found["level"][120:190] > found["level"][20:90].mean() + 20).all()
    assert np.median(steady) < 2
    assert np.median(rumble) < 26  # of the rumble's 38 dB
    assert np.median(over) > 15


def test_speech_is_periodic_and_above_the_noise():
    pause, vowel = noise(1.0, 0.003), voice(0.5, 130.0) + noise(0.5, 0.003, seed=1)
    found = named(make_sound(), np.concatenate([pause, vowel, pause, noise(0.5, 0.2, seed=2), pause]))["quality_speech"]
    assert ((found >= 0) & (found <= 1)).all()
    assert not found[:100].any()
    assert (found[110:150] > 0.9).all()
    assert (found[150:160] > 0.9).all()  # hangs over
    assert not found[180:].any()  # noise, however loud


@pytest.mark.parametrize("lowest", [0, 5000])
def test_what_is_periodic_outside_of_the_range_of_speech_is_none(lowest):
    pulses = np.zeros(RATE // 2)
    pulses[::80] = 1.0  # 200 Hz
    spectrum = np.fft.rfft(pulses) * (np.fft.rfftfreq(len(pulses), 1 / RATE) >= lowest)
    sound = np.concatenate([noise(1.0, 0.001), np.fft.irfft(spectrum).astype(np.float32) + noise(0.5, 0.001)])
    found = named(make_sound(), sound)
    assert (found["quality_snr"][110:] > 20).all()
    assert (found["pitch_confidence"][110:] > 0.9).all()
    assert ((found["quality_speech"][110:] > 0.5) == (lowest == 0)).all()


@pytest.mark.parametrize(
    "sound", [noise(7.0, 0.0), noise(7.0, 0.001), noise(7.0, 0.1), coloured(7.0, 0.5), coloured(7.0, 1.0)]
)
def test_no_speech_in_silence_and_steady_noise(sound):
    found = named(make_sound(), sound)
    assert (found["quality_speech"] < 0.1).all()
    assert all(np.isfinite(column).all() for column in found.values())


def grid(clip: Path) -> np.ndarray:
    av = pytest.importorskip("av")
    with av.open(str(clip)) as file:
        resampler = av.AudioResampler("fltp", "mono", RATE)
        frames = [one for frame in file.decode(audio=0) for one in resampler.resample(frame)] + resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


@pytest.mark.skipif(not GRID, reason="no clips of the GRID corpus beside the project")
def test_speech_in_real_clips():
    for clip in GRID[:4]:
        sound = grid(clip)
        quiet = noise(2.0, 0.001)
        found = named(make_sound(), np.concatenate([quiet, sound, quiet]))
        first, last = 2 * ROWS, 2 * ROWS + len(sound) // HOP
        middle = slice(first + 110, last - 110)  # each clip is a sentence of some 1.5 s within 3 s
        assert (found["quality_speech"][middle] > 0.5).mean() > 0.8
        assert np.median(found["quality_snr"][middle]) > 15
        assert (found["quality_speech"][:first] < 0.1).all()
        assert (found["quality_speech"][last + 20 :] < 0.1).all()
        assert all(np.isfinite(column).all() for column in found.values())


@pytest.mark.skipif(not GRID, reason="no clips of the GRID corpus beside the project")
@pytest.mark.skipif(not importlib.util.find_spec("silero_vad"), reason="the package silero-vad is not installed")
def test_silero_itself_in_real_clips():
    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None
    assert spec.origin is not None
    model = Path(spec.origin).parent / "data" / "silero_vad.onnx"
    for clip in GRID[:4]:
        found = named(make_sound(silero=str(model)), np.concatenate([grid(clip), noise(2.0, 0.01)]))["quality_speech"]
        assert (found[110:190] > 0.5).mean() > 0.8
        assert (found[-150:] < 0.3).all()


# --------------------------------------------------------------------------------------------------------- what is not there
def test_rows_without_sound_are_nan_and_those_after_are_not():
    sound = voice(2.0) + noise(2.0, 0.001)
    holes = [(0, 1), (5 * HOP - 1, 5 * HOP), (60 * HOP + 3, 90 * HOP + 1), (150 * HOP, 151 * HOP)]
    missing = np.zeros(200, bool)
    for first, last in holes:
        sound[first:last] = np.nan
        missing[first // HOP : math.ceil(last / HOP)] = True
    sound[199 * HOP] = np.inf
    missing[199] = True
    rows, quality = make_sound().push(sound)
    for found in (rows, quality):
        np.testing.assert_array_equal(np.isnan(found).all(axis=1), missing)
        np.testing.assert_array_equal(~np.isfinite(found).any(axis=1), missing)
        np.testing.assert_array_equal(np.isfinite(found).all(axis=1), ~missing)


def test_a_hole_is_not_a_quiet_noise_floor():
    sound = noise(4.0, 0.05)
    sound[RATE : 2 * RATE] = np.nan
    found = named(make_sound(), sound)
    assert (found["quality_snr"][200:] < 3).all()
    assert not found["quality_speech"][200:].any()


def test_speech_does_not_hang_over_a_hole():
    vowel, hole, quiet = voice(0.5, 130.0), np.full(RATE // 2, np.nan, np.float32), noise(1.0, 0.003)
    found = named(make_sound(), np.concatenate([quiet, vowel + noise(0.5, 0.003), hole, quiet]))["quality_speech"]
    assert found[149] > 0.9
    assert np.isnan(found[150:200]).all()
    assert not found[208:].any()  # when the mean power has forgotten the vowel


def test_silence_is_finite():
    rows, quality = make_sound().push(np.zeros(2 * RATE, np.float32))
    assert np.isfinite(rows).all()
    assert np.isfinite(quality).all()
    assert (quality[:, 0] == -80).all()
    assert not quality[:, 1:].any()


@pytest.mark.parametrize(
    ("samples", "came"),
    [(np.zeros((2, 160), np.float32), r"float32 of shape \(2, 160\)"), (np.zeros(160, np.int16), "int16")],
)
def test_samples_of_another_kind(samples, came):
    with pytest.raises(ValueError, match=rf"samples: expected floats of shape \(n,\), got {came}"):
        make_sound().push(samples)


# ----------------------------------------------------------------------------------------------------------------- plug-ins
@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("sound_functions")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_function_of_a_module(module):
    """Ten times a second, of the last second, held in between."""
    calls = []

    def loudest(samples):
        assert samples.shape == (RATE,)
        assert samples.dtype == np.float32
        calls.append(samples.copy())
        samples[:] = 9  # its own to write
        return np.abs(calls[-1]).max(), calls[-1][-1]

    loudest.columns = ("loudest", "last")
    module.loudest = loudest
    features = make_sound("sound_functions:loudest")
    assert features.columns == ("loudest", "last", "level", "pitch", "pitch_confidence")
    assert features.quality == QUALITY
    calls.clear()
    sound = (np.arange(1, 1 + 2 * RATE) / (2 * RATE)).astype(np.float32)
    sound[50 * HOP] = np.nan
    rows, quality = features.push(sound)
    assert len(calls) == 20
    held = sound[np.arange(200) // 10 * 10 * HOP + HOP - 1]  # the last sample of rows 0, 10, 20 ...
    keep = np.arange(200) != 50
    np.testing.assert_array_equal(rows[keep, :2], np.column_stack([held, held])[keep])
    assert np.isnan(rows[50]).all()
    assert np.isnan(quality[50]).all()
    assert calls[5][-HOP] == 0
    np.testing.assert_array_equal(calls[15], np.nan_to_num(sound[151 * HOP - RATE : 151 * HOP]))
    plain = named(make_sound(), sound)
    np.testing.assert_array_equal(rows[:, 2:].T, [plain["level"], plain["pitch"], plain["pitch_confidence"]])
    np.testing.assert_array_equal(quality, make_sound().push(sound)[1])
    parts = cut(make_sound("sound_functions:loudest"), sound, np.full(70, 450))
    np.testing.assert_allclose(parts[0], rows, rtol=1e-5, atol=1e-5)


def test_function_that_finds_nothing(module):
    module.some = lambda samples: [1.0, np.nan if samples[-1] > 0 else 2.0]
    features = make_sound("sound_functions:some")
    assert features.columns[:2] == ("some_0", "some_1")
    rows, quality = features.push(np.repeat(np.float32([0.0, 0.1, 0.0]), 1600))
    np.testing.assert_array_equal(np.isnan(rows).all(axis=1), np.repeat([False, True, False], 10))
    np.testing.assert_array_equal(np.isnan(rows).any(axis=1), np.repeat([False, True, False], 10))
    assert np.isfinite(quality).all()


def test_functions_that_cannot_be_used(module):
    module.number = 3
    module.grid = lambda samples: np.zeros((2, 2))
    module.none = lambda samples: []
    module.grows = lambda samples: np.zeros(1 + int(samples.any()))
    module.names = lambda samples: [1.0]
    for columns in (("a", "b"), ("level",)):
        module.names.columns = columns
        with pytest.raises(ValueError, match="spec: expected sound_functions:names to name 1 columns"):
            make_sound("sound_functions:names")
    with pytest.raises(ValueError, match="number is int"):
        make_sound("sound_functions:number")
    with pytest.raises(ValueError, match="sound_functions has no missing"):
        make_sound("sound_functions:missing")
    with pytest.raises(ValueError, match="no module no_such"):
        make_sound("no_such.module:function")
    for name in ("grid", "none"):
        with pytest.raises(ValueError, match=rf"expected sound_functions:{name} to give numbers of shape \(D,\)"):
            make_sound(f"sound_functions:{name}")
    features = make_sound("sound_functions:grows")
    with pytest.raises(ValueError, match=r"expected sound_functions:grows to give \(1,\) each time, got \(2,\)"):
        features.push(noise(0.5))


@pytest.mark.parametrize("spec", ["", "prosodie", "onnx:", "hf:", "onnx", "a b:c", "module:", ":function"])
def test_specs_that_mean_nothing(spec):
    with pytest.raises(
        ValueError, match="spec: expected prosody, opensmile, onnx:FILE, module:function or hf:DIR, got "
    ):
        make_sound(spec)


def network(path: Path, inputs: dict[str, list], outputs: dict[str, list], nodes: list[tuple], **values) -> Path:
    """An ONNX file of `nodes` (operator, inputs, output, attributes)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make = onnx.helper

    def typed(shapes):
        kind = {"sr": onnx.TensorProto.INT64}
        return [
            make.make_tensor_value_info(n, kind.get(n, onnx.TensorProto.FLOAT), shape) for n, shape in shapes.items()
        ]

    graph = make.make_graph(
        [make.make_node(kind, taken, [given], **attributes) for kind, taken, given, attributes in nodes],
        "network", typed(inputs), typed(outputs),
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )  # fmt: skip
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize(("n", "size"), [(RATE, RATE), ("n", RATE), (320, 320)])
def test_onnx(tmp_path, n, size):
    nodes = [
        ("ReduceMax", ["x"], "max", {"axes": [1], "keepdims": 1}),
        ("ReduceMean", ["x"], "mean", {"axes": [1], "keepdims": 1}),
        ("Concat", ["max", "mean"], "y", {"axis": 1}),
    ]
    path = network(tmp_path / "a.onnx", {"x": [1, n]}, {"y": [1, 2]}, nodes)
    features = make_sound(f"onnx:{path}")
    assert features.columns[:3] == ("onnx_0", "onnx_1", "level")
    sound = noise(1.5)
    rows, _ = features.push(sound)
    heard = sound[: 121 * HOP][-size:]
    np.testing.assert_allclose(rows[120:130, :2], np.tile([heard.max(), heard.mean()], (10, 1)), atol=1e-6)


def test_onnx_files_that_do_not_fit(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"spec: expected onnx:FILE .* got '.*none.onnx', which is no file"):
        make_sound(f"onnx:{tmp_path / 'none.onnx'}")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ValueError, match=r"spec: expected onnx:FILE with an ONNX network, got '.*text.onnx'"):
        make_sound(f"onnx:{tmp_path / 'text.onnx'}")
    path = network(tmp_path / "b.onnx", {"x": [1, 3, 8]}, {"y": [1, 3, 8]}, [("Abs", ["x"], "y", {})])
    with pytest.raises(
        ValueError, match=r"one float input of shape \(1, 16000\), got .*b.onnx: x tensor\(float\) \[1, 3, 8\]"
    ):
        make_sound(f"onnx:{path}")
    path = network(tmp_path / "c.onnx", {"x": [1, 16001]}, {"y": [1, 16001]}, [("Abs", ["x"], "y", {})])
    with pytest.raises(ValueError, match=r"shape \(1, 16000\), got .*c.onnx"):
        make_sound(f"onnx:{path}")


def silero(path: Path) -> Path:
    """What has Silero's inputs and outputs: says the first of the 64 samples before, plus a tenth for every call before."""
    nodes = [
        ("Add", ["state", "tenth"], "stateN", {}),
        ("Slice", ["input", "zero", "one", "axis"], "before", {}),
        ("Slice", ["state", "zeros", "ones", "axes"], "calls", {}),
        ("Reshape", ["calls", "shape"], "said", {}),
        ("Add", ["before", "said"], "output", {}),
    ]
    i64 = np.int64
    return network(
        path, {"input": [1, 576], "state": [2, 1, 128], "sr": []}, {"output": [1, 1], "stateN": [2, 1, 128]}, nodes,
        tenth=np.float32(0.1), zero=i64([0]), one=i64([1]), axis=i64([1]), zeros=i64([0, 0, 0]), ones=i64([1, 1, 1]),
        axes=i64([0, 1, 2]), shape=i64([1, 1]),
    )  # fmt: skip


def test_silero_is_given_its_context_and_its_state(tmp_path):
    sound = (np.arange(RATE // 5) / RATE).astype(np.float32)
    path = silero(tmp_path / "silero.onnx")
    rows, quality = make_sound(silero=path).push(sound)
    calls = (np.arange(1, 21) * HOP) // 512  # complete ones at each row's end
    before = np.where(calls > 1, (calls - 1) * 512 - 64, 0) / RATE
    np.testing.assert_allclose(quality[:, 2], np.where(calls > 0, before + 0.1 * (calls - 1), 0), atol=1e-6)
    parts = cut(make_sound(silero=path), sound, np.full(30, 101))
    np.testing.assert_array_equal(parts[1][:, 2], quality[:, 2])
    np.testing.assert_array_equal(rows, make_sound().push(sound)[0])


def test_silero_of_another_kind(tmp_path):
    path = network(tmp_path / "a.onnx", {"x": [1, 576]}, {"y": [1, 576]}, [("Abs", ["x"], "y", {})])
    with pytest.raises(ValueError, match=r"silero: expected a network of version 5 or later.* with x and y"):
        make_sound(silero=path)
    with pytest.raises(ValueError, match=r"silero: expected .* which is no file"):
        make_sound(silero=str(tmp_path / "none.onnx"))


def test_opensmile_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "opensmile", None)
    with pytest.raises(ImportError, match="pip install opensmile"):
        make_sound("opensmile")


def test_opensmile():
    pytest.importorskip("opensmile")
    features = make_sound("opensmile")
    found = named(features, voice(1.5, 220.0) + noise(1.5, 0.001))
    assert len(features.columns) == 28
    assert found["F0semitoneFrom27.5Hz_sma3nz"][-1] == pytest.approx(36, abs=0.5)


def test_transformers(tmp_path):
    with pytest.raises(ValueError, match=r"expected hf:DIR with a folder that holds a model's config.json"):
        make_sound(f"hf:{tmp_path}")
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config).eval()
    model.save_pretrained(str(tmp_path))
    features = make_sound(f"hf:{tmp_path}")
    assert features.columns == (*(f"hf_{i}" for i in range(16)), "level", "pitch", "pitch_confidence")
    sound = noise(1.0)
    rows, _ = features.push(np.concatenate([np.zeros(HOP, np.float32), sound]))  # row 100 has heard all of it
    torch = importlib.import_module("torch")
    with torch.no_grad():
        state = model(torch.from_numpy(sound)[None]).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(rows[100, :16], state.numpy(), atol=1e-5)


# -------------------------------------------------------------------------------------------------------------------- speed
def test_it_keeps_up():
    """Processor time; half of what it is to reach, since machines differ."""
    features, sound = make_sound(), talk(20.0)
    began = time.process_time()
    features.push(sound)
    assert 20 / (time.process_time() - began) > 20
    times = []
    for part in np.split(sound, range(533, len(sound), 533))[:200]:
        began = time.process_time()
        features.push(part)
        times.append(time.process_time() - began)
    assert np.median(times) < 3e-3


@pytest.mark.slow
def test_processes_that_begin_at_once_on_a_new_machine(tmp_path):
    """What librosa has compiled at its first use is kept on disk; written by several processes at once it is broken for good."""
    command = [sys.executable, "-c", "from sage_ext.video.sound import SoundFeatures; SoundFeatures()"]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    together = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(timeout=300) for process in together] == [0, 0, 0]
    assert list(tmp_path.rglob("*.nbi"))
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
