"""The folder of a run: one run has it at a time, an earlier one is kept, and what is resumed must be of its kind."""

import os
from pathlib import Path
from typing import IO, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_fp8.files import hold

_LOCK_NAME = ".lock"


class StartRun(SaveConfigCallback):
    """Gives a training run its folder, with the configuration in it.

    It acts when the data has been checked and before any logger writes. Evaluations leave the folder alone: they must
    not replace the configuration that trained. Only one run at a time has the folder.
    """

    _lock: IO[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Moves an earlier run out of the way, unless it is being resumed, and writes `config.yaml`."""
        if stage != "fit":
            return
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run:
            busy = f"Another run writes to {folder}: wait for it, or give another --trainer.default_root_dir."
            if (folder / _LOCK_NAME).exists():
                hold(folder / _LOCK_NAME, busy).close()
            if not self.config.get("ckpt_path"):
                _move_earlier_run(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = hold(folder / _LOCK_NAME, busy)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Into the folder of the run, where Lightning takes that of the logger."""
        path = Path(trainer.default_root_dir, self.config_filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Asks for a state to go on from.

        Raises:
            ValueError: There are weights alone.
        """
        sharded = Path(str(trainer.ckpt_path)).is_dir()  # the strategy reads the optimizer's state from it by itself
        if trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint and not sharded:
            raise ValueError(
                f"{trainer.ckpt_path} has no optimizer state, so training cannot go on from it: begin a run with its"
                f" weights instead, --model.initial_weights {trainer.ckpt_path}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks whether the state that was loaded is one of this optimizer.

        Raises:
            ValueError: It lacks an option that this one needs at each step.
        """
        for optimizer in trainer.optimizers if trainer.ckpt_path else ():
            missing = {name for group in optimizer.param_groups for name in set(optimizer.defaults) - set(group)}
            if missing:
                raise ValueError(
                    f"{trainer.ckpt_path} is of another optimizer than {type(optimizer).__name__}: it has no"
                    f" {', '.join(sorted(missing)[:3])}. Resume with the --model.optimizer that it was trained with."
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets others have the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None


def _move_earlier_run(folder: Path) -> None:
    """Keeps what an earlier run left in `folder` as `folder.1`, `folder.2`, …: nothing is lost or mixed."""
    if not (folder / "metrics.csv").exists() and not (folder / "checkpoints").exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.replace(folder, target)
    rank_zero_info(f"{folder} held an earlier run; it is now {target}. Use --ckpt_path last to resume a run.")
