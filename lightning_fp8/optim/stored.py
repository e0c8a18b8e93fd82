"""The stored state of one parameter: made, filled from full precision, and expanded to it.

Whole parameters pass through here when state is imported or exported; a step works on chunks of many parameters and
does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fp8.optim import blocks, shards
from lightning_fp8.optim.codecs import Codec

_CHUNK_ELEMENTS = 1 << 20
State = dict[str, Any]


def tensors_of(state: State) -> dict[str, Tensor]:
    """The part of a state that has numbers for elements or blocks."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim()}


def scalars_of(state: State) -> dict[str, Tensor]:
    """The part of a state that is one number each, as `step`."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and not value.dim()}


def new_stored(p: Tensor, block_size: int, codecs: Sequence[Codec]) -> dict[str, Tensor]:
    """Zeros for what `codecs` store of `p`, cut as `p` is."""
    return {
        s.name: shards.new_scales(p, block_size, s.dtype) if s.per_block else shards.new_elements(p, s.dtype)
        for codec in codecs
        for s in codec.stored
    }


def store(p: Tensor, block_size: int, codecs: Sequence[Codec], values: State) -> dict[str, Tensor]:
    """What `codecs` store of `values`, one tensor of the shape of `p` a key, rounded to nearest."""
    stored = new_stored(p, block_size, codecs)
    place, views = shards.place_of(p), _matrices(p, stored)
    sources = _matrices(p, {key: shards.cut_alike(values[key], p) for codec in codecs for key in codec.keys})
    for rows in blocks.chunks((place.shape,), _CHUNK_ELEMENTS) if all(place.shape) else ():
        for codec in codecs:
            chunk = [blocks.gather([sources[key]], rows, block_size).float() for key in codec.keys]
            encoded = codec.encode(chunk, torch.full_like(chunk[0], 0.5))  # half a code up or down: to nearest
            for target, value in zip(codec.stored, encoded, strict=True):
                blocks.scatter(value, [views[target.name]], rows)
    return stored


def expand(p: Tensor, block_size: int, codecs: Sequence[Codec], stored: State) -> dict[str, Tensor]:
    """The fp32 values, of the shape of `p` and cut alike, that `stored` stands for."""
    values = {key: shards.new_elements(p, torch.float32) for codec in codecs for key in codec.keys}
    place, views, targets = shards.place_of(p), _matrices(p, tensors_of(stored)), _matrices(p, values)
    for rows in blocks.chunks((place.shape,), _CHUNK_ELEMENTS) if all(place.shape) else ():
        for codec in codecs:
            chunk = [blocks.gather([views[s.name]], rows, 1 if s.per_block else block_size) for s in codec.stored]
            for key, value in zip(codec.keys, codec.decode(chunk), strict=True):
                blocks.scatter(value, [targets[key]], rows)
    return values


def _matrices(p: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The local parts as matrices; a parameter without elements has none."""
    rows, columns = shards.place_of(p).shape
    return {name: shards.local_part(t).view(rows, -1) for name, t in tensors.items()} if rows * columns else {}
