"""Checkpoints in and out of Hugging Face's layout."""

from lightning_fp8.checkpoint.exchange import export_checkpoint, import_checkpoint

__all__ = ["export_checkpoint", "import_checkpoint"]
