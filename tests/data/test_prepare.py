import gzip
import importlib
import json
import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from litdata.streaming.item_loader import TokensLoader
from rich.progress import Progress, TaskID
from tokenizers import Regex, pre_tokenizers, trainers

from lightning_fp8.data import END_OF_TEXT, Manifest, chunks, load_tokenizer, prepare, readers, train_tokenizer
from lightning_fp8.data.boundaries import BEFORE_ANY
from lightning_fp8.data.manifest import MANIFEST_VERSION
from lightning_fp8.data.readers import hash_file, read_pieces
from lightning_fp8.data.sources import list_files

PREPARE = importlib.import_module("lightning_fp8.data.prepare")  # the package's attribute is the function
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
OPTIONS = {"vocab_size": 300, "val_fraction": 0.3}


def words(seed: int, count: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count)) + "\n"


def iter_documents(sources):
    """Every document that is not empty, (file, text), of the readable files of the sources."""
    for file in list_files(sources):
        text = ""
        for piece in read_pieces(file.path, BEFORE_ANY) if hash_file(file.path)[1] else ():
            text += piece.text
            if piece.is_last:
                if text:
                    yield file.name, text
                text = ""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "b" / "__pycache__").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for i in range(12):
        (folder / "b" / f"{i:02}.txt").write_text(words(i))
    (folder / "a.md").write_bytes(b"one\r\ntwo\r\n")
    (folder / "empty.py").touch()
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "cut.txt").write_bytes("é".encode()[:1])
    (folder / "binary.txt").write_bytes(b"a\0b")
    for ignored in ("data.bin", ".hidden/x.txt", ".y.txt", "b/__pycache__/z.py"):
        (folder / ignored).write_text("ignored")
    return folder


def tokens_of(folder: Path, split: str, dtype: str = "uint16") -> list[int]:
    index = json.loads((folder / split / "index.json").read_text())
    parts = []
    for chunk in index["chunks"]:
        offset = 4 * (chunk["chunk_size"] + 2)
        parts.append(np.fromfile(folder / split / chunk["filename"], dtype, offset=offset))
    return np.concatenate(parts).tolist()


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    texts: list[list[int]] = [[]]
    for token in tokens_of(folder, split):
        texts[-1].append(token)
        if token == tokenizer.token_to_id(END_OF_TEXT):
            texts.append([])
    assert texts.pop() == []  # the last document is ended too
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in texts]


def test_list_files(corpus: Path) -> None:
    names = [file.name for file in list_files([str(corpus)])]
    assert names == [
        *(f"corpus/{name}" for name in ("a.md", "binary.txt", "cut.txt", "empty.py", "latin.txt")),
        *(f"corpus/b/{i:02}.txt" for i in range(12)),
    ]
    twice = list_files([str(corpus / "a.md"), str(corpus), str(corpus / "b")])
    assert len(twice) == len(names)
    assert (twice[0].name, twice[0].size) == ("a.md", 10)


def test_stdlib_is_the_library_without_its_tests() -> None:
    names = [file.name for file in list_files(["stdlib"])]
    assert "stdlib/json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not {"test", "tests", "idle_test", "site-packages"} & {part for name in names for part in name.split("/")}


def test_documents_of_every_type(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "a.rst").write_bytes("no\r\nnewline é".encode())
    (folder / "b.jsonl").write_text('{"text": "first\\nline"}\n\n{"text": ""}\n{"text": "half \\ud83d pair", "id": 2}')
    table = pyarrow.table({"id": [1, 2, 3], "text": ["row", None, "last"]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    assert list(iter_documents([str(folder)])) == [
        ("c/a.rst", "no\r\nnewline é"),
        ("c/b.jsonl", "first\nline"),
        ("c/b.jsonl", "half ? pair"),
        ("c/c.parquet", "row"),
        ("c/c.parquet", "last"),
    ]


@pytest.mark.parametrize("line", ['{"text": 1}', '{"body": "a"}', "[1]", '{"text": "a"'])
def test_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*correct or remove"):
        list(iter_documents([str(path)]))


def test_source_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        list_files([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="No file to read"):
        list_files([str(tmp_path)])
    (tmp_path / "x.zip").touch()
    with pytest.raises(ValueError, match=r"x\.zip' has none of the types"):
        list_files([str(tmp_path / "x.zip")])
    (tmp_path / "x.parquet").write_text("text")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        list(iter_documents([str(tmp_path)]))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"no string column `text`.*body"):
        list(iter_documents([str(tmp_path)]))


def test_prepared_folder_holds_the_corpus(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare([str(corpus)], str(out), **OPTIONS)
    assert {path.name for path in out.iterdir()} == {"manifest.json", "tokenizer.json", "train", "val"}
    assert Manifest.load(out / "manifest.json") == manifest
    assert (manifest.skipped_files, manifest.token_dtype, manifest.vocab_size) == (3, "uint16", 300)

    documents = [text for _, text in iter_documents([str(corpus)])]
    train, val = texts_of(out, "train"), texts_of(out, "val")
    assert sorted(train + val) == sorted(documents)
    assert train == [text for text in documents if text in train]  # in the order of the files
    for name, texts in (("train", train), ("val", val)):
        split = manifest.splits[name]
        assert (split.files, split.documents) == (len(texts), len(texts))
        assert split.bytes == sum(len(text.encode()) for text in texts)
        assert split.tokens == len(tokens_of(out, name))
    assert manifest.splits["train"].gzip_bits_per_byte is None
    text = "".join(val).encode()
    assert manifest.splits["val"].gzip_bits_per_byte == 8 * len(gzip.compress(text, 9)) / len(text)


def test_same_inputs_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    first = prepare([str(corpus)], str(tmp_path / "one"), **OPTIONS, workers=1)
    second = prepare([str(corpus)], str(tmp_path / "two"), **OPTIONS, workers=3)
    assert first == second
    bins = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.bin"))
    assert [str(path) for path in bins] == ["train/chunk-0-0.bin", "val/chunk-0-0.bin"]
    for name in (*bins, "train/index.json", "val/index.json", "tokenizer.json", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


class Counted(Progress):
    """Progress that nobody sees, and that knows how far each part came."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self.parts: list[tuple[str, float, float | None]] = []

    def reset(self, task_id: TaskID, **given: Any) -> None:
        task = self.tasks[task_id]
        self.parts.append((task.description, task.completed, task.total))
        super().reset(task_id, **given)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_ends_with_the_last_byte(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers
) -> None:
    """What remains, from which the time is told, is exact."""
    progress = Counted()
    monkeypatch.setattr(PREPARE, "_progress", lambda: progress)
    (corpus / "more.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "\\u00e9 a"}\n' for _ in range(500))))
    prepare([str(corpus)], str(tmp_path / "out"), **OPTIONS, workers=workers)
    (_, completed, total) = next(part for part in progress.parts if part[0] == "tokenising")
    assert completed == total == sum(file.size for file in list_files([str(corpus)]) if hash_file(file.path)[1])


def test_many_pieces_are_one_stream(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([str(corpus)], str(tmp_path / "one"), **OPTIONS)
    monkeypatch.setattr(chunks, "ITEM_TOKENS", 50)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 400)
    prepare([str(corpus)], str(tmp_path / "two"), **OPTIONS)
    assert len(list((tmp_path / "two" / "train").glob("*.bin"))) > 2
    assert tokens_of(tmp_path / "two", "train") == tokens_of(tmp_path / "one", "train")


def test_second_run_is_a_no_op_until_an_input_changes(corpus: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    first = prepare([str(corpus)], str(out), **OPTIONS)
    shown = capsys.readouterr()  # litdata is quiet, and a progress bar is for terminals only
    tokens = [f"{first.splits[name].tokens:,}" for name in ("train", "val")]
    assert shown.out.strip() == f"{out}: {tokens[0]} training and {tokens[1]} validation tokens."
    assert not shown.err
    (out / "train" / "mark").touch()
    assert prepare([str(corpus)], str(out), **OPTIONS) == first
    assert "up to date" in capsys.readouterr().out
    assert (out / "train" / "mark").exists()

    (corpus / "a.md").write_text("changed")
    changed = prepare([str(corpus)], str(out), **OPTIONS)
    assert changed.fingerprint != first.fingerprint
    assert not (out / "train" / "mark").exists()
    reseeded = prepare([str(corpus)], str(out), **OPTIONS, seed=1)
    assert reseeded.fingerprint != changed.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_a_failure_keeps_the_prepared_folder(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    first = prepare([str(corpus)], str(out), **OPTIONS)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(PREPARE, "write_chunks", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            prepare([str(corpus)], str(out), **OPTIONS, seed=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "corpus", "out"]

    (out / "manifest.json").unlink()  # as an unfinished folder looks
    assert prepare([str(corpus)], str(out), **OPTIONS) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


@pytest.mark.parametrize("held", ["notes.txt", "train/photo.jpg"])
def test_other_files_are_not_overwritten(corpus: Path, tmp_path: Path, held: str) -> None:
    (tmp_path / "out" / held).parent.mkdir(parents=True)
    (tmp_path / "out" / held).touch()
    with pytest.raises(ValueError, match="did not write"):
        prepare([str(corpus)], str(tmp_path / "out"), **OPTIONS)
    assert (tmp_path / "out" / held).exists()


def test_no_trace_outside_the_folder(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    temporary = tmp_path / "tmp"
    (temporary / "chunks").mkdir(parents=True)
    (temporary / "chunks" / "mine.bin").touch()
    (temporary / "data").mkdir()
    (temporary / "data" / "mine").touch()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    start_method, environment = multiprocessing.get_start_method(allow_none=True), dict(os.environ)
    interrupt = signal.getsignal(signal.SIGINT)
    random.seed(3)
    expected = random.Random(3).random()

    prepare([str(corpus)], str(tmp_path / "out"), **OPTIONS)

    # Python's own multiprocessing keeps a pymp-* folder for its sockets until the process ends.
    left = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if "pymp" not in str(path))
    assert left == ["chunks", "chunks/mine.bin", "data", "data/mine"]
    assert not (tmp_path / "home").exists()
    assert multiprocessing.get_start_method(allow_none=True) == start_method
    assert signal.getsignal(signal.SIGINT) == interrupt
    assert dict(os.environ) == environment
    assert random.random() == expected


def test_one_file_is_split_by_document(tmp_path: Path) -> None:
    lines = [json.dumps({"text": words(i)}) for i in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    manifest = prepare([str(tmp_path / "x.jsonl")], str(tmp_path / "out"), **OPTIONS)
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert len(train) + len(val) == 40
    assert 4 <= len(val) <= 20
    assert {split.files for split in manifest.splits.values()} == {1}


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("only one document")
    with pytest.raises(ValueError, match="one split of the 1 readable files is empty"):
        prepare([str(tmp_path / "x.txt")], str(tmp_path / "out"), **OPTIONS)
    with pytest.raises(ValueError, match=r"val_fraction is 1\.0"):
        prepare([str(tmp_path / "x.txt")], str(tmp_path / "out"), val_fraction=1.0)
    assert not (tmp_path / "out").exists()


def test_tokenizer_is_trained_on_the_training_split_only(corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], str(tmp_path / "out"), **OPTIONS)
    tokenizer = (tmp_path / "out" / "tokenizer.json").read_bytes()
    for file in (corpus / "b").glob("*.txt"):
        if file.read_text() in texts_of(tmp_path / "out", "val"):
            file.write_text("quite other words, " * 40)
    prepare([str(corpus)], str(tmp_path / "out"), **OPTIONS)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer


def test_given_tokenizer_with_a_large_vocabulary(corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], str(tmp_path / "small"), **OPTIONS)
    tokenizer = load_tokenizer(tmp_path / "small" / "tokenizer.json")
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= {f"{i:05x}": i for i in range(300, 70_000)}
    (tmp_path / "large.json").write_text(json.dumps(content))
    manifest = prepare([str(corpus)], str(tmp_path / "large"), tokenizer=str(tmp_path / "large.json"), val_fraction=0.3)
    assert (manifest.token_dtype, manifest.vocab_size) == ("int32", 70_000)
    assert tokens_of(tmp_path / "large", "train", "int32") == tokens_of(tmp_path / "small", "train")
    blocks = litdata.StreamingDataset(str(tmp_path / "large" / "train"), item_loader=TokensLoader(block_size=8))
    assert blocks[0].tolist() == tokens_of(tmp_path / "small", "train")[:8]


@pytest.mark.parametrize(("expression", "whole"), [(None, False), (r"[^\n]+|\n+", True)])
def test_documents_are_cut_only_where_the_tokenizer_has_a_boundary(
    expression: str | None, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One of another kind is named; with either, the tokens are those of the documents as a whole."""
    texts = [words(seed) for seed in range(20)]
    tokenizer = train_tokenizer(iter(texts), 300)
    if expression:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        trainer = trainers.BpeTrainer(  # whose tokens span spaces too
            vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(5)  # as some published files have it
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 50)
    prepare([str(tmp_path / "x.jsonl")], str(tmp_path / "out"), tokenizer=str(tmp_path / "t.json"), val_fraction=0.3)
    said = capsys.readouterr().out
    assert ("t.json cuts text into words in a way of its own (pre_tokenizer" in said) is whole
    tokenizer.no_truncation()
    end = tokenizer.token_to_id(END_OF_TEXT)
    wanted = sorted([*tokenizer.encode(text).ids, end] for text in texts)
    documents: list[list[int]] = [[]]
    for token in tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "val"):
        documents[-1].append(token)
        if token == end:
            documents.append([])
    assert sorted(documents[:-1]) == wanted


def test_manifest_errors(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(ValueError, match=r"is missing: .*lightning-fp8 prepare"):
        Manifest.load(path)
    for content in ("{", "[]", "{}", f'{{"version": {MANIFEST_VERSION}, "splits": {{}}}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a manifest"):
            Manifest.load(path)
    manifest = prepare([str(corpus)], str(tmp_path / "out"), **OPTIONS)
    replace(manifest, version=MANIFEST_VERSION + 1).save(path)
    with pytest.raises(ValueError, match=f"has version {MANIFEST_VERSION + 1}.*upgrade"):
        Manifest.load(path)
