"""Adam's two moments as FP8-LM keeps them, m in E4M3 and v in fp16, each with a scale: `moments="fp8_lm"`.

"FP8-LM: Training FP8 Large Language Models" (Peng et al., 2310.18313), whose code is MS-AMP at level O2, found that m
bears FP8 and that v in FP8 diverges, and so spends two bytes on v:

    code = E4M3(m * 448 / max |m|)        half = fp16(v * 65504 / max v)        rounded to nearest

FP8-LM has one scale a tensor. Here it is one a block, as of every format, because a scale of the whole tensor needs a
pass over it before each step and, where it is sharded, a collective operation. That is finer: what fails here fails
there too, and sooner.

**When it fails.** fp16 spans 2^40 from its largest to its smallest number, so a v more than 2^41 below the largest of
its block becomes 0; E4M3 spans 2^17.8, so an m more than 2^18.8 below does, long before. And v does not follow
gradients that fade slowly: half of fp16's last bit is 2^-12 to 2^-11 of a value, and v falls by 1 - beta2 a step. At
beta2 = .999 all v follow; from .9995 on some, and from .99976 on all stay where they are for ever.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.formats import E4M3
from lightning_fp8.numerics.moments_absmax import decode_absmax, encode_absmax

_HALF = torch.float16
_HALF_MAX = torch.finfo(_HALF).max


class FP8LMMoments(NamedTuple):
    """m in E4M3, v in fp16; 3 + 8 / b bytes a parameter, errors of m 2^-4 and of v 2^-11 above each format's floor.

    Attributes:
        m_codes: uint8 [n, b], the bits of E4M3 values.
        m_scale: fp32 [n, 1], what a code's value is multiplied by.
        v_half: fp16 [n, b].
        v_scale: fp32 [n, 1], what these are multiplied by.
    """

    m_codes: Tensor
    m_scale: Tensor
    v_half: Tensor
    v_scale: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "FP8LMMoments":
        """Moments of nothing: elements [rows, columns], and scales [rows, blocks of a row]."""
        blocks = -(-columns // block_size)
        return cls(
            torch.zeros(rows, columns, dtype=torch.uint8, device=device),
            torch.zeros(rows, blocks, dtype=torch.float32, device=device),
            torch.zeros(rows, columns, dtype=_HALF, device=device),
            torch.zeros(rows, blocks, dtype=torch.float32, device=device),
        )

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "FP8LMMoments":
        """Rounds m and v, fp32 [n, b], to nearest; `random` is not used."""
        scale = v.amax(dim=1, keepdim=True) / _HALF_MAX
        half = (v / scale.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(_HALF_MAX).to(_HALF)
        return cls(*encode_absmax(m, E4M3), half, scale)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each."""
        return decode_absmax(self.m_codes, self.m_scale, E4M3), self.v_half.float() * self.v_scale
