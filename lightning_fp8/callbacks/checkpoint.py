"""`checkpoints/last.ckpt`: the state of a run, often enough that a kill costs little, and at its end."""

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state if the last save was earlier; never in a `fast_dev_run`."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
