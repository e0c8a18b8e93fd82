"""Pieces of text to token ids, on all cores and in order.

Worker processes, not threads: cutting text into words is Python's work, and a process gives its memory back. Batches
go out a few ahead of the one that is awaited, so memory does not grow with the corpus, and come back in the order in
which they went, so that the result does not depend on the number of workers.
"""

import multiprocessing
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np

from lightning_fp8.data.sources import SplitPiece
from lightning_fp8.data.words import word_encoder

BATCH_CHARACTERS = 1 << 19  # a task long enough to hide the hand-over, short enough to keep memory small

_encode: Callable[[str], bytes]


def encode_pieces(
    tokenizer: str, dtype: "np.dtype[np.generic]", pieces: Iterator[SplitPiece], workers: int
) -> Iterator[tuple[SplitPiece, bytes]]:
    """Encode pieces, in order and in constant memory.

    Args:
        tokenizer: The tokenizer, as JSON.
        dtype: Of the ids.
        pieces: Consumed once and only a few batches ahead.
        workers: Processes; with 1, this one.

    Yields:
        Each piece with its ids, the bytes of an array [tokens].
    """
    if workers == 1:
        encode = _encoder(tokenizer, dtype)
        for piece in pieces:
            yield piece, encode(piece.piece.text)
        return
    # Forking saves the seconds of importing torch again. It is also what torch's own data loaders do on Linux, and
    # what is not safe elsewhere.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pending: deque[tuple[list[SplitPiece], Future[list[bytes]]]] = deque()
    with ProcessPoolExecutor(workers, context, _prepare_worker, (tokenizer, dtype)) as pool:
        for batch in _batches(pieces):
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking
                pending.append((batch, pool.submit(_encode_all, [piece.piece.text for piece in batch])))
            if len(pending) > 2 * workers:
                yield from _finished(*pending.popleft())
        while pending:
            yield from _finished(*pending.popleft())


def _finished(batch: list[SplitPiece], ids: Future[list[bytes]]) -> Iterator[tuple[SplitPiece, bytes]]:
    return zip(batch, ids.result(), strict=True)


def _encoder(tokenizer: str, dtype: "np.dtype[np.generic]") -> Callable[[str], bytes]:
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_str(tokenizer)
    bpe.encode_special_tokens = True  # not part of the JSON; see `load_tokenizer`
    return word_encoder(bpe, dtype)


def _prepare_worker(tokenizer: str, dtype: "np.dtype[np.generic]") -> None:
    global _encode
    _encode = _encoder(tokenizer, dtype)
    # A worker that waits for a batch would never notice that the parent was killed.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_all(texts: list[str]) -> list[bytes]:
    return [_encode(text) for text in texts]


def _batches(pieces: Iterator[SplitPiece]) -> Iterator[list[SplitPiece]]:
    batch: list[SplitPiece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
