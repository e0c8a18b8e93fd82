"""Checkpoints in and out of Hugging Face's layout, and Fabric's."""

from lightning_fp8.checkpoint.exchange import export_checkpoint, import_checkpoint
from lightning_fp8.checkpoint.fabric import load_fabric_state

__all__ = ["export_checkpoint", "import_checkpoint", "load_fabric_state"]
