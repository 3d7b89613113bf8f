"""Training: one run directory, resumable to the bit.

    RUN/config.json         the configuration and the data set's shape; a run is continued only with the same
    RUN/log.csv             one row an epoch
    RUN/last.safetensors    everything a continuation needs, as of the last checkpoint
    RUN/best.safetensors    the weights of the best validation P (the last ones if `keep` says so), with the configuration to
                            rebuild the model

Whatever happens in an epoch is a function of the configuration, the data and the last checkpoint: the order of the
windows and the rehearsed failures are drawn from generators seeded by (seed, epoch) and (seed, step, place in the batch),
dropout from the global generator whose state is in the checkpoint. So on the CPU a run that is killed at any moment and
resumed ends with the same bits, `log.csv` included, as one that was left alone.

Several processes (`distributed`) draw the order and dropout alike, and each reads, rehearses and computes its windows of
every batch and its clips of the validation: the failures of a window are drawn from a generator of its own, seeded by (seed,
step, place in the batch). Only the first writes; what it wrote is continued by any number of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._arguments import MAX_MODALITIES, check_bool, check_int, check_number
from ..data.affwild2 import AffWild2, Clip, disagreements, modality_names
from ..data.rates import FPS, default_frames, nearest, whole_frames
from ..data.synthetic import ToldClips, has_truth, meter
from ..data.targets import VALENCE_AROUSAL, Targets, scores
from ..data.windows import Windows, collate, window_tensors
from ..files import alone, naming, one_line, write_atomic
from ..functional import ccc_from_moments, ccc_moments, merge_moments
from ..models.layers import ChannelDropout, Dropout
from ..models.peers import fusion_class
from ..models.sage import SAGE, SAGELoss, SAGEOutput
from .checkpoint import load_checkpoint, reading, save_checkpoint
from .distributed import ALONE, Group
from .evaluate import add_moments, predict_clip
from .prefetch import Prefetch, pinned
from .progress import Progress
from .rehearsal import Donors, Rehearsal

CONFIG, LOG, LAST, BEST = "config.json", "log.csv", "last.safetensors", "best.safetensors"
# Of SAGEOutput, with a row a sequence: all that SAGELoss reads.
READ = ("prediction", "unimodal", "experts", "expert_confidence", "frame_estimates", "frame_log_precision")
PARTS = ("prediction", "unimodal", "reliability")  # of SAGELoss, in the order of the loss_ columns
FORMAT = 3  # of config.json; spans were in frames in the first, the model was another in the second


def log_columns(targets: Targets) -> tuple[str, ...]:
    """Of log.csv: train_CCC_V, train_CCC_A, train_P ..., by the targets."""
    names = [*(target.score for target in targets), "P"]
    losses = ("loss", *(f"loss_{part}" for part in PARTS))
    scored = (f"{split}_{name}" for split in ("train", "val") for name in names)
    return ("epoch", "step", "lr", *losses, *scored, "best_P")


COLUMNS = log_columns(VALENCE_AROUSAL)


class RunError(ValueError):
    """A run directory cannot be used as asked; the message says why and what would."""


class Spans(NamedTuple):
    """What a `TrainConfig` says of time, in frames."""

    window: int
    hop: int
    memory: tuple[float, ...]  # half-lives
    stuck: int
    shortest_failure: int  # rehearsed
    longest_failure: int


PRECISIONS = ("float32", "bf16")
WINDOW = 300  # by default: frames at 30 a second


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All that decides the outcome of a run.

    Spans of time are in seconds; None: a default, which is so many frames at 30 a second, see `data.rates`. `spans` says
    what they are in frames.
    """

    data: str  # root of an Aff-Wild2-format data set
    modalities: tuple[str, ...] | None = None  # the model's inputs; None: all the data set has
    fusion: str = "reliability"  # or "uniform": equal weights; or a peer of models.peers.FUSIONS
    fusion_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the fusion's constructor
    use_present: bool = True  # False hides from the fusion which modalities are missing
    memory: tuple[float, ...] | None = (
        None  # half-lives in seconds; None: 8/30, 32/30 and 128/30 s, () with a peer's fusion
    )
    stuck: float | None = (
        None  # seconds of repeats after which a frame is missing, 0: never; None: 8/30 s, 0 with a peer's
    )
    peer_memory: bool = False  # a peer's fusion gets the defaults of SAGE's memory and stuck rule too
    dim: int = 128  # channels of each modality's encoder and of the fused representation
    stages: int = 4
    blocks: int = 4  # temporal convolution blocks, dilations 1, 2, 4, 8 ...
    kernel_size: int = 5
    dropout: float = 0.1
    causal: bool = True
    window: float | None = None  # seconds; None: 10 s
    hop: float | None = None  # seconds between windows; None: two thirds of the window
    batch_size: int = 16  # windows
    lr: float = 3e-4  # peak
    weight_decay: float = 1e-2  # matrices and convolutions only
    warmup: int = 50  # steps of linear rise to `lr`; a cosine to lr / 50 follows
    epochs: int = 30
    max_steps: int | None = None  # stop (and end the cosine) here if the epochs would take longer
    patience: int = 10  # epochs without a better validation P before stopping
    keep: str = (
        "best"  # whose weights: the epoch with the best validation P, or the "last", which `patience` then never ends
    )
    grad_clip: float = 1.0  # largest gradient norm
    unimodal_weight: float = 0.5  # of 1 - CCC of the unimodal predictions, their mean
    reliability_weight: float = 0.3  # of the scores that train confidence
    reliability_rate: float = 10.0  # factor on `lr` for the reliability path
    quality: bool | None = (
        None  # None: read by a fusion with reliability where the data have it; True: by any; False: by none
    )
    joint: bool | None = None  # None: SAGE's joint expert where it can be; False: none
    told: bool = False  # synthetic data only: quality is the true log noise variance of each modality's frame
    rehearsal: Rehearsal = dataclasses.field(default_factory=Rehearsal)
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"  # or "bf16": the forward pass under autocast; weights, losses, validation stay float32
    compile: bool = False  # the training's forward and backward pass through torch.compile
    graph: bool = False  # a whole step of the training as one CUDA graph
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    num_workers: int = 0  # processes that read windows; does not change the result
    prefetch: int = 1  # batches made ahead in a thread while a step runs, 0 to 2; does not change the result
    checkpoint_every: int = 200  # steps between checkpoints within an epoch; does not change the result

    def __post_init__(self) -> None:
        fusion_class(self.fusion)
        if not isinstance(self.fusion_options, Mapping):
            raise ValueError(f"fusion_options: expected a mapping, got {self.fusion_options!r}")
        for name, low in (("batch_size", 1), ("epochs", 1), ("patience", 1), ("threads", 1),
                          ("checkpoint_every", 1), ("num_workers", 0), ("warmup", 0), ("seed", 0)):  # fmt: skip
            check_int(name, getattr(self, name), low)
        for name in ("window", "hop"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "of seconds > 0", lambda x: 0 < x < math.inf)
        if self.stuck is not None:
            check_number("stuck", self.stuck, "of seconds >= 0", lambda x: 0 <= x < math.inf)
        if self.window is not None and self.hop is not None and self.hop > self.window:
            raise ValueError(f"hop: expected at most the window ({self.window:g} s), got {self.hop:g} s")
        if self.max_steps is not None:
            check_int("max_steps", self.max_steps, 1)
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep: expected best or last, got {self.keep!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected {' or '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("compile", "graph"):
            check_bool(name, getattr(self, name))
        if self.graph and not self.device.startswith("cuda"):
            raise ValueError(f"graph: expected False (only a GPU has graphs), got True on device {self.device!r}")
        check_int("prefetch", self.prefetch, 0, 2)
        for name in ("lr", "grad_clip", "reliability_rate"):
            check_number(name, getattr(self, name), "> 0 and finite", lambda x: 0 < x < math.inf)
        for name in ("weight_decay", "unimodal_weight", "reliability_weight"):
            check_number(name, getattr(self, name), ">= 0 and finite", lambda x: 0 <= x < math.inf)

    def spans(self, fps: float) -> Spans:
        """The spans in frames, of data with `fps` frames a second. ValueError for what is too short there."""
        window = max(nearest(default_frames(WINDOW, fps)), 2)
        if self.window is not None:
            window = whole_frames(self.window, fps)
        if window < 2:
            raise ValueError(
                f"window: expected at least 2 frames ({2 / fps:g} s at {fps:g} frames a second), got {self.window:g} s"
            )
        hop = max(nearest(2 * window / 3), 1) if self.hop is None else max(whole_frames(self.hop, fps), 1)
        if hop > window:
            raise ValueError(
                f"hop: expected at most the window ({window / fps:g} s, or frames would be skipped), got {self.hop:g} s"
            )
        fusion = fusion_class("reliability" if self.peer_memory else self.fusion)
        memory = tuple(default_frames(halflife, fps) for halflife in fusion.default_memory)
        if self.memory is not None:
            memory = tuple(halflife * fps for halflife in self.memory)
        stuck = nearest(default_frames(fusion.default_stuck, fps)) if self.use_present else 0
        if self.stuck is not None:
            stuck = max(whole_frames(self.stuck, fps), int(self.stuck > 0))
        return Spans(window, hop, memory, stuck, *self.rehearsal.frames(fps))

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"configuration: expected fields of TrainConfig, got {', '.join(sorted(unknown))}")
        values = dict(values)
        for name in ("modalities", "memory"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        if isinstance(values.get("rehearsal"), Mapping):
            rehearsal = dict(values["rehearsal"])
            for name in ("length", "snr_db"):
                if rehearsal.get(name) is not None:
                    rehearsal[name] = tuple(rehearsal[name])
            values["rehearsal"] = Rehearsal(**rehearsal)
        return cls(**values)


AT = ("step", "epoch", "position", "log_bytes", "done")  # where a training is, attributes of `Training`
# What may differ when a run is continued: none of it changes the numbers on the CPU.
FREE = ("data", "num_workers", "prefetch", "checkpoint_every")


def _same_shape(what: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{what} of shape {tuple(value.shape)} in place of {tuple(like.shape)}")


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], free: Iterable[str] = FREE) -> str:
    """What differs between two configurations, "name OLD -> NEW" each; empty where nothing does. `free` may."""
    names = [name for name in {**stored, **asked} if name not in free and stored.get(name) != asked.get(name)]
    return "; ".join(f"{name} {stored.get(name)!r} -> {asked.get(name)!r}" for name in names)


def derived_seed(seed: int, what: str, index: int) -> int:
    """A seed for one purpose and one place in the run, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}/{index}".encode()).digest()[:8], "little") >> 1


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of step 0 .. total - 1: linear warm-up, then a cosine to lr / 50."""
    warmup = min(config.warmup, total // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return config.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_model(
    config: TrainConfig,
    dims: Mapping[str, int],
    num_targets: int = 2,
    fps: float = FPS,
    quality_dims: Mapping[str, int] | None = None,
) -> SAGE:
    """A fresh model for modalities `dims` {name: D} with `quality_dims` {name: Q}, at `fps` frames a second, initialised from
    the configuration's seed."""
    spans = config.spans(fps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "initial weights", 0))
        return SAGE(
            dict(dims),
            dim=config.dim,
            stages=config.stages,
            num_targets=num_targets,
            blocks=config.blocks,
            kernel_size=config.kernel_size,
            dropout=config.dropout,
            causal=config.causal,
            quality_dims=quality_dims,
            joint=config.joint,
            fusion=config.fusion,
            fusion_options=config.fusion_options,
            length=spans.window,
            use_present=config.use_present,
            memory=spans.memory,
            stuck=spans.stuck,
        )


class _Opened(Sequence[Clip]):
    """Keeps every clip once it was asked for: its memory maps, and what the headers of its files said."""

    def __init__(self, clips: AffWild2) -> None:
        self.clips, self.kept = clips, dict[int, Clip]()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override]
        if index not in self.kept:
            self.kept[index] = self.clips[index]  # IndexError at the end
        return self.kept[index]


class _Inputs:
    """The training windows as the model's `fit_statistics` wants them, its own modalities only; any number of times."""

    def __init__(self, windows: Windows, names: Sequence[str], columns: Sequence[int], batch_size: int) -> None:
        self.windows, self.names, self.columns, self.batch_size = windows, names, list(columns), batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in DataLoader(self.windows, self.batch_size, collate_fn=collate, generator=torch.Generator()):
            features = {name: batch["features"][name] for name in self.names}
            quality = {name: x for name, x in batch.get("quality", {}).items() if name in self.names}
            flags = {"present": batch["present"][..., self.columns], "frame": batch["frame"]}
            yield {"features": features, "quality": quality, **flags}


class _Captured:
    """`step`, of tensors to tensors, as a CUDA graph of the current stream: the first calls run as they are, the next one is
    captured, and from then on it is replayed. Inputs keep their shapes; results are overwritten by the next call. All else
    that `step` reads or changes has to stay where it is."""

    WARM_UP = 3  # calls in which things are compiled, and made that then stay

    def __init__(self, step: Callable[..., tuple[Tensor, ...]]) -> None:
        self.step, self.calls = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self.step(*inputs)
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            # The thread that makes batches may ask CUDA for pinned memory meanwhile.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)  # nothing is computed yet
        else:
            for own, given in zip(self.inputs, inputs):
                own.copy_(given)
        self.graph.replay()
        return self.outputs


class Training:
    """One run in progress. `train` is the way to use it."""

    def __init__(
        self, config: TrainConfig, run: Path, data: dict[str, AffWild2], progress: Progress, group: Group = ALONE
    ) -> None:
        self.config, self.run, self.progress, self.group = config, run, progress, group
        self.device = group.device(config.device)
        self.pins = self.device.type == "cuda"
        if config.told:
            data = {split: ToldClips(clips) for split, clips in data.items()}  # type: ignore[misc]
        self.train_data, self.validation = data["train"], _Opened(data["validation"])
        self.names = list(config.modalities or self.train_data.modalities)
        self.columns = [list(self.train_data.modalities).index(name) for name in self.names]
        self.targets, self.fps = self.train_data.targets, self.train_data.frame_rate
        self.spans = config.spans(self.fps)
        self.meter = meter if has_truth(config.data) and not config.told else None
        dims = {name: self.train_data.modalities[name] for name in self.names}
        quality = self.train_data.quality_dims
        reads = fusion_class(config.fusion).has_reliability if config.quality is None else config.quality
        self.quality_dims = {name: quality[name] for name in self.names if name in quality} if reads else {}
        self.model = build_model(config, dims, len(self.targets), self.fps, self.quality_dims)
        clips, window = _Opened(self.train_data), self.spans.window
        if self.model.length is None:  # padding beyond the longest video is work for nothing
            window = min(window, max(*(clip.num_frames for clip in clips), 2))
        self.windows = Windows(clips, window, min(self.spans.hop, window))
        self.per_epoch = max(len(self.windows) // config.batch_size, 1)
        self.rows = min(len(self.windows), config.batch_size)  # windows of a batch, over all processes
        if self.rows < group.size:
            raise ValueError(
                f"batch_size: expected a window or more for each of {group.size} processes, got {config.batch_size} of "
                f"{len(self.windows)} windows"
            )
        if config.graph and group.size > 1:
            raise ValueError(f"graph: expected False with several processes, got True with {group.size}")
        self.total = self.per_epoch * config.epochs
        if config.max_steps is not None:
            self.total = min(self.total, config.max_steps)

        self.model.to(self.device)
        for module in self.model.modules():
            if isinstance(module, (ChannelDropout, Dropout)):
                module.share = group.share(self.rows)
        self.forward: Any = torch.compile(self.model) if config.compile else self.model  # of a step; shares the weights
        self.loss = SAGELoss(unimodal=config.unimodal_weight, reliability=config.reliability_weight)
        path = {id(p) for p in self.model.reliability_parameters()}
        groups = []
        for factor, inside in ((1.0, False), (config.reliability_rate, True)):
            for decay, matrix in ((config.weight_decay, True), (0.0, False)):
                chosen = [p for p in self.model.parameters() if (id(p) in path) == inside and (p.dim() > 1) == matrix]
                groups.append({"params": chosen, "weight_decay": decay, "factor": factor})
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, fused=True, capturable=config.graph
        )
        # A graph would keep a number as it was at the capture: what it reads is on the device.
        self.rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups] if config.graph else []
        self.update = _Captured(self._update) if config.graph else self._update
        self.step = self.epoch = self.position = self.log_bytes = 0  # position: batches done of this epoch
        self.best: dict[str, Any] = {"P": -math.inf, "epoch": -1, "step": -1, "scores": {}, "model": {}}
        self.done = False
        self._clear_running()
        torch.manual_seed(derived_seed(config.seed, "dropout", 0))

    def _clear_running(self) -> None:
        self.loss_sum = torch.zeros(4, dtype=torch.float64, device=self.device)  # total and PARTS
        self.moments: Tensor | None = None  # (C, 6) of this epoch's training predictions

    # ------------------------------------------------------------------------------------------------- checkpoints
    def save(self) -> None:
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise RunError(f"step {self.step}: the weights are no longer finite; {self.run / LAST} is from before")
        if not self.group.leads:
            return
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "running": {"loss_sum": self.loss_sum, "moments": self.moments},
            "best": self.best,
            "at": {name: getattr(self, name) for name in AT},
            "config": self.config.to_json(),
        }
        save_checkpoint(self.run / LAST, state)

    def load(self) -> None:
        """Go on from the last checkpoint, if there is one; the first process reads it."""
        found = self.group.leads and (self.run / LAST).exists()
        state = self.group.broadcast(load_checkpoint(self.run / LAST) if found else None)
        if state is None:
            return
        with reading(self.run / LAST, "the training state"):
            self._take(state)
        if self.best["model"]:
            self._export_best()  # the file may be from after this checkpoint

    def _take(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.dim():
                    _same_shape(f"optimizer's {name}", value, parameter)
        running, best = state["running"], state["best"]
        _same_shape("loss_sum", running["loss_sum"], self.loss_sum)
        if running["moments"] is not None:
            _same_shape("moments", running["moments"], torch.empty(len(self.targets), 6))
        if best["model"]:
            for name, value in self.model.state_dict().items():
                if name != "stuck_limit" or name in best["model"]:  # not in runs from before it was learnt
                    _same_shape(f"best {name}", best["model"][name], value)
        self.loss_sum = running["loss_sum"].to(self.device)
        self.moments = running["moments"]
        if self.moments is not None:
            self.moments = self.moments.to(self.device)
        self.best = {name: type(value)(best[name]) for name, value in self.best.items()}
        for name in AT:
            setattr(self, name, type(getattr(self, name))(state["at"][name]))
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def _export_best(self) -> None:
        if not self.group.leads:
            return
        state = {
            "model": self.best["model"],
            "model_config": self.model.config,
            "modalities": self.names,
            "targets": [[*target] for target in self.targets],
            "fps": self.fps,
            "columns": {m: list(names) for m, names in self.train_data.columns.items() if m in self.names},
            "quality_columns": {
                m: list(names) for m, names in self.train_data.quality_columns.items() if m in self.quality_dims
            },
            "about": {m: about for m, about in self.train_data.about.items() if m in self.names},
            "calibration": None,  # calibrate_run fills it
            **{name: self.best[name] for name in ("epoch", "step", "scores")},
        }
        save_checkpoint(self.run / BEST, state)

    # --------------------------------------------------------------------------------------------------------- log
    def open_log(self) -> None:
        """Bring log.csv to what it was at the checkpoint: rows of steps that are done again go."""
        if not self.group.leads:
            return
        path = self.run / LOG
        if self.log_bytes == 0:
            write_atomic(path, ",".join(log_columns(self.targets)) + "\n")
            self.log_bytes = path.stat().st_size
            return
        size = path.stat().st_size if path.exists() else 0
        if size < self.log_bytes:
            raise RunError(
                f"{path}: expected the {self.log_bytes} bytes of the checkpoint or more, got {size}; cannot continue it"
            )
        with open(path, "r+b") as file:
            file.truncate(self.log_bytes)

    def log(self, row: Mapping[str, float]) -> None:
        if not self.group.leads:
            return
        text = ",".join(str(x) if name in ("epoch", "step") else f"{x:.8g}" for name, x in row.items()) + "\n"
        with naming(self.run / LOG), open(self.run / LOG, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.log_bytes += len(text.encode())

    # -------------------------------------------------------------------------------------------------------- steps
    def _here(self, tensor: Tensor) -> Tensor:
        """On the device; from pinned memory the copy is only begun, and what is asked of the device next waits for it."""
        return tensor.to(self.device, non_blocking=True)

    def _batches(self) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The batches of this epoch that are not done yet: which windows are in one, and its windows of this process."""
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, "order", self.epoch))
        order = torch.randperm(len(self.windows), generator=generator).tolist()
        size = self.config.batch_size
        # The last, incomplete batch is left out (unless it is the only one).
        batches = [order[i * size : (i + 1) * size] for i in range(self.position, self.per_epoch)]
        # The loader draws its workers' base seed from the generator given here, not from the global one.
        loader = DataLoader(
            self.windows,
            batch_sampler=[self.group.own(batch) for batch in batches],
            collate_fn=collate,
            num_workers=self.config.num_workers,
            generator=torch.Generator(),
        )
        return zip(batches, iter(loader))

    def _rehearsed(self, loaded: Iterator[tuple[list[int], Mapping[str, Any]]], first: int) -> Iterator[dict[str, Any]]:
        """The batches for the steps from `first` on, this process's windows, failures rehearsed, for a GPU in pinned memory.
        Clips are swapped over the whole batch: another process's window is read for it. It reads nothing that a step
        changes, and draws from generators of its own: it may run ahead, in another thread."""
        clips = torch.tensor([clip for clip, _ in self.windows.spans])
        for step, (order, batch) in enumerate(loaded, first):
            seeds = [derived_seed(self.config.seed, f"rehearsal/{step}", place) for place in range(len(order))]
            generators = [torch.Generator().manual_seed(seed) for seed in self.group.own(seeds)]
            donors = None
            if self.group.size > 1:
                donors = Donors(clips[order], functools.partial(self._window, order))
            made = self.config.rehearsal(batch, generators, self.fps, self.meter, donors)
            needed = {name: made[name] for name in ("labels", "valid", "frame")}
            needed["present"] = made["present"][:, :, self.columns]
            needed["features"] = {name: made["features"][name] for name in self.names}
            needed["quality"] = {name: made["quality"][name] for name in self.quality_dims}
            yield pinned(needed, self.device) if self.pins else needed

    def _window(self, order: Sequence[int], place: int, name: str) -> dict[str, Any]:
        """Of one modality, the window at a place of a batch."""
        clip, start = self.windows.spans[order[place]]
        return window_tensors(self.windows.clips[clip], [name], start, self.windows.window)

    def _update(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A step of the weights by labels, valid, present, frame, features and quality of the own windows, which never waits
        for the device. The loss and its PARTS (4,), and of the whole batch the prediction (B, W, C), labels and valid."""
        labels, valid, present, frame, *rest = inputs
        features, quality = dict(zip(self.names, rest)), dict(zip(self.quality_dims, rest[len(self.names) :]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.forward(features, present=present, mask=frame, quality=quality or None)
        output, labels, valid, present = self._whole(output, labels, valid, present)
        loss, parts = self.loss(output, labels, valid, present)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.group.sum_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        told = torch.stack([loss.detach(), *(parts[name] for name in PARTS)])
        return told, output.prediction.detach(), labels, valid

    def _whole(self, output: SAGEOutput, *beside: Tensor) -> tuple[Any, ...]:
        """With all rows of the batch in what the loss reads: of `output`, and `beside` it."""
        read = {name: getattr(output, name) for name in READ}
        read = {name: x for name, x in read.items() if x is not None}
        found = self.group.whole([*read.values(), *beside], self.rows)
        whole: dict[str, Any] = dict(zip(read, found))
        return output._replace(**whole), *found[len(read) :]

    def _one_step(self, batch: Mapping[str, Any]) -> None:
        labels, valid, present, frame = (self._here(batch[name]) for name in ("labels", "valid", "present", "frame"))
        features = [self._here(batch["features"][name]) for name in self.names]
        quality = [self._here(batch["quality"][name]) for name in self.quality_dims]

        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = group["factor"] * learning_rate(self.config, self.step, self.total)
            if self.rates:
                group["lr"] = self.rates[i].fill_(group["lr"])
        self.model.train()
        told, *scored = self.update(labels, valid, present, frame, *features, *quality)
        self.loss_sum += told
        self.moments = ccc_moments(*scored, state=self.moments)
        self.step += 1
        self.position += 1

    def _validated(self) -> dict[str, dict[str, float]]:
        """Scores of the validation split, "fused" and of each modality's own head: each process predicts its clips."""
        moments: dict[str, Tensor] = {}
        for i in range(self.group.rank, len(self.validation), self.group.size):
            clip = self.validation[i]
            said = predict_clip(self.model, clip, self.names, device=self.device,
                                window=self.spans.window, hop=self.spans.hop)  # fmt: skip
            add_moments(moments, said, clip, self.names)
        parts = [part for part in self.group.gather(moments) if part]
        merged = {name: functools.reduce(merge_moments, [part[name] for part in parts]) for name in parts[0]}
        # All go by the first one's numbers, so that they agree on what is best and when to stop.
        return self.group.broadcast(
            {name: scores(ccc_from_moments(m).tolist(), self.targets) for name, m in merged.items()}
        )

    def _end_of_epoch(self) -> None:
        found = self._validated()
        val = found["fused"]
        assert self.moments is not None
        running = scores(ccc_from_moments(self.moments).tolist(), self.targets)
        loss = (self.loss_sum / max(self.position, 1)).tolist()
        better = val["P"] > self.best["P"] or self.config.keep == "last"
        if better:
            model = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            self.best = {"P": val["P"], "epoch": self.epoch, "step": self.step, "scores": found, "model": model}
            self._export_best()
        rate = float(self.optimizer.param_groups[0]["lr"])
        row = dict(zip(log_columns(self.targets), (
            self.epoch, self.step, rate, *loss, *running.values(), *val.values(), self.best["P"]
        )))  # fmt: skip
        self.log(row)
        self.progress.epoch(row, better)
        waited = self.epoch - self.best["epoch"] >= self.config.patience
        self.epoch, self.position = self.epoch + 1, 0
        self.done = waited or self.step >= self.total
        self._clear_running()
        self.save()

    def stream(self) -> AbstractContextManager[Any]:
        """With a graph all runs on a stream of its own: the default one cannot be captured, and the capture would wait for
        another on which gradients were made before."""
        if not self.config.graph:
            return nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def run_to_end(self) -> None:
        if self.step == 0:
            # By all processes, which would wait for one otherwise. From here on all have the same weights and statistics.
            self.model.fit_statistics(_Inputs(self.windows, self.names, self.columns, self.config.batch_size))
            self.group.spread(self.model.state_dict().values())
        while not self.done:
            # The loader's iterator is made here: the worker processes that it may start belong to this thread.
            made = self._rehearsed(self._batches(), self.step)
            with Prefetch(made, self.config.prefetch) as batches:
                for batch in batches:
                    self._one_step(batch)
                    self.progress.step(self)
                    last = self.position == self.per_epoch or self.step >= self.total
                    if last:
                        break
                    if self.step % self.config.checkpoint_every == 0:
                        self.save()
            self._end_of_epoch()


def inputs(config: TrainConfig) -> tuple[str, ...] | None:
    """The modalities to read: all, or where there are more than a model takes those asked for."""
    folder = Path(config.data) / "features"
    return config.modalities if folder.is_dir() and len(modality_names(folder)) > MAX_MODALITIES else None


def open_data(config: TrainConfig) -> dict[str, AffWild2]:
    """The training and validation splits, all modalities: rehearsed failures are drawn over all the data set has, so
    that a model of some of them trains on the same failures. ValueError for a modality the data set lacks."""
    if config.told and not has_truth(config.data):
        raise ValueError(f"told: expected False (only synthetic data know their noise), got True for {config.data}")
    data = {split: AffWild2(config.data, split, modalities=inputs(config)) for split in ("train", "validation")}
    have = data["train"].modalities
    for text in disagreements(data):
        raise ValueError(text)
    for split, clips in data.items():
        if not clips.annotated:
            raise ValueError(
                f"{config.data}: expected annotated frames in the {split} split, got none (a frame is if all its targets are)"
            )
    missing = [name for name in config.modalities or () if name not in have]
    if missing:
        raise ValueError(f"modalities: expected some of {', '.join(have)} ({config.data}), got {', '.join(missing)}")
    return data


def advice(mismatches: Iterable[str], most: int = 5) -> list[str]:
    """What does not fit in the data, for a user to look at, a sentence each; of many the first few, and how many."""
    found = list(dict.fromkeys(mismatches))
    shown = [f"look at this: {text}" for text in found[:most]]
    if len(found) > most:
        shown.append(f"and {len(found) - most} more, which sage-ext check lists")
    return shown


def data_shape(data: Mapping[str, AffWild2]) -> dict[str, Any]:
    """What identifies a data set well enough to refuse to continue a run on another."""
    shape: dict[str, Any] = {
        "modalities": dict(data["train"].modalities),
        "targets": [[*target] for target in data["train"].targets],
        "fps": data["train"].frame_rate,
    }
    for split, clips in data.items():
        digest = hashlib.sha256()
        frames = valid = 0
        for clip in clips:
            digest.update(f"{clip.name} {clip.num_frames} ".encode())
            digest.update(np.ascontiguousarray(clip.labels).tobytes())
            frames, valid = frames + clip.num_frames, valid + int(clip.valid.sum())
        shape[split] = {"clips": len(clips), "frames": frames, "valid": valid, "annotations": digest.hexdigest()[:16]}
    return shape


def _check_there(run: Path, wanted: bool) -> None:
    there = [name for name in (CONFIG, LOG, LAST, BEST) if (run / name).exists()]
    if there and not wanted:
        raise RunError(
            f"{run}: expected no run there, got {', '.join(there)}; resume it (--resume), "
            "overwrite it (--overwrite), or name another"
        )


def _check_same(run: Path, config: TrainConfig, shape: Mapping[str, Any]) -> None:
    """That the run there, if there is one, can be continued with this configuration and data."""
    if not (run / CONFIG).exists():
        if (run / LAST).exists():
            raise RunError(
                f"{run}: expected {CONFIG} beside {LAST}, got none; cannot tell whether the configuration is the same"
            )
        return
    stored, began_with = _read_config(run)
    differ = differences(stored.to_json(), config.to_json())
    if differ:
        raise RunError(f"{run}: expected the configuration that it began with, got another ({differ})")
    if began_with != shape:
        raise RunError(f"{run}: expected the data that it began with, {began_with}, got {shape} in {config.data}")


def read_config(run: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of the run in directory `run`. RunError where there is none."""
    return _read_config(Path(run))[0]


def _read_config(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration, and the shape of the data that the run began with."""
    path = run / CONFIG
    try:
        stored = json.loads(path.read_text())
        if stored.get("format") != FORMAT:
            raise ValueError(
                f"expected the format {FORMAT}, got that of another version of sage-ext: train the run anew"
            )
        return TrainConfig.from_json(stored["train"]), stored["data"]
    except FileNotFoundError:
        raise RunError(f"{run}: expected a run directory, got one without {CONFIG}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: damaged ({one_line(error, 300)})") from error


def _prepare(run: Path, config: TrainConfig, shape: Mapping[str, Any], overwrite: bool) -> None:
    """The run directory with its configuration, without what an earlier run or a killed one left behind."""
    run.mkdir(parents=True, exist_ok=True)
    old = [run / name for name in (LAST, BEST, LOG)] + sorted(run.glob("evaluation-*.json")) if overwrite else []
    for path in [*old, *run.glob(".*.tmp")]:
        path.unlink(missing_ok=True)
    write_atomic(
        run / CONFIG, json.dumps({"format": FORMAT, "train": config.to_json(), "data": shape}, indent=1) + "\n"
    )


def train(
    config: TrainConfig,
    run: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    live: bool | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Train in directory `run` and return {"epoch", "step", "scores"} of the best epoch on the validation split.

    A directory that holds a run already is an error (RunError) unless it is to be continued (`resume`; one that holds
    none is begun) or replaced (`overwrite`: its files of the kinds written here go, others stay). `progress` goes to
    stderr, with a line that is rewritten in place if `live` (default: where stderr is a terminal). The global torch
    generator and thread count are as before afterwards. BusyError while another process works in the directory.

    `group`: the processes that train together, what `distributed.joined` gives; all of them call this alike, and the first one
    writes and speaks. None: this process alone.
    """
    run, group = Path(run), group or ALONE
    if resume and overwrite:
        raise RunError("resume, overwrite: expected one of them at most, got both")
    if group.leads:
        _check_there(run, resume or overwrite)
    data = open_data(config)
    shape = data_shape(data)
    if resume and group.leads:
        _check_same(run, config, shape)
    threads = torch.get_num_threads()
    device = group.device(config.device)
    torch.set_num_threads(config.threads)
    reporter = Progress(run, tensorboard=tensorboard and group.leads, quiet=not (progress and group.leads), live=live)
    for text in advice(text for clips in data.values() for text in clips.mismatches):
        reporter.note(text)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            training = Training(config, run, data, reporter, group)  # what is wrong with the configuration shows here
            with alone(run, "training") if group.leads else nullcontext():
                if group.leads:
                    _check_there(run, resume or overwrite)  # again: another process may have been at work until now
                    if resume:
                        _check_same(run, config, shape)
                    _prepare(run, config, shape, overwrite)
                if resume:
                    training.load()
                training.open_log()
                reporter.start(training)
                with training.stream():
                    training.run_to_end()
    finally:
        reporter.close()
        torch.set_num_threads(threads)
    return {name: training.best[name] for name in ("epoch", "step", "scores")}


__all__ = ["RunError", "TrainConfig", "read_config", "train"]
