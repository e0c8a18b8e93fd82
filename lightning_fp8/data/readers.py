"""The documents of one file, in pieces, in constant memory.

A document is a text file, a line of a JSON Lines file, or a row of a Parquet file or of a Hugging Face `datasets`
folder. Long documents come in pieces of about a mebibyte, so that memory does not grow with them and several
processes can work on one. A piece ends at a boundary of the tokenizer's (`boundaries.py`), so that pieces have the same
tokens as the whole. Text files and lines are read in parts; a row of a table is in memory whole, as its formats have
it, and no more than one if it is large.

Each piece says how many bytes of its file it stands for; over a file they add up to its size. That is what makes
progress exact, also where the text is compressed or escaped.
"""

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_fp8.data.boundaries import Boundary, next_boundary
from lightning_fp8.data.json_lines import Part, read_texts

PIECE_CHARACTERS = 1 << 20
BLOCK_BYTES = 1 << 20
ROWS = 256  # of a table that are decoded at once; fewer where they are long
TEXT_SUFFIXES = frozenset({".txt", ".text", ".py", ".md", ".rst"})
BINARY_SUFFIXES = frozenset({".parquet", ".arrow"})
SUFFIXES = TEXT_SUFFIXES | {".jsonl"} | BINARY_SUFFIXES


class Piece(NamedTuple):
    """A stretch of a document.

    Attributes:
        text: The characters; empty only in the last piece of an empty document.
        is_last: Whether the document ends here.
        source_bytes: Bytes of the file that were read for it.
    """

    text: str
    is_last: bool
    source_bytes: int


def hash_file(path: Path) -> tuple[str, bool]:
    """Hash a file and find out whether it can be read, in constant memory.

    Args:
        path: The file.

    Returns:
        The hexadecimal hash of its content, and whether its content is UTF-8 text (or a binary table).
    """
    digest = hashlib.blake2b(digest_size=16)
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_text = path.suffix not in BINARY_SUFFIXES
    readable = True
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            if is_text and readable:
                readable = b"\0" not in block and _decodes(decoder, block)
    return digest.hexdigest(), readable and (not is_text or _decodes(decoder, b"", final=True))


def read_pieces(path: Path, boundary: Boundary | None) -> Iterator[Piece]:
    """Read a file that `hash_file` found readable.

    Args:
        path: The file.
        boundary: Where pieces can end; with None documents stay whole.

    Yields:
        The pieces of its documents, byte for byte as in the file (no newline is translated).

    Raises:
        ValueError: A line or a row without the text it should have.
    """
    readers = {".jsonl": read_texts, ".parquet": _read_parquet, ".arrow": _read_arrow}
    for parts in readers.get(path.suffix, _read_text)(path):
        yield from cut(parts, boundary)


def iterate_pieces(texts: Iterable[str], name: str, boundary: Boundary | None) -> Iterator[Piece]:
    """The pieces of documents that a generator gives.

    Args:
        texts: The documents.
        name: The generator's, for errors.
        boundary: Where pieces can end; with None documents stay whole.

    Yields:
        Their pieces; `source_bytes` are those of the text.

    Raises:
        ValueError: Something that is not a string.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} gave {type(text).__name__} {text!r:.40}: each document must be a string.")
        yield from cut([(text, len(text.encode("utf-8", "replace")))], boundary)


def cut(parts: Iterable[Part], boundary: Boundary | None, characters: int | None = None) -> Iterator[Piece]:
    """A document in pieces: each ends at the first boundary from so many characters on.

    Args:
        parts: Of the document, in order, with the bytes that each stands for.
        boundary: Where pieces can end; with None the document stays whole.
        characters: By default `PIECE_CHARACTERS`.

    Yields:
        The pieces.
    """
    size = characters or PIECE_CHARACTERS
    text, read, searched = "", 0, 0
    for part, source_bytes in parts:
        text += _as_utf8(part)
        read += source_bytes
        start = 0
        while boundary and len(text) - start > size:
            end = next_boundary(text, max(start + size, searched), boundary)
            searched = end or len(text)  # what was searched in vain is not searched again
            if end is None:
                break
            share = read * (end - start) // (len(text) - start)
            yield Piece(text[start:end], False, share)
            start, read = end, read - share
        text = text[start:]
        searched = max(0, searched - start)
    yield Piece(text, True, read)


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return True


def _as_utf8(text: str) -> str:
    # Python and JSON can hold half a surrogate pair, which is no character and has no UTF-8 form: it becomes "?".
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _read_text(path: Path) -> Iterator[Iterator[Part]]:
    yield _text_parts(path)


def _text_parts(path: Path) -> Iterator[Part]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield decoder.decode(block), len(block)


def _read_parquet(path: Path) -> Iterator[list[Part]]:
    pyarrow = _import_pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}): correct or remove it.") from error
    with table:
        _check_text_column(path, table.schema_arrow, pyarrow.types)
        size, rows, done = path.stat().st_size, max(1, table.metadata.num_rows), 0
        for group in range(table.num_row_groups):
            held = table.metadata.row_group(group)
            at_once = _rows_at_once(held.total_byte_size, held.num_rows)
            for batch in table.iter_batches(at_once, row_groups=[group], columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield [(text or "", size * (done + 1) // rows - size * done // rows)]
                    done += 1


def _read_arrow(path: Path) -> Iterator[list[Part]]:
    pyarrow = _import_pyarrow(path)
    with pyarrow.memory_map(str(path)) as mapped:
        try:
            batches = pyarrow.ipc.open_stream(mapped)  # the format of `Dataset.save_to_disk`
            _check_text_column(path, batches.schema, pyarrow.types)
            before = 0
            for batch in batches:
                read, rows = mapped.tell() - before, max(1, batch.num_rows)
                before += read
                texts = batch.column("text")
                at_once = _rows_at_once(texts.nbytes, rows)
                for start in range(0, batch.num_rows, at_once):
                    for index, text in enumerate(texts.slice(start, at_once).to_pylist(), start):
                        yield [(text or "", read * (index + 1) // rows - read * index // rows)]
            yield [("", mapped.size() - before)]
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not an Arrow stream ({error}): correct or remove it.") from error


def _rows_at_once(size: int, rows: int) -> int:
    """So many rows of `size` bytes of them that they are a block together, at most `ROWS`."""
    return max(1, min(ROWS, BLOCK_BYTES * rows // max(1, size)))


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ValueError(f"Reading {path} needs pyarrow: run `pip install pyarrow`.") from error
    return pyarrow


def _check_text_column(path: Path, schema: Any, types: Any) -> None:
    column = schema.field("text") if "text" in schema.names else None
    if column is None or not (types.is_string(column.type) or types.is_large_string(column.type)):
        raise ValueError(f"{path} has no string column `text`, its columns are {schema.names}: rename the one to read.")
