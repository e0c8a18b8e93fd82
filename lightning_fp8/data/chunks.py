"""Token ids on disk to the chunks that litdata streams."""

import json
from pathlib import Path

import numpy as np
import torch
from litdata.streaming import Cache
from litdata.streaming.item_loader import TokensLoader

from lightning_fp8.data.manifest import write_json

CHUNK_BYTES = "64MB"  # blocks do not cross chunks, so the tail of each chunk is lost: few large ones
ITEM_TOKENS = 1 << 20
INDEX_NAME = "index.json"


def write_chunks(flat: Path, dtype: "np.dtype[np.generic]", folder: Path, content: str) -> None:
    """Cut a flat file of ids into chunks, in constant memory.

    Args:
        flat: The ids, one after the other.
        dtype: Theirs: uint16 or int32, the types that litdata can stream.
        folder: Where the chunks and their index go.
        content: The fingerprint of the content. It takes the place of the time in the index, by which litdata's
            caches know that data has changed: the same content gives the same bytes, and other content is noticed.
    """
    folder.mkdir(parents=True)
    writer = Cache(str(folder), chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader())
    items = -(-flat.stat().st_size // (ITEM_TOKENS * dtype.itemsize))
    for index in range(items):
        ids = np.fromfile(flat, dtype, ITEM_TOKENS, offset=index * ITEM_TOKENS * dtype.itemsize)
        writer[index] = torch.from_numpy(ids)
    writer.done()
    writer.merge()
    index_file = folder / INDEX_NAME
    write_json(index_file, json.loads(index_file.read_text(encoding="utf-8")) | {"updated_at": content})
