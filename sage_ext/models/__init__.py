"""Models built on the fused ops."""

from .sage import SAGE, SAGELoss, SAGEOutput, SAGEState

__all__ = ["SAGE", "SAGELoss", "SAGEOutput", "SAGEState"]
