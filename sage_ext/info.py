"""What is built, what runs here, and which backend serves each op: `sage-ext info`, `python -m sage_ext`.

Every probe is guarded: a broken installation still gets a report. Paste it into bug reports; `sage-ext info --test`
(`sage_ext.selftest`) adds a table of what the ops compute here.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from typing import Any

OPS = ("stage_filter", "reliability_fusion", "ccc", "ccc_moments", "temporal_ccc", "leaky_average")
VARIABLES = ("SAGE_EXT_CPU_ISA", "SAGE_EXT_STRICT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def _try(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"unavailable ({type(error).__name__}: {error})"


def _module() -> Any:
    from . import _C

    return _C


def collect() -> dict[str, Any]:
    """The report as nested dictionaries of plain values."""
    import torch

    import sage_ext

    build = _try(lambda: json.loads(_module().build_info))
    if not isinstance(build, dict):
        build = {"error": build}
    with_cuda = "error" not in build and hasattr(_module(), "cuda")
    backends = {"cpu": "yes" if "error" not in build else f"no: the compiled module does not load: {build['error']}"}
    backends["cuda"] = _cuda_backend(with_cuda)
    return {
        "sage_ext": {
            "version": sage_ext.__version__,
            "built version": build.get("version"),
            "git": build.get("git") or "unknown (not built from a git checkout)",
            "compiler": build.get("compiler"),
            "OpenMP": build.get("openmp"),
        },
        "CPU kernels": {
            "built": _try(lambda: ", ".join(name for name, built, _ in _module().isa_variants() if built)),
            "supported here": _try(lambda: ", ".join(name for name, _, here in _module().isa_variants() if here)),
            "in use": _try(lambda: _module().isa()),
            "threads": _try(torch.get_num_threads),
        },
        "CUDA kernels": {
            "built": "yes" if with_cuda else "no",
            "compiler": (with_cuda and build.get("cuda_compiler")) or "none",
            "architectures": (with_cuda and build.get("cuda_architectures")) or "none",
            "runtime, driver": _try(lambda: _module().cuda_versions()) if with_cuda else "not linked",
        },
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda or "none (CPU build of torch)",
            "device": _try(lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"),
            "numpy": _try(lambda: __import__("numpy").__version__),
            **{name: os.environ[name] for name in VARIABLES if name in os.environ},
        },
        "ops": dict.fromkeys(OPS, backends),
    }


def _cuda_backend(built: bool) -> str:
    import torch

    if not built:
        return (
            "no: this build has no CUDA kernels, tensors on a GPU run the PyTorch reference "
            "(pip install . --config-settings=cmake.define.SAGE_EXT_CUDA=ON)"
        )
    if torch.version.cuda is None:
        return "no: this torch is a CPU build"
    if not torch.cuda.is_available():
        return "no: torch finds no CUDA device"
    problem = _try(lambda: _module().cuda_problem(torch.cuda.current_device()))
    return f"no: {problem}" if problem else "yes"


def report() -> str:
    """The report as text."""
    lines = []
    for section, entries in collect().items():
        lines.append(f"{section}:")
        for key, value in entries.items():
            if isinstance(value, dict):
                value = "; ".join(f"{backend} {answer}" for backend, answer in value.items())
            lines.append(f"  {key}: {value}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    print(report())
    return 0
