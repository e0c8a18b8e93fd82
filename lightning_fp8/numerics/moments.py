"""FP8 codecs of Adam's two moments, blind to how unequal the columns of a weight are.

Both work on blocks: fp32 tensors [n, b], one row a block of consecutive elements of one row of a parameter. Storage is
one byte an element for each moment, and per block 4 + 4 + 1 bytes (`v_max`, `v_octaves`, `m_scale`): 2.07 bytes a
parameter at b = 128.

`FP8Moments` and `FP32Moments` have the same two methods; which one a parameter gets is the optimizer's policy.

**Second moment: an E8M0 exponent stretched over the block's own range.** v has no sign and needs no mantissa; it needs
range and even relative steps. With hi = max v (kept exactly) and D = log2(hi / smallest positive v), at most 40,

    v = hi * 2^(-D * (254 - code) / 253),      code in 1..254;      code 0 is exactly 0 and nothing else.

No positive v becomes 0, which is what makes E4M3 with one absolute maximum dangerous: m / sqrt(0) is a single update
of hundreds. The code is rounded *stochastically*: rounded to nearest, a v that decays by less than half a code a step
stays where it is for ever. Credit: AL8 (adaptive log range, exact-zero code) and COAT (range expansion) for the idea
of spending codes on the range that a block really has.

**First moment: in units of the update.** r = m / sqrt(v), with the *decoded* v, is bounded by the Cauchy-Schwarz
inequality and nearly alike for all columns; it is also what will be applied. With e = the power of two at or above
max|r| (one E8M0 byte),

    code = E4M3(sign(r) * 448 * (|r| / e)^2.5),      m = sign * (|code| / 448)^0.4 * e * sqrt(v).

The exponent 2.5 trades E4M3's surplus of range for precision. m rounds to nearest; stochastic rounding hurts it.

Limits: v below 2^-126 counts as 0 on every device (as if subnormals were flushed), and where v is 0, so is m.
Elements of a block below hi * 2^-40 are raised to it, which makes their updates smaller, never larger. Transcendental
functions are taken in fp64 and rounded once, so that codes do not depend on vector width or on how a tensor was cut.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.formats import E4M3, e8m0_ceil, e8m0_value

MAX_OCTAVES = 40.0
_TINY = torch.finfo(torch.float32).tiny  # 2^-126
_POWER = 2.5


class FP8Moments(NamedTuple):
    """Both moments of n blocks of b elements in FP8.

    Attributes:
        m_codes: uint8 [n, b], the bits of E4M3 values.
        m_scale: uint8 [n, 1], E8M0: the power of two at or above the block's largest |m| / sqrt(v).
        v_codes: uint8 [n, b], steps on the block's logarithmic scale.
        v_max: fp32 [n, 1], the block's largest v, exact.
        v_octaves: fp32 [n, 1], log2 of the largest over the smallest positive v of the block, at most 40.
    """

    m_codes: Tensor
    m_scale: Tensor
    v_codes: Tensor
    v_max: Tensor
    v_octaves: Tensor

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "FP8Moments":
        """Encodes both moments.

        Args:
            m: fp32 [n, b].
            v: fp32 [n, b], non-negative.
            random: fp32 [n, b], uniform in [0, 1): rounds a code of v up where it exceeds the distance to the next.
        """
        v_codes, v_max, v_octaves = encode_v(v, random)
        m_codes, m_scale = encode_m(m, decode_root_v(v_codes, v_max, v_octaves).float())
        return cls(m_codes, m_scale, v_codes, v_max, v_octaves)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each; v is exactly `v_max` at code 254 and exactly 0 at code 0."""
        root = decode_root_v(self.v_codes, self.v_max, self.v_octaves)
        levels = _m_levels(self.m_codes.device).index_select(0, self.m_codes.reshape(-1).int())
        m = levels.view(root.shape) * e8m0_value(self.m_scale) * root.float()
        return m, (root * root).float()


class FP32Moments(NamedTuple):
    """Both moments as they are, fp32 [n, b]; 8 bytes a parameter."""

    m: Tensor
    v: Tensor

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "FP32Moments":
        """Nothing is rounded, so `random` is not used."""
        return cls(m, v)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v)."""
        return self.m, self.v


# Below, `live` is 1 where v counts as positive and 0 where it does not. It is multiplied by rather than selected with:
# on CPUs torch's comparisons, boolean conversions and `where` take several times as long as arithmetic.


def encode_v(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [n, b], hi fp32 [n, 1], octaves fp32 [n, 1]) of `v` fp32 [n, b]; `random` as in `encode`."""
    live = (v.view(torch.int32) >> 23).clamp_max_(1)  # a non-zero exponent field: v >= 2^-126
    hi = v.amax(dim=1, keepdim=True)
    hi = torch.where(hi >= _TINY, hi, 0.0)
    lo = (v + (1 - live).float() * torch.finfo(torch.float32).max).amin(dim=1, keepdim=True)
    log_hi = hi.clamp_min(_TINY).double().log2()
    octaves = (log_hi - lo.minimum(hi).clamp_min(_TINY).double().log2()).clamp_max(MAX_OCTAVES).float()
    codes_per_octave = torch.where(octaves > 0, 253.0 / octaves.double(), 0.0)
    codes = v.clamp_min(_TINY).double().log2_().sub_(log_hi).mul_(codes_per_octave).add_(254.0)
    codes = codes.add_(random.double()).floor_().clamp_(1.0, 254.0).to(torch.uint8)
    return codes * live.to(torch.uint8), hi, octaves


def decode_root_v(codes: Tensor, hi: Tensor, octaves: Tensor) -> Tensor:
    """sqrt(v), fp64 [n, b], of what `encode_v` returned."""
    half_exponent = (codes.double() - 254.0).mul_(octaves.double() / 506.0)
    live = codes.clamp_max(1).double()
    return half_exponent.exp2_().mul_(hi.double().sqrt()).mul_(live)


def encode_m(m: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n, b], scale uint8 [n, 1]) of m fp32 [n, b] in units of `root` fp32 [n, b], the decoded sqrt(v)."""
    live = (root.view(torch.int32) >> 23).clamp_max_(1).float()
    ratio = (m * live).div_(root.clamp_min(_TINY))
    size = ratio.abs()
    scale = e8m0_ceil(size.amax(dim=1, keepdim=True))
    unit = size.div_(e8m0_value(scale)).clamp_max_(1.0)
    spread = unit.double().sqrt_().float().mul_(unit).mul_(unit).mul_(E4M3.max)
    return spread.copysign_(ratio).to(E4M3.dtype).view(torch.uint8), scale


@functools.cache
def _m_levels(device: torch.device) -> Tensor:
    """What each of the 256 codes of m stands for, fp32; the two NaN codes never occur."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3.dtype).double()
    levels = (values.abs() / E4M3.max) ** (1 / _POWER)
    return torch.copysign(levels, values).float().to(device)
