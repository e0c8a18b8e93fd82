r"""Where a text can be cut so that its parts have the tokens of the whole.

Byte-level BPE first cuts text into words by a regular expression and never merges across words. A cut is safe where
the expression ends a word whatever stands before and after: after a letter or a digit that white space or punctuation
follows, an apostrophe apart (with it "don't" goes on). No alternative of the expressions in `_SPLITS` matches across
such a place, none looks back, and what looks ahead, `\s+(?!\S)`, begins with white space. NFC changes nothing there
either: no punctuation, symbol or space composes with what precedes it, and a character that NFC takes apart does not
count. Tokens which are searched in the text before it is cut into words can hold such places; where one does, only
cuts before white space are left.

A tokenizer that cuts in another way has no known place: its documents stay whole, and memory grows with the longest.
So it does with the longest word: a hundred megabytes of hexadecimal digits are one to all tokenizers.
"""

import json
import re
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Boundary = re.Pattern[str]
# The first character is what ends a word; the one after is looked at again by `next_boundary`.
BEFORE_ANY: Boundary = re.compile(r"[^\W_](?=[^\w'])")
BEFORE_SPACE: Boundary = re.compile(r"[^\W_](?=\s)")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _of_cases(end: str, numbers: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"


_SPLITS = {
    *(
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
        for numbers in (r"\p{N}{1,3}", r"\p{N}")  # Llama 3; Qwen 2 to 3
    ),
    _of_cases(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),  # GPT-4o
    _of_cases("", r"\p{N}"),  # Mistral Nemo
}


def next_boundary(text: str, start: int, boundary: Boundary) -> int | None:
    """The first place from `start` on, and before the end, where `text` can be cut; None if there is none."""
    for match in boundary.finditer(text, max(0, start - 1)):
        end = match.end()
        following = text[end]
        # Marks go on with what is before them, and what Python does not know may be a letter to the tokenizer.
        ends_word = following.isspace() or unicodedata.category(following)[0] in "PSZ"
        if ends_word and unicodedata.is_normalized("NFC", text[end - 1]):
            return end
    return None


def boundary_of(tokenizer: "Tokenizer") -> Boundary | None:
    """Where texts of this tokenizer can be cut; None where no place is known to be safe.

    Args:
        tokenizer: Of which special tokens in the text are text.
    """
    content = json.loads(tokenizer.to_str())
    in_text = [token for token in content["added_tokens"] if not token["special"]]
    if (
        content["model"]["type"] != "BPE"
        or content["model"].get("dropout")
        or not tokenizer.encode_special_tokens
        or not _keeps_boundaries(content["normalizer"])
        or any(token["lstrip"] or token["rstrip"] for token in in_text)
    ):
        return None
    if not _cuts_known_words(content["pre_tokenizer"]):
        return None
    for boundary in (BEFORE_ANY, BEFORE_SPACE):
        if all(next_boundary(token["content"], 0, boundary) is None for token in in_text):
            return boundary
    return None


def describe(tokenizer: "Tokenizer") -> str:
    """How it cuts text into words, for a message."""
    content = json.loads(tokenizer.to_str())
    parts = {"normalizer": content["normalizer"], "pre_tokenizer": content["pre_tokenizer"]}
    return ", ".join(f"{name} {json.dumps(part)}" for name, part in parts.items() if part)[:300]


def _keeps_boundaries(normalizer: dict[str, Any] | None) -> bool:
    match normalizer:
        case None | {"type": "NFC"}:
            return True
        case {"type": "Sequence", "normalizers": list(parts)}:
            return all(map(_keeps_boundaries, parts))
    return False


def _cuts_known_words(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:  # GPT-2
            return True
        case {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, last]}:
            return _cuts_known_words(last)
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return expression in _SPLITS
    return False
