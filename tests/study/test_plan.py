"""What a study refuses to be asked, and the view of licensed data that it tunes on."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from studies import tiny

from sage_ext.data.affwild2 import AffWild2, bare_name
from sage_ext.data.synthetic import write_dataset
from sage_ext.study.plan import donor_clips, fold_views, scored_clips, tuning_view
from sage_ext.training.trainer import TrainConfig


def test_a_study_says_what_is_wrong_with_it(data):
    for change, message in (
        ({"seeds": 0}, "seeds"),
        ({"tuning_seeds": 3}, "tuning_seeds"),
        ({"methods": ()}, "methods"),
        ({"rates": (1e-3, 1e-3)}, "rates"),
        ({"train": {"lr": 1e-3}}, "lr"),
        ({"train": {"dims": 3}}, "dims"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(data, **change)
    assert math.isclose(dataclasses.replace(tiny(data)).base().lr, TrainConfig("x").lr)


def test_the_view_keeps_faces_rates_and_persons(tmp_path):
    """What lies beside features and annotations: images that say where there is a face, frame rates, two persons."""
    root, out = tmp_path / "data", tmp_path / "study" / "data"
    write_dataset(root, seed=2, train=10, validation=1, test=0, frames=(40, 60), images=True)
    (root / "fps.json").write_text(json.dumps({"train-000": 25.0}))
    whole = AffWild2(root, "train")
    assert any(name.endswith("_left") for name in whole.names)
    out.parent.mkdir()
    tuning_view(root, out)
    parts = [AffWild2(out, split) for split in ("train", "validation")]
    assert [len({n.partition("_")[0] for n in part.names}) for part in parts] == [7, 2]  # a fifth of nine videos
    absent = 0
    for part in parts:
        for clip in part:
            theirs = whole[whole.names.index(clip.name)]
            np.testing.assert_array_equal(clip.present["visual"], theirs.present["visual"])
            absent += int((~clip.present["visual"]).sum())
            assert part.fps(clip.name) == whole.fps(clip.name)
    assert absent
    for part in parts:
        assert {n.replace("_left", "_right") for n in part.names if n.endswith("_left")} <= set(part.names)
    assert not any((out / name).exists() for name in ("6th ABAW Annotations",))


def test_tuning_needs_two_videos(data, tmp_path):
    root = tmp_path / "one"
    write_dataset(root, train=1, validation=1, test=0, frames=(90, 100))
    with pytest.raises(ValueError, match="two training videos"):
        tuning_view(root, tmp_path / "view")


def test_folds_of_groups(data, tmp_path):
    """Every annotated clip is scored once; no group is on two sides of a fold; folds have about as many frames."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    names = [name for split in ("train", "validation") for name in AffWild2(root, split).names]
    videos = sorted({bare_name(name) for name in names})
    groups = {video: f"g{i // 2}" for i, video in enumerate(videos)}
    (root / "groups.json").write_text(json.dumps({"person": groups}))
    study = tiny(root, folds=3, group="person")
    found = fold_views(study, tmp_path / "study")
    assert [part.name for part in found] == ["fold-1", "fold-2", "fold-3"]
    scored, frames = [], []
    for part in found:
        sides = [AffWild2(part.data, split) for split in ("train", "validation", "test")]
        people = [{groups[bare_name(name)] for name in side.names} for side in sides]
        assert sum(map(len, people)) == len(set().union(*people)) == len(set(groups.values()))
        clips = scored_clips(part)
        scored += [clip.name for clip in clips]
        frames.append(sum(clip.num_frames for clip in clips))
        assert all(clip.labels is not None for clip in clips)
        assert {clip.name for clip in clips}.isdisjoint(clip.name for clip in donor_clips(part))
        assert len(clips) + len(donor_clips(part)) == len(names)
    assert sorted(scored) == sorted(names)
    most = max(sum(clip.num_frames for split in ("train", "validation") for clip in AffWild2(root, split)
                   if groups[bare_name(clip.name)] == group) for group in set(groups.values()))  # fmt: skip
    assert max(frames) - min(frames) <= most
    for folds in (len(videos), 99):
        with pytest.raises(ValueError, match=r"folds: expected at most as many as there are groups of videos"):
            fold_views(dataclasses.replace(study, folds=folds), tmp_path / "study")
    with pytest.raises(ValueError, match=r"group: expected a grouping of .*groups.json \(person\), got 'run'"):
        fold_views(dataclasses.replace(study, group="run"), tmp_path / "study")
    assert len(fold_views(dataclasses.replace(study, folds=len(videos), group=None), tmp_path / "study")) == len(videos)


def test_groups_that_are_scored_are_not_trained_on(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    train, scored = AffWild2(root, "train").names, AffWild2(root, "validation").names
    (root / "groups.json").write_text(json.dumps({scored[0]: "p", train[0]: "p"}))
    said = []
    view = tuning_view(root, tmp_path / "view", say=said.append)
    seen = [name for split in ("train", "validation") for name in AffWild2(view, split).names]
    lost = [name for name in train if bare_name(name) == bare_name(train[0])]
    assert sorted(seen) == sorted(set(train) - set(lost))
    assert said == [f"not trained on, for their groups are scored: {', '.join(lost)}"]


def test_groups_without_annotations_are_trained_on_only(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    folder = next(root.glob("*/VA_Estimation_Challenge/Train_Set"))
    blank = [path.stem for path in sorted(folder.glob("*.txt"))[:3]]
    for name in blank:
        path = folder / f"{name}.txt"
        path.write_text("valence,arousal\n" + "-5,-5\n" * (len(path.read_text().splitlines()) - 1))
    for part in fold_views(tiny(root, folds=3), tmp_path / "study"):
        assert AffWild2(part.data, "validation").annotated
        assert all(clip.valid.any() for clip in AffWild2(part.data, "test") if clip.name not in blank)
        assert AffWild2(part.data, "test").annotated


def test_folds_of_a_training_split_alone_and_of_one_name_twice(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    task = next(root.glob("*/VA_Estimation_Challenge"))
    names = AffWild2(root, "train").names
    shutil.copy(task / "Train_Set" / f"{names[0]}.txt", task / "Validation_Set")
    with pytest.raises(
        ValueError, match=f"data: expected one annotation of {names[0]}, got another in .*Validation_Set"
    ):
        fold_views(tiny(root, folds=2), tmp_path / "study")
    shutil.rmtree(task / "Validation_Set")
    found = fold_views(tiny(root, folds=2), tmp_path / "study")
    assert sorted(clip.name for part in found for clip in scored_clips(part)) == names
