"""What all tests share."""

import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_fp8.data import prepare


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread would mostly wait, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """`fit` has its whole process load tensors only; here a process runs other tests after it."""
    yield
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)


@pytest.fixture(autouse=True)
def lightning_logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of Lightning keep what they log to themselves."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of about a thousand tokens, with a vocabulary of at most 272."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = random.Random(0)
    documents = ["".join(generator.choices("abcdefgh ", k=120)) for _ in range(40)]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prepare([str(folder / "x.jsonl")], str(folder / "data"), vocab_size=272, val_fraction=0.2)
    return folder / "data"
