import pytest

from lightning_fp8.data import TokenDataModule, prepare
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
    data = TokenDataModule(str(tmp_path / "data"), sequence_length=300, batch_size=1)
    data.setup()
    blocks = [batch[0].tolist() for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    drawn = {tuple(zipf().batch(number, 1, 300)[0].tolist()) for number in range(12)}
    assert {block[-1] for block in blocks} == {0}  # a block is a document and its end
    assert {tuple(token - 257 for token in block[:-1]) for block in blocks} == drawn


def test_an_unknown_source_is_told() -> None:
    with pytest.raises(ValueError, match="none of skip_bigram, zipf"):
        Spelled("zip")
