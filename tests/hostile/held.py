"""A callback that notes what the process holds."""

import gc
import os
import threading
from pathlib import Path

import torch
from lightning.pytorch import Callback

READINGS: dict[int, dict[str, int]] = {}  # by step


class Held(Callback):
    """What the process holds, every thousand steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % 1000 == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            READINGS[trainer.global_step] = {
                "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "objects": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
            }
