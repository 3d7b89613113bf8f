"""The command line: `sage-ext synth | import | extract | check | train | evaluate | predict | analyze | stream | compare |
synth-video | info | demo`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 the request or the data are wrong (one line
says what), 130 interrupted (stream: 143 by SIGTERM); anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__


def _pair(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    try:
        return int(low), int(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two whole numbers A,B, got {text!r}") from None


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return names


def _numbers(kind: type) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None

    return parse


def _seconds(text: str) -> tuple[float, ...]:
    return () if text == "none" else _numbers(float)(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sage-ext",
        description="Continuous estimation (valence and arousal, or any targets) by reliability-weighted fusion.",
    )
    parser.add_argument("--version", action="version", version=f"sage-ext {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    from .data.table import add_arguments as table_arguments
    from .video.analysis import add_arguments as analyze_arguments
    from .video.extraction import add_arguments as extract_arguments
    from .video.synth import add_arguments as synth_video_arguments

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run_command=run)
        return sub

    sub = command("synth", "write a synthetic data set in the Aff-Wild2 layout", _synth)
    sub.add_argument("out", metavar="DIR", help="a directory that does not exist or is empty")
    sub.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    for split, count in (("train", 24), ("validation", 10), ("test", 4)):
        sub.add_argument(f"--{split}", type=int, default=count, help=f"videos of the {split} split")
    sub.add_argument("--frames", type=_pair, default=(250, 900), metavar="A,B", help="shortest and longest video")
    sub.add_argument("--difficulty", type=float, default=1.0, help="factor on the noise")
    sub.add_argument("--images", action="store_true", help="also write (empty) image files; missing faces have none")
    sub.add_argument("--no-quality", action="store_true", help="leave out the quality of the recordings")

    sub = command(
        "import", "make a data set of a table (CSV or Parquet): a row a frame, columns of features and targets", _import
    )
    table_arguments(sub)
    sub.add_argument("--for", dest="model", metavar="RUN", help="new data for the model of this run to predict from: its columns "
                     "and targets, labels where there are any, all of it the test split")  # fmt: skip

    sub = command(
        "extract", "make a data set of videos: features of face and voice, and how good picture and sound are", _extract
    )
    extract_arguments(sub)

    sub = command("check", "say what is in a data set and what is wrong with it; exit code 1 if something is", _check)
    sub.add_argument("data", metavar="DATA", help="root of the data set")
    sub.add_argument("--modalities", type=_names, metavar="A,B", help="of its features (default: all)")
    sub.add_argument("--report", metavar="DIR", help="write a picture and report.html there")

    sub = command("train", "train a model, and calibrate its confidence on the validation split", _train)
    _train_arguments(sub)

    sub = command(
        "evaluate", "score a run on an annotated split: CCC_V, CCC_A (or of any targets) and their mean P", _evaluate
    )
    _run_arguments(sub)
    sub.add_argument("--split", choices=("validation", "train", "test"), default="validation", help="annotated split")
    sub.add_argument("--report", metavar="DIR", help="write pictures and report.html there")
    sub.add_argument("--videos", type=int, default=3, help="videos in the report, the longest annotated first")

    sub = command(
        "predict", "write a split's predictions: a table of all frames, or the challenge's submission", _predict
    )
    _run_arguments(sub)
    sub.add_argument("--split", choices=("test", "validation", "train"), default="test", help="split to predict")
    sub.add_argument(
        "--out", required=True, metavar="FILE", help="CSV to write; where DATA has a sample file, a submission"
    )
    sub.add_argument("--sample", metavar="FILE", help="the organisers' sample file (default: in DATA)")

    sub = command("analyze", "one video to a curve: a table and a page of who was trusted when", _analyze)
    analyze_arguments(sub)

    sub = command("stream", "estimate frame by frame as the features come, a line of JSON each", _stream)
    _stream_arguments(sub)

    sub = command("compare", "train and score fusion methods alike, clean and under every corruption", _compare)
    _compare_arguments(sub)

    sub = command("synth-video", "write short videos of drawn people whose valence and arousal are known", _synth_video)
    synth_video_arguments(sub)

    sub = command("info", "show the build, the machine, and which backend serves each op", _info)
    sub.add_argument("--test", action="store_true", help="also run each op on each backend that is there, forward and backward, "
                     "against the float64 reference; exit code 1 if one fails")  # fmt: skip

    sub = command(
        "demo", "synthesise data, train, calibrate, evaluate, predict, report and stream; some three minutes", _demo
    )
    sub.add_argument("--out", metavar="DIR", help="directory to write (default: demo-run, demo-video)")
    sub.add_argument(
        "--video", action="store_true", help="from raw video: draw people and their voices, extract, train, analyze"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the data and of the training")
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier demo in DIR")
    return parser


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run", required=True, metavar="DIR", help="run directory that train wrote")
    sub.add_argument("--data", metavar="DIR", help="root of the data set (default: the one the run was trained on)")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    sub.add_argument(
        "--smooth", type=_numbers(int), default=(1,), metavar="N[,N]",
        help="centred mean filter of N frames, one number for all targets or one each (looks ahead; 1: none)",
    )  # fmt: skip
    sub.add_argument("--chunk", type=int, default=3000, help="frames at once, causal models")
    _trust_argument(sub)


def _trust_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--trust", type=_shares, metavar="NAME[=SHARE],...",
        help="modalities whose stream may belong to somebody else than the labels, and in what share of the time "
        "(default: none; .3 where no share is given)",
    )  # fmt: skip


def _shares(text: str) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for part in text.split(","):
        name, equals, share = part.partition("=")
        found[name] = float(share) if equals else "may be foreign"
    return found


_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("fusion", str, "reliability, uniform (equal weights), or a peer: {peers}"),
    ("dim", int, "channels of each encoder and of the fusion"),
    ("stages", int, "interaction stages"),
    ("blocks", int, "temporal convolution blocks (dilations 1, 2, 4 ...)"),
    ("kernel_size", int, "frames a convolution sees at dilation 1"),
    ("dropout", float, "dropout probability"),
    ("window", float, "seconds of a training window (default: 10; more below 7.5 frames a second)"),
    ("hop", float, "seconds between windows (default: two thirds of the window)"),
    (
        "memory",
        _seconds,
        "half-lives of the memory in seconds, or none (default: 0.27,1.07,4.27; more below 7.5 frames a second)",
    ),
    (
        "stuck",
        float,
        "seconds of exact repetition after which a modality is missing, 0: never (default: 0.27; likewise)",
    ),
    ("batch_size", int, "windows of a step"),
    ("lr", float, "peak learning rate"),
    ("weight_decay", float, "of matrices"),
    ("warmup", int, "steps of rising learning rate"),
    ("epochs", int, "at most"),
    ("max_steps", int, "steps at most"),
    ("patience", int, "epochs without a better validation P before stopping"),
    (
        "keep",
        str,
        "weights of the epoch with the best validation P, or the last: where few videos would choose it by chance",
    ),
    ("grad_clip", float, "largest gradient norm"),
    ("unimodal_weight", float, "of the unimodal heads' loss"),
    ("reliability_weight", float, "of the scores that train confidence"),
    ("reliability_rate", float, "factor on the learning rate for the reliability path"),
    ("seed", int, "of weights, order, dropout and rehearsal"),
    ("device", str, "cpu, cuda, cuda:1 ..."),
    ("precision", str, "float32, or bf16: the training's forward pass under autocast"),
    ("threads", int, "CPU threads"),
    ("num_workers", int, "processes that read windows"),
    ("prefetch", int, "batches made ahead in a thread while a step runs, 0 to 2"),
    ("checkpoint_every", int, "steps between checkpoints inside an epoch"),
)


def _config_arguments(sub: argparse.ArgumentParser, *without: str, **defaults: Any) -> None:
    """The flags of `_FLAGS` and those like them: fields of TrainConfig. A flag that is not given is absent."""
    from .models.peers import FUSIONS
    from .training.trainer import TrainConfig

    values = {**{field.name: field.default for field in dataclasses.fields(TrainConfig)}, **defaults}
    sub.add_argument("--modalities", type=_names, metavar="A,B", default=argparse.SUPPRESS,
                     help="the model's inputs (default: all the data set has)")  # fmt: skip
    sub.add_argument("--no-rehearsal", action="store_true", default=argparse.SUPPRESS,
                     help="train without rehearsed failures")  # fmt: skip
    sub.add_argument("--rehearsal-length", type=_numbers(float), metavar="A,B", default=argparse.SUPPRESS,
                     help="seconds of the shortest and the longest rehearsed failure (default: 0.27,5; more below 7.5 "
                     "frames a second)")  # fmt: skip
    sub.add_argument("--centred", action="store_true", default=argparse.SUPPRESS,
                     help="centred convolutions, which see the future (default: causal)")  # fmt: skip
    for name, kind, text in _FLAGS:
        if name in without:
            continue
        default = values[name]
        shown = "" if default in (None, dataclasses.MISSING) else f" (default: {default})"
        text = text.format(peers=", ".join(FUSIONS)) + shown
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text)


def _given(args: argparse.Namespace, rehearsal: Any = None, without: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of TrainConfig that the flags of `_config_arguments` ask for. `rehearsal`: what they change."""
    from .training.rehearsal import Rehearsal

    given = {name: getattr(args, name) for name, _, _ in _FLAGS if hasattr(args, name) and name not in without}
    if hasattr(args, "modalities"):
        given["modalities"] = args.modalities
    if hasattr(args, "centred"):
        given["causal"] = False
    if getattr(args, "quality", None) is not None:
        given["quality"] = args.quality
    given.update({name: getattr(args, name) for name in ("compile", "graph") if hasattr(args, name)})
    changed: dict[str, Any] = {"probability": 0.0} if hasattr(args, "no_rehearsal") else {}
    if hasattr(args, "rehearsal_length"):
        if len(args.rehearsal_length) != 2:
            raise ValueError(f"--rehearsal-length: expected two numbers A,B, got {len(args.rehearsal_length)}")
        changed["length"] = args.rehearsal_length
    if changed:
        given["rehearsal"] = dataclasses.replace(rehearsal or Rehearsal(), **changed)
    return given


def _train_arguments(sub: argparse.ArgumentParser) -> None:
    # A flag that is not given is absent, so that --resume can take it from the run.
    sub.add_argument("--data", metavar="DIR", default=argparse.SUPPRESS, help="root of the data set")
    sub.add_argument("--run", required=True, metavar="DIR", help="run directory to write")
    sub.add_argument("--resume", action="store_true", help="continue the run in DIR, bit for bit on the CPU")
    sub.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    sub.add_argument("--quality", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                     help="read quality evidence (default: where the data have it, a fusion with reliability does)")  # fmt: skip
    sub.add_argument("--compile", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                     help="train through torch.compile; needs a C++ compiler on the CPU (default: no)")  # fmt: skip
    sub.add_argument("--graph", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                     help="a step of the training as one CUDA graph (default: no)")  # fmt: skip
    sub.add_argument("--tensorboard", action="store_true", help="log to RUN/tensorboard beside log.csv")
    sub.add_argument("--quiet", action="store_true", help="no progress display")
    _config_arguments(sub)


def _stream_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run", required=True, metavar="DIR", help="run directory that train wrote; a causal model")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    _trust_argument(sub)
    sub.add_argument("--input", default="-", metavar="FILE", help="file or named pipe to read; -: standard input")
    sub.add_argument(
        "--format", choices=("jsonl", "f32"), default="jsonl",
        help='jsonl: an object a line, {modality: [numbers] or null, "quality": {modality: [numbers or null]}}; '
        "f32: raw little-endian float32, the modalities of a frame one after another in the model's order, NaN where missing",
    )  # fmt: skip
    sub.add_argument("--follow", action="store_true", help="wait for more at the end of FILE, as tail -f does")
    sub.add_argument("--pace", type=float, metavar="FPS",
                     help="frames a second at most, to replay a recording (default: no limit; with --serve and a file that is "
                     "not followed those of the run's data, 30 below 7.5)")  # fmt: skip
    sub.add_argument("--labels", metavar="FILE", help="annotation (docs/data.md), row i for frame i of the input: "
                     "adds the truth and the running CCC")  # fmt: skip
    sub.add_argument("--report", metavar="DIR", help="at the end write pictures and report.html there")
    sub.add_argument(
        "--camera",
        type=int,
        metavar="N",
        help="pictures of this camera in place of frames of features (sage-ext[video])",
    )
    sub.add_argument(
        "--microphone", nargs="?", const="", metavar="NAME", help="with the sound of this one (default: the system's)"
    )
    sub.add_argument("--video", metavar="FILE", help="pictures and sound of a file, played in real time")
    sub.add_argument("--browser-camera", action="store_true", help="those of the page's browser, with --serve")
    sub.add_argument("--no-picture", action="store_true", help="do not show the picture on the page")
    sub.add_argument("--person", default="largest", help="of several in the picture: largest, left, right, or 1, 2 ...")
    sub.add_argument("--serve", type=int, metavar="PORT", help="show the stream on a web page; 0: a free port")
    sub.add_argument("--host", default="127.0.0.1", help="address of that page; others can watch on any but a loopback")


_SWEPT = ("fusion", "seed", "lr", "threads", "patience")  # flags of train that a comparison sets itself
_COMPARED = {"epochs": 1000, "dim": 32, "batch_size": 8}  # what is not train's default in a comparison


def _compare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", metavar="DIR", help="root of the data set (default: synthesise one in OUT/data)")
    sub.add_argument("--out", required=True, metavar="DIR", help="directory of the study; an earlier one is continued")
    sub.add_argument("--methods", type=_names, metavar="A,B",
                     help="sage, concat ..., audio-only ... (default: all there are; an unknown name lists them)")  # fmt: skip
    sub.add_argument("--quality", dest="halves", choices=("both", "with", "without"),
                     help="whether methods have quality evidence, where their name does not say (NAME+q has it; default: "
                     "both where the data have it)")  # fmt: skip
    sub.add_argument("--seeds", type=int, help="seeds 0 to N - 1 (default: 5, quick 3)")
    sub.add_argument("--lr", type=_numbers(float), metavar="R,R",
                     help="grid of peak learning rates (default: 1e-3,2e-3,4e-3, quick 2e-3)")  # fmt: skip
    sub.add_argument("--tuning-seeds", type=int, default=1, help="seeds on which the rate is chosen, on validation P")
    sub.add_argument("--severities", type=_numbers(int), metavar="S,S", help="of 1 to 5 (default: all, quick 3)")
    sub.add_argument("--corruptions", type=_names, metavar="A,B", help="kinds (default: the whole protocol)")
    sub.add_argument("--corruption-span", type=float, metavar="SECONDS",
                     help="of a span that fails, about; shifts in proportion (default: 2; more below 7.5 frames a "
                     "second)")  # fmt: skip
    sub.add_argument("--folds", type=int, metavar="K", help="cross-validation: K folds of whole groups of videos")
    sub.add_argument("--group", metavar="NAME", help="grouping of groups.json that splits keep whole (default: group, else "
                     "the video)")  # fmt: skip
    _config_arguments(sub, *_SWEPT, max_steps="700, quick 400", **_COMPARED)
    sub.add_argument("--quick", action="store_true",
                     help="SAGE, concat, uniform weights and the single modalities, one severity, fewer steps")  # fmt: skip
    sub.add_argument("--processes", type=int,
                     help="at once, of one thread each (default: one a core; slurm: 1 a task)")  # fmt: skip
    sub.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    sub.add_argument("--launcher", choices=("local", "joblib", "slurm"), default="local",
                     help="where jobs run: here; on joblib's backend; slurm: begin the study and write OUT/slurm.sh, to "
                     "submit")  # fmt: skip
    sub.add_argument("--tasks", type=int, default=16, metavar="N", help="of a phase at most, slurm")
    sub.add_argument("--share", metavar="PHASE:I/N",
                     help="do no more than the I-th of N shares of a phase: tune (all rates), train (the other seeds), evaluate; "
                     "of a study that was begun, of a phase when all of the one before is done (docs/scaling.md)")  # fmt: skip
    sub.add_argument("--quiet", action="store_true", help="no progress display")


# ------------------------------------------------------------------------------------------------------------ commands
def _say(text: str | Path) -> None:
    """Results, at once. OSError that names standard output where it does not take them."""
    from .report import printable

    try:
        print(printable(text, "\n"), flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (else the interpreter fails again when it exits)
        raise OSError(error.errno, error.strerror, "standard output") from None


def _synth(args: argparse.Namespace) -> int:
    from .data.synthetic import write_dataset

    spec = write_dataset(
        args.out, seed=args.seed, train=args.train, validation=args.validation, test=args.test, frames=args.frames,
        difficulty=args.difficulty, images=args.images, quality=not args.no_quality,
    )  # fmt: skip
    sizes = ", ".join(f"{name} {dim}" for name, dim in spec.modalities.items())
    _say(f"{args.out}: {spec.train} training, {spec.validation} validation, {spec.test} test videos; {sizes}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from .data.table import run

    more: dict[str, Any] = {}
    if args.model is not None:
        from .training.runs import Run

        model = Run.load(args.model)
        nameless = [name for name in model.names if name not in model.columns]
        if nameless:
            raise ValueError(
                f"--for: expected a run whose data named their columns (sage-ext import does; docs/data.md, meta.json), got "
                f"{model.path} without those of {', '.join(nameless)}"
            )
        more = {"columns": {name: model.columns[name] for name in model.names}, "unlabelled": model.targets}
    _say(run(args, **more))
    return 0


def _extract(args: argparse.Namespace) -> int:
    from .video.extraction import run

    done = run(args)
    _say(done.text())
    return 1 if done.failed else 0


def _analyze(args: argparse.Namespace) -> int:
    from .video.analysis import run

    _say(run(args))
    return 0


def _synth_video(args: argparse.Namespace) -> int:
    from .video.synth import run

    _say(run(args))
    return 0


def _check(args: argparse.Namespace) -> int:
    from .inspection import inspect, write_inspection

    found = inspect(args.data, args.modalities)
    _say(found.text())
    if args.report is not None:
        _say(write_inspection(found, args.report))
    return 1 if found.wrong else 0


def _train(args: argparse.Namespace) -> int:
    from .allocator import keep_freed_memory
    from .training.distributed import LostError, joined
    from .training.runs import calibrate_run
    from .training.trainer import train

    keep_freed_memory()
    try:
        with joined() as group:
            config = _train_config(args)
            best = train(
                config, args.run, resume=args.resume, overwrite=args.overwrite, tensorboard=args.tensorboard,
                progress=not args.quiet, group=group,
            )  # fmt: skip
    except LostError as error:
        raise LostError(f"{error}; continue from the last checkpoint in {args.run} with --resume") from error
    if not group.leads:
        return 0
    fused = best["scores"]["fused"]
    _say(
        f"{args.run}: best validation P {fused['P']:.4f} "
        f"({', '.join(f'{name} {value:.4f}' for name, value in fused.items() if name != 'P')}) in epoch {best['epoch'] + 1}"
    )
    found = calibrate_run(args.run, device=config.device)
    if found is not None:
        before, after = found["error_before"], found["error_after"]
        known = [name for name in before if before[name] is not None]  # None: no validation frame has the modality
        _say("calibration error: " + ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in known))
    return 0


def _train_config(args: argparse.Namespace) -> Any:
    """The TrainConfig that the flags ask for; of a run that is resumed, where they say nothing, its own."""
    from .training.trainer import CONFIG, TrainConfig, read_config

    stored = read_config(args.run) if args.resume and (Path(args.run) / CONFIG).exists() else None
    given = _given(args, None if stored is None else stored.rehearsal)
    if hasattr(args, "data"):
        given["data"] = args.data
    if stored is not None:
        return dataclasses.replace(stored, **given)
    if "data" not in given:
        raise ValueError(
            "--data: expected the root of a data set (only --resume of a begun run can do without), got none"
        )
    return TrainConfig(**given)


def _evaluate(args: argparse.Namespace) -> int:
    from .report import printable
    from .training.runs import evaluate_run
    from .training.trainer import advice

    result, tables = evaluate_run(
        args.run, args.data, args.split, smooth=args.smooth, device=args.device, chunk=args.chunk, report=args.report,
        videos=args.videos, trust=args.trust,
    )  # fmt: skip
    for text in advice(result["mismatches"]):
        print(f"sage-ext evaluate: {printable(text)}", file=sys.stderr)
    _say("\n\n".join(table.text() for table in tables))
    _say(f"\n{Path(args.run) / f'evaluation-{args.split}.json'}")
    if args.report is not None:
        _say(Path(args.report) / "report.html")
    return 0


def _predict(args: argparse.Namespace) -> int:
    from .training.runs import predict_run

    predictions = predict_run(
        args.run, args.data, args.out, split=args.split, sample=args.sample, smooth=args.smooth, device=args.device,
        chunk=args.chunk, trust=args.trust,
    )  # fmt: skip
    _say(f"{args.out}: {len(predictions)} videos, {sum(len(p) for p in predictions.values())} frames")
    return 0


def _stream(args: argparse.Namespace) -> int:
    from .live.command import stream

    return stream(args)


def _compare(args: argparse.Namespace) -> int:
    from .allocator import keep_freed_memory
    from .data.affwild2 import AffWild2
    from .data.synthetic import has_truth
    from .study.methods import default_methods, expanded, quick_methods
    from .study.plan import Study, has_quality, synthesise
    from .study.run import Share, compare, compare_share, prepare
    from .study.slurm import write_script

    keep_freed_memory()
    share = None if args.share is None else Share.read(args.share)
    if share is not None and args.launcher == "slurm":
        raise ValueError("share: expected none with --launcher slurm, which gives each task its own, got " + args.share)
    data = synthesise(args.out) if args.data is None else args.data
    given = {**_COMPARED, "max_steps": 400 if args.quick else 700, **_given(args, without=_SWEPT)}
    modalities, methods = given.pop("modalities", None), args.methods
    there, truth = AffWild2(data, "train", modalities=modalities), args.folds is None and has_truth(data)
    if methods is None:
        names = tuple(there.modalities)
        methods = quick_methods(names) if args.quick else default_methods(names, truth=truth)
    methods = expanded(methods, args.halves, has_quality(there))
    study = Study(
        data,
        methods,
        modalities=modalities,
        folds=args.folds,
        group=args.group,
        seeds=args.seeds if args.seeds is not None else (3 if args.quick else 5),
        rates=args.lr or ((2e-3,) if args.quick else (1e-3, 2e-3, 4e-3)),
        tuning_seeds=args.tuning_seeds,
        severities=args.severities or ((3,) if args.quick else (1, 2, 3, 4, 5)),
        corruptions=args.corruptions,
        span=args.corruption_span,
        train=given,
    )
    if args.launcher == "slurm":
        jobs = prepare(study, args.out, quiet=args.quiet)
        script = write_script(args.out, args.command_line, jobs, tasks=args.tasks, processes=args.processes or 1)
        _say(f"bash {shlex.quote(str(script))}")
        return 0
    how = {"processes": args.processes, "launcher": args.launcher, "quiet": args.quiet}
    if share is not None:
        compare_share(study, args.out, share, **how)
        return 0
    tables = compare(study, args.out, draws=args.draws, **how)
    _say("\n\n".join(table.text() for table in tables))
    return 0


def _info(args: argparse.Namespace) -> int:
    from .info import report

    _say(report())
    if not args.test:
        return 0
    from .selftest import run

    _say("")
    failed = sum(not row.ok for row in run(say=_say))
    _say(f"\n{failed} FAILED" if failed else "\nall ok")
    return 1 if failed else 0


def _demo(args: argparse.Namespace) -> int:
    if args.video:
        from .video.demo import demo
    else:
        from .demo import demo

    out = args.out or ("demo-video" if args.video else "demo-run")
    _say("\n\n".join(table.text() for table in demo(out, seed=args.seed, overwrite=args.overwrite)))
    return 0


def _hold_standard_descriptors() -> None:
    """A program may be started with some of these closed. Their numbers must not go to the next files that are opened:
    libraries write warnings to 2, whatever it is. sys.stdin and sys.stdout stay None where they are closed; what is said
    on a closed standard error goes nowhere, and not, as `print(file=None)` would have it, to standard output."""
    for fd, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            while (taken := os.open(os.devnull, os.O_RDWR)) < fd:
                pass  # a lower number that is free, held too
            if taken != fd:
                os.close(taken)  # somebody has this number already
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _hold_standard_descriptors()
    import torch

    args = _parser().parse_args(argv)
    args.command_line = list(sys.argv[1:] if argv is None else argv)
    if getattr(args, "threads", None) and args.command != "train":
        torch.set_num_threads(args.threads)
    try:
        return args.run_command(args)
    except KeyboardInterrupt:
        hints = {
            "train": f"; continue with: sage-ext train --run {getattr(args, 'run', '')} --resume",
            "compare": "; continue with the same command",
            "extract": "; continue with the same command",
        }
        print(f"sage-ext {args.command}: interrupted{hints.get(args.command, '')}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        from .report import printable

        one_line = " ".join(str(error).split("\n"))
        print(f"sage-ext {args.command}: error: {printable(one_line)}", file=sys.stderr)
        return 2
