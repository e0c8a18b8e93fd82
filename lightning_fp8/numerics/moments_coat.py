"""Adam's two moments in E4M3 after expanding each block's range to E4M3's: `moments="coat"`.

Dynamic range expansion, from COAT (Xi et al., "COAT: Compressing Optimizer states and Activation for
Memory-Efficient FP8 Training", ICLR 2025), section 4.1. With hi and lo the largest and the smallest non-zero
magnitude of a block, c = sqrt(hi * lo), R the range of E4M3 (448 over its smallest number) and k = log2 R /
log2(hi / lo), rounded down to a sixteenth, a moment is raised to a power and then scaled as any other:

    y = sign(x) * (|x| / c)^k,    code = E4M3(y / s),    s = (hi / c)^k / 448,    x = sign * (|code| * s)^(1/k) * c

Where a block spans less than E4M3 does, k > 1 and precision is gained; here k is held to 1/16..16.

**When it fails.** Where a block spans more, k < 1, and every relative error of E4M3 is multiplied by 1/k. One small
element does that to all others of its block; and it is rounded to nearest, so that a v may stop to follow its
gradients.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.formats import E4M3

_RANGE = math.log2(E4M3.max / E4M3.min_subnormal)
_TINY = torch.finfo(torch.float32).tiny


class CoatMoments(NamedTuple):
    """Both moments in range-expanded E4M3; 2 + 24 / b bytes a parameter, errors of 2^-4 / k of a value.

    Attributes:
        m_codes: uint8 [n, b], the bits of E4M3 values.
        m_center: fp32 [n, 1], c.
        m_power: fp32 [n, 1], k.
        m_scale: fp32 [n, 1], s.
        v_codes: uint8 [n, b], as of m; so are the three scales of v.
    """

    m_codes: Tensor
    m_center: Tensor
    m_power: Tensor
    m_scale: Tensor
    v_codes: Tensor
    v_center: Tensor
    v_power: Tensor
    v_scale: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "CoatMoments":
        """Moments of nothing: codes [rows, columns], and what belongs to a block [rows, blocks of a row]."""
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        ones = torch.ones(rows, -(-columns // block_size), dtype=torch.float32, device=device)
        moment = (codes, ones, ones, ones)
        return cls(*(tensor.clone() for tensor in moment * 2))

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "CoatMoments":
        """Rounds m and v, fp32 [n, b], to nearest; `random` is not used."""
        return cls(*_encode(m), *_encode(v))

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each."""
        m = _decode(self.m_codes, self.m_center, self.m_power, self.m_scale)
        return m, _decode(self.v_codes, self.v_center, self.v_power, self.v_scale)


def _encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = x.abs().double()
    hi = size.amax(dim=1, keepdim=True).clamp_min(_TINY)
    lo = torch.where(size >= _TINY, size, torch.inf).amin(dim=1, keepdim=True).minimum(hi)
    center = (hi * lo).sqrt()
    power = (_RANGE / (hi / lo).log2().clamp_min(_RANGE / 16)).mul(16).floor().div(16).clamp_min(1 / 16)
    scale = (hi / center) ** power / E4M3.max
    spread = ((size / center) ** power / scale).clamp_max(E4M3.max).float()
    codes = spread.copysign(x).to(E4M3.dtype).view(torch.uint8)
    return codes, center.float(), power.float(), scale.float()


def _decode(codes: Tensor, center: Tensor, power: Tensor, scale: Tensor) -> Tensor:
    values = codes.view(E4M3.dtype).double()
    sizes = (values.abs() * scale.double()) ** (1 / power.double()) * center.double()
    return sizes.copysign(values).float()
