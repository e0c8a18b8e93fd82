"""Bytes to what reads files of others: it may refuse them with a ValueError of one line, and nothing else may happen.

`python tests/hostile/fuzz.py tests/hostile/seeds -max_total_time=300` runs it guided by coverage, if atheris is
installed (`make fuzz` installs it); the fast tests run the seeds, and Hypothesis' variations of them. The first byte
says which reader it is. A crash that is found becomes a seed.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    import atheris

    guided = atheris.instrument_imports(include=["lightning_fp8", "yaml", "json", "zipfile"])
else:
    guided = contextlib.nullcontext()
with guided:
    import yaml

    from lightning_fp8.checkpoint.integrity import check_checkpoint
    from lightning_fp8.cli.fit import parse_tokens
    from lightning_fp8.compute.recipe import resolve_recipe
    from lightning_fp8.data.index import read_index
    from lightning_fp8.data.manifest import Manifest
    from lightning_fp8.models.config import config_from_dict

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
SEEDS = Path(__file__).resolve().parent / "seeds"


def _file(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def _recipe(content: bytes) -> None:
    try:
        recipe = yaml.safe_load(content.decode("utf-8", "replace"))
    except (yaml.YAMLError, RecursionError):
        return
    if isinstance(recipe, str | dict):  # as the command line's type has it
        resolve_recipe(recipe)


def _config(content: bytes) -> None:
    config = json.loads(content)
    if isinstance(config, dict):
        config_from_dict(config)


def _sums(content: bytes) -> None:
    _file("sharded/.metadata", _seed("metadata"))
    check_checkpoint(_file("sharded/checksums.0.json", content).parent)


def _metadata(content: bytes) -> None:
    (FOLDER / "sharded/checksums.0.json").unlink(missing_ok=True)
    _file("sharded/__0_0.distcp", _seed("checkpoint"))
    check_checkpoint(_file("sharded/.metadata", content).parent)


def _seed(name: str) -> bytes:
    return Path(SEEDS, name).read_bytes()[1:]


READERS: dict[bytes, Callable[[bytes], object]] = {
    b"m": lambda content: Manifest.load(_file("manifest.json", content)),
    b"i": lambda content: read_index(_file("index.json", content)),
    b"r": _recipe,
    b"c": lambda content: check_checkpoint(_file("last.ckpt", content)),
    b"p": _metadata,
    b"s": _sums,
    b"d": _config,
    b"t": lambda content: parse_tokens(content.decode("utf-8", "replace")),
}


def read(data: bytes) -> None:
    """Reads `data` as its first byte says."""
    reader = READERS.get(data[:1])
    if reader is None:
        return
    try:
        reader(data[1:])
    except ValueError as error:
        if not str(error):
            raise TypeError("an error that says nothing") from error
    if Path("pwned").exists():
        raise TypeError("what was read has run")


if __name__ == "__main__":
    atheris.Setup(sys.argv, read)
    with contextlib.suppress(KeyboardInterrupt):
        atheris.Fuzz()
    shutil.rmtree(FOLDER, ignore_errors=True)
