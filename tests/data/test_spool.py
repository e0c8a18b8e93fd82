"""What a killed preparation leaves, and that the next one makes the same bytes of it."""

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lightning_fp8.data import prepare
from lightning_fp8.data.words import word_encoder

OPTIONS = {"vocab_size": 300, "val_fraction": 0.3}
# Commits as often as it can, so that a kill can fall between any two steps.
RUN = """
import json, sys
from lightning_fp8.data import chunks, prepare, spool, encoding
spool.COMMIT_SECONDS = float(sys.argv[4])
encoding.BATCH_CHARACTERS = int(sys.argv[5])
chunks.CHUNK_BYTES = "1MB"  # of which litdata's writer holds one, and a copy
print("started", flush=True)
given = json.loads(sys.argv[1])
prepare(**given, output_dir=sys.argv[2], vocab_size=300, val_fraction=0.3, workers=int(sys.argv[3]))
"""


PREPARE = importlib.import_module("lightning_fp8.data.prepare")  # the package's attribute is the function
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def text_of(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=200))


def write_corpus(folder: Path, documents: int) -> None:
    folder.mkdir()
    for number in range(8):
        texts = (text_of(seed) for seed in range(number, documents, 8))
        (folder / f"{number}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))


def end_later(process: "subprocess.Popen[str]", seconds: float = 600) -> None:
    """Kills a process that hangs, so that nobody waits for it, or for what it prints, for ever."""
    timer = threading.Timer(seconds, process.kill)  # which does nothing to one that has been waited for
    timer.daemon = True
    timer.start()


def start(given: dict[str, object], *arguments: object) -> "subprocess.Popen[str]":
    """Begins to prepare what is given; arguments are the folder, workers, seconds between commits, batch characters."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(given), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    end_later(process)
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    return process


class Killed(BaseException):
    """Stands for a kill in this process: nothing may catch it."""


@pytest.mark.parametrize("after", [0, 3, 17, 30])
@pytest.mark.parametrize("step", ["piece", "write", "commit"])
def test_stopped_anywhere_and_started_again_gives_the_same_bytes(
    after: int, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", 40)
    whole = prepare([str(tmp_path / "corpus")], str(tmp_path / "whole"), **OPTIONS, workers=1)
    calls = 0

    def stop_at(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return function(*args, **options)

        return call

    def encoder(encode):
        return lambda *args: stop_at(encode(*args))

    with monkeypatch.context() as patch:
        patch.setattr("lightning_fp8.data.spool.COMMIT_SECONDS", 0.0)
        if step == "piece":
            patch.setattr("lightning_fp8.data.encoding.word_encoder", encoder(word_encoder))
        elif step == "write":
            patch.setattr("os.replace", stop_at(os.replace))
        else:
            patch.setattr("os.fsync", stop_at(os.fsync))
        with pytest.raises(Killed):
            prepare([str(tmp_path / "corpus")], str(tmp_path / "out"), **OPTIONS, workers=1)
    assert prepare([str(tmp_path / "corpus")], str(tmp_path / "out"), **OPTIONS, workers=1) == whole
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_resumed_preparation_does_not_tokenise_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus", 40)
    encoded: list[str] = []
    limit = [25]

    def counting(*args):
        encode = word_encoder(*args)

        def call(text: str) -> bytes:
            if len(encoded) >= limit[0]:
                raise Killed
            encoded.append(text)
            return encode(text)

        return call

    monkeypatch.setattr("lightning_fp8.data.encoding.word_encoder", counting)
    monkeypatch.setattr("lightning_fp8.data.spool.COMMIT_SECONDS", 0.0)
    with pytest.raises(Killed):
        prepare([str(tmp_path / "corpus")], str(tmp_path / "out"), **OPTIONS, workers=1)
    limit[0] = 1000
    prepare([str(tmp_path / "corpus")], str(tmp_path / "out"), **OPTIONS, workers=1)
    assert len(encoded) == len(set(encoded)) == 40  # one commit a piece, so none twice


def test_work_of_other_inputs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus", 40)
    source, out = str(tmp_path / "corpus"), str(tmp_path / "out")
    prepare([source], out, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(PREPARE, "write_chunks", None)
        with pytest.raises(TypeError):
            prepare([source], out, **OPTIONS, seed=1)
    manifest = prepare([source], out, **OPTIONS, seed=2)
    assert manifest == prepare([source], str(tmp_path / "fresh"), **OPTIONS, seed=2)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_killed_while_the_folders_changed_places(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 40)
    source, out = str(tmp_path / "corpus"), tmp_path / "out"
    first = prepare([source], str(out), **OPTIONS)
    work = tmp_path / ".out.unfinished"
    work.mkdir()
    (work / "inputs.json").write_text('{"fingerprint": "that of the replacement"}')
    out.rename(work / "replaced")
    assert prepare([source], str(out), **OPTIONS, seed=1).seed == 1
    assert not work.exists()

    work.mkdir()  # killed right after the folder was put in place
    assert prepare([source], str(out), **OPTIONS, seed=1).seed == 1
    assert not work.exists()
    assert prepare([source], str(out), **OPTIONS) == first


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 40)
    (tmp_path / ".out.unfinished").mkdir()
    holder = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    lock = str(tmp_path / ".out.unfinished" / "lock")
    with subprocess.Popen(
        [sys.executable, "-c", holder, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        end_later(process)
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="Another process is preparing"):
            prepare([str(tmp_path / "corpus")], str(tmp_path / "out"), **OPTIONS)
        process.kill()
    prepare([str(tmp_path / "corpus")], str(tmp_path / "out"), **OPTIONS)


def generate(number: int) -> Iterator[str]:
    """Documents by class path."""
    return (text_of(seed) for seed in range(number))


def write_source(kind: str, folder: Path, documents: int) -> dict[str, object]:
    """Documents in files of a kind; what `prepare` is to be given."""
    folder.mkdir()
    texts = [text_of(seed) for seed in range(documents)]
    table = pyarrow.table({"text": texts})
    match kind:
        case "generator":
            return {
                "sources": [],
                "generator": {"class_path": "test_spool.generate", "init_args": {"number": documents}},
            }
        case "text":
            for seed, text in enumerate(texts):
                (folder / f"{seed:05}.txt").write_text(text)
        case "jsonl":
            (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        case "parquet":
            pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=500)
        case "datasets":
            with (
                pyarrow.OSFile(str(folder / "x.arrow"), "wb") as file,
                pyarrow.ipc.new_stream(file, table.schema) as out,
            ):
                out.write_table(table, max_chunksize=500)
            (folder / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    return {"sources": [str(folder)]}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "datasets", "generator"])
def test_sigkill_at_random_points(kind: str, workers: int, tmp_path: Path) -> None:
    given = write_source(kind, tmp_path / "corpus", 1500)
    options = (workers, 0.01, 20_000)
    assert start(given, tmp_path / "whole", *options).wait() == 0
    points = sorted(random.Random(f"{kind}{workers}").sample(range(1200), 3))
    for point in points:
        process = start(given, tmp_path / "out", *options)
        while _committed_pieces(tmp_path) < point:
            assert process.poll() is None, f"ended before piece {point}"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        deadline = time.monotonic() + 10
        while _group_is_alive(process.pid):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
    assert start(given, tmp_path / "out", *options).wait() == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out", "whole"]


def _committed_pieces(folder: Path) -> int:
    journal = folder / ".out.unfinished" / "journal.json"
    return json.loads(journal.read_text())["pieces"] if journal.exists() else -1


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["documents", "one file", "one file without spaces", "one line"])
def test_memory_does_not_grow_with_the_text(kind: str, workers: int, tmp_path: Path) -> None:
    """20 and 80 MB of text, both enough to reach a peak; to hold what the second has more would be twice the bound."""
    peaks = []
    for copies in (16, 64):
        corpus = tmp_path / f"corpus{copies}"
        corpus.mkdir()
        write_long(kind, corpus, copies)
        process = start({"sources": [str(corpus)]}, tmp_path / f"out{copies}", workers, 5.0, 1 << 19)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory_of_group(process.pid))
            time.sleep(0.02)
        assert process.returncode == 0
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 30, peaks  # MiB


def memory_of_group(group: int) -> int:
    """KiB that the processes of a group have written to; a page that forked ones share is counted once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getpgid(int(process.name)) == group:
                maps = (process / "smaps_rollup").read_text()
                total += sum(int(kib) for kib in re.findall(r"Pss_Anon:\s+(\d+)", maps))
    return total


def write_long(kind: str, folder: Path, copies: int) -> None:
    """So many times 1.25 MB of text, and a few words for the split that does not get it."""
    for i in range(20):
        (folder / f"{i}.txt").write_text("short")
    texts = [text_of(seed) for seed in range(1000)]
    if kind == "documents":
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * copies))
    elif kind == "one line":
        (folder / "x.jsonl").write_text(json.dumps({"id": 1, "text": "\n".join(texts * copies)}) + "\n")
    else:
        text = "\n".join(texts) + "\n"
        text = text.replace(" ", "。").replace("\n", "。") if "without" in kind else text
        (folder / "long.txt").write_text(text * copies)
