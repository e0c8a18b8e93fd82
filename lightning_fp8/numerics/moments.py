"""FP8 codec of Adam's two moments, blind to how unequal the columns of a weight are: `moments="fp8"`.

It works on blocks: fp32 tensors [n, b], one row a block of consecutive elements of one row of a parameter. Storage is
one byte an element for each moment, and per block 4 + 4 bytes (`v_max`; `v_density`, `v_split`, `v_gap`, `m_scale`):
2.06 bytes a parameter at b = 128.

**Second moment: an E8M0 exponent stretched over the block's own range.** v has no sign and needs no mantissa; it needs
range and even relative steps. With hi = max v (kept exactly), lo the smallest positive v, or hi * 2^-42 if that is
more, and k codes an octave, where k is the largest number with three mantissa bits that is at most 252 / log2(hi / lo),

    v = 2^((code - 253 + base) / k) at codes 1 to 253, where base = ceil(k * log2 hi) - 1;
    v = hi at code 254;    v = 0 at code 0, and nothing else is.

Where columns of two kinds share a block, some of which no longer have gradients, say, most of these codes would lie
between the two, unused. So the lattice has a gap: with the widest interval around the geometric mean of hi and lo that
no v lies in, all whole multiples of two octaves that fit in there, but for half an octave, are left out, the codes
below it stand for so much less, and k is as large as what remains allows.

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
m. Elements of a block below hi * 2^-42, and below what a gap adds to that, are raised to it, or a code less: their
updates become smaller, never larger. Both moments must be finite. |m| / sqrt(v) beyond 2^126 counts as that.

**The same codes on every path.** All is fp32 arithmetic whose every operation IEEE 754 determines (`elementary.py`), so
codes depend neither on how a tensor was cut nor on whether they were computed by torch's operations or by C++. The
kernel for GPUs takes the hardware's approximations instead, within the slack below (`kernels/triton/moments.py`).
fp32 limits the density to 1,024 codes an octave; more would buy nothing, 1/1,024 octaves being .03 % of sqrt(v), where
m is right to some per cent. A decoded v that is encoded again may miss its lattice point by `_SLACK` and so many
`_SLACK_OCTAVES`; thresholds keep that far from 0 and 1, so that what lies on the lattice stays there. In return a v
that decays by d codes a step decays more slowly by that slack over d: .3 % at beta2 = .999 and 6 codes an octave.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics import elementary
from lightning_fp8.numerics.formats import E4M3, e8m0_ceil, e8m0_value

_INTERVALS = 252  # between codes 1 and 253
_WIDEST = 42.0  # octaves, 6 codes each
_WIDEST_GAP = 40.0  # times two octaves; below code 0 of the smallest hi, a root of 2^-85, exp2 still has 2^-125
_DENSEST = 1024.0  # codes an octave
_TINY = torch.finfo(torch.float32).tiny  # 2^-126
_TINY_BITS = 1 << 23
_HUGE_BITS = 254 << 23  # 2^127
_POWER = 2.5
_DENSITY_BITS = 20  # an fp32 number without these is one with three mantissa bits
_DENSITY_BIAS = (127 + 2) << 3  # the density whose byte is 0: 4 codes an octave
# hi lies at least this many codes above the last lattice point that counts as below it; fp32 knows it to 2^-15.
_MARGIN = 2.0**-12
# How far from its lattice point a decoded v may seem to be when it is encoded again: fp32 keeps points, up to 252, to
# 2^-17, twice; decoding and the logarithm add up to 2^-19 octaves, by the special functions of a GPU.
_SLACK = 2.0**-16
_SLACK_OCTAVES = 2.0**-19


class FP8Moments(NamedTuple):
    """Both moments of n blocks of b elements in FP8; 2 + 8 / b bytes a parameter.

    Attributes:
        m_codes: uint8 [n, b], the bits of E4M3 values.
        m_scale: uint8 [n, 1], E8M0: the power of two at or above the block's largest |m| / sqrt(v).
        v_codes: uint8 [n, b], points of the block's logarithmic lattice.
        v_max: fp32 [n, 1], the block's largest v, exact.
        v_density: uint8 [n, 1], codes an octave: 5 exponent bits and 3 mantissa bits, 0 is 4 codes an octave; 4 to 64.
        v_split: uint8 [n, 1], the first code above the gap; 0 where there is none.
        v_gap: uint8 [n, 1], how many times two octaves the lattice leaves out below that code; at most 40.
    """

    m_codes: Tensor
    m_scale: Tensor
    v_codes: Tensor
    v_max: Tensor
    v_density: Tensor
    v_split: Tensor
    v_gap: Tensor

    @classmethod
    def zeros(cls, rows: int, columns: int, block_size: int, device: torch.device) -> "FP8Moments":
        """Moments of nothing: codes [rows, columns], and what belongs to a block [rows, blocks of a row]."""
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        scales = torch.zeros(rows, -(-columns // block_size), dtype=torch.uint8, device=device)
        of_blocks = (scales.float(), *(scales.clone() for _ in range(3)))
        return cls(codes, torch.ones_like(scales), codes.clone(), *of_blocks)

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "FP8Moments":
        """Encodes both moments.

        Args:
            m: fp32 [n, b].
            v: fp32 [n, b], non-negative.
            random: fp32 [n, b], uniform in [0, 1): rounds a code of v up where it exceeds the distance to the next.
        """
        stored_v = encode_v(v, random)
        live_m = (m.view(torch.int32) & _live(v)).view(torch.float32)
        m_codes, m_scale = encode_m(live_m, _lattice_root(*stored_v).minimum(_root_of(stored_v[1])))
        return cls(m_codes, m_scale, *stored_v)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each; v is exactly `v_max` at code 254 and exactly 0 at code 0."""
        root = _lattice_root(*self[2:])
        levels = m_levels(self.m_codes.device).index_select(0, self.m_codes.reshape(-1).int())
        m = levels.view(root.shape) * e8m0_value(self.m_scale) * root.minimum(_root_of(self.v_max))
        return m, _square(root, self.v_codes, self.v_max)


# The order of operations is part of the format: see `elementary.py`. On CPUs torch's comparisons, boolean conversions
# and `where` take several times as long as arithmetic, so what counts as zero is masked by integers.


def encode_v(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of v of `FP8Moments`, in their order, of `v` fp32 [n, b]; `random` as in `encode`."""
    live, encoding = _live(v), v.view(torch.int32)
    hi = v.amax(dim=1, keepdim=True)
    hi = torch.where(hi >= _TINY, hi, 0.0)
    largest = hi.clamp_min(_TINY)
    lo = (encoding | (_HUGE_BITS & ~live)).view(torch.float32).amin(dim=1, keepdim=True)
    # The mean of two encodings is about that of their logarithms; below it, all ones.
    middle = (largest.view(torch.int32) >> 1) + (lo.view(torch.int32) >> 1)
    low = (encoding - middle) >> 31
    over = encoding.maximum(_HUGE_BITS & low).view(torch.float32).amin(dim=1, keepdim=True)
    under = (encoding & low).view(torch.float32).amax(dim=1, keepdim=True)
    gap = _gap(largest, over, under)
    density = _density(largest, lo, gap)
    per_octave, base = _lattice(hi, density)
    k, b = per_octave.float(), base.float()
    split = (_points(over, k, b).floor_().clamp_(-252.0, 1.0) + 253.0) * gap.clamp_max(1.0)
    point = _points(v, k, b + low.float() * (2.0 * k * gap))  # exact: a lattice point stays one below the gap
    # The interval between the last two codes is cut at hi.
    point = point.maximum(point * _points(largest, k, b).reciprocal())
    slack = k * _SLACK_OCTAVES + _SLACK
    threshold = (random * (1.0 - 2.0 * slack)).add_(slack)
    codes = point.add_(threshold).floor_().clamp_(-252.0, 1.0).int().add_(253)
    return codes.bitwise_and_(live).to(torch.uint8), hi, density, split.to(torch.uint8), gap.to(torch.uint8)


def decode_v(codes: Tensor, hi: Tensor, density: Tensor, split: Tensor, gap: Tensor) -> Tensor:
    """v, fp32 [n, b], of what `encode_v` returned; exactly `hi` at code 254."""
    return _square(_lattice_root(codes, hi, density, split, gap), codes, hi)


def _live(v: Tensor) -> Tensor:
    """A mask, int32, of all ones where `v` counts as positive, of zeros where it does not."""
    return (_TINY_BITS - 1 - v.view(torch.int32)) >> 31


def _octaves(hi: Tensor, lo: Tensor) -> Tensor:
    """log2(hi / lo) of normal positive fp32 numbers."""
    (hi_octave, hi_log), (lo_octave, lo_log) = elementary.log2(hi), elementary.log2(lo)
    return (hi_octave - lo_octave).float() + (hi_log - lo_log)


def _gap(hi: Tensor, over: Tensor, under: Tensor) -> Tensor:
    """How many times two octaves the lattice leaves out between `under` and `over`, fp32 [n, 1]; `under` may be 0.

    Half an octave of it, three codes or more, stays, so that no code rounded up from below is one of those above.
    """
    gap = (_octaves(over, under.clamp_min(_TINY)) * 0.5 - 0.25).floor().clamp(0.0, _WIDEST_GAP)
    return torch.where((under >= _TINY) & (_octaves(hi, over) < _WIDEST - 2.0), gap, 0.0)


def _density(hi: Tensor, lo: Tensor, gap: Tensor) -> Tensor:
    """The byte of the largest k that reaches from `hi` to `lo`, both positive fp32 [n, 1]; `lo` may exceed `hi`."""
    octaves = _octaves(hi, lo) - 2.0 * gap
    densest = _INTERVALS / octaves.clamp(_INTERVALS / _DENSEST, _WIDEST)
    return ((densest.view(torch.int32) >> _DENSITY_BITS) - _DENSITY_BIAS).to(torch.uint8)


def _lattice(hi: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """(k, base), fp64 [n, 1]: codes an octave, and the number of the last lattice point 2^(i / k) below hi."""
    per_octave = ((density.int() + _DENSITY_BIAS) << _DENSITY_BITS).view(torch.float32).double()
    octave, log = elementary.log2(hi.clamp_min(_TINY))
    return per_octave, ((octave.double() + log.double()) * per_octave - _MARGIN).floor()


def _points(v: Tensor, k: Tensor, base: Tensor) -> Tensor:
    """The points k * log2(v) - base of positive fp32 `v`, fp32."""
    octave, log = elementary.log2(v)
    return (octave.float() * k).sub_(base).add_(log.mul_(k))  # exact but for `log`


def _lattice_root(codes: Tensor, hi: Tensor, density: Tensor, split: Tensor, gap: Tensor) -> Tensor:
    """What `codes` stand for on the lattice, as roots, fp32 [n, b]; code 254 is above sqrt(hi), code 0 is positive."""
    k, base = _lattice(hi, density)
    period = 2 * k  # points in an octave of the root: an integer
    octave = (base / period).floor()
    first = (base - octave * period - 253.0).float()
    period, step, octave = period.float(), period.reciprocal().float(), octave.float()
    code = codes.float()
    skipped = (split.float() - code).clamp_(0.0, 1.0).mul_(gap.float())  # octaves of the root
    code = (code - 253.0).clamp_min_(0.0).add_(code)  # code 254 means hi, so take a point that is surely above it
    point = code.add_(first)
    octaves = ((point + 0.5) * step).floor_()  # the half keeps the floor clear of rounding
    fraction = (point - octaves * period).mul_(step)
    return elementary.exp2(octaves.add_(octave).sub_(skipped), fraction)


def _root_of(hi: Tensor) -> Tensor:
    return elementary.sqrt(hi.clamp_min(_TINY))


def _square(root: Tensor, codes: Tensor, hi: Tensor) -> Tensor:
    """What v is by its lattice root: exactly `hi` at code 254, and 0 at code 0."""
    return (root * root).minimum(hi).mul_(codes.clamp_max(1).float())


def encode_m(m: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n, b], scale uint8 [n, 1]) of m fp32 [n, b] in units of `root` fp32 [n, b], positive."""
    ratio = m / root
    size = ratio.abs()
    scale = e8m0_ceil(size.amax(dim=1, keepdim=True)).clamp_max_(253)
    unit = size.mul_(e8m0_value(254 - scale)).clamp_max_(1.0)
    spread = elementary.sqrt(unit).mul_(unit).mul_(unit).mul_(E4M3.max)
    return spread.copysign_(ratio).to(E4M3.dtype).view(torch.uint8), scale


def _levels(device: torch.device) -> Tensor:
    """What each of the 256 codes of m stands for, fp32; the two NaN codes never occur."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3.dtype).double()
    levels = (values.abs() / E4M3.max) ** (1 / _POWER)
    return torch.copysign(levels, values).float().to(device)


# One table a device, which a compiled step looks up too instead of computing it anew.
m_levels: Callable[[torch.device], Tensor] = torch.compiler.assume_constant_result(functools.cache(_levels))
