"""The comparison of fusion methods: trained alike, scored clean and under every robustness condition.

Everything is a function of the data, the configuration and the seed, and every file (`plan` names them) is there whole
or not at all, so a study that is stopped at any moment continues with the same command, and may be given more methods,
seeds or conditions.

What is alike for all methods: data, windows and their order, rehearsed failures, steps, sizes, loss, the grid of
learning rates, and how the best epoch and rate are chosen, on the validation split alone. The rate is the one with the
best mean validation P over the first `tuning_seeds` seeds; it is then used for all of them.

Three phases of independent jobs (`PHASES`) and the tables. A phase's jobs stand in an order that depends on the study alone,
so that processes which know nothing of each other can do a `Share` of them each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.affwild2 import AffWild2, bare_name
from ..data.synthetic import has_truth
from ..files import LOCK, alone, parsing, write_atomic
from ..jobs import Job, JoblibWorkers, Workers
from ..nn import ReliabilityFusion
from ..report import Table, printable
from ..training.runs import Run, calibrate_run
from ..training.trainer import (
    BEST,
    FREE,
    RunError,
    TrainConfig,
    advice,
    data_shape,
    differences,
    open_data,
    read_config,
    train,
)
from .corruptions import CORRUPTIONS, PROTOCOL, Condition, conditions
from .methods import TOLD, UNTRAINED, WITH_QUALITY, default_methods, half, unfit
from .plan import (
    HELD_OUT,
    TRUTH,
    Part,
    Study,
    annotated_splits,
    check_place,
    condition_name,
    configuration,
    dealing,
    evaluation_path,
    has_quality,
    make_parts,
    parts,
    run_path,
    scored_clips,
)
from .report import write_study
from .results import Trained, gather, read_evaluation, write_results
from .score import Scored, Sweep, evaluate_sweep, missing

STUDY, RESULT = "study.json", "result.json"
GROWS = ("methods", "seeds", "severities", "corruptions")  # a study may be continued with others
LATER = {"precision": "float32", "compile": False, "graph": False}  # of studies from before these fields

# All rates on the tuning seeds; the other seeds at the chosen rate; all scores.
TUNE, TRAIN, EVALUATE = PHASES = ("tune", "train", "evaluate")
LAUNCHERS = ("local", "joblib")


@dataclasses.dataclass(frozen=True)
class Share:
    """The jobs of a phase in the places index - 1, index - 1 + count, ..."""

    phase: str  # of PHASES
    index: int  # 1 .. count
    count: int

    @classmethod
    def read(cls, text: str) -> Share:
        """Of PHASE:I/N; ValueError for anything else."""
        phase, _, rest = text.partition(":")
        index, _, count = rest.partition("/")
        if phase in PHASES and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(phase, int(index), int(count))
        raise ValueError(f"share: expected PHASE:I/N, of {', '.join(PHASES)}, with I of 1 to N, got {text!r}")

    def __str__(self) -> str:
        return f"{self.phase}:{self.index}/{self.count}"


# ----------------------------------------------------------------------------------------------------------- trainings
def finished(config: TrainConfig, path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What result.json of the run at `path` holds; None before it is finished. RunError for another configuration."""
    run = Path(path)
    if not (run / RESULT).exists():
        return None
    differ = differences(read_config(run).to_json(), config.to_json())
    if differ:
        raise RunError(f"{run}: expected the configuration that it was trained with, got another ({differ})")
    with parsing(run / RESULT):
        return json.loads((run / RESULT).read_text())


def train_one(config: TrainConfig, path: str) -> dict[str, Any]:
    """In a process of its own: train (or continue) the run at `path`, calibrate it, and say what came out.

    Returns (and leaves in result.json) {"P": of the best epoch on the validation split, "epoch", "step", "seconds" of
    the processor, "parameters", "model": digest of the weights}.
    """
    run = Path(path)
    began = time.process_time()
    best = train(config, run, resume=True, progress=False)
    model = Run.load(run, config.device).model
    if isinstance(model.fusion, ReliabilityFusion):
        calibrate_run(run, device=config.device)
    result = {
        "P": best["scores"]["fused"]["P"],
        "epoch": best["epoch"],
        "step": best["step"],
        "seconds": time.process_time() - began,  # of the last sitting
        "parameters": sum(p.numel() for p in model.parameters()),
        "model": hashlib.sha256((run / BEST).read_bytes()).hexdigest()[:16],
    }
    write_atomic(run / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _evaluate_one(sweep: Sweep) -> dict[str, str]:
    """In a process that may be anybody's: the order of sums is that of one thread, as in the trainings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate_sweep(sweep)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- the study
class _Reporter:
    def __init__(self, quiet: bool) -> None:
        self.quiet, self.began = quiet, time.monotonic()

    def say(self, text: str) -> None:
        if not self.quiet:
            seconds = int(time.monotonic() - self.began)
            print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {printable(text)}", file=sys.stderr, flush=True)

    def phase(self, count: int) -> _Phase:
        return _Phase(self, count)


class _Phase:
    """Counts finished jobs, and estimates from the time they took when the others will be finished."""

    def __init__(self, reporter: _Reporter, count: int) -> None:
        self.reporter, self.count, self.done, self.began = reporter, count, 0, time.monotonic()
        self.said, self.skipped = self.began, 0

    def skip(self) -> None:
        """One job was finished before this phase began."""
        self.done += 1
        self.skipped += 1

    def say(self, text: str, every: float = 0.0) -> None:
        """One more is done; says so, but not before `every` seconds after the last time, unless it is the last one."""
        self.done += 1
        now = time.monotonic()
        if self.done < self.count and now - self.said < every:
            return
        self.said = now
        left = int((now - self.began) / (self.done - self.skipped) * (self.count - self.done))
        rest = f", {left // 60}:{left % 60:02d} left" if self.done < self.count else ""
        self.reporter.say(f"{self.done}/{self.count}{rest}  {text}")


def _prepare(study: Study, out: Path, reporter: _Reporter, share: Share | None = None) -> list[Part]:
    """Check that `out` is this study's or new; what to train on and to score. A share finds it prepared, and writes nothing."""
    data = open_data(study.base()) if study.folds is None else annotated_splits(study)
    shape = data_shape(data)
    asked = {**study.to_json(), "shape": shape}
    asked["train"] = {key: value for key, value in asked["train"].items() if key not in ("data", "seed", "lr")}
    asked.pop("data")  # it may move; its shape may not
    asked = {**{key: asked.pop(key) for key in GROWS}, **asked.pop("train"), **asked}
    path, stored = out / STUDY, dict[str, Any]()
    if path.exists():
        try:
            stored = {**LATER, **json.loads(path.read_text())}
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error})") from error
        differ = differences(stored, asked, (*(GROWS if share is None else ()), *FREE, "dealt"))
        if differ:
            raise RunError(f"{out}: expected the configuration of the study that it holds, got another ({differ})")
    elif share is not None:
        raise RunError(f"{out}: expected a study that was begun without --share, got a directory without {STUDY}")
    elif any(entry.name not in (LOCK, "data") for entry in out.iterdir()):
        raise RunError(
            f"{out}: expected a directory that is empty, new or a study's, got one that holds something else"
        )
    modalities = list(study.modalities or shape["modalities"])
    quality, truth = any(map(has_quality, data.values())), study.folds is None and has_truth(study.data)
    known, left = default_methods(modalities, quality=quality, truth=truth), unfit(modalities)
    why = f"defined for two modalities, of which there are {len(modalities)} here"
    for name in study.methods:
        if name in known:
            continue
        reason = ""
        if name.removesuffix(WITH_QUALITY) in left:
            reason = f": {why}"
        elif half(name) and not quality:
            reason = ": the data have no quality evidence"
        elif name == TOLD:
            reason = ": the true noise is known of synthetic data with a test split alone, and not in folds"
        raise ValueError(f"methods: expected names among {', '.join(known)}, got {name}{reason}")
    for text in advice(text for clips in data.values() for text in clips.mismatches):
        reporter.say(text)
    if left:
        reporter.say(f"not compared: {', '.join(left)}: {why}")
    found = make_parts(study, out, reporter.say) if share is None else parts(study, out)
    asked["dealt"] = dealing(found)
    if stored.get("dealt", asked["dealt"]) != asked["dealt"]:
        raise RunError(
            f"{out}: expected the videos dealt as when the study began, got another dealing (groups.json or a split has "
            "changed): its runs have seen what is scored now; begin another study"
        )
    if share is not None:
        return found
    write_atomic(path, json.dumps(asked, indent=1) + "\n")
    if study.folds is not None:
        reporter.say(f"{study.folds} folds: each scored by models of the others, tuned on a fifth of their groups")
    elif found[0].split == TRUTH:
        reporter.say("scored on the test split with the synthesiser's truth, tuned on the validation split")
    else:
        reporter.say(
            f"scored on the validation split, tuned on one in {HELD_OUT} training videos, which are not trained on"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Work:
    """A study in progress."""

    study: Study
    out: Path
    workers: Workers | JoblibWorkers
    reporter: _Reporter
    share: Share | None = None  # None: all of it
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # method -> what went wrong

    def mine(self, phase: str, place: int) -> bool:
        """Whether this process does the phase's job in that place."""
        share = self.share
        return share is None or (share.phase == phase and place % share.count == share.index - 1)


def _train_all(work: _Work, found: Sequence[Part]) -> Trained:
    """Train what is not finished yet, or of the phase in work the share; what else is not finished has failed here."""
    study, out, reporter, failed = work.study, work.out, work.reporter, work.failed
    Key = tuple[str, Part, int, float]
    results: dict[Key, dict[str, Any]] = {}

    def finish(named: str, wanted: Sequence[Key | None], phase: _Phase) -> None:
        """The phase of that name; None: the place of a training that cannot be."""
        keys = {}
        jobs = []
        for place, key in enumerate(wanted):
            if key is None:
                continue
            method, part, seed, rate = key
            name = f"{method}, {part.name + ', ' if part.name else ''}seed {seed}, rate {rate:g}"
            keys[name] = key
            config, path = configuration(study, part, method, seed, rate), run_path(out, method, seed, rate, part)
            done = finished(config, path)
            if done is None and work.mine(named, place):
                jobs.append(Job(name, train_one, (config, str(path))))
                continue
            phase.skip()
            if done is not None:
                results[key] = done
            elif work.share is not None and work.share.phase != named:
                failed[method] = f"{name}: not finished, and {work.share} comes after it"
        for outcome in work.workers.run(jobs):
            key = keys[outcome.job.name]
            if outcome.error is None:
                results[key] = outcome.value
                phase.say(
                    f"{outcome.job.name}: validation P {outcome.value['P']:.4f} ({outcome.value['seconds']:.0f} s)"
                )
            else:
                failed[key[0]] = f"{outcome.job.name}: {outcome.error}"
                phase.say(f"{outcome.job.name} FAILED: {outcome.error}")

    seeds = range(study.tuning_seeds)
    tuning = [(m, part, seed, rate) for seed in seeds for part in found for m in study.methods for rate in study.rates]
    count = len(tuning) + len(study.methods) * len(found) * (study.seeds - study.tuning_seeds)
    phase = reporter.phase(count)
    reporter.say(f"{count} trainings")
    finish(TUNE, tuning, phase)
    if work.share is not None and work.share.phase == TUNE:
        return Trained({}, {})
    chosen: dict[tuple[str, Part], float] = {}
    for method in study.methods:
        for part in found:
            if method not in failed:
                mean = {rate: np.mean([results[method, part, s, rate]["P"] for s in seeds]) for rate in study.rates}
                chosen[method, part] = max(study.rates, key=lambda rate: mean[rate])
    later = range(study.tuning_seeds, study.seeds)
    places = [(m, part, s) for s in later for m in study.methods for part in found]
    finish(TRAIN, [(m, part, s, chosen[m, part]) if (m, part) in chosen else None for m, part, s in places], phase)
    if work.share is not None and work.share.phase == TRAIN:
        return Trained({}, {})
    good = {key: rate for key, rate in chosen.items() if key[0] not in failed}
    return Trained(
        good, {(m, part, s): results[m, part, s, rate] for (m, part), rate in good.items() for s in range(study.seeds)}
    )


def _evaluate_all(work: _Work, found: Sequence[Part], wanted: Sequence[Condition | None], trained: Trained) -> None:
    """Score what is not scored yet."""
    study, out, reporter, failed = work.study, work.out, work.reporter, work.failed
    device = study.base().device
    jobs, places = [], itertools.count()
    for part in found:
        for seed in range(study.seeds):
            runs = tuple(
                Scored(
                    method, str(run_path(out, method, seed, rate, part)), trained.results[method, part, seed]["model"]
                )
                for (method, of), rate in trained.rates.items()
                if of == part
            )
            for condition in wanted:
                path = evaluation_path(out, seed, condition, part)
                sweep = Sweep(part, study.modalities, runs, condition, study.span, seed, device, str(path))
                mine = work.mine(EVALUATE, next(places))
                if mine and (not path.exists() or missing(sweep, read_evaluation(path))):
                    where = f"{part.name}, " if part.name else ""
                    jobs.append(Job(f"{where}seed {seed}, {condition_name(condition)}", _evaluate_one, (sweep,)))
    phase = reporter.phase(len(jobs))
    broken = []
    for outcome in work.workers.run(jobs):
        if outcome.error is not None:
            broken.append(f"evaluation, {outcome.job.name}: {outcome.error}")
            phase.say(f"{broken[-1]} FAILED")
            continue
        for method, error in outcome.value.items():
            failed[method] = f"{method}, evaluation, {outcome.job.name}: {error}"
            reporter.say(f"{failed[method]} FAILED")
        phase.say(f"evaluated {outcome.job.name}", every=2.0)
    if broken:
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise RunError("; ".join(broken[:3]) + more)


def _with_donors(
    study: Study, found: Sequence[Part], asked: Sequence[Condition], reporter: _Reporter
) -> list[Condition]:
    """Those that can be: another video in place of one takes two. ValueError where the user named one that cannot."""
    videos = {bare_name(clip.name) for part in found for clip in scored_clips(part, study.modalities)}
    lost = list(dict.fromkeys(c.corruption for c in asked if CORRUPTIONS[c.corruption].donors))
    if len(videos) > 1 or not lost:
        return list(asked)
    why = f"each takes another video for donor, and there is one: {next(iter(videos))}"
    if study.corruptions is not None:
        raise ValueError(f"corruptions: expected none of {', '.join(lost)}: {why}")
    reporter.say(f"not applied: {', '.join(lost)}: {why}")
    return [condition for condition in asked if condition.corruption not in lost]


def _opened(
    study: Study, out: Path, reporter: _Reporter, share: Share | None = None
) -> tuple[list[Part], list[Condition | None]]:
    """`_prepare`, and the conditions of the evaluation."""
    modalities = study.modalities or AffWild2(study.data, "train").modalities
    asked = list[Condition]()
    if study.corruptions != ():  # before anything is written
        asked = conditions(list(modalities), study.corruptions, study.severities)
    other = [c.corruption for c in asked if CORRUPTIONS[c.corruption].domain != "feature"]
    if other:
        raise ValueError(
            f"corruptions: expected names among {', '.join(PROTOCOL)}, got {other[0]}, which is not of features"
        )
    found = _prepare(study, out, reporter, share)
    return found, [None, *_with_donors(study, found, asked, reporter)]


def _workers(launcher: str, processes: int | None) -> Workers | JoblibWorkers:
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher: expected {' or '.join(LAUNCHERS)}, got {launcher!r}")
    return JoblibWorkers(processes) if launcher == "joblib" else Workers(processes or os.cpu_count() or 1)


def prepare(study: Study, out: str | os.PathLike[str], *, quiet: bool = False) -> dict[str, int]:
    """Check the study and begin it in directory `out`, without a job of it: then shares of it can be done.

    Returns {phase: how many jobs it has}. Errors as those of `compare`.
    """
    out, reporter = Path(out), _Reporter(quiet)
    check_place(Path(study.data), out)
    with alone(out, "preparing"):
        found, wanted = _opened(study, out, reporter)
    fits = len(found) * len(study.methods)
    return {
        TUNE: fits * study.tuning_seeds * len(study.rates),
        TRAIN: fits * (study.seeds - study.tuning_seeds),
        EVALUATE: len(found) * study.seeds * len(wanted),
    }


def compare_share(
    study: Study,
    out: str | os.PathLike[str],
    share: Share,
    *,
    processes: int | None = None,
    launcher: str = "local",
    quiet: bool = False,
) -> None:
    """Do what is not done yet of a share of a phase of the study in `out`, while other processes do other shares of it.

    Whoever does all N shares of each phase, one phase after another, and then calls `compare`, has what `compare` makes
    by itself. The study has to be begun (`prepare`), with the same methods, seeds and conditions. RunError, after all the
    others, for a job that fails and for a method whose earlier phase is not finished; BusyError while a process has the
    study for itself. Two processes never write one run: the second is refused (`training.trainer.train`).
    """
    out, reporter = Path(out), _Reporter(quiet)
    check_place(Path(study.data), out)
    with alone(out, "sharing a comparison", shared=True), _workers(launcher, processes) as workers:
        found, wanted = _opened(study, out, reporter, share)
        work = _Work(study, out, workers, reporter, share)
        trained = _train_all(work, found)
        if share.phase == EVALUATE:
            _evaluate_all(work, found, wanted, trained)
    if work.failed:
        raise RunError(f"{share}: {len(work.failed)} methods failed: " + "; ".join(work.failed.values()))


def compare(
    study: Study,
    out: str | os.PathLike[str],
    *,
    processes: int | None = None,
    draws: int = 2000,
    quiet: bool = False,
    launcher: str = "local",
) -> list[Table]:
    """Run (or continue) the study in directory `out`, write tables and pictures there, and return the tables.

    `processes`: how many at once, of one thread each (default: one a core). `draws`: of the bootstrap. `launcher`: "local", or
    "joblib" for its active backend (`jobs.JoblibWorkers`; `processes` by default all that it has).
    Where a method fails, the others are finished and reported, then RunError names it; the same call tries it again.
    RunError too for a directory that holds another study, by what differs; BusyError while another process works there.
    """
    out = Path(out)
    reporter = _Reporter(quiet)
    check_place(Path(study.data), out)
    with alone(out, "comparing"), _workers(launcher, processes) as workers:
        work = _Work(study, out, workers, reporter)
        failed = work.failed
        found, wanted = _opened(study, out, reporter)
        trained = _train_all(work, found)
        if not trained.rates:
            raise RunError("every method failed: " + "; ".join(failed.values()))
        _evaluate_all(work, found, wanted, trained)
        ceilings = [name for name in UNTRAINED if found[0].split == TRUTH and name not in failed]
        results = gather(study, out, found, wanted, trained.without(failed), ceilings)
        write_results(results, out / "results.csv")
        tables, page = write_study(results, out, draws=draws)
        reporter.say(f"{out / 'results.csv'}, {out / 'report.md'}, {page}")
    if failed:
        raise RunError(f"{len(failed)} methods failed and are not in the report: " + "; ".join(failed.values()))
    return tables
