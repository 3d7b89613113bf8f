"""Windows: coverage, padding, masking, batches; the average of overlapping predictions."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sage_ext.data import AffWild2, Clip, OverlapAverage, Windows, clip_tensors, collate
from sage_ext.data.windows import whole_clips, window_starts


def make_clip(frames: int, name: str = "clip", seed: int = 0, labelled: bool = True) -> Clip:
    """Column 0 of every modality is the frame's number; some rows NaN, some declared absent, some invalid labels."""
    rng = np.random.default_rng([seed, frames])
    features = {
        m: np.concatenate([np.arange(frames)[:, None], rng.standard_normal((frames, d - 1))], axis=1).astype(np.float32)
        for m, d in (("audio", 3), ("visual", 4))
    }
    features["audio"][rng.random(frames) < 0.1, 1] = np.nan
    present = {m: rng.random(frames) > 0.1 for m in features}
    valid = (rng.random(frames) > 0.2) & labelled
    labels = rng.uniform(-1, 1, (frames, 2)).astype(np.float32)
    labels[~valid] = np.nan
    return Clip(name, labels if labelled else None, valid, features, present, frames)


@given(st.integers(1, 700), st.integers(1, 300), st.data())
def test_every_frame_is_in_a_window(frames, window, data):
    hop = data.draw(st.integers(1, window))
    starts = window_starts(frames, window, hop)
    inside = np.zeros(frames, int)
    for start in starts:
        assert start >= 0
        assert start + window <= frames or starts == [0]
        inside[start : start + window] += 1
    assert inside.min() >= 1
    assert starts == sorted(set(starts))
    assert all(b - a == hop for a, b in itertools.pairwise(starts[:-1]))  # only the last step may be shorter
    if frames > window:
        assert starts[-1] == frames - window
        assert starts[-1] - starts[-2] <= hop


@pytest.mark.parametrize(
    ("frames", "starts"),
    [(1, [0]), (299, [0]), (300, [0]), (301, [0, 1]), (500, [0, 200]), (501, [0, 200, 201]), (750, [0, 200, 400, 450])],
)
def test_default_windows(frames, starts):
    assert window_starts(frames, 300, 200) == starts


def test_items_are_the_frames_of_their_clip():
    clips = [make_clip(50, "a"), make_clip(7, "b"), make_clip(20, "c")]
    windows = Windows(clips, window=20, hop=15)
    assert windows.spans == [(0, 0), (0, 15), (0, 30), (1, 0), (2, 0)]
    assert windows.names == ["audio", "visual"]
    assert len(windows) == 5
    for i, (index, start) in enumerate(windows.spans):
        item, clip = windows[i], clips[index]
        kept = min(20, clip.num_frames - start)
        span = slice(start, start + kept)
        assert (item["clip"], item["start"]) == (index, start)
        assert item["frame"].tolist() == [t < kept for t in range(20)]
        np.testing.assert_array_equal(item["valid"][:kept], clip.valid[span])
        np.testing.assert_array_equal(item["labels"][:kept], np.nan_to_num(clip.labels[span]))
        for m, name in enumerate(windows.names):
            rows = clip.features[name][span]
            here = clip.present[name][span] & ~np.isnan(rows).any(axis=1)
            np.testing.assert_array_equal(item["present"][:kept, m], here)
            np.testing.assert_array_equal(item["features"][name][:kept], np.where(here[:, None], rows, 0))
        for rows in (*item["features"].values(), item["labels"], item["present"], item["valid"]):
            assert rows.shape[0] == 20
            assert not rows[kept:].any()
        assert {v.dtype for v in (*item["features"].values(), item["labels"])} == {torch.float32}
        assert {item[k].dtype for k in ("present", "valid", "frame")} == {torch.bool}


def test_items_are_copies():
    clip = make_clip(30)
    before = {m: rows.copy() for m, rows in clip.features.items()}
    item = Windows([clip], window=20, hop=20)[0]
    item["labels"].fill_(7)
    item["valid"].fill_(True)
    for rows in item["features"].values():
        rows.fill_(7)
    for m, rows in before.items():
        np.testing.assert_array_equal(clip.features[m], rows)
    assert not (clip.labels == 7).any()


def test_whole_clip_and_spans():
    clip = make_clip(33)
    whole = clip_tensors(clip, ["visual", "audio"])
    assert list(whole["features"]) == ["visual", "audio"]
    assert whole["frame"].tolist() == [True] * 33
    part = clip_tensors(clip, ["visual", "audio"], 5, 21)
    for key in ("present", "labels", "valid", "frame"):
        assert torch.equal(part[key], whole[key][5:21])
    for name in part["features"]:
        assert torch.equal(part["features"][name], whole["features"][name][5:21])
    assert torch.equal(clip_tensors(clip, ["audio"])["present"], whole["present"][:, 1:])
    assert clip_tensors(clip, ["audio"], 33)["features"]["audio"].shape == (0, 3)


def test_a_test_clip_has_no_valid_frame():
    item = clip_tensors(make_clip(12, labelled=False), ["audio"])
    assert not item["valid"].any()
    assert not item["labels"].any()
    assert item["frame"].all()


def test_wrong_arguments():
    clip = make_clip(12)
    for span in ((-1, 3), (5, 4), (0, 13)):
        with pytest.raises(ValueError, match="start, stop: expected a span within the 12 frames of clip, got"):
            clip_tensors(clip, ["audio"], *span)
    with pytest.raises(ValueError, match=r"names: expected modalities of clip \(audio, visual\), got 'text'"):
        clip_tensors(clip, ["text"])
    for window, hop in ((10, 11), (10, 0), (0, 0)):
        with pytest.raises(ValueError, match="window, hop: expected 1 <= hop <= window"):
            Windows([clip], window, hop)
    with pytest.raises(ValueError, match="clips: expected one or more, got none"):
        Windows([])
    other = Clip("other", None, clip.valid, {"audio": clip.features["audio"]}, clip.present, 12)
    with pytest.raises(ValueError, match=r"clips: expected .*\['audio', 'visual'\] in all, got \['audio'\] in other"):
        Windows([clip, other])


def test_collate():
    windows = Windows([make_clip(25, "a"), make_clip(7, "b")], window=10, hop=10)
    items = [windows[i] for i in range(len(windows))]
    batch = collate(items)
    assert batch["clip"].tolist() == [0, 0, 0, 1]
    assert batch["start"].tolist() == [0, 10, 15, 0]
    assert batch["clip"].dtype == batch["start"].dtype == torch.int64
    for b, item in enumerate(items):
        for key in ("present", "labels", "valid", "frame"):
            assert torch.equal(batch[key][b], item[key])
        for name, rows in item["features"].items():
            assert torch.equal(batch["features"][name][b], rows)


def test_quality_rides_along():
    """NaN where it is unknown, in padding and beyond its end; in every item; in a batch also for clips without."""
    clips = [make_clip(25, "a"), make_clip(7, "b"), make_clip(9, "c")]
    measured = np.random.default_rng(0).standard_normal((20, 2))
    measured[[1, 4], [0, 1]] = np.nan, np.inf
    clips[0] = dataclasses.replace(clips[0], quality={"visual": measured})
    clips[1] = dataclasses.replace(clips[1], quality={"visual": measured[:7], "audio": measured[:7, :1]})
    known = np.full((25, 2), np.nan, np.float32)
    known[:20] = np.where(np.isfinite(measured), measured, np.nan)
    assert clip_tensors(clips[2], ["audio"])["quality"] == {}
    assert clip_tensors(clips[0], ["audio"])["quality"] == {}
    windows = Windows(clips, window=10, hop=10)
    items = [windows[i] for i in range(len(windows))]
    for item, (index, start) in zip(items, windows.spans):
        assert list(item["quality"]) == [["visual"], ["audio", "visual"], []][index]
        if index == 0:
            np.testing.assert_array_equal(item["quality"]["visual"], known[start : start + 10])
    short = items[3]["quality"]["visual"]
    assert short.dtype == torch.float32
    np.testing.assert_array_equal(short[:7], known[:7])
    assert short[7:].isnan().all()
    batch = collate(items)
    assert {name: rows.shape for name, rows in batch["quality"].items()} == {"visual": (5, 10, 2), "audio": (5, 10, 1)}
    assert torch.equal(batch["quality"]["audio"][3].isnan(), items[3]["quality"]["audio"].isnan())
    assert batch["quality"]["visual"][4].isnan().all()
    assert batch["quality"]["audio"][:3].isnan().all()
    whole = whole_clips(clips[:2], windows.names)
    np.testing.assert_array_equal(whole["quality"]["visual"][0], known)
    assert whole["quality"]["visual"][1, 7:].isnan().all()
    clips[0].quality["visual"][0] = 7  # an item is a copy
    np.testing.assert_array_equal(items[0]["quality"]["visual"], known[:10])


@pytest.fixture
def on_disk(tmp_path: Path) -> AffWild2:
    for name, frames in (("a", 90), ("b", 31)):
        for m, dim in (("audio", 2), ("visual", 3)):
            folder = tmp_path / "features" / m
            folder.mkdir(parents=True, exist_ok=True)
            rows = np.random.default_rng(frames * dim).standard_normal((frames, dim)).astype(np.float32)
            rows[3] = np.nan
            np.save(folder / f"{name}.npy", rows)
        path = tmp_path / "VA_Set" / "Train_Set" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("valence,arousal\n" + "0.5,-5\n" + "0.25,0.75\n" * (frames - 1))
    return AffWild2(tmp_path, "train")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_windows(on_disk, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this platform")
    windows = Windows(on_disk, window=40, hop=25)

    def batches(workers: int) -> list[dict]:
        context = method if workers else None
        loader = torch.utils.data.DataLoader(
            windows, batch_size=2, num_workers=workers, collate_fn=collate, multiprocessing_context=context
        )
        return list(loader)

    here, there = batches(0), batches(1)
    assert len(here) == len(there) == 2
    assert here[0]["present"][0, 3].tolist() == [False, False]
    assert not here[0]["valid"][0, 0]
    for a, b in zip(here, there):
        assert all(torch.equal(a["features"][m], b["features"][m]) for m in windows.names)
        assert all(torch.equal(a[k], b[k]) for k in ("present", "labels", "valid", "frame", "clip", "start"))


def test_the_reader_is_not_scanned_for_nan(on_disk, monkeypatch):
    """A window finds NaN rows in its own span: no pass over the whole file."""
    monkeypatch.setattr(
        "sage_ext.data.affwild2.Presence.__getitem__", lambda *_: pytest.fail("the whole file was scanned")
    )
    windows = Windows(on_disk, window=40, hop=25)
    assert [windows[i]["present"][3].tolist() for i in range(len(windows))].count([False, False]) == 2


@given(st.integers(1, 60), st.integers(1, 25), st.data())
def test_overlap_average(frames, window, data):
    hop = data.draw(st.integers(1, window))
    channels = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(frames)
    average = OverlapAverage(frames, channels)
    heard: list[list[np.ndarray]] = [[] for _ in range(frames)]
    for start in window_starts(frames, window, hop):
        values = rng.standard_normal((window, channels)).astype(np.float32)
        exists = start + np.arange(window) < frames
        values[~exists] = np.nan  # padding must not be read
        average.add(start, torch.from_numpy(values), torch.from_numpy(exists))
        for t in range(start, min(start + window, frames)):
            heard[t].append(values[t - start].astype(np.float64))
    result = average.result()
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, [np.mean(values, axis=0) for values in heard], rtol=1e-12)


def test_overlap_average_faults():
    average = OverlapAverage(5)
    average.add(0, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"add: expected .* got none with frame 3 \(0-based\)"):
        average.result()
    with pytest.raises(ValueError, match=r"values: expected the shape \(W, 2\), got \(3,\)"):
        average.add(0, np.zeros(3))
    with pytest.raises(ValueError, match=r"values: expected the shape \(W, 2\), got \(3, 1\)"):
        average.add(0, np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"frame: expected bool of the shape \(3,\), got bool \(2,\)"):
        average.add(0, np.zeros((3, 2)), np.ones(2, bool))
    with pytest.raises(ValueError, match=r"frame: expected bool of the shape \(3,\), got float64 \(3,\)"):
        average.add(0, np.zeros((3, 2)), np.ones(3))
    for start in (-1, 3):
        with pytest.raises(ValueError, match=r"start: expected a window within the clip's 5 frames, got "):
            average.add(start, np.zeros((3, 2)))
    average.add(3, np.ones((3, 2)), np.array([True, True, False]))
    assert average.result()[:, 0].tolist() == [0, 0, 0, 1, 1]
