"""FP8 codec of Adam's two moments, blind to how unequal the columns of a weight are: `moments="fp8"`.

It works on blocks: fp32 tensors [n, b], one row a block of consecutive elements of one row of a parameter. Storage is
one byte an element for each moment, and per block 4 + 1 + 1 bytes (`v_max`, `v_density`, `m_scale`): 2.05 bytes a
parameter at b = 128.

**Second moment: an E8M0 exponent stretched over the block's own range.** v has no sign and needs no mantissa; it needs
range and even relative steps. With hi = max v (kept exactly), lo the smallest positive v, or hi * 2^-42 if that is
more, and k codes an octave, where k is the largest number with three mantissa bits that is at most 252 / log2(hi / lo),

    v = 2^((code - 253 + base) / k) at codes 1 to 253, where base = ceil(k * log2 hi) - 1;
    v = hi at code 254;    v = 0 at code 0, and nothing else is.

No positive v becomes 0, which is what makes E4M3 with one absolute maximum dangerous: m / sqrt(0) is a single update
of hundreds. A code is 1/k octaves: 2.9 % of sqrt(v) where the block spans 20 octaves, 6 % at 42.

The code is rounded up or down with odds proportional to the distance: rounded to nearest, a v that decays by less
than half a code a step stays where it is for ever. What such roundings cost is a random walk, over the 1 / (1 - beta2)
steps that v remembers, and two things keep it short. The levels are the points of a lattice, 2^(i / k), that stays
where it is while hi moves, k being one of few numbers, so that a v that stays is not rounded again and again. And the
random thresholds of an element are not drawn anew in each step: they follow the golden-ratio sequence
(`rounding.dither`), in which a rounding up is soon balanced by one down. What is left at beta2 = .999 is the noise of
the gradients themselves passing through steps of 1/k octaves; no rounding that keeps nothing but the code avoids it.

Credit: AL8 (adaptive log range, exact-zero code) and COAT (range expansion) for the idea of spending codes on the range
that a block really has.

**First moment: in units of the update.** r = m / sqrt(v), with the *decoded* v, is bounded by the Cauchy-Schwarz
inequality and nearly alike for all columns; it is also what will be applied. With e = the power of two at or above
max|r| (one E8M0 byte),

    code = E4M3(sign(r) * 448 * (|r| / e)^2.5),      m = sign * (|code| / 448)^0.4 * e * sqrt(v).

The exponent 2.5 trades E4M3's surplus of range for precision. m rounds to nearest; stochastic rounding hurts it.

**When it fails.** v below 2^-126 counts as 0 on every device (as if subnormals were flushed), and where v is 0, so is
m. Elements of a block below hi * 2^-42 are raised to that, or a code less, which makes their updates smaller, never
larger. Both moments must be finite. Transcendental functions are taken in fp64 and rounded once, so that codes do not
depend on vector width or on how a tensor was cut.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.formats import E4M3, e8m0_ceil, e8m0_value

_INTERVALS = 252  # between codes 1 and 253
_WIDEST = 42.0  # octaves, 6 codes each
_NARROWEST = 2.0**-8  # octaves; codes that were denser still would ask too much of fp64's logarithms
_TINY = torch.finfo(torch.float32).tiny  # 2^-126
_POWER = 2.5
_DENSITY_BITS = 20  # an fp32 number without these is one with three mantissa bits
_DENSITY_BIAS = (127 + 2) << 3  # the density whose byte is 0: 4 codes an octave
# A lattice is placed with a margin of this many codes, so that no rounding of fp64 can put hi beyond its last point.
_MARGIN = 2.0**-20


class FP8Moments(NamedTuple):
    """Both moments of n blocks of b elements in FP8; 2 + 6 / b bytes a parameter.

    Attributes:
        m_codes: uint8 [n, b], the bits of E4M3 values.
        m_scale: uint8 [n, 1], E8M0: the power of two at or above the block's largest |m| / sqrt(v).
        v_codes: uint8 [n, b], points of the block's logarithmic lattice.
        v_max: fp32 [n, 1], the block's largest v, exact.
        v_density: uint8 [n, 1], codes an octave: 5 exponent bits and 3 mantissa bits, 0 is 4 codes an octave; 4 to 111.
    """

    m_codes: Tensor
    m_scale: Tensor
    v_codes: Tensor
    v_max: Tensor
    v_density: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "FP8Moments":
        """Moments of nothing: codes [rows, columns], and what belongs to a block [rows, blocks of a row]."""
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        scales = torch.zeros(rows, -(-columns // block_size), dtype=torch.uint8, device=device)
        return cls(codes, torch.ones_like(scales), codes.clone(), scales.float(), scales)

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "FP8Moments":
        """Encodes both moments.

        Args:
            m: fp32 [n, b].
            v: fp32 [n, b], non-negative.
            random: fp32 [n, b], uniform in [0, 1): rounds a code of v up where it exceeds the distance to the next.
        """
        v_codes, v_max, v_density = encode_v(v, random)
        m_codes, m_scale = encode_m(m, decode_root_v(v_codes, v_max, v_density).float())
        return cls(m_codes, m_scale, v_codes, v_max, v_density)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each; v is exactly `v_max` at code 254 and exactly 0 at code 0."""
        root = decode_root_v(self.v_codes, self.v_max, self.v_density)
        levels = _m_levels(self.m_codes.device).index_select(0, self.m_codes.reshape(-1).int())
        m = levels.view(root.shape) * e8m0_value(self.m_scale) * root.float()
        return m, (root * root).float()


# Below, `live` is 1 where v counts as positive and 0 where it does not. It is multiplied by rather than selected with:
# on CPUs torch's comparisons, boolean conversions and `where` take several times as long as arithmetic.


def encode_v(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [n, b], hi fp32 [n, 1], density uint8 [n, 1]) of `v` fp32 [n, b]; `random` as in `encode`."""
    live = (v.view(torch.int32) >> 23).clamp_max_(1)  # a non-zero exponent field: v >= 2^-126
    hi = v.amax(dim=1, keepdim=True)
    hi = torch.where(hi >= _TINY, hi, 0.0)
    lo = (v + (1 - live).float() * torch.finfo(torch.float32).max).amin(dim=1, keepdim=True)
    log_hi = hi.clamp_min(_TINY).double().log2()
    octaves = log_hi - lo.minimum(hi).clamp_min(_TINY).double().log2()
    densest = (_INTERVALS / octaves.clamp_(_NARROWEST, _WIDEST)).float().view(torch.int32)
    density = ((densest >> _DENSITY_BITS) - _DENSITY_BIAS).to(torch.uint8)
    per_octave, base = _lattice(hi, density)
    top = log_hi * per_octave - base  # above 0, and 1 at most: the interval between the last two codes is cut at hi
    point = v.clamp_min(_TINY).double().log2_().mul_(per_octave).sub_(base)
    point = torch.maximum(point, point / top)
    # `random` is a multiple of 2^-16; half of one more makes it symmetric, and keeps what lies on the lattice there.
    codes = point.add_(random.double()).add_(253.0 + 2.0**-17).floor_().clamp_(1.0, 254.0).to(torch.uint8)
    return codes * live.to(torch.uint8), hi, density


def decode_root_v(codes: Tensor, hi: Tensor, density: Tensor) -> Tensor:
    """sqrt(v), fp64 [n, b], of what `encode_v` returned."""
    per_octave, base = _lattice(hi, density)
    half_octaves = 0.5 / per_octave
    root = (codes.double() * half_octaves).add_((base - 253.0 + 2 * _MARGIN) * half_octaves).exp2_()
    # The last point of the lattice is at hi or above, and means hi. 2^-126 is a point of every lattice, so that none
    # below it is ever needed.
    root = root.minimum(hi.double().sqrt())
    return root.mul_(codes.clamp_max(1).double())


def _lattice(hi: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """(k, base), fp64 [n, 1]: codes an octave, and the number of the last lattice point 2^(i / k) below hi."""
    per_octave = ((density.int() + _DENSITY_BIAS) << _DENSITY_BITS).view(torch.float32).double()
    return per_octave, (hi.clamp_min(_TINY).double().log2() * per_octave - _MARGIN).floor()


def encode_m(m: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n, b], scale uint8 [n, 1]) of m fp32 [n, b] in units of `root` fp32 [n, b], the decoded sqrt(v)."""
    live = (root.view(torch.int32) >> 23).clamp_max_(1).float()
    ratio = (m * live).div_(root.clamp_min(_TINY))
    size = ratio.abs()
    scale = e8m0_ceil(size.amax(dim=1, keepdim=True))
    unit = size.div_(e8m0_value(scale)).clamp_max_(1.0)
    spread = unit.double().sqrt_().float().mul_(unit).mul_(unit).mul_(E4M3.max)
    return spread.copysign_(ratio).to(E4M3.dtype).view(torch.uint8), scale


def _levels(device: torch.device) -> Tensor:
    """What each of the 256 codes of m stands for, fp32; the two NaN codes never occur."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3.dtype).double()
    levels = (values.abs() / E4M3.max) ** (1 / _POWER)
    return torch.copysign(levels, values).float().to(device)


# One table a device, which a compiled step looks up too instead of computing it anew.
_m_levels: Callable[[torch.device], Tensor] = torch.compiler.assume_constant_result(functools.cache(_levels))
