"""A model in the precisions that the benchmarks compare: BF16, each recipe of ours, torchao's and Transformer Engine's.

A recipe's name with "+fused" is that with norms and MLPs which write FP8 themselves (`compute/fused.py`).

An arm that cannot run here is left out, and the reason printed: no row is made up.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from torch import nn

from lightning_fp8 import convert_linears, hardware
from lightning_fp8.compute import PRESETS, fuse_casts
from lightning_fp8.compute.transformer_engine.convert import (
    convert_to_transformer_engine,
    transformer_engine_autocast,
)

FUSED = ("tensorwise+fused", "delayed+fused", "blockwise+fused")


class Arm(NamedTuple):
    """How a bf16 model becomes this arm's, in place, and what its forward passes run in."""

    convert: Callable[[nn.Module], object]
    context: Callable[[], AbstractContextManager[None]] = nullcontext


def arms(names: list[str]) -> dict[str, Arm]:
    """Those of `names` ("bf16", presets, those of FUSED, "torchao", "te") that can run here."""
    made: dict[str, Arm] = {}
    for name in names:
        if name == "bf16":
            made[name] = Arm(lambda model: model)
        elif name in PRESETS:
            made[name] = Arm(lambda model, preset=name: convert_linears(model, preset))
        elif name in FUSED:
            made[name] = Arm(partial(_to_fused, preset=name.removesuffix("+fused")))
        elif reason := why_not(name):
            print(f"{name} is left out: {reason}")
        elif name == "torchao":
            made[name] = Arm(_to_torchao)
        else:
            made[name] = Arm(convert_to_transformer_engine, transformer_engine_autocast)
    return made


def why_not(name: str) -> str | None:
    """Why another library's arm cannot run here; None if it can."""
    if name == "te":
        return hardware.why_not_transformer_engine("tensor")
    if name != "torchao":
        return f"it is none of bf16, {', '.join((*PRESETS, *FUSED))}, torchao, te"
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        return f"torchao does not import ({error})"
    return None


def _to_fused(model: nn.Module, preset: str) -> None:
    convert_linears(model, preset)
    fuse_casts(model)


def _to_torchao(model: nn.Module) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Emulated where there are no FP8 GEMMs, as its own tests do it.
    config = Float8LinearConfig(emulate=hardware.why_not_native(("tensor",)) is not None)

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and "lm_head" not in name

    return convert_to_float8_training(model, config=config, module_filter_fn=fits)
