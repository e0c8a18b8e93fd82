"""What autograd keeps of norms, activation functions and other element-wise work, in FP8.

Linear layers keep their inputs in FP8 anyhow (`linear.py`). What is left in bf16 then is mostly SwiGLU's, the outputs
of gate and up and silu of the first, and the inputs of the norms. Here every tensor that a chosen module saves for its
backward is stored as E4M3 with one scale for each 128 elements of its last dimension, 1.03 bytes an element, and
decoded when backward asks for it. Forward computes as ever; gradients see operands that are rounded to 2^-4 of
themselves at worst. That non-linear layers want finer scales than linear ones is COAT's finding (Xi et al.,
2410.19313).

It works on modules of any model, by their names, through autograd's hooks for saved tensors: as with linear layers the
class of the module is swapped in place, so parameters, hooks and state dict stay. What is no activation stays what it
is: weights and gains, also cast ones, integers, FP8 codes, and whatever is too narrow to matter.

Choose no module that holds attention: its backward computes the scores again from what was saved, and they would not
fit the sums that forward kept. Under activation checkpointing the modules do nothing, because what is computed again is
not kept at all; nor do they under torch.compile, whose partitioner decides what is kept.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from typing import cast as known_as

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_fp8.compute.autocast import fp8_enabled
from lightning_fp8.compute.mixins import Mixin, put_before, take_out
from lightning_fp8.kernels import cast
from lightning_fp8.numerics import E4M3, Quantized, dequantize

BLOCK = 128
_NARROWEST = 16  # of the last dimension: below it scales outweigh what is saved
_FLOATING = (torch.bfloat16, torch.float16, torch.float32)
# What stands between a parameter and what a module computes with: casts under autocast, transposes, views.
_RELABELLED = frozenset({"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "UnsafeViewBackward0"})


def keep_activations_in_fp8(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Lets modules keep what they save for backward in FP8, in place, and no others.

    Args:
        module: Any model.
        patterns: Shell patterns of the names of modules, as ("*mlp", "*_norm"). A module's children are part of it.
            None undoes it for all.

    Returns:
        The names of the modules that were chosen.

    Raises:
        ValueError: A pattern matches no module.
    """
    parts = dict(module.named_modules())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parts):
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in parts if name))
            raise ValueError(f"FP8 activations: no module's name matches {pattern!r}; names end in {ends:.120}.")
    chosen = [name for name in parts if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name, part in parts.items():
        if name in chosen:
            put_before(part, _KeepsFP8)
        else:
            take_out(part, _KeepsFP8)
    return chosen


class _KeepsFP8(Mixin):
    """What is put before a module's class."""

    surrounds = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        if torch.compiler.is_compiling() or not fp8_enabled() or _others_decide():
            return parent.forward(*args, **kwargs)
        with _fp8_storage():
            return parent.forward(*args, **kwargs)


def _others_decide() -> bool:
    """Whether someone further out already says how tensors are saved: activation checkpointing, or such a module."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _fp8_storage() -> AbstractContextManager[None]:
    storage: Any = saved_tensors_hooks(_pack, _unpack)
    return known_as(AbstractContextManager[None], storage)


class _Packed(NamedTuple):
    quantized: Quantized
    dtype: torch.dtype
    shape: torch.Size
    version: int


_known = WeakTensorKeyDictionary()  # Tensor -> _Packed: what several operations save is stored once


def _pack(x: Tensor) -> Tensor | _Packed:
    narrow = x.dim() < 2 or x.shape[-1] < _NARROWEST or not x.numel()
    if narrow or x.dtype not in _FLOATING or _is_parameter(x):
        return x
    packed: _Packed | None = _known.get(x)
    if packed is None or packed.version != x._version:
        rows = cast(x.detach().reshape(-1, x.shape[-1]), E4M3, (1, BLOCK), rows=True).rows
        packed = _known[x] = _Packed(known_as(Quantized, rows), x.dtype, x.shape, x._version)
    return packed


def _unpack(saved: Tensor | _Packed) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return dequantize(saved.quantized, saved.dtype).view(saved.shape)


def _is_parameter(x: Tensor) -> bool:
    """Whether `x` is a leaf that learns, or one in another dtype or shape."""
    if x.grad_fn is None:
        return x.requires_grad or isinstance(x if x._base is None else x._base, nn.Parameter)
    node: Any = x.grad_fn
    while node is not None and node.name() in _RELABELLED:
        node = node.next_functions[0][0]
    return node is not None and "AccumulateGrad" in node.name()
