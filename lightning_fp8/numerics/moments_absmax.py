"""Adam's two moments scaled by each block's absolute maximum: `moments="e4m3"` and `moments="e4m3/e5m2"`.

The common recipe, here to compare with: torchao's `AdamWFp8` and Transformer Engine's `FusedAdam` store both moments
in E4M3 this way (torchao in blocks of 256, Transformer Engine with one scale a tensor), "Scaling FP8 training to
trillion-token LLMs" (Fishman et al.) the second in E5M2.

    code = FP8(x * max / absmax),    x = code * absmax / max,    absmax in fp32

**When it fails.** E4M3 spans 2^17.8 from its largest to its smallest number. A v more than 2^18.8 below the largest of
its block becomes 0 while its m may not, and the next update is m / eps: single updates of hundreds where the gradients
of a block's columns differ a few hundredfold. E5M2 spans 2^31.8 and so puts that off, at half the precision. Neither
follows a v that changes by less than half of its last bit a step: E4M3's is 2^-3, E5M2's 2^-2, while beta2 = .999
changes it by 2^-10.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.formats import E4M3, E5M2, Format


class AbsmaxMoments(NamedTuple):
    """m and v in E4M3; 2 + 8 / b bytes a parameter, errors of 2^-4 of a value that is above 2^-14.8 of the largest.

    Attributes:
        m_codes: uint8 [n, b], the bits of E4M3 values.
        m_scale: fp32 [n, 1], what a code's value is multiplied by.
        v_codes: uint8 [n, b], the bits of E4M3 values.
        v_scale: fp32 [n, 1], what a code's value is multiplied by.
    """

    m_codes: Tensor
    m_scale: Tensor
    v_codes: Tensor
    v_scale: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "AbsmaxMoments":
        """Moments of nothing: codes [rows, columns], and what belongs to a block [rows, blocks of a row]."""
        return cls(*_zeros(rows, columns, block_size, device), *_zeros(rows, columns, block_size, device))

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "AbsmaxMoments":
        """Rounds m and v, fp32 [n, b], to nearest; `random` is not used."""
        return cls(*encode_absmax(m, E4M3), *encode_absmax(v, E4M3))

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each."""
        return decode_absmax(self.m_codes, self.m_scale, E4M3), decode_absmax(self.v_codes, self.v_scale, E4M3)


class AbsmaxE5M2Moments(NamedTuple):
    """m in E4M3, v in E5M2; 2 + 8 / b bytes a parameter, errors of v 2^-3 of what is above 2^-29.8 of the largest.

    Attributes:
        m_codes: uint8 [n, b], the bits of E4M3 values.
        m_scale: fp32 [n, 1], what a code's value is multiplied by.
        v_codes: uint8 [n, b], the bits of E5M2 values.
        v_scale: fp32 [n, 1], what a code's value is multiplied by.
    """

    m_codes: Tensor
    m_scale: Tensor
    v_codes: Tensor
    v_scale: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "AbsmaxE5M2Moments":
        """Moments of nothing: codes [rows, columns], and what belongs to a block [rows, blocks of a row]."""
        return cls(*_zeros(rows, columns, block_size, device), *_zeros(rows, columns, block_size, device))

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "AbsmaxE5M2Moments":
        """Rounds m and v, fp32 [n, b], to nearest; `random` is not used."""
        return cls(*encode_absmax(m, E4M3), *encode_absmax(v, E5M2))

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each."""
        return decode_absmax(self.m_codes, self.m_scale, E4M3), decode_absmax(self.v_codes, self.v_scale, E5M2)


def _zeros(rows: int, columns: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
    return codes, torch.zeros(rows, -(-columns // block_size), dtype=torch.float32, device=device)


def encode_absmax(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The codes of blocks `x`, fp32 [n, b], as uint8, and their scales, fp32 [n, 1]."""
    scale = x.abs().amax(dim=1, keepdim=True) / fmt.max
    # An absolute maximum so small that its scale underflows leaves nothing to divide by; such a block is 0.
    codes = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).clamp_(-fmt.max, fmt.max).to(fmt.dtype)
    return codes.view(torch.uint8), scale


def decode_absmax(codes: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The values, fp32 [n, b], that `encode_absmax` made codes of."""
    return codes.view(fmt.dtype).float() * scale
