"""The corruption protocol against a second implementation written from docs/robustness.md, and property by property."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d

from sage_ext.data import AffWild2, Clip, clip_tensors, write_dataset
from sage_ext.data.affwild2 import Quality, Resampled
from sage_ext.data.synthetic import meter
from sage_ext.study import corruptions
from sage_ext.study.corruptions import (
    CORRUPTIONS,
    PROTOCOL,
    Condition,
    Draws,
    Track,
    apply,
    apply_images,
    apply_waveform,
    conditions,
    corrupted,
    corruption,
)

DOC = Path(__file__).parents[2] / "docs" / "robustness.md"
NAMES = ("audio", "visual")
ALL = conditions(NAMES)
SILENT = [name for name in PROTOCOL if not name.startswith("missing")]
WAVEFORM = [name for name, c in CORRUPTIONS.items() if c.domain == "waveform"]
IMAGE = [name for name, c in CORRUPTIONS.items() if c.domain == "image"]


def an_id(condition: Condition) -> str:
    return condition.name


def world(seed: int = 0, frames: int = 200, gaps: bool = True):
    """features, present, donor, stage of one clip: audio ends early, visual has surplus rows, both begin late and have gaps."""
    rng = np.random.default_rng(seed)
    lengths = {"audio": max(1, frames - frames // 20), "visual": frames + 3}
    features, present, donor = {}, {}, {}
    for name, dim in (("audio", 3), ("visual", 4)):
        wander = np.cumsum(rng.normal(size=(lengths[name], dim)), axis=0)
        features[name] = (rng.normal(size=dim) * 3 + wander).astype(np.float32)
        present[name] = np.ones(frames, bool)
        if gaps:
            start = int(rng.integers(frames // 2))
            present[name][start : start + frames // 10] = False
            features[name][start : start + frames // 20] = np.nan
            features[name][frames // 3] = np.nan  # absent, though the mask does not say so
            present[name][: frames // 50] = False
        donor[name] = rng.normal(size=(frames // 2, dim)).astype(np.float32) + 50
    stage = np.repeat(rng.integers(0, 3, size=frames // 15 + 1), 15)[:frames]
    return features, present, donor, stage


def shown(features, present, name) -> np.ndarray:
    """Frames in which a modality is present."""
    rows = features[name][: len(present[name])]
    return np.flatnonzero(present[name][: len(rows)] & ~np.isnan(rows).any(axis=1))


def run(condition, features, present, donor, stage=None, clip="c", seed=0):
    needs = CORRUPTIONS[condition.corruption].donors
    return apply(condition, features, present, clip=clip, seed=seed, donor=donor if needs else None, stage=stage)


# ----------------------------------------------------------------------- a second implementation, from the page alone


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """One block of Philox4x64-10, in Python integers (Salmon et al. 2011, figure 2)."""
    mask, (k0, k1), x = (1 << 64) - 1, key, [counter, 0, 0, 0]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k0, b & mask, (a >> 64) ^ x[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return x


class Stream:
    def __init__(self, purpose, clip, modality, seed):
        digest = hashlib.sha256(f"robustness\n1\n{purpose}\n{clip}\n{modality}\n{seed}".encode()).digest()
        key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
        self.words = (word for counter in range(1, 1 << 20) for word in philox(key, counter))

    def uniform(self, count):
        return [(next(self.words) >> 11) / 2**53 for _ in range(count)]

    def normal(self, *shape):
        numbers = []
        for _ in range((math.prod(shape) + 1) // 2):
            a, b = self.uniform(2)
            radius = math.sqrt(-2 * math.log(1 - a))
            numbers += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
        return np.array(numbers[: math.prod(shape)]).reshape(shape)

    def coin(self, count):
        return [-1 if u < 0.5 else 1 for u in self.uniform(count)]


def count(share, n):
    return min(n, max(1, math.floor(share * n + 0.5)))


def by_the_page(condition, features, present, donor, stage, clip, seed):
    """docs/robustness.md, row by row, in plain Python."""
    out = {name: value.astype(np.float64) for name, value in features.items()}
    masks = {name: value.copy() for name, value in present.items()}
    frames = len(present["audio"])
    if stage is None:
        u, stage = Stream("stage", clip, "", seed).uniform(2 * frames), []
        for t in range(frames):
            a, b = u[2 * t], u[2 * t + 1]
            if t == 0:
                stage.append(math.floor(4 * b))
            else:
                stage.append((stage[-1] + 1 + math.floor(3 * b)) % 4 if a < 1 / 90 else stage[-1])
    name, level = condition.corruption, CORRUPTIONS[condition.corruption].levels[condition.severity - 1]
    for k, m in enumerate(condition.modalities):
        f = [int(t) for t in shown(features, present, m)]
        x = out[m][f]
        n, dim = x.shape
        mu, sigma = x.mean(0), x.std(0)

        def stream(purpose, m=m):
            return Stream(purpose, clip, m, seed)

        span = [-1] * n
        if name.endswith("-spans") or name == "occluded":
            c = count(level, n)
            number = max(1, math.floor(c / 60 + 0.5))
            before, (v, *u) = 0, stream("spans").uniform(number + 1)
            for i in range(number):
                length = c // number + (1 if i < c % number else 0)
                for j in range(length):
                    span[(math.floor(v * n) + math.floor(sorted(u)[i] * (n - c + 1)) + before + j) % n] = i
                before += length
        mine = [stage[t] % len(condition.modalities) == k for t in f]
        if name in ("stage-zeroed", "stage-foreign"):
            visit = [0] * n
            for i in range(1, n):
                visit[i] = visit[i - 1] + (stage[f[i]] != stage[f[i - 1]])
            visits = sorted({v for v, hit in zip(visit, mine) if hit})
            if not visits:
                continue
            u = stream("visits").uniform(len(visits))
            chosen = [v for _, v in sorted(zip(u, visits))][: count(level, len(visits))]
            hit = [v in chosen for v in visit]
        elif name.startswith(("dead", "foreign", "missing")) and not name.endswith("-spans"):
            hit = [i >= n - count(level, n) for i in range(n)]
        else:
            hit = [s >= 0 for s in span]

        if name in ("noise", "stage-noise", "dead-noise"):
            z = stream("noise").normal(n, dim)
        if name in ("noise", "stage-noise"):
            rows = list(range(n)) if name == "noise" else [i for i in range(n) if mine[i]]
            if rows:
                x[rows] += z[rows] * sigma * 10 ** (-level / 20) / np.sqrt((z[rows] ** 2).mean(0))
        elif name == "occluded":
            o, z = stream("occluder").normal(max(span) + 1, dim), stream("occluder-jitter").normal(n, dim)
            for i in range(n):
                if hit[i]:
                    x[i] = mu + sigma * (o[span[i]] + 0.1 * z[i])
        elif name in ("zeroed-spans", "dead-zeroed", "stage-zeroed", "missing", "missing-spans"):
            x[hit] = 0
            if name.startswith("missing"):
                masks[m][[t for t, h in zip(f, hit) if h]] = False
        elif name in ("frozen-spans", "dead-frozen"):
            for i in range(1, n):
                if hit[i]:
                    x[i] = x[i - 1]
        elif name == "dead-saturated":
            coins, extremes = stream("extremes").coin(dim), (x.min(0).copy(), x.max(0).copy())
            x[hit] = [extremes[1][d] if coins[d] > 0 else extremes[0][d] for d in range(dim)]
        elif name == "dead-noise":
            x[hit] = (mu + sigma * z)[hit]
        elif name in ("foreign", "foreign-spans", "stage-foreign"):
            y = donor[m]
            back_and_forth = [*range(len(y)), *range(len(y) - 2, 0, -1)]
            offset = math.floor(stream("donor-start").uniform(1)[0] * len(y))
            for i in range(n):
                if hit[i]:
                    x[i] = y[back_and_forth[(f[i] + offset) % len(back_and_forth)]]
        elif name == "misaligned":
            old = x.copy()
            for i in range(n):
                if stream("direction").coin(1)[0] > 0:
                    x[i] = old[max([j for j in range(n) if f[j] <= f[i] - level], default=0)]
                else:
                    x[i] = old[min([j for j in range(n) if f[j] >= f[i] + level], default=n - 1)]
        elif name == "gain":
            x *= 10 ** (stream("direction").coin(1)[0] * level / 20)
        elif name == "drift":
            b = np.array(stream("direction").coin(dim))
            for i in range(n):
                x[i] += level * sigma * b * (f[i] - f[0]) / max(1, f[-1] - f[0])
        else:
            raise AssertionError(f"{name} is not on the page")
        out[m][f] = x
    return out, masks


@pytest.mark.parametrize("condition", ALL, ids=an_id)
def test_agrees_with_a_second_implementation(condition):
    features, present, donor, stage = world(seed=condition.severity, frames=160)
    for given_stage in [None, stage] if condition.corruption.startswith("stage") else [None]:
        got, mask = run(condition, features, present, donor, given_stage, clip="clip ä", seed=condition.severity)
        want, want_mask = by_the_page(condition, features, present, donor, given_stage, "clip ä", condition.severity)
        for name in NAMES:
            # float32 results of float32 normals: a few units in the last place of the largest intermediate
            np.testing.assert_allclose(got[name], want[name], rtol=2e-6, atol=2e-5)
            np.testing.assert_array_equal(mask[name], want_mask[name])


def test_streams_are_philox():
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox((0, 0), 0) == known  # the published known answer
    ours, theirs = Draws("robustness", 1, "noise", "c", "audio", 7), Stream("noise", "c", "audio", 7)
    np.testing.assert_array_equal(ours.uniform(5, 2).ravel(), theirs.uniform(10))
    np.testing.assert_allclose(ours.normal(3, 3), theirs.normal(3, 3), rtol=1e-6)
    np.testing.assert_allclose(ours.normal(1), theirs.normal(1), rtol=1e-6)  # an odd request drops one
    np.testing.assert_array_equal(ours.coins(8), theirs.coin(8))


def test_long_normal_draws_are_normal():
    numbers = Draws("test").normal(600_001).astype(np.float64)  # in several blocks
    assert numbers[:5] == pytest.approx(Draws("test").normal(5).astype(np.float64))
    assert abs(numbers.mean()) < 4e-3
    assert abs(numbers.std() - 1) < 4e-3
    assert abs((numbers**4).mean() - 3) < 0.05
    assert abs(np.mean(numbers[:-1] * numbers[1:])) < 4e-3


# -------------------------------------------------------------------------------------------------- the documentation


def test_documented_snippets_run(tmp_path, monkeypatch):
    write_dataset(tmp_path / "DATA", seed=2, train=1, validation=2, test=0, frames=(20, 40))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corruptions, "CORRUPTIONS", dict(CORRUPTIONS))
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    space: dict = {}
    for block in blocks:
        ast.parse(block)
        exec(compile(block, str(DOC), "exec"), space)
    assert space["features"]["audio"].dtype == np.float32
    assert space["noisy"].shape == (16000,)
    assert space["blurred"].shape == (30, 112, 112, 3)
    assert "quantised" not in CORRUPTIONS  # the registry was a copy


def test_documented_tables_are_the_registry():
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+?) \| (.+) \|$", DOC.read_text(), flags=re.MULTILINE)
    assert [name for name, *_ in rows] == list(CORRUPTIONS)
    for name, severities, rest in rows:
        spec = CORRUPTIONS[name]
        assert severities == ", ".join(f"{level:g}" for level in spec.levels) + f" {spec.unit}"
        if spec.domain == "feature":
            scopes = {"each": "each", "each+all": "each, all", "rotations": "rotations"}[spec.scopes]
            assert rest.rsplit(" | ", 1)[1] == scopes


# ------------------------------------------------------------------------------------------------- conditions and names


def test_the_protocol_is_counted():
    assert len(PROTOCOL) == 18
    assert len(ALL) == 215
    assert len(conditions(NAMES, severities=(3,))) == 43
    assert len(conditions(["audio"])) == 15 * 5  # no turns to take
    assert len(conditions(["a", "b", "c"], ["stage-noise", "noise", "foreign"], (1,))) == 3 + 4 + 3
    names = [condition.name for condition in ALL]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]+", name) for name in names)
    assert Condition("noise", 3, ("audio", "visual")).name == "noise-3-audio+visual"
    assert Condition("noise", 3, ("a/b+c",)).name == "noise-3-a%2Fb%2Bc"
    assert Condition("noise", np.int64(2), ["audio"]) == Condition("noise", 2, ("audio",))
    assert pickle.loads(pickle.dumps(ALL)) == ALL
    assert len(set(ALL)) == len(ALL)


def test_each_rotation_takes_turns_once():
    assert [c.modalities for c in conditions(["a", "b", "c"], ["stage-noise"], (1,))] == [
        ("a", "b", "c"),
        ("b", "c", "a"),
        ("c", "a", "b"),
    ]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Condition("nose", 1, ("a",)), ValueError, "corruption: expected one of noise, .*'nose'"),
        (lambda: Condition("noise", 6, ("a",)), ValueError, "severity: expected 1 to 5, got 6"),
        (lambda: Condition("noise", 1.0, ("a",)), TypeError, "severity: expected an integer"),
        (lambda: Condition("noise", True, ("a",)), TypeError, "severity: expected an integer"),
        (lambda: Condition("noise", 1, "audio"), TypeError, "modalities: .* got the string 'audio'"),
        (lambda: Condition("noise", 1, ()), ValueError, "modalities: expected one or more"),
        (lambda: Condition("noise", 1, ("a", "a")), ValueError, "modalities: .* different"),
        (lambda: Condition("noise", 1, (1,)), TypeError, "modalities: expected names"),
        (
            lambda: Condition("stage-noise", 1, ("a",)),
            ValueError,
            "modalities: expected two or more",
        ),
        (lambda: conditions(["a"], ["nose"]), ValueError, "corruptions: .*'nose'"),
        (lambda: conditions(["a"], "noise"), TypeError, "corruptions: expected a sequence"),
        (lambda: conditions(["a"], severities=(0,)), ValueError, "severity"),
    ],
)
def test_bad_conditions_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


# ----------------------------------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("condition", ALL, ids=an_id)
def test_changes_what_it_should_and_nothing_else(condition):
    features, present, donor, stage = world(frames=200)
    for arrays in (features, present, donor):
        for value in arrays.values():
            value.flags.writeable = False  # an attempt to write would raise
    stage.flags.writeable = False
    got, mask = run(condition, features, present, donor, stage)
    changed = 0
    for name in NAMES:
        frames = shown(features, present, name)
        absent = np.setdiff1d(np.arange(len(features[name])), frames)
        assert got[name].dtype == np.float32
        assert mask[name].dtype == bool
        assert not np.shares_memory(got[name], features[name])
        assert not np.shares_memory(mask[name], present[name])
        np.testing.assert_array_equal(got[name][absent], features[name][absent])  # NaN and all
        assert not (mask[name] & ~present[name]).any()
        assert np.isfinite(got[name][frames]).all()
        different = (got[name][frames] != features[name][frames]).any(axis=1) | ~mask[name][frames]
        if name not in condition.modalities:
            assert not different.any()
        changed += int(different.sum())
        if condition.corruption in SILENT:
            np.testing.assert_array_equal(mask[name], present[name])
    assert changed > 0


@pytest.mark.parametrize("name", PROTOCOL)
def test_severities_rise(name):
    """The disturbance (mean square, an absent row counting as the row itself) never falls with severity."""
    features, present, donor, stage = world(seed=5, frames=600)
    for scope in {condition.modalities for condition in conditions(NAMES, [name])}:
        sizes = []
        for severity in corruptions.SEVERITIES:
            got, mask = run(Condition(name, severity, scope), features, present, donor, stage)
            size = 0.0
            for m in scope:
                frames = shown(features, present, m)
                rows = np.where(mask[m][frames, None], got[m][frames], 0)
                size += float(np.square(rows.astype(np.float64) - features[m][frames]).sum())
            sizes.append(size)
        if name in ("misaligned", "gain", "dead-frozen"):  # a random walk may come back, and quieter is bounded
            assert sizes[-1] > sizes[0]
        elif name.endswith("spans") or name == "occluded":  # the spans move with the share
            assert sizes[-1] > 2 * sizes[0]
        else:
            assert np.all(np.diff(sizes) >= 0)
            assert sizes[-1] > sizes[0]


@pytest.mark.parametrize("name", PROTOCOL)
def test_the_key_is_the_clip_and_the_seed(name):
    features, present, donor, _ = world(frames=400, gaps=False)
    condition = conditions(NAMES, [name], (3,))[0]
    one, mask = run(condition, features, present, donor)
    again, mask_again = run(condition, features, present, donor)
    for m in NAMES:
        np.testing.assert_array_equal(one[m], again[m])
        np.testing.assert_array_equal(mask[m], mask_again[m])
    others = [run(condition, features, present, donor, clip=f"d{k}", seed=k // 4)[0] for k in range(8)]
    same = [all(np.array_equal(one[m], other[m]) for m in NAMES) for other in others]
    same_mask = [
        np.array_equal(mask["audio"], run(condition, features, present, donor, clip=f"d{k}")[1]["audio"])
        for k in range(8)
    ]
    if name in ("dead-zeroed", "dead-frozen", "missing"):
        assert all(same)  # nothing random in them
        assert all(same_mask)
    else:
        assert not all(same)


def test_modalities_fail_independently_and_alone_as_together():
    features, present, donor, _ = world(frames=300)
    for name in ("noise", "occluded", "zeroed-spans", "gain", "drift"):
        both, _ = run(Condition(name, 2, NAMES), features, present, donor)
        for m in NAMES:
            alone, _ = run(Condition(name, 2, (m,)), features, present, donor)
            np.testing.assert_array_equal(both[m], alone[m])
    same = dict.fromkeys(NAMES, features["audio"][:280])
    both, _ = apply(Condition("noise", 5, NAMES), same, clip="c", seed=0)
    seen = ~np.isnan(same["audio"]).any(axis=1)
    a, b = ((both[m] - same[m])[seen].ravel() for m in NAMES)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15  # 750 numbers: 4 standard deviations


SCRIPT = """
import hashlib, sys
import numpy as np
from sage_ext.study.corruptions import apply, conditions
assert "scipy" not in sys.modules
digest = hashlib.sha256()
rng = np.random.default_rng(1)
x = {m: rng.normal(size=(150, 5)).astype(np.float32) for m in ("visual", "audio")}
y = {m: rng.normal(size=(60, 5)).astype(np.float32) for m in x}
order = conditions(["audio", "visual"], severities=(1, 4))
for condition in reversed(order) if sys.argv[1] == "reversed" else order:
    features, present = apply(condition, x, clip="a clip", seed=11, donor=y)
    part = hashlib.sha256(b"".join(features[m].tobytes() + present[m].tobytes() for m in sorted(x))).hexdigest()
    print(condition.name, part)
"""


@pytest.mark.slow
def test_two_processes_agree():
    outputs = []
    for hash_seed, order in (("1", "forward"), ("2", "reversed")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, order], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(sorted(done.stdout.splitlines()))
    assert len(outputs[0]) == 86
    assert outputs[0] == outputs[1]


# -------------------------------------------------------------------------------------------- corruption by corruption


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize("frames", [7, 400])
def test_the_noise_has_the_stated_ratio(severity, frames):
    features, present, _, _ = world(frames=frames)
    features["visual"][:, 2] = 4.0  # a dead feature stays as it is
    got, _ = run(Condition("noise", severity, NAMES), features, present, None)
    for m in NAMES:
        where = shown(features, present, m)
        x, e = features[m][where].astype(np.float64), got[m][where].astype(np.float64) - features[m][where]
        alive = x.std(0) > 0
        assert alive.sum() == 3
        ratio = 10 * np.log10(x.var(0)[alive] / np.square(e).mean(0)[alive])
        np.testing.assert_allclose(ratio, [15, 10, 5, 0, -5][severity - 1], atol=1e-3)
        assert (e[:, ~alive] == 0).all()


def test_noise_does_not_see_absent_rows():
    features, present, _, _ = world()
    wild = {m: np.where(present[m][: len(x), None], x[:200], 1e6) for m, x in features.items()}
    a, _ = run(Condition("noise", 3, NAMES), {m: x[: len(wild[m])] for m, x in features.items()}, present, None)
    b, _ = run(Condition("noise", 3, NAMES), wild, present, None)
    for m in NAMES:
        where = shown(features, present, m)
        np.testing.assert_array_equal(a[m][where], b[m][where])


@pytest.mark.parametrize(
    "name", [n for n in PROTOCOL if CORRUPTIONS[n].unit.startswith(("share of f", "share of the"))]
)
def test_the_share_is_exact(name):
    features, present, donor, _ = world(seed=4, frames=1000)
    for severity in corruptions.SEVERITIES:
        for m in NAMES:
            where = shown(features, present, m)
            got, mask = run(Condition(name, severity, (m,)), features, present, donor)
            share = CORRUPTIONS[name].levels[severity - 1]
            hit = (got[m][where] != features[m][where]).any(axis=1)
            want = math.floor(share * len(where) + 0.5)
            first_row_held = name in ("dead-frozen", "frozen-spans") and (severity == 5 or not hit[0])
            assert int(hit.sum()) in ({want, want - 1} if first_row_held else {want})
            if name.startswith(("dead", "foreign")) and not name.endswith("spans") and name != "dead-frozen":
                assert hit[len(where) - want :].all()
            announced = int((~mask[m][where]).sum())
            assert announced == (want if name.startswith("missing") else 0)


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(1, 200), st.integers(0, 50))
def test_spans(n, share, length, seed):
    track = Track(
        np.zeros((n, 1), np.float32), np.arange(n), 0, ("c", "m", seed), np.ones(n, bool), stretch=length / 60
    )
    span = track.spans(share)
    chosen = min(n, max(1, math.floor(share * n + 0.5)))
    assert (span >= 0).sum() == chosen
    sizes = np.bincount(span[span >= 0])
    assert len(sizes) == max(1, int(chosen / length + 0.5))
    assert sizes.max() - sizes.min() <= 1
    ring = np.flatnonzero(span != np.roll(span, 1))  # where a span, or a gap, begins
    begun = span[ring].tolist()
    assert len([number for number in begun if number >= 0]) == (len(sizes) if len(ring) else 0)  # each is one run
    order = [number for number in begun if number >= 0]
    first = order.index(0) if order else 0
    assert order[first:] + order[:first] == list(range(len(order)))


def test_every_frame_is_equally_likely_to_be_hit():
    hits, trials = np.zeros(120), 1000
    for seed in range(trials):
        track = Track(
            np.zeros((120, 1), np.float32), np.arange(120), 0, ("c", "m", seed), np.ones(120, bool), stretch=1 / 3
        )
        hits += track.spans(0.3) >= 0
    assert np.abs(hits / trials - 0.3).max() < 4.5 * math.sqrt(0.3 * 0.7 / trials)


def test_announced_and_silent_failures_hit_the_same_frames():
    features, present, donor, _ = world(frames=500)
    for announced, silent in (("missing-spans", "zeroed-spans"), ("missing", "dead-zeroed")):
        for severity in corruptions.SEVERITIES:
            told, mask = run(Condition(announced, severity, NAMES), features, present, donor)
            hidden, untouched = run(Condition(silent, severity, NAMES), features, present, donor)
            for m in NAMES:
                np.testing.assert_array_equal(told[m], hidden[m])
                np.testing.assert_array_equal(untouched[m], present[m])
                where = shown(features, present, m)
                np.testing.assert_array_equal(~mask[m][where], (hidden[m][where] == 0).all(axis=1))


def test_dead_kinds():
    features, present, donor, _ = world(frames=600)
    x = features["audio"][shown(features, present, "audio")].astype(np.float64)

    def dead(kind, severity=5):
        got, _ = run(Condition(f"dead-{kind}", severity, ("audio",)), features, present, donor)
        return got["audio"][shown(features, present, "audio")].astype(np.float64)

    assert (dead("zeroed") == 0).all()
    assert (dead("frozen") == x[0]).all()
    late = dead("frozen", 2)
    start = len(x) - math.floor(0.4 * len(x) + 0.5)
    np.testing.assert_array_equal(late[start:], np.broadcast_to(x[start - 1], late[start:].shape))
    stuck = dead("saturated")
    assert (stuck == stuck[0]).all()
    assert all(stuck[0, d] in (x[:, d].min(), x[:, d].max()) for d in range(3))
    noise = dead("noise")
    np.testing.assert_allclose(noise.mean(0), x.mean(0), atol=5 * x.std(0).max() / math.sqrt(len(x)))
    np.testing.assert_allclose(noise.std(0), x.std(0), rtol=0.15)
    assert max(abs(np.corrcoef(noise[:, d], x[:, d])[0, 1]) for d in range(3)) < 4.5 / math.sqrt(len(x))
    np.testing.assert_allclose(noise[1:] @ [1, 0, 0] - x.mean(0)[0], noise[1:, 0] - x[:, 0].mean())


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_misaligned_is_a_shift(severity):
    frames = 300
    x = {"audio": np.arange(frames, dtype=np.float32)[:, None]}
    shift, seen = (5, 10, 20, 40, 80)[severity - 1], set()
    for clip in "abcdefgh":
        got, _ = apply(Condition("misaligned", severity, ("audio",)), x, clip=clip, seed=0)
        delta = got["audio"][:, 0] - x["audio"][:, 0]
        inner = delta[shift : frames - shift]
        assert set(inner.tolist()) in ({-float(shift)}, {float(shift)})
        assert got["audio"].min() == (0 if inner[0] < 0 else shift)
        seen.add(float(inner[0]))
    assert seen == {-float(shift), float(shift)}  # late in some clips, early in others


def test_gain_and_drift_in_numbers():
    x = {"audio": np.random.default_rng(0).normal(size=(101, 6)).astype(np.float32)}
    for severity, (decibel, rise) in enumerate(zip((3, 6, 9, 12, 15), (0.5, 1, 2, 3, 4)), start=1):
        factors = set()
        for clip in "abcdefgh":
            loud, _ = apply(Condition("gain", severity, ("audio",)), x, clip=clip, seed=0)
            factor = 20 * np.log10(loud["audio"] / x["audio"])
            assert np.ptp(factor) < 1e-4
            factors.add(round(float(factor.mean()), 3))
        assert factors == {-decibel, decibel}
        got, _ = apply(Condition("drift", severity, ("audio",)), x, clip="a", seed=0)
        moved = (got["audio"].astype(np.float64) - x["audio"]) / x["audio"].std(0, dtype=np.float64)
        np.testing.assert_allclose(np.abs(moved), np.abs(moved[-1:]) * np.linspace(0, 1, 101)[:, None], atol=1e-5)
        np.testing.assert_allclose(np.abs(moved[-1]), rise, atol=1e-5)
        assert len(set(np.sign(moved[-1]))) == 2


def test_stages_take_turns():
    features, present, donor, stage = world(frames=300, gaps=False)
    features = {m: x[:285] for m, x in features.items()}
    hits = {}
    for scope in (NAMES, NAMES[::-1]):
        got, _ = run(Condition("stage-zeroed", 5, scope), features, present, donor, stage)
        hits[scope] = {m: (got[m] == 0).all(axis=1) for m in NAMES}
        np.testing.assert_array_equal(hits[scope][scope[0]], stage[:285] % 2 == 0)
        np.testing.assert_array_equal(hits[scope][scope[1]], stage[:285] % 2 == 1)
    noisy, _ = run(Condition("stage-noise", 5, NAMES), features, present, donor, stage)
    foreign, _ = run(Condition("stage-foreign", 5, NAMES), features, present, donor, stage)
    for m in NAMES:
        np.testing.assert_array_equal((noisy[m] != features[m]).any(axis=1), hits[NAMES][m])
        np.testing.assert_array_equal((foreign[m] > 40).all(axis=1), hits[NAMES][m])  # donors lie about 50
    x, e = features["audio"].astype(np.float64), (noisy["audio"].astype(np.float64) - features["audio"])
    power = np.square(e[hits[NAMES]["audio"]]).mean(0)
    np.testing.assert_allclose(10 * np.log10(x.var(0) / power), -5, atol=1e-3)


def test_visits():
    stage = np.repeat([0, 2, 1, 0, 1, 2, 0, 4, 1], 10)  # audio's visits: 0 2 | 0 | 2 0 4, six of them
    x = {m: np.ones((90, 1), np.float32) for m in NAMES}
    before = np.zeros(9, bool)
    for severity, visits in zip(corruptions.SEVERITIES, (1, 2, 4, 5, 6)):
        got, _ = apply(Condition("stage-zeroed", severity, NAMES), x, clip="c", seed=1, stage=stage)
        hit = (got["audio"][:, 0] == 0).reshape(9, 10)
        assert (hit.all(axis=1) == hit.any(axis=1)).all()  # whole visits
        assert hit.any(axis=1).sum() == visits
        assert not (before & ~hit.any(axis=1)).any()  # a severer failure contains the milder one
        before = hit.any(axis=1)
    only_even, _ = apply(Condition("stage-zeroed", 5, NAMES), x, clip="c", seed=1, stage=np.zeros(90, np.uint8))
    assert (only_even["visual"] == 1).all()  # its stage never comes


def test_the_stage_chain():
    """Without stages: four of them, all used, 90 frames a visit on average, shared by the modalities of a clip."""
    frames = 20_000
    x = {m: np.ones((frames, 1), np.float32) for m in NAMES}
    got, _ = apply(Condition("stage-zeroed", 5, NAMES), x, clip="c", seed=0)
    np.testing.assert_array_equal(got["audio"] == 0, got["visual"] == 1)  # exactly one of them, everywhere
    chain = corruptions._chain("c", 0, frames, 1.0)
    assert set(chain.tolist()) == {0, 1, 2, 3}
    changes = int((np.diff(chain) != 0).sum())
    assert abs(changes - frames / 90) < 4 * math.sqrt(frames / 90)
    assert {int(corruptions._chain(f"c{k}", 0, 1, 1.0)[0]) for k in range(40)} == {0, 1, 2, 3}  # it begins anywhere
    assert (corruptions._chain("d", 0, frames, 1.0) != chain).any()
    assert (corruptions._chain("c", 1, frames, 1.0) != chain).any()


# ------------------------------------------------------------------------------------------------------ odd clips


@pytest.mark.parametrize("name", PROTOCOL)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_short_clips(name, frames):
    rng = np.random.default_rng(frames)
    features = {m: rng.normal(size=(frames, 3)).astype(np.float32) + 2 for m in NAMES}
    present = {m: np.ones(frames, bool) for m in NAMES}
    donor = {m: rng.normal(size=(1, 3)).astype(np.float32) + 9 for m in NAMES}
    still = {"noise", "occluded", "frozen-spans", "dead-saturated", "dead-frozen", "dead-noise", "drift", "misaligned"}
    for condition in conditions(NAMES, [name]):
        got, mask = run(condition, features, present, donor)
        for m in NAMES:
            assert np.isfinite(got[m]).all()
            assert got[m].shape == (frames, 3)
        same = all(np.array_equal(got[m], features[m]) and mask[m].all() for m in NAMES)
        if frames == 1 and name in still | {"stage-noise"}:  # as documented: a single row does not vary
            assert same, condition
        elif name not in ("frozen-spans", "dead-frozen"):
            assert not same, condition


@pytest.mark.parametrize("condition", conditions(NAMES, severities=(1, 5)), ids=an_id)
def test_a_clip_without_the_modality(condition):
    features = {"audio": np.zeros((0, 3), np.float32), "visual": np.full((10, 3), np.nan, np.float32)}
    present = {"audio": np.zeros(10, bool), "visual": np.ones(10, bool)}
    got, mask = run(condition, features, present, {m: np.ones((4, 3), np.float32) for m in NAMES})
    assert got["audio"].shape == (0, 3)
    assert np.isnan(got["visual"]).all()
    assert not mask["audio"].any()
    assert mask["visual"].all()  # its NaN rows say that it is absent, as before


def test_empty_clips_and_modalities_left_alone():
    empty = {m: np.zeros((0, 3), np.float32) for m in NAMES}
    got, mask = apply(Condition("stage-noise", 1, NAMES), empty, clip="c", seed=0)
    assert got["audio"].shape == (0, 3)
    assert mask["audio"].shape == (0,)
    other = {**empty, "text": np.array([[np.inf]], np.float32)}  # of no concern
    got, _ = apply(Condition("noise", 1, ("audio",)), other, clip="c", seed=0)
    np.testing.assert_array_equal(got["text"], other["text"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_floating_point_is_taken(dtype):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(dtype)
    got, _ = apply(Condition("noise", 3, ("audio",)), {"audio": x}, clip="c", seed=0)
    want, _ = apply(Condition("noise", 3, ("audio",)), {"audio": x.astype(np.float32)}, clip="c", seed=0)
    np.testing.assert_array_equal(got["audio"], want["audio"])


def test_the_donor_runs_back_and_forth():
    x = {"audio": np.zeros((50, 1), np.float32)}
    donor = {"audio": np.array([[1], [np.nan], [2], [3], [4]], np.float32)}  # the NaN row is left out
    got, _ = apply(Condition("foreign", 5, ("audio",)), x, clip="c", seed=0, donor=donor)
    steps = np.diff(got["audio"][:, 0])
    assert set(np.abs(steps).tolist()) == {1.0}
    assert set(got["audio"][:, 0].tolist()) == {1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"condition": "noise-1-audio"}, TypeError, "condition: expected a Condition, got str"),
        (
            {"condition": Condition("image-noise", 1, ("audio",))},
            ValueError,
            "domain 'feature', got image-noise of 'image'",
        ),
        (
            {"condition": Condition("noise", 1, ("text",))},
            ValueError,
            "features: expected the modality 'text' of noise-1-text",
        ),
        ({"features": [1.0]}, TypeError, "features: expected a mapping"),
        (
            {"features": {"audio": np.zeros((9, 3), int)}},
            TypeError,
            r"features\['audio'\]: expected floating point, got int",
        ),
        ({"features": {"audio": np.zeros(9, np.float32)}}, ValueError, r"features\['audio'\]: expected 2 axes.*\(9,\)"),
        ({"features": {"audio": np.full((9, 3), np.inf)}}, ValueError, r"features\['audio'\].*infinity in row 0"),
        ({"present": {}}, ValueError, "present: expected a mask for 'audio', got none"),
        ({"present": np.ones(9, bool)}, TypeError, "present: expected a mapping"),
        ({"present": {"audio": np.ones(9)}}, TypeError, r"present\['audio'\]: expected bool, got float64"),
        ({"present": {"audio": np.ones((9, 1), bool)}}, ValueError, r"present\['audio'\]: expected the shape \(T,\)"),
        ({"clip": 7}, TypeError, "clip: expected a name, got int"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got float"),
        (
            {"condition": Condition("foreign", 1, ("audio",))},
            ValueError,
            "donor: expected another clip's rows of 'audio'",
        ),
        (
            {"condition": Condition("foreign", 1, ("audio",)), "donor": {"audio": np.ones((4, 2))}},
            ValueError,
            r"donor\['audio'\]: .* 3 features, got \(4, 2\)",
        ),
        (
            {"condition": Condition("foreign", 1, ("audio",)), "donor": {"audio": np.full((4, 3), np.nan)}},
            ValueError,
            r"donor\['audio'\]: expected one or more",
        ),
    ],
)
def test_bad_arrays_are_refused(change, error, says):
    arguments = {
        "condition": Condition("noise", 1, ("audio",)),
        "features": {"audio": np.zeros((9, 3), np.float32)},
        "present": {"audio": np.ones(9, bool)},
        "clip": "c",
        "seed": 0,
        **change,
    }
    with pytest.raises(error, match=says):
        apply(arguments.pop("condition"), arguments.pop("features"), arguments.pop("present"), **arguments)


@pytest.mark.parametrize(
    ("stage", "error", "says"),
    [
        (np.zeros(9), TypeError, "stage: expected integers, got float64"),
        (np.zeros(8, int), ValueError, r"stage: expected the shape \(9,\), got \(8,\)"),
        (np.full(9, -1), ValueError, "stage: expected integers >= 0, got -1"),
    ],
)
def test_bad_stages_are_refused(stage, error, says):
    x = {m: np.zeros((9, 3), np.float32) for m in NAMES}
    with pytest.raises(error, match=says):
        apply(Condition("stage-noise", 1, NAMES), x, clip="c", seed=0, stage=stage)


def test_masks_of_different_lengths_are_refused():
    x = {m: np.zeros((9, 3), np.float32) for m in NAMES}
    masks = {"audio": np.ones(9, bool), "visual": np.ones(8, bool)}
    with pytest.raises(ValueError, match="present: expected masks of one length, got 9 and 8"):
        apply(Condition("noise", 1, ("audio",)), x, masks, clip="c", seed=0)


# --------------------------------------------------------------------------------------------------------- data sets


def clip_of(name: str, value: float, frames: int = 40, audio: bool = True) -> Clip:
    """Features that tell whose they are: `value` and the frame's number."""
    rows = np.stack([np.full(frames, value), np.arange(frames)], axis=1).astype(np.float32)
    present = {m: np.ones(frames, bool) for m in NAMES}
    if not audio:
        present["audio"][:] = False
    features = {m: rows.copy() for m in NAMES}
    return Clip(name, np.zeros((frames, 2), np.float32), np.ones(frames, bool), features, present, frames)


def donors_of(clips, modalities=("audio",), seed=0) -> dict[str, float]:
    bad = corrupted(clips, Condition("foreign", 5, modalities), seed)
    found = {}
    for clip in bad:
        values = set(clip.features["audio"][clip.present["audio"]][:, 0].tolist())
        assert len(values) <= 1
        found[clip.name] = values.pop() if values else None
    return found


def test_donors_are_others():
    clips = [clip_of(f"v{k}", k) for k in range(6)]
    for seed in range(20):
        donors = donors_of(clips, seed=seed)
        assert all(donors[f"v{k}"] != k for k in range(6))
        assert donors == donors_of(clips[::-1], seed=seed)  # whatever the order
        fewer = donors_of(clips[:4], seed=seed)
        assert all(fewer[name] == donors[name] for name in fewer if donors[name] < 4)  # and whoever else is there
    assert len({donors_of(clips, seed=seed)["v0"] for seed in range(30)}) == 5  # any of them
    assert donors_of(clips, NAMES, 3) == donors_of(clips, ("audio",), 3)


def test_two_persons_of_a_video_are_no_donors_of_each_other():
    clips = [clip_of("v0_left", 0), clip_of("v0_right", 1), clip_of("v0", 2), clip_of("v1", 3)]
    for seed in range(10):
        donors = donors_of(clips, seed=seed)
        assert donors["v0_left"] == donors["v0_right"] == donors["v0"] == 3
    with pytest.raises(ValueError, match="clips: expected clips of two videos or more"):
        corrupted(clips[:3], Condition("foreign", 5, ("audio",)), 0)


def test_a_donor_has_the_modality():
    clips = [clip_of("a", 0), clip_of("b", 1, audio=False), clip_of("c", 2, audio=False), clip_of("d", 3)]
    for seed in range(10):
        assert donors_of(clips, seed=seed) == {"a": 3, "b": None, "c": None, "d": 0}
    lonely = corrupted(clips[:3], Condition("foreign", 5, ("audio",)), 0)
    with pytest.raises(ValueError, match="clips: expected 'audio' in a clip of another video than a, got none"):
        lonely[0]


def test_modalities_have_donors_of_their_own():
    clips = [clip_of(f"v{k}", k) for k in range(12)]
    bad = corrupted(clips, Condition("foreign", 5, NAMES), 0)
    pairs = [(clip.features["audio"][0, 0], clip.features["visual"][0, 0]) for clip in bad]
    assert any(a != b for a, b in pairs)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("robustness") / "data"
    write_dataset(root, seed=1, train=1, validation=9, test=0, frames=(60, 120), modalities={"audio": 8, "visual": 8})
    return root


@pytest.mark.parametrize("condition", conditions(NAMES, severities=(4,)), ids=an_id)
def test_a_data_set(dataset, condition):
    clips = AffWild2(dataset, "validation")
    stages = {}
    for name in clips.names:
        with np.load(dataset / "truth" / f"{name}.npz") as truth:
            stages[name] = truth["stage"]
    bad = corrupted(clips, condition, 5, stages=stages)
    assert len(bad) == len(clips)
    changed = 0
    for index, clip in enumerate(clips):
        other = bad[index]
        assert (other.name, other.num_frames) == (clip.name, clip.num_frames)
        np.testing.assert_array_equal(other.labels, clip.labels)
        np.testing.assert_array_equal(other.valid, clip.valid)
        assert list(other.features) == list(clip.features)
        before, after = clip_tensors(clip, NAMES), clip_tensors(other, NAMES)  # raises for what a model cannot take
        lost = before["present"] & ~after["present"]
        assert not (after["present"] & ~before["present"]).any()
        assert bool(lost.any()) == condition.corruption.startswith("missing")
        for m, name in enumerate(NAMES):
            np.testing.assert_array_equal(after["present"][:, m].numpy(), other.present[name])
            different = bool((before["features"][name] != after["features"][name]).any())
            assert name in condition.modalities or not different
            changed += different
    assert changed >= len(clips) - 2
    again = corrupted([clips[i] for i in range(len(clips))][::-1], condition, 5, stages=stages)
    for index, clip in enumerate(again):
        for name in NAMES:
            np.testing.assert_array_equal(clip.features[name], bad[len(clips) - 1 - index].features[name][:])


def test_stages_matter_where_given(dataset):
    clips, condition = AffWild2(dataset, "validation"), Condition("stage-zeroed", 5, NAMES)
    name, frames = clips.names[2], clips[2].num_frames
    stages = {name: np.arange(frames) // 7}
    bad = corrupted(clips, condition, 0, stages=stages)[2]
    hit = (bad.features["audio"][:frames] == 0).all(axis=1)
    where = bad.present["audio"][: len(hit)]
    np.testing.assert_array_equal(hit[where], (stages[name] % 2 == 0)[: len(hit)][where])
    with pytest.raises(ValueError, match="stage: expected the shape"):
        corrupted(clips, condition, 0, stages={name: np.zeros(3, int)})[2]
    chain = corrupted(clips, condition, 0, stages={})[2]  # a clip without stages gets the chain
    default = corrupted(clips, condition, 0)[2]
    np.testing.assert_array_equal(chain.features["audio"], default.features["audio"])


def test_a_missing_modality_is_named(dataset):
    bad = corrupted(AffWild2(dataset, "validation"), Condition("noise", 1, ("text",)), 0)
    with pytest.raises(ValueError, match="clips: expected the modality 'text' in "):
        bad[0]


def test_resampled_features_are_computed():
    clip = clip_of("v0", 1, frames=30)
    rows = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    clip = Clip("v0", clip.labels, clip.valid, {"audio": Resampled(rows, 100.0)}, {"audio": clip.present["audio"]}, 30)
    bad = corrupted([clip], Condition("gain", 1, ("audio",)), 0)[0]
    ratio = np.asarray(bad.features["audio"]) / Resampled(rows, 100.0)[:]
    np.testing.assert_allclose(np.abs(20 * np.log10(ratio)), 3, atol=1e-4)


def test_only_what_fails_is_read():
    class Unreadable:
        def __getitem__(self, span):
            raise AssertionError("read")

    clip = clip_of("v0", 1)
    clip = Clip("v0", None, clip.valid, {**clip.features, "visual": Unreadable()}, clip.present, 40)
    bad = corrupted([clip], Condition("noise", 1, ("audio",)), 0)[0]
    assert bad.features["visual"] is clip.features["visual"]


# -------------------------------------------------------------------------------------------------------------- quality

MOVING = {"frozen-spans", "dead-frozen", "misaligned", "foreign-spans", "foreign", "stage-foreign"}


def measured_clips(count: int = 4, frames: int = 90) -> list[Clip]:
    """Clips whose quality says which row of which clip it is of, with absent frames and, in a clip, unknown ones."""
    clips = []
    for k in range(count):
        rng = np.random.default_rng(k)
        features = {name: (3 + rng.standard_normal((frames, 5))).astype(np.float32) for name in NAMES}
        present = {name: rng.random(frames) > 0.1 for name in NAMES}
        quality = {name: np.stack([np.full(frames, k), np.arange(frames)], 1).astype(np.float64) for name in NAMES}
        if k == 0:
            quality["audio"][7:12] = np.nan
        clips.append(Clip(f"v{k}", None, np.ones(frames, bool), features, present, frames, quality=quality))
    return clips


@pytest.mark.parametrize("condition", conditions(NAMES, severities=(4,)), ids=an_id)
def test_quality_goes_with_the_rows(condition):
    """Beside every row that is some clip's row is the quality of that row; else it stays; absent rows have none."""
    clips = measured_clips()
    origin = {
        name: {row.tobytes(): (k, i) for k, clip in enumerate(clips) for i, row in enumerate(clip.features[name])}
        for name in NAMES
    }
    bare = corrupted([dataclasses.replace(clip, quality={}) for clip in clips], condition, 3)
    moved = 0
    for k, clip in enumerate(corrupted(clips, condition, 3)):
        assert bare[k].quality == {}
        for name in NAMES:
            np.testing.assert_array_equal(clip.features[name], bare[k].features[name])  # the protocol's numbers
            np.testing.assert_array_equal(clip.present[name], bare[k].present[name])
            if name not in condition.modalities:
                assert clip.quality[name] is clips[k].quality[name]
                continue
            there = clips[k].present[name]
            expected = clips[k].quality[name].copy()
            for i in np.flatnonzero(there):
                if not clip.present[name][i]:
                    expected[i] = np.nan
                elif condition.corruption in MOVING:
                    source, row = origin[name][clip.features[name][i].tobytes()]
                    expected[i] = clips[source].quality[name][row]
                    moved += (source, row) != (k, i)
            np.testing.assert_array_equal(clip.quality[name], expected)
            assert clip.quality[name].dtype == np.float32
    assert bool(moved) == (condition.corruption in MOVING)
    assert CORRUPTIONS[condition.corruption].moves == (condition.corruption in MOVING)


def test_a_donor_without_quality_brings_none():
    clips = measured_clips()
    for other in ({}, {"audio": np.zeros((90, 3))}):
        bad = corrupted([clips[0]], Condition("foreign", 3, ("audio",)), 0, donors=[
            dataclasses.replace(clip, quality=other) for clip in clips[1:]
        ])[0]  # fmt: skip
        foreign = (bad.features["audio"] != clips[0].features["audio"]).any(1)
        assert foreign.any()
        assert np.isnan(bad.quality["audio"][foreign]).all()
        np.testing.assert_array_equal(bad.quality["audio"][~foreign], clips[0].quality["audio"][~foreign])


def test_quality_shorter_than_the_features_and_at_their_rate():
    clip = measured_clips(1)[0]
    rows = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    clip = dataclasses.replace(
        clip,
        features={"audio": Resampled(rows, 100.0)},
        present={"audio": np.ones(90, bool)},
        quality={"audio": Quality(rows[:200, :1], 100.0)},
    )
    bad = corrupted([clip], Condition("missing", 1, ("audio",)), 0)[0]
    known = ~np.isnan(bad.quality["audio"][:, 0])
    assert bad.quality["audio"].shape == (90, 1)
    assert known.tolist() == [i < 60 for i in range(90)]
    np.testing.assert_array_equal(bad.quality["audio"][:60], clip.quality["audio"][:])


def test_a_meter_is_asked_where_numbers_are_altered():
    """Of present rows alone, features before and after and their spread; what it says is the quality; it sees no row moved."""
    clips, asked = measured_clips(), []

    def meter(modality, quality, before, after, spread):
        asked.append((modality, quality.copy(), before, after, spread))
        return quality + 100

    for condition in conditions(NAMES, severities=(4,)):
        asked.clear()
        clip, clean = corrupted(clips, condition, 3, meter=meter)[0], clips[0]
        plain = corrupted(clips, condition, 3)[0]
        assert [modality for modality, *_ in asked] == (
            [] if condition.corruption in MOVING else list(condition.modalities)
        )
        for name in NAMES:
            np.testing.assert_array_equal(clip.features[name], plain.features[name])
        for name, quality, before, after, spread in asked:
            there = clean.present[name]
            np.testing.assert_array_equal(quality, clean.quality[name][there])
            np.testing.assert_array_equal(before, clean.features[name][there])
            np.testing.assert_allclose(spread, before.std(0, dtype=np.float64))
            gone = ~clip.present[name][there]
            np.testing.assert_array_equal(after[~gone], clip.features[name][there][~gone])
            assert np.isnan(after[gone]).all()
            expected = clean.quality[name].copy()
            expected[there] += 100
            expected[there & ~clip.present[name]] = np.nan
            np.testing.assert_array_equal(clip.quality[name], expected)


def test_the_meter_of_synthetic_data(dataset):
    """A worse signal has lower scores, and what nothing happened to is the same to the bit."""
    clips = AffWild2(dataset, "validation")
    for name in ("dead-noise", "occluded", "drift"):
        for condition in conditions(NAMES, [name], (4,))[:2]:
            (modality,) = condition.modalities
            lower, all_of_them = 0, 0
            for before, after in zip(clips, corrupted(clips, condition, 0, meter=meter)):
                old, new = before.quality[modality][:], after.quality[modality]
                np.testing.assert_array_equal(np.isnan(new), np.isnan(old))
                frames = len(old)
                same = (np.asarray(before.features[modality])[:frames] == after.features[modality][:frames]).all(1)
                np.testing.assert_array_equal(new[same], old[same])
                known = ~same & np.isfinite(old[:, 0])
                lower, all_of_them = lower + int((new[known, 0] < old[known, 0]).sum()), all_of_them + int(known.sum())
            assert lower > 0.95 * all_of_them > 100


# -------------------------------------------------------------------------------------------------- your own corruption


def test_a_corruption_of_ones_own(monkeypatch):
    monkeypatch.setattr(corruptions, "CORRUPTIONS", dict(CORRUPTIONS))

    @corruption("every-nth", "loses rows", (6, 5, 4, 3, 2), "rows", scopes="each+all")
    def every_nth(track):
        rows = track.rows.copy()
        rows[:: int(track.level)] = np.nan
        return rows

    assert tuple(name for name in CORRUPTIONS if CORRUPTIONS[name].domain == "feature") == PROTOCOL
    assert len(conditions(NAMES, ["every-nth"])) == 15
    features, present, _, _ = world()
    got, mask = apply(Condition("every-nth", 5, ("audio",)), features, present, clip="c", seed=0)
    where = shown(features, present, "audio")
    assert not mask["audio"][where[::2]].any()
    assert mask["audio"][where[1::2]].all()
    assert (got["audio"][where[::2]] == 0).all()
    with pytest.raises(ValueError, match="name: expected one that no corruption has, got 'every-nth'"):
        corruption("every-nth", "", (1, 2, 3, 4, 5), "")(every_nth)
    with pytest.raises(ValueError, match="levels: expected 5"):
        corruption("other", "", (1, 2), "")(every_nth)
    with pytest.raises(ValueError, match="domain: expected one of feature"):
        corruption("other", "", (1, 2, 3, 4, 5), "", domain="sound")(every_nth)  # type: ignore[arg-type]
    strange = Condition("every-nth", 1, ("audio",))
    monkeypatch.setattr(corruptions, "CORRUPTIONS", dict(CORRUPTIONS))
    with pytest.raises(
        ValueError, match="condition: expected a corruption that is registered in this process, got 'every-nth'"
    ):
        apply(strange, features, present, clip="c", seed=0)
    corruption("short", "", (1, 2, 3, 4, 5), "")(lambda track: track.rows[1:])
    with pytest.raises(ValueError, match=r"short: expected rows of the shape \(\d+, 3\)"):
        apply(Condition("short", 1, ("audio",)), features, present, clip="c", seed=0)


# ------------------------------------------------------------------------------------------------- waveforms and images


def speech(seconds: float = 4.0, rate: int = 8000) -> np.ndarray:
    rng = np.random.default_rng(3)
    count = int(seconds * rate)
    return (0.3 * np.sin(np.arange(count) / 20) * (1 + rng.normal(size=count))).astype(np.float32)


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize("name", WAVEFORM)
def test_waveforms(name, severity):
    wave, rng = speech(), np.random.default_rng(0)
    wave.flags.writeable = False
    donors = [rng.normal(size=n).astype(np.float32) * 10.0**k for k, n in enumerate((5000, 40000, 1))]
    condition = Condition(name, severity, ("audio",))

    def run_it(**change):
        given = {"clip": "c", "seed": 0, "donors": donors, **change}
        return apply_waveform(condition, wave, 8000, **given)

    got = run_it()
    assert got.dtype == np.float32
    assert got.shape == wave.shape
    assert (got != wave).any()
    np.testing.assert_array_equal(got, run_it())
    if name != "waveform-clipping":  # nothing random in it
        assert (got != run_it(clip="d")).any()
        assert (got != run_it(seed=1)).any()
    x, e = wave.astype(np.float64), got.astype(np.float64) - wave
    if name in ("waveform-noise", "waveform-babble"):
        ratio = 10 * np.log10(np.mean(x**2) / np.mean(e**2))
        assert ratio == pytest.approx((15, 10, 5, 0, -5)[severity - 1], abs=1e-3)
    elif name == "waveform-clipping":
        peak = np.abs(wave).max()
        assert np.abs(got).max() == peak
        inside = np.abs(got) < peak
        np.testing.assert_allclose(got[inside], wave[inside] * 10 ** (6 * severity / 20), rtol=1e-5)
    else:
        dropped = (got == 0) & (wave != 0)
        assert dropped.sum() == pytest.approx(0.1 * severity * len(wave), abs=2 + int((wave == 0).sum()))
        np.testing.assert_array_equal(got[~dropped], wave[~dropped])


def test_babble_is_all_voices_equally_loud():
    """Two voices at well apart frequencies and of very different loudness have equal power in what is added."""
    t = np.arange(16000)
    voices = [5 * np.sin(2 * np.pi * t * 0.05), 0.01 * np.sin(2 * np.pi * t * 0.2)]
    wave = speech(2.0)
    got = apply_waveform(
        Condition("waveform-babble", 5, ("audio",)),
        wave,
        8000,
        clip="c",
        seed=0,
        donors=[v.astype("f4") for v in voices],
    )
    spectrum = np.abs(np.fft.rfft(got - wave)) ** 2
    low, high = spectrum[: len(spectrum) // 4].sum(), spectrum[len(spectrum) // 4 :].sum()
    assert low / high == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("name", WAVEFORM)
def test_waveforms_agree_with_a_second_implementation(name):
    rng, rate, level = np.random.default_rng(9), 200, CORRUPTIONS[name].levels[3]
    x = rng.normal(size=3001).astype(np.float32)
    donors = [rng.normal(size=n).astype(np.float32) * n for n in (70, 5000)]
    got = apply_waveform(Condition(name, 4, ("sound",)), x, rate, clip="c", seed=-2, donors=donors)
    n, x = len(x), x.astype(np.float64)
    if name == "waveform-clipping":
        want = np.clip(x * 10 ** (level / 20), -abs(x).max(), abs(x).max())
    elif name == "waveform-dropout":
        want, c = x.copy(), count(level, n)
        k = max(1, math.floor(c / (2 * rate) + 0.5))
        before, (v, *u) = 0, Stream("spans", "c", "sound", -2).uniform(k + 1)
        for i in range(k):
            length = c // k + (1 if i < c % k else 0)
            for j in range(length):
                want[(math.floor(v * n) + math.floor(sorted(u)[i] * (n - c + 1)) + before + j) % n] = 0
            before += length
    else:
        z = Stream("noise", "c", "sound", -2).normal(n)
        if name == "waveform-babble":
            starts = Stream("donor-start", "c", "sound", -2).uniform(2)
            loops = [[y[(math.floor(u * len(y)) + i) % len(y)] for i in range(n)] for u, y in zip(starts, donors)]
            z = sum(np.array(loop) / np.sqrt(np.mean(np.square(y, dtype=float))) for loop, y in zip(loops, donors))
        want = x + z * math.sqrt(np.mean(x**2) / np.mean(z**2)) * 10 ** (-level / 20)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_images_agree_with_a_second_implementation():
    x = np.random.default_rng(1).random((7, 5, 3, 3)).astype(np.float32)  # 45 numbers an image: one is dropped
    got = {name: apply_images(Condition(name, 3, ("face",)), x, clip="c", seed=4) for name in IMAGE}
    stream = Stream("noise", "c", "face", 4)
    noisy = np.stack([image + 0.2 * stream.normal(5, 3, 3) for image in x])
    np.testing.assert_allclose(got["image-noise"], np.clip(noisy, 0, 1), atol=1e-6)
    v, u = Stream("spans", "c", "face", 4).uniform(2)
    rows = [(math.floor(v * 7) + math.floor(u * 6) + j) % 7 for j in range(2)]  # count(0.3, 7) = 2, one span
    top, left, *colour = Stream("occluder", "c", "face", 4).uniform(5)
    top, left = math.floor(top * 3), math.floor(left * 2)
    patched, black = x.copy(), x.copy()
    patched[rows, top : top + 3, left : left + 2] = colour
    black[rows] = 0
    np.testing.assert_allclose(got["image-occlusion"], patched, atol=1e-7)
    np.testing.assert_array_equal(got["image-blackout"], black)


def test_odd_waveforms():
    for name in WAVEFORM:
        condition, donors = Condition(name, 3, ("audio",)), [speech()]
        for wave in (np.zeros(0, np.float32), np.zeros(50, np.float32)):  # empty, silent: nothing to disturb
            got = apply_waveform(condition, wave, 8000, clip="c", seed=0, donors=donors)
            np.testing.assert_array_equal(got, wave)
        got = apply_waveform(condition, np.ones(1, np.float64), 8000, clip="c", seed=0, donors=donors)
        assert got.shape == (1,)
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"waveform": np.zeros(9, np.int16)}, TypeError, "waveform: expected floating point, got int16"),
        ({"waveform": np.zeros((9, 2), np.float32)}, ValueError, "waveform: expected 1 axes"),
        ({"waveform": np.array([0, np.nan])}, ValueError, "waveform: expected finite values, got nan"),
        ({"rate": 0}, ValueError, "rate: expected samples a second > 0, got 0"),
        ({"donors": []}, ValueError, "donors: expected waveforms for waveform-babble, none of them silent"),
        ({"donors": [np.zeros(5, np.float32)]}, ValueError, "donors: .* none of them silent"),
        ({"donors": [np.full(5, np.inf)]}, ValueError, r"donors\[0\]: expected finite"),
        ({"condition": Condition("noise", 1, ("audio",))}, ValueError, "domain 'waveform', got noise of 'feature'"),
        ({"condition": Condition("waveform-noise", 1, NAMES)}, ValueError, "expected one modality"),
    ],
)
def test_bad_waveforms_are_refused(change, error, says):
    arguments = {
        "condition": Condition("waveform-babble", 1, ("audio",)),
        "waveform": speech(0.1),
        "rate": 8000,
        "clip": "c",
        "seed": 0,
        "donors": [speech(0.1)],
        **change,
    }
    with pytest.raises(error, match=says):
        apply_waveform(**arguments)


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize("name", IMAGE)
def test_images(name, severity):
    rng = np.random.default_rng(severity)
    images = rng.integers(1, 255, size=(40, 47, 61, 3), dtype=np.uint8)
    images.flags.writeable = False
    condition = Condition(name, severity, ("visual",))
    got = apply_images(condition, images, clip="c", seed=0)
    assert got.dtype == np.uint8
    assert got.shape == images.shape
    np.testing.assert_array_equal(got, apply_images(condition, images, clip="c", seed=0))
    real = apply_images(condition, images / 255, clip="c", seed=0)
    assert real.dtype == np.float32
    assert real.min() >= 0
    assert real.max() <= 1
    assert np.abs(real * 255 - got).max() <= 0.5 + 1e-4
    hit = (got != images).any(axis=(1, 2, 3))
    if name in ("image-occlusion", "image-blackout"):
        assert hit.sum() == 4 * severity
        np.testing.assert_array_equal(real[~hit], (images / 255).astype(np.float32)[~hit])
    else:
        assert hit.all()
    if name == "image-blackout":
        assert (got[hit] == 0).all()
    elif name == "image-occlusion":
        for image, old in zip(got[hit], images[hit]):
            rows, columns = np.nonzero((image != old).any(axis=2))
            patch = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (patch == patch[0, 0]).all()
            assert patch.shape == (24, 31, 3)
    elif name == "image-noise":
        grey = np.full((20, 16, 16, 3), 0.5)
        noise = apply_images(Condition(name, 1, ("visual",)), grey, clip="c", seed=severity) - 0.5
        assert noise.std() == pytest.approx(0.05, rel=0.03)  # severity 1 is hardly ever cut off
        assert len(np.unique(noise[:, 0, 0, 0])) == 20  # anew in every frame
    elif name == "image-blur":
        width = (0.01, 0.02, 0.03, 0.05, 0.08)[severity - 1] * 47
        want = (images / 255).astype(np.float64)
        for axis in (1, 2):
            want = gaussian_filter1d(want, width, axis=axis, mode="nearest", radius=math.ceil(3 * width))
        np.testing.assert_allclose(real, want, atol=2e-6)


def test_occluding_patches_have_places_and_colours_of_their_own():
    images = np.zeros((900, 10, 10, 1), np.float32)
    got = apply_images(Condition("image-occlusion", 5, ("visual",)), images, clip="c", seed=0)
    looks = {tuple(map(int, np.argwhere(image[..., 0])[0])) + (float(image.max()),) for image in got if image.any()}
    assert len(looks) == 8  # 450 frames in spans of about 60
    assert len({place[:2] for place in looks}) > 3


def test_odd_images():
    for name in IMAGE:
        condition = Condition(name, 5, ("visual",))
        assert apply_images(condition, np.zeros((0, 4, 4, 3), np.uint8), clip="c", seed=0).shape == (0, 4, 4, 3)
        assert apply_images(condition, np.full((1, 1, 1, 1), 9, np.uint8), clip="c", seed=0).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (np.zeros((2, 4, 4, 3), np.int32), TypeError, "images: expected floating point, got int32"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, "images: expected 4 axes"),
        (np.full((2, 4, 4, 3), 1.5), ValueError, r"images: expected floating point in \[0, 1\], got 1.5 to 1.5"),
        (np.full((2, 4, 4, 3), np.nan), ValueError, r"images: expected floating point in \[0, 1\]"),
    ],
)
def test_bad_images_are_refused(images, error, says):
    with pytest.raises(error, match=says):
        apply_images(Condition("image-noise", 1, ("visual",)), images, clip="c", seed=0)
