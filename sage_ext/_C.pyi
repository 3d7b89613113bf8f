"""The compiled module (csrc/bindings.cpp): addresses and sizes in, kernels run."""

from types import ModuleType
from typing import Any

cpu: ModuleType
cuda: ModuleType  # only in a build with CUDA kernels

max_modalities: int
max_stages: int
max_memory: int  # half-lives
max_blocks: int
build_info: str
# Of csrc/math/frame.h and csrc/stream/model.h: norm_eps, energy_floor, variance_floor, typicality_limit, confidence_margin,
# log_precision_limit.
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

# Of a streaming model of this shape: (name, shape) of every tensor that open_session takes, and of every part of a stream's
# state (csrc/stream/describe.h).
_Listed = list[tuple[str, tuple[int, ...]]]

def describe_stream(shape: dict[str, Any], /) -> tuple[_Listed, _Listed]: ...

class StreamSession:
    """csrc/stream/session.h, made by cpu.open_session or cuda.open_session(shape, [(name, shape, address) of each tensor that
    describe_stream lists, in its order], rows, where); sage_ext/stream.py gives it meaning. `outputs`: the addresses of a
    StreamOutput's tensors."""

    def step(
        self, features: tuple[int, ...], present: int, active: int, outputs: tuple[int, ...], where: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    def reset(self, which: int, count: int, outputs: tuple[int, ...], /) -> None: ...
    def read(self, which: int, count: int, state: int, frames: int, /) -> None: ...
    def write(self, which: int, count: int, state: int, frames: int, outputs: tuple[int, ...], /) -> None: ...
    def totals(self) -> tuple[int, list[tuple[int, int]]]: ...
