"""`checkpoints/last.ckpt`: the state of a run, often enough that a kill costs little, and at its end."""

import os
import shutil

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

_PREVIOUS = ".previous"


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, replaced atomically every so many optimizer steps and when training ends.

    Lightning's ModelCheckpoint, asked for the last state every n steps, leaves out the steps after the last multiple
    of n; the final weights of a run are what most people want from it. `--ckpt_path last` resumes from it.

    Args:
        every_n_steps: Optimizer steps between saves.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        super().__init__(save_last=True, save_top_k=0, every_n_train_steps=every_n_steps, enable_version_counter=False)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes beside the checkpoint and renames, so that a kill at any moment leaves the old one or the new one.

        Lightning writes into the system's temporary folder first; where that is another file system, what follows is
        a copy onto the only checkpoint there is.
        """
        unfinished = f"{filepath}.unfinished"
        if trainer.is_global_zero and os.path.isdir(unfinished):  # of a run that died
            shutil.rmtree(unfinished)
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, unfinished)
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            put_in_place(unfinished, filepath)
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Where `ckpt_path="last"` looks."""
        folder = str(self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints"))
        if trainer.is_global_zero:
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
    """Moves a checkpoint that was moved aside back, if no other took its place."""
    if not os.path.exists(path) and os.path.isdir(f"{path}{_PREVIOUS}"):
        os.replace(f"{path}{_PREVIOUS}", path)
