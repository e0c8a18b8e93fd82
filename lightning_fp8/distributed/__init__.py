"""What travels between processes in FP8, and what is said when one of them is lost."""

from lightning_fp8.distributed.all_gather import gather_in_fp8
from lightning_fp8.distributed.gradients import FP8GradientReduction
from lightning_fp8.distributed.peers import LostPeerError, naming_lost_peers

__all__ = ["FP8GradientReduction", "LostPeerError", "gather_in_fp8", "naming_lost_peers"]
