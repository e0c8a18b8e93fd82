"""What a GEMM does: recipes, FP8 linear layers, their backends and the conversion of models."""

from lightning_fp8.compute.autocast import fp8_autocast
from lightning_fp8.compute.convert import ConversionReport, convert_linears, restore_linears
from lightning_fp8.compute.fused import fuse_casts
from lightning_fp8.compute.linear import FP8Linear, end_step
from lightning_fp8.compute.recipe import PRESETS, Operand, Recipe
from lightning_fp8.compute.state import fp8_state_dict, load_fp8_state_dict
from lightning_fp8.compute.transformer_engine.convert import (
    convert_to_transformer_engine,
    restore_from_transformer_engine,
    transformer_engine_autocast,
)

__all__ = [
    "PRESETS",
    "ConversionReport",
    "FP8Linear",
    "Operand",
    "Recipe",
    "convert_linears",
    "convert_to_transformer_engine",
    "end_step",
    "fp8_autocast",
    "fp8_state_dict",
    "fuse_casts",
    "load_fp8_state_dict",
    "restore_from_transformer_engine",
    "restore_linears",
    "transformer_engine_autocast",
]
