import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning import Callback, Fabric, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from litdata.streaming.downloader import _DOWNLOADERS, LocalDownloader

from lightning_fp8.data import TokenDataModule, cut_blocks, load_tokenizer, prepare

LENGTH, BATCH = 8, 4
BATCHES = 20


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    generator = random.Random(0)
    documents = ["".join(generator.choices("abcdefgh ", k=60)) for _ in range(24)]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prepare([str(folder / "x.jsonl")], str(folder / "data"), vocab_size=280, val_fraction=0.2)
    return folder / "data"


def data_of(prepared: Path | str | dict[str, float], **options: object) -> TokenDataModule:
    path = prepared if isinstance(prepared, dict) else str(prepared)
    return TokenDataModule(path, **{"sequence_length": LENGTH, "batch_size": BATCH, "seed": 3, **options})


def content_hash(batch: torch.Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:12]


class Recorder(LightningModule):
    """Trains one weight and keeps the hash of every batch it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen.append(content_hash(batch))
        return self.weight * batch.float().mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("val_loss", batch.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(
    data: TokenDataModule,
    callbacks: list[Callback] | None = None,
    ckpt_path: Path | None = None,
    **options: object,
) -> list[str]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=callbacks is not None,
        **{"max_epochs": 3, "limit_val_batches": 0, "num_sanity_val_steps": 0, **options},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return module.seen


def every_steps(folder: Path, steps: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)


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


@pytest.fixture(scope="session")
def uninterrupted(prepared: Path) -> list[str]:
    seen = fit(data_of(prepared))
    assert len(set(seen)) == len(seen) == 3 * BATCHES
    return seen


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


@pytest.fixture(scope="session")
def second(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another set with the tokenizer of the first, of other letters and half the size."""
    folder = tmp_path_factory.mktemp("second")
    generator = random.Random(1)
    documents = ["".join(generator.choices("xyz ", k=60)) for _ in range(16)]
    (folder / "y.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prepare([str(folder / "y.jsonl")], str(folder / "other"), tokenizer=str(prepared / "tokenizer.json"))
    return folder / "other"


def mixed(prepared: Path, second: Path, **options: object) -> TokenDataModule:
    return data_of({str(prepared): 3, str(second): 1}, **options)


def is_of_second(blocks: torch.Tensor, prepared: Path) -> list[bool]:
    bpe = load_tokenizer(prepared / "tokenizer.json")
    return [bool(set("xyz") & set(bpe.decode(block.tolist()))) for block in blocks]


def test_sets_are_mixed_by_weight(prepared: Path, second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fp8.data.order.CYCLE", 64)
    data = mixed(prepared, second)
    loader = data.train_dataloader()
    assert data.set_names == ["data", "other"]
    assert len(loader) == len(training_blocks(data)) // BATCH
    blocks = torch.cat([batch for _ in range(20) for batch in loader])
    taken = is_of_second(blocks, prepared)
    share = sum(taken) / len(taken)
    assert share == pytest.approx(1 / 4, abs=4 * (3 / 16 / len(taken)) ** 0.5)
    # Each set goes through whole passes: every block as often as every other, but for the pass under way.
    for which, blocks_of in enumerate(data._blocks("train")):
        counts = Counter(tuple(block.tolist()) for block, of in zip(blocks, taken, strict=True) if of == which)
        assert len(counts) == len(blocks_of)
        assert max(counts.values()) - min(counts.values()) <= 1


def training_blocks(data: TokenDataModule) -> range:
    return range(sum(len(blocks) for blocks in data._blocks("train")))


@pytest.mark.parametrize("after", [0, 2])
def test_a_mixture_resumes_exactly(after: int, prepared: Path, second: Path, tmp_path: Path) -> None:
    whole = fit(mixed(prepared, second, num_workers=2), [every_steps(tmp_path, 13)])
    for step in (13, 39):
        rest = fit(mixed(prepared, second, num_workers=after), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert rest == whole[step:]
    with pytest.raises(ValueError, match="weights was"):
        fit(data_of({str(prepared): 1, str(second): 1}), ckpt_path=tmp_path / "step=13.ckpt")
    with pytest.raises(ValueError, match="fingerprints was"):
        fit(data_of({str(second): 3, str(prepared): 1}), ckpt_path=tmp_path / "step=13.ckpt")


def test_mixture_errors(prepared: Path, second: Path, tmp_path: Path) -> None:
    for weights in ({}, {"a": 0}, {"a": -1.0}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="positive weight"):
            data_of(weights)
    with pytest.raises(ValueError, match="differ in the last part"):
        data_of({"a/x": 1, "b/x": 1})
    prepare([str(second.parent / "y.jsonl")], str(tmp_path / "mine"), vocab_size=280)
    with pytest.raises(ValueError, match="different tokenizers"):
        data_of({str(prepared): 1, str(tmp_path / "mine"): 1}).setup("fit")


def test_each_set_is_validated_by_itself(prepared: Path, second: Path) -> None:
    data = mixed(prepared, second)
    for loader, path in zip(data.val_dataloader(), (prepared, second), strict=True):
        alone = data_of(path).val_dataloader()
        assert torch.equal(torch.cat(list(loader)), torch.cat(list(alone)))


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_url_is_read_through_litdata(
    num_workers: int, prepared: Path, tmp_path: Path, uninterrupted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_fp8.data.folder.get_default_cache_dir", lambda: str(tmp_path / "cache"))
    fetched: list[str] = []

    class Bucket(LocalDownloader):
        def download_file(self, remote_filepath: str, local_filepath: str) -> None:
            fetched.append(remote_filepath)
            super().download_file(remote_filepath.replace("s3://bucket", str(prepared.parent)), local_filepath)

    monkeypatch.setitem(_DOWNLOADERS, "s3://", Bucket)
    data = data_of("s3://bucket/data", num_workers=num_workers)
    assert [content_hash(batch) for batch in data.train_dataloader()] == uninterrupted[:BATCHES]
    assert torch.equal(data.token_bytes(), data_of(prepared).token_bytes())
    assert fetched[0] == "s3://bucket/data/manifest.json"
    assert "s3://bucket/data/train/index.json" in fetched
    assert len(set(fetched)) == len(fetched)

    fetched.clear()
    list(data_of("s3://bucket/data").train_dataloader())
    assert fetched == ["s3://bucket/data/manifest.json"]  # all else is in the cache
    local = data_of(f"local:{prepared}")
    assert [content_hash(batch) for batch in local.train_dataloader()] == uninterrupted[:BATCHES]
    assert [content_hash(b) for b in data_of(f"file://{prepared}").train_dataloader()] == uninterrupted[:BATCHES]


def test_url_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fp8.data.folder.get_default_cache_dir", lambda: str(tmp_path / "cache"))

    class NoClient(LocalDownloader):
        def __init__(self, *args: object, **options: object) -> None:
            raise ModuleNotFoundError("run `pip install google-cloud-storage`")

    monkeypatch.setitem(_DOWNLOADERS, "gs://", NoClient)
    with pytest.raises(ValueError, match=r"gs://x/y/manifest\.json needs a package .*google-cloud-storage"):
        data_of("gs://x/y").setup("fit")
    with pytest.raises(ValueError, match=r"local:/nowhere/manifest\.json cannot be read"):
        data_of("local:/nowhere").setup("fit")
