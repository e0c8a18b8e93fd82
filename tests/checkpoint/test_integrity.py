"""Folders of sharded checkpoints: their checksums, and what in them is no data."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

from lightning_fp8.checkpoint import export_checkpoint
from lightning_fp8.checkpoint.integrity import add_checksums, check_checkpoint

RANKS = 2


class Evil:
    """A pickle that makes a file when it is loaded as a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def make(folder: Path, **items: object) -> Path:
    """A folder as ModelParallelStrategy writes it, with the checksums of two processes."""
    state = {"state_dict": {"a": torch.arange(64.0), "b": torch.zeros(3)}, **items}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3}, folder / "meta.pt")
    for rank in range(RANKS):
        add_checksums(folder, rank, RANKS)
    return folder


def leave_out_checksums(folder: Path) -> None:
    """As another program writes it: whoever changes a shard can change its checksum, too."""
    for sums in folder.glob("checksums.*"):
        sums.unlink()


class Reached:
    """An attribute of what `.metadata` may name; an enumeration's members alone are data."""

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (TensorProperties, "__init__")


def test_a_member_of_an_enumeration_is_data(folder: Path) -> None:
    """Python 3.11.2 writes it as an attribute, later ones as a value."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Member()
    leave_out_checksums(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    check_checkpoint(folder)


class Member:
    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")


def rename_shards(folder: Path, name: str) -> None:
    """Has `.metadata` say that the shards are elsewhere."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for item in metadata.storage_data.values():
        item.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "sharded", step=3, rates=[0.5])


def test_what_is_right_is_accepted(folder: Path) -> None:
    check_checkpoint(folder)
    leave_out_checksums(folder)
    check_checkpoint(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
def test_any_flipped_bit_is_found(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    for at in range(0, len(content), max(1, len(content) // 50)):
        (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=rf"{name} is damaged or missing: restore it"):
            check_checkpoint(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", "meta.pt"])
def test_a_missing_file_is_found(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing: restore it"):
        check_checkpoint(folder)


@pytest.mark.parametrize("rank", range(RANKS))
def test_missing_checksums_of_one_process_are_found(rank: int, folder: Path) -> None:
    (folder / f"checksums.{rank}.json").unlink()
    with pytest.raises(ValueError, match="has no checksum, and other files of the folder have"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: make(folder, x=Evil()), r"__0_0\.distcp would run .*system when it is loaded: refused"),
        (lambda folder: torch.save({"a": Evil()}, folder / "meta.pt"), r"meta\.pt would run .*system"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Evil())), r"\.metadata is refused .*system"),
        (
            lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Reached())),
            r"\.metadata is refused .*getattr\(<class .*TensorProperties'>, __init__\)",
        ),
        (lambda folder: rename_shards(folder, "../x"), r"\.metadata names \.\./x, which is not in its folder: refused"),
        (lambda folder: rename_shards(folder, "/etc/passwd"), r"\.metadata names /etc/passwd, which is not in its"),
        (lambda folder: rename_shards(folder, "meta.pt"), r"meta\.pt is no checkpoint of tensors"),
        (lambda folder: rename_shards(folder, "other.distcp"), r"other\.distcp is damaged or missing"),
    ],
    ids=["shard", "rest", "metadata", "attribute", "path out", "absolute path", "other file", "no file"],
)
def test_what_is_no_data_is_refused_with_its_name(spoil: Callable[[Path], object], said: str, folder: Path) -> None:
    spoil(folder)
    leave_out_checksums(folder)
    for read in (check_checkpoint, lambda path: export_checkpoint(str(path), "out")):
        with pytest.raises(ValueError, match=said):
            read(folder)
    assert not Path("pwned").exists()


def test_metadata_that_asks_for_memory_is_refused_before_it_gets_it(tmp_path: Path) -> None:
    """The C unpickler makes a list as long as the highest number of an object, 8 bytes an entry."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x02}r\x00\x00\x00\x08.")
    with pytest.raises(ValueError, match=r"numbers an object 134217728, and has 9 bytes"):
        check_checkpoint(tmp_path)
