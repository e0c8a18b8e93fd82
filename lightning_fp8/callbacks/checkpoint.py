"""`checkpoints/last.ckpt`: the state of a run, often enough that a kill costs little, and at its end.

The one before it is kept as `last.ckpt.previous`: a disk that damages the newest must not cost the run. That is the
price of a checkpoint more on disk, and of a third one while one is being written.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.async_plugin import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fp8.checkpoint.integrity import add_checksums, check_checkpoint
from lightning_fp8.checkpoint.io import CheckedCheckpointIO
from lightning_fp8.files import NO_SPACE, UNFINISHED, flush_folder

_PREVIOUS = ".previous"


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, replaced atomically every so many optimizer steps and when training ends.

    Lightning's ModelCheckpoint, asked for the last state every n steps, leaves out the steps after the last multiple
    of n; the final weights of a run are what most people want from it. `--ckpt_path last` resumes from it, or, with a
    warning, from the one before if it is damaged. A disk without room costs a save and a warning, and ends the run only
    if it is the last save. That needs a process that is alone: where others wait for it in the middle of a save, a full
    disk ends the job with a line that names it, and leaves the checkpoint before.

    SIGTERM, by which clusters announce that they take a machine back, has the run save after the batch and end with
    exit code 0; amid accumulated gradients, which no checkpoint holds, it leaves the checkpoint of an earlier step.

    With Lightning's `AsyncCheckpointIO` as a plugin of the Trainer, a copy of the state is written behind the
    training; sharded checkpoints are written at once all the same.

    Args:
        every_n_steps: Optimizer steps between saves.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if not (isinstance(every_n_steps, int) and every_n_steps >= 1):  # the command line lets null through
            raise ValueError(f"LastCheckpoint.every_n_steps is {every_n_steps}; it must be 1 or more.")
        super().__init__(save_last=True, save_top_k=0, every_n_train_steps=every_n_steps, enable_version_counter=False)
        self._damaged = False  # what is in the place of the newest

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts checkpoints where they are looked for, whatever the logger; those written in the background, too."""
        self.dirpath = self._folder(trainer)
        super().setup(trainer, pl_module, stage)
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AsyncCheckpointIO) and not isinstance(io.checkpoint_io, _PutInPlace):
            writer = io.checkpoint_io
            if writer is None or type(writer) is TorchCheckpointIO:
                writer = CheckedCheckpointIO()
            trainer.strategy.checkpoint_io = AsyncCheckpointIO(_PutInPlace(writer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes beside the checkpoint and renames, so that a kill at any moment leaves the old one or the new one.

        Lightning writes into the system's temporary folder first; where that is another file system, what follows is
        a copy onto the only checkpoint there is.
        """
        unfinished = f"{filepath}{UNFINISHED}"
        if trainer.is_global_zero and os.path.isdir(unfinished):  # of a run that died
            shutil.rmtree(unfinished)
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, unfinished)
        self._last_checkpoint_saved = filepath
        # A folder is sharded, and strategies write those themselves.
        sharded = os.path.isdir(unfinished)
        if sharded:
            trainer.strategy.barrier()
            add_checksums(Path(unfinished), trainer.global_rank, trainer.world_size)
            trainer.strategy.barrier()
        if trainer.is_global_zero and self._damaged:  # it must not take the place of the one before, which is whole
            _delete(filepath)
        self._damaged = False
        if trainer.is_global_zero and (sharded or not isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)):
            put_in_place(unfinished, filepath)
        trainer.strategy.barrier()

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Saves, unless there is no room, which the run outlives while it goes on."""
        step = self._last_global_step_saved
        try:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        except OSError as error:
            if error.errno not in NO_SPACE or trainer.world_size > 1:  # others would wait for this process
                raise
            self._last_global_step_saved = step
            kept = f"that of step {step} is kept" if step else "there is none before it"
            rank_zero_warn(
                f"No room for the checkpoint of step {trainer.global_step} ({error}); {kept}. Make"
                " room: the run goes on, and tries again at its next save."
            )

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Where `ckpt_path="last"` looks: one process reads the newest checkpoint, and says what all are to take.

        Raises:
            ValueError: It is damaged, and there is none before it or that is damaged, too; in each process.
        """
        path = os.path.join(self._folder(trainer), f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        if trainer.world_size > 1:  # Lightning does so a little later, too, and nothing the second time
            trainer.strategy.setup_environment()
        found: str | Exception | None = None
        if trainer.is_global_zero:
            try:
                recover(path)
                found = newest_whole(path)
            except (OSError, ValueError) as error:
                found = error
        found = trainer.strategy.broadcast(found)
        if isinstance(found, Exception):
            raise found
        self._damaged = found not in (None, path)
        return {found} if found else set()

    def _folder(self, trainer: Trainer) -> str:
        return str(self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves if the run is asked to end between two steps."""
        super().on_exception(trainer, pl_module, exception)
        if not isinstance(exception, SIGTERMException):
            return
        if self._last_global_step_saved != trainer.global_step or not trainer.global_step:
            if self._should_skip_saving_checkpoint(trainer):
                return
            if trainer.fit_loop._should_accumulate():
                rank_zero_info("SIGTERM amid accumulated gradients: the last checkpoint stays as it is.")
                return
            super()._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        rank_zero_info(f"SIGTERM: saved step {trainer.global_step}; go on with --ckpt_path last.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state if the last save was earlier; never in a `fast_dev_run`."""
        if not self._should_skip_saving_checkpoint(trainer):
            super()._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def put_in_place(new: str, path: str) -> None:
    """Makes the checkpoint at `new` the one at `path`, and that the previous; `recover` undoes what a kill interrupts.

    Args:
        new: A file, or the folder of a sharded checkpoint, whole and flushed.
        path: Where `ckpt_path="last"` looks.
    """
    previous = f"{path}{_PREVIOUS}"
    if os.path.exists(path):
        if os.path.isdir(previous):
            shutil.rmtree(previous)
        os.replace(path, previous)
    os.replace(new, path)
    flush_folder(Path(path).parent)


def recover(path: str) -> None:
    """Moves a checkpoint that was moved aside back, if no other took its place."""
    if not os.path.exists(path) and os.path.exists(f"{path}{_PREVIOUS}"):
        os.replace(f"{path}{_PREVIOUS}", path)


def _delete(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


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
        if str(path).endswith(UNFINISHED):
            put_in_place(str(path), str(path).removesuffix(UNFINISHED))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `io` does."""
        return self._io.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """As `io` does."""
        self._io.remove_checkpoint(path)

    def teardown(self) -> None:
        """As `io` does."""
        self._io.teardown()


def newest_whole(path: str) -> str | None:
    """The checkpoint at `path` or, with a warning, the one before if it is damaged; None if there is none.

    Raises:
        ValueError: Both are damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        check_checkpoint(path)
    except ValueError as error:
        previous = f"{path}{_PREVIOUS}"
        if not os.path.exists(previous):
            raise
        check_checkpoint(previous)
        rank_zero_warn(f"{error} Going on from the one before it, {previous}.")
        return previous
    return path
