import json
import random

import pytest
import torch
from tokenizers import Tokenizer

from lightning_fp8.data import END_OF_TEXT, load_tokenizer, token_bytes, train_tokenizer

TEXTS = [
    "def add(a, b):\n\treturn a + b\n" * 20,
    "  leading, trailing  \r\n\r\n and\x00control\x7f",
    "naïve café, 漢字, עברית, 👩‍👩‍👧 \u2028 and e\u0301",
    f"before {END_OF_TEXT} after",
    END_OF_TEXT,
    "\ufeff",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), 320)


def random_text(seed: int) -> str:
    generator = random.Random(seed)
    return "".join(
        chr(generator.choice((generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)))) for _ in range(200)
    )


@pytest.mark.parametrize("text", [*TEXTS, "", random_text(1), random_text(2)])
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert token_bytes(tokenizer)[torch.tensor(ids, dtype=torch.int64)].sum() == len(text.encode())
    assert tokenizer.token_to_id(END_OF_TEXT) not in ids


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    lengths = token_bytes(tokenizer)
    assert lengths.dtype == torch.int64
    assert lengths.shape == (320,)
    assert lengths[0] == 0
    assert (lengths[1:] >= 1).all()
    assert lengths.max() > 1


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), 320).to_str() == tokenizer.to_str()


def test_smallest_vocabulary() -> None:
    assert token_bytes(train_tokenizer(iter(["aa aa"]), 257)).tolist() == [0, *[1] * 256]
    with pytest.raises(ValueError, match="vocab_size is 256"):
        train_tokenizer(iter(["text"]), 256)


def test_loaded_tokenizer_encodes_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    for text in TEXTS:
        assert load_tokenizer(path).encode(text).ids == tokenizer.encode(text).ids


def test_load_errors(tokenizer: Tokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        load_tokenizer(path)
    content = json.loads(tokenizer.to_str())
    path.write_text(json.dumps(content).replace(END_OF_TEXT, "<eos>"))
    with pytest.raises(ValueError, match="has no <|endoftext|>".replace("|", r"\|")):
        load_tokenizer(path)
    content["model"]["vocab"]["\u2581word"] = 320
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not byte-level"):
        load_tokenizer(path)
