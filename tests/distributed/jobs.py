"""Jobs of several processes on the command line, as a user starts them, for tests of what becomes of them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty.py"
SECONDS = 280
SMALL = """
model:
  config: {vocab_size: 272, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 64}
  schedule: {class_path: lightning_fp8.optim.WarmupCosine, init_args: {warmup_steps: 2}}
data: {path: DATA, sequence_length: 16, batch_size: 4}
fp8: {recipe: delayed, weights: bf16}
trainer:
  accelerator: cpu
  max_steps: 8
  num_sanity_val_steps: 0
  limit_val_batches: 0
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  enable_model_summary: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_fp8.callbacks.RunReport
    - class_path: lightning_fp8.callbacks.LastCheckpoint
      init_args: {every_n_steps: 2}
"""


def fit(folder, data, *options, strategy="strategy/fsdp2", torchrun=(), fault=None, wait=True, **environment):
    """Starts `lightning-fp8 fit` in `folder`; returns its exit status and what it printed, or the process.

    Args:
        folder: Where the run is, in `run`.
        data: Prepared.
        options: More of them.
        strategy: A config.
        torchrun: Its options, before the script; without, Lightning starts the processes.
        fault: See `faulty.py`.
        wait: For the end.
        environment: Variables.
    """
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(SMALL.replace("DATA", str(data)))
    command = [sys.executable, *(("-m", "torch.distributed.run", *torchrun) if torchrun else ()), str(FAULTY), "fit"]
    command += ["-c", "small.yaml", "-c", str(ROOT / f"configs/{strategy}.yaml"), "--trainer.default_root_dir=run"]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    own |= {"FAULT": fault} if fault else {}
    process = subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env={**os.environ, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ended(process) if wait else process


def ended(process):
    """The exit status and the output of a process that `fit` returned."""
    try:
        printed = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, printed


def curve(folder):
    """What was logged: step, learning rate and loss, as written."""
    with (folder / "run/metrics.csv").open() as file:
        return [(row["step"], row["lr"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
