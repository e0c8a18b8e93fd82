import random
import sys
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from lightning_fp8.data import train_tokenizer, words
from lightning_fp8.data.words import word_encoder

TEXTS = [
    "def add(a, b):\n\treturn a + b  # it's 12345 'LL\r\n\r\n   \n  x" * 9,
    "naïve café's, 漢字 עברית 👩‍👩‍👧 \u2028 e\u0301 ² Ⅷ \U0001d538\U0001d7d9 \x1c\x85\xa0x   \u3000 y" * 9,
    "_under_ __init__ ?!... <|endoftext|> 'tis don'T I'll" * 9,
    " \n" * 300 + "a",
    "é" * 500,
    "1" * 500,
    "x",
    "",
]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def isolated(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), BYTE_LEVEL])


PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    **{f"split{i}": isolated(expression) for i, expression in enumerate(words._WORDS)},
}


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    bpe = train_tokenizer(iter(TEXTS), 400)
    bpe.pre_tokenizer = PRE_TOKENIZERS[request.param]
    return bpe


def wrongly_encoded(tokenizer: Tokenizer, texts: list[str], encode: Callable[[str], bytes] | None = None) -> list[str]:
    encode = encode or word_encoder(tokenizer, np.dtype(np.uint16))
    return [
        text
        for text in texts
        if np.frombuffer(encode(text), np.uint16).tolist() != tokenizer.encode(text, add_special_tokens=False).ids
    ]


def is_fast(tokenizer: Tokenizer) -> bool:
    return words._template(tokenizer) is not None


@pytest.mark.parametrize("window", [1, 7, 1 << 16])
def test_ids_are_the_tokenizers(tokenizer: Tokenizer, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WINDOW", window)
    assert is_fast(tokenizer)
    assert wrongly_encoded(tokenizer, TEXTS) == []


def test_ids_of_random_text_are_the_tokenizers(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WINDOW", 20)
    generator = random.Random(0)
    alphabet = "aZé漢\U0001d5381²٣\U0001d7d9 \n\r\t\xa0\u3000'sldtmrevSLLVE.!_-👩\u0301\x1c\x00"
    texts = ["".join(generator.choices(alphabet, k=80)) for _ in range(400)]
    assert wrongly_encoded(tokenizer, texts) == []


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character_is_classed_as_the_tokenizer_does(tokenizer: Tokenizer, step: int) -> None:
    characters = [chr(code) for code in range(0, sys.maxunicode + 1, step)]
    known = [c for c in characters if unicodedata.category(c) not in ("Cn", "Cs")]
    contexts = ["".join(f"a{c}1{c}!{c} {c}{c}\n{c}'s" for c in known[i : i + 500]) for i in range(0, len(known), 500)]
    assert wrongly_encoded(tokenizer, contexts) == []


def test_an_unknown_character_goes_to_the_tokenizer(tokenizer: Tokenizer) -> None:
    unknown = next(chr(code) for code in range(0x2FE0, 0x30000) if unicodedata.category(chr(code)) == "Cn")
    assert wrongly_encoded(tokenizer, [f"some{unknown}words'\u017f {unknown}", "it'\u017f"]) == []


def test_memory_of_words_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 10)
    table = words._WordTable(tokenizer, np.dtype(np.uint16))
    for i in range(100):
        assert table[f"w{i}"] == table[f"w{i}"]
        assert len(table) <= 10
    assert table["x" * 1000]
    assert "x" * 1000 not in table


def with_prefix_space(bpe: Tokenizer) -> None:
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_other_words(bpe: Tokenizer) -> None:
    bpe.pre_tokenizer = isolated(r"\w+|\W+")


def with_normalizer(bpe: Tokenizer) -> None:
    bpe.normalizer = normalizers.NFC()


def with_added_token(bpe: Tokenizer) -> None:
    bpe.add_tokens([AddedToken("return")])


def with_special_tokens_in_text(bpe: Tokenizer) -> None:
    bpe.encode_special_tokens = False


@pytest.mark.parametrize(
    "change",
    [with_prefix_space, with_other_words, with_normalizer, with_added_token, with_special_tokens_in_text],
)
def test_tokenizers_that_do_more_are_left_to_themselves(change: Callable[[Tokenizer], None]) -> None:
    bpe = train_tokenizer(iter(TEXTS), 400)
    assert is_fast(bpe)
    change(bpe)
    assert not is_fast(bpe)
    assert wrongly_encoded(bpe, TEXTS) == []
