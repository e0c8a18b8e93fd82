"""How the Trainer writes and reads a checkpoint file: whole or not at all, checked before use, never as a program.

Lightning's own goes by way of a copy in memory and the system's temporary folder, does not flush, and reads a
checkpoint behind http with `weights_only=False`.
"""

from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_fp8.checkpoint.integrity import check_checkpoint
from lightning_fp8.files import write_whole


class CheckedCheckpointIO(TorchCheckpointIO):
    """Checkpoint files on disk; those elsewhere are as Lightning has them, and read as data alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes under another name, flushes and renames.

        Raises:
            OSError: It cannot be written; what there was is as it was.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(Path(path), lambda file: torch.save(checkpoint, cast(IO[bytes], file)))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Reads a checkpoint whose checksums are right.

        Raises:
            ValueError: It is damaged, no checkpoint, or holds more than data.
        """
        if "://" not in str(path):
            check_checkpoint(path)
        content = super().load_checkpoint(path, map_location, weights_only=True)
        if not (isinstance(content, dict) and {"state_dict", "pytorch-lightning_version"} <= set(content)):
            raise ValueError(f"{path} holds no training run: give a checkpoint that `fit` wrote, --ckpt_path PATH.")
        return content
