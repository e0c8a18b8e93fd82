"""The command line, with a fault: FAULT="RANK STEP SIGNAL" sends that process the signal in the middle of a step.

Only in its first life: what torchrun starts again is well. TIMEOUT=SECONDS is how long processes wait for each other
from then on.
"""

import os
import signal
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from lightning_fp8.cli.main import main
from lightning_fp8.models import DecoderLM

rank, step, name = os.environ.get("FAULT", "-1 0 SIGKILL").split()
training_step = DecoderLM.training_step
first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def signal_in(self, batch, batch_idx):
    if self.global_step == int(step) and first_life:
        if "TIMEOUT" in os.environ:
            set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
            set_timeout(timedelta(seconds=float(os.environ["TIMEOUT"])), torch.distributed.group.WORLD)
        if self.global_rank == int(rank):
            os.kill(os.getpid(), getattr(signal, name))
    return training_step(self, batch, batch_idx)


if __name__ == "__main__":
    DecoderLM.training_step = signal_in
    main()
