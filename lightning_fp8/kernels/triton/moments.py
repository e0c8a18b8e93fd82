"""`numerics/moments.py` in Triton: both moments of a tile of blocks, [blocks, elements], from codes and back.

What belongs to a block is a vector [blocks]; each of the threads that share a block computes it for itself. Additions,
multiplications, quotients and roots are rounded one by one, so codes are those of the reference, bit for bit; the
exponent 0.4 of m is looked up in the reference's own table.

The quotients and roots are IEEE's (`div_rn`, `sqrt_rn`): four of a parameter, each one special-function instruction and
a Newton step. They leave half of what a GPU has of these idle (see `adamw.py`).
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.elementary import as_float, as_int, exp2, log2
from lightning_fp8.kernels.triton.encode import to_fp8

TINY = tl.constexpr(2.0**-126)
TINY_BITS = tl.constexpr(1 << 23)
HUGE_BITS = tl.constexpr(254 << 23)
DENSITY_BITS = tl.constexpr(20)
DENSITY_BIAS = tl.constexpr((127 + 2) << 3)


@triton.jit
def decode(m_codes, m_scale, v_codes, hi, density, levels_ptr):
    """The moments (m, v), fp32."""
    first, period, step, octave, root_hi, _, _ = _lattice(hi, density)
    code = v_codes.to(tl.float32)
    root = _root(code, first, period, step, octave)
    unit = as_float(m_scale.to(tl.int32) << 23)
    m = tl.load(levels_ptr + m_codes.to(tl.int32)) * unit[:, None] * tl.minimum(root, root_hi[:, None])
    return m, tl.minimum(root * root, hi[:, None]) * tl.minimum(code, 1.0)


@triton.jit
def encode(m, v, uniform):
    """The codes of both moments, fp32, with v >= 0; `uniform` fp32 in [0, 1) rounds those of v.

    Returns:
        As in `FP8Moments`: m_codes, m_scale, v_codes, v_max, v_density.
    """
    bits = as_int(v)
    dead = bits < TINY_BITS
    hi_bits = tl.max(bits, axis=1)
    hi_bits = tl.where(hi_bits < TINY_BITS, 0, hi_bits)
    lo_bits = tl.min(tl.where(dead, HUGE_BITS, bits), axis=1)
    hi, positive = as_float(hi_bits), tl.maximum(hi_bits, TINY_BITS)
    density = _density(positive, lo_bits)
    first, period, step, octave, root_hi, k, base = _lattice(hi, density)
    stretch = tl.math.div_rn(tl.full(hi.shape, 1.0, tl.float32), _point(positive, k, base))
    slack = k * 2.0**-20 + 2.0**-16
    spread = 1.0 - 2.0 * slack
    exact = _point(bits, k[:, None], base[:, None])
    rounded = tl.floor(tl.maximum(exact, exact * stretch[:, None]) + (uniform * spread[:, None] + slack[:, None]))
    v_code = tl.where(dead, 0.0, tl.minimum(tl.maximum(rounded, -252.0), 1.0) + 253.0)

    root = tl.minimum(_root(v_code, first, period, step, octave), root_hi[:, None])
    ratio = tl.math.div_rn(tl.where(dead, 0.0, m), root)
    size = as_int(ratio) & 0x7FFFFFFF
    exponent = tl.minimum(tl.maximum((tl.max(size, axis=1) + 0x7FFFFF) >> 23, 1), 253)
    x = tl.minimum(as_float(size) * as_float((254 - exponent) << 23)[:, None], 1.0)
    spread_m = as_float(as_int(tl.sqrt_rn(x) * x * x * 448.0) | (as_int(ratio) & (-0x7FFFFFFF - 1)))
    m_codes = to_fp8(spread_m, tl.float8e4nv).to(tl.uint8, bitcast=True)
    return m_codes, exponent.to(tl.uint8), v_code.to(tl.uint8), hi, density.to(tl.uint8)


@triton.jit
def _lattice(hi, density):
    """What the lattice of a block needs; see `_lattice` and `_lattice_root` there."""
    positive = tl.maximum(hi, TINY)
    k = as_float((density.to(tl.int32) + DENSITY_BIAS) << DENSITY_BITS)
    exponent, log = log2(as_int(positive))
    length = k.to(tl.float64) * 2.0
    last = tl.floor((exponent.to(tl.float64) + log.to(tl.float64)) * k.to(tl.float64) - 2.0**-12)
    octave = tl.floor(last / length)
    first = (last - octave * length - 253.0).to(tl.float32)
    step = (1.0 / length).to(tl.float32)
    return first, length.to(tl.float32), step, octave.to(tl.float32), tl.sqrt_rn(positive), k, last.to(tl.float32)


@triton.jit
def _root(code, first, period, step, octave):
    """The root of the lattice point of `code`, fp32."""
    point = tl.maximum(code - 253.0, 0.0) + code + first[:, None]
    octaves = tl.floor((point + 0.5) * step[:, None])
    return exp2(octaves + octave[:, None], (point - octaves * period[:, None]) * step[:, None])


@triton.jit
def _point(bits, k, base):
    """K * log2(v) - base of v given by its bits."""
    exponent, log = log2(bits)
    return (exponent.to(tl.float32) * k - base) + log * k


@triton.jit
def _density(hi_bits, lo_bits):
    hi_octave, hi_log = log2(hi_bits)
    lo_octave, lo_log = log2(lo_bits)
    octaves = (hi_octave - lo_octave).to(tl.float32) + (hi_log - lo_log)
    octaves = tl.minimum(tl.maximum(octaves, 252.0 / 1024.0), 42.0)
    densest = tl.math.div_rn(tl.full(octaves.shape, 252.0, tl.float32), octaves)
    return (as_int(densest) >> DENSITY_BITS) - DENSITY_BIAS
