"""One step of a torch optimizer on tensors of ours, by a private instance of its class.

The class's own `step` runs, without torch's hooks and profiling, which belong to the whole step and not to a chunk of
it. Nothing of the instance outlives the call.
"""

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer


def step_elements(
    base: Optimizer, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Steps `weight` in place as `base` would.

    Args:
        base: An element-wise optimizer, so that the shape does not matter.
        group: Its hyperparameters.
        weight: fp32, any shape.
        grad: fp32, the same.
        state: Of the base class, fp32: tensors of that shape, and scalars. Empty before the first step.

    Returns:
        The state after the step.
    """
    kind = type(base)
    instance = kind.__new__(kind)
    options = {name: value for name, value in group.items() if name not in ("params", "param_names", "foreach")}
    single = {"foreach": False} if "foreach" in group else {}
    groups = [{**options, **single, "params": [weight]}]
    Optimizer.__setstate__(instance, {"defaults": base.defaults, "state": defaultdict(dict), "param_groups": groups})
    if not state and isinstance(base, torch.optim.Adagrad):  # older releases make its state when it is built
        state = {"step": torch.zeros(()), "sum": torch.full_like(weight, group["initial_accumulator_value"])}
    instance.state[weight].update(state)
    weight.grad = grad
    cast(Any, kind).step.__wrapped__(instance)
    weight.grad = None
    return {name: value for name, value in instance.state[weight].items() if isinstance(value, Tensor)}


def step_matrix(
    base: Optimizer, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor], columns: int
) -> dict[str, Tensor]:
    """The same for an optimizer that must see a matrix, given as all its blocks [n, b], and so returned."""
    size = weight.shape[1]
    rows = weight.numel() // (-(-columns // size) * size)

    def unpack(blocks: Tensor) -> Tensor:
        return blocks.reshape(rows, -1)[:, :columns].contiguous() if blocks.dim() else blocks

    def pack(matrix: Tensor) -> Tensor:
        return F.pad(matrix, (0, -columns % size)).view(-1, size) if matrix.dim() else matrix

    matrix = unpack(weight)
    after = step_elements(base, group, matrix, unpack(grad), {name: unpack(value) for name, value in state.items()})
    weight.copy_(pack(matrix))
    return {name: pack(value) for name, value in after.items()}
