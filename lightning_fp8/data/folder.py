"""A prepared folder, on disk or behind a URL, as blocks of tokens at random access.

The chunks have litdata's format. Those behind a URL are fetched by litdata's own downloaders, one whole chunk at a
time, into its cache folder (`LITDATA_CACHE_DIR`), with the credentials its conventions use; hence `s3://`, `gs://`,
`azure://`, `r2://`, `hf://` and `local:`. They are read by position and not through `litdata.StreamingDataset`, whose
order depends on the number of loader workers, and which reads only Parquet from `hf://`.

Every node keeps what it fetched, two bytes a token or four, up to `max_cache_size` for each set: then the chunks that
were opened longest ago go. A pass over a set opens each of its chunks once, so a cache that is smaller than the set
costs a download a pass and no more. Without a limit the cache stays until `litdata cache clear` empties it.
"""

import hashlib
import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from litdata.streaming.downloader import get_downloader
from litdata.utilities.dataset_utilities import get_default_cache_dir
from litdata.utilities.format import _convert_bytes_to_int

from lightning_fp8.data.chunks import INDEX_NAME
from lightning_fp8.data.index import read_index
from lightning_fp8.data.manifest import MANIFEST_NAME, Manifest
from lightning_fp8.data.order import WINDOW_CHUNKS

URL_PREFIXES = ("s3://", "gs://", "azure://", "r2://", "hf://", "local:")
OPEN_CHUNKS = 2 * WINDOW_CHUNKS  # maps kept open by each reader, also of chunks that have left the cache

CHUNK_SUFFIX = ".bin"


class TokenFolder:
    """A folder that `prepare` wrote, or a copy of it behind a URL.

    Args:
        path: The folder or its URL.
        max_cache_size: Most bytes of chunks from a URL to keep, in litdata's words, such as "20GB"; None is no limit.

    Raises:
        ValueError: It is not prepared, or cannot be fetched.
    """

    def __init__(self, path: str, max_cache_size: int | str | None = None) -> None:
        self.path = path
        self._max_cache_bytes = _in_bytes(max_cache_size)
        self._is_remote = path.startswith(URL_PREFIXES)
        self._cache = Path()
        if self._is_remote:
            # As litdata does with its index: fetched anew each time, and what it describes is cached under its content.
            root = Path(get_default_cache_dir(), hashlib.md5(path.encode(), usedforsecurity=False).hexdigest())
            fetched = root / f"{MANIFEST_NAME}.{os.getpid()}"
            self._fetch(MANIFEST_NAME, fetched)
            self.manifest = Manifest.load(fetched)
            fetched.unlink()
            self._cache = root / self.manifest.fingerprint
        else:
            self.manifest = Manifest.load(Path(path.removeprefix("file://"), MANIFEST_NAME))

    @property
    def is_local(self) -> bool:
        """Whether its files are here, without fetching them."""
        return not self._is_remote

    def file(self, name: str) -> Path:
        """A file of the folder, fetched first if it is not here.

        Raises:
            ValueError: It cannot be fetched.
        """
        if not self._is_remote:
            return Path(self.path.removeprefix("file://"), name)
        local = self._cache / name
        if not local.exists():
            self._fetch(name, local)
            if local.suffix == CHUNK_SUFFIX:
                self._make_room(local)
        return local

    def open(self, name: str, dtype: "np.dtype[np.generic]", offset: int) -> np.memmap:
        """Maps a file of the folder, fetched first if it is not here.

        Raises:
            ValueError: It cannot be fetched.
        """
        while True:
            file = self.file(name)
            try:
                if self._is_remote:
                    os.utime(file)  # it is in use
                return np.memmap(file, dtype, "r", offset)
            except FileNotFoundError:
                if not self._is_remote:
                    raise
                # Another process has just made room.

    def _make_room(self, newest: Path) -> None:
        """Removes the chunks that were opened longest ago; who has them open can go on reading."""
        if self._max_cache_bytes is None:
            return
        held = []
        for file in self._cache.rglob(f"*{CHUNK_SUFFIX}"):
            with suppress(FileNotFoundError):  # of another process that makes room
                stat = file.stat()
                held.append((stat.st_mtime_ns, stat.st_size, file))
        total = sum(size for _, size, _ in held)
        for _, size, file in sorted(held):
            if total <= self._max_cache_bytes:
                return
            if file != newest:
                file.unlink(missing_ok=True)
                total -= size

    def _fetch(self, name: str, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        url = f"{self.path.rstrip('/')}/{name}"
        # Its own name for each process: two that fetch the same chunk do the work twice, and neither waits or fails.
        partial = local.with_name(f"{local.name}.{os.getpid()}.part")
        try:
            get_downloader(self.path, str(local.parent), []).download_file(url, str(partial))
            os.replace(partial, local)
        except ModuleNotFoundError as error:
            raise ValueError(f"Reading {url} needs a package that is not installed: {error}") from error
        except Exception as error:  # each service has its own
            raise ValueError(f"{url} cannot be read ({type(error).__name__}: {error}).") from error


def _in_bytes(size: int | str | None) -> int | None:
    if size is None:
        return None
    try:
        count = int(size) if str(size).isdigit() else _convert_bytes_to_int(str(size))
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"max_cache_size {size!r} is no size: write it as 20GB, 500MB or a number of bytes.")
    return count


class TokenBlocks:
    """Blocks of `block_size` tokens of one split; blocks do not cross chunks.

    Args:
        folder: The folder.
        split: "train" or "val".
        block_size: Tokens in a block.

    Raises:
        ValueError: There are not as many tokens as the manifest says, or a chunk is cut short. Of a set behind a URL,
            chunks are looked at when they are fetched.
    """

    def __init__(self, folder: TokenFolder, split: str, block_size: int) -> None:
        self._folder = folder
        self._split = split
        self._block_size = block_size
        self._dtype = np.dtype(folder.manifest.token_dtype)
        chunks = read_index(folder.file(f"{split}/{INDEX_NAME}"))
        self._files = [(f"{split}/{chunk.name}", chunk.header) for chunk in chunks]
        self.chunk_sizes = tuple(chunk.tokens // block_size for chunk in chunks)
        self._bytes = [chunk.header + chunk.tokens * self._dtype.itemsize for chunk in chunks]
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()
        indexed, prepared = sum(chunk.tokens for chunk in chunks), folder.manifest.splits[split].tokens
        if indexed != prepared:
            raise ValueError(
                f"{folder.path}: the {split} split has {indexed} tokens, and {prepared} were prepared: copy the folder"
                " again, or prepare it again."
            )
        for chunk in range(len(chunks) if folder.is_local else 0):
            self._check(chunk)

    def __len__(self) -> int:
        return sum(self.chunk_sizes)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_maps": OrderedDict()}  # each process opens its own

    def read(self, chunk: int, block: int) -> torch.Tensor:
        """Block number `block` of a chunk, an int64 tensor [block_size].

        Raises:
            ValueError: The chunk is cut short, or has an id that is not in the vocabulary.
        """
        if chunk not in self._maps:
            name, offset = self._check(chunk)
            self._maps[chunk] = self._folder.open(name, self._dtype, offset)
            if len(self._maps) > OPEN_CHUNKS:
                self._maps.popitem(last=False)
        start = block * self._block_size
        ids = self._maps[chunk][start : start + self._block_size]
        low, high, size = ids.min(), ids.max(), self._folder.manifest.vocab_size
        if low < 0 or high >= size:  # on a GPU the lookup would end the process, and say nothing of the data
            raise ValueError(
                f"{self._folder.file(self._files[chunk][0])} has token id {low if low < 0 else high} and the vocabulary"
                f" {size} tokens: copy it again, or prepare it again."
            )
        return torch.from_numpy(ids.astype(np.int64))

    def _check(self, chunk: int) -> tuple[str, int]:
        """The name of a chunk, all of which is there, and how long its header is."""
        name, offset = self._files[chunk]
        file = self._folder.file(name)
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            size = 0 if self._folder.is_local else self._bytes[chunk]  # another process has made room: fetched again
        if size != self._bytes[chunk]:
            raise ValueError(f"{file} has {size} bytes of {self._bytes[chunk]}: copy it again, or prepare it again.")
        return name, offset
