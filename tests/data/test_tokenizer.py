import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

from lightning_fp8.data import END_OF_TEXT, load_tokenizer, token_bytes, train_tokenizer
from lightning_fp8.data.tokenizer import ENDS_OF_TEXT, end_of_text, read_tokenizer
from lightning_fp8.models.text_stream import TextStream

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
    path.write_text(json.dumps(content).replace(END_OF_TEXT, "<end>"))
    with pytest.raises(ValueError, match=r"no end of text \(<\|endoftext\|>, .*<eos>\)"):
        load_tokenizer(path)
    content["model"]["vocab"]["\u2581word"] = 320
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not byte-level"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ENDS_OF_TEXT)
def test_the_end_of_text_may_have_the_name_that_published_tokenizers_give_it(
    name: str, tokenizer: Tokenizer, tmp_path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str().replace(END_OF_TEXT, name))
    loaded = load_tokenizer(path)
    assert loaded.decode([end_of_text(loaded)], skip_special_tokens=False) == name
    assert loaded.encode(name).ids != [end_of_text(loaded)]


def test_a_tokenizer_that_is_not_byte_level_can_be_read(tmp_path) -> None:
    """Such as Llama 2's: spaces are underlined, and unknown characters are spelt in bytes."""
    vocabulary = {"</s>": 0, "\u2581": 1, "a": 2, "\u2581a": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    words = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True, fuse_unk=True))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words.add_special_tokens(["</s>"])
    words.save(str(path := tmp_path / "tokenizer.json"))
    read = read_tokenizer(path)
    ids = read.encode("a a\u00e9 a").ids
    stream = TextStream(read.decode, ids[:1])
    assert "".join(map(stream.push, ids[1:])) + stream.flush() == " a\u00e9 a"
    with pytest.raises(ValueError, match="byte-level"):
        load_tokenizer(path)
