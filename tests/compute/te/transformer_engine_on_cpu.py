"""Transformer Engine's own Python layer on a CPU, over a stand-in for its compiled extension.

What is real: every class, signature, check, state and hook of the `transformer_engine` wheel that is installed. What is
not: the kernels. Those that a `te.Linear` with scales by tensor and the two norms call are written here, in a few lines
of torch; all others raise. So tests on it prove Python logic (which recipe reaches which quantizer, which tensors hold
the state, what a checkpoint has), and say nothing about the numerics or the speed of a GPU. Those are the tests
marked `gpu and te`.

The numbers of the enumerations are the extension's (2.20): Transformer Engine checks or indexes by them.
"""

import contextlib
import enum
import importlib
import itertools
import os
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

DTYPES = {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6}
DTYPES |= {"kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10}
TORCH_DTYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}
FP8 = {7: (torch.float8_e4m3fn, 448.0), 8: (torch.float8_e5m2, 57344.0)}
FORWARD = {f"GEMM{i}_{what}": 3 * i - 3 + j for i in (1, 2, 3) for j, what in enumerate(("INPUT", "WEIGHT", "OUTPUT"))}
BACKWARD = {f"GRAD_{what}{i}": 2 * i - 2 + j for i in (1, 2, 3) for j, what in enumerate(("OUTPUT", "INPUT"))}
ATTENTION = {"NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2, "NVTE_No_Backend": -1}
ENUMS = {"DType": DTYPES, "FP8FwdTensors": FORWARD, "FP8BwdTensors": BACKWARD, "NVTE_Fused_Attn_Backend": ATTENTION}


class Gemm(NamedTuple):
    """One product that ran: how many of its operands were FP8, and whether its sums were asked to be exact."""

    layout: str
    fp8_operands: int
    split_accumulator: bool


gemms: list[Gemm] = []
casts: list[tuple[int, ...]] = []  # the shape of each tensor that was cast to FP8


def quantize(x: Any, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Casts by the quantizer's scale (delayed scaling, which also notes the amax) or by the amax of `x`."""
    assert noop is None
    casts.append(tuple(x.shape))
    dtype, largest = FP8[int(quantizer.dtype)]
    amax = x.detach().abs().max().float()
    if type(quantizer).__name__ == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.reshape(())
    elif type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
        scale = torch.where(amax > 0, largest / amax, 1.0)
        scale = torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale
    else:
        raise NotImplementedError(type(quantizer).__name__)
    codes = (x.detach().float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    if output is None:
        output = quantizer.create_tensor_from_data(codes, fake_dtype=x.dtype, internal=quantizer.internal)
    output._data, output._scale_inv = codes, (1 / scale).reshape(1)
    return output


def _values(x: Any) -> torch.Tensor:
    matrix = x if isinstance(x, torch.Tensor) and not hasattr(x, "_scale_inv") else None
    values = matrix.float() if matrix is not None else x._data.view(FP8[int(x._fp8_dtype)][0]).float() * x._scale_inv
    return values.reshape(-1, values.shape[-1])


def generic_gemm(a: Any, ta: bool, b: Any, tb: bool, *rest: Any, **_: Any) -> tuple[Any, ...]:
    """The product, in cuBLAS's column-major terms: D^T = op(B) op(A)."""
    out, _, dtype, bias, _, _, _, grad, _, _, accumulate, split = rest
    gemms.append(Gemm("NT"[ta] + "NT"[tb], sum(hasattr(x, "_scale_inv") for x in (a, b)), split))
    a_values, b_values = _values(a), _values(b)
    with _disable_current_modes():  # torch's dispatcher does not see the real ones either
        product = (b_values.t() if tb else b_values) @ (a_values.t() if ta else a_values)
    lead = b.shape[:-1] if not tb else product.shape[:1]
    product = product.reshape(*lead, product.shape[-1])
    bias_grad = b_values.sum(0).to(bias.dtype) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias.float()
    if out is not None:
        out.copy_(product + out.float() if accumulate else product)
        return out, bias_grad, None, None
    return product.to(TORCH_DTYPES[int(dtype)]), bias_grad, None, None


def bgrad_quantize(gradient: Any, quantizer: Any) -> tuple[torch.Tensor, Any]:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


def fused_amax_and_scale_update_after_reduction(
    amaxes: torch.Tensor, histories: list[torch.Tensor], scales: list[torch.Tensor], how: str, dtype: Any, margin: int
) -> None:
    for amax, history, scale in zip(amaxes.split([s.numel() for s in scales]), histories, scales, strict=True):
        history[0] = amax
        chosen = history.max(0).values if how == "max" else history[0].clone()
        if len(history) > 1:
            history.copy_(history.roll(-1, 0))
        history[0] = 0
        scale.copy_(torch.where(chosen > 0, FP8[int(dtype)][1] / chosen / 2**margin, scale))


def rmsnorm_fwd(x: Any, weight: Any, eps: float, *_: Any) -> tuple[Any, None, torch.Tensor]:
    rstd = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * rstd * weight.float()).to(x.dtype), None, rstd


def rmsnorm_bwd(dy: Any, x: Any, rstd: Any, weight: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    normed, g = x.float() * rstd, dy.float() * weight.float()
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


def layernorm_fwd(x: Any, weight: Any, bias: Any, eps: float, *_: Any) -> tuple[Any, Any, Any]:
    mean = x.float().mean(-1, keepdim=True)
    rstd = (x.float().var(-1, correction=0, keepdim=True) + eps).rsqrt()
    return ((x.float() - mean) * rstd * weight.float() + bias.float()).to(x.dtype), mean, rstd


def layernorm_bwd(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *_: Any) -> tuple[torch.Tensor, ...]:
    normed, g = (x.float() - mean) * rstd, dy.float() * weight.float()
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype), dy.float().sum(0).to(weight.dtype)


KERNELS = (quantize, generic_gemm, bgrad_quantize, fused_amax_and_scale_update_after_reduction)
KERNELS += (rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd)


class _AnyEnum(type):
    """A class whose attributes, whatever they are called, are numbers: an enumeration that nothing here depends on."""

    _numbers = itertools.count()

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, next(_AnyEnum._numbers))
        return int(vars(cls)[name])


def _extension() -> types.ModuleType:
    extension: Any = types.ModuleType("transformer_engine_torch")
    for name, members in ENUMS.items():
        setattr(extension, name, enum.IntEnum(name, members))
    for kernel in KERNELS:
        setattr(extension, kernel.__name__, kernel)

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return _AnyEnum(name, (), {})

        def kernel(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"{name} has no stand-in for its kernel")

        return kernel

    extension.__all__ = [name for name in vars(extension) if not name.startswith("_")]
    extension.__getattr__ = missing
    return extension


def install() -> Any:
    """Imports `transformer_engine.pytorch` over the stand-in; once a process, before anything else imports it."""
    assert "transformer_engine" not in sys.modules, "Transformer Engine is imported already"
    # Its build sets this, so that it can import itself before its libraries exist.
    with mock.patch.dict(os.environ, {"NVTE_PROJECT_BUILDING": "1"}):
        sys.modules["transformer_engine_torch"] = _extension()
        sys.modules["transformer_engine.pytorch"] = None  # type: ignore[assignment]  # the package would import it
        importlib.import_module("transformer_engine.common").load_framework_extension = lambda framework: None
        del sys.modules["transformer_engine.pytorch"]
        return importlib.import_module("transformer_engine.pytorch")


def _cpu_for(device: str) -> str:
    return "cpu" if device == "cuda" else device


@contextlib.contextmanager
def cpu_taken_for_gpu(capability: tuple[int, int] = (10, 0)) -> Iterator[None]:
    """Lets Transformer Engine take the CPU for a GPU. From sm_100 on it keeps no transposed FP8 copies: less to do."""
    from transformer_engine.pytorch import quantization

    properties = SimpleNamespace(major=capability[0], minor=capability[1], name="CPU")
    create = quantization.RecipeState.create
    gemms.clear()
    casts.clear()
    with contextlib.ExitStack() as stack:
        device = {"is_available": lambda: True, "current_device": lambda: 0, "synchronize": lambda: None}
        device |= {"get_device_properties": lambda *_: properties, "get_device_capability": lambda *_: capability}
        device |= {"is_current_stream_capturing": lambda: False}
        stack.enter_context(mock.patch.multiple(torch.cuda, **device))
        # What it asks of the GPU's autocast is answered by the CPU's.
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            ask = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, lambda device="cuda", ask=ask: ask(_cpu_for(device))))
        tensor = {"is_cuda": property(lambda self: True), "cuda": lambda self: self}
        stack.enter_context(mock.patch.multiple(torch.Tensor, **tensor))
        for answer in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):  # kept for another device
            stack.enter_context(mock.patch.object(quantization, answer, None))
        stack.enter_context(mock.patch.object(quantization, "get_device_compute_capability", return_value=capability))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        on_cpu = staticmethod(lambda *a, **k: create(*a, **k, device=torch.device("cpu")))
        stack.enter_context(mock.patch.object(quantization.RecipeState, "create", on_cpu))
        try:
            yield
        finally:
            quantization.FP8GlobalStateManager.reset()
