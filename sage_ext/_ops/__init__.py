"""One file an op: its torch.library schema, fake, autograd, and the eager fast path. `sage_ext.functional` calls these."""

import hashlib
from pathlib import Path

from torch.compiler import config as _config  # torch 2.6 does not import it by itself

from . import ccc, leaky_average, reliability_fusion, stage_filter, temporal_ccc

__all__ = ["ccc", "leaky_average", "reliability_fusion", "stage_filter", "temporal_ccc"]


def _version(folder: Path) -> str:
    """Of the operators that the files in `folder` register."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:16]


# A graph in torch.compile's cache on disk calls the operators with the arguments that their schemas and autograd formulas
# had when it was traced, and PyTorch's key for it holds their names alone: without this, it would be taken from the cache
# after an upgrade too, and fail.
_config.cache_key_tag = f"{_config.cache_key_tag} sage_ext-{_version(Path(__file__).parent)}".strip()
