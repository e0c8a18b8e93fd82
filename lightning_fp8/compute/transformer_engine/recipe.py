"""Recipes as Transformer Engine's own: each field of ours is said in its terms, or refused.

    by tensor, current scaling     Float8CurrentScaling
    by tensor, delayed scaling     DelayedScaling
    block_1x128 (x block_128x128)  Float8BlockScaling
    mx_1x32                        MXFP8BlockScaling

Nothing is left to Transformer Engine's defaults, which environment variables can change. Three of its habits shape
this file: its recipes ignore arguments that they do not know; `Float8CurrentScaling(use_power_2_scales=True)` does not
reach a Linear's quantizers, which read the `QParams` of the instance; and `use_split_accumulator` is the opposite of
fast accumulation, whatever its docstring says.
"""

from functools import cache
from typing import Any

from lightning_fp8 import hardware
from lightning_fp8.compute.recipe import GEMMS, ROLES, Recipe

_HAS = "Transformer Engine has tensorwise, delayed, blockwise and mxfp8"
# The names that it has for operands and GEMMs.
_QPARAMS = {"input": "fp8_quant_fwd_inp", "weight": "fp8_quant_fwd_weight", "grad_output": "fp8_quant_bwd_grad"}
_MMPARAMS = {"forward": "fp8_gemm_fprop", "input_grad": "fp8_gemm_dgrad", "weight_grad": "fp8_gemm_wgrad"}


def require_transformer_engine(recipe: Recipe) -> None:
    """Makes sure that Transformer Engine has this recipe and can run it here.

    Raises:
        ValueError: It has no such recipe, is not installed, does not import, or the device cannot run the recipe.
    """
    _check(recipe)
    problem = hardware.why_not_transformer_engine(recipe.weight.granularity)
    if problem:
        raise ValueError(f"FP8 backend 'transformer_engine' cannot run here: {problem}. Backend 'auto' runs anywhere.")


@cache
def transformer_engine_recipe(recipe: Recipe) -> Any:
    """`recipe` as the Transformer Engine recipe that computes the same; one object for equal recipes.

    Raises:
        ValueError: There is none.
    """
    _check(recipe)
    from transformer_engine.common import recipe as te

    formats = te.Format.E4M3 if recipe.grad_output.format == "e4m3" else te.Format.HYBRID
    common: dict[str, Any] = {"fp8_format": formats, "backward_override": None}
    mm = {_MMPARAMS[gemm]: te.MMParams(use_split_accumulator=gemm not in recipe.fast_accumulation) for gemm in GEMMS}
    if recipe.scaling == "delayed":
        return te.DelayedScaling(
            margin=recipe.margin, amax_history_len=recipe.history, amax_compute_algo=recipe.amax, **common
        )
    granularity = recipe.weight.granularity
    if granularity == "mx_1x32":
        return te.MXFP8BlockScaling(**common)
    powers = {role: recipe.operand(role).power_of_two for role in ROLES}
    if granularity == "tensor":
        made = te.Float8CurrentScaling(use_power_2_scales=all(powers.values()), **mm, **common)
    else:
        square = granularity == "block_128x128"
        made = te.Float8BlockScaling(
            use_f32_scales=not all(powers.values()),
            x_block_scaling_dim=1,
            w_block_scaling_dim=2 if square else 1,
            grad_block_scaling_dim=1,
            **common,
        )
    for role, power in powers.items():
        setattr(made, _QPARAMS[role], te.QParams(power_2_scale=power))
    return made


def _check(recipe: Recipe) -> None:
    """Raises a ValueError that says what in `recipe` Transformer Engine does not do."""
    problem = _problem(recipe)
    if problem:
        raise ValueError(f"FP8 backend 'transformer_engine': {problem}. {_HAS}; other recipes need another backend.")


def _problem(recipe: Recipe) -> str | None:
    granularities = {recipe.operand(role).granularity for role in ROLES}
    if "row" in granularities:
        return "it has no scales by row"
    if recipe.high_precision:
        return f"it cannot keep single GEMMs in high precision, here {', '.join(recipe.high_precision)}"
    if "e5m2" in (recipe.input.format, recipe.weight.format):
        return "inputs and weights are always e4m3 in it; only grad_output can be e5m2"
    block = {"block_1x128", "block_128x128"}
    if len(granularities) > 1 and not (granularities <= block and recipe.input.granularity == "block_1x128"):
        return f"it does not mix scales by {', '.join(sorted(granularities))}"
    powers = [role for role in ROLES if recipe.operand(role).power_of_two]
    if recipe.scaling == "delayed" and powers:
        return f"its delayed scaling has no power-of-two scales, and power_of_two is set for {', '.join(powers)}"
    fixed = recipe.scaling == "delayed" or "mx_1x32" in granularities
    if fixed and "forward" not in recipe.fast_accumulation:
        return "with this scaling it always asks for fast accumulation in the forward GEMM"
    return None
