"""How much faster than bf16 a layer is in FP8: predicted from a datasheet, or measured on the device at hand.

The prediction is a roofline. A training step of a linear layer is three GEMMs, and in FP8 the casts that feed them:

    GEMM    max(2 M K N / FLOP rate, bytes of operands and result / bandwidth)
    casts   bytes read and written / bandwidth, and a launch for each pass

with the casts that our kernels do, which write both layouts in one read, and nothing fused with the layers around.
Compilers do fuse, so the prediction is on the low side for wide layers; of small ones it knows the launches but not
what the host needs for them, and is on the high side. It ranks the layers of a model; `measure` decides.
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
from lightning_fp8.compute.recipe import GEMMS, ROLES, Gemm, Recipe, Role
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


class Work(NamedTuple):
    """Seconds of work, by what they wait for.

    Attributes:
        compute: The matrix units.
        memory: The device's memory, launches of kernels included.
    """

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.compute + self.memory

    def __add__(self, other: object) -> "Work":
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.compute + other.compute, self.memory + other.memory)

    def times(self, factor: float) -> "Work":
        """So many times this."""
        return Work(self.compute * factor, self.memory * factor)


def predict(size: LayerSize, recipe: Recipe, device: Accelerator) -> Seconds:
    """The roofline of forward and backward on `device`."""
    return Seconds(work(size, None, device).seconds, work(size, recipe, device).seconds)


def work(size: LayerSize, recipe: Recipe | None, device: Accelerator) -> Work:
    """Forward and backward of one layer; without a recipe, in bf16."""
    low = 0 if recipe is None else sum(recipe.uses_fp8(name) for name in GEMMS)
    total = _gemm(size, device, fp8=False).times(3 - low) + _gemm(size, device, fp8=True).times(low)
    if recipe is None:
        return total
    moved = sum(_cast_bytes(role, recipe) * count for role, count in _elements(size).items())
    passes = sum(_passes(role, recipe) for role in ROLES)
    return total + Work(0.0, stream(moved, device) + passes * _LAUNCH)


def stream(moved: float, device: Accelerator) -> float:
    """Seconds to read and write so many bytes of the device's memory."""
    return moved / (device.bandwidth * _BANDWIDTH_EFFICIENCY)


def multiply(flops: float, device: Accelerator, *, fp8: bool = False) -> float:
    """Seconds for so many FLOPs of large matrix products."""
    return flops / ((device.fp8 if fp8 else device.bf16) * _GEMM_EFFICIENCY)


def _elements(size: LayerSize) -> dict[Role, int]:
    return {"input": size.m * size.k, "weight": size.n * size.k, "grad_output": size.m * size.n}


def _gemm(size: LayerSize, device: Accelerator, *, fp8: bool) -> Work:
    # Every GEMM reads two of the three matrices and writes the third, in bf16.
    operand_bytes = 1 if fp8 else 2
    traffic = stream((operand_bytes * 2 + 2) / 3 * sum(_elements(size).values()), device)
    compute = multiply(size.flops / 3, device, fp8=fp8)
    return Work(compute, _LAUNCH) if compute >= traffic else Work(0.0, traffic + _LAUNCH)


def _cast_bytes(role: Role, recipe: Recipe) -> int:
    """Bytes moved an element to cast an operand for its GEMMs; see `kernels/triton`."""
    both, one = _reads_for_amax(role, recipe) + 2 + 1 + 1, _reads_for_amax(role, recipe) + 2 + 1
    if role == "weight":  # cast for forward, and again, the other way round, for backward
        return one * (recipe.uses_fp8("forward") + recipe.uses_fp8("input_grad"))
    used = _uses(role, recipe)
    return {0: 0, 1: one, 2: both}[used]


def _passes(role: Role, recipe: Recipe) -> int:
    """Kernels launched for the casts of an operand."""
    casts = _uses(role, recipe) if role == "weight" else min(1, _uses(role, recipe))
    return casts * (2 if _reads_for_amax(role, recipe) else 1)


def _uses(role: Role, recipe: Recipe) -> int:
    """How many FP8 GEMMs an operand is cast for."""
    gemms: dict[Role, tuple[Gemm, Gemm]] = {
        "input": ("forward", "weight_grad"),
        "weight": ("forward", "input_grad"),
        "grad_output": ("input_grad", "weight_grad"),
    }
    return sum(recipe.uses_fp8(name) for name in gemms[role])


def _reads_for_amax(role: Role, recipe: Recipe) -> int:
    """Bytes read an element before the pass that casts; tiles find their amax in it."""
    lines = recipe.operand(role).granularity in ("tensor", "row")
    return 2 if lines and recipe.scaling == "current" else 0


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
