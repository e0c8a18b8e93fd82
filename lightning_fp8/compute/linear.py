"""`FP8Linear`: torch.nn.Linear with its three GEMMs in FP8.

It is made by swapping the class of an existing `nn.Linear` in place, and it adds no parameter and no buffer. So the
Parameter objects, their names, tying, hooks and `requires_grad` stay, an optimizer built earlier stays valid, and the
state dict is that of the unconverted model, key for key.

With x [M, K] (leading dimensions flattened), w [N, K] and dy [M, N]:

    forward      y  [M, N] = x8  [M, K] . w8^T [K, N]
    input_grad   dx [M, K] = dy8 [M, N] . w8   [N, K]
    weight_grad  dw [N, K] = dy8^T [N, M] . x8 [M, K]

Scales run along the dimension that a GEMM sums over. One scale a tensor serves every GEMM, and so do square tiles: one
copy of the operand will do. With scales by row, or part of a row, it is cast for each layout, from high precision.

What autograd keeps is the FP8 input of weight_grad: one byte an element instead of the two of bf16. The weight is cast
again in backward rather than kept, because a kept FP8 copy would cost another byte a parameter. Layers that receive the
same tensor (q, k and v; gate and up) share its FP8 copies: they ride on the tensor object and go with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8.compute.autocast import fp8_enabled
from lightning_fp8.compute.gemm import fp8_gemm
from lightning_fp8.compute.recipe import Operand, Recipe
from lightning_fp8.numerics import Quantized, quantize
from lightning_fp8.numerics.quantize import Tile


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
        recipe = self.fp8_recipe
        trained = torch.is_grad_enabled() and self.weight.requires_grad
        x8 = _shared_cast(input, recipe.input, along=1) if recipe.uses_fp8("forward") else None
        kept = _shared_cast(input, recipe.input, along=0) if trained and recipe.uses_fp8("weight_grad") else None
        y: Tensor = _ThreeGemms.apply(
            input, x8, kept, self.weight, self.bias, _compute_dtype(input), recipe, self.fp8_backend
        )
        return y

    def extra_repr(self) -> str:
        """Sizes as `nn.Linear` shows them, and the formats."""
        recipe = self.fp8_recipe
        formats = "/".join(o.format for o in (recipe.input, recipe.weight, recipe.grad_output))
        return f"{super().extra_repr()}, fp8={formats} by {recipe.weight.granularity}, backend={self.fp8_backend}"


class _ThreeGemms(torch.autograd.Function):
    """The three GEMMs and what is kept between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x8: Quantized | None,
        kept: Quantized | None,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        recipe: Recipe,
        backend: str,
    ) -> Tensor:
        ctx.recipe, ctx.backend = recipe, backend
        ctx.x_dtype, ctx.x_shape, ctx.bias_dtype = x.dtype, x.shape, None if bias is None else bias.dtype
        ctx.tile = kept and kept.tile
        kept_tensors = (kept.codes, kept.scale) if kept else (x, None)
        ctx.save_for_backward(weight, *(kept_tensors if ctx.needs_input_grad[3] else (None, None)))
        if x8 is not None:
            y = fp8_gemm(x8, _cast(weight, recipe.weight, along=1).t(), dtype, backend, bias)
        else:
            y = F.linear(_flat(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, kept_scale = ctx.saved_tensors
        recipe, backend = ctx.recipe, ctx.backend
        wants_dx, _, _, wants_dw, wants_db = ctx.needs_input_grad[:5]
        dy = _flat(dy)
        dy8 = dx = dw = db = None
        if wants_dx and recipe.uses_fp8("input_grad"):
            dy8 = _cast(dy, recipe.grad_output, along=1)
            dx = fp8_gemm(dy8, _cast(weight, recipe.weight, along=0), ctx.x_dtype, backend)
        elif wants_dx:
            dx = (dy @ weight.to(dy.dtype)).to(ctx.x_dtype)
        if wants_dw and recipe.uses_fp8("weight_grad"):
            if dy8 is None or recipe.grad_output.tile(0) != recipe.grad_output.tile(1):
                dy8 = _cast(dy, recipe.grad_output, along=0)
            dw = fp8_gemm(dy8.t(), Quantized(kept, kept_scale, ctx.tile), weight.dtype, backend)
        elif wants_dw:
            dw = (dy.t() @ _flat(kept).to(dy.dtype)).to(weight.dtype)
        if wants_db:
            db = dy.float().sum(0).to(ctx.bias_dtype)
        return None if dx is None else dx.view(ctx.x_shape), None, None, dw, db, None, None, None


_Casts = dict[tuple[Operand, Tile | None], Quantized]


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _cast(x: Tensor, operand: Operand, along: int) -> Quantized:
    """Casts a matrix for a GEMM that sums over its dimension `along`."""
    return quantize(x, operand.number_format, tile=operand.tile(along), power_of_two=operand.power_of_two)


@torch.no_grad()
def _shared_cast(x: Tensor, operand: Operand, along: int) -> Quantized:
    """Casts `x` as a matrix, or returns the cast that a sibling layer made of the very same, unchanged tensor."""
    if x.is_inference() or torch.compiler.is_compiling():
        # Inference tensors count no versions; a compiled graph shares equal casts by itself.
        return _cast(_flat(x), operand, along)
    version, casts = getattr(x, "_fp8_casts", (-1, _Casts()))
    if version != x._version:
        casts = _Casts()
        carrier: Any = x  # whose type does not know the attribute
        carrier._fp8_casts = (x._version, casts)
    key = operand, operand.tile(along)
    if key not in casts:
        casts[key] = _cast(_flat(x), operand, along)
    return casts[key]
