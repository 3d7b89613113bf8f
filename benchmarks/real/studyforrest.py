"""Fusion on a film with continuous valence and arousal (studyforrest): makes data sets of the published files, compares all
methods over folds of whole runs beside a ridge regression, and prints what SAGE's weights and confidence are worth there.

    python benchmarks/real/studyforrest.py DIR [--out OUT] [--task film|raters] [--noise-stream] [--smooth-labels S]
        [--quality none|sage|all] [--quick] [--seeds N] ...

docs/real-data.md says what DIR holds, what the tasks are, how quality is made and what is measured. A study that was
interrupted is continued. Everything lies in a folder of OUT that is named by the task: table.csv, the data set, the study, and
report.md, which is what is printed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import measures
import numpy as np
import ridge

from sage_ext.data import AffWild2
from sage_ext.data.table import MARK, import_table
from sage_ext.report import Table
from sage_ext.study.corruptions import PROTOCOL
from sage_ext.study.methods import REFERENCE, default_methods, quick_methods
from sage_ext.study.plan import Study, dealing, fold_views
from sage_ext.study.run import compare
from sage_ext.training.evaluate import mean_filter

FILM, OBSERVERS = "forrest_1hz.csv", "observers_1hz.csv"
STARTS = (
    0.0,
    886.0,
    1752.08,
    2612.16,
    3572.20,
    4480.28,
    5342.36,
    6410.44,
)  # of the runs' files, in seconds of the film
MODALITIES = {"audio": "a_", "picture": "v_", "speech": "l_"}
TARGETS = {"valence": "av_valence", "arousal": "av_arousal"}
RATERS = ("ao1o01", "av1o01", "av1o02")  # one who hears the film and two who see it as well
NOISE = 8  # columns of the stream that says nothing
ALIGNED = 0.95  # correlation of a raw stream with the table, within a run
QUIET, LOUD = 1e-3, 0.25  # RMS of full scale: -60 and -12 dB
DARK = 16.0  # mean brightness of a frame, of 255
QUALITY = {
    "audio": ("level_db", "level_spread_db", "quiet", "loud"),
    "picture": ("dark", "motion", "still", "cut"),
    "speech": ("speaking",),
}

Columns = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------------------- the files
def read_columns(path: Path, only: Sequence[str] | None = None) -> Columns:
    """{column: (N,) float64} of a CSV, or a TSV that may be gzipped; NaN for empty cells. ValueError for a missing column."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t" if ".tsv" in path.name else ",")
    lacking = [name for name in only or () if name not in header]
    if lacking:
        raise ValueError(f"{path}: expected the column {lacking[0]}, got {', '.join(header)}")
    chosen = [header.index(name) for name in (header if only is None else only)]
    values = np.array([[float(row[i] or "nan") for i in chosen] for row in rows]).reshape(len(rows), len(chosen))
    return {header[i]: values[:, k] for k, i in enumerate(chosen)}


def read_film(root: Path) -> Columns:
    film = read_columns(root / FILM)
    missing = [name for name in ("t_s", "run", *TARGETS.values()) if name not in film]
    if missing:
        raise ValueError(f"{root / FILM}: expected the column {missing[0]}, got {', '.join(film)}")
    if not np.isin(film["run"], range(1, len(STARTS) + 1)).all():
        raise ValueError(f"{root / FILM}: expected runs 1 to {len(STARTS)}, got {sorted(set(film['run']))}")
    return film


# --------------------------------------------------------------------------------------------------------------- quality
class Seconds:
    """A raw stream of a run, its samples dealt to the seconds of the film `first`, `first` + 1 ... (`count` of them)."""

    def __init__(self, columns: Columns, start: float, first: float, count: int) -> None:
        self.columns, self.count = columns, count
        second = np.floor(columns["onset"] + start - first + 1e-6).astype(np.int64)
        self.kept = (second >= 0) & (second < count)
        self.second = second[self.kept]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(count,) of one number a sample, NaN in a second without any."""
        samples = np.bincount(self.second, minlength=self.count)
        total = np.bincount(self.second, values[self.kept], self.count)
        return np.divide(total, samples, out=np.full(self.count, np.nan), where=samples > 0)

    def spread(self, values: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(self.mean(values**2) - self.mean(values) ** 2, 0))


def quality_of_run(root: Path, film: Columns, run: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """{modality: (T, Q) float32} of the run's seconds, columns as in `QUALITY`, and {raw stream: its correlation with the
    table}. ValueError where a raw stream is not in step with the table."""
    here = film["run"] == run
    times = film["t_s"][here]
    row = np.rint(times - times[0]).astype(np.int64)
    first, count, start = times[0], int(row[-1]) + 1, STARTS[run - 1]
    sound = Seconds(read_columns(raw(root, "audio", run), ("onset", "rms")), start, first, count)
    level = 20 * np.log10(np.maximum(sound.columns["rms"], 1e-5))
    seen = Seconds(read_columns(raw(root, "visual", run), ("onset", "brmean", "norm_diff")), start, first, count)
    bright, moved = seen.columns["brmean"], seen.columns["norm_diff"]
    step = {}
    for kind, stream, column in (
        ("audio", sound.mean(level), "a_rms_db_mean"),
        ("visual", seen.mean(bright), "v_brmean"),
    ):
        step[kind] = in_step(stream[row], film[column][here])
        if not step[kind] >= ALIGNED:
            raise ValueError(
                f"{raw(root, kind, run)}: expected samples in step with {column} of {FILM} (a correlation of {ALIGNED} or "
                f"more, second by second), got {step[kind]:.3f}"
            )
    cut = np.zeros(count)
    shots = np.floor(read_columns(root / "raw" / "shots.csv", ("start",))["start"] - first + 1e-6).astype(np.int64)
    cut[shots[(shots >= 0) & (shots < count)]] = 1
    speaking = np.full(count, np.nan)
    speaking[row] = film["l_speech_frac"][here] > 0
    rms = sound.columns["rms"]
    found = {
        "audio": (sound.mean(level), sound.spread(level), sound.mean(rms < QUIET), sound.mean(rms > LOUD)),
        "picture": (seen.mean(bright < DARK), seen.mean(moved), seen.mean(moved == 0), cut),
        "speech": (speaking,),
    }
    return {name: np.stack(columns, 1).astype(np.float32) for name, columns in found.items()}, step


def raw(root: Path, kind: str, run: int) -> Path:
    return root / "raw" / f"conf_{kind}_run-{run}_events.tsv.gz"


def in_step(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(a[known], b[known])[0, 1]) if known.sum() > 1 else float("nan")


def write_quality(root: Path, data: Path, film: Columns) -> list[str]:
    """features/<modality>/<run>.quality.npy beside the features in `data`, and the columns' names in meta.json; what to say of
    it."""
    said = []
    for run in sorted({int(run) for run in film["run"]}):
        found, step = quality_of_run(root, film, run)
        said.append(f"run {run}: " + ", ".join(f"{kind} {value:.4f}" for kind, value in step.items()))
        for name, rows in found.items():
            np.save(data / "features" / name / f"{run}.quality.npy", rows)
    for name, columns in QUALITY.items():
        path = data / "features" / name / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quality": list(columns)}) + "\n")
    return ["raw streams in step with the table, correlation second by second", *said]


# ------------------------------------------------------------------------------------------------------------- the tasks
def film_columns(film: Columns) -> tuple[Columns, dict[str, str]]:
    """The columns of the first task's table, and which modality begins how."""
    features = {n: x for n, x in film.items() if n.startswith(tuple(MODALITIES.values()))}
    labels = {name: film[column] for name, column in TARGETS.items()}
    return {**features, **labels}, dict(MODALITIES)


def rater_columns(root: Path, film: Columns, raters: Sequence[str]) -> tuple[Columns, dict[str, str]]:
    """Of the second: each of `raters` is a modality, and the targets are the means of the film's other observers."""
    said = read_columns(root / OBSERVERS)
    if len(said["t_s"]) != len(film["t_s"]) or not np.array_equal(said["t_s"], film["t_s"]):
        raise ValueError(f"{root / OBSERVERS}: expected the seconds of {FILM}, got others")
    known = [name.removesuffix("_arousal") for name in said if name.endswith("_arousal")]
    if len(set(raters)) < max(len(raters), 2) or not set(raters) <= set(known):
        raise ValueError(f"raters: expected two or more different ones of {', '.join(known)}, got {', '.join(raters)}")
    others = [name for name in known if name.startswith("av") and name not in raters]
    if not others:
        raise ValueError(f"raters: expected to leave an observer of the film out, got all: {', '.join(raters)}")
    inputs = {f"{rater}_{kind}": said[f"{rater}_{kind}"] for rater in raters for kind in TARGETS}
    labels = {kind: np.mean([said[f"{name}_{kind}"] for name in others], 0) for kind in TARGETS}
    return {**inputs, **labels}, {rater: f"{rater}_" for rater in raters}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is made of the film: which inputs, and whether labels are smoothed, a noise stream added, quality given."""

    what: str = "film"  # or "raters"
    raters: tuple[str, ...] = RATERS
    noise: int | None = None  # the seed of the stream of white noise; None: there is none
    smooth: int = 1  # seconds of a centred mean over the labels
    quality: str = "sage"  # who is given it: "none", "sage" (the reliability path), "all" (other methods as features)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("task", self.what, ("film", "raters")), ("quality", self.quality, ("none", "sage", "all")),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value}")
        if self.smooth < 1:
            raise ValueError(f"smooth_labels: expected seconds >= 1, got {self.smooth}")

    @property
    def has_quality(self) -> bool:
        return self.what == "film" and self.quality != "none"

    @property
    def name(self) -> str:
        """Of its folder: no two tasks share one."""
        parts = [self.what, *(self.raters if self.what == "raters" and self.raters != RATERS else ())]
        parts += [] if self.noise is None else [f"noise{self.noise or ''}"]
        parts += [] if self.smooth == 1 else [f"smooth{self.smooth}"]
        parts += [] if self.what == "raters" or self.quality == "sage" else [f"quality-{self.quality}"]
        return "-".join(parts)


def make_data(root: Path, out: Path, task: Task) -> list[str]:
    """The data set OUT/data, by way of the table OUT/table.csv, in place of an earlier one. Returns what to say of it."""
    film = read_film(root)
    columns, modalities = film_columns(film) if task.what == "film" else rater_columns(root, film, task.raters)
    if task.noise is not None:
        noise = np.random.default_rng(task.noise).standard_normal((len(film["t_s"]), NOISE))
        columns.update({f"noise_{k}": noise[:, k] for k in range(NOISE)})
        modalities["noise"] = "noise_"
    for run in set(film["run"]):
        here = film["run"] == run
        for name in TARGETS:
            columns[name] = columns[name].copy()
            columns[name][here] = mean_filter(columns[name][here, None], [task.smooth])[:, 0]
    out.mkdir(parents=True, exist_ok=True)
    table, data = out / "table.csv", out / "data"
    with open(table, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("run", "t_s", *columns))
        for run, time, *values in zip(film["run"], film["t_s"], *columns.values()):
            rows.writerow((int(run), f"{time:.10g}", *("" if np.isnan(v) else f"{v:.9g}" for v in values)))
    if (data / MARK).exists():
        shutil.rmtree(data)
    report = import_table(
        table, data, video="run", time="t_s", targets=list(TARGETS), modalities=modalities, group="run",
        ranges=dict.fromkeys(TARGETS, (-1, 1)), fps=1,
    )  # fmt: skip
    said = [
        f"{data}: {report.frames:,} seconds; "
        + ", ".join(f"{n} {len(m.columns)}" for n, m in report.modalities.items())
    ]
    return said + (write_quality(root, data, film) if task.has_quality else [])


def study_of(data: Path, task: Task, args: argparse.Namespace) -> Study:
    modalities = tuple(AffWild2(data, "train").modalities)
    runs = sum(len(AffWild2(data, split)) for split in ("train", "validation"))
    train = {"epochs": 1000, "dim": 32, "batch_size": 8, "max_steps": args.max_steps or (100 if args.quick else 700)}
    train["keep"] = "last"  # the tuning split is one run: chosen by it, the epoch is a matter of chance
    if task.has_quality and task.quality == "all":
        train["quality"] = True
    return Study(
        str(data),
        args.methods or (quick_methods if args.quick else default_methods)(modalities),
        folds=args.folds or runs,
        group="run",
        seeds=args.seeds or (1 if args.quick else 5),
        rates=args.lr or ((2e-3,) if args.quick else (1e-3, 2e-3, 4e-3)),
        severities=args.severities,
        corruptions=args.corruptions or (("noise",) if args.quick else PROTOCOL),
        train=train,
    )


def baselines(study: Study, out: Path, *, quality: bool) -> tuple[dict[str, Mapping[str, np.ndarray]], str]:
    """{"ridge": predictions, "ridge-<modality>": ...} on views of the study's folds in `out`, and a digest of the dealing."""
    out.mkdir(exist_ok=True)
    found = fold_views(study, out)
    names = tuple(AffWild2(study.data, "train").modalities)
    which = {"ridge": names, **{f"ridge-{name}": (name,) for name in names}}
    return {name: ridge.predictions(found, of, quality=quality) for name, of in which.items()}, dealing(found)


def run(root: Path, out: Path, task: Task, args: argparse.Namespace) -> list[Table]:
    out = out / task.name
    for text in make_data(root, out, task):
        print(text, flush=True)
    study = study_of(out / "data", task, args)
    found, dealt = baselines(study, out / "ridge", quality=task.has_quality and task.quality == "all")
    compare(study, out / "study", processes=args.processes, draws=args.draws, quiet=args.quiet)
    if dealt != json.loads((out / "study" / "study.json").read_text())["dealt"]:
        raise ValueError(f"{out}: expected the folds of the study for the ridge regression too, got others")
    results = measures.finished(study, out / "study", found)
    tables = [measures.methods(results, args.draws)]
    if REFERENCE in study.methods:
        tables.append(measures.confidence(results, out / "study"))
    (out / "report.md").write_text(f"# {task.name}\n\n" + "\n".join(table.markdown() for table in tables))
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    def listed(kind: type):
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR", help=f"holds {FILM}, {OBSERVERS} and raw/")
    parser.add_argument("--out", type=Path, default=Path("runs/studyforrest"), help="default: runs/studyforrest")
    parser.add_argument("--task", default="film", choices=("film", "raters"),
                        help="film: valence and arousal from sound, picture and speech; raters: from what some observers "
                        "said, that of the others")  # fmt: skip
    parser.add_argument("--raters", type=listed(str), default=RATERS, metavar="A,B,C",
                        help=f"whose marks are the inputs (default: {','.join(RATERS)})")  # fmt: skip
    parser.add_argument("--noise-stream", action="store_true", help="one more modality, of white noise")
    parser.add_argument("--noise-seed", type=int, default=0, help="of that noise")
    parser.add_argument("--smooth-labels", type=int, default=1, metavar="S",
                        help="labels are their centred means over S seconds, to learn from and to be scored by")  # fmt: skip
    parser.add_argument("--quality", default="sage", choices=("none", "sage", "all"),
                        help="who is given the modalities' quality: nobody, SAGE's reliability path, or that and all other "
                        "methods as features")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="SAGE, concat, uniform weights and the single modalities, one seed, 100 steps")  # fmt: skip
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 5, quick 1")
    parser.add_argument("--methods", type=listed(str), metavar="A,B", help="as in sage-ext compare (default: all)")
    parser.add_argument("--lr", type=listed(float), metavar="R,R", help="grid (default: 1e-3,2e-3,4e-3, quick 2e-3)")
    parser.add_argument("--max-steps", type=int, help="default: 700, quick 100")
    parser.add_argument("--folds", type=int, help="default: one a run")
    parser.add_argument("--severities", type=listed(int), default=(3,), help="of the corruptions (default: 3)")
    parser.add_argument("--corruptions", type=listed(str), help="default: all, quick noise")
    parser.add_argument("--processes", type=int, help="at once (default: one a core)")
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    args = parser.parse_args(arguments)
    try:
        noise = args.noise_seed if args.noise_stream else None
        task = Task(args.task, args.raters, noise, args.smooth_labels, args.quality)
        tables = run(args.root, args.out, task, args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    print("\n" + "\n\n".join(table.text() for table in tables))


if __name__ == "__main__":
    main()
