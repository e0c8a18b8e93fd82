"""Long lines, read in parts, are what `json.loads` makes of them: with random objects, and cut at every byte."""

import json
import random
from pathlib import Path

import pytest

from lightning_fp8.data import json_lines
from lightning_fp8.data.json_lines import read_texts

TEXT = 'é"\\\n\t/\u2028 \ud83d \ude00 😀\ud83d\ud83d\ude00 漢字 ' * 3
REST = [None, True, -1.5e3, "x" * 3000, {"text": "inner", "a": ["}", '"', {"text": 1}]}, [], {}, '"text": "no"']


@pytest.fixture(params=[3, 10, 64])
def small_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LINE_BYTES", request.param)
    monkeypatch.setattr(json_lines, "PART_BYTES", request.param)


def texts_of(path: Path) -> list[str]:
    return ["".join(text for text, _ in parts) for parts in read_texts(path)]


def written(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join(lines).encode())
    return path


def random_object(generator: random.Random) -> dict[str, object]:
    items = [(f"{generator.choice(REST)!r}{i}", generator.choice(REST)) for i in range(generator.randrange(4))]
    items.insert(generator.randrange(len(items) + 1), ("text", TEXT[generator.randrange(20) :]))
    return dict(items)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("seed", range(6))
def test_parts_of_random_objects_make_up_their_text(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    objects = [random_object(generator) for _ in range(5)]
    ascii_only, indents = generator.choice([True, False]), (", ", " : ") if seed % 2 else (",", ":")
    lines = [json.dumps(o, ensure_ascii=ascii_only, separators=indents).encode("utf-8", "replace") for o in objects]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b" \n\n  ".join(lines) + b"\n  \n")
    wanted = [json.loads(line)["text"] for line in lines]
    # Bytes and text are as in the file, and halves of characters that escapes spell out are passed on as such.
    assert texts_of(path) == [*wanted, ""]
    assert sum(size for parts in read_texts(path) for _, size in parts) == path.stat().st_size


def test_parts_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LINE_BYTES", 100)
    monkeypatch.setattr(json_lines, "PART_BYTES", 100)
    path = written(tmp_path / "x.jsonl", json.dumps({"a": "b" * 1000, "text": "word " * 1000}))
    for parts in read_texts(path):
        assert max(len(text) for text, _ in parts) <= 100 + 12


BAD = [
    '{"text": "aaaaaaaaaaaaaa"',
    '{"text": "aaaaaaaaaaaaaa',
    '{"text": "aaaaaaaaaaaaaaaa\\',
    '{"text": "aa\\qaaaaaaaaaaaaaa"}',
    '{"text": "aa\\u12x4aaaaaaaaaaaa"}',
    '{"text": "aa\ta"}',
    '{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"} x',
    '{"text": "aaaaaaaaaaaaaaaaaa", }',
    '{"other": "\\qaaaaaaaaaaaaaa", "text": "a"}',
    '{"body": {"text": "aaaaaaaaaaaa"}}',
    '["text", "aaaaaaaaaaaaaaaaaa"]',
    '{"text": ["aaaaaaaaaaaaaaaa"]}',
    '{"text": 1234567890123456789}',
    '"text aaaaaaaaaaaaaaaaaaaaaa"',
    '{"text": "aaaaaaaaaaa" "bbbbbbb"}',
    "{} aaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("line", BAD)
def test_a_bad_long_line_is_named(line: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", json.dumps({"text": TEXT}), line, json.dumps({"text": "c"}))
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*correct or remove"):
        texts_of(path)


def test_two_texts_in_a_long_line_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`json.loads` takes the last of them; by then the first has gone on."""
    monkeypatch.setattr(json_lines, "LINE_BYTES", 10)
    with pytest.raises(ValueError, match=r"x\.jsonl:1"):
        texts_of(written(tmp_path / "x.jsonl", '{"text": "a", "text": "b"}'))
