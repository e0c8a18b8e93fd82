r"""Byte-level BPE several times faster, with the same ids: every distinct word is encoded once.

Byte-level tokenizers cut text into words by a regular expression and then encode each word by itself. Text repeats
its words, so a dictionary from word to ids does nearly all of the work, and the Rust tokenizer sees only what is new.
The cutting is done with Python's `re`, which has no \p{L}: the classes are spelt out, as briefly as the characters of
each window of text allow, because short classes are matched fastest.

Windows end at arbitrary characters; the words near the end, which could have been cut short, are matched again in
the next one. Only the expressions in `_WORDS` have a translation. A tokenizer with another one, and a text with
characters that this Python's Unicode tables do not know, go to the Rust tokenizer as a whole.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW = 1 << 16
MOST_WORDS = 1 << 18  # some 50 MB
LONGEST_WORD = 64  # longer ones hardly repeat

# The expression in tokenizer.json -> the same with its classes left open: letters, numbers, white space.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+"
_RUST_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_RUST_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n{L}{N}]?[{L}]+|"
_END = r"| ?[^{S}{L}{N}]+[\r\n]*|[{S}]*[\r\n]+|[{S}]+(?![^{S}])|[{S}]+"
_WORDS = {
    _RUST_START + r"\p{N}{1,3}" + _RUST_END: _START + "(?:[{N}][{N}]?[{N}]?)" + _END,  # Llama 3
    _RUST_START + r"\p{N}" + _RUST_END: _START + "[{N}]" + _END,  # Qwen 2 to 3
}
_ASCII_SPACE = "\t\n\x0b\f\r "
_SPACE = _ASCII_SPACE + "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def word_encoder(tokenizer: "Tokenizer", dtype: "np.dtype[np.generic]") -> Callable[[str], bytes]:
    """The fastest exact way to encode text.

    Args:
        tokenizer: A byte-level BPE tokenizer.
        dtype: Of the ids.

    Returns:
        A function from a text to its ids, as the bytes of an array [tokens] of `dtype`, without special tokens.
    """

    def encode_whole(text: str) -> bytes:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype).tobytes()

    template = _template(tokenizer)
    if template is None:
        return encode_whole
    ids = _WordTable(tokenizer, dtype)

    def encode(text: str) -> bytes:
        try:
            return b"".join(map(ids.__getitem__, _words(text, template)))
        except _UnknownCharacterError:
            return encode_whole(text)

    return encode


class _UnknownCharacterError(Exception):
    """A character whose class other releases of Unicode may see differently."""


class _WordTable(dict[str, bytes]):
    """From a word to the bytes of its ids, filled as words occur."""

    def __init__(self, tokenizer: "Tokenizer", dtype: "np.dtype[np.generic]") -> None:
        from tokenizers import pre_tokenizers

        super().__init__()
        self._to_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._model = tokenizer.model
        self._dtype = dtype

    def __missing__(self, word: str) -> bytes:
        ((letters, _),) = self._to_alphabet.pre_tokenize_str(word)
        ids = np.array([token.id for token in self._model.tokenize(letters)], self._dtype).tobytes()
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _template(tokenizer: "Tokenizer") -> str | None:
    """The tokenizer's expression with open classes; None if the tokenizer does more than cut and encode words."""
    content = json.loads(tokenizer.to_str())
    tokens_in_text = any(not token["special"] for token in content["added_tokens"])
    if content["model"]["type"] != "BPE" or content["model"]["dropout"] or content["normalizer"] or tokens_in_text:
        return None
    if not tokenizer.encode_special_tokens:
        return None
    match content["pre_tokenizer"]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return _WORDS.get(expression)
    return None


def _words(text: str, template: str) -> Iterator[str]:
    start, size = 0, WINDOW
    while start < len(text):
        window = text[start : start + size]
        words = _pattern(template, _widest(window)).findall(window)
        start += len(window)
        if start < len(text):
            # A word that ends in a letter and is not the last of the window is complete, and so is all before it.
            complete = len(words) - 1
            while complete and not words[complete - 1][-1].isalpha():
                complete -= 1
            start -= sum(map(len, words[complete:]))
            words = words[:complete]
            size = WINDOW if complete else 2 * size
        yield from words


_ASCII, _PLANE, _ALL = range(3)


def _widest(window: str) -> int:
    return _ASCII if window.isascii() else max(map(_width, set(window)))


@cache
def _width(character: str) -> int:
    """Which alphabet a pattern must know to class this character."""
    category = unicodedata.category(character)
    # The long s is an s to an expression that ignores case.
    if category in ("Cn", "Cs") or character == "\u017f":
        raise _UnknownCharacterError
    if character.isascii():
        return _ASCII
    return _ALL if character > "\uffff" and category[0] in "LN" else _PLANE


@cache
def _pattern(template: str, width: int) -> re.Pattern[str]:
    if width == _ASCII:
        classes = {"L": "a-zA-Z", "N": "0-9", "S": _ASCII_SPACE}
    else:
        end = 0x10000 if width == _PLANE else sys.maxunicode + 1
        classes = {"L": _ranges("L", end), "N": _ranges("N", end), "S": _SPACE}
    for name, members in classes.items():
        template = template.replace(f"{{{name}}}", members)
    return re.compile(template)


def _ranges(category: str, end: int) -> str:
    """The characters below `end` of a general category, as the inside of a character class."""
    ranges: list[list[int]] = []
    for code in range(end):
        if unicodedata.category(chr(code))[0] == category:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)
