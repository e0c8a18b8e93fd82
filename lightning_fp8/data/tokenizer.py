"""Byte-level BPE: any text has an encoding and comes back exactly, and every token has a length in bytes.

Byte level means the base alphabet is the 256 bytes, so there is no unknown token, and losses can be given in
bits per byte: a unit that does not depend on the vocabulary, unlike the loss per token. The end-of-text token
is only ever appended by id; the same characters inside a text are encoded as ordinary text, so a document can
not end itself. Ours is `<|endoftext|>`; tokenizers of published models have it under one of a few names.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# GPT-2, GPT-NeoX and Qwen; Llama 3; Llama 2 and Mistral; Gemma.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of text
LARGEST_VOCABULARY = 2**22  # sixteen times that of the largest models


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        texts: The texts, consumed once. Memory grows with the number of distinct words, not with the texts.
        vocab_size: Most tokens to have, end of text (id 0) included. A small text can give fewer.

    Returns:
        The tokenizer.

    Raises:
        ValueError: `vocab_size` can not hold every byte and the end of text, or is beyond any use.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the 256 bytes and {END_OF_TEXT} need {SMALLEST_VOCABULARY}: "
            "make it larger."
        )
    if vocab_size > LARGEST_VOCABULARY:  # the trainer would ask for its memory at once, and abort
        raise ValueError(f"vocab_size is {vocab_size}; make it {LARGEST_VOCABULARY} or smaller.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a byte-level BPE tokenizer from its JSON file.

    Args:
        path: A `tokenizer.json` file.

    Returns:
        The tokenizer.

    Raises:
        ValueError: The file is missing or broken, or its tokenizer is not byte-level or has no end of text.
    """
    tokenizer = read_tokenizer(path)
    try:
        token_bytes(tokenizer)
    except ValueError as error:
        raise ValueError(f"Tokenizer {path}: {error}") from error
    return tokenizer


def read_tokenizer(path: str | Path) -> "Tokenizer":
    """Load any tokenizer from its JSON file: one to generate with need not be byte-level.

    Args:
        path: A `tokenizer.json` file.

    Returns:
        The tokenizer.

    Raises:
        ValueError: The file is missing or broken, or its tokenizer has no end of text.
    """
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise ValueError(f"Tokenizer file {path} does not exist: give the path of a tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises a bare Exception
        raise ValueError(f"{path} is not a tokenizer file ({error}): give the path of a tokenizer.json.") from error
    try:
        end_of_text(tokenizer)
    except ValueError as error:
        raise ValueError(f"Tokenizer {path}: {error}") from error
    # As some files have it: documents would be cut short, or filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Not stored in the file: without it the text "<|endoftext|>" would become the end of its document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: "Tokenizer") -> int:
    """The id of the token that ends a document.

    Raises:
        ValueError: It has none of the names that published tokenizers give it.
    """
    ids = [tokenizer.token_to_id(name) for name in ENDS_OF_TEXT]
    found = [index for index in ids if index is not None]
    if not found:
        raise ValueError(f"there is no end of text ({', '.join(ENDS_OF_TEXT)}): add one, or train a tokenizer instead.")
    return int(found[0])


def token_bytes(tokenizer: "Tokenizer") -> torch.Tensor:
    """How many UTF-8 bytes each token id stands for, so that a loss per token converts to bits per byte.

    Args:
        tokenizer: A byte-level tokenizer.

    Returns:
        int64 tensor [vocabulary], 0 for special tokens.

    Raises:
        ValueError: A token is not made of byte-level characters.
    """
    from tokenizers import pre_tokenizers

    alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, index in vocabulary.items():
        if index in added:  # added tokens are kept as plain text, the others as one character for each byte
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif alphabet.issuperset(token):
            lengths[index] = len(token)
        else:
            raise ValueError(f"token {token!r} is not byte-level: use a byte-level BPE tokenizer.")
    return lengths
