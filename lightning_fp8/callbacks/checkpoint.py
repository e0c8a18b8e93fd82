"""`checkpoints/last.ckpt`: the state of a run, often enough that a kill costs little, and at its end."""

import os
import shutil
from contextlib import suppress
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.async_plugin import AsyncCheckpointIO

_PREVIOUS, _UNFINISHED = ".previous", ".unfinished"


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, replaced atomically every so many optimizer steps and when training ends.

    Lightning's ModelCheckpoint, asked for the last state every n steps, leaves out the steps after the last multiple
    of n; the final weights of a run are what most people want from it. `--ckpt_path last` resumes from it.
    With Lightning's `AsyncCheckpointIO` as a plugin of the Trainer, a copy of the state is written behind the
    training; sharded checkpoints are written at once all the same.

    Args:
        every_n_steps: Optimizer steps between saves.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        super().__init__(save_last=True, save_top_k=0, every_n_train_steps=every_n_steps, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has a checkpoint that is written in the background put in place there, too, when it is whole."""
        super().setup(trainer, pl_module, stage)
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AsyncCheckpointIO) and not isinstance(io.checkpoint_io, _PutInPlace):
            trainer.strategy.checkpoint_io = AsyncCheckpointIO(_PutInPlace(io.checkpoint_io or TorchCheckpointIO()))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes beside the checkpoint and renames, so that a kill at any moment leaves the old one or the new one.

        Lightning writes into the system's temporary folder first; where that is another file system, what follows is
        a copy onto the only checkpoint there is.
        """
        unfinished = f"{filepath}{_UNFINISHED}"
        if trainer.is_global_zero and os.path.isdir(unfinished):  # of a run that died
            shutil.rmtree(unfinished)
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, unfinished)
        self._last_checkpoint_saved = filepath
        # A folder is sharded, and strategies write those themselves.
        is_written = os.path.isdir(unfinished) or not isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
        if trainer.is_global_zero and is_written:
            put_in_place(unfinished, filepath)
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Where `ckpt_path="last"` looks."""
        folder = str(self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints"))
        if os.path.isdir(folder):  # each process: none may look before another has put it back
            recover(os.path.join(folder, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"))
        found: set[str] = super()._find_last_checkpoints(trainer)
        return found

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state if the last save was earlier; never in a `fast_dev_run`."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def put_in_place(new: str, path: str) -> None:
    """Replaces the checkpoint at `path` by the one at `new`; `recover` undoes what a kill leaves half done.

    A file is replaced in one go. A folder, of a sharded checkpoint, is moved aside first.
    """
    previous = f"{path}{_PREVIOUS}"
    if os.path.isdir(path):
        if os.path.isdir(previous):
            shutil.rmtree(previous)
        os.replace(path, previous)
    os.replace(new, path)
    if os.path.isdir(previous):
        shutil.rmtree(previous)


def recover(path: str) -> None:
    """Moves a checkpoint that was moved aside back, if no other took its place; several processes may at once."""
    if not os.path.exists(path) and os.path.isdir(f"{path}{_PREVIOUS}"):
        with suppress(OSError):  # another has
            os.replace(f"{path}{_PREVIOUS}", path)


class _PutInPlace(CheckpointIO):
    """Puts a checkpoint in place as soon as `io` has written it.

    Args:
        io: What writes and reads.
    """

    def __init__(self, io: CheckpointIO) -> None:
        self._io = io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes it and, where `path` is that of an unfinished one, puts it in place."""
        self._io.save_checkpoint(checkpoint, path, storage_options)
        if str(path).endswith(_UNFINISHED):
            put_in_place(str(path), str(path).removesuffix(_UNFINISHED))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `io` does."""
        return self._io.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """As `io` does."""
        self._io.remove_checkpoint(path)

    def teardown(self) -> None:
        """As `io` does."""
        self._io.teardown()
