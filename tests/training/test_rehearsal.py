"""Failure rehearsal: deterministic, within its bounds, and each kind does what it says and nothing else."""

import math

import pytest
import torch

from sage_ext.training.rehearsal import GAIN, KINDS, MILD, OCCLUDED, OFFSET, Donors, Rehearsal
from sage_ext.training.trainer import TrainConfig

ALWAYS = {"probability": 1.0, "whole": 0.0, "together": 0.0}


def make_batch(rows=6, frames=120, seed=0, dims=(5, 7), pad=True, clips=None):
    g = torch.Generator().manual_seed(seed)
    names = ["audio", "visual", "text"][: len(dims)]
    frame = torch.ones(rows, frames, dtype=torch.bool)
    if pad:
        frame[-1, frames // 2 :] = False  # a short clip
    present = (torch.rand(rows, frames, len(dims), generator=g) > 0.1) & frame[..., None]
    features = {n: 3 + torch.randn(rows, frames, d, generator=g) for n, d in zip(names, dims)}
    features = {n: torch.where(present[..., m, None], x, 0.0) for m, (n, x) in enumerate(features.items())}
    valid = (torch.rand(rows, frames, generator=g) > 0.1) & frame
    labels = torch.where(valid[..., None], torch.rand(rows, frames, 2, generator=g) * 2 - 1, 0.0)
    clip = torch.arange(rows) if clips is None else torch.tensor(clips)
    return {"features": features, "present": present, "labels": labels, "valid": valid, "frame": frame, "clip": clip,
            "start": torch.zeros(rows, dtype=torch.int64)}  # fmt: skip


def generators(rows, seed=0):
    return [torch.Generator().manual_seed(10_000 * seed + row) for row in range(rows)]


def rehearse(batch, seed=0, **options):
    return Rehearsal(**options)(batch, generators(len(batch["clip"]), seed))


def only(kind):
    return {**ALWAYS, "kinds": {kind: 1.0}}


def runs(flags):
    """Lengths of the runs of True."""
    edges = torch.diff(torch.cat([torch.zeros(1), flags.float(), torch.zeros(1)]))
    return ((edges < 0).nonzero() - (edges > 0).nonzero()).flatten().tolist()


@pytest.mark.parametrize("seed", range(4))
def test_deterministic_and_leaves_the_input_alone(seed):
    batch, copy = make_batch(seed=seed), make_batch(seed=seed)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    one = rehearse(batch, seed, probability=0.8)
    two = rehearse(batch, seed, probability=0.8)
    other = rehearse(batch, seed + 100, probability=0.8)
    assert torch.equal(torch.get_rng_state(), before)  # nothing drawn from the global generator
    for name in batch["features"]:
        assert torch.equal(batch["features"][name], copy["features"][name])
        assert torch.equal(one["features"][name], two["features"][name])
    assert torch.equal(batch["present"], copy["present"])
    assert torch.equal(one["present"], two["present"])
    assert torch.equal(one["rehearsed"], two["rehearsed"])
    assert not torch.equal(one["rehearsed"], other["rehearsed"])
    assert "rehearsed" not in batch


@pytest.mark.parametrize("seed", range(20))
def test_what_it_may_touch(seed):
    """Any mixture: labels, padding and absent frames stay; all that changed is marked; one modality survives."""
    batch = make_batch(seed=seed)
    out = rehearse(batch, seed, probability=0.9, spans=5, together=0.0)
    for key in ("labels", "valid", "frame", "clip", "start"):
        assert out[key] is batch[key]
    rehearsed = out["rehearsed"]
    for m, name in enumerate(batch["features"]):
        old, new = batch["features"][name], out["features"][name]
        assert new.isfinite().all()
        changed = (old != new).any(-1) | (batch["present"][..., m] != out["present"][..., m])
        assert not (changed & ~rehearsed[..., m]).any()
        assert not (rehearsed[..., m] & ~batch["present"][..., m]).any()  # an absent frame cannot fail
        assert not (rehearsed[..., m] & ~batch["frame"]).any()
        assert not (out["present"][..., m] & ~batch["present"][..., m]).any()  # nothing appears
    assert not rehearsed.all(-1).any()
    sound = batch["present"] & ~rehearsed
    assert not (rehearsed.any(-1) & ~sound.any(-1)).any()


def test_overlap_lets_both_fail():
    batch = make_batch(rows=40)
    out = rehearse(batch, probability=1.0, spans=6, overlap=True, together=0.0)
    assert out["rehearsed"].all(-1).any()


def test_zero():
    batch = make_batch()
    out = rehearse(batch, **only("zero"))
    assert torch.equal(out["present"], batch["present"])  # silent: the mask does not tell
    for m, name in enumerate(batch["features"]):
        hit = out["rehearsed"][..., m]
        assert hit.any()
        assert (out["features"][name][hit] == 0).all()


def test_drop():
    batch = make_batch()
    out = rehearse(batch, **only("drop"))
    assert torch.equal(out["present"], batch["present"] & ~out["rehearsed"])
    for m, name in enumerate(batch["features"]):
        assert (out["features"][name][out["rehearsed"][..., m]] == 0).all()


def test_freeze():
    batch = make_batch(rows=30)
    out = rehearse(batch, **only("freeze"), spans=1)
    checked = 0
    for m, name in enumerate(batch["features"]):
        for row in range(30):
            at = out["rehearsed"][row, :, m].nonzero().flatten()
            if len(at):
                values = out["features"][name][row, at]
                assert (values == batch["features"][name][row, at[0]]).all()  # the failure's first frame
                checked += len(at)
    assert checked > 100


@pytest.mark.parametrize("snr", [-10.0, 0.0, 20.0])
def test_noise_has_the_power_it_says(snr):
    batch = make_batch(rows=12, frames=2000, dims=(16, 24), pad=False)
    batch["features"]["audio"][..., :4] = 7.0  # dead channels carry no signal: they must not count as power
    batch["features"]["visual"] *= 5
    out = rehearse(batch, probability=1.0, whole=1.0, kinds={"noise": 1.0}, snr_db=(snr, snr), levelled=0.0)
    for m, (name, scale) in enumerate((("audio", 1.0), ("visual", 5.0))):
        hit = out["rehearsed"][..., m]
        noise = (out["features"][name] - batch["features"][name])[hit]
        assert hit.sum() > 1000
        assert abs(float(noise.mean())) < 0.02 * float(noise.std())
        expected = scale / math.sqrt(10 ** (snr / 10))
        assert float(noise.std()) == pytest.approx(expected, rel=0.03)
        assert torch.equal(out["present"], batch["present"])
    behind = rehearse(batch, probability=1.0, whole=1.0, kinds={"noise": 1.0}, snr_db=(snr, snr), levelled=1.0)
    for m, name in enumerate(batch["features"]):
        hit = behind["rehearsed"][..., m]
        before, after = (x["features"][name][hit][:, 4:].var() for x in (batch, behind))
        if m:  # the dead channels of the other one take noise too
            assert float(after) == pytest.approx(float(before), rel=0.03)


def test_swap_is_another_clip_at_the_same_place():
    batch = make_batch(rows=8, clips=[0, 0, 0, 1, 1, 2, 2, 3])
    out = rehearse(batch, **only("swap"), spans=1)
    checked = 0
    for m, name in enumerate(batch["features"]):
        old = batch["features"][name]
        for row in range(8):
            at = out["rehearsed"][row, :, m].nonzero().flatten()
            if not len(at):
                continue
            donors = [d for d in range(8) if torch.equal(out["features"][name][row, at], old[d, at])]
            assert len(donors) == 1
            assert batch["clip"][donors[0]] != batch["clip"][row]
            assert batch["present"][donors[0], at, m].all()  # never an absent frame's zeros
            checked += 1
    assert checked >= 6


def test_swap_with_nobody_becomes_noise():
    batch = make_batch(rows=3, clips=[5, 5, 5])
    out = rehearse(batch, **only("swap"))
    assert out["rehearsed"].any()
    for m, name in enumerate(batch["features"]):
        hit = out["rehearsed"][..., m]
        assert (out["features"][name][hit] != batch["features"][name][hit]).all()


def moments(batch, name, m, row):
    x = batch["features"][name][row][batch["present"][row, :, m]]
    return x.mean(0), x.std(0, correction=0)


def failures(batch, out):
    """(name, modality, row, frames) of each modality that failed in a row."""
    for m, name in enumerate(batch["features"]):
        for row in range(len(batch["clip"])):
            at = out["rehearsed"][row, :, m].nonzero().flatten()
            if len(at):
                yield name, m, row, at


def test_gain_is_about_a_point_between_zero_and_the_mean():
    batch = make_batch(rows=120, frames=40)
    factors = []
    out = rehearse(batch, **only("gain"), spans=1)
    for name, m, row, at in failures(batch, out):
        mean, _ = moments(batch, name, m, row)
        old, new = batch["features"][name][row, at], out["features"][name][row, at]
        if len(at) < 2:
            continue
        spread, moved = old - old.mean(0), new - new.mean(0)
        factor = float((moved * spread).sum() / (spread * spread).sum())
        torch.testing.assert_close(moved, factor * spread, rtol=1e-3, atol=1e-3)
        place = (new.mean(0) - factor * old.mean(0)) / (1 - factor)  # the centre
        share = float((place * mean).sum() / (mean * mean).sum())
        torch.testing.assert_close(place, share * mean, rtol=1e-2, atol=1e-2)
        assert -1e-2 < share < 1 + 1e-2
        factors.append(factor)
    logs = torch.tensor(factors).log().abs()
    assert math.log(GAIN[0]) - 1e-3 < logs.min() < math.log(GAIN[0]) + 0.1  # never near 1
    assert math.log(GAIN[1]) - 0.1 < logs.max() < math.log(GAIN[1]) + 1e-3
    assert 0.4 < (torch.tensor(factors) > 1).float().mean() < 0.6
    assert torch.equal(out["present"], batch["present"])


def test_occlude_stands_nearly_still_in_some_features():
    batch = make_batch(rows=60, dims=(20, 40))
    batch["features"]["visual"][..., 3] = 7.0  # dead, and stays so
    out = rehearse(batch, **only("occlude"), spans=1, length=(1, 2))
    shares, away = [], []
    for name, m, row, at in failures(batch, out):
        old, new = batch["features"][name][row, at], out["features"][name][row, at]
        changed = (old != new).any(0)
        shares.append(float(changed.float().mean()))
        if name == "visual":
            assert not changed[3]
        if len(at) < 20:
            continue
        mean, deviation = moments(batch, name, m, row)
        assert (new.std(0)[changed] < 0.5 * deviation[changed]).all()
        assert (new.diff(dim=0).abs().mean(0)[changed] < 0.15 * deviation[changed]).all()  # slow
        away.append(((new.mean(0) - mean) / deviation)[changed])
    assert 0.8 < torch.cat(away).square().mean() < 1.3  # where a frame is, not where the mean is
    assert OCCLUDED[0] - 0.05 < min(shares) < OCCLUDED[0] + 0.1
    assert OCCLUDED[1] - 0.1 < max(shares) < OCCLUDED[1] + 0.05


def test_offset_ramps_up():
    batch = make_batch(rows=40, dims=(6, 9), pad=False)
    batch["present"][:] = True
    out = rehearse(batch, **only("offset"), spans=1)
    ends = []
    for name, m, row, at in failures(batch, out):
        _, deviation = moments(batch, name, m, row)
        moved = (out["features"][name][row, at] - batch["features"][name][row, at]) / deviation
        steps = moved.diff(dim=0)
        torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-3, atol=1e-3)
        assert (moved[0].abs() <= moved[-1].abs() + 1e-3).all()
        ends.append(moved[-1])
    ends = torch.cat(ends)
    assert 0.95 * OFFSET < ends.abs().max() <= OFFSET + 1e-3
    assert abs(float(ends.mean())) < 0.15


def test_all_modalities_fail_together():
    """In the same span, each in a way of its own, in the share of windows that was asked for; none is left dead."""
    batch = make_batch(rows=400, frames=60, dims=(4, 4, 4), pad=False)
    batch["present"][:] = True
    before = {name: rows.clone() for name, rows in batch["features"].items()}
    out = rehearse(batch, probability=0.5, together=0.5, whole=0.2, length=(0.7, 1.0))
    all_at_once = out["rehearsed"].all(-1).any(-1)
    assert all_at_once.float().mean() == pytest.approx(0.25, abs=0.06)
    assert out["rehearsed"].any(-1).any(-1).float().mean() == pytest.approx(0.5, abs=0.07)
    chosen = out["rehearsed"][all_at_once]
    assert torch.equal(chosen.any(-1), chosen.all(-1))  # one start, one stop
    assert all(len(runs(row[:, 0])) == 1 for row in chosen)
    assert 0.1 < (chosen[..., 0].all(-1)).float().mean() < 0.35
    assert out["present"][all_at_once].all()
    kinds = []
    for m, name in enumerate(batch["features"]):
        for row in all_at_once.nonzero().flatten().tolist():
            at = out["rehearsed"][row, :, m].nonzero().flatten()
            if len(at) >= 20:
                old, new = before[name][row, at], out["features"][name][row, at]
                assert not (new == new[0]).all()
                assert not torch.equal(old, new)
                kinds.append((row, bool((old == new).all(0).any())))  # a feature left as it was: occluded
    assert len({seen for _, seen in kinds}) == 2
    rows_of = {row: {seen for other, seen in kinds if other == row} for row, _ in kinds}
    assert any(len(seen) == 2 for seen in rows_of.values())  # kinds of their own


def test_together_takes_the_kinds_there_are():
    batch = make_batch(rows=40)
    for kinds in ({"zero": 1.0, "noise": 0.0}, {"drop": 1.0}):
        assert not rehearse(batch, probability=1.0, together=1.0, kinds=kinds)["rehearsed"].all(-1).any()
    out = rehearse(batch, probability=1.0, together=1.0, kinds={"zero": 5.0, "gain": 1.0})
    assert out["rehearsed"].all(-1).any()
    assert not any((out["features"][name][row, at] == 0).all() for name, _, row, at in failures(batch, out))


def with_quality(batch, seed=0):
    """Two columns of quality for each modality but the last, NaN in a tenth of the frames and in padding."""
    g = torch.Generator().manual_seed(seed + 50)
    quality = {}
    for name in list(batch["features"])[:-1]:
        rows = torch.randn(*batch["frame"].shape, 2, generator=g)
        rows[torch.rand(rows.shape, generator=g) < 0.1] = math.nan
        quality[name] = torch.where(batch["frame"][..., None], rows, math.nan)
    return {**batch, "quality": quality}


def same(a, b):
    return (a == b) | (a.isnan() & b.isnan())


@pytest.mark.parametrize("kind", KINDS)
def test_quality_goes_with_the_features(kind):
    batch = with_quality(make_batch(rows=30, dims=(5, 7, 3)))
    copy = {name: rows.clone() for name, rows in batch["quality"].items()}
    out = rehearse(batch, **only(kind), spans=1, unknown=0.0)
    assert list(out["quality"]) == ["audio", "visual"]
    for name, old in copy.items():
        assert same(batch["quality"][name], old).all()
    checked = 0
    for name, _, row, at in failures(batch, out):
        if name == "text":
            continue
        old, new = batch["quality"][name][row], out["quality"][name][row]
        rest = torch.ones(len(old), dtype=torch.bool)
        rest[at] = False
        assert same(new[rest], old[rest]).all()
        if kind == "drop":
            assert new[at].isnan().all()
        elif kind == "freeze":
            assert same(new[at], old[at[0]]).all()
        elif kind == "swap":
            features = out["features"][name][row, at]
            (donor,) = (d for d in range(30) if torch.equal(features, batch["features"][name][d, at]))
            assert same(new[at], batch["quality"][name][donor, at]).all()
            assert donor != row
        else:
            assert same(new[at], old[at]).all()
        checked += len(at)
    assert checked > 100


def test_quality_is_unknown_at_times():
    """Also without a failure: whole windows, and spans, of each modality by itself."""
    batch = make_batch(rows=600, frames=80, dims=(2, 2, 2), pad=False)
    batch["quality"] = {name: torch.zeros(600, 80, 1) for name in ("audio", "visual")}
    out = rehearse(batch, probability=0.0, unknown=0.3, length=(0.2, 1.0))
    assert not out["rehearsed"].any()
    lost = torch.stack([out["quality"][name][..., 0].isnan() for name in ("audio", "visual")], -1)
    whole = lost.all(1)
    assert whole.float().mean() == pytest.approx(0.3, abs=0.05)
    assert (whole[:, 0] & whole[:, 1]).float().mean() == pytest.approx(0.09, abs=0.04)
    some = lost.any(1) & ~whole
    assert some.float().mean() == pytest.approx(0.7 * 0.3, abs=0.05)
    lengths = [n for row in range(600) for m in range(2) if some[row, m] for n in runs(lost[row, :, m])]
    assert 3 <= min(lengths) <= max(lengths) <= 30
    assert len(lengths) == some.sum()
    assert not torch.stack(list(batch["quality"].values())).isnan().any()
    kept = rehearse(batch, probability=0.0, unknown=0.0)["quality"]
    assert not any(rows.isnan().any() for rows in kept.values())


def test_quality_may_be_absent():
    """The features fail alike, whether there is none or a batch says nothing of it."""
    batch = make_batch()
    without, empty = rehearse(batch), rehearse({**batch, "quality": {}})
    assert "quality" not in without
    assert empty["quality"] == {}
    for name in batch["features"]:
        assert torch.equal(without["features"][name], empty["features"][name])


def test_older_configurations_are_read():
    """Those of before there was gain, occlude, offset, together or unknown."""
    stored = TrainConfig("data").to_json()
    for name in ("together", "unknown"):
        del stored["rehearsal"][name]
    stored["rehearsal"] |= {
        "probability": 0.5,
        "kinds": dict.fromkeys(("zero", "freeze", "noise", "swap", "drop"), 1.0),
    }
    read = TrainConfig.from_json(stored).rehearsal
    assert (read.together, read.unknown) == (Rehearsal().together, Rehearsal().unknown)
    assert read.probability == 0.5
    batch = make_batch(rows=40)
    assert read(batch, generators(40))["rehearsed"].all(-1).any()  # noise in all
    assert set(Rehearsal().kinds) == set(KINDS) > set(MILD)


def test_rates_and_lengths():
    batch = make_batch(rows=2000, frames=60, dims=(2, 2), pad=False)
    batch["present"][:] = True
    out = rehearse(batch, probability=0.4, whole=0.25, spans=1, length=(5 / 30, 20 / 30), together=0.0)
    rehearsed = out["rehearsed"]
    assert rehearsed.any(-1).any(-1).float().mean() == pytest.approx(0.4, abs=0.04)
    whole = rehearsed.all(1).any(-1)
    assert whole.float().mean() == pytest.approx(0.1, abs=0.025)
    lengths = [n for row in range(2000) if not whole[row] for m in range(2) for n in runs(rehearsed[row, :, m])]
    assert max(lengths) <= 20
    assert sum(n < 5 for n in lengths) < 0.1 * len(lengths)  # only those cut by the window's ends
    assert 8 < sum(lengths) / len(lengths) < 13
    share = rehearsed.any(1).float().mean(0)
    assert share[0] == pytest.approx(float(share[1]), abs=0.05)
    # Failures fall anywhere: the window's first and last frames fail about as often as others (half the span is cut).
    rate = rehearsed[~whole].any(-1).float().mean(0)
    assert rate.min() > 0.3 * rate.max()


def test_every_kind_occurs_in_proportion():
    batch = make_batch(rows=3000, frames=20, dims=(3, 3), pad=False)
    batch["present"][:] = True
    batch["features"] = {
        n: 3 + torch.randn(3000, 20, 3, generator=torch.Generator().manual_seed(1)) for n in ("a", "b")
    }
    out = rehearse(batch, probability=1.0, whole=1.0, kinds={"zero": 1, "freeze": 2, "drop": 1})
    counts = dict.fromkeys(KINDS, 0)
    for m, name in enumerate(batch["features"]):
        for row in out["rehearsed"].all(1)[:, m].nonzero().flatten().tolist():
            x = out["features"][name][row]
            if not out["present"][row, :, m].any():
                counts["drop"] += 1
            elif (x == 0).all():
                counts["zero"] += 1
            elif (x == x[0]).all():
                counts["freeze"] += 1
    assert sum(counts.values()) == 3000
    assert counts["freeze"] == pytest.approx(1500, abs=120)
    assert counts["zero"] == pytest.approx(750, abs=100)


def test_single_modality_and_three():
    one = make_batch(dims=(4,))
    assert rehearse(one, **ALWAYS)["rehearsed"].any()
    three = make_batch(rows=60, dims=(4, 4, 4))
    out = rehearse(three, probability=1.0, spans=6, together=0.0)
    assert (out["rehearsed"].sum(-1) == 2).any()  # one sound modality is enough
    assert (out["rehearsed"].sum(-1) < 3).all()


def part_of(tree, rows):
    return {key: part_of(x, rows) if isinstance(x, dict) else x[rows] for key, x in tree.items()}


@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_becomes_of_a_window_does_not_hang_on_those_beside_it(size):
    """Shares of a batch, rehearsed apart, are the rows of the batch rehearsed whole, to the bit; donors are windows of the
    whole batch, and are all that is asked of it."""
    batch = with_quality(make_batch(rows=47, seed=size, dims=(5, 7, 3), clips=[i // 3 for i in range(47)]), size)
    rehearsal, asked = Rehearsal(probability=0.9, kinds={"swap": 3.0, "noise": 1.0, "occlude": 1.0, "drop": 1.0}), []

    def window(place, name):
        asked.append(place)
        m = list(batch["features"]).index(name)
        one = part_of(batch, place)
        return {
            "features": {name: one["features"][name]},
            "present": one["present"][:, m : m + 1],
            "frame": one["frame"],
            "quality": one["quality"],
        }

    whole = rehearsal(batch, generators(47, size))
    assert whole["rehearsed"].any(1).any(-1).float().mean() > 0.7
    for rank in range(size):
        own = rehearsal(
            part_of(batch, slice(rank, None, size)),
            generators(47, size)[rank::size],
            donors=Donors(batch["clip"], window),
        )
        expected = part_of(whole, slice(rank, None, size))
        for key in ("features", "quality"):
            for name, rows in expected[key].items():
                assert same(own[key][name], rows).all()
        for key in ("present", "rehearsed", "labels", "valid", "frame"):
            assert torch.equal(own[key], expected[key])
    assert 5 < len(asked) < 47  # by all shares together: few windows are swapped


def test_a_generator_for_each_window():
    with pytest.raises(ValueError, match=r"^generators: expected one for each of 6 windows, got 5$"):
        Rehearsal()(make_batch(rows=6), generators(5))


def test_off():
    batch = make_batch()
    out = rehearse(batch, probability=0.0)
    assert not out["rehearsed"].any()
    assert all(torch.equal(out["features"][n], batch["features"][n]) for n in batch["features"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, "probability"),
        ({"whole": -0.1}, "whole"),
        ({"together": 1.1}, "together"),
        ({"unknown": -0.1}, "unknown"),
        ({"spans": 0}, "spans"),
        ({"length": (10, 5)}, "length"),
        ({"length": (0, 5)}, "length"),
        ({"snr_db": (5, -5)}, "snr_db"),
        ({"kinds": {"explode": 1.0}}, "explode"),
        ({"kinds": {"zero": 0.0}}, "kinds"),
        ({"kinds": {"zero": -1.0, "drop": 3.0}}, "kinds"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Rehearsal(**options)
