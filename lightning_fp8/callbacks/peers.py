"""A lost process ends a run with its name: see `distributed/peers.py`.

torchrun ends the processes that are left by itself. Lightning's own launcher leaves those that do not notice, stopped
ones for ever, so rank 0, which has started them, ends them.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_fp8.distributed.peers import Peers


class PeerWatch(Callback):
    """Says which process was lost, where torch says only that an exchange failed.

    Without it the error is torch's. How long processes wait for each other is the strategy's `timeout`. The command
    line has it already.

    Attributes:
        message: What was said, of one to three lines; None before.
    """

    def __init__(self) -> None:
        self.message: str | None = None
        self._peers = Peers()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins to count."""
        self._peers.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the step, for the message."""
        self._peers.step = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says who was lost, if somebody was, below the error itself; ends the processes that this one has started."""
        before = signal.getsignal(signal.SIGTERM)
        if is_main := threading.current_thread() is threading.main_thread():
            # torchrun asks survivors to end. Lightning would pass that on, through the exchange that has failed.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.message = self._peers.explain(exception)
        if self.message:
            exception.add_note(self.message)
            launcher: Any = trainer.strategy.launcher
            for process in getattr(launcher, "procs", ()):
                process.send_signal(signal.SIGKILL)
        elif is_main:
            signal.signal(signal.SIGTERM, before)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Counts no more."""
        self._peers.stop()
