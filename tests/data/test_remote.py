"""Sets behind a URL: fetched through litdata, kept in a cache, and removed from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming.downloader import _DOWNLOADERS, LocalDownloader
from streams import BATCHES, content_hash, data_of

from lightning_fp8.data import prepare
from lightning_fp8.data.folder import TokenBlocks, TokenFolder, _in_bytes


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


@pytest.fixture
def bucket(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Many small chunks behind `s3://bucket/data`; the names of those fetched."""
    monkeypatch.setattr("lightning_fp8.data.chunks.CHUNK_BYTES", 400)
    monkeypatch.setattr("lightning_fp8.data.chunks.ITEM_TOKENS", 50)
    source, tokenizer = str(prepared.parent / "x.jsonl"), str(prepared / "tokenizer.json")
    prepare([source], str(tmp_path / "bucket/data"), tokenizer=tokenizer, val_fraction=0.2)
    monkeypatch.setattr("lightning_fp8.data.folder.get_default_cache_dir", lambda: str(tmp_path / "cache"))
    fetched: list[str] = []

    class Bucket(LocalDownloader):
        def download_file(self, remote_filepath: str, local_filepath: str) -> None:
            fetched.append(Path(remote_filepath).name)
            super().download_file(remote_filepath.replace("s3://bucket", str(tmp_path / "bucket")), local_filepath)

    monkeypatch.setitem(_DOWNLOADERS, "s3://", Bucket)
    return fetched


def held(folder: Path) -> list[int]:
    return [file.stat().st_size for file in folder.rglob("*.bin")]


def test_a_cache_keeps_within_its_size(bucket: list[str], tmp_path: Path) -> None:
    limit = 1500
    local = data_of(tmp_path / "bucket/data")
    chunks = len(list((tmp_path / "bucket/data/train").glob("*.bin")))
    data = data_of("s3://bucket/data", max_cache_size=limit)
    for _ in range(2):
        most = 0
        for ours, theirs in zip(data.train_dataloader(), local.train_dataloader(), strict=True):
            assert torch.equal(ours, theirs)
            most = max(most, sum(held(tmp_path / "cache")))
        assert limit / 2 < most <= limit
    fetched = [name for name in bucket if name.endswith(".bin")]
    assert len(set(fetched)) == chunks >= 4
    assert len(fetched) <= 2 * chunks  # once a pass


def test_what_was_opened_last_is_kept(bucket: list[str], tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in (tmp_path / "bucket").rglob("*.bin"))
    folder = TokenFolder("s3://bucket/data", 3 * size)

    def open_(number: int) -> None:
        folder.open(f"train/chunk-0-{number}.bin", np.dtype(np.uint16), 0)

    for number in (0, 1, 2, 0, 3):
        open_(number)
    assert {file.name for file in tmp_path.glob("cache/**/*.bin")} == {f"chunk-0-{i}.bin" for i in (0, 2, 3)}


def test_chunks_that_another_process_removes_are_fetched_again(bucket: list[str], tmp_path: Path, monkeypatch) -> None:
    blocks = data_of("s3://bucket/data", max_cache_size=10**6)._blocks("train")[0]
    check = TokenBlocks._check

    def check_and_lose(self: TokenBlocks, chunk: int) -> tuple[str, int]:
        checked = check(self, chunk)
        for file in (tmp_path / "cache").rglob("*.bin"):
            file.unlink()
        return checked

    monkeypatch.setattr(TokenBlocks, "_check", check_and_lose)
    assert torch.equal(blocks.read(1, 0), data_of(tmp_path / "bucket/data")._blocks("train")[0].read(1, 0))
    assert bucket.count("chunk-0-1.bin") == 2


@pytest.mark.parametrize(("size", "count"), [(None, None), (100, 100), ("2000", 2000), ("20GB", 20 * 10**9)])
def test_sizes_are_read_as_litdata_does(size: int | str | None, count: int | None) -> None:
    assert _in_bytes(size) == count


@pytest.mark.parametrize("size", ["much", "0", "-3GB", "GB"])
def test_what_is_no_size_is_refused(size: str, prepared: Path) -> None:
    with pytest.raises(ValueError, match="is no size"):
        data_of(prepared, max_cache_size=size).setup("fit")
