"""A shard that is not all there is found when a set is opened, and not in the middle of a run."""

import json
import shutil

import pytest

from lightning_fp8.data import TokenDataModule


@pytest.fixture
def copied(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


def open_train(folder):
    return TokenDataModule(str(folder), sequence_length=8, batch_size=2).train_dataloader()


@pytest.mark.parametrize("keep", [-2, 16, 0], ids=["one token short", "hardly begun", "empty"])
def test_a_chunk_that_is_cut_short_is_refused(copied, keep):
    assert len(list(open_train(copied))) > 10
    chunk = copied / "train/chunk-0-0.bin"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=rf"chunk-0-0\.bin has {len(whole[:keep])} bytes of {len(whole)}: copy it"):
        open_train(copied)


def test_a_chunk_that_is_missing_is_refused(copied):
    (copied / "val/chunk-0-0.bin").unlink()
    open_train(copied)
    with pytest.raises(ValueError, match=r"chunk-0-0\.bin has 0 bytes of"):
        TokenDataModule(str(copied), sequence_length=8, batch_size=2).val_dataloader()


def test_an_index_that_lacks_a_chunk_is_refused(copied):
    index = copied / "train/index.json"
    content = json.loads(index.read_text())
    content["chunks"].pop()
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the train split has 0 tokens, and \d+ were prepared"):
        open_train(copied)


def test_a_fetched_chunk_is_looked_at_before_it_is_read(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path / "cache"))
    chunk = copied / "train/chunk-0-0.bin"
    chunk.write_bytes(chunk.read_bytes()[:-2])
    loader = open_train(f"local:{copied}")
    with pytest.raises(ValueError, match=r"chunk-0-0\.bin has \d+ bytes of \d+: copy it"):
        next(iter(loader))
