"""One file an op: its torch.library schema, fake, autograd, and the eager fast path. `sage_ext.functional` calls these."""

from . import ccc, leaky_average, reliability_fusion, stage_filter, temporal_ccc

__all__ = ["ccc", "leaky_average", "reliability_fusion", "stage_filter", "temporal_ccc"]
