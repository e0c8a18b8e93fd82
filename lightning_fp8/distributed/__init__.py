"""What travels between processes in FP8."""

from lightning_fp8.distributed.all_gather import gather_in_fp8

__all__ = ["gather_in_fp8"]
