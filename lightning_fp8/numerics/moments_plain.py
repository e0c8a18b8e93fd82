"""Adam's two moments in torch's own dtypes: `moments="fp32"` and `moments="bf16"`.

The first is the reference, and what vectors and narrow tensors always have. The second has fp32's range and errors of
2^-9, relatively. Its v is rounded stochastically: rounded to nearest, a v that changes by less than half of its last
bit a step, which is any at beta2 = .999, stays where it is for ever.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.rounding import stochastic_round_bf16


class FP32Moments(NamedTuple):
    """Both moments as they are, fp32 [n, b]; 8 bytes a parameter, no error, fp32's range."""

    m: Tensor
    v: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "FP32Moments":
        """Moments of nothing, [rows, columns]; blocks have no scales."""
        return cls(*(torch.zeros(rows, columns, dtype=torch.float32, device=device) for _ in cls._fields))

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "FP32Moments":
        """Nothing is rounded, so `random` is not used."""
        return cls(m, v)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v)."""
        return self.m, self.v


class BF16Moments(NamedTuple):
    """Both moments in bf16 [n, b]; 4 bytes a parameter, errors of 2^-9 (m) and 2^-8 (v), fp32's range."""

    m: Tensor
    v: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "BF16Moments":
        """Moments of nothing, [rows, columns]; blocks have no scales."""
        return cls(*(torch.zeros(rows, columns, dtype=torch.bfloat16, device=device) for _ in cls._fields))

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "BF16Moments":
        """Rounds m to nearest, and v up where `random`, fp32 [n, b] in [0, 1), exceeds the distance."""
        return cls(m.to(torch.bfloat16), stochastic_round_bf16(v, (random * 2.0**16).int()))

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each."""
        return self.m.float(), self.v.float()
