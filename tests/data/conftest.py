"""Two prepared sets, and the batches of a run that nobody interrupted."""

import json
import random
from pathlib import Path

import pytest
from streams import BATCHES, data_of, fit

from lightning_fp8.data import prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    generator = random.Random(0)
    documents = ["".join(generator.choices("abcdefgh ", k=60)) for _ in range(24)]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prepare([str(folder / "x.jsonl")], str(folder / "data"), vocab_size=280, val_fraction=0.2)
    return folder / "data"


@pytest.fixture(scope="session")
def second(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another set with the tokenizer of the first, of other letters and half the size."""
    folder = tmp_path_factory.mktemp("second")
    generator = random.Random(1)
    documents = ["".join(generator.choices("xyz ", k=60)) for _ in range(16)]
    (folder / "y.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prepare([str(folder / "y.jsonl")], str(folder / "other"), tokenizer=str(prepared / "tokenizer.json"))
    return folder / "other"


@pytest.fixture(scope="session")
def uninterrupted(prepared: Path) -> list[str]:
    seen = fit(data_of(prepared))
    assert len(set(seen)) == len(seen) == 3 * BATCHES
    return seen
