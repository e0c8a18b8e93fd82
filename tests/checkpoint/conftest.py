from pathlib import Path

import pytest
from random_decoder import SHAPE, save


@pytest.fixture
def ckpt(tmp_path: Path, prepared: Path) -> Path:
    """`run/checkpoints/last.ckpt` of the first shape, with its tokenizer."""
    path = tmp_path / "run/checkpoints/last.ckpt"
    save(SHAPE, path)
    (tmp_path / "run/tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    return path
