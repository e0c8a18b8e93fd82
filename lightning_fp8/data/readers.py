"""The documents of one file, in pieces, in constant memory.

A document is a text file, a line of a JSON Lines file, or a row of a Parquet file or of a Hugging Face `datasets`
folder. Long documents come in pieces of about a mebibyte, so that memory does not grow with them and several
processes can work on one. A piece ends where a letter is followed by white space: there every byte-level tokenizer
in use (GPT-2, Llama 3, Qwen) ends a word too, so that pieces have the same tokens as the whole.

Each piece says how many bytes of its file it stands for; over a file they add up to its size. That is what makes
progress exact, also where the text is compressed or escaped.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PIECE_CHARACTERS = 1 << 20
BLOCK_BYTES = 1 << 20
ROWS = 256
TEXT_SUFFIXES = frozenset({".txt", ".text", ".py", ".md", ".rst"})
BINARY_SUFFIXES = frozenset({".parquet", ".arrow"})
SUFFIXES = TEXT_SUFFIXES | {".jsonl"} | BINARY_SUFFIXES

_WORD_END = re.compile(r"[^\W\d_](?=\s)")


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


def read_pieces(path: Path) -> Iterator[Piece]:
    """Read a file that `hash_file` found readable.

    Args:
        path: The file.

    Yields:
        The pieces of its documents, byte for byte as in the file (no newline is translated).

    Raises:
        ValueError: A line or a row without the text it should have.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".arrow": _read_arrow}
    return readers.get(path.suffix, _read_text)(path)


def iterate_pieces(texts: Iterable[str], name: str) -> Iterator[Piece]:
    """The pieces of documents that a generator gives.

    Args:
        texts: The documents.
        name: The generator's, for errors.

    Yields:
        Their pieces; `source_bytes` are those of the text.

    Raises:
        ValueError: Something that is not a string.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} gave {type(text).__name__} {text!r:.40}: each document must be a string.")
        yield from _cut(_as_utf8(text), len(text.encode("utf-8", "replace")))


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return True


def _as_utf8(text: str) -> str:
    # Python and JSON can hold half a surrogate pair, which is no character and has no UTF-8 form: it becomes "?".
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _last_word_end(text: str) -> int:
    """Where the last word that white space follows ends; 0 if there is none."""
    for start in (max(0, len(text) - 4096), 0):
        if ends := [match.end() for match in _WORD_END.finditer(text, start)]:
            return ends[-1]
    return 0


def in_slices(text: str, characters: int) -> Iterator[str]:
    """`text` in slices of at most so many characters, each ending with a word, or whole where no word ends."""
    while len(text) > characters and (end := _last_word_end(text[:characters])):
        yield text[:end]
        text = text[end:]
    yield text


def _cut(text: str, source_bytes: int) -> Iterator[Piece]:
    """A whole document in pieces."""
    while len(text) > PIECE_CHARACTERS and (end := _last_word_end(text[:PIECE_CHARACTERS])):
        share = source_bytes * end // len(text)
        yield Piece(text[:end], False, share)
        text, source_bytes = text[end:], source_bytes - share
    yield Piece(text, True, source_bytes)


def _read_text(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, read = "", 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            text += decoder.decode(block)
            read += len(block)
            if len(text) > PIECE_CHARACTERS and (end := _last_word_end(text)):
                yield Piece(text[:end], False, read)
                text, read = text[end:], 0
    yield Piece(text + decoder.decode(b"", final=True), True, read)


def _read_jsonl(path: Path) -> Iterator[Piece]:
    blank = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                blank += len(line)
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
            yield from _cut(_as_utf8(text), len(line) + blank)
            blank = 0
    if blank:
        yield Piece("", True, blank)


def _read_parquet(path: Path) -> Iterator[Piece]:
    pyarrow = _import_pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}): correct or remove it.") from error
    with table:
        _check_text_column(path, table.schema_arrow, pyarrow.types)
        size, rows, done = path.stat().st_size, max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=ROWS, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield from _cut(text or "", size * (done + 1) // rows - size * done // rows)
                done += 1


def _read_arrow(path: Path) -> Iterator[Piece]:
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
                for start in range(0, batch.num_rows, ROWS):
                    for index, text in enumerate(texts.slice(start, ROWS).to_pylist(), start):
                        yield from _cut(text or "", read * (index + 1) // rows - read * index // rows)
            yield Piece("", True, mapped.size() - before)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not an Arrow stream ({error}): correct or remove it.") from error


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
