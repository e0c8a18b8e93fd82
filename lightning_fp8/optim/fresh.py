"""State before the first step: which formats a parameter gets, and their zeros, cut as the parameter is."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.weights import BF16_WEIGHTS, PER_BLOCK, STATE_DTYPES, FP32Weights, Weights
from lightning_fp8.optim import blocks, shards
from lightning_fp8.optim.step import MOMENTS, Moments


def weights_of(p: Tensor, rounding: str) -> type[Weights]:
    """The class that keeps the weights of `p`; vectors and narrow tensors, as of moments, have no scales."""
    if p.dtype is not torch.bfloat16:
        return FP32Weights
    scaled = set(BF16_WEIGHTS[rounding]._fields) & set(PER_BLOCK)
    return BF16_WEIGHTS["kahan" if scaled and not blocks.is_matrix(p.shape) else rounding]


def moments_of(p: Tensor, moments: str) -> type[Moments]:
    """The class that keeps the moments of `p`: that of the format, or fp32 for vectors and narrow tensors.

    The whole shape decides, however `p` is sharded.
    """
    return MOMENTS[moments if blocks.is_matrix(p.shape) else "fp32"]


class _Field(NamedTuple):
    """A tensor of a codec: its dtype, whether it has one number an element or a block, and what it starts as."""

    dtype: torch.dtype
    per_element: bool
    start: float


def _fields(kind: type[Moments]) -> dict[str, _Field]:
    zeros = kind.zeros(1, 2, 2, torch.device("cpu"))._asdict()  # one block of two elements tells everything
    return {name: _Field(t.dtype, t.numel() == 2, t.flatten()[0].item()) for name, t in zeros.items()}


_FIELDS = {kind: _fields(kind) for kind in MOMENTS.values()}


def new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of parameter `p` of `group` before its first step."""
    state = {"step": torch.zeros((), dtype=torch.int64, device=p.device)}
    for name, field in _FIELDS[moments_of(p, group["moments"])].items():
        if field.per_element:
            zeros = shards.new_elements(p, field.dtype)
        else:
            zeros = shards.new_scales(p, group["block_size"], field.dtype)
        state[name] = zeros + field.start if field.start else zeros
    for name in weights_of(p, group["rounding"])._fields[1:]:
        dtype = STATE_DTYPES[name]
        scale = name in PER_BLOCK
        state[name] = shards.new_scales(p, group["block_size"], dtype) if scale else shards.new_elements(p, dtype)
    return state


def fields_of(p: Tensor, group: dict[str, Any]) -> set[str]:
    """The names in the state of parameter `p` of `group`."""
    return {"step", *_FIELDS[moments_of(p, group["moments"])], *weights_of(p, group["rounding"])._fields[1:]}
