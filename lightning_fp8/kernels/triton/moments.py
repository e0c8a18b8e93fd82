"""`numerics/moments.py` in Triton: both moments of a tile of blocks, [blocks, elements], from codes and back.

What belongs to a block is a vector [blocks]; each of the threads that share a block computes it for itself. Additions,
multiplications, quotients and roots are rounded one by one, so codes are those of the reference, bit for bit; the
exponent 0.4 of m is looked up in the reference's own table, and roots within an octave in one that it has made
(`tables.py`). What has no fraction may be computed in any way: whole numbers come out of the low bits of a sum, for
conversions run on the few special-function units too.

The two quotients and two roots of a parameter are IEEE's (`ieee.py`), with one special-function instruction each.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton import ieee
from lightning_fp8.kernels.triton.elementary import as_float, as_int, log2
from lightning_fp8.kernels.triton.encode import to_fp8, with_sign_of

TINY = tl.constexpr(2.0**-126)
TINY_BITS = tl.constexpr(1 << 23)
HUGE_BITS = tl.constexpr(254 << 23)
DENSITY_BITS = tl.constexpr(20)
DENSITY_BIAS = tl.constexpr((127 + 2) << 3)
# Numbers whose last bit is worth 1: a small whole number added to them is in their low bits.
WHOLE = tl.constexpr(2.0**23)
WHOLE_BITS = tl.constexpr(0x4B000000)
FAR_UP = tl.constexpr(2.0**60)
FAR_DOWN = tl.constexpr(2.0**-60)
NEAREST = tl.constexpr(1.5 * 2.0**23)  # for numbers of either sign; its own low 9 bits are zero


@triton.jit
def decode(m_codes, m_scale, v_codes, hi, density, split, gap, levels_ptr, roots_ptr):
    """The moments (m, v), fp32."""
    lattice, root_hi, _, _ = _lattice(hi, density)
    code = as_float(v_codes.to(tl.int32) | WHOLE_BITS) - WHOLE
    root = _root(code, lattice, split.to(tl.int32), gap.to(tl.int32), roots_ptr)
    unit = as_float(m_scale.to(tl.int32) << 23)
    m = tl.load(levels_ptr + m_codes.to(tl.int32)) * unit[:, None] * tl.minimum(root, root_hi[:, None])
    return m, tl.minimum(root * root, hi[:, None]) * tl.minimum(code, 1.0)


@triton.jit
def encode(m, v, uniform, roots_ptr):
    """The codes of both moments, fp32, with v >= 0; `uniform` fp32 in [0, 1) rounds those of v.

    Returns:
        As in `FP8Moments`: m_codes, m_scale, v_codes, v_max, v_density, v_split, v_gap.
    """
    bits = as_int(v)
    dead = bits < TINY_BITS
    hi_bits = tl.max(bits, axis=1)
    hi_bits = tl.where(hi_bits < TINY_BITS, 0, hi_bits)
    lo_bits = tl.min(tl.where(dead, HUGE_BITS, bits), axis=1)
    hi, positive = as_float(hi_bits), tl.maximum(hi_bits, TINY_BITS)
    middle = (positive >> 1) + (lo_bits >> 1)
    low = bits < middle[:, None]
    over = tl.min(tl.where(low, HUGE_BITS, bits), axis=1)
    under = tl.max(tl.where(low, bits, 0), axis=1)
    gap = _gap(positive, over, under)
    density = _density(positive, lo_bits, gap)
    lattice, root_hi, k, base = _lattice(hi, density)
    stretch = tl.math.div_rn(tl.full(hi.shape, 1.0, tl.float32), _point(positive, k, base))
    slack = k * 2.0**-19 + 2.0**-16
    spread = 1.0 - 2.0 * slack
    split = (tl.minimum(tl.maximum(tl.floor(_point(over, k, base)), -252.0), 1.0) + 253.0) * tl.minimum(gap, 1.0)
    exact = _point(bits, k[:, None], tl.where(low, (base - 2.0 * k * gap)[:, None], base[:, None]))
    rounded = tl.floor(tl.maximum(exact, exact * stretch[:, None]) + (uniform * spread[:, None] + slack[:, None]))
    v_code = tl.where(dead, 0.0, tl.minimum(tl.maximum(rounded, -252.0), 1.0) + 253.0)

    split, gap = split.to(tl.int32), gap.to(tl.int32)
    root = tl.minimum(_root(v_code, lattice, split, gap, roots_ptr), root_hi[:, None])
    m = tl.where(dead, 0.0, m)
    ratio = ieee.quotient(m * FAR_UP, root) * FAR_DOWN
    largest = tl.max(as_int(ratio) & 0x7FFFFFFF, axis=1)
    # Where the largest ratio is no extreme number, all are right that have a code. Else they are divided the long way.
    if tl.min(((as_float(largest) > FAR_DOWN) & (as_float(largest) < FAR_UP)).to(tl.int32)) == 0:
        ratio = tl.math.div_rn(m, root)
        largest = tl.max(as_int(ratio) & 0x7FFFFFFF, axis=1)
    exponent = tl.minimum(tl.maximum((largest + 0x7FFFFF) >> 23, 1), 253)
    x = tl.minimum(tl.abs(ratio) * as_float((254 - exponent) << 23)[:, None], 1.0)
    x = tl.maximum(x, 2.0**-60)  # what has no code anyhow
    spread_m = with_sign_of(ieee.root(x) * x * x * 448.0, m)
    m_codes = to_fp8(spread_m, tl.float8e4nv).to(tl.uint8, bitcast=True)
    return (
        m_codes,
        exponent.to(tl.uint8),
        as_int(v_code + WHOLE).to(tl.uint8),
        hi,
        density.to(tl.uint8),
        split.to(tl.uint8),
        gap.to(tl.uint8),
    )


@triton.jit
def _lattice(hi, density):
    """What the lattice of a block needs; see `_lattice` and `_lattice_root` there."""
    positive = tl.maximum(hi, TINY)
    density = density.to(tl.int32)
    k = as_float((density + DENSITY_BIAS) << DENSITY_BITS)
    exponent, log = log2(as_int(positive))
    length = k.to(tl.float64) * 2.0
    last = tl.floor((exponent.to(tl.float64) + log.to(tl.float64)) * k.to(tl.float64) - 2.0**-12)
    octave = tl.floor(last / length)
    first = (last - octave * length - 253.0).to(tl.float32)
    # Where the roots of this density begin in their table, and what the number of a root has in its bits below.
    octaves, eighths = density >> 3, density & 7
    begin = ((92 << octaves) - 92) + ((eighths * (eighths + 15) >> 1) << octaves)
    shape = first, length.to(tl.float32), (1.0 / length).to(tl.float32), begin - WHOLE_BITS, octave.to(tl.int32) << 23
    return shape, tl.sqrt_rn(positive), k, last.to(tl.float32)


@triton.jit
def _root(code, lattice, split, gap, roots_ptr):
    """The root of the lattice point of `code`, fp32: its octave, and the root within it from the table."""
    first, period, step, begin, exponent = lattice
    # Whole numbers, so the fused operations round nothing; the code that means hi gets a point that is surely above it.
    point = tl.maximum(code + first[:, None], tl.fma(code, 2.0, (first - 253.0)[:, None]))
    # The nearest whole number, in the low bits of a sum: floor((point + 1/2) / period), clear of rounding.
    octaves = tl.fma(point, step[:, None], (step * 0.5 - 0.5)[:, None]) + NEAREST
    within = tl.fma(-(octaves - NEAREST), period[:, None], point) + WHOLE
    root = tl.load(roots_ptr + (as_int(within) + begin[:, None]))
    # Codes below the split are as many octaves lower as the gap says.
    skipped = tl.where(code < split.to(tl.float32)[:, None], (exponent - (gap << 23))[:, None], exponent[:, None])
    return as_float((as_int(octaves) << 23) + skipped + as_int(root))


@triton.jit
def _point(bits, k, base):
    """K * log2(v) - base of v given by its bits."""
    exponent, log = log2(bits)
    return (exponent.to(tl.float32) * k - base) + log * k


@triton.jit
def _density(hi_bits, lo_bits, gap):
    octaves = tl.minimum(tl.maximum(_octaves(hi_bits, lo_bits) - 2.0 * gap, 252.0 / 1024.0), 42.0)
    densest = tl.math.div_rn(tl.full(octaves.shape, 252.0, tl.float32), octaves)
    return (as_int(densest) >> DENSITY_BITS) - DENSITY_BIAS


@triton.jit
def _gap(hi_bits, over_bits, under_bits):
    """Octaves of the root that are left out between the two numbers, as whole fp32 numbers."""
    empty = _octaves(over_bits, tl.maximum(under_bits, TINY_BITS)) * 0.5 - 0.25
    gap = tl.minimum(tl.maximum(tl.floor(empty), 0.0), 40.0)
    return tl.where((under_bits >= TINY_BITS) & (_octaves(hi_bits, over_bits) < 40.0), gap, 0.0)


@triton.jit
def _octaves(a_bits, b_bits):
    """log2(a / b)."""
    a_octave, a_log = log2(a_bits)
    b_octave, b_log = log2(b_bits)
    return (a_octave - b_octave).to(tl.float32) + (a_log - b_log)
