"""One launch for many tensors: whose a program is, and tables of where the tensors lie.

Programs are numbered through all tensors. How many tensors begin at or before a program says whose it is: one load of a
few cache lines and one sum, whatever their number.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def owner_of(first_ptr, program, COUNT, PADDED: tl.constexpr):
    """The number of the last of COUNT tensors that begin at or before `program`; PADDED is a power of two."""
    each = tl.arange(0, PADDED)
    first = tl.load(first_ptr + each, mask=each < COUNT, other=0x7FFFFFFF)
    return tl.sum((first <= program).to(tl.int32), axis=0) - 1


@triton.jit
def pointer(at, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The pointer to TYPE that an int64 at `at` is, known to be a multiple of ALIGNMENT bytes."""
    return tl.multiple_of(tl.load(at).to(tl.pointer_type(TYPE)), ALIGNMENT)


@functools.lru_cache(maxsize=64)
def on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table, copied from pinned memory, which the host does not wait for, and kept.

    As long as tensors lie where they lay before, as a caching allocator's mostly do, there is nothing to copy.
    """
    table = torch.tensor(values, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
