"""Models built on the fused ops, and other people's fusion methods to compare with."""

from .peers import FUSIONS, PeerFusion
from .sage import SAGE, SAGELoss, SAGEOutput, SAGEState

__all__ = ["FUSIONS", "SAGE", "PeerFusion", "SAGELoss", "SAGEOutput", "SAGEState"]
