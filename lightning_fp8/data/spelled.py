"""Synthetic tokens spelled as text, so that they go the way of any other: `prepare`, data module, command line.

Each token is a word of two letters, a capital and a small one, and the tokenizer has exactly these words: what is
prepared is the sequence that the source drew. `{class_path: lightning_fp8.data.spelled.Spelled, init_args: {source:
skip_bigram}}` is a generator for `prepare`; it needs the tokenizer that `spelling` makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_fp8.data import synthetic
from lightning_fp8.data.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CAPITALS, SMALL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
SOURCES = ("skip_bigram", "zipf", "markov_copy")


@dataclass(frozen=True)
class Spelled:
    """Documents of a synthetic source, the same each time.

    Attributes:
        source: A function of `data.synthetic`: skip_bigram, zipf or markov_copy.
        documents: How many.
        length: Tokens of each.
        init_args: Of the source.

    Raises:
        ValueError: There is no such source.
    """

    source: str
    documents: int = 256
    length: int = 4096
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"Spelled: {self.source!r} is none of {', '.join(SOURCES)}.")

    def __iter__(self) -> Iterator[str]:
        source: synthetic.TokenSource = getattr(synthetic, self.source)(**self.init_args)
        words = [word(token) for token in range(source.vocab_size)]
        for number in range(self.documents):
            yield "".join(words[token] for token in source.batch(number, 1, self.length)[0].tolist())


def word(token: int) -> str:
    """How a token is spelled: 0 is Aa, 26 is Ba.

    Raises:
        ValueError: There are only 676 such words.
    """
    if not 0 <= token < len(CAPITALS) * len(SMALL):
        raise ValueError(f"Token {token} has no spelling: a vocabulary has {len(CAPITALS) * len(SMALL)} at most.")
    return CAPITALS[token // len(SMALL)] + SMALL[token % len(SMALL)]


def spelling(vocab_size: int) -> "Tokenizer":
    """The tokenizer of a source with so many tokens; besides them it has the end of text and the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [word(token) for token in range(vocab_size)]
    known = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    tokenizer = Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate(known)}, merges=[(text[0], text[1]) for text in words])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
