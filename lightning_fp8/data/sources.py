"""Documents from files, one at a time and in a fixed order, and the split each belongs to.

A document is a text file, a line of a JSON Lines file or a row of a Parquet file. Everything is an iterator,
so that the memory needed is that of the largest document (or Parquet batch) and not of the corpus; the price
is that each pass over the corpus reads it again. The word `stdlib` names a corpus that every machine has: the
source code of the running interpreter's own standard library.
"""

import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib"
TRAIN, VAL = "train", "val"
TEXT_SUFFIXES = frozenset({".txt", ".text", ".py", ".md", ".rst"})
SUFFIXES = TEXT_SUFFIXES | {".jsonl", ".parquet"}
# Tests are not typical code, and installed packages are not part of the library.
STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 256


@dataclass(frozen=True)
class Document:
    """One text and the relative name of the file it came from, such as `stdlib/json/decoder.py`."""

    file: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: its relative name, its path, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Split:
    """Which split a document belongs to, by a hash: adding files never moves the others across."""

    seed: int
    val_fraction: float
    by_file: bool

    def __call__(self, file: str, index: int) -> str:
        """Give the split of document number `index` of `file`, "train" or "val"."""
        name = f"{self.seed}:{file}" if self.by_file else f"{self.seed}:{file}:{index}"
        digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        return VAL if int.from_bytes(digest) / 2**64 < self.val_fraction else TRAIN


def list_files(sources: Sequence[str]) -> list[SourceFile]:
    """List the files of the sources: sources in the order given, the files of a folder sorted.

    Args:
        sources: Files, folders (walked recursively, without hidden entries), or `stdlib`.

    Returns:
        Every file once, even when two sources hold it.

    Raises:
        ValueError: A path is missing, a file has a type that can not be read, or no file is found.
    """
    found: dict[Path, SourceFile] = {}
    for source in sources:
        for name, path in _walk_source(source):
            found.setdefault(path.resolve(), SourceFile(name, path, path.stat().st_size))
    if not found:
        raise ValueError(
            f"No file to read in {list(sources)}: give files or folders with {', '.join(sorted(SUFFIXES))}, "
            f"or the word {STDLIB!r}."
        )
    return list(found.values())


def inspect_file(file: SourceFile) -> tuple[str, bool]:
    """Hash a file and find out whether it can be read, in constant memory.

    Args:
        file: The file.

    Returns:
        The hexadecimal hash of its content, and whether its content is UTF-8 text (or Parquet).
    """
    digest = hashlib.blake2b(digest_size=16)
    decoder = codecs.getincrementaldecoder("utf-8")()
    readable = True
    with file.path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            if readable and file.path.suffix != ".parquet":
                readable = b"\0" not in block and _decodes(decoder, block)
    return digest.hexdigest(), readable and (file.path.suffix == ".parquet" or _decodes(decoder, b"", final=True))


def read_documents(file: SourceFile) -> Iterator[str]:
    """Read the non-empty documents of a readable file.

    Args:
        file: A file that `inspect_file` found readable.

    Yields:
        The texts, byte for byte as in the file (no newline is translated).

    Raises:
        ValueError: A line or a row without the text it should have.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return (text for text in readers.get(file.path.suffix, _read_text)(file.path) if text)


def choose_split(files: Sequence[SourceFile], seed: int, val_fraction: float) -> Split:
    """Choose to split by file, or by document where whole files would leave a split empty.

    Args:
        files: The readable files.
        seed: Seed of the split.
        val_fraction: Share of the files, or of the documents, for validation.

    Returns:
        A split with at least one document on either side.

    Raises:
        ValueError: There is none.
    """
    for by_file in (True, False):
        split = Split(seed, val_fraction, by_file)
        # Reads up to the first document of each split, not the corpus.
        if all(next(split_documents(files, split, name), None) for name in (TRAIN, VAL)):
            return split
    raise ValueError(
        f"With val_fraction {val_fraction} and seed {seed}, one split of the {len(files)} readable files is "
        "empty: give more files or documents (a text file is one document), or change val_fraction or seed."
    )


def split_documents(files: Sequence[SourceFile], split: Split, name: str) -> Iterator[Document]:
    """Read the documents of one split.

    Args:
        files: The readable files.
        split: What decides.
        name: "train" or "val".

    Yields:
        The documents, in the order of the files.
    """
    for file in files:
        if split.by_file and split(file.name, 0) != name:
            continue
        for index, text in enumerate(read_documents(file)):
            if split(file.name, index) == name:
                yield Document(file.name, text)


def _walk_source(source: str) -> Iterator[tuple[str, Path]]:
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from _walk_folder(root, STDLIB, frozenset({".py"}), STDLIB_LEFT_OUT)
        return
    path = Path(source)
    if path.is_dir():
        yield from _walk_folder(path, path.resolve().name, SUFFIXES, frozenset())
    elif not path.exists():
        raise ValueError(f"Source {source!r} does not exist: give a file, a folder, or the word {STDLIB!r}.")
    elif path.suffix not in SUFFIXES:
        raise ValueError(f"Source {source!r} has none of the types that can be read: {', '.join(sorted(SUFFIXES))}.")
    else:
        yield path.name, path


def _walk_folder(
    root: Path, label: str, suffixes: frozenset[str], left_out: frozenset[str]
) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        # Assigned in place: this is how os.walk is told where to descend, and in which order.
        folders[:] = sorted(name for name in folders if _is_visible(name) and name not in left_out)
        for name in sorted(files):
            path = Path(folder, name)
            if _is_visible(name) and path.suffix in suffixes and path.is_file():
                yield f"{label}/{path.relative_to(root).as_posix()}", path


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return True


def _read_text(path: Path) -> Iterator[str]:
    yield path.read_bytes().decode()


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f'{path}:{number}: expected an object with the text as a string, {{"text": "..."}}; '
                    "correct or remove the line."
                )
            # JSON can hold half a surrogate pair, which is no character and has no UTF-8 form: it becomes "?".
            yield text.encode("utf-8", "replace").decode()


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"Reading {path} needs pyarrow: run `pip install pyarrow`.") from error
    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}): correct or remove it.") from error
    with table:
        column = table.schema_arrow.field("text") if "text" in table.schema_arrow.names else None
        if column is None or not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            raise ValueError(
                f"{path} has no string column `text`, its columns are {table.schema_arrow.names}: "
                "rename the one to read."
            )
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())
