"""The index of a split: which chunks there are and how long, checked before any of them is opened.

It comes with the data, so from wherever that comes from. A chunk lies in the split's own folder, and holds token ids
and nothing else: litdata's format has others, one of which is pickles, which run what they hold.
"""

import json
from pathlib import Path
from typing import NamedTuple

TOKENS = "no_header_tensor:"  # litdata's name for token ids; a number for the dtype follows
_HEADER = 4  # bytes: the header is of uint32, the number of items, and one offset more than there are items


class Chunk(NamedTuple):
    """A file of token ids.

    Attributes:
        name: In the split's folder.
        tokens: How many it holds.
        header: Bytes before them.
    """

    name: str
    tokens: int
    header: int


def read_index(path: Path) -> list[Chunk]:
    """The chunks of a split.

    Raises:
        ValueError: The file is no index, or it names what no split of ours has.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content["config"]["data_format"]
        chunks = [Chunk(c["filename"], c["dim"], _HEADER * (c["chunk_size"] + 2)) for c in content["chunks"]]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: copy the folder again, or prepare it again.") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not the index of a split ({type(error).__name__}: {str(error)[:80]}): prepare the folder again."
        ) from error
    if not (isinstance(kind, list) and len(kind) == 1 and str(kind[0]).startswith(TOKENS)):
        raise ValueError(f"{path}: config.data_format is {kind}, and only token ids are read: prepare the text again.")
    for at, chunk in enumerate(chunks):
        name = chunk.name
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{path}: chunks.{at}.filename {name!r} is not in its folder: do not use this data.")
        if type(chunk.tokens) is not int or chunk.tokens < 0 or chunk.header < 2 * _HEADER:
            raise ValueError(f"{path}: chunks.{at} has {chunk.tokens!r} tokens: prepare the folder again.")
    return chunks
