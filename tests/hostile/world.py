"""A folder in which everything is right: data, a configuration and a run of it. Cases spoil one thing each.

`spoil` functions take no argument and work on the current folder, as the commands of the cases do.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from lightning_fp8.cli.main import main
from lightning_fp8.data import prepare

CONFIG = """
model:
  config: {vocab_size: 272, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 32}
data: {path: data, sequence_length: 8, batch_size: 2}
fp8: {weights: bf16}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 1
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_model_summary: false
  enable_progress_bar: false
  default_root_dir: run
  callbacks:
    - class_path: lightning_fp8.callbacks.LastCheckpoint
"""
CKPT = "run/checkpoints/last.ckpt"


class Case(NamedTuple):
    """A mistake, and what is to be said of it.

    Attributes:
        name: Of the case.
        command: The verb and its options, without quotes that a shell would take away.
        code: The exit code: 2 of usage, 1 of failure.
        says: What the message has to name: the thing, its place, the remedy.
        spoil: Makes the mistake, if it is not in the command.
    """

    name: str
    command: list[str]
    code: int
    says: tuple[str, ...]
    spoil: Callable[[], object] = lambda: None


def make(folder: Path) -> None:
    """Prepares the data, writes the configuration and trains two steps."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        generator = random.Random(0)
        documents = ["".join(generator.choices("abcdefgh ", k=120)) for _ in range(40)]
        Path("x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
        prepare(["x.jsonl"], "data", vocab_size=272, val_fraction=0.2, workers=1)
        Path("config.yaml").write_text(CONFIG)
        main(["fit", "-c", "config.yaml"])
    finally:
        os.chdir(before)


def fit(*options: str) -> list[str]:
    """The command that trains."""
    return ["fit", "-c", "config.yaml", *options]


def write(path: str, content: str | bytes) -> None:
    """Puts a file in place."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit_json(path: str, **fields: object) -> None:
    """Changes fields of a JSON file, whose names have two underscores between levels."""
    content = json.loads(Path(path).read_text())
    for name, value in fields.items():
        *above, last = name.split("__")
        at = content
        for level in above:
            at = at[int(level) if level.isdigit() else level]
        at[last] = value
    Path(path).write_text(json.dumps(content))


def edit_yaml(change: Callable[[dict], object]) -> None:
    """Changes the configuration."""
    content = yaml.safe_load(CONFIG)
    change(content)
    Path("config.yaml").write_text(yaml.safe_dump(content))


def edit_checkpoint(change: Callable[[dict], object], path: str = CKPT) -> None:
    """Changes what is in the checkpoint."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def flip_bit(path: str, at: float = 0.5) -> None:
    """Turns one bit of a file over."""
    content = bytearray(Path(path).read_bytes())
    content[int(len(content) * at)] ^= 16
    Path(path).write_bytes(content)


def cut(path: str, keep: float = 0.5) -> None:
    """Leaves the first part of a file."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


def remove(path: str) -> None:
    """Deletes a file or a folder."""
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
