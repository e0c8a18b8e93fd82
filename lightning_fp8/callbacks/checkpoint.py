"""`checkpoints/last.ckpt`: the state of a run, often enough that a kill costs little, and at its end."""

import os
import shutil

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


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
        super()._save_checkpoint(trainer, unfinished)
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            if os.path.isdir(filepath):  # a sharded checkpoint; only files are replaced in one go
                shutil.rmtree(filepath)
            os.replace(unfinished, filepath)
        trainer.strategy.barrier()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state if the last save was earlier; never in a `fast_dev_run`."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
