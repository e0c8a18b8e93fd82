"""A run that is resumed sees the batches that it would have seen."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from streams import BATCH, BATCHES, LENGTH, content_hash, data_of, every_steps, fit

from lightning_fp8.data import prepare


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_to_the_end(prepared: Path, tmp_path: Path, num_workers: int, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    steps = 7 // accumulate  # batch 6 or 7 of the first epoch, and multiples of it in all epochs
    whole = fit(data_of(prepared, num_workers=num_workers), [every_steps(tmp_path, steps)], **options)
    per_epoch = len(whole) // 3
    for times in (1, 4):  # in the first epoch, in the second
        seen = times * steps * accumulate
        assert seen % per_epoch
        checkpoint = tmp_path / f"step={times * steps}.ckpt"
        rest = fit(data_of(prepared, num_workers=num_workers), ckpt_path=checkpoint, **options)
        assert rest == whole[seen:], f"resumed after batch {seen} of {len(whole)}"


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 3), (3, 0)])
def test_resume_with_other_workers_is_exact(
    before: int, after: int, prepared: Path, tmp_path: Path, uninterrupted: list[str]
) -> None:
    assert fit(data_of(prepared, num_workers=before), [every_steps(tmp_path, 7)]) == uninterrupted
    for step in (7, 28):
        rest = fit(data_of(prepared, num_workers=after), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert rest == uninterrupted[step:]


def test_resume_with_another_batch_size_or_world_goes_on_with_the_next_block(prepared: Path) -> None:
    loader = data_of(prepared).train_dataloader()
    stream = torch.cat([*loader, *loader])
    loader = data_of(prepared).train_dataloader()
    for _, _ in zip(range(5), loader, strict=False):
        state = loader.state_dict()
    resumed = data_of(prepared, batch_size=2 * BATCH).train_dataloader()
    resumed.load_state_dict(state)
    rest = torch.cat([*resumed, *resumed])
    assert torch.equal(rest[: 8 * BATCH], stream[5 * BATCH : 13 * BATCH])
    halves = []
    for rank in range(2):
        loader = data_of(prepared, batch_size=BATCH // 2).train_dataloader()
        loader._batches.rank, loader._batches.world_size = rank, 2
        loader.load_state_dict(state)
        halves.append(list(loader))
    both = torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)])
    assert torch.equal(both[: 10 * BATCH], stream[5 * BATCH : 15 * BATCH])


@pytest.mark.parametrize("limits", [{"max_steps": 60, "max_epochs": -1}, {"limit_train_batches": 12}])
def test_resume_under_other_ends(prepared: Path, tmp_path: Path, limits: dict[str, int]) -> None:
    whole = fit(data_of(prepared), [every_steps(tmp_path, 7)], **limits)
    for step in (7, 28):
        assert fit(data_of(prepared), ckpt_path=tmp_path / f"step={step}.ckpt", **limits) == whole[step:]


# Not (0, False): without validation there is no checkpoint after it.
@pytest.mark.parametrize(("val_batches", "on_train_end"), [(0, True), (1, True), (1, False)])
def test_resume_between_epochs(
    prepared: Path, tmp_path: Path, uninterrupted: list[str], val_batches: int, on_train_end: bool
) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=on_train_end
    )
    fit(data_of(prepared), [checkpoint], limit_val_batches=val_batches)
    rest = fit(data_of(prepared), ckpt_path=tmp_path / "epoch=0.ckpt", limit_val_batches=val_batches)
    assert rest == uninterrupted[BATCHES:]


def test_resume_twice(prepared: Path, tmp_path: Path, uninterrupted: list[str]) -> None:
    fit(data_of(prepared), [every_steps(tmp_path / "a", 7)])
    fit(data_of(prepared), [every_steps(tmp_path / "b", 13)], ckpt_path=tmp_path / "a" / "step=7.ckpt")
    for step in (13, 39):
        assert fit(data_of(prepared), ckpt_path=tmp_path / "b" / f"step={step}.ckpt") == uninterrupted[step:]


def test_resume_with_fabric(prepared: Path, uninterrupted: list[str]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = data_of(prepared).train_dataloader()
    for index, batch in enumerate(fabric.setup_dataloaders(loader)):
        assert content_hash(batch) == uninterrupted[index]
        if index == 6:
            state = loader.state_dict()
            break
    loader = data_of(prepared).train_dataloader()
    loader.load_state_dict(state)
    loader = fabric.setup_dataloaders(loader)
    seen = []
    for _ in range(3):
        left = BATCHES * 3 - 7 - len(seen)
        for _, batch in zip(range((left - 1) % BATCHES + 1), loader, strict=False):  # stops short of exhaustion
            seen.append(content_hash(batch))
    assert seen == uninterrupted[7:]


def test_resume_after_the_folder_moved(prepared: Path, tmp_path: Path, uninterrupted: list[str]) -> None:
    fit(data_of(prepared), [every_steps(tmp_path, 7)])
    shutil.copytree(prepared, tmp_path / "moved")
    assert fit(data_of(tmp_path / "moved"), ckpt_path=tmp_path / "step=7.ckpt") == uninterrupted[7:]


def test_resume_with_other_data_or_order_is_refused(prepared: Path, tmp_path: Path) -> None:
    fit(data_of(prepared), [every_steps(tmp_path, 7)])
    checkpoint = tmp_path / "step=7.ckpt"
    with pytest.raises(ValueError, match="seed was 3 and is now 4"):
        fit(data_of(prepared, seed=4), ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="sequence_length was 8 and is now 7"):
        fit(data_of(prepared, sequence_length=LENGTH - 1), ckpt_path=checkpoint)
    prepare([str(prepared.parent / "x.jsonl")], str(tmp_path / "other"), vocab_size=281, val_fraction=0.2)
    with pytest.raises(ValueError, match="position is one in other data: fingerprints was"):
        fit(data_of(tmp_path / "other"), ckpt_path=checkpoint)
