import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_fp8.callbacks import LastCheckpoint, checkpoint


class Recorder(LastCheckpoint):
    """Notes the step of each save and what is in the folder after it."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.saved: list[int] = []
        self.files: set[str] = set()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.saved.append(trainer.global_step)
        self.files |= {path.name for path in Path(filepath).parent.iterdir()}


def fit(folder: Path, callback: LastCheckpoint, ckpt_path: str | None = None, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        **options,
    )
    trainer.fit(BoringModel(), ckpt_path=ckpt_path)


@pytest.mark.parametrize(
    ("every", "steps", "saved"), [(3, 8, [3, 6, 8]), (4, 8, [4, 8]), (100, 5, [5])], ids=["rest", "multiple", "short"]
)
def test_saves_every_n_steps_and_the_last(every: int, steps: int, saved: list[int], tmp_path: Path) -> None:
    callback = Recorder(every)
    fit(tmp_path, callback, max_steps=steps)
    assert callback.saved == saved
    assert callback.files == ({"last.ckpt", "last.ckpt.previous"} if len(saved) > 1 else {"last.ckpt"})
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_second_run_replaces_the_file(tmp_path: Path) -> None:
    for steps in (2, 3):
        fit(tmp_path, LastCheckpoint(2), max_steps=steps)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "last.ckpt.previous"}
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_trial_run_leaves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(1), fast_dev_run=2)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_save_that_breaks_off_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, LastCheckpoint(2), max_steps=2)

    def half(self: Trainer, filepath: str, weights_only: bool) -> None:
        Path(filepath).write_bytes(b"half of")
        raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "save_checkpoint", half)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, LastCheckpoint(2), max_steps=4)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_damaged_checkpoint_takes_no_place_of_the_one_before(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(2), max_steps=4)
    last, previous = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "last.ckpt.previous"))
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="Going on from the one before it"):
        fit(tmp_path, LastCheckpoint(2), max_steps=4, ckpt_path="last")
    assert [torch.load(path, weights_only=True)["global_step"] for path in (last, previous)] == [4, 2]


@pytest.mark.parametrize("calls_before_the_kill", range(5))
@pytest.mark.parametrize("sharded", [False, True])
def test_a_kill_while_a_checkpoint_is_put_in_place_loses_none(tmp_path, monkeypatch, sharded, calls_before_the_kill):
    def write(name, content):
        target = tmp_path / name
        if sharded:
            target.mkdir()
        (target / "part" if sharded else target).write_text(content)
        return str(target)

    def read(path):
        return (Path(path) / "part" if sharded else Path(path)).read_text()

    path, new, done = write("last.ckpt", "old"), write("last.ckpt.unfinished", "new"), []

    def until_the_kill(function):
        def call(*args):
            if len(done) == calls_before_the_kill:
                raise KeyboardInterrupt
            done.append(function)
            function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_the_kill(os.replace))
        patch.setattr(shutil, "rmtree", until_the_kill(shutil.rmtree))
        with suppress(KeyboardInterrupt):
            checkpoint.put_in_place(new, path)
    checkpoint.recover(path)
    assert read(path) == ("new" if len(done) > 1 else "old")  # the old one aside, the new one in its place
    checkpoint.put_in_place(write("another", "newer"), path)
    assert read(path) == "newer"
