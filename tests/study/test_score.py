"""Scores of a finished study against the public evaluation, and what the oracle is told."""

import itertools

import numpy as np
import pytest
import torch
from studies import rows_of

from sage_ext.calibration import Evidence, diagrams
from sage_ext.data.synthetic import (
    CausalOracle,
    Oracle,
    TruthClips,
    meter,
    oracle_predictions,
    read_truth,
    told,
    trusted_modalities,
)
from sage_ext.study.corruptions import Condition, corrupted
from sage_ext.study.plan import run_path
from sage_ext.study.score import _diagrams, spoilt
from sage_ext.training.evaluate import score
from sage_ext.training.runs import Run


def test_results_are_those_of_the_public_evaluation(finished, data):
    """Every number in the file again, video by video, with what the command line uses."""
    out, _ = finished
    rates = {path.parent.name: float(path.name.rpartition("-lr-")[2]) for path in out.glob("runs/*/seed-1-*")}
    rows = {(row["method"], row["seed"], row["condition"]): row for row in rows_of(out)}
    conditions = [None, Condition("noise", 5, ("audio",)), Condition("stage-zeroed", 5, ("visual", "audio"))]
    clean = list(TruthClips(data))
    stages = {clip.name: np.load(data / "truth" / f"{clip.name}.npz")["stage"] for clip in clean}
    for method, condition in itertools.product(rates, conditions):
        run = Run.load(run_path(out, method, 1, rates[method]))
        seen = clean if condition is None else corrupted(clean, condition, 1, stages=stages, meter=meter)
        clips = list(seen)
        given = [told(data, *pair) for pair in zip(clean, clips)] if run.told else clips
        said = {clip.name: run.predict(clip).prediction for clip in given}
        found = score(said, clips)
        row = rows[method, "1", "clean" if condition is None else condition.name]
        for key in ("CCC_V", "CCC_A", "P"):
            assert float(row[key]) == pytest.approx(found[key], abs=2e-6)


def test_the_oracle_takes_what_was_spoilt_as_absent(data):
    clips = list(TruthClips(data))
    oracle = Oracle(data)
    for name, plain in oracle_predictions(data, "test").items():
        np.testing.assert_array_equal(oracle.predict(name), plain)
    clip = clips[0]
    frozen = corrupted(clips, Condition("dead-zeroed", 3, ("visual",)), 0)[0]
    bad = spoilt(clip, frozen)
    present = np.asarray(clip.present["visual"])
    assert not bad[:, 0].any()
    first = int(np.argmax(bad[:, 1]))
    assert first > 0
    assert (bad[first:, 1] == present[first:]).all()  # what was absent before is not spoilt
    without = oracle.predict(clip.name, bad)
    np.testing.assert_array_equal(without[: first - 50], oracle.predict(clip.name)[: first - 50])
    assert np.abs(without - oracle.predict(clip.name)).max() > 0.05
    with pytest.raises(ValueError, match="useless"):
        oracle.predict(clip.name, bad[:, :1])


def test_the_causal_filter_is_the_exact_posterior_of_what_came_before(data):
    """Its mean against that of all views up to a frame at once, a Gaussian of hundreds of dimensions conditioned directly."""
    oracle = CausalOracle(data)
    name = TruthClips(data)[0].name
    truth = read_truth(data, name)
    frames = 40
    truth = {key: value[:frames] if len(value) == len(truth["stage"]) else value for key, value in truth.items()}
    truth["present"] = truth["present"].copy()
    truth["present"][5:12, 1] = False
    found = np.arctanh(oracle._affect([truth])[0]) / 0.8 @ oracle.turn
    lag = np.abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    x = oracle.rate * lag
    sd = np.sqrt(truth["variance"].astype(np.float64))
    seen = np.einsum("tmc,ck->ktm", truth["noisy"].astype(np.float64), oracle.turn)
    for k in range(2):
        signal = oracle.mood[k] + oracle.process[k] * (1 + x + x**2 / 3) * np.exp(-x)
        for t in (0, 8, frames - 1):
            places = [(i, m) for m in range(2) for i in range(t + 1) if truth["present"][i, m]]
            if not places:
                continue
            i, m = np.array(places).T
            noise = sd[i, m][:, None] * sd[i, m] * oracle.memory ** lag[np.ix_(i, i)] * (m[:, None] == m)
            views = signal[np.ix_(i, i)] + noise + 1e-4 * np.eye(len(i))
            exact = signal[t, i] @ np.linalg.solve(views, seen[k][i, m])
            assert found[t, k] == pytest.approx(exact, abs=2e-3)


def test_the_causal_filter_looks_back_only_and_sees_no_spoilt_frame(data):
    oracle, clip = CausalOracle(data), TruthClips(data)[0]
    names = [clip.name, TruthClips(data)[1].name]
    plain = oracle.predict(clip.name)
    for alone, together in zip((plain, oracle.predict(names[1])), oracle.predict_together(names)):
        np.testing.assert_allclose(alone, together, atol=1e-6)
    useless = np.zeros((clip.num_frames, 2), bool)
    useless[40:, 0] = True
    other = oracle.predict(clip.name, useless)
    np.testing.assert_array_equal(other[:40], plain[:40])
    assert np.abs(other - plain).max() > 0.05
    useless[:] = True
    assert np.ptp(oracle.predict(clip.name, useless), axis=0).max() < 1e-6
    with pytest.raises(ValueError, match="useless"):
        oracle.predict(clip.name, useless[:-1])


def test_stages_are_known_by_whom_they_trust(data):
    assert trusted_modalities(data) == [{"audio"}, {"visual"}, set(), {"visual"}]


def test_a_modality_without_a_frame_has_no_diagram():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(50, 3, generator=generator) < 0.7
    mask[:, 1] = False
    evidence = Evidence(
        torch.randn(50, 3, 2, generator=generator), torch.rand(50, 2, generator=generator).softmax(1),
        torch.rand(50, 3, generator=generator), mask,
    )  # fmt: skip
    temperature, bias = (0.3 * torch.randn(3, 2, generator=generator) for _ in range(2))
    found = _diagrams(evidence, temperature, bias)
    assert np.isnan(found[1]).all()
    whole = evidence._replace(mask=torch.ones_like(mask))
    theirs = diagrams(whole._replace(mask=mask | torch.tensor([False, True, False])), temperature, bias, kappa=None)
    for m in (0, 2):
        np.testing.assert_array_equal(found[m, 0], theirs[m].predicted)
        np.testing.assert_array_equal(found[m, 1], theirs[m].observed)
        assert found[m, 2].sum() == mask[:, m].sum()
    assert np.isnan(_diagrams(evidence._replace(mask=mask & False), temperature, bias)).all()
