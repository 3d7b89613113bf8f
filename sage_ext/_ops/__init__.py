"""One file an op: its torch.library schema, fake, autograd, and the eager fast path. `sage_ext.functional` calls these."""

from . import concordance, fusion, stage_filter, temporal

__all__ = ["concordance", "fusion", "stage_filter", "temporal"]
