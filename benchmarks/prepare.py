"""How much text `prepare` turns into tokens per second of one core, beside the Rust tokenizer alone.

    python benchmarks/prepare.py [--megabytes 50] [--vocab_size 32000] [--workers 1]

The text is the standard library's source, repeated under changing names. CPU time, user and system of all processes,
is divided by megabytes, not the clock's: it does not depend on what else the machine does, and hardly on the number
of workers. Training the tokenizer is done before and not counted; reading, splitting, hashing, gzip of the validation
text and writing chunks are.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from lightning_fp8.data import load_tokenizer, prepare, train_tokenizer
from lightning_fp8.data.readers import hash_file
from lightning_fp8.data.sources import list_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    texts = [file.path.read_text() for file in list_files(["stdlib"]) if hash_file(file.path)[1]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(iter(texts), args.vocab_size).save(str(folder / "tokenizer.json"))
        size = write_corpus(folder / "text.jsonl", texts, args.megabytes * 1e6)
        before = cpu_seconds()
        manifest = prepare(
            [str(folder / "text.jsonl")],
            str(folder / "data"),
            tokenizer=str(folder / "tokenizer.json"),
            workers=args.workers,
        )
        seconds = cpu_seconds() - before
        tokens = sum(split.tokens for split in manifest.splits.values())
        report(f"prepare, {args.workers} workers", size, seconds, tokens)

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        sample = texts[::8]
        before = cpu_seconds()
        encodings = [np.array(tokenizer.encode(text, add_special_tokens=False).ids) for text in sample]
        report(
            "the tokenizer alone",
            sum(len(text.encode()) for text in sample),
            cpu_seconds() - before,
            sum(map(len, encodings)),
        )


def write_corpus(path: Path, texts: list[str], size: float) -> int:
    """Writes JSON Lines of at least `size` bytes of text; returns the bytes."""
    written = 0
    with path.open("w") as file:
        for copy in range(1 + int(size)):
            for number, text in enumerate(texts):
                document = f"# copy{copy}_{number}\n{text}"
                file.write(json.dumps({"text": document}) + "\n")
                written += len(document.encode())
                if written >= size:
                    return written
    return written


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def report(name: str, size: int, seconds: float, tokens: int) -> None:
    """Prints one line."""
    print(f"{name:20} {size / 1e6:6.1f} MB {seconds:6.1f} s of CPU {size / 1e6 / seconds:6.2f} MB/s {tokens:,} tokens")


if __name__ == "__main__":
    main()
