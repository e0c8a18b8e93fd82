"""`FP8Linear`: torch.nn.Linear with its three GEMMs in FP8.

It is made by swapping the class of an existing `nn.Linear` in place, and it adds no parameter and no buffer. So the
Parameter objects, their names, tying, hooks and `requires_grad` stay, an optimizer built earlier stays valid, and the
state dict is that of the unconverted model, key for key.

With x [M, K] (leading dimensions flattened), w [N, K] and dy [M, N]:

    forward      y  [M, N] = x8  [M, K] . w8^T [K, N]
    input_grad   dx [M, K] = dy8 [M, N] . w8   [N, K]
    weight_grad  dw [N, K] = dy8^T [N, M] . x8 [M, K]

What autograd keeps is x8: one byte an element instead of the two of bf16. The weight is cast again in backward
rather than kept, because a kept FP8 copy would cost another byte a parameter. Layers that receive the same tensor
(q, k and v; gate and up) share one FP8 copy of it: the copy rides on the tensor object and goes with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8.compute.autocast import fp8_enabled
from lightning_fp8.compute.gemm import fp8_gemm
from lightning_fp8.compute.recipe import Operand, Recipe
from lightning_fp8.numerics import Quantized, quantize


class FP8Linear(nn.Linear):
    """A linear layer that computes in FP8 while `fp8_autocast` is on, which it is unless switched off.

    Input [..., K] and output [..., N] are bf16, fp16 or fp32; under torch.autocast the output has its dtype.
    Create it with `lightning_fp8.convert_linears`.
    """

    fp8_recipe: Recipe
    fp8_backend: str

    def forward(self, input: Tensor) -> Tensor:
        """Returns x w^T + b."""
        if not fp8_enabled():
            return super().forward(input)
        x8 = _shared_cast(input, self.fp8_recipe.input)
        y: Tensor = _ThreeGemms.apply(
            input, x8, self.weight, self.bias, _compute_dtype(input), self.fp8_recipe, self.fp8_backend
        )
        return y

    def extra_repr(self) -> str:
        """Sizes as `nn.Linear` shows them, and the formats."""
        recipe = self.fp8_recipe
        formats = "/".join(o.format for o in (recipe.input, recipe.weight, recipe.grad_output))
        return f"{super().extra_repr()}, fp8={formats}, backend={self.fp8_backend}"


class _ThreeGemms(torch.autograd.Function):
    """The three GEMMs and what is kept between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x8: Quantized,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        recipe: Recipe,
        backend: str,
    ) -> Tensor:
        ctx.recipe, ctx.backend = recipe, backend
        ctx.x_dtype, ctx.x_shape, ctx.bias_dtype = x.dtype, x.shape, None if bias is None else bias.dtype
        kept_x, kept_scale = x8 if recipe.uses_fp8("weight_grad") else (x, None)
        ctx.save_for_backward(weight, *((kept_x, kept_scale) if ctx.needs_input_grad[2] else (None, None)))
        if recipe.uses_fp8("forward"):
            y = fp8_gemm(_rows(x8), _cast(weight, recipe.weight).t(), dtype, backend, bias)
        else:
            y = F.linear(_flat(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept_x, kept_scale = ctx.saved_tensors
        recipe, backend = ctx.recipe, ctx.backend
        wants_dx, _, wants_dw, wants_db = ctx.needs_input_grad[:4]
        fp8_dx, fp8_dw = wants_dx and recipe.uses_fp8("input_grad"), wants_dw and recipe.uses_fp8("weight_grad")
        dy = _flat(dy)
        dy8: Any = _cast(dy, recipe.grad_output) if fp8_dx or fp8_dw else None
        dx = dw = db = None
        if fp8_dx:
            dx = fp8_gemm(dy8, _cast(weight, recipe.weight), ctx.x_dtype, backend)
        elif wants_dx:
            dx = (dy @ weight.to(dy.dtype)).to(ctx.x_dtype)
        if fp8_dw:
            dw = fp8_gemm(dy8.t(), _rows(Quantized(kept_x, kept_scale)), weight.dtype, backend)
        elif wants_dw:
            dw = (dy.t() @ _flat(kept_x).to(dy.dtype)).to(weight.dtype)
        if wants_db:
            db = dy.float().sum(0).to(ctx.bias_dtype)
        return None if dx is None else dx.view(ctx.x_shape), None, dw, db, None, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _cast(x: Tensor, operand: Operand) -> Quantized:
    return quantize(x, operand.number_format, power_of_two=operand.power_of_two)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rows(x: Quantized) -> Quantized:
    return Quantized(_flat(x.codes), x.scale)


@torch.no_grad()
def _shared_cast(x: Tensor, operand: Operand) -> Quantized:
    """Casts `x`, or returns the cast that a sibling layer made of the very same, unchanged tensor."""
    if x.is_inference() or torch.compiler.is_compiling():
        return _cast(x, operand)  # inference tensors count no versions; a compiled graph shares equal casts by itself
    made = getattr(x, "_fp8_cast", None)
    if made is not None and made[:2] == (x._version, operand):
        cast: Quantized = made[2]
        return cast
    cast = _cast(x, operand)
    x._fp8_cast = (x._version, operand, cast)  # type: ignore[attr-defined]
    return cast
