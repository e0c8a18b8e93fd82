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
again in backward rather than kept, because a kept FP8 copy would cost another byte a parameter, unless it was asked to
be cached. How casts are shared and cached is told in `casts.py`.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8.compute.autocast import fp8_enabled, scales_frozen
from lightning_fp8.compute.casts import cast, forget_casts, shared_cast
from lightning_fp8.compute.gathered import GatheredWeight
from lightning_fp8.compute.gemm import fp8_gemm
from lightning_fp8.compute.recipe import Gemm, Recipe, Role
from lightning_fp8.compute.scaling import DelayedScales, advance
from lightning_fp8.compute.transformer_engine.layers import ConvertedLinear
from lightning_fp8.kernels import Cast
from lightning_fp8.numerics import Quantized


class FP8Linear(nn.Linear):
    """A linear layer that computes in FP8 while `fp8_autocast` is on, which it is unless switched off.

    Input [..., K] and output [..., N] are bf16, fp16 or fp32; under torch.autocast the output has its dtype.
    Create it with `lightning_fp8.convert_linears`. `fp8_active` switches the layer itself, forward and whatever is
    computed again in backward, where `fp8_autocast` switches a block of code; `fp8_fallback` takes it out of FP8
    whatever these say. `fp8_weight_amax` is for weights that are gathered in FP8: the magnitude of the whole, None when
    the optimizer has changed it.
    """

    fp8_recipe: Recipe
    fp8_backend: str
    fp8_cache_weights: bool
    fp8_scales: DelayedScales | None
    fp8_active: bool
    fp8_fallback: bool
    fp8_weight_amax: Tensor | None

    def runs_in_fp8(self) -> bool:
        """Whether it does now."""
        return self.fp8_active and not self.fp8_fallback and fp8_enabled()

    def forward(self, input: Tensor, made: Cast | None = None) -> Tensor:
        """Returns x w^T + b; `made` is the cast of the input, where that was made elsewhere (`fused.py`)."""
        if not self.runs_in_fp8():
            return super().forward(input)
        recipe, scales = self.fp8_recipe, self.scales_on(input.device)
        trained = torch.is_grad_enabled() and self.weight.requires_grad
        learning = torch.is_grad_enabled() and not scales_frozen()
        # What evaluates may hold other weights for a while, averaged ones say, written past the version counter. So is
        # what FSDP2 gathers, into one Parameter again and again; and whole copies are what it is to spare.
        sharded = getattr(self, "_is_fsdp_managed_module", False)
        cache_weights = self.fp8_cache_weights and torch.is_grad_enabled() and not sharded
        how = _How(recipe, self.fp8_backend, scales, cache_weights, learning)
        forward = recipe.uses_fp8("forward")
        x8 = how.cast(input, "input", rows=forward, columns=trained and recipe.uses_fp8("weight_grad"), made=made)
        w8 = how.cast(self.weight, "weight", rows=forward)
        dtype = autocast_dtype(input) or input.dtype
        y: Tensor = _ThreeGemms.apply(input, x8.rows, x8.columns, self.weight, w8.rows, self.bias, dtype, how)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Takes the scaling state along when the layer moves, as a buffer would go."""
        move: Any = super()._apply
        move(fn, recurse)
        self.scales_on(self.weight.device)
        return self

    def scales_on(self, device: torch.device) -> DelayedScales | None:
        """The state of delayed scaling, moved to `device`."""
        if self.fp8_scales is not None and self.fp8_scales.scale.device != device:
            self.fp8_scales = self.fp8_scales.to(device)
        return self.fp8_scales

    def extra_repr(self) -> str:
        """Sizes as `nn.Linear` shows them, and the formats."""
        recipe = self.fp8_recipe
        formats = "/".join(o.format for o in (recipe.input, recipe.weight, recipe.grad_output))
        how = f"fp8={formats} by {recipe.weight.granularity}, {recipe.scaling} scaling, backend={self.fp8_backend}"
        return f"{super().extra_repr()}, {how}"


def end_step(module: nn.Module) -> None:
    """Ends an optimizer step for the converted layers of `module`: advances delayed scales, drops cached weight casts.

    Scales of Transformer Engine's layers advance by themselves, with each forward and backward.

    The precision plugins call it. In a plain loop, call it after each `optimizer.step()`; recipes with current scaling
    and no cached weights do without. It reads nothing back to the host; with torch.distributed initialised and delayed
    scaling it is a collective call.
    """
    end_step_of(module.modules())


def end_step_of(layers: Iterable[nn.Module]) -> None:
    """As `end_step`, for the converted ones among `layers` alone: where several optimizers train parts of a model."""
    delayed: dict[tuple[Recipe, torch.device], list[DelayedScales]] = {}
    for layer in layers:
        if isinstance(layer, FP8Linear):
            forget_casts(layer.weight)
            layer.fp8_weight_amax = None
            if layer.fp8_scales is not None:
                delayed.setdefault((layer.fp8_recipe, layer.fp8_scales.scale.device), []).append(layer.fp8_scales)
        elif isinstance(layer, ConvertedLinear):
            layer.te_cast_version = None
    for (recipe, _), scales in delayed.items():
        advance(scales, recipe)


def switch(module: nn.Module, *, on: bool) -> None:
    """Lets the converted layers of `module` run in FP8, or in their own dtype, until switched again."""
    for layer in module.modules():
        if isinstance(layer, FP8Linear | ConvertedLinear):
            layer.fp8_active = on


def fall_back(module: nn.Module, layers: Collection[str]) -> None:
    """Lets the converted layers of `module` with these names, and only them, run in their own dtype.

    `switch`, schedules and `fp8_autocast` act on the other layers as before. A layer that returns to FP8 with delayed
    scaling takes new scales from its tensors: those it left with are of another time.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, FP8Linear | ConvertedLinear):
            continue
        returns = layer.fp8_fallback and name not in layers
        if returns and isinstance(layer, FP8Linear) and layer.fp8_scales is not None:
            layer.fp8_scales = DelayedScales.unknown(layer.fp8_recipe.history, layer.weight.device)
        layer.fp8_fallback = name in layers


class _How(NamedTuple):
    """What the three GEMMs need to know of their layer."""

    recipe: Recipe
    backend: str
    scales: DelayedScales | None
    cache_weights: bool
    learning: bool

    def cast(
        self, x: Tensor, role: Role, *, rows: bool = False, columns: bool = False, made: Cast | None = None
    ) -> Cast:
        """An operand, cast, found cast or given so; a training step takes note of its amax."""
        kept = role == "input" or (role == "weight" and self.cache_weights)
        if isinstance(x, GatheredWeight):
            made = x.cast()
        elif made is None:
            make = shared_cast if kept else cast
            shared = self.recipe.sync_amax and self.learning and role != "weight"
            made = make(x, role, self.recipe, self.scales, shared, rows=rows, columns=columns)
        # The weight is cast again for the GEMM of backward: with the same magnitude as in forward.
        new = rows or role == "grad_output" or not self.recipe.uses_fp8("forward")
        if self.learning and self.scales is not None and made.amax is not None and new:
            self.scales.observe(role, made.amax)
        return Cast(made.rows if rows else None, made.columns if columns else None)

    def gemm(self, gemm: Gemm, a: Quantized, b: Quantized, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        return fp8_gemm(a, b, dtype, self.backend, bias, fast_accumulation=gemm in self.recipe.fast_accumulation)


class _ThreeGemms(torch.autograd.Function):
    """The three GEMMs and what is kept between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x8: Quantized | None,
        kept: Quantized | None,
        weight: Tensor,
        w8: Quantized | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        how: _How,
    ) -> Tensor:
        ctx.how = how
        ctx.x_dtype, ctx.x_shape, ctx.bias_dtype = x.dtype, x.shape, None if bias is None else bias.dtype
        ctx.tile = kept and kept.tile
        kept_tensors = (kept.codes, kept.scale) if kept else (x, None)
        ctx.save_for_backward(weight, *(kept_tensors if ctx.needs_input_grad[3] else (None, None)))
        if x8 is not None and w8 is not None:
            y = how.gemm("forward", x8, w8.t(), dtype, bias)
        else:
            y = F.linear(_flat(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, kept_scale = ctx.saved_tensors
        how: _How = ctx.how
        recipe = how.recipe
        wants_dx, wants_dw, wants_db = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        dy = _flat(dy)
        dx = dw = db = None
        fp8_dx, fp8_dw = wants_dx and recipe.uses_fp8("input_grad"), wants_dw and recipe.uses_fp8("weight_grad")
        dy8 = how.cast(dy, "grad_output", rows=fp8_dx, columns=fp8_dw)
        w8 = how.cast(weight, "weight", columns=fp8_dx)
        if dy8.rows is not None and w8.columns is not None:
            dx = how.gemm("input_grad", dy8.rows, w8.columns, ctx.x_dtype)
        elif wants_dx:
            dx = (dy @ weight.to(dy.dtype)).to(ctx.x_dtype)
        if dy8.columns is not None:
            dw = how.gemm("weight_grad", dy8.columns.t(), Quantized(kept, kept_scale, ctx.tile), weight.dtype)
        elif wants_dw:
            dw = (dy.t() @ _flat(kept).to(dy.dtype)).to(weight.dtype)
        if wants_db:
            db = dy.float().sum(0).to(ctx.bias_dtype)
        return None if dx is None else dx.view(ctx.x_shape), None, None, dw, None, db, None, None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """That of torch.autocast where `x` lies; None where it is off, or unknown as on the meta device."""
    device = x.device.type
    # Not asked by `is_autocast_available`, which torch 2.11 cannot trace.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
