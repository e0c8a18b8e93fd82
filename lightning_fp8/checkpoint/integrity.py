"""Whether a checkpoint is whole, and whether it is data: asked before anything in it is used.

What torch.save writes is a zip archive, whose directory has a checksum (CRC-32) of every record: a checkpoint is its
own manifest, in one file that a rename replaces and a copy takes along. Flipped bits of a record are found (single ones
always, other damage but for one in 2^32). It is not a signature: who may write the file can write its checksums.

The folder of a sharded checkpoint has none. `add_checksums` writes them beside the shards, one list a process.
`.metadata` is a pickle that torch reads with no restriction; here it is read once before, with the few classes that
belong into it, so that any other name in it is refused before torch sees the file. Shards are what torch.save writes,
one after the other, and torch reads those that are no tensors with no restriction, too: each is looked at before.
"""

import io
import json
import pickle
import pickletools
import zipfile
import zlib
from enum import EnumType
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from lightning_fp8.files import write_text

_BLOCK = 1 << 22
_METADATA = ".metadata"
_REMEDY = "restore it from a copy, or resume from another, --ckpt_path PATH"
_REST = "meta.pt"  # Lightning's name for what is no tensor of the model or the optimizer
_SUMS = "checksums"


def check_checkpoint(path: str | Path) -> None:
    """Reads a checkpoint, a file or a folder, and computes its checksums.

    Raises:
        ValueError: It is missing, damaged, no checkpoint, or holds more than data. In the last case the name of what it
            would run is told.
    """
    path = Path(path)
    if path.is_dir():
        _check_folder(path)
    elif path.is_file():
        _check_file(path)
    else:
        raise ValueError(f"{path}: there is no such checkpoint; give another --ckpt_path.")


def _check_file(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((one.filename for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED), None)
            damaged = None if packed else archive.testzip()
    except Exception as error:  # as the bytes happen to mislead it
        raise ValueError(f"{path} is damaged or no checkpoint ({error}): {_REMEDY}.") from error
    if packed:  # which might unpack to more than there is memory for
        raise ValueError(f"{path} is no checkpoint: its record {packed} is compressed, as torch never does; {_REMEDY}.")
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of its record {damaged} is wrong; {_REMEDY}.")
    _check_data(path, path)


def _check_data(path: Path, content: Any) -> None:
    """Refuses what torch.save wrote, `content` of the file `path`, if it holds more than tensors and plain values."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(content)
    except Exception as error:  # as the bytes happen to mislead it
        raise ValueError(f"{path} is no checkpoint of tensors ({error}): {_REMEDY}.") from error
    if names:
        raise ValueError(f"{path} would run {', '.join(names[:3])} when it is loaded: refused; {_REMEDY}.")


class _MetadataOnly(pickle.Unpickler):
    """Knows what torch.distributed.checkpoint writes into `.metadata`."""

    def find_class(self, module: str, name: str) -> object:
        if _is_metadata(module, name):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # as Python before 3.11.4 writes members of enumerations
            return _member
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _member(enumeration: object, name: str) -> object:
    if isinstance(enumeration, EnumType) and name in enumeration.__members__:
        return enumeration.__members__[name]
    raise pickle.UnpicklingError(f"it would run builtins.getattr({enumeration}, {name})")


def _check_memo(content: bytes) -> None:
    """Refuses a pickle that numbers an object higher than it has bytes: pickle would make a list of that length."""
    for operation, argument, _ in pickletools.genops(content):
        if "PUT" in operation.name and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {argument}, and has {len(content)} bytes")


def _is_metadata(module: str, name: str) -> bool:
    if "." in name:
        return False
    if module == "torch":
        return isinstance(getattr(torch, name, None), torch.dtype) or name in ("Size", "device")
    return module in (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed._shard.sharding_spec.api",
    ) or (module, name) in (
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("builtins", "set"),
    )


def _check_folder(path: Path) -> None:
    if not (path / _METADATA).is_file():
        raise ValueError(f"{path} is no sharded checkpoint: it has no {_METADATA}; give another --ckpt_path.")
    summed: set[str] = set()
    for sums in sorted(path.glob(f"{_SUMS}.*.json")):
        try:
            expected = dict(json.loads(sums.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{sums} is damaged ({error}): {_REMEDY}.") from error
        for name, wanted in expected.items():
            if Path(name).name != name:
                raise ValueError(f"{sums} names {name}, which is not in its folder: refused; {_REMEDY}.")
            file = path / name
            if not file.is_file() or _crc(file) != wanted:
                raise ValueError(f"{file} is damaged or missing: {_REMEDY}.")
        summed |= expected.keys()
    if summed and (left := sorted({file.name for file in _files(path)} - summed)):
        raise ValueError(f"{path / left[0]} has no checksum, and other files of the folder have: {_REMEDY}.")
    try:
        content = (path / _METADATA).read_bytes()
        _check_memo(content)
        items = _MetadataOnly(io.BytesIO(content)).load().storage_data.values()
        shards = sorted((str(item.relative_path), int(item.offset), int(item.length)) for item in items)
    except Exception as error:  # a damaged pickle fails in many ways
        raise ValueError(f"{path / _METADATA} is refused ({error}): {_REMEDY}.") from error
    _check_shards(path, shards)
    if (path / _REST).is_file():
        _check_file(path / _REST)


def _check_shards(path: Path, shards: list[tuple[str, int, int]]) -> None:
    """Looks at each item of the shards, by file, offset and length; its tensors are not read."""
    from torch.distributed.checkpoint.utils import _create_file_view

    for name, items in groupby(shards, itemgetter(0)):
        if Path(name).name != name:
            raise ValueError(f"{path / _METADATA} names {name}, which is not in its folder: refused; {_REMEDY}.")
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is damaged or missing: {_REMEDY}.")
        with (path / name).open("rb") as file:
            for _, offset, length in items:
                _check_data(path / name, _create_file_view(file, offset, length))


def add_checksums(folder: Path, rank: int, world_size: int) -> None:
    """Writes the checksums of this process's share of the files of a sharded checkpoint.

    Args:
        folder: All of whose files are written.
        rank: Of this process.
        world_size: Processes; file i is for process i modulo `world_size`.
    """
    sums = {file.name: _crc(file) for file in _files(folder)[rank::world_size]}
    write_text(folder / f"{_SUMS}.{rank}.json", json.dumps(sums))


def _files(folder: Path) -> list[Path]:
    """What has checksums."""
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(_SUMS))


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
