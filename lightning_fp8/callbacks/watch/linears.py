"""What is measured of linear layers: the three operands, and the casts that the recipe makes of them.

An `FP8Linear` casts its input and weight in forward and the gradient of its output in backward. The same casts are made
here, by the same function with the same scales, so their error is that of the run, of any recipe; the input's cast is
the very one that the layer goes on to use. Of an operand that is cast twice, once for each GEMM that reads it
(scales by row or block), it is the cast of the first of the two. While a layer is switched to BF16 it is measured as
if it were cast by its own amax, so that one sees whether it could go back.

A layer of Transformer Engine makes its casts inside its kernels: of it, magnitudes alone are measured.

Hooks look at tensors and return nothing. A layer is measured once in a batch: its first use, and not again when
activation checkpointing runs it a second time. Of large operands, groups of 128 rows at even distances are measured
(amax and scale lag are of the whole).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fp8.callbacks.watch.tally import Gauge, Place, Tally
from lightning_fp8.compute.casts import cast, shared_cast
from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.compute.recipe import Gemm, Role
from lightning_fp8.compute.transformer_engine.layers import ConvertedLinear
from lightning_fp8.metrics.amax import Amax
from lightning_fp8.metrics.block_sqnr import BlockSQNR
from lightning_fp8.metrics.cosine import CosineDistortion
from lightning_fp8.metrics.kurtosis import ActivationKurtosis
from lightning_fp8.metrics.max_median import MaxMedianRatio
from lightning_fp8.metrics.merged import Merged, OfCasts
from lightning_fp8.metrics.rounded import Rounded, thin
from lightning_fp8.metrics.saturation import SaturationRate
from lightning_fp8.metrics.scale_lag import ScaleLag, reach
from lightning_fp8.metrics.sqnr import SQNR
from lightning_fp8.metrics.underflow import UnderflowRate
from lightning_fp8.numerics import Quantized
from lightning_fp8.numerics.quantize import amax

MOST_ELEMENTS = 1 << 22  # of an operand: 17 MB in fp32, of which a few copies are needed at once
OF_CASTS: dict[str, type[OfCasts]] = {
    "underflow": UnderflowRate,
    "saturation": SaturationRate,
    "sqnr": SQNR,
    "block_sqnr_p5": BlockSQNR,
    "cosine_distortion": CosineDistortion,
}
OF_ACTIVATIONS: dict[str, type[Merged]] = {"kurtosis": ActivationKurtosis, "max_median_ratio": MaxMedianRatio}
# The GEMM for whose layout an operand is cast first, and the other one.
_GEMMS: dict[Role, tuple[Gemm, Gemm]] = {
    "input": ("forward", "weight_grad"),
    "weight": ("forward", "input_grad"),
    "grad_output": ("input_grad", "weight_grad"),
}
SCALE = "scale"  # the largest decode scale; its drift is taken from one reading to the next


def linear_places(name: str, layer: nn.Module) -> Iterator[tuple[Place, dict[str, Gauge]]]:
    """What is measured of `layer`, if it is a linear layer that can run in FP8."""
    if not isinstance(layer, FP8Linear | ConvertedLinear):
        return
    for role, (first, other) in _GEMMS.items():
        gauges = {"amax": Gauge.of(Amax)}
        if isinstance(layer, FP8Linear) and (layer.fp8_recipe.uses_fp8(first) or layer.fp8_recipe.uses_fp8(other)):
            gauges |= {metric: Gauge.of(kind) for metric, kind in OF_CASTS.items()}
            gauges |= {"scale_lag": Gauge.of(ScaleLag), SCALE: Gauge.of(Amax)}
        if role == "input":
            gauges["kurtosis"] = Gauge.of(ActivationKurtosis, layer.in_features)
            gauges["max_median_ratio"] = Gauge.of(MaxMedianRatio)
        yield Place(name, role), gauges


def watch_linear(name: str, layer: nn.Module, tally: Tally) -> list[RemovableHandle]:
    """Measures `layer` during one batch; the hooks to remove after it."""
    if not isinstance(layer, FP8Linear | ConvertedLinear):
        return []
    seen: set[Role] = set()

    def measure(role: Role, x: Tensor) -> None:
        if role not in seen:
            seen.add(role)
            tally.add(Place(name, role), _measured(layer, role, x.detach()))

    def before_forward(_: nn.Module, args: tuple[Any, ...]) -> None:
        measure("input", args[0])
        measure("weight", layer.weight)

    def after_forward(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(partial(measure, "grad_output"))

    return [layer.register_forward_pre_hook(before_forward), layer.register_forward_hook(after_forward)]


@torch.no_grad()
def _measured(layer: FP8Linear | ConvertedLinear, role: Role, x: Tensor) -> Mapping[str, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    largest = amax(flat)
    statistics = {"amax": largest.double().view(1)}
    made = _cast(layer, role, x)
    if made is not None:
        statistics["scale_lag"] = ScaleLag.measure(largest, reach(made))
        statistics[SCALE] = Amax.measure(made.scale)
        rounded = Rounded.of(*thin(flat, made, MOST_ELEMENTS))
        statistics |= {metric: kind.measure(rounded) for metric, kind in OF_CASTS.items()}
    if role == "input":
        some = flat[:: -(-flat.numel() // MOST_ELEMENTS) or 1]
        statistics |= {"kurtosis": ActivationKurtosis.measure(some), "max_median_ratio": MaxMedianRatio.measure(some)}
    return statistics


def _cast(layer: FP8Linear | ConvertedLinear, role: Role, x: Tensor) -> Quantized | None:
    """The cast that the layer makes of an operand for the first GEMM that reads it in FP8."""
    if not isinstance(layer, FP8Linear):
        return None
    recipe, (first, other) = layer.fp8_recipe, _GEMMS[role]
    rows, columns = recipe.uses_fp8(first), recipe.uses_fp8(other)
    if not (rows or columns):
        return None
    make: Callable[..., Any] = shared_cast if role == "input" else cast
    scales = layer.fp8_scales if layer.fp8_active and not layer.fp8_fallback else None
    made = make(x, role, recipe, scales, rows=rows, columns=columns and not rows)
    found: Quantized | None = made.rows if rows else made.columns
    return found
