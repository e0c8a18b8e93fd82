"""What training a model costs in memory, before there is any: optimizers make their state on the meta device.

Nothing is calculated from formulas about formats: our optimizers allocate, on the meta device, what they would
allocate anywhere, and torch's step one-element stand-ins, which shows the dtype of every state tensor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp8.optim.adamw import FP8AdamW
from lightning_fp8.optim.groups import decay_groups
from lightning_fp8.optim.ledger import Ledger, measure_ledger
from lightning_fp8.optim.wrapper import FP8Optimizer

Factory = Callable[[list[dict[str, Any]]], Optimizer]


class Mode(NamedTuple):
    """A way to train: the dtype of weights and gradients, the optimizer, and whether gradients are released."""

    name: str
    dtype: torch.dtype
    optimizer: Factory
    release: bool = False


MODES = (
    Mode("fp32, AdamW", torch.float32, torch.optim.AdamW),
    Mode("bf16 weights and gradients, fp32 moments", torch.bfloat16, lambda groups: FP8AdamW(groups, moments="fp32")),
    Mode("bf16 weights and gradients, FP8AdamW", torch.bfloat16, FP8AdamW),
    Mode("the same with gradient release", torch.bfloat16, FP8AdamW, release=True),
)


def estimate(module: nn.Module, mode: Mode, *, ways: int = 1) -> Ledger:
    """The ledger of `module`, trained as `mode` says, during a step.

    Args:
        module: On the meta device; its weights get the mode's dtype.
        mode: One of `MODES`, or another.
        ways: Into how many parts FSDP2 cuts it; the ledger is the first rank's. Under DDP, 1: every rank has all.
    """
    module.to(mode.dtype)
    groups = decay_groups(module)
    params: list[Tensor] = [p for group in groups for _, p in group["params"]]
    for p in params:
        p.grad = None if mode.release else torch.empty_like(p)
    stand_ins = [nn.Parameter(torch.zeros([1] * p.dim(), dtype=mode.dtype)) for p in params]
    remaining = iter(stand_ins)
    optimizer = mode.optimizer(
        [{**group, "params": [(name, next(remaining)) for name, _ in group["params"]]} for group in groups]
    )
    if isinstance(optimizer, FP8AdamW | FP8Optimizer):
        optimizer = cast(FP8AdamW | FP8Optimizer, mode.optimizer(groups))
        optimizer.allocate()
    else:
        for stand_in in stand_ins:
            stand_in.grad = torch.zeros_like(stand_in)
        optimizer.step()
        for p, stand_in in zip(params, stand_ins, strict=True):
            optimizer.state[p] = {
                name: torch.empty_like(p, dtype=value.dtype) if value.dim() else value
                for name, value in optimizer.state[stand_in].items()
                if isinstance(value, Tensor)
            }
    return measure_ledger(params, [optimizer], ways=ways)
