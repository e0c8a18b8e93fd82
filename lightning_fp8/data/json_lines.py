"""The texts of a JSON Lines file, a long line in parts, so that memory does not grow with it.

A line of up to `LINE_BYTES` is parsed at once, by C. A longer one is read by a scanner that takes strings part by
part: those of its text go on, other long ones are only checked. What is left, the line with short strings in place of
the long ones, is parsed at the end, so that nothing which `json.loads` would refuse passes.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LINE_BYTES = 1 << 22
PART_BYTES = 1 << 20
_SHORT = 1 << 10  # characters of a string that stay in what is left of a long line

# As much of a string as is certainly whole: no escape cut in two, and no pair of surrogates.
_HEX = "[0-9a-fA-F]"
_LOW = rf"[dD][c-fC-F]{_HEX}{{2}}"
# So many pieces at a time, for the expression keeps a note of each. (Without notes, by `*+`, Python 3.11.2 finds less.)
_INSIDE = re.compile(
    r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]'
    rf"|u(?![dD][89abAB]){_HEX}{{4}}"
    rf"|u[dD][89abAB]{_HEX}{{2}}(?:\\u{_LOW}|(?=[^\\]|\\[^u]|\\u(?!{_LOW}){_HEX}{{4}})))){{0,1000}}"
)
_OUTSIDE = re.compile(r'[^"]*+')
_KEY = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*$')
_LONGEST_ESCAPE = 12

Part = tuple[str, int]


def read_texts(path: Path) -> Iterator[Iterator[Part]]:
    """Reads the documents of a file, each as an iterator to be used up before the next.

    Args:
        path: UTF-8; each line that is not blank holds an object with a string `text`.

    Yields:
        The parts of a document, and the bytes of the file that each stands for. Blank lines count with the next
        document; those at the end are an empty one.

    Raises:
        ValueError: A line has no such text.
    """
    blank = 0
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_BYTES):
            number += 1
            if line.isspace():
                blank += len(line)
                number -= not line.endswith(b"\n")  # its end is to come
            elif len(line) < LINE_BYTES or line.endswith(b"\n"):
                yield iter([(_text_of(line, path, number), len(line) + blank)])
                blank = 0
            else:
                yield _parts(line, stream, blank, path, number)
                blank = 0
    if blank:
        yield iter([("", blank)])


def _text_of(line: bytes, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise _error(path, number)
    return text


def _error(path: Path, number: int) -> ValueError:
    return ValueError(
        f'{path}:{number}: expected an object with the text as a string, {{"text": "..."}}; correct or remove the line.'
    )


def _parts(chunk: bytes, stream: BinaryIO, blank: int, path: Path, number: int) -> Iterator[Part]:
    """The text of a long line, of which `chunk` has been read."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest: list[str] = []  # the line without what long strings hold
    depth = texts = kept = 0
    is_text = in_string = False
    pending, read = "", blank
    while True:
        ended = not chunk or chunk.endswith(b"\n")
        pending, read = pending + decoder.decode(chunk, ended), read + len(chunk)
        at = 0
        while at < len(pending):
            stop = _end(_INSIDE if in_string else _OUTSIDE, pending, at)
            stretch = pending[at:stop]
            if not in_string:
                depth += sum(map(stretch.count, "{[")) - sum(map(stretch.count, "}]"))
                rest.append(stretch)
                in_string, kept = stop < len(pending), 0
                is_text = in_string and depth == 1 and _is_value_of_text("".join(rest[-8:]))
                texts += is_text
            else:
                text = _decoded(stretch, path, number)
                if is_text:
                    yield text, read
                    read = 0
                elif kept < _SHORT:
                    rest.append(stretch)
                    kept += len(stretch)
                if pending[stop : stop + 1] != '"':
                    if len(pending) - stop > _LONGEST_ESCAPE:
                        raise _error(path, number)
                    at = stop
                    break
                in_string = False
            rest.append(pending[stop : stop + 1])
            at = stop + 1
        pending = pending[at:]
        if ended:
            break
        chunk = stream.readline(PART_BYTES)
    try:
        whole = json.loads("".join(rest))
    except ValueError:
        raise _error(path, number) from None
    if in_string or texts != 1 or not isinstance(whole, dict) or whole.get("text") != "":
        raise _error(path, number)
    if read:
        yield "", read


def _end(expression: re.Pattern[str], text: str, at: int) -> int:
    """Where what matches from `at` on ends."""
    while (match := expression.match(text, at)) and match.end() > at:
        at = match.end()
    return at


def _decoded(inside: str, path: Path, number: int) -> str:
    if "\\" not in inside:
        return inside
    try:
        text: str = json.loads(f'"{inside}"')
    except ValueError:
        raise _error(path, number) from None
    return text


def _is_value_of_text(before: str) -> bool:
    key = _KEY.search(before)
    return key is not None and json.loads(key[1]) == "text"
