"""Which sizes of linear layers FP8 can multiply, and for which it is known to be slower than bf16."""

from typing import NamedTuple

from lightning_fp8.compute.gemm.rules import SIZE_MULTIPLE
from lightning_fp8.compute.recipe import Recipe


class Bound(NamedTuple):
    """Layers with at most so many inputs (K) and at most so many outputs (N); None bounds nothing."""

    inputs: int | None
    outputs: int | None


# Measured by the authors of torchao (its `_auto_filter_for_recipe`) on an H100, forward and backward, compiled: there
# casting costs more than the FP8 GEMMs save. Finer scales than by row cost at least as much as rows do.
SLOWER_BY_TENSOR = (Bound(4096, 1024),)
SLOWER_BY_ROW = (Bound(None, 2048), Bound(1024, None), Bound(2048, 4096))


def impossible(inputs: int, outputs: int) -> str | None:
    """Why hardware cannot multiply by a weight of these sizes; None if it can."""
    if inputs % SIZE_MULTIPLE or outputs % SIZE_MULTIPLE:
        return f"sizes {inputs} x {outputs} are not multiples of {SIZE_MULTIPLE}"
    return None


def slower(inputs: int, outputs: int, recipe: Recipe) -> str | None:
    """Why a layer of these sizes is known to be slower in FP8 on FP8 hardware; None if it is not."""
    by_tensor = recipe.weight.granularity == "tensor"
    for bound in SLOWER_BY_TENSOR if by_tensor else SLOWER_BY_ROW:
        if inputs <= (bound.inputs or inputs) and outputs <= (bound.outputs or outputs):
            scales = "tensor" if by_tensor else "row or block"
            return f"sizes {inputs} x {outputs} are slower in FP8 than in bf16 on an H100, with scales by {scales}"
    return None
