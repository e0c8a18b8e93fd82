"""The token ids of both splits as flat files, with a journal from which a killed preparation goes on.

A commit first flushes the ids and then replaces the journal, which says how many pieces of text they stand for. What
was written after the last commit is cut off again, so the files are the same bytes however often and wherever the
process was killed. The pieces before the commit are read again, which is quick, but not tokenised again.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from lightning_fp8.data.manifest import SplitInfo, write_json
from lightning_fp8.data.sources import TRAIN, VAL, SplitPiece

COMMIT_SECONDS = 5.0
JOURNAL_NAME = "journal.json"

Encode = Callable[[Iterator[SplitPiece]], Iterator[tuple[SplitPiece, bytes]]]


@dataclass
class _Counts:
    """What has been written of a split; `SplitInfo` has the meaning of the fields."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    last_file: str = ""


@dataclass
class _Journal:
    """The state at a commit.

    Attributes:
        pieces: Pieces that the files hold.
        in_document: Whether the document of the last piece goes on and has had text.
        splits: What was written of each split.
        gzip_bits_per_byte: Of the validation text; None while there are pieces to come.
    """

    pieces: int = 0
    in_document: bool = False
    splits: dict[str, _Counts] = field(default_factory=lambda: {TRAIN: _Counts(), VAL: _Counts()})
    gzip_bits_per_byte: float | None = None

    @classmethod
    def load(cls, path: Path) -> "_Journal":
        if not path.exists():
            return cls()
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: _Counts(**counts) for name, counts in fields.pop("splits").items()}
        return cls(**fields, splits=splits)


def flat_file(folder: Path, split: str) -> Path:
    """Where the ids of a split are."""
    return folder / f"{split}.ids"


def spool(
    folder: Path,
    pieces: Iterator[SplitPiece],
    encode: Encode,
    end_of_text: bytes,
    advance: Callable[[int], None],
) -> dict[str, SplitInfo]:
    """Write the ids of all pieces, from where an earlier call on the same pieces was interrupted.

    Args:
        folder: Where the flat files and the journal are.
        pieces: All pieces, always the same ones in the same order.
        encode: From pieces to their ids, in order, as the bytes of an array.
        end_of_text: The id, as bytes, that follows each document that is not empty.
        advance: Told the source bytes that are done.

    Returns:
        The size of each split.
    """
    journal = _Journal.load(folder / JOURNAL_NAME)
    if journal.gzip_bits_per_byte is None:
        _write(folder, journal, pieces, encode, end_of_text, advance)
    return {
        name: SplitInfo(
            counts.files,
            counts.documents,
            counts.bytes,
            counts.tokens,
            journal.gzip_bits_per_byte if name == VAL else None,
        )
        for name, counts in journal.splits.items()
    }


def _write(
    folder: Path,
    journal: _Journal,
    pieces: Iterator[SplitPiece],
    encode: Encode,
    end_of_text: bytes,
    advance: Callable[[int], None],
) -> None:
    gzip, gzip_bytes = zlib.compressobj(9, zlib.DEFLATED, 31), 0
    for _, split, piece in islice(pieces, journal.pieces):  # a compressor's state cannot be kept
        if split == VAL:
            gzip_bytes += len(gzip.compress(piece.text.encode()))
        advance(piece.source_bytes)

    flat = {name: flat_file(folder, name).open("ab") for name in (TRAIN, VAL)}
    try:
        for name, counts in journal.splits.items():
            flat[name].truncate(counts.tokens * len(end_of_text))

        def commit() -> None:
            for file in flat.values():
                file.flush()
                os.fsync(file.fileno())
            write_json(folder / JOURNAL_NAME, asdict(journal))

        committed = time.monotonic()
        for (file, split, piece), ids in encode(pieces):
            counts, text = journal.splits[split], piece.text.encode()
            if text and not journal.in_document:
                journal.in_document = True
                counts.documents += 1
                counts.files += file != counts.last_file
                counts.last_file = file
            if piece.is_last and journal.in_document:
                journal.in_document = False
                ids += end_of_text
            flat[split].write(ids)
            counts.tokens += len(ids) // len(end_of_text)
            counts.bytes += len(text)
            if split == VAL:
                gzip_bytes += len(gzip.compress(text))
            journal.pieces += 1
            advance(piece.source_bytes)
            if time.monotonic() - committed > COMMIT_SECONDS:
                commit()
                committed = time.monotonic()
        gzip_bytes += len(gzip.flush())
        journal.gzip_bits_per_byte = 8 * gzip_bytes / max(1, journal.splits[VAL].bytes)
        commit()
    finally:
        for open_file in flat.values():
            open_file.close()
