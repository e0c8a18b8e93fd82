"""What a GEMM does: recipes, FP8 linear layers, their backends and the conversion of models."""

from lightning_fp8.compute.autocast import fp8_autocast
from lightning_fp8.compute.convert import ConversionReport, convert_linears, restore_linears
from lightning_fp8.compute.linear import FP8Linear, end_step
from lightning_fp8.compute.recipe import PRESETS, Operand, Recipe
from lightning_fp8.compute.state import fp8_state_dict, load_fp8_state_dict

__all__ = [
    "PRESETS",
    "ConversionReport",
    "FP8Linear",
    "Operand",
    "Recipe",
    "convert_linears",
    "end_step",
    "fp8_autocast",
    "fp8_state_dict",
    "load_fp8_state_dict",
    "restore_linears",
]
