"""`numerics/moments.py` in Triton: both moments of a tile of blocks, [blocks, elements], from codes and back.

What belongs to a block is a vector [blocks]; each of the threads that share a block computes it for itself.

What codes mean is the reference's: where a lattice lies is computed as there, by the same polynomial. Within that,
roots, quotients and polynomials that IEEE determines would take several times as long as memory, so the hardware's
approximations serve (`special.py`). A decoded v is right to 2^-20 octaves, a logarithm to 2^-22, which the slack of the
format covers, so that lattice points stay where they are. A code differs from the reference's where that moves a number
across the edge between two: one in some ten thousand.

Whole numbers come out of the low bits of a sum, for conversions run on the few special-function units too.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton import elementary, special
from lightning_fp8.kernels.triton.elementary import as_float, as_int
from lightning_fp8.kernels.triton.encode import multiply_add, to_fp8

TINY = tl.constexpr(2.0**-126)
TINY_BITS = tl.constexpr(1 << 23)
HUGE_BITS = tl.constexpr(254 << 23)
ONE_BITS = tl.constexpr(0x3F800000)
EXPONENT_BITS = tl.constexpr(0x7F800000)
DENSITY_BITS = tl.constexpr(20)
DENSITY_BIAS = tl.constexpr((127 + 2) << 3)
# Numbers whose last bit is worth 1: a small whole number added to them is in their low bits.
WHOLE = tl.constexpr(2.0**23)
WHOLE_BITS = tl.constexpr(0x4B000000)
NEAREST = tl.constexpr(1.5 * 2.0**23)  # for numbers of either sign; its own low 9 bits are zero
ROOT_OF_LARGEST = tl.constexpr(448.0**0.4)
# So much more than 252 that no rounding takes the density below what is asked for; lo may then be 2^-12 codes too low.
INTERVALS = tl.constexpr(252.0 * (1 + 2.0**-20))


@triton.jit
def decode(m_codes, m_scale, v_codes, hi, density, split, gap, levels_ptr):
    """The moments (m, v), fp32."""
    _, _, first, octave, period, step = _lattice(hi, density)
    code = v_codes.to(tl.int32)
    place = as_float(code | WHOLE_BITS) + (first - WHOLE)[:, None]
    # 2^(place / period) of the root: the nearest octave, in the low bits of a sum, and what remains of it. Codes below
    # the split are as many octaves lower as the gap says.
    above = octave.to(tl.float32) + NEAREST
    lowest = tl.where(code < split.to(tl.int32)[:, None], (above - gap.to(tl.float32))[:, None], above[:, None])
    octaves = multiply_add(place, step[:, None], lowest)
    fraction = tl.fma(lowest - octaves, period[:, None], place) * step[:, None]
    root = as_float((as_int(octaves) << 23) + as_int(special.exp2(fraction)))
    is_hi = code == 254
    root_hi = special.root(tl.maximum(hi, TINY))
    unit = as_float(m_scale.to(tl.int32) << 23)
    m = tl.load(levels_ptr + m_codes.to(tl.int32)) * (tl.where(is_hi, root_hi[:, None], root) * unit[:, None])
    v = tl.where(is_hi, hi[:, None], root * root)
    return m, tl.where(code == 0, 0.0, v)


@triton.jit
def encode(m, v, hi, uniform):
    """The codes of both moments, fp32, with v >= 0 and `hi` the largest of a block.

    `uniform`, fp32 in [0, 2^32), rounds those of v.

    Returns:
        As in `FP8Moments`: m_codes, m_scale, v_codes, v_max, v_density, v_split, v_gap; and the inverse of the root of
        the stored v, in units of 2^-octave, and the octave, but for v = 0.
    """
    bits = as_int(v)
    dead = bits < TINY_BITS
    hi_bits = as_int(hi)
    hi_bits = tl.where(hi_bits < TINY_BITS, 0, hi_bits)
    hi, positive = as_float(hi_bits), tl.maximum(hi_bits, TINY_BITS)
    # The nearest numbers above, above and below: in distances without a sign, what is on the other side is very far.
    lo_bits = TINY_BITS + _least(bits - TINY_BITS, tl.full(positive.shape, HUGE_BITS - TINY_BITS, tl.int32))
    middle = (positive >> 1) + (lo_bits >> 1)
    low = bits < middle[:, None]
    over = middle + _least(bits - middle[:, None], -middle + HUGE_BITS)
    under = middle - 1 - _least((middle - 1)[:, None] - bits, middle - 1)
    gap = _gap(positive, over, under)
    density = _density(positive, lo_bits, gap)
    k, base, first, octave, _, step = _lattice(hi, density)
    stretch = special.inverse(_point(positive, k, base))
    split = (tl.minimum(tl.maximum(tl.floor(_point(over, k, base)), -252.0), 1.0) + 253.0) * tl.minimum(gap, 1.0)
    exact = _point(bits, k[:, None], tl.where(low, (base - 2.0 * k * gap)[:, None], base[:, None]))
    # The nearest whole number, half less than which is the one below.
    slack = k * 2.0**-19 + 2.0**-16
    threshold = tl.fma(uniform, ((1.0 - 2.0 * slack) * 2.0**-32)[:, None], (slack - 0.5)[:, None])
    rounded = tl.maximum(tl.maximum(exact, exact * stretch[:, None]) + threshold, -252.0)
    code = rounded + (WHOLE + 253.0)  # at most 254, for at hi the point is 1
    v_codes = tl.where(dead, 0, as_int(code)).to(tl.uint8)

    # 2^-((code + first) / period) of the root is the inverse, but for the octave of the whole block.
    near = first * -step
    far = tl.where(low, (near + gap)[:, None], near[:, None])
    inverse_hi = special.inverse(special.root(tl.maximum(hi, TINY)) * as_float((127 - octave) << 23))
    inverse = tl.maximum(special.exp2(tl.fma(code - WHOLE, -step[:, None], far)), inverse_hi[:, None])
    ratio = tl.where(dead, 0.0, m) * inverse
    largest = tl.max(tl.abs(ratio), axis=1)
    scale = ((as_int(largest) + 0x7FFFFF) >> 23) - octave
    scale = tl.where(largest == 0.0, 1, tl.minimum(tl.maximum(scale, 1), 253))
    # What is so small that it would have to be multiplied by more than 2^122 has no code anyhow.
    per_unit = as_float((254 - tl.minimum(tl.maximum(scale + octave, 5), 253)) << 23) * ROOT_OF_LARGEST
    x = ratio * per_unit[:, None]
    size = tl.abs(x)
    m_codes = to_fp8(special.root(size) * size * x, tl.float8e4nv).to(tl.uint8, bitcast=True)  # which saturates
    return (
        m_codes,
        scale.to(tl.uint8),
        v_codes,
        hi,
        density.to(tl.uint8),
        split.to(tl.int32).to(tl.uint8),
        gap.to(tl.int32).to(tl.uint8),
        inverse,
        octave,
    )


@triton.jit
def _lattice(hi, density):
    """The lattice of a block; see `_lattice` and `_lattice_root` there.

    Returns:
        Codes an octave, fp32; the number of the last lattice point below hi; the place of code 0 in hi's octave of
        roots, that octave, int32, how many points it has, and the inverse of that.
    """
    k = as_float((density.to(tl.int32) + DENSITY_BIAS) << DENSITY_BITS)
    octave, log = elementary.log2(as_int(tl.maximum(hi, TINY)))
    # floor((octave + log) * k - 2^-12), of which fp32 holds the first product, and the second one in two parts.
    above, below = octave.to(tl.float32) * k, log * k
    rest = multiply_add(log, k, -below) - 2.0**-12
    fraction = (above - tl.floor(above)) + (below - tl.floor(below))  # less than 3/2, and exact near 0 and 1
    last = (
        tl.floor(above)
        + tl.floor(below)
        + tl.where(fraction - 1.0 >= -rest, 1.0, tl.where(fraction >= -rest, 0.0, -1.0))
    )
    period = 2.0 * k
    step = special.inverse(period)
    octaves = tl.floor((last + 0.5) * step)
    return k, last, tl.fma(-octaves, period, last) - 253.0, octaves.to(tl.int32), period, step


@triton.jit
def _least(distances, most):
    """The least of each block, of numbers without a sign, but at most `most`."""
    least = tl.min(distances.to(tl.uint32, bitcast=True), axis=1)
    return tl.minimum(least, most.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def _log2(bits):
    """The binary logarithm of a normal positive number by its bits: its exponent field, fp32 * 2^23, and the rest."""
    exponent = bits & EXPONENT_BITS
    return exponent.to(tl.float32), special.log2(as_float(bits - exponent + ONE_BITS))


@triton.jit
def _point(bits, k, base):
    """K * log2(v) - base of v given by its bits."""
    exponent, log = _log2(bits)
    return tl.fma(log, k, tl.fma(exponent, k * 2.0**-23, -(base + 127.0 * k)))


@triton.jit
def _density(hi_bits, lo_bits, gap):
    octaves = tl.minimum(tl.maximum(_octaves(hi_bits, lo_bits) - 2.0 * gap, 252.0 / 1024.0), 42.0)
    return (as_int(special.inverse(octaves) * INTERVALS) >> DENSITY_BITS) - DENSITY_BIAS


@triton.jit
def _gap(hi_bits, over_bits, under_bits):
    """Octaves of the root that are left out between the two numbers, as whole fp32 numbers."""
    empty = _octaves(over_bits, tl.maximum(under_bits, TINY_BITS)) * 0.5 - 0.25
    gap = tl.minimum(tl.maximum(tl.floor(empty), 0.0), 40.0)
    return tl.where((under_bits >= TINY_BITS) & (_octaves(hi_bits, over_bits) < 40.0), gap, 0.0)


@triton.jit
def _octaves(a_bits, b_bits):
    """log2(a / b)."""
    a_exponent, a_log = _log2(a_bits)
    b_exponent, b_log = _log2(b_bits)
    return (a_exponent - b_exponent) * 2.0**-23 + (a_log - b_log)
