"""Norms and MLPs that hand their results on in FP8.

Between a norm or an activation and a linear layer in FP8 lies a tensor in bf16, written only to be read and cast. Here
it is cast where it is made (`kernels/fused.py`): by the class swap of a module, opt-in, by names.

* An MLP of the form down(silu(gate(x)) * up(x)) never writes the product: `down_proj` is given its codes, and autograd
  keeps gate and up, 4 bytes an element instead of the 6 of the plain operations. In the product's place stands a tensor
  without memory that is NaN throughout, so that whoever else would read it, sees it. Where hooks look at what goes into
  the layer, the MLP computes as ever.
* A norm has readers of all kinds, which it does not know, so it writes its result as well. The codes that its one
  reader asks for are made along, and layers that receive the same tensor find them in the table of `casts.py`, as they
  would find each other's.

Codes are the cast of what the module computes, bit for bit. Modules compute as ever where the reader does not run in
FP8, or keeps its input in high precision for the gradient of its weight; and norms under torch.compile, too, where
there is no table. Scaling state is the reader's.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_fp8.compute.casts import know_cast
from lightning_fp8.compute.linear import FP8Linear, autocast_dtype
from lightning_fp8.compute.mixins import Mixin, put_before, take_out
from lightning_fp8.compute.recipe import ROLES
from lightning_fp8.kernels.fused import gated_cast, normed_cast, rms_norm_backward

MLPS = ("*mlp",)
NORMS = {"*attention_norm": "attention.q_proj", "*mlp_norm": "mlp.gate_proj"}
_INPUT = ROLES.index("input")
_DEFAULT_EPS = torch.finfo(torch.float32).eps  # torch's for every dtype that it computes in fp32, whatever it says


def fuse_casts(module: nn.Module, mlps: Sequence[str] = MLPS, norms: Mapping[str, str] = NORMS) -> list[str]:
    """Lets norms and MLPs hand their results on in FP8, in place, and no others; before or after `convert_linears`.

    The defaults are the names of `models.Decoder`. Hugging Face's Llama: `norms={}`, for its norms are no `nn.RMSNorm`.
    With `mlps=(), norms={}` all is undone.

    Args:
        module: Any model.
        mlps: Shell patterns of names of modules that compute `down_proj(silu(gate_proj(x)) * up_proj(x))`, by layers of
            these names.
        norms: Shell patterns of names of `nn.RMSNorm`s, whose gain is used in their input's dtype, each with the name
            of a linear layer that reads the result, as seen from the norm's parent.

    Returns:
        The names of the modules that were chosen.

    Raises:
        ValueError: A pattern matches no module, or one that is not of the kind.
    """
    parts = dict(module.named_modules())
    for pattern in (*mlps, *norms):
        if not any(fnmatchcase(name, pattern) for name in parts):
            raise ValueError(f"Fused casts: no module's name matches {pattern!r}; correct it, or leave it out.")
    readers: dict[str, nn.Module] = {}
    chosen = []
    for name, part in parts.items():  # all are looked at before the first is changed
        reader = next((reader for pattern, reader in norms.items() if fnmatchcase(name, pattern)), None)
        if reader is not None:
            _check_norm(name, part)
            readers[name] = _find(parts, name, reader)
        elif any(fnmatchcase(name, pattern) for pattern in mlps):
            _check_mlp(name, part)
        else:
            continue
        chosen.append(name)
    for name, part in parts.items():
        take_out(part, FusedMLP)
        take_out(part, FusedNorm)
        part.__dict__.pop("fp8_reader", None)
        if name in readers:
            # In its __dict__, not as an attribute of a module: the layer is nobody's child but its parent's.
            part.__dict__["fp8_reader"] = readers[name]
            put_before(part, FusedNorm)
        elif name in chosen:
            put_before(part, FusedMLP)
    return chosen


def _check_norm(name: str, part: nn.Module) -> None:
    if not isinstance(part, nn.RMSNorm) or part.weight is None or len(part.normalized_shape) != 1:
        raise ValueError(
            f"Fused casts: {name!r} is a {type(part).__name__}, no torch.nn.RMSNorm with a gain over one dimension."
            " Leave its pattern out."
        )


def _check_mlp(name: str, part: nn.Module) -> None:
    parts = dict(part.named_children())
    layers = [parts.pop(layer, None) for layer in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(layer, nn.Linear) for layer in layers) or getattr(part, "smooth", False):
        raise ValueError(
            f"Fused casts: {name!r} is no down_proj(silu(gate_proj(x)) * up_proj(x)) of linear layers, or smooths its"
            " product, which needs it in high precision. Leave its pattern out."
        )
    for other, child in parts.items():
        if not _is_silu(child):
            raise ValueError(
                f"Fused casts: {name!r} has a part {other!r}, a {type(child).__name__}, which is no silu, and it alone"
                " would be computed. Leave its pattern out."
            )


def _is_silu(part: nn.Module) -> bool:
    x = torch.linspace(-4, 4, 9)
    return not list(part.parameters()) and torch.equal(part(x), F.silu(x))


def _find(parts: Mapping[str, nn.Module], norm: str, reader: str) -> nn.Module:
    name = f"{norm.rpartition('.')[0]}.{reader}".removeprefix(".")
    if not isinstance(parts.get(name), nn.Linear):
        raise ValueError(f"Fused casts: there is no linear layer {name!r} to read {norm!r}; correct its name in norms.")
    return parts[name]


class FusedMLP(Mixin):
    """What is put before an MLP's class."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Returns down(silu(gate(x)) * up(x))."""
        down: Any = self.down_proj
        parent: Any = super()
        if not _reads_codes(down) or _has_hooks(down):
            plain: Tensor = parent.forward(x)
            return plain
        gate, up = self.gate_proj(x), self.up_proj(x)
        made = gated_cast(_matrix(gate), _matrix(up), **_how(down))
        y: Tensor = down(_Product.apply(gate, up), made)
        return y


class FusedNorm(Mixin):
    """What is put before a norm's class."""

    fp8_reader: nn.Module
    weight: Tensor
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / rms(x) * gain, over the last dimension."""
        reader: Any = self.__dict__["fp8_reader"]
        parent: Any = super()
        # Autocast decides by device in which dtype a norm computes; in fp32 all agree.
        theirs = autocast_dtype(x) is not None and x.dtype != torch.float32
        no_table = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
        if theirs or no_table or not _reads_codes(reader):
            plain: Tensor = parent.forward(x)
            return plain
        eps = _DEFAULT_EPS if self.eps is None else self.eps
        y, made = _Norm.apply(x, self.weight.to(x.dtype), eps, _how(reader))
        know_cast(y, made, "input", reader.fp8_recipe, reader.fp8_scales)
        result: Tensor = y
        return result


def _reads_codes(layer: nn.Module) -> bool:
    """Whether `layer` needs nothing of its input but FP8 codes by scales of its own."""
    if not isinstance(layer, FP8Linear) or not layer.runs_in_fp8():
        return False
    recipe = layer.fp8_recipe
    return recipe.uses_fp8("forward") and recipe.uses_fp8("weight_grad") and not recipe.sync_amax


def _has_hooks(layer: nn.Module) -> bool:
    """Whether somebody looks at what goes into `layer`, or at its gradient."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks)


def _how(layer: FP8Linear) -> dict[str, Any]:
    """How `layer` would cast its input now."""
    operand = layer.fp8_recipe.input
    scales = layer.scales_on(layer.weight.device)
    return {
        "fmt": operand.number_format,
        "tile": operand.tile(1),
        "rows": True,
        "columns": torch.is_grad_enabled() and layer.weight.requires_grad,
        "power_of_two": operand.power_of_two,
        "remembered": None if scales is None else scales.scale[_INPUT],
    }


def _matrix(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


class _Product(torch.autograd.Function):
    """silu(gate) * up, for autograd alone: what it returns is NaN."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate.new_full((), torch.nan).expand(gate.shape)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)


class _Norm(torch.autograd.Function):
    """RMSNorm and the cast of its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, how: dict[str, Any]) -> tuple[Tensor, Any]:
        made = normed_cast(_matrix(x), gain, eps, values=True, **how)
        ctx.save_for_backward(x, gain, made.rstd)
        ctx.eps = eps
        return made.values.view(x.shape), made.cast

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:
        x, gain, rstd = ctx.saved_tensors
        return *rms_norm_backward(dy, x, gain, rstd, ctx.eps), None, None
