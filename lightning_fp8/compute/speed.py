"""How much faster than bf16 a layer is in FP8: predicted from a datasheet, or measured on the device at hand.

The prediction is a roofline. A training step of a linear layer is three GEMMs, and in FP8 the casts that feed them:

    GEMM    max(2 M K N / FLOP rate, bytes of operands and result / bandwidth)
    casts   bytes read and written / bandwidth, and a launch for each pass

with operands transposed where the hardware wants it, and nothing fused with the layers around. Compilers do fuse, so
the prediction is on the low side for wide layers; of small ones it knows the launches but not what the host needs for
them, and is on the high side. It ranks the layers of a model; `measure` decides.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_fp8.compute.autocast import fp8_autocast
from lightning_fp8.compute.convert import convert_linears
from lightning_fp8.compute.recipe import GEMMS, Recipe, Role
from lightning_fp8.hardware import Accelerator, wait_for

# Of the datasheet's rates, what large GEMMs and streaming kernels reach (torchtitan's and DeepGEMM's tables).
_GEMM_EFFICIENCY, _BANDWIDTH_EFFICIENCY = 0.7, 0.8
_LAUNCH = 4e-6  # seconds a kernel


class LayerSize(NamedTuple):
    """A linear layer at work: M tokens, K inputs, N outputs."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Of the three GEMMs of a training step."""
        return 6 * self.m * self.k * self.n


class Seconds(NamedTuple):
    """Of forward and backward of one layer."""

    bf16: float
    fp8: float

    @property
    def speedup(self) -> float:
        """How many times faster FP8 is."""
        return self.bf16 / self.fp8


def layer_sizes(model: nn.Module, *inputs: Tensor) -> dict[str, LayerSize]:
    """The sizes at which each linear layer of `model` is called with `inputs`; by name, the largest if several.

    Nothing is computed if model and inputs are on the meta device.
    """
    sizes: dict[str, LayerSize] = {}
    with _watching(model, sizes), fp8_autocast(enabled=False), torch.no_grad():
        model(*inputs)
    return sizes


@contextmanager
def _watching(model: nn.Module, sizes: dict[str, LayerSize]) -> Iterator[None]:
    def watch(name: str, layer: nn.Linear) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            called = LayerSize(inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features)
            sizes[name] = max(called, sizes.get(name, called))

        return layer.register_forward_pre_hook(note)

    hooks = [watch(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def predict(size: LayerSize, recipe: Recipe, device: Accelerator) -> Seconds:
    """The roofline of forward and backward on `device`."""
    m, k, n = size
    bandwidth = device.bandwidth * _BANDWIDTH_EFFICIENCY
    elements: dict[Role, int] = {"input": m * k, "weight": n * k, "grad_output": m * n}
    total = sum(elements.values())

    def gemm(rate: float, operand_bytes: int) -> float:
        # Every GEMM reads two of the three matrices and writes the third, in bf16.
        traffic = (operand_bytes * total + (2 - operand_bytes) * total / 3) / bandwidth
        return max(size.flops / 3 / (rate * _GEMM_EFFICIENCY), traffic) + _LAUNCH

    bf16 = 3 * gemm(device.bf16, 2)
    low = sum(recipe.uses_fp8(name) for name in GEMMS)
    casts = sum(_cast_bytes(role, recipe) * count for role, count in elements.items()) / bandwidth
    passes = 4 * len(elements)
    return Seconds(bf16, low * gemm(device.fp8, 1) + (3 - low) * gemm(device.bf16, 2) + casts + passes * _LAUNCH)


def _cast_bytes(role: Role, recipe: Recipe) -> int:
    """Bytes moved an element to cast an operand for its two GEMMs, one of which wants it transposed."""
    operand, cast, transpose = recipe.operand(role), 2 + 1, 1 + 1
    # An amax over rows or tiles is found where they are read; over the tensor, or across rows, it takes a pass.
    amax = 2 if operand.granularity == "tensor" and recipe.scaling == "current" else 0
    amax_across = 2 if operand.granularity == "row" else amax
    if operand.tile(0) != operand.tile(1):
        return cast + amax_across + cast  # anew from high precision, written in the other order
    again = amax + cast if role == "weight" else 0  # not kept since forward
    return amax + cast + again + transpose


def measure(size: LayerSize, recipe: Recipe, device: str, *, repeats: int = 20, backend: str = "auto") -> Seconds:
    """Median seconds of forward and backward on `device`, FP8 and bf16 interleaved, eager."""
    x = torch.randn(size.m, size.k, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(size.m, size.n, device=device, dtype=torch.bfloat16)
    plain, fp8 = (nn.Linear(size.k, size.n, bias=False, device=device, dtype=torch.bfloat16) for _ in range(2))
    convert_linears(fp8, recipe, keep_high_precision=(), backend=backend)
    seconds: dict[nn.Module, list[float]] = {plain: [], fp8: []}
    for repeat in range(repeats + 2):
        for layer, times in seconds.items():
            elapsed = _time_step(layer, x, dy)
            if repeat >= 2:  # the first ones choose kernels and fill caches
                times.append(elapsed)
    return Seconds(statistics.median(seconds[plain]), statistics.median(seconds[fp8]))


def _time_step(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    x.grad, layer.weight.grad = None, None  # as a training step finds them
    wait_for(x.device)
    started = time.perf_counter()
    layer(x).backward(dy)
    wait_for(x.device)
    return time.perf_counter() - started
