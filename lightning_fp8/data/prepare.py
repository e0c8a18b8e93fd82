"""From text to token chunks: split, train a tokenizer, tokenise, write, and then put the folder in place.

The documents are tokenised here on threads into one flat file of ids for each split, which `litdata.optimize`
then cuts into chunks in a single writer process. Tokenising inside litdata's workers would make
the chunks depend on their number; this way the same inputs give the same bytes with any number of threads, at
the price of the ids being on disk twice for a moment.

All work is done in a hidden folder next to the target. A failure leaves the target as it was.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import litdata
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from litdata.streaming.item_loader import TokensLoader
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from lightning_fp8.data.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest, SplitInfo
from lightning_fp8.data.sources import TRAIN, VAL, choose_split, inspect_file, list_files, split_documents
from lightning_fp8.data.tokenizer import Encoded, encode_documents, load_tokenizer, token_bytes, train_tokenizer

TOKENIZER_NAME = "tokenizer.json"
CHUNK_BYTES = "64MB"  # blocks do not cross chunks, so the tail of each chunk is lost: few large ones
PIECE_TOKENS = 1 << 20
UINT16_VOCABULARY = 1 << 16


def prepare(
    sources: list[str],
    output_dir: str,
    *,
    vocab_size: int = 2048,
    tokenizer: str | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Turn text into a folder of token chunks that `TokenDataModule` reads.

    The folder holds `manifest.json`, `tokenizer.json`, `train/` and `val/`. A folder that was prepared from
    the same inputs is left as it is; one prepared from others is replaced, once its replacement is complete.
    Call it from the main thread, which litdata needs.

    Args:
        sources: Files or folders of text, JSON Lines or Parquet, or the word `stdlib`.
        output_dir: The folder to write.
        vocab_size: Vocabulary of the byte-level BPE tokenizer to train on the training split.
        tokenizer: Path of a `tokenizer.json` to use instead of training one.
        val_fraction: Share of the files that goes to validation (of the documents, where there is one file
            only).
        seed: Seed of the split.
        workers: Tokenising threads, by default one for each core. The result does not depend on it.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: An argument or a source is wrong, a split would be empty, or `output_dir` holds other files.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: give a share between 0 and 1, both excluded.")
    target = Path(output_dir).resolve()
    bpe = load_tokenizer(tokenizer) if tokenizer else None

    listed = list_files(sources)
    inspected = [inspect_file(file) for file in listed]
    files = [file for file, (_, readable) in zip(listed, inspected, strict=True) if readable and file.size]
    content = sorted((file.name, file.size, digest) for file, (digest, _) in zip(listed, inspected, strict=True))
    vocabulary = bpe.to_str() if bpe else vocab_size
    inputs = json.dumps([MANIFEST_VERSION, content, vocabulary, val_fraction, seed])
    fingerprint = hashlib.blake2b(inputs.encode(), digest_size=16).hexdigest()
    if (finished := _load_finished(target)) and finished.fingerprint == fingerprint:
        print(f"{output_dir} is up to date: {finished.splits[TRAIN].tokens:,} training tokens.")
        return finished
    _check_replaceable(target)
    split = choose_split(files, seed, val_fraction)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        with _progress() as progress:
            task = progress.add_task("training the tokenizer", total=None)
            if bpe is None:
                bpe = train_tokenizer((document.text for document in split_documents(files, split, TRAIN)), vocab_size)
            bpe.save(str(fresh / TOKENIZER_NAME))
            vocabulary_size = len(token_bytes(bpe))
            dtype = np.dtype(np.uint16 if vocabulary_size <= UINT16_VOCABULARY else np.int32)
            # The text inside a Parquet file is larger than the file: its progress has no known end.
            known = all(file.path.suffix != ".parquet" for file in files)
            progress.reset(task, description="tokenising", total=sum(file.size for file in files) if known else None)
            advance = functools.partial(progress.advance, task)
            threads = workers or os.cpu_count() or 1
            splits = {}
            with _environment(TOKENIZERS_PARALLELISM="false"):  # the threads are ours
                for name in (TRAIN, VAL):
                    encoded = encode_documents(bpe, split_documents(files, split, name), threads)
                    splits[name] = _write_flat(encoded, Path(scratch, name), dtype, advance, gzip=name == VAL)
        for name in (TRAIN, VAL):
            _write_chunks(Path(scratch, name), dtype, fresh / name, Path(scratch, "litdata"))
        manifest = Manifest(
            version=MANIFEST_VERSION,
            sources=list(sources),
            fingerprint=fingerprint,
            seed=seed,
            val_fraction=val_fraction,
            vocab_size=vocabulary_size,
            token_dtype=dtype.name,
            skipped_files=sum(not readable for _, readable in inspected),
            splits=splits,
            tokenizer=TOKENIZER_NAME,
        )
        manifest.save(fresh / MANIFEST_NAME)
        _put_in_place(fresh, target, Path(scratch, "replaced"))
    print(f"{output_dir}: {splits[TRAIN].tokens:,} training and {splits[VAL].tokens:,} validation tokens.")
    return manifest


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: give another output_dir.")
    held = {path.name for path in target.iterdir()} if target.is_dir() else set()
    foreign = held - {MANIFEST_NAME, TOKENIZER_NAME, TRAIN, VAL}
    # Folders named `train` and `val` alone may well be someone's data set.
    if foreign or (held and not held & {MANIFEST_NAME, TOKENIZER_NAME}):
        raise ValueError(
            f"{target} holds files that `prepare` did not write ({', '.join(sorted(foreign or held)[:3])}) "
            "and would be replaced as a whole: give another output_dir, or empty it."
        )


def _load_finished(target: Path) -> Manifest | None:
    try:
        return Manifest.load(target / MANIFEST_NAME)
    except ValueError:  # missing or unreadable: to be prepared again either way
        return None


def _progress() -> Progress:
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    # In a log file rich would leave an empty line and nothing else.
    hidden = not sys.stdout.isatty()
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, transient=True, disable=hidden)


def _write_flat(
    encoded: Iterator[Encoded], path: Path, dtype: np.dtype, advance: Callable[[int], None], *, gzip: bool
) -> SplitInfo:
    """Write the ids of a split one after the other, and count what was written."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    files, documents, text_bytes, tokens, gzip_bytes = set[str](), 0, 0, 0, 0
    with path.open("wb") as flat:
        for document, ids in encoded:
            text = document.text.encode()
            flat.write(ids.astype(dtype).tobytes())
            if gzip:
                gzip_bytes += len(compressor.compress(text))
            files.add(document.file)
            documents, text_bytes, tokens = documents + 1, text_bytes + len(text), tokens + len(ids)
            advance(len(text))
    gzip_bytes += len(compressor.flush())
    return SplitInfo(len(files), documents, text_bytes, tokens, 8 * gzip_bytes / text_bytes if gzip else None)


def _write_chunks(flat: Path, dtype: np.dtype, folder: Path, scratch: Path) -> None:
    pieces = -(-flat.stat().st_size // (PIECE_TOKENS * dtype.itemsize))
    with _contained_litdata(scratch):
        litdata.optimize(
            functools.partial(_read_piece, str(flat), dtype.name),
            list(range(pieces)),
            str(folder),
            chunk_bytes=CHUNK_BYTES,
            item_loader=TokensLoader(),  # needed here as well: it decides the format of the chunks
            num_workers=1,
            keep_data_ordered=True,
            # Forking saves the seconds of importing torch again; the child only copies ids. It is also what
            # torch's own data loaders do on Linux, and what is not safe elsewhere.
            start_method="fork" if sys.platform == "linux" else "spawn",
            verbose=False,
        )


def _read_piece(flat: str, dtype: str, piece: int) -> torch.Tensor:
    offset = piece * PIECE_TOKENS * np.dtype(dtype).itemsize
    return torch.from_numpy(np.fromfile(flat, dtype, PIECE_TOKENS, offset=offset))


@contextmanager
def _contained_litdata(scratch: Path) -> Iterator[None]:
    """Keep `litdata.optimize` from leaving traces.

    It empties two cache folders, by default `chunks` and `data` in the system's temporary folder, whoever's
    they are; sets the process's random seeds, start method and interrupt handler; and leaves environment
    variables.
    """
    start_method = multiprocessing.get_start_method(allow_none=True)
    interrupt = signal.getsignal(signal.SIGINT)
    folders = {
        "DATA_OPTIMIZER_CACHE_FOLDER": str(scratch / "chunks"),
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(scratch / "data"),
    }
    with isolate_rng(), _environment(TOKENIZERS_PARALLELISM="false", **folders):
        try:
            yield
        finally:
            multiprocessing.set_start_method(start_method, force=True)
            signal.signal(signal.SIGINT, interrupt)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _put_in_place(fresh: Path, target: Path, replaced: Path) -> None:
    if target.exists():
        target.rename(replaced)
    try:
        fresh.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
