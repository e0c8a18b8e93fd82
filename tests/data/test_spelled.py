import numpy as np
import pytest
import torch

from lightning_fp8.data import prepare
from lightning_fp8.data.folder import TokenBlocks, TokenFolder
from lightning_fp8.data.spelled import Spelled, spelling, word
from lightning_fp8.data.synthetic import zipf


def test_each_token_has_a_word_of_its_own() -> None:
    words = [word(token) for token in range(676)]
    assert len(set(words)) == 676
    assert words[:2] == ["Aa", "Ab"]
    assert words[-1] == "Zz"
    with pytest.raises(ValueError, match="676 at most"):
        word(676)


def test_what_is_prepared_is_what_the_source_drew(tmp_path) -> None:
    spelling(512).save(str(tmp_path / "tokenizer.json"))
    generator = {
        "class_path": "lightning_fp8.data.spelled.Spelled",
        "init_args": {"source": "zipf", "documents": 12, "length": 300},
    }
    prepare(
        [], str(tmp_path / "data"), generator=generator, tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0.3
    )
    folder = TokenFolder(str(tmp_path / "data"))
    kept = sum(split.documents for split in folder.manifest.splits.values())
    assert kept == 12
    source = zipf()
    drawn = {tuple(source.batch(number, 1, 300)[0].tolist()) for number in range(12)}
    for name in ("train", "val"):
        blocks = TokenBlocks(folder, name, 301)  # a document and its end
        for index in range(folder.manifest.splits[name].documents):
            tokens = torch.as_tensor(np.asarray(blocks[index])).long()
            assert tuple((tokens[:-1] - 257).tolist()) in drawn
            assert tokens[-1] == 0


def test_an_unknown_source_is_told() -> None:
    with pytest.raises(ValueError, match="none of skip_bigram, zipf"):
        Spelled("zip")
