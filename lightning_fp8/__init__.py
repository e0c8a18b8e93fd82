"""End-to-end FP8 pre-training for PyTorch Lightning and Fabric."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_fp8.compute import (
        FP8Linear,
        Recipe,
        convert_linears,
        end_step,
        fp8_autocast,
        fp8_state_dict,
        load_fp8_state_dict,
    )
    from lightning_fp8.precision import FabricFP8Precision, FP8Precision

__version__ = "0.1.0.dev0"
__all__ = [
    "FP8Linear",
    "FP8Precision",
    "FabricFP8Precision",
    "Recipe",
    "convert_linears",
    "end_step",
    "fp8_autocast",
    "fp8_state_dict",
    "load_fp8_state_dict",
]

_HOMES = {
    "FP8Precision": "lightning_fp8.precision",
    "FabricFP8Precision": "lightning_fp8.precision",
    "FP8Linear": "lightning_fp8.compute",
    "Recipe": "lightning_fp8.compute",
    "convert_linears": "lightning_fp8.compute",
    "end_step": "lightning_fp8.compute",
    "fp8_autocast": "lightning_fp8.compute",
    "fp8_state_dict": "lightning_fp8.compute",
    "load_fp8_state_dict": "lightning_fp8.compute",
}


def __dir__() -> list[str]:
    """The public names, those not yet imported among them."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for, so that `lightning-fp8 doctor` runs where torch is broken."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_fp8' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
