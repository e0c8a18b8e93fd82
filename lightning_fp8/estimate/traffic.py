"""Bytes that a device sends the others in a step.

DDP     a ring's all-reduce of the gradients, 2 (N - 1) / N of them; in FP8, see `distributed/reduction.py`
FSDP2   each block's weights are gathered for forward and again for backward, (N - 1) / N of them each time, in bf16
        or, those of FP8 layers with one scale, in one byte; gradients are scattered as sums, (N - 1) / N of them
"""

from lightning_fp8.compute.recipe import Recipe
from lightning_fp8.distributed.reduction import bytes_sent
from lightning_fp8.estimate.setup import Communication, Setup, layers

_COMPUTE_BYTES = 2  # of a weight that is gathered in bf16


def bytes_per_step(setup: Setup, how: Communication, recipe: Recipe | None) -> float:
    """What one of `setup.devices` sends; 0 if it is alone.

    Args:
        setup: The step.
        how: What is sent.
        recipe: Of the linear layers: without one there is nothing to gather in FP8.
    """
    sizes, ways = layers(setup.config), setup.devices
    if not how.sharded:
        if how.fp8:
            return bytes_sent(sizes.parameters, sizes.tensors, ways)
        return 2 * (ways - 1) / ways * sizes.parameters * setup.grad_bytes
    # Scales of rows and tiles would have to be known before a weight is whole.
    in_fp8 = how.fp8 and recipe is not None and recipe.weight.granularity == "tensor"
    converted = setup.config.num_layers * sum(k * n for k, n in sizes.linears) if in_fp8 else 0
    gathered = converted + (sizes.parameters - converted) * _COMPUTE_BYTES
    return (ways - 1) / ways * (2 * gathered + sizes.parameters * setup.grad_bytes)
