"""Texts, prepared folders and tokenizers that are damaged, foreign or made to do harm."""

import os

from hostile.world import Case, cut, edit_json, fit, remove, write

MANIFEST = "data/manifest.json"
INDEX = "data/train/index.json"
CHUNK = "data/train/chunk-0-0.bin"
TOKENIZER = "data/tokenizer.json"


def prepare(*sources, to="out"):
    return ["prepare", "--workers", "1", "--output_dir", to, "--sources", f"[{', '.join(sources)}]"]


CASES = [
    Case("text that is not there", prepare("no.txt"), 1, ("'no.txt'", "does not exist", "give a file")),
    Case("empty text", prepare("e.txt"), 1, ("e.txt", "empty", "Give others"), lambda: write("e.txt", "")),
    Case(
        "binary text", prepare("e.txt"), 1, ("e.txt", "UTF-8", "Give others"), lambda: write("e.txt", bytes(range(256)))
    ),
    Case(
        "undecodable",
        prepare("e.jsonl"),
        1,
        ("e.jsonl", "UTF-8", "Give"),
        lambda: write("e.jsonl", b'{"text": "\xff"}'),
    ),
    Case(
        "line without text",
        prepare("e.jsonl"),
        1,
        ("e.jsonl:2", "text", "correct or remove"),
        lambda: write("e.jsonl", '{"text": "a"}\n{"txt": 3}\n'),
    ),
    Case(
        "gigantic line",
        prepare("e.jsonl"),
        1,
        ("val_fraction", "1 readable files", "give more"),
        lambda: write("e.jsonl", '{"text": "' + "a" * 5_000_000 + '"}\n'),
    ),
    Case(
        "deep line",
        prepare("e.jsonl"),
        1,
        ("e.jsonl:1", "text", "correct or remove"),
        lambda: write("e.jsonl", '{"text": ' + "[" * 100_000 + "\n"),
    ),
    Case("no Parquet", prepare("e.parquet"), 1, ("e.parquet", "correct"), lambda: write("e.parquet", "text")),
    Case("no Arrow", prepare("e.arrow"), 1, ("e.arrow", "correct"), lambda: write("e.arrow", '{"text": "a"}\n')),
    Case("one document", prepare("e.txt"), 1, ("one split", "give more"), lambda: write("e.txt", "hello")),
    Case("vocabulary", [*prepare("x.jsonl"), "--vocab_size=10"], 1, ("vocab_size is 10", "257", "larger")),
    Case("vast vocabulary", [*prepare("x.jsonl"), "--vocab_size=5000000000"], 1, ("vocab_size is 5000", "smaller")),
    Case("share", [*prepare("x.jsonl"), "--val_fraction=2"], 1, ("val_fraction is 2.0", "between 0 and 1")),
    Case("over a run", prepare("x.jsonl", to="run"), 1, ("run holds files", "another output_dir")),
    Case("over a file", prepare("x.jsonl", to="x.jsonl"), 1, ("x.jsonl is a file", "another output_dir")),
    Case("no tokenizer", [*prepare("x.jsonl"), "--tokenizer=config.yaml"], 1, ("config.yaml", "give the path")),
    Case("no generator", [*prepare(), "--generator=no.Texts"], 1, ("no.Texts", "correct the path")),
    # The folder.
    Case("not prepared", fit("--data.path=nowhere"), 1, ("nowhere/manifest.json", "missing", "lightning-fp8 prepare")),
    Case("a file for a folder", fit("--data.path=config.yaml"), 1, ("config.yaml/manifest.json", "prepare it again")),
    Case("another folder", fit("--data.path=run"), 1, ("run/manifest.json", "missing", "lightning-fp8 prepare")),
    Case("cut manifest", fit(), 1, (MANIFEST, "not a manifest", "prepare it again"), lambda: cut(MANIFEST)),
    Case("newer manifest", fit(), 1, (MANIFEST, "version 9", "upgrade"), lambda: edit_json(MANIFEST, version=9)),
    Case(
        "manifest of objects",
        fit(),
        1,
        (MANIFEST, "token_dtype 'object'", "again"),
        lambda: edit_json(MANIFEST, token_dtype="object"),
    ),
    Case("size of a word", fit(), 1, (MANIFEST, "vocab_size", "again"), lambda: edit_json(MANIFEST, vocab_size="many")),
    Case(
        "manifest that leads out",
        fit(),
        1,
        (MANIFEST, "tokenizer '../x.jsonl'", "not a file of its folder"),
        lambda: edit_json(MANIFEST, tokenizer="../x.jsonl"),
    ),
    Case(
        "more tokens than chunks",
        fit(),
        1,
        ("data: the train split", "were prepared", "copy the folder again"),
        lambda: edit_json(MANIFEST, splits__train__tokens=10**9),
    ),
    Case(
        "no validation tokens",
        fit(),
        1,
        ("The val split of data has 0 tokens", "prepare more text"),
        lambda: edit_json(MANIFEST, splits__val__tokens=0),
    ),
    Case("no index", fit(), 1, (INDEX, "missing", "again"), lambda: remove(INDEX)),
    Case("index of nothing", fit(), 1, (INDEX, "not the index", "again"), lambda: write(INDEX, "{}")),
    Case("binary index", fit(), 1, (INDEX, "not the index", "again"), lambda: write(INDEX, bytes(range(256)))),
    Case(
        "index that leads out",
        fit(),
        1,
        (INDEX, "chunks.0.filename '../../x.jsonl'", "do not use"),
        lambda: edit_json(INDEX, chunks__0__filename="../../x.jsonl"),
    ),
    Case(
        "index of pickles",
        fit(),
        1,
        (INDEX, "config.data_format is ['pickle']", "prepare the text again"),
        lambda: edit_json(INDEX, config__data_format=["pickle"]),
    ),
    Case(
        "index below 0",
        fit(),
        1,
        (INDEX, "chunks.0 has -5", "again"),
        lambda: edit_json(INDEX, chunks__0__dim=-5),
    ),
    Case("cut chunk", fit(), 1, (CHUNK, "bytes of", "copy it again"), lambda: cut(CHUNK)),
    Case("no chunk", fit(), 1, (CHUNK, "0 bytes of", "copy it again"), lambda: remove(CHUNK)),
    Case(
        "ids out of range",
        fit(),
        1,
        (CHUNK, "token id 65535", "272", "again"),
        lambda: write(CHUNK, b"\xff" * os.path.getsize(CHUNK)),
    ),
    Case("no tokenizer file", fit(), 1, (TOKENIZER, "does not exist", "give"), lambda: remove(TOKENIZER)),
    Case("broken tokenizer", fit(), 1, (TOKENIZER, "not a tokenizer", "give"), lambda: cut(TOKENIZER)),
    Case(
        "tokenizer of other data",
        fit(),
        1,
        (TOKENIZER, "token id 5000", "272", "copy the folder again"),
        lambda: edit_json(TOKENIZER, model__vocab__zz=5000),
    ),
    # Sizes.
    Case(
        "batch too large", fit("--data.batch_size=100000"), 1, ("train split of data", "batch_size 100000", "smaller")
    ),
    Case("sequence too long", fit("--data.sequence_length=999999"), 1, ("train split of data", "make them smaller")),
    Case(
        "vocabulary of the model",
        fit("--model.config.vocab_size=100"),
        1,
        ("272 tokens", "set model.config.vocab_size"),
    ),
]
