"""Whether a checkpoint is whole, and whether it is data: asked before anything in it is used.

What torch.save writes is a zip archive, whose directory has a checksum (CRC-32) of every record: a checkpoint is its
own manifest, in one file that a rename replaces and a copy takes along. Flipped bits of a record are found (single ones
always, other damage but for one in 2^32). It is not a signature: who may write the file can write its checksums.

The folder of a sharded checkpoint has none. `add_checksums` writes them beside the shards, one list a process.
`.metadata` is a pickle that torch reads with no restriction; here it is read once before, with the few classes that
belong into it, so that any other name in it is refused before torch sees the file.
"""

import json
import pickle
import zipfile
import zlib
from pathlib import Path

import torch

from lightning_fp8.files import write_text

_BLOCK = 1 << 22
_METADATA = ".metadata"
_REMEDY = "restore it from a copy, or resume from another, --ckpt_path PATH"
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
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint ({error}): {_REMEDY}.") from error
    if packed:  # which might unpack to more than there is memory for
        raise ValueError(f"{path} is no checkpoint: its record {packed} is compressed, as torch never does; {_REMEDY}.")
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of its record {damaged} is wrong; {_REMEDY}.")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # as the bytes happen to mislead it
        raise ValueError(f"{path} is no checkpoint of tensors ({error}): {_REMEDY}.") from error
    if names:
        raise ValueError(f"{path} would run {', '.join(names[:3])} when it is loaded: refused; {_REMEDY}.")


class _MetadataOnly(pickle.Unpickler):
    """Knows what torch.distributed.checkpoint writes into `.metadata`."""

    def find_class(self, module: str, name: str) -> object:
        if _is_metadata(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


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
    try:
        with (path / _METADATA).open("rb") as file:
            _MetadataOnly(file).load()
    except Exception as error:  # a damaged pickle fails in many ways
        raise ValueError(f"{path / _METADATA} is refused ({error}): {_REMEDY}.") from error


def add_checksums(folder: Path, rank: int, world_size: int) -> None:
    """Writes the checksums of this process's share of the files of a sharded checkpoint.

    Args:
        folder: All of whose files are written.
        rank: Of this process.
        world_size: Processes; file i is for process i modulo `world_size`.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(_SUMS))
    sums = {file.name: _crc(file) for file in files[rank::world_size]}
    write_text(folder / f"{_SUMS}.{rank}.json", json.dumps(sums))


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
