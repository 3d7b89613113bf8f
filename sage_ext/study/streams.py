"""Streams that are of no use, and one that drifts after training: what SAGE does with them.

`add_stream` writes a further modality into a data set: noise in training and test alike, or a late copy of another one. A
model trained with it is compared with the same model trained without. `drifted` are clips whose features move away from
what training saw, a little further in each. `useless_streams` and `slow_drift` are the two studies, tables as their result;
`benchmarks/streams.py` runs both.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.affwild2 import SPLITS, AffWild2, Clip, bare_name
from ..files import replacing_folder
from ..report import Table
from ..training.evaluate import ClipPrediction, alike, clip_moments
from ..training.runs import Run
from .methods import REFERENCES, title
from .plan import Part, Study, evaluation_path, parts, run_path, scored_clips
from .results import MOMENTS, read_evaluation
from .run import compare
from .statistics import interval, pooled_score, resampled

KINDS = ("noise", "lagged")
DIM = 16  # features of a stream
LAG = 0.5  # seconds that a lagged copy is late
MOST = 2.0  # standard deviations that a drift reaches
FIFTHS = 5

Array = np.ndarray


# -------------------------------------------------------------------------------------------------------------- streams
def add_stream(
    root: str | os.PathLike[str], name: str, kind: str, *, of: str | None = None, dim: int = DIM, seed: int = 0
) -> None:
    """Writes features/<name> for every clip of the data set at `root`, `dim` features a frame.

    kind  "noise": standard normal numbers, new ones in every frame; "lagged": what the modality `of` (default: the last
          one) held `LAG` seconds before, behind one random projection; missing where that was missing

    FileExistsError where there is such a modality already, ValueError for a kind that does not exist.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    folder = Path(root) / "features" / name
    if folder.exists():
        raise FileExistsError(f"name: expected one that no modality has, got {name} ({folder})")
    rows: dict[str, Array] = {}
    for data in _splits(root):
        source = of if of is not None else list(data.modalities)[-1]
        if source not in data.modalities:
            raise ValueError(f"of: expected one of {', '.join(data.modalities)}, got {source!r}")
        if kind == "noise":
            for clip in data:
                rng = np.random.default_rng([seed, *clip.name.encode()])
                rows[clip.name] = rng.standard_normal((clip.num_frames, dim)).astype(np.float32)
        else:
            width = data.modalities[source]
            project = np.random.default_rng([seed, 1]).standard_normal((width, dim)) / np.sqrt(width)
            for clip in data:
                rows[clip.name] = _late(_rows(clip, source), max(round(LAG * clip.fps), 1)) @ project.astype(np.float32)
    with replacing_folder(folder) as part:
        (part / "meta.json").write_text(json.dumps({"about": f"a stream of no use: {kind}"}) + "\n")
        for clip_name, values in rows.items():
            np.save(part / f"{clip_name}.npy", values)


def with_stream(
    root: str | os.PathLike[str], out: str | os.PathLike[str], name: str, kind: str, **options: Any
) -> Path:
    """A data set at `out`, made of links to the one at `root`, with a stream that `root` does not have, see `add_stream`."""
    source, place = Path(root).resolve(), Path(out)
    if not place.exists():
        with replacing_folder(place) as part:
            (part / "features").mkdir()
            for entry in source.iterdir():
                for inside in entry.iterdir() if entry.name == "features" else [entry]:
                    (part / inside.relative_to(source)).symlink_to(inside)
            add_stream(part, name, kind, **options)
    return place


def _splits(root: str | os.PathLike[str]) -> Iterator[AffWild2]:
    for split in SPLITS:
        try:
            yield AffWild2(root, split)
        except FileNotFoundError:  # no such split
            if split == "train":
                raise


def _rows(clip: Clip, name: str) -> Array:
    """(T, D), NaN where the modality is missing."""
    held = np.asarray(clip.features[name][: clip.num_frames], np.float32)
    rows = np.full((clip.num_frames, held.shape[1]), np.nan, np.float32)
    rows[: len(held)] = held
    rows[~np.asarray(clip.present[name])] = np.nan
    return rows


def _late(rows: Array, lag: int) -> Array:
    before = np.full((min(lag, len(rows)), rows.shape[1]), np.nan, np.float32)
    return np.concatenate([before, rows[: len(rows) - len(before)]])


# ---------------------------------------------------------------------------------------------------------------- drift
class Drifted(Sequence[Clip]):
    """Clips in which a modality drifts: clip i of n has the constant offset `most * i / (n - 1)` times the deviation (D,) of
    each feature, up in some features and down in the others, in all clips the same ones."""

    def __init__(
        self, clips: Sequence[Clip], modality: str, deviation: Array, *, most: float = MOST, seed: int = 0
    ) -> None:
        self.clips, self.modality, self.most = clips, modality, most
        signs = np.random.default_rng([seed, *modality.encode()]).integers(0, 2, len(deviation)) * 2 - 1
        self.direction = (signs * deviation).astype(np.float32)

    def __len__(self) -> int:
        return len(self.clips)

    def amount(self, index: int) -> float:
        """Standard deviations by which clip `index` is off."""
        return self.most * index / max(len(self.clips) - 1, 1)

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override]
        clip = self.clips[index]  # IndexError at the end
        rows = np.asarray(clip.features[self.modality][: clip.num_frames], np.float32)
        features = {**clip.features, self.modality: rows + np.float32(self.amount(index)) * self.direction}
        return dataclasses.replace(clip, features=features)


def deviations(data: Sequence[Clip], modality: str) -> Array:
    """(D,) standard deviation of each feature over the frames that have the modality."""
    rows = np.concatenate([_rows(clip, modality) for clip in data]).astype(np.float64)
    return np.nanstd(rows, axis=0)


def label_variance(data: Sequence[Clip]) -> Array:
    """(C,) of the annotated frames."""
    return np.concatenate([clip.labels[clip.valid] for clip in data if clip.labels is not None]).var(
        axis=0, dtype=float
    )


class Fifth(NamedTuple):
    """What was said of a modality in consecutive clips."""

    stated: float  # mean confidence
    observed: float  # 1 - mean squared error of its estimate, put to scale, / variance of the labels; mean over targets
    weight: float
    score: float  # P of the fused prediction


def fifth(clips: Sequence[Clip], said: Sequence[ClipPrediction], modality: int, name: str, variance: Array) -> Fifth:
    """Of frames that are annotated and have the modality; P of all annotated ones."""
    stated, weights, errors, moments = [], [], [], []
    for clip, one in zip(clips, said):
        assert clip.labels is not None
        counted = clip.valid & np.asarray(clip.present[name])
        stated.append(one.confidence[counted, modality])
        weights.append(one.weights[counted, modality])
        errors.append(np.square(one.unimodal[counted, modality].astype(np.float64) - clip.labels[counted]))
        moments.append(clip_moments(one.prediction, clip).numpy())
    observed = float((1 - np.concatenate(errors).mean(axis=0) / variance).mean())
    score = float(pooled_score(np.stack(moments), np.ones((1, len(clips))))[0])
    return Fifth(float(np.concatenate(stated).mean()), observed, float(np.concatenate(weights).mean()), score)


# -------------------------------------------------------------------------------------------------------------- studies
def _plain(study: Study) -> Study:
    """Without corruptions and with one rate: what a study of streams needs. ValueError for one in folds."""
    if study.folds is not None:
        raise ValueError(f"folds: expected none in a study of streams, got {study.folds}")
    return dataclasses.replace(study, corruptions=(), rates=study.rates[:1], tuning_seeds=1)


def _predicted(run: Run, clips: Sequence[Clip]) -> list[ClipPrediction]:
    """In the order of the clips."""
    said: dict[int, ClipPrediction] = {}
    for places in alike([clip.num_frames for clip in clips]):
        said.update(zip(places, run.predict_together([clips[i] for i in places])))
    return [said[i] for i in range(len(clips))]


def _loaded(study: Study, out: Path, part: Part, method: str) -> list[Run]:
    """Of every seed."""
    return [Run.load(run_path(out, method, seed, study.rates[0], part)) for seed in range(study.seeds)]


def _moments(study: Study, out: Path, part: Part, method: str) -> Array:
    """(V, N, C, 6)."""
    held = [read_evaluation(evaluation_path(out, seed, None, part))[method][MOMENTS] for seed in range(study.seeds)]
    return np.stack(held, 1)


def _cost(without: Array, with_it: Array, groups: Sequence[str], draws: int) -> tuple[float, float, float]:
    """P without the stream less P with it, and its 95 % interval over videos and seeds."""
    rng, seeds = np.random.default_rng(0), without.shape[1]
    weights = resampled(groups, draws, rng)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    all_of_them = np.ones((1, len(groups)))
    measured = (pooled_score(without, all_of_them) - pooled_score(with_it, all_of_them)).mean()
    drawn = ((pooled_score(without, weights) - pooled_score(with_it, weights)) * of_seeds).sum(1)
    return (float(measured), *interval(drawn))


def useless_streams(
    study: Study, out: str | os.PathLike[str], *, processes: int | None = None, draws: int = 2000, quiet: bool = False
) -> Table:
    """Trains the study's methods with and without each of `KINDS`: P with it, what it costs, its weight and confidence.

    OUT/without, OUT/noise and OUT/lagged hold the studies, OUT/data-noise and OUT/data-lagged the data. Clean only.
    """
    out, rows = Path(out), []
    study = _plain(study)
    compare(study, out / "without", processes=processes, draws=draws, quiet=quiet)
    (before,) = parts(study, out / "without")
    groups = [bare_name(clip.name) for clip in scored_clips(before, study.modalities)]
    for kind in KINDS:
        data = with_stream(study.data, out / f"data-{kind}", kind, kind)
        names = None if study.modalities is None else (*study.modalities, kind)
        changed = dataclasses.replace(study, data=str(data), modalities=names)
        compare(changed, out / kind, processes=processes, draws=draws, quiet=quiet)
        (part,) = parts(changed, out / kind)
        clips = scored_clips(part, names)
        for method in study.methods:
            plain = _moments(study, out / "without", before, method)
            moments = _moments(changed, out / kind, part, method)
            value, low, high = _cost(plain, moments, groups, draws)
            score = pooled_score(moments, np.ones((1, len(clips)))).mean()
            row = [kind, title(method), score, f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"]
            shares = [_share(run, clips, kind) for run in _loaded(changed, out / kind, part, method)]
            weight, confidence = np.mean(shares, axis=0)
            row += [float(weight), float(confidence) if method in REFERENCES else "-"]
            rows.append(row)
    note = (
        "P with the stream in training and test, what it costs against the same method without it, with 95 % intervals over "
        "videos and seeds; mean weight and stated confidence of the stream where it is there. Targets for noise: it costs at "
        "most .005, its weight is at most .03 and its confidence at most .05."
    )
    return Table("Streams of no use", ("stream", "", "P", "costs", "weight", "confidence"), rows, note)


def _share(run: Run, clips: Sequence[Clip], name: str) -> tuple[float, float]:
    """Mean weight and confidence of a modality in the frames that have it."""
    place, counted = run.names.index(name), [np.asarray(clip.present[name]) for clip in clips]
    said = _predicted(run, clips)
    values = [
        np.concatenate([array[here, place] for array, here in zip(arrays, counted)]).mean()
        for arrays in ([one.weights for one in said], [one.confidence for one in said])
    ]
    return float(values[0]), float(values[1])


def slow_drift(
    study: Study, out: str | os.PathLike[str], *, processes: int | None = None, draws: int = 2000, quiet: bool = False
) -> list[Table]:
    """Stated and observed confidence of a modality that drifts from clip to clip after training, a table a reference method
    of the study: rows are the fifths of the clips, and their mean. OUT/without holds the study, as `useless_streams` does."""
    out = Path(out)
    study = _plain(study)
    compare(study, out / "without", processes=processes, draws=draws, quiet=quiet)
    (part,) = parts(study, out / "without")
    clips = scored_clips(part, study.modalities)
    train = AffWild2(part.data, "train", modalities=study.modalities)
    variance, drifts = label_variance(train), {m: Drifted(clips, m, deviations(train, m)) for m in train.modalities}
    found = []
    for method in [method for method in study.methods if method in REFERENCES]:
        rows: list[list[Any]] = []
        for name, drift in drifts.items():
            moved, by_seed = list(drift), []
            for run in _loaded(study, out / "without", part, method):
                by_seed.append(_by_fifth(run, moved, name, variance))
            rows += _drift_rows(name, drift, np.array(by_seed))
        header = ("drifting", "fifth", "offset", "confidence", "observed", "error", "weight", "P")
        note = (
            f"The modality's features move by 0 to {MOST:g} standard deviations from the first clip to the last. Confidence as "
            "stated, and as the errors of the modality's own estimate, put to scale, show it (1 less their mean square over the "
            "labels' variance; below 0 it is worse than the labels' mean, and confidence should be 0); its weight; P of the "
            "fused prediction. Mean "
            f"over seeds ({study.seeds}). Target: the mean error is at most .10."
        )
        found.append(Table(f"Slow drift after training: {title(method)}", header, rows, note))
    return found


def _by_fifth(run: Run, moved: Sequence[Clip], name: str, variance: Array) -> list[Fifth]:
    said, place = [run.put_to_scale(one) for one in _predicted(run, moved)], run.names.index(name)
    chosen = np.array_split(np.arange(len(moved)), FIFTHS)
    return [fifth([moved[i] for i in c], [said[i] for i in c], place, name, variance) for c in chosen if len(c)]


def _drift_rows(name: str, drift: Drifted, found: Array) -> list[list[Any]]:
    """found: (N, fifths, 4), see `Fifth`."""
    mean, error = found.mean(0), np.abs(found[..., 0] - np.maximum(found[..., 1], 0)).mean(0)
    offsets = [
        np.mean([drift.amount(int(i)) for i in c]) for c in np.array_split(np.arange(len(drift)), FIFTHS) if len(c)
    ]
    rows = [
        [name, str(i + 1), float(offset), *map(float, one[:2]), float(error[i]), *map(float, one[2:])]
        for i, (offset, one) in enumerate(zip(offsets, mean))
    ]
    whole = mean.mean(0)
    return [
        *rows,
        [name, "mean", float(np.mean(offsets)), *map(float, whole[:2]), float(error.mean()), *map(float, whole[2:])],
    ]


__all__ = ["add_stream", "slow_drift", "useless_streams", "with_stream"]
