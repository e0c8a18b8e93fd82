"""Where the documents come from, in which order, and the split each belongs to.

A source is a file, a folder, a Hugging Face `datasets` folder, or the word `stdlib`, which names a corpus that every
machine has: the source code of the running interpreter's own standard library. Besides sources there can be one
generator, an iterable of strings by class path. Everything is an iterator; the price of constant memory is that each
pass over the corpus reads it again.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_fp8.data.boundaries import BEFORE_ANY, Boundary
from lightning_fp8.data.readers import SUFFIXES, TEXT_SUFFIXES, Piece, iterate_pieces, read_pieces

STDLIB = "stdlib"
TRAIN, VAL = "train", "val"
# Tests are not typical code, and installed packages are not part of the library.
STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


class SourceFile(NamedTuple):
    """A file of the corpus: its relative name, such as `stdlib/json/decoder.py`, its path, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Generator:
    """An iterable of documents by class path; it must give the same ones each time, since it is read several times.

    Attributes:
        class_path: Importable name of a class or function; what it returns is iterated.
        init_args: Its keyword arguments.
    """

    class_path: str
    init_args: Mapping[str, Any]

    @classmethod
    def of(cls, spec: "str | Mapping[str, Any]") -> "Generator":
        """Read `class_path`, or `{class_path: ..., init_args: {...}}`.

        Raises:
            ValueError: It is neither.
        """
        fields: dict[str, Any] = {"class_path": spec} if isinstance(spec, str) else dict(spec)
        if set(fields) - {"class_path", "init_args"} or not isinstance(fields.get("class_path"), str):
            raise ValueError(f"generator {spec!r} is neither a class path nor {{class_path: ..., init_args: ...}}.")
        return cls(fields["class_path"], fields.get("init_args") or {})

    def __call__(self) -> Iterable[str]:
        """The documents.

        Raises:
            ValueError: There is no such class, or it does not take these arguments.
        """
        module, _, name = self.class_path.rpartition(".")
        try:
            factory = getattr(__import__(module, fromlist=[name]), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"generator {self.class_path} cannot be imported ({error}): correct the path.") from error
        try:
            documents: Iterable[str] = factory(**self.init_args)
        except TypeError as error:
            raise ValueError(f"generator {self.class_path} cannot be called ({error}): correct init_args.") from error
        return documents


class Split(NamedTuple):
    """Which split a document belongs to, by a hash: adding documents never moves the others across.

    A text file is one document, named by its path; those of other files are numbered.
    """

    seed: int
    val_fraction: float

    def __call__(self, file: str, index: int) -> str:
        """Give the split of document number `index` of `file`, "train" or "val"."""
        is_document = os.path.splitext(file)[1] in TEXT_SUFFIXES
        name = f"{self.seed}:{file}" if is_document else f"{self.seed}:{file}:{index}"
        digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        return VAL if int.from_bytes(digest) / 2**64 < self.val_fraction else TRAIN


class SplitPiece(NamedTuple):
    """A piece, the file it came from and the split its document belongs to."""

    file: str
    split: str
    piece: Piece


def list_files(sources: Sequence[str]) -> list[SourceFile]:
    """List the files of the sources: sources in the order given, the files of a folder sorted.

    Args:
        sources: Files, folders (walked recursively, without hidden entries), folders that `Dataset.save_to_disk`
            wrote, or `stdlib`.

    Returns:
        Every file once, even when two sources hold it.

    Raises:
        ValueError: A path is missing, a file has a type that can not be read, or no file is found.
    """
    found: dict[Path, SourceFile] = {}
    for source in sources:
        for name, path in _walk_source(source):
            found.setdefault(path.resolve(), SourceFile(name, path, path.stat().st_size))
    if sources and not found:
        raise ValueError(
            f"No file to read in {list(sources)}: give files or folders with {', '.join(sorted(SUFFIXES))}, "
            f"or the word {STDLIB!r}."
        )
    return list(found.values())


def split_pieces(
    files: Sequence[SourceFile], generator: Generator | None, split: Split, boundary: Boundary | None = BEFORE_ANY
) -> Iterator[SplitPiece]:
    """Read every document, each in the split it belongs to.

    Args:
        files: The readable files.
        generator: Read after them.
        split: What decides.
        boundary: Where pieces can end.

    Yields:
        The pieces of the documents, in order.
    """
    for file in files:
        yield from _with_split(file.name, read_pieces(file.path, boundary), split)
    if generator:
        name = generator.class_path
        yield from _with_split(name, iterate_pieces(generator(), name, boundary), split)


def check_splits(files: Sequence[SourceFile], generator: Generator | None, split: Split) -> None:
    """Check that neither split is empty; reads up to the first document of each, not the corpus.

    Raises:
        ValueError: One is.
    """
    missing = {TRAIN, VAL}
    for piece in split_pieces(files, generator, split):
        if piece.piece.text:
            missing.discard(piece.split)
        if not missing:
            return
    raise ValueError(
        f"With val_fraction {split.val_fraction} and seed {split.seed}, one split of the {len(files)} readable files "
        "is empty: give more files or documents (a text file is one document), or change val_fraction or seed."
    )


def _with_split(name: str, pieces: Iterator[Piece], split: Split) -> Iterator[SplitPiece]:
    index = 0
    for piece in pieces:
        yield SplitPiece(name, split(name, index), piece)
        index += piece.is_last


def _walk_source(source: str) -> Iterator[tuple[str, Path]]:
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from _walk_folder(root, STDLIB, frozenset({".py"}), STDLIB_LEFT_OUT)
        return
    path = Path(source)
    if (path / "dataset_dict.json").exists():
        names = ", ".join(json.loads((path / "dataset_dict.json").read_text())["splits"])
        raise ValueError(f"Source {source!r} holds the data sets {names}: give the folder of the one to train on.")
    if (path / "state.json").exists():  # `Dataset.save_to_disk`; other Arrow files in there are caches
        for file in json.loads((path / "state.json").read_text())["_data_files"]:
            yield f"{path.resolve().name}/{file['filename']}", path / file["filename"]
    elif path.is_dir():
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
