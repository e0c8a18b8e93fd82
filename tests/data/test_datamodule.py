"""Blocks in order and shuffled, cut by a schedule, and read in place."""

from pathlib import Path

import pytest
import torch
from streams import BATCH, BATCHES, LENGTH, Recorder, data_of, every_steps, fit

from lightning_fp8.data import cut_blocks, load_tokenizer, prepare


def test_blocks_are_the_stored_tokens(prepared: Path) -> None:
    data = data_of(prepared, batch_size=5)
    batches = list(data.val_dataloader())
    tokens = data.manifest.splits["val"].tokens
    blocks = torch.cat(batches)
    assert blocks.dtype == torch.int64
    assert blocks.shape == (tokens // (LENGTH + 1), LENGTH + 1)  # every block, also the last incomplete batch
    assert len(blocks) % 5
    assert all(batch.shape == (5, LENGTH + 1) for batch in batches[:-1])

    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    assert set(tokenizer.decode(blocks.flatten().tolist())) <= set("abcdefgh ")
    lengths = data.token_bytes()
    assert lengths.shape == (data.vocab_size,) == (data.manifest.vocab_size,)
    assert lengths[blocks].sum() <= data.manifest.splits["val"].bytes
    for same in (data.test_dataloader(), data.predict_dataloader()):
        assert torch.equal(torch.cat(list(same)), blocks)


def test_training_is_shuffled_by_epoch_and_seed(prepared: Path) -> None:
    loader = data_of(prepared).train_dataloader()
    assert len(loader) == BATCHES
    first, second = list(loader), list(loader)
    assert len(first) == BATCHES
    assert all(batch.shape == (BATCH, LENGTH + 1) for batch in first + second)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(list(data_of(prepared).train_dataloader())), torch.cat(first))
    assert not torch.equal(torch.cat(list(data_of(prepared, seed=4).train_dataloader())), torch.cat(first))


def test_shuffle_reaches_across_the_whole_chunk(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(chr(ord("a") + i // 2) * 500)
    prepare([str(tmp_path)], str(tmp_path / "out"), vocab_size=257, val_fraction=0.1)
    batch = next(iter(data_of(tmp_path / "out", batch_size=64).train_dataloader()))
    # 64 neighbouring blocks come from 2 files, 256 of them (litdata's window) from 5.
    assert len(set(batch[:, 4].tolist())) > 10


def test_local_data_is_read_in_place(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    before = sorted(prepared.rglob("*"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for loader in (data_of(prepared).train_dataloader(), data_of(prepared).val_dataloader()):
        assert len(list(loader)) > 1
    assert sorted(prepared.rglob("*")) == before
    assert not (tmp_path / "home").exists()
    assert not list((tmp_path / "tmp").iterdir())


def test_errors(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json is missing: .*lightning-fp8 prepare"):
        data_of(tmp_path).setup("fit")
    with pytest.raises(ValueError, match=r"The train split of .* has \d+ tokens.*prepare more text"):
        data_of(prepared, batch_size=200).setup("fit")
    data_of(prepared, num_workers=50).setup("fit")
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        data_of(prepared, batch_size=0)
    data_of(prepared).setup("fit")


def test_cut_blocks_keeps_every_pair_of_input_and_target() -> None:
    blocks = torch.arange(2 * 13).view(2, 13)
    cut = cut_blocks(blocks, 4)
    assert cut.shape == (6, 5)
    assert torch.equal(cut[:, :-1].flatten(), blocks[:, :-1].flatten())
    assert torch.equal(cut[:, 1:].flatten(), blocks[:, 1:].flatten())
    assert torch.equal(cut_blocks(blocks, 12), blocks)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_length_schedule_follows_the_steps_and_resumes_exactly(
    accumulate: int, prepared: Path, tmp_path: Path, uninterrupted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    step = Recorder.training_step

    def noting(self: Recorder, batch: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(batch.shape))
        return step(self, batch)

    monkeypatch.setattr(Recorder, "training_step", noting)
    schedule = {0: 2, 5: 4, 12: 8}
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 1}
    whole = fit(data_of(prepared, length_schedule=schedule), [every_steps(tmp_path, 4)], **options)
    wanted = [(BATCH * 4, 3)] * 5 + [(BATCH * 2, 5)] * 7 + [(BATCH, 9)] * (60 // accumulate - 12)
    assert shapes == [shape for shape in wanted for _ in range(accumulate)]
    assert whole[12 * accumulate :] == uninterrupted[12 * accumulate :]
    assert (
        fit(data_of(prepared, length_schedule=schedule), ckpt_path=tmp_path / "step=4.ckpt", **options)
        == (whole[4 * accumulate :])
    )
    with pytest.raises(ValueError, match="lengths divide sequence_length, 8"):
        data_of(prepared, length_schedule={0: 3})
