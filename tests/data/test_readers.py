import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from lightning_fp8.data import readers, train_tokenizer
from lightning_fp8.data.boundaries import BEFORE_ANY
from lightning_fp8.data.readers import Piece, cut, iterate_pieces, read_pieces
from lightning_fp8.data.sources import TRAIN, VAL, Generator, Split, list_files, split_pieces

TEXT = "some words é 漢字 (and)\r\n  more; \n\n" * 40


def documents(pieces: Iterator[Piece]) -> list[str]:
    texts = [""]
    for piece in pieces:
        texts[-1] += piece.text
        if piece.is_last:
            texts.append("")
    assert texts.pop() == ""
    return texts


def write_dataset(folder: Path, shards: list[list[str | None]]) -> None:
    """What `datasets.Dataset.save_to_disk` leaves."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.fixture
def one_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A file of each kind with the same long and short documents, read in small pieces."""
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 61)
    texts = [TEXT, "", "short", TEXT[7:]]
    (tmp_path / "x.txt").write_bytes(TEXT.encode())
    (tmp_path / "x.jsonl").write_text("\n" + "\n\n".join(json.dumps({"text": text}) for text in texts) + "\n \n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet", row_group_size=2)
    write_dataset(tmp_path / "hf", [texts])
    return [
        file.path for name in ("x.txt", "x.jsonl", "x.parquet", "hf") for file in list_files([str(tmp_path / name)])
    ]


def test_pieces_make_up_the_documents_and_the_file(one_of_each: list[Path]) -> None:
    for path in one_of_each:
        pieces = list(read_pieces(path, BEFORE_ANY))
        wanted = [TEXT] if path.suffix == ".txt" else [TEXT, "short", TEXT[7:]]
        assert [text for text in documents(iter(pieces)) if text] == wanted
        assert sum(piece.source_bytes for piece in pieces) == path.stat().st_size, path  # progress ends at 100%
        assert len(pieces) > 10
        assert max(len(piece.text) for piece in pieces) < 400


def test_pieces_end_where_words_end(one_of_each: list[Path]) -> None:
    bpe: Tokenizer = train_tokenizer(iter([TEXT]), 300)
    pieces = [piece.text for piece in read_pieces(one_of_each[0], BEFORE_ANY)]
    ids = [token for piece in pieces for token in bpe.encode(piece).ids]
    assert ids == bpe.encode(TEXT).ids


def test_a_word_stays_whole_and_so_do_documents_of_tokenizers_without_a_boundary(
    one_of_each: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "y.txt").write_text("é" * 1000 + " a" * 100)
    pieces = [piece.text for piece in read_pieces(tmp_path / "y.txt", BEFORE_ANY)]
    assert pieces[0] == "é" * 1000
    assert len(pieces) == 3
    for path in one_of_each:
        assert max(len(piece.text) for piece in read_pieces(path, None)) == len(TEXT)


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("part", [1, 10, 64, 10_000])
def test_pieces_do_not_depend_on_the_parts(part: int, size: int) -> None:
    """Each is as long as wanted, or ends at the first boundary after that; bytes add up."""
    parts = [TEXT[i : i + part] for i in range(0, len(TEXT), part)]
    pieces = list(cut([(text, len(text.encode())) for text in parts], BEFORE_ANY, size))
    whole = list(cut([(TEXT, len(TEXT.encode()))], BEFORE_ANY, size))
    assert [piece.text for piece in pieces] == [piece.text for piece in whole]
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(piece.source_bytes for piece in pieces) == len(TEXT.encode())
    longest = 9  # " words é " and the like, up to the next boundary
    assert all(size <= len(piece.text) <= size + longest for piece in pieces[:-1])


def test_few_rows_are_decoded_at_once_where_they_are_long(one_of_each: list[Path], monkeypatch) -> None:
    decoded: list[int] = []
    at_once = readers._rows_at_once
    monkeypatch.setattr(readers, "_rows_at_once", lambda *a: decoded.append(at_once(*a)) or decoded[-1])
    for path in one_of_each[2:]:
        list(read_pieces(path, BEFORE_ANY))
    assert set(decoded) == {1}
    assert at_once(1000, 1000) == 61  # of a byte each, and of BLOCK_BYTES together
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 20)
    assert at_once(1000, 1000) == readers.ROWS


def test_a_saved_dataset_is_read_without_its_caches(tmp_path: Path) -> None:
    write_dataset(tmp_path / "hf", [["a", "b", "c"], ["d", None]])
    (tmp_path / "hf" / "cache-1234.arrow").write_bytes((tmp_path / "hf" / "data-00000-of-00002.arrow").read_bytes())
    files = list_files([str(tmp_path / "hf")])
    assert [file.name for file in files] == ["hf/data-00000-of-00002.arrow", "hf/data-00001-of-00002.arrow"]
    assert [text for file in files for text in documents(read_pieces(file.path, BEFORE_ANY)) if text] == [
        "a",
        "b",
        "c",
        "d",
    ]


def test_dataset_errors(tmp_path: Path) -> None:
    write_dataset(tmp_path / "hf" / "train", [["a"]])
    (tmp_path / "hf" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="holds the data sets train, test: give the folder of the one"):
        list_files([str(tmp_path / "hf")])
    assert len(list_files([str(tmp_path / "hf" / "train")])) == 1
    (tmp_path / "x.arrow").write_text("no table at all")
    with pytest.raises(ValueError, match=r"x\.arrow is not an Arrow stream"):
        list(read_pieces(tmp_path / "x.arrow", BEFORE_ANY))


def count(number: int, prefix: str = "") -> Iterator[str]:
    return (f"{prefix}{i}" for i in range(number))


def test_a_generator_is_named_by_class_path() -> None:
    generator = Generator.of({"class_path": f"{__name__}.count", "init_args": {"number": 3, "prefix": "n"}})
    pieces = list(split_pieces([], generator, Split(0, 0.5)))
    assert [piece.piece.text for piece in pieces] == ["n0", "n1", "n2"]
    assert {piece.file for piece in pieces} == {f"{__name__}.count"}
    assert documents(iterate_pieces(["half \ud83d pair"], "x", BEFORE_ANY)) == ["half ? pair"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.Docs", "nowhere.Docs cannot be imported"),
        (f"{__name__}.missing", "missing cannot be imported"),
        ("Docs", "Docs cannot be imported"),
        ({"class": "x"}, "neither a class path nor"),
        ({"class_path": "builtins.range", "init_args": {"start": 1}}, "range"),
    ],
)
def test_generator_errors(spec: str | dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(split_pieces([], Generator.of(spec), Split(0, 0.5)))
    with pytest.raises(ValueError, match="gave int 3"):
        list(iterate_pieces([3], "numbers", BEFORE_ANY))  # type: ignore[list-item]


def test_split_is_by_text_file_and_else_by_document(tmp_path: Path) -> None:
    split = Split(seed=0, val_fraction=0.5)
    assert {split("a/x.txt", index) for index in range(20)} == {split("a/x.txt", 0)}
    assert {split("a/x.jsonl", index) for index in range(20)} == {TRAIN, VAL}
    share = sum(Split(1, 0.1)(f"{i}.py", 0) == VAL for i in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=4 * (0.09 / 5000) ** 0.5)
