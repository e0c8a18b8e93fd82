r"""Parts of a text, cut at boundaries, have the tokens of the whole: with random text, and with every character."""

import random
import sys
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from lightning_fp8.data import train_tokenizer
from lightning_fp8.data.boundaries import _SPLITS, BEFORE_ANY, BEFORE_SPACE, boundary_of, describe, next_boundary
from lightning_fp8.data.readers import cut

TEXT = (
    "def add(a, b):\n\treturn a + b  # it's 12345 'LL don'T I'll\r\n\r\n naïve café's, 漢字。 e\u0301 ² Ⅷ <tool_call> x"
)
ALPHABET = "aZé\u017f漢か1²٣Ⅷ\U0001d7d9 \n\r\t\xa0\u3000'sldtmrevSLLVE.!/_-<>。、👩\u0301\u093c\u0958\x1c\x00"


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOOLS = [AddedToken("<tool_call>", normalized=False), AddedToken("漢字", single_word=True)]
CUTS_ANYWHERE = {
    "gpt2": (GPT2, None, []),
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), None, []),
    **{f"split {i}": (split(expression), normalizers.NFC(), []) for i, expression in enumerate(sorted(_SPLITS))},
}
CUTS_BEFORE_SPACE = {
    **{f"qwen {i}": (split(e), normalizers.NFC(), TOOLS) for i, e in enumerate(sorted(_SPLITS))},
}


def tokenizer_of(
    words: pre_tokenizers.PreTokenizer | None, normalizer: normalizers.Normalizer | None, added: list[AddedToken]
) -> Tokenizer:
    bpe = train_tokenizer(iter([TEXT * 9]), 400)
    bpe.pre_tokenizer = words
    if normalizer:
        bpe.normalizer = normalizer
    bpe.add_tokens(added)
    return bpe


def ids_in_pieces(bpe: Tokenizer, text: str, size: int) -> list[int]:
    pieces = [piece.text for piece in cut([(text, 0)], boundary_of(bpe), size)]
    assert "".join(pieces) == text
    return [token for piece in pieces for token in bpe.encode(piece, add_special_tokens=False).ids]


@pytest.mark.parametrize("name", [*CUTS_ANYWHERE, *CUTS_BEFORE_SPACE])
def test_pieces_of_random_text_have_the_tokens_of_the_whole(name: str) -> None:
    bpe = tokenizer_of(*{**CUTS_ANYWHERE, **CUTS_BEFORE_SPACE}[name])
    assert boundary_of(bpe) is (BEFORE_ANY if name in CUTS_ANYWHERE else BEFORE_SPACE)
    generator = random.Random(0)
    found = 0
    for number in range(600):
        letters = ALPHABET if number % 3 else ALPHABET[:8] + " .'\n"
        text = "".join(generator.choices(letters, k=60)) + generator.choice(["", TEXT])
        assert ids_in_pieces(bpe, text, 1) == bpe.encode(text, add_special_tokens=False).ids, text
        found += sum(1 for _ in cut([(text, 0)], boundary_of(bpe), 1)) - 1
    assert found > 1000


@pytest.mark.parametrize("name", CUTS_ANYWHERE)
@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character_beside_a_boundary(name: str, step: int) -> None:
    bpe = tokenizer_of(*CUTS_ANYWHERE[name])
    for start in range(0, sys.maxunicode + 1, 1000 * step):
        some = [chr(code) for code in range(start, min(start + 1000 * step, sys.maxunicode + 1), step)]
        known = [c for c in some if unicodedata.category(c) not in ("Cs", "Cn")]
        text = "".join(f"a{c} 1{c}.{c},b{c}\n" for c in known)
        assert ids_in_pieces(bpe, text, 1) == bpe.encode(text, add_special_tokens=False).ids, f"from {start:x}"


@pytest.mark.parametrize(
    ("text", "anywhere", "before_space"),
    [
        ("ab cd", [2], [2]),
        ("ab, cd", [2], []),
        ("it's", [], []),
        ("a_b", [], []),
        ("e\u0301 x", [], []),  # the mark goes on with the letter
        ("\u0958 x, ", [4 - 1], []),  # which NFC takes apart into a letter and a mark
        ("12 3", [2], [2]),
        ("漢字。漢", [2], []),
        ("ab", [], []),
        ("", [], []),
    ],
)
def test_places(text: str, anywhere: list[int], before_space: list[int]) -> None:
    for boundary, wanted in ((BEFORE_ANY, anywhere), (BEFORE_SPACE, before_space)):
        places = {next_boundary(text, start, boundary) for start in range(1, len(text) + 1)}
        assert sorted(place for place in places if place) == wanted


UNKNOWN = {
    "another expression": (split(r"\w+|\W+"), None, []),
    "a space before all": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, []),
    "none at all": (None, None, []),
    "NFKC": (GPT2, normalizers.NFKC(), []),
    "NFD": (GPT2, normalizers.Sequence([normalizers.NFC(), normalizers.NFD()]), []),
    "a token with a space": (GPT2, None, [AddedToken("of the")]),
    "a token that takes the space": (GPT2, None, [AddedToken("x", rstrip=True)]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_tokenizers_have_no_known_boundary(name: str) -> None:
    bpe = tokenizer_of(*UNKNOWN[name])
    assert boundary_of(bpe) is None
    assert len(describe(bpe)) <= 300


def test_special_tokens_in_the_text_leave_no_boundary() -> None:
    bpe = tokenizer_of(*CUTS_ANYWHERE["gpt2"])
    assert boundary_of(bpe) is BEFORE_ANY
    bpe.encode_special_tokens = False
    assert boundary_of(bpe) is None
