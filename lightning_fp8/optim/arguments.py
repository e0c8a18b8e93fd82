"""What the options of a parameter group may be; errors name the field, what it is and what it may be."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_fp8.optim.guidance import warn_of_moments

LARGEST_BLOCK = 2**31 - 1  # kernels count in 32 bits


def check_shared(owner: str, group: dict[str, Any], choices: Mapping[str, Iterable[str]]) -> None:
    """Checks the parameters of a group, and the options that all our optimizers have.

    Args:
        owner: The optimizer's name, for errors.
        group: Its parameters and options.
        choices: What the options of some names may be.

    Raises:
        ValueError: An option is out of range, or a parameter is neither bf16 nor fp32, or not contiguous.
    """
    for name, allowed in choices.items():
        if group[name] not in allowed:
            raise ValueError(f"{owner}: {name} {group[name]!r} is not one of {', '.join(allowed)}.")
    if not 1 <= group["block_size"] <= LARGEST_BLOCK:
        raise ValueError(f"{owner}: block_size is {group['block_size']}; it must be from 1 to {LARGEST_BLOCK}.")
    check_limits(owner, group, "max_skipped_steps")
    for p in group["params"]:
        if p.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"{owner}: a parameter is {p.dtype}; weights must be bfloat16 or float32.")
        if not p.is_contiguous():
            raise ValueError(f"{owner}: a parameter of shape {tuple(p.shape)} is not contiguous; make it so first.")


def check_limits(owner: str, group: dict[str, Any], *names: str) -> None:
    """Checks options that are positive numbers, or None for no limit.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"{owner}: {name} is {group[name]}; it must be more than 0, or None.")


def check_adamw(owner: str, group: dict[str, Any]) -> None:
    """Checks the numbers of AdamW.

    Raises:
        ValueError: One is out of range.
    """
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"{owner}: lr is a tensor of {group['lr'].numel()} elements; it must have one.")
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{owner}: {name} is {group[name]}; it must be 0 or more, and finite.")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"{owner}: betas are {group['betas']}; both must be in [0, 1).")
    warn_of_moments(group["moments"], group["betas"], group["eps"])
