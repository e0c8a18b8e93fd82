"""A weight that reached this process as FP8 codes: what FSDP2 gathers in place of a bf16 weight.

`FP8Linear` multiplies by the codes as they are. Whatever else uses the weight (a layer that was switched out of FP8, a
callback that looks at it) gets the values that the codes stand for, in the weight's dtype. There is no way back to
those that were cast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_fp8.kernels import Cast
from lightning_fp8.numerics import Quantized
from lightning_fp8.numerics.quantize import dequantize

aten = torch.ops.aten


class GatheredWeight(Tensor):
    """Codes [N, K] and their scale, in the place of a weight [N, K] of another dtype.

    Attributes:
        codes: float8 [N, K].
        scale: fp32 scalar, the decode scale; not finite if the weight was not.
        largest: fp32 scalar, the largest magnitude of the weight.
    """

    codes: Tensor
    scale: Tensor
    largest: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, largest: Tensor, dtype: torch.dtype) -> "GatheredWeight":
        """The weight, which requires no gradient yet."""
        make: Any = Tensor._make_wrapper_subclass
        weight: GatheredWeight = make(cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device)
        weight.codes, weight.scale, weight.largest = codes, scale, largest
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredWeight({tuple(self.shape)}, {self.codes.dtype}, for {self.dtype})"

    def cast(self) -> Cast:
        """The weight as an operand, in either layout."""
        one = Quantized(self.codes, self.scale)
        return Cast(one, one, self.largest)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Keeps the codes in views, and decodes them for anything else."""
        if func in _VIEWS:
            weight: GatheredWeight = args[0]
            return GatheredWeight(func(weight.codes, *args[1:]), weight.scale, weight.largest, weight.dtype)
        return func(*tree_map(_decoded, args), **tree_map(_decoded, kwargs or {}))


_VIEWS: tuple[Callable[..., Any], ...] = (aten.detach.default, aten.as_strided.default, aten.alias.default)


def _decoded(value: Any) -> Any:
    if not isinstance(value, GatheredWeight):
        return value
    return dequantize(Quantized(value.codes, value.scale), value.dtype)
