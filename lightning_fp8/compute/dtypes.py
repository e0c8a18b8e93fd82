"""The dtype of a model and of what goes through it: floating-point numbers are cast, all others stay."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes `dtype` that of new tensors inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_floating(tensor: Tensor, to: torch.dtype) -> Tensor:
    """`tensor` in dtype `to` if it is of floating point, else as it is."""
    return tensor.to(to) if tensor.is_floating_point() else tensor


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """As `module.to(dtype)`, but leaves complex buffers as they are: they would lose their imaginary parts."""
    named = [(owner, *pair) for owner in module.modules() for pair in owner.named_buffers(recurse=False)]
    stay = [(owner, name, buffer) for owner, name, buffer in named if buffer.is_complex()]
    for owner, name, _ in stay:
        setattr(owner, name, None)
    module.to(dtype)
    for owner, name, buffer in stay:
        setattr(owner, name, buffer)
