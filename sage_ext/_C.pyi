"""The compiled module (csrc/bindings.cpp): addresses and sizes in, kernels run."""

from types import ModuleType
from typing import Any, Protocol

class Kernels(Protocol):
    """The entry points of a backend, those of csrc/ops.h: the same for every backend, all arguments by position.

    A tensor is an address (0: an absent optional one), dense and row-major. dtype is a code of _ops/_door.py. The last two
    say where: a thread count and 0 on the CPU, a device index and a stream on a GPU.
    """

    def stage_filter_forward(
        self, dtype: int, batch: int, frames: int, stages: int, emission: int, transition: int, initial: int,
        initial_stride: int, mask: int, posterior: int, belief: int, final_belief: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def stage_filter_backward(
        self, dtype: int, batch: int, frames: int, stages: int, emission: int, transition: int, initial: int,
        initial_stride: int, mask: int, posterior: int, belief: int, grad_posterior: int, grad_final: int, grad_emission: int,
        grad_transition: int, grad_initial: int, workspace: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def reliability_fusion_forward(
        self, dtype: int, rows: int, dim: int, stages: int, values: tuple[int, ...], row_strides: tuple[int, ...],
        reliability: int, stage: int, log_temperature: int, bias: int, sharpness: int, present: int, norm_weight: int,
        norm_bias: int, eps: float, fused: int, weights: int, confidence: int, stats: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def reliability_fusion_backward(
        self, dtype: int, rows: int, dim: int, stages: int, values: tuple[int, ...], row_strides: tuple[int, ...],
        reliability: int, stage: int, log_temperature: int, bias: int, sharpness: int, present: int, norm_weight: int,
        norm_bias: int, eps: float, weights: int, stats: int, grad_fused: int, grad_weights: int, grad_confidence: int,
        grad_values: tuple[int, ...], grad_reliability: int, grad_stage: int, grad_params: int, workspace: int,
        where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def ccc_forward(
        self, dtype: int, groups: int, frames: int, channels: int, pred: int, target: int, mask: int, mask_kind: int,
        moments: int, ccc: int, workspace: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def ccc_backward(
        self, dtype: int, groups: int, frames: int, channels: int, pred: int, target: int, mask: int, mask_kind: int,
        moments: int, grad_ccc: int, grad_moments: int, grad_pred: int, grad_target: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def temporal_ccc_forward(
        self, dtype: int, batch: int, frames: int, channels: int, pred: int, target: int, mask: int, mask_kind: int,
        window: int, decay: float, history: int, state_in: int, history_out: int, state_out: int, rho: int,
        defined: int, workspace: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def temporal_ccc_backward(
        self, dtype: int, batch: int, frames: int, channels: int, pred: int, target: int, mask: int, mask_kind: int,
        window: int, decay: float, history: int, state_in: int, grad_rho: int, grad_pred: int, grad_target: int,
        workspace: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def leaky_average_forward(
        self, dtype: int, batch: int, frames: int, dim: int, averages: int, causal: bool, relative: bool, x: int,
        precision: int, halflife: int, prior: int, state_in: int, average: int, state_out: int, workspace: int,
        where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def leaky_average_backward(
        self, dtype: int, batch: int, frames: int, dim: int, averages: int, causal: bool, relative: bool, x: int,
        precision: int, halflife: int, prior: int, state_in: int, average: int, grad_average: int, grad_state_out: int,
        grad_x: int, grad_precision: int, grad_prior: int, grad_state_in: int, workspace: int, where: int, stream: int, /,
    ) -> None: ...  # fmt: skip

class KernelModule(Kernels, ModuleType):
    """A submodule of _C: the kernels of one backend."""

cpu: KernelModule
cuda: KernelModule  # only in a build with CUDA kernels

max_modalities: int
max_stages: int
max_averages: int
max_memory: int  # half-lives
max_blocks: int
build_info: str
# Of csrc/math/frame.h and csrc/stream/model.h: norm_eps, energy_floor, variance_floor, typicality_limit, log_precision_limit,
# quality_halflife; of csrc/math/experts.h: foreign_margin.
constants: dict[str, float]

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_variants() -> list[tuple[str, bool, bool]]: ...
def cuda_versions() -> str: ...  # with CUDA kernels, as the next
def cuda_problem(device: int) -> str: ...  # why none of them runs there; empty if they do
def reliability_fusion_param_count(dim: int, modalities: int, stages: int, norm: bool) -> int: ...
def reliability_fusion_workspace(rows: int, dim: int, modalities: int, stages: int, norm: bool) -> int: ...
def stage_filter_workspace(batch: int, frames: int, stages: int) -> int: ...
def ccc_workspace(groups: int, frames: int, channels: int) -> int: ...
def temporal_ccc_workspace(
    batch: int, frames: int, channels: int, window: int, history: int, backward: bool
) -> int: ...
def leaky_average_workspace(batch: int, frames: int, dim: int, averages: int, causal: bool) -> int: ...

# Of a streaming model of this shape: (name, shape) of every tensor that open_session takes, and of every part of a stream's
# state (csrc/stream/describe.h).
_Listed = list[tuple[str, tuple[int, ...]]]

def describe_stream(shape: dict[str, Any], /) -> tuple[_Listed, _Listed]: ...

class StreamSession:
    """csrc/stream/session.h, made by cpu.open_session or cuda.open_session(shape, [(name, shape, address) of each tensor that
    describe_stream lists, in its order], rows, where); sage_ext/stream.py gives it meaning. `outputs`: the addresses of a
    StreamOutput's tensors. `on_device`: bit m where the features of modality m lie on the session's GPU, then a bit each for
    quality, present and active; what the caller's `stream` still has to write there is waited for."""

    def step(
        self, features: tuple[int, ...], quality: int, present: int, active: int, on_device: int,
        outputs: tuple[int, ...], where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def reset(self, which: int, count: int, outputs: tuple[int, ...], /) -> None: ...
    def read(self, which: int, count: int, state: int, frames: int, /) -> None: ...
    def write(self, which: int, count: int, state: int, frames: int, outputs: tuple[int, ...], /) -> None: ...
    def totals(self) -> tuple[int, list[tuple[int, int]]]: ...
