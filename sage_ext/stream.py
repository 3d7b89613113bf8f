"""Streaming: `SAGE` frame by frame, each step one call into C++ (csrc/stream, csrc/cuda/stream.cu), results those of the
offline model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import _C
from ._arguments import CONSTANTS, check_bool, check_int, finite_frames, nonfinite_error, quality_by_modality
from ._ops import _door

__all__ = ["StreamOutput", "StreamStats", "StreamingSession"]

Array = Tensor | np.ndarray
# Of a state that is loaded. Features are below 1e19 or absent, and a LayerNorm stands before whatever could grow; sums over
# the frames and channels of numbers up to this bound stay finite.
MAX_STATE = 1e30
_NUMPY = {torch.float32: np.dtype(np.float32), torch.bool: np.dtype(np.bool_)}


class Streamable(Protocol):
    """What a session reads of a `SAGE`, beside the tensors of its state dict."""

    config: dict[str, Any]
    names: tuple[str, ...] | None
    num_targets: int
    causal: bool
    stuck: int

    @property
    def in_dims(self) -> Sequence[int]: ...
    @property
    def quality_dims(self) -> Sequence[int]: ...
    @property
    def foreign(self) -> Any: ...
    @property
    def fusion(self) -> Any: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...
    def modules(self) -> Any: ...


# Asked by name: from Python 3.12 on isinstance does not see what nn.Module finds for itself, submodules among them.
STREAMABLE = (
    "config", "names", "num_targets", "causal", "stuck", "in_dims", "quality_dims", "foreign", "fusion", "state_dict", "modules",
)  # fmt: skip


class StreamOutput(NamedTuple):
    """One frame of `n` streams, `M` modalities, `C` targets, `S` stages (1 with uniform weights): on the CPU, float32 but for
    `present`.

    The tensors belong to the session and are **overwritten by its next step**: clone what you keep. An inactive row keeps
    what its last active step wrote, zeros before the first.
    """

    prediction: Tensor  # (n, C) in (-1, 1)
    unimodal: Tensor  # (n, M, C) each modality's own prediction; meaningful where it is present
    weights: Tensor  # (n, M) sum to 1 over the present modalities; 0 where absent
    confidence: Tensor  # (n, M) in [0, 1]; 0 where absent
    stage: Tensor  # (n, S)
    # (n, M) bool: the modality's frame counted: it was said to be present, was finite, and was not stuck. With
    # use_present=False the fusion is not told, and weighs a missing modality like any other; this tells all the same.
    present: Tensor


class StreamStats(NamedTuple):
    """Counts since the session was made, over all its rows; a modality without a name is called by its index."""

    frames: int  # frames of active rows
    absent: dict[str, int]  # a modality: the frames among them in which it was absent, for whatever reason
    nonfinite: dict[str, int]  # a modality: the absences due to NaN, Inf or overflow in a frame said to be present


class StreamingSession:
    """`batch_size` independent streams through one causal `SAGE`, a frame at a time. Made by `SAGE.stream`.

    The model's weights are copied and packed when the session is made, in `weights_dtype`: what happens to the model
    afterwards is not seen. The session computes what the model does in evaluation (its mode, device and dtype do not
    matter), in float32: `step` by `step` equals one call on the whole sequence to 1e-5. With `torch.bfloat16` the matrices
    alone are rounded to bfloat16 (half the memory traffic, which is what a step waits for); inputs, state and all
    arithmetic stay float32.

    A row's results are the same bits whatever the batch size, the row, the other rows and the number of threads. A step
    allocates nothing in C++ and releases the GIL. While a thread is inside `step`, `reset`, `state_dict`, `load_state_dict` or
    `stats`, any of them raises RuntimeError in another, with nothing changed.

    On the CPU (device None) many rows are shared out over at most `torch.get_num_threads()` threads, and at most as many as
    there were when the session was made. On a GPU (device "cuda" or "cuda:1") a step is one kernel; inputs may lie on the
    CPU or on that GPU, outputs are on the CPU all the same, and written when `step` returns.

    Attributes: `batch_size`, `names` (of the modalities, or None), `in_dims`, `num_targets`, `stages`, `weights_dtype`,
    `device`.
    """

    def __init__(
        self,
        model: Streamable,
        batch_size: int = 1,
        weights_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not all(hasattr(model, name) for name in STREAMABLE):
            raise TypeError(f"model: expected a SAGE, got {type(model).__name__}")
        check_int("batch_size", batch_size, 1)
        if weights_dtype is None:
            weights_dtype = torch.float32
        if not isinstance(weights_dtype, torch.dtype):
            raise TypeError(f"weights_dtype: expected a torch.dtype or None, got {type(weights_dtype).__name__}")
        if weights_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weights_dtype: expected torch.float32 or torch.bfloat16, got {weights_dtype}")
        self.device = _device(device)
        config = model.config
        if config["fusion"] not in ("reliability", "uniform"):
            raise ValueError(f'model: expected fusion="reliability" or "uniform", got {config["fusion"]!r}')
        if sum(model.quality_dims) and config["fusion"] != "reliability":
            raise ValueError('model: expected fusion="reliability" to read quality (quality_dims), got "uniform"')
        if not model.causal:
            raise ValueError("model: expected a causal SAGE, got one built with causal=False")
        self.batch_size, self.weights_dtype = batch_size, weights_dtype
        self.names, self.in_dims, self.num_targets = model.names, tuple(model.in_dims), model.num_targets
        self.quality_dims = tuple(model.quality_dims)
        shape = _shape(model, weights_dtype)
        self.stages = shape["stages"]
        manifest, parts = _C.describe_stream(shape)
        self._parts: dict[str, tuple[int, ...]] = dict(parts)  # of a row's state, in native order
        self._on_cpu = self.device.type == "cpu"
        # Where the kernels run: threads, or the GPU's index.
        where = torch.get_num_threads() if self._on_cpu else self.device.index
        tensors = _tensors(model, manifest)  # held until they are packed
        self._stuck_limit = tensors.get("stuck_limit")  # None: repeats are not counted
        addresses = [(name, tuple(x.shape), x.data_ptr()) for name, x in tensors.items()]
        self._native = _door.kernels[self.device.type].open_session(shape, addresses, batch_size, where)
        modalities = len(self.in_dims)
        self._labels = self.names or tuple(str(m) for m in range(modalities))
        self._standard = [
            (tensors[f"input_mean_{m}"].clone(), tensors[f"input_scale_{m}"].clone()) for m in range(modalities)
        ]
        self._shapes = tuple((batch_size, d) for d in self.in_dims)
        with torch.inference_mode(False):  # else autograd could not take them outside that mode
            self._output = StreamOutput(
                torch.zeros(batch_size, self.num_targets),
                torch.zeros(batch_size, modalities, self.num_targets),
                torch.zeros(batch_size, modalities),
                torch.zeros(batch_size, modalities),
                torch.zeros(batch_size, self.stages),
                torch.zeros(batch_size, modalities, dtype=torch.bool),
            )
        self._targets = tuple(x.data_ptr() for x in self._output)

    def __repr__(self) -> str:
        dims = dict(zip(self.names, self.in_dims)) if self.names else list(self.in_dims)
        on = f"weights_dtype={self.weights_dtype}, device={self.device}"
        return f"StreamingSession(in_dims={dims}, batch_size={self.batch_size}, {on})"

    def step(
        self,
        features: Mapping[str, Array] | Sequence[Array],
        present: Array | Mapping[str, Array] | None = None,
        active: Array | None = None,
        *,
        quality: Mapping[str, Array] | Sequence[Array | None] | None = None,
        strict: bool = False,
    ) -> StreamOutput:
        """Take one frame of every active stream.

        Args:
            features: M tensors (on the CPU or the session's GPU) or NumPy arrays (batch_size, D_m), float32: a mapping by
                name, or a sequence.
            present: (batch_size, M) bool; False: the modality is missing in this frame (not read). Or a mapping that gives
                each modality's (batch_size,) by name, none left out. None: all present.
            active: (batch_size,) bool; False: this stream has no frame now; nothing of it is read, its state stays as it
                is. None: all active.
            quality: (batch_size, Q_m) float32 of the modalities with `quality_dims`: a mapping by name, or a sequence with None
                for those without. NaN, and a modality left out, are unknown.
            strict: raise ValueError, naming modality and row, for a frame of an active stream that is not finite where it is
                said to be present, rather than take it as missing; before anything has moved.

        NaN, Inf, or values so large (from about 1e18) that their squares overflow, in a present modality: it counts as
        absent in this frame, and in `stats`. The returned tensors are overwritten by the next step.
        Raises TypeError or ValueError naming the argument for anything malformed, and RuntimeError on a GPU while the current
        stream is captured in a CUDA graph, before anything has moved.
        """
        if not self._on_cpu and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step: expected no CUDA graph to be captured (outputs are on the CPU), got a capturing stream"
            )
        if isinstance(features, Mapping):
            if self.names is None:
                raise TypeError("features: expected a sequence, as this model's in_dims are one, got a mapping")
            try:
                given = [features[name] for name in self.names]
            except KeyError:
                given = []
            if len(given) != len(features):
                raise ValueError(f"features: expected the modalities {list(self.names)}, got {list(features)}")
            features = given
        elif not isinstance(features, Sequence):
            raise TypeError(f"features: expected a sequence or a mapping of arrays, got {type(features).__name__}")
        elif len(features) != len(self._shapes):
            raise ValueError(f"features: expected {len(self._shapes)} modalities, got {len(features)}")
        held: list[Array] = []  # what the addresses point into, until the call returns
        addresses = tuple(
            [
                _address("features", label, x, torch.float32, shape, self.device, held)
                for label, x, shape in zip(self._labels, features, self._shapes)
            ]
        )
        seen = moving = 0
        if isinstance(present, Mapping):
            present = self._ordered(present)
        if present is not None:
            shape = self.batch_size, len(self._shapes)
            seen = _address("present", "", present, torch.bool, shape, self.device, held)
        if active is not None:
            moving = _address("active", "", active, torch.bool, (self.batch_size,), self.device, held)
        told = 0
        if quality is not None:
            evidence = self._evidence(quality, held)
            told = _address("quality", "", evidence, torch.float32, tuple(evidence.shape), self.device, held)
        check_bool("strict", strict)
        if strict:
            self._refuse_nonfinite(features, present, active)
        if self._on_cpu:
            self._native.step(addresses, told, seen, moving, 0, self._targets, torch.get_num_threads(), 0)
        else:
            there = ahead = 0
            for bit, x in enumerate((*features, None, present, active)):  # quality is on the CPU by now
                if isinstance(x, Tensor) and x.is_cuda:
                    there |= 1 << bit
            if there:  # what wrote it may still be under way, on the current stream
                ahead = torch.cuda.current_stream(self.device).cuda_stream
            self._native.step(addresses, told, seen, moving, there, self._targets, self.device.index, ahead)
        return self._output

    def _evidence(self, quality: Mapping[str, Array] | Sequence[Array | None], held: list[Array]) -> Tensor:
        """(batch_size, sum of quality_dims) on the CPU, NaN where unknown, checked."""
        parts = []
        given = quality_by_modality(quality, self.names, self.quality_dims)
        for label, q, x in zip(self._labels, self.quality_dims, given):
            if x is None:
                parts.append(torch.full((self.batch_size, q), math.nan))
            else:
                _address("quality", label, x, torch.float32, (self.batch_size, q), self.device, held)
                parts.append(_tensor(x))
        return torch.cat(parts, 1)

    def _ordered(self, present: Mapping[str, Array]) -> Tensor:
        """A mapping name -> (batch_size,) bool as (batch_size, M) on the CPU, checked."""
        if self.names is None:
            raise TypeError(
                "present: expected a tensor or array (this model's modalities have no names), got a mapping"
            )
        if set(present) != set(self.names):
            raise ValueError(f"present: expected the modalities {list(self.names)}, got {list(present)}")
        for name in self.names:
            _address("present", name, present[name], torch.bool, (self.batch_size,), self.device, [])
        return torch.stack([_tensor(present[name]) for name in self.names], 1)

    def _refuse_nonfinite(self, features: Sequence[Array], present: Array | None, active: Array | None) -> None:
        """ValueError for a frame that the kernel would count as not finite. (The sum of squares runs in another order here:
        one within rounding of the largest float32 may be judged differently.)"""
        frames = [(_tensor(x) - mean) * scale for x, (mean, scale) in zip(features, self._standard)]
        refused = ~finite_frames(frames)  # (batch_size, M)
        if present is not None:
            refused &= _tensor(present)
        if active is not None:
            refused &= _tensor(active).unsqueeze(1)
        if bool(refused.any()):
            m, row = refused.t().nonzero()[0].tolist()
            raise nonfinite_error(self._labels[m], frames[m][row], f"row {row}")

    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Begin a new stream in these rows (None: in all): their state is that before a first frame, their outputs are zeros.

        rows: an index, indices, or a (batch_size,) bool tensor. ValueError for one out of range.
        """
        index = self._rows(rows)
        self._native.reset(index.data_ptr(), index.numel(), self._targets)

    def state_dict(self, rows: int | Sequence[int] | Tensor | None = None) -> dict[str, Tensor]:
        """The state of k rows (None: all), copied; a plain dict of tensors, safe to save, of any session's layout.

        "frames" (k,) int64 since the reset; float32, oldest frame first, as `SAGEState` and `FusionState` have them:
        "history.i" (k, M, span, dim), "fused.i" (k, K, span, dim), "last" (k, sum of in_dims), and with reliability "belief"
        (k, S), "energy" and "counted" (k, window - 1, M, 3); where the model has them "repeats" (k, M), "quality" (k, sum of
        quality_dims, 3), "memory" (k, K, R, dim + 2) and "foreign" (k, 1 + M).
        """
        index = self._rows(rows)
        flat = torch.empty(index.numel(), sum(math.prod(p) for p in self._parts.values()))
        frames = torch.empty(index.numel(), dtype=torch.int64)
        self._native.read(index.data_ptr(), index.numel(), flat.data_ptr(), frames.data_ptr())
        pieces = flat.split([math.prod(p) for p in self._parts.values()], 1)
        state = {name: x.reshape(index.numel(), *part).clone() for (name, part), x in zip(self._parts.items(), pieces)}
        return {"frames": frames, **state}

    def load_state_dict(self, state: Mapping[str, Tensor], rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Continue the k streams of `state` in these k rows (None: all); the other rows go on undisturbed.

        To move a stream: `there.load_state_dict(here.state_dict(rows=3), rows=0)`. The result is, to the bit, what it would
        have been without the move, between sessions of one model, dtype and instruction set.
        TypeError or ValueError, with nothing changed, where keys, shapes or dtypes do not fit this session, or numbers are
        none that a step could have left (a damaged file; what is taken here never becomes NaN).
        """
        index = self._rows(rows)
        if len(set(index.tolist())) != index.numel():
            raise ValueError(f"rows: expected distinct indices, got {index.tolist()}")
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of tensors, got {type(state).__name__}")
        expected = {"frames": (), **self._parts}
        if set(state) != set(expected):
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        for name, part in expected.items():
            x, dtype = state[name], torch.int64 if name == "frames" else torch.float32
            if not isinstance(x, Tensor) or x.dtype != dtype:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"state[{name!r}]: expected a {dtype} tensor, got {got}")
            if tuple(x.shape) != (index.numel(), *part):
                raise ValueError(f"state[{name!r}]: expected {(index.numel(), *part)}, got {tuple(x.shape)}")
            if name != "frames":
                self._check_state(name, x.detach().cpu())
        frames = state["frames"].to("cpu", copy=True).contiguous()
        if not bool(((frames >= 0) & (frames < 2**62)).all()):
            raise ValueError(f"state['frames']: expected numbers in [0, 2**62), got {frames.tolist()}")
        flat = torch.cat([state[name].cpu().flatten(1) for name in self._parts], 1).contiguous()
        self._native.write(index.data_ptr(), index.numel(), flat.data_ptr(), frames.data_ptr(), self._targets)

    def _check_state(self, name: str, x: Tensor) -> None:
        """ValueError for numbers that no step leaves in this part of the state."""
        if name in ("belief", "foreign"):
            total = x.double().logsumexp(-1, keepdim=True)
            good, expected = (total.abs() < 1e-3).expand_as(x), "logarithms of probabilities that sum to 1"
        elif name == "counted":
            good, expected = (x == 0) | (x == 1), "0 or 1"
        elif name == "energy":  # that of a step between huge frames may be +inf
            good, expected = x >= 2 * math.log(CONSTANTS["energy_floor"]), "logarithms of energies"
        elif name == "repeats":
            assert self._stuck_limit is not None
            good = (x >= 0) & (x <= self._stuck_limit) & (x == x.round())
            expected = f"whole numbers, of each modality at most {[int(n) for n in self._stuck_limit]}"
        else:
            good, expected = x.abs() < MAX_STATE, f"numbers within {MAX_STATE:g}"
            if name in ("memory", "quality"):  # sums of values, then the sum of their weights, and of the frames
                sums, weight = x[..., :-2].double(), x[..., -2:-1].double()
                averages = sums.abs() <= MAX_STATE * weight + 1 / MAX_STATE
                good = good & torch.cat([averages, x[..., -2:] >= 0], -1)
                expected += ", also as averages, and no weight or count below 0"
        if not bool(good.all()):
            raise ValueError(f"state[{name!r}]: expected {expected}, got {x[~good][0].item():g}")

    @property
    def stats(self) -> StreamStats:
        """Counts since the session was made."""
        frames, counts = self._native.totals()
        return StreamStats(
            frames,
            {name: absent for name, (absent, _) in zip(self._labels, counts)},
            {name: refused for name, (_, refused) in zip(self._labels, counts)},
        )

    def _rows(self, rows: int | Sequence[int] | Tensor | None) -> Tensor:
        """(k,) int64 row indices on the CPU, checked."""
        if rows is None:
            return torch.arange(self.batch_size)
        if isinstance(rows, np.ndarray):
            rows = torch.from_numpy(rows)
        if not isinstance(rows, Tensor):
            if isinstance(rows, Sequence) and len(rows) == 0:
                return torch.empty(0, dtype=torch.int64)
            try:
                rows = torch.as_tensor(rows)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"rows: expected an index, indices or a bool tensor, got {rows!r}") from None
        if rows.dtype == torch.bool:
            if tuple(rows.shape) != (self.batch_size,):
                raise ValueError(f"rows: expected a bool tensor ({self.batch_size},), got {tuple(rows.shape)}")
            return rows.cpu().nonzero().flatten()
        if rows.is_floating_point() or rows.is_complex():
            raise TypeError(f"rows: expected integers, got {rows.dtype}")
        if rows.dim() > 1:
            raise ValueError(f"rows: expected an index or (k,) indices, got {tuple(rows.shape)}")
        index = rows.reshape(-1).to("cpu", torch.int64).contiguous()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise ValueError(f"rows: expected indices in [0, {self.batch_size}), got {index.tolist()}")
        return index


def _device(device: torch.device | str | None) -> torch.device:
    """The device, with an index if it is a GPU, after the checks."""
    if not isinstance(device, (torch.device, str, type(None))):
        raise TypeError(f"device: expected a torch.device, str or None, got {type(device).__name__}")
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f'device: expected "cpu" or "cuda", got {str(device)!r}')
    if found.type not in _door.kernels:
        raise ValueError(
            f'device: expected "cpu", as this build of sage_ext has no CUDA kernels (`sage-ext info` tells), got {str(device)!r}'
        )
    if found.type == "cpu":
        return torch.device("cpu")
    if found.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    return found


def _tensor(x: Array) -> Tensor:
    """On the CPU."""
    return (torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x).detach().cpu()


def _address(
    argument: str,
    label: str,
    x: Array,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    held: list[Array],
) -> int:
    """The address of a dense array of this dtype and shape, on the CPU or `device`, after the checks; `held` keeps it
    alive."""
    if isinstance(x, Tensor):
        if x.dtype == dtype and x.shape == shape and (x.is_cpu or x.device == device) and x.layout == torch.strided:
            x = x.resolve_neg().contiguous()
            held.append(x)
            return x.data_ptr()
        got: tuple[object, ...] = (x.dtype, tuple(x.shape), x.device, x.layout)
    elif isinstance(x, np.ndarray):
        if x.dtype == _NUMPY[dtype] and x.shape == shape:
            x = np.ascontiguousarray(x)
            held.append(x)
            return x.ctypes.data
        got = (x.dtype, x.shape, "cpu", torch.strided)
    else:
        got = (type(x).__name__,)
    name = f"{argument}[{label}]" if label else argument
    if len(got) == 1 or got[0] not in (dtype, _NUMPY[dtype]):
        raise TypeError(f"{name}: expected a {str(dtype).removeprefix('torch.')} tensor or array, got {got[0]}")
    if got[1] != shape:
        raise ValueError(f"{name}: expected {shape}, got {got[1]}")
    place = "the CPU" if device.type == "cpu" else f"the CPU or {device}"
    raise ValueError(f"{name}: expected a dense tensor on {place}, got {got[3]} on {got[2]}")


def _shape(model: Streamable, weights_dtype: torch.dtype) -> dict[str, Any]:
    """The numbers by which csrc/stream describes a model."""
    config, fusion = model.config, model.fusion
    reliability = config["fusion"] == "reliability"
    return {
        "in_dims": tuple(model.in_dims),
        "dim": config["dim"],
        "targets": model.num_targets,
        "own_blocks": config["blocks"] - config["fused_blocks"],
        "fused_blocks": config["fused_blocks"],
        "kernel": config["kernel_size"],
        "reliability": reliability,
        "stages": fusion.stages if reliability else 1,
        "evidence": fusion.evidence_dim if reliability else 0,
        "window": fusion.typicality.window if reliability else 1,
        "value_norm": fusion.norm_weight is not None,
        "hide_missing": not config["use_present"],
        "bf16": weights_dtype == torch.bfloat16,
        "memory": len(config["memory"]),
        "stuck": model.stuck > 0,
        "joint": config["joint"],
        "foreign": model.foreign is not None,
        "quality_dims": tuple(model.quality_dims),
    }


def _tensors(model: Streamable, manifest: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Every tensor of `manifest` (csrc/stream/describe.h) by its name, float32 on the CPU, from the model's state dict and
    what is folded from it."""
    for module in model.modules():
        assert not isinstance(module, nn.LayerNorm) or module.eps == CONSTANTS["norm_eps"]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        known = {**model.state_dict(), **_folded(model)}
        for name, shape in manifest:
            if name not in known:
                raise KeyError(f"model: expected a tensor {name!r} {shape}, got none")
            if tuple(known[name].shape) != shape:
                raise ValueError(f"model: expected {name!r} {shape}, got {tuple(known[name].shape)}")
            found[name] = known[name].detach().to("cpu", torch.float32).contiguous()
            if not bool(found[name].isfinite().all()):
                raise ValueError(f"model: expected finite numbers in {name!r}, got NaN or Inf")
    return found


def _folded(model: Streamable) -> dict[str, Tensor]:
    """What a step uses in place of tensors of the state dict."""
    state, folded = model.state_dict(), {}
    if model.config["fusion"] == "reliability":
        assert model.fusion.typicality.clamp == CONSTANTS["typicality_limit"]
        # Without a filter a stage's prior is uniform in every frame: that of a transition to anywhere alike.
        stages = model.fusion.stages
        transition = state.get("fusion.transition", torch.zeros(stages, stages))
        folded["fusion.log_a"] = transition.double().log_softmax(1)
        folded["fusion.a"] = folded["fusion.log_a"].exp()
        for m in range(len(model.in_dims)):
            basis = state[f"fusion.typicality.components_{m}"]
            for name, matrix in (("project", basis), ("rebuild", basis.t())):
                folded[f"fusion.typicality.{name}_{m}.weight"] = matrix
                folded[f"fusion.typicality.{name}_{m}.bias"] = matrix.new_zeros(len(matrix))
        if model.fusion.quality is not None:
            assert model.fusion.quality.clamp == CONSTANTS["typicality_limit"]
            folded["fusion.quality.scale"] = state["fusion.quality.var"].clamp(min=CONSTANTS["variance_floor"]).rsqrt()
            folded["fusion.quality.decay"] = torch.tensor(0.5 ** (1 / model.fusion.quality.halflife))
        folded["fusion.typicality.std"] = state["fusion.typicality.var"].clamp(min=CONSTANTS["variance_floor"]).sqrt()
        folded["fusion.logit_scale"] = (-state["fusion.log_temperature"]).exp()
        folded["fusion.sharpness"] = model.fusion.sharpness
    if model.foreign is not None:
        own, spread = slice(-len(model.in_dims), None), state["target_variance"].rsqrt()
        folded["foreign.gain"] = (state["own_gain"][own] * spread).flatten()
        folded["foreign.shift"] = (state["own_shift"][own] * spread).flatten()
        folded["foreign.pace"] = torch.tensor(model.foreign.pace)
        folded["foreign.initial"] = model.foreign.initial.double().log_softmax(0)
        folded["foreign.log_a"] = model.foreign.transition.double().log_softmax(1)
        folded["foreign.a"] = folded["foreign.log_a"].exp()
    if model.config["memory"]:
        folded["memory.decay"] = 0.5 ** (1 / torch.tensor(model.config["memory"], dtype=torch.float32))
        folded["memory.prior"] = state["memory.log_prior"].exp()
    return folded
