"""Failure rehearsal: deterministic, within its bounds, and each kind does what it says and nothing else."""

import math

import pytest
import torch

from sage_ext.training.rehearsal import KINDS, Rehearsal

ALWAYS = {"probability": 1.0, "whole": 0.0}


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


def rehearse(batch, seed=0, **options):
    return Rehearsal(**options)(batch, torch.Generator().manual_seed(seed))


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
    out = rehearse(batch, seed, probability=0.9, spans=5)
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
    out = rehearse(batch, probability=1.0, spans=6, overlap=True)
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
    out = rehearse(batch, probability=1.0, whole=1.0, kinds={"noise": 1.0}, snr_db=(snr, snr))
    for m, (name, scale) in enumerate((("audio", 1.0), ("visual", 5.0))):
        hit = out["rehearsed"][..., m]
        noise = (out["features"][name] - batch["features"][name])[hit]
        assert hit.sum() > 1000
        assert abs(float(noise.mean())) < 0.02 * float(noise.std())
        expected = scale / math.sqrt(10 ** (snr / 10))
        assert float(noise.std()) == pytest.approx(expected, rel=0.03)
        assert torch.equal(out["present"], batch["present"])


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


def test_rates_and_lengths():
    batch = make_batch(rows=2000, frames=60, dims=(2, 2), pad=False)
    batch["present"][:] = True
    out = rehearse(batch, probability=0.4, whole=0.25, spans=1, length=(5 / 30, 20 / 30))
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
    out = rehearse(three, probability=1.0, spans=6)
    assert (out["rehearsed"].sum(-1) == 2).any()  # one sound modality is enough
    assert (out["rehearsed"].sum(-1) < 3).all()


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
