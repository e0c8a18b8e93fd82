"""From text to token chunks: train a tokenizer, tokenise, write, and then put the folder in place.

The documents are tokenised on all cores into one flat file of ids for each split, which is then cut into the chunks
that litdata streams. Tokenising inside litdata's own workers would make the chunks depend on their number; this way
the same inputs give the same bytes with any number of processes, at the price of the ids being on disk twice for a
moment.

All work is done in a hidden folder next to the target. A failure leaves the target as it was and the hidden folder
for the next call, which goes on from there if its inputs are the same; see `spool`.
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lightning_fp8.data.boundaries import BEFORE_ANY, boundary_of, describe
from lightning_fp8.data.chunks import write_chunks
from lightning_fp8.data.encoding import encode_pieces
from lightning_fp8.data.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest, write_json
from lightning_fp8.data.readers import cut, hash_file
from lightning_fp8.data.sources import (
    TRAIN,
    VAL,
    Generator,
    Split,
    SplitPiece,
    check_splits,
    list_files,
    split_pieces,
)
from lightning_fp8.data.spool import flat_file, spool
from lightning_fp8.data.tokenizer import end_of_text, load_tokenizer, token_bytes, train_tokenizer
from lightning_fp8.files import hold, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_NAME = "tokenizer.json"
INPUTS_NAME = "inputs.json"
LOCK_NAME = "lock"
REPLACED_NAME = "replaced"
UINT16_VOCABULARY = 1 << 16
# More text hardly changes the tokens and keeps all cores waiting.
TOKENIZER_BYTES = 1 << 28
_SLICE_CHARACTERS = 1 << 14


def prepare(
    sources: Sequence[str] | str,
    output_dir: str,
    *,
    generator: str | dict[str, Any] | None = None,
    vocab_size: int = 2048,
    tokenizer: str | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Turn text into a folder of token chunks that `TokenDataModule` reads.

    The folder holds `manifest.json`, `tokenizer.json`, `train/` and `val/`. A folder that was prepared from
    the same inputs is left as it is; one prepared from others is replaced, once its replacement is complete.
    A call that was killed is continued by the next one with the same inputs, and gives the same bytes.

    Args:
        sources: A file or folder of text, JSON Lines or Parquet, a folder that Hugging Face's
            `Dataset.save_to_disk` wrote, or the word `stdlib`; or several, `[one, another]`; or `[]`, none, beside a
            generator.
        output_dir: The folder to write.
        generator: Class path of an iterable of documents to add, with its arguments as
            `{class_path: ..., init_args: {...}}`. It must give the same documents each time.
        vocab_size: Vocabulary of the byte-level BPE tokenizer to train on the training split.
        tokenizer: Path of a `tokenizer.json` to use instead of training one.
        val_fraction: Share of the text files, and of the documents of other files, that goes to validation.
        seed: Seed of the split.
        workers: Tokenising processes, by default one for each core. The result does not depend on it.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: An argument or a source is wrong, a split would be empty, `output_dir` holds other files, or
            another process is preparing it.
    """
    sources = [sources] if isinstance(sources, str) else sources
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: give a share between 0 and 1, both excluded.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1.")
    if not sources and not generator:
        raise ValueError("There is nothing to prepare: give sources or a generator.")
    target = Path(output_dir).resolve()
    given = load_tokenizer(tokenizer) if tokenizer else None
    made = Generator.of(generator) if generator else None

    listed = list_files(sources)
    hashed = [hash_file(file.path) for file in listed]
    files = [file for file, (_, readable) in zip(listed, hashed, strict=True) if readable and file.size]
    if listed and not files and not made:
        raise ValueError(
            f"There is no text in {len(listed)} files, such as {listed[0].path}: empty, or not UTF-8. Give others."
        )
    inputs = {
        "version": MANIFEST_VERSION,
        "files": sorted([file.name, file.size, digest] for file, (digest, _) in zip(listed, hashed, strict=True)),
        "generator": asdict(made) if made else None,
        "vocabulary": given.to_str() if given else vocab_size,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    fingerprint = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
    if (finished := _load_finished(target)) and finished.fingerprint == fingerprint:
        if _working_path(target).exists():  # killed after the folder was put in place
            with _working_folder(target, fingerprint):
                pass
        print(f"{output_dir} is up to date: {finished.splits[TRAIN].tokens:,} training tokens.")
        return finished
    _check_replaceable(target)
    split = Split(seed, val_fraction)
    check_splits(files, made, split)

    with _working_folder(target, fingerprint) as work, _progress() as progress:
        size = sum(file.size for file in files)
        pieces = functools.partial(split_pieces, files, made, split)
        task = progress.add_task("training the tokenizer", total=None)
        bpe = _choose_tokenizer(work, given, lambda: train_tokenizer(_sample(pieces(), size), vocab_size))
        vocabulary_size = len(token_bytes(bpe))
        boundary = boundary_of(bpe)
        if boundary is None:
            print(
                f"{tokenizer} cuts text into words in a way of its own ({describe(bpe)}): documents are tokenised"
                " whole, and memory grows with the longest."
            )
        dtype = np.dtype(np.uint16 if vocabulary_size <= UINT16_VOCABULARY else np.int32)
        # How much a generator will give is not known.
        progress.reset(task, description="tokenising", total=None if made else size)
        splits = spool(
            work,
            pieces(boundary),
            lambda left: encode_pieces(bpe.to_str(), dtype, left, workers or os.cpu_count() or 1),
            np.array(end_of_text(bpe), dtype).tobytes(),
            functools.partial(progress.advance, task),
        )
        manifest = Manifest(
            version=MANIFEST_VERSION,
            sources=[*sources, *([made.class_path] if made else [])],
            fingerprint=fingerprint,
            seed=seed,
            val_fraction=val_fraction,
            vocab_size=vocabulary_size,
            token_dtype=dtype.name,
            skipped_files=sum(not readable for _, readable in hashed),
            splits=splits,
            tokenizer=TOKENIZER_NAME,
        )
        progress.reset(task, description="writing chunks", total=None)
        _put_in_place(_write_folder(work, manifest), target, work / REPLACED_NAME)
    print(f"{output_dir}: {splits[TRAIN].tokens:,} training and {splits[VAL].tokens:,} validation tokens.")
    return manifest


def _working_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.unfinished")


@contextmanager
def _working_folder(target: Path, fingerprint: str) -> Iterator[Path]:
    """The folder that holds the unfinished work for `target`, and none of other inputs; removed if all goes well."""
    work = _working_path(target)
    replaced, inputs = work / REPLACED_NAME, work / INPUTS_NAME
    work.mkdir(parents=True, exist_ok=True)
    busy = f"Another process is preparing {target}: wait for it, or stop it."
    with hold(work / LOCK_NAME, busy):
        if replaced.exists() and not target.exists():  # killed while the folders changed places
            replaced.rename(target)
        if not inputs.exists() or json.loads(inputs.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            for path in set(work.iterdir()) - {work / LOCK_NAME}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(inputs, {"fingerprint": fingerprint})
        yield work
        shutil.rmtree(work)


def _choose_tokenizer(work: Path, given: "Tokenizer | None", train: Callable[[], "Tokenizer"]) -> "Tokenizer":
    """The tokenizer of the unfinished work, so that a kill does not cost its training; else the given or a new one."""
    path = work / TOKENIZER_NAME
    if not path.exists():
        write_text(path, (given or train()).to_str(pretty=True))
    return load_tokenizer(path)


def _sample(pieces: Iterator[SplitPiece], size: int) -> Iterator[str]:
    """Training text for the tokenizer: all of it, or about `TOKENIZER_BYTES` from everywhere in `size` source bytes."""
    every = max(1, round(size / TOKENIZER_BYTES))
    left = TOKENIZER_BYTES
    texts = (piece.text for _, split, piece in pieces if split == TRAIN)
    for text in itertools.islice(texts, 0, None, every):
        if left <= 0:
            return
        left -= len(text)
        # The trainer holds a number of strings before it counts them, however long they are.
        yield from (piece.text for piece in cut([(text, 0)], BEFORE_ANY, _SLICE_CHARACTERS))


def _write_folder(work: Path, manifest: Manifest) -> Path:
    """The finished folder, still in the working folder."""
    fresh = work / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    shutil.copyfile(work / TOKENIZER_NAME, fresh / manifest.tokenizer)
    for name in manifest.splits:
        write_chunks(flat_file(work, name), np.dtype(manifest.token_dtype), fresh / name, manifest.fingerprint)
    manifest.save(fresh / MANIFEST_NAME)
    return fresh


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
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # In a log file rich would leave an empty line and nothing else.
    hidden = not sys.stdout.isatty()
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, transient=True, disable=hidden)


def _put_in_place(fresh: Path, target: Path, replaced: Path) -> None:
    if target.exists():
        target.rename(replaced)
    try:
        fresh.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
