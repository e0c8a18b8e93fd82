"""What every cast kernel does in registers: magnitudes, scales, codes, and where codes lie.

* A magnitude is handled as the bits of its absolute value. As integers they are ordered as the numbers are, with inf
  and then NaN on top, so maxima need no special case, let NaN through, and an atomic one is exact in any order.
* A quotient is rounded as IEEE says, because the reference's is. The instructions that `div_rn` expands to, about
  twenty with their test and branch for extreme numbers, would make casts bound by arithmetic instead of memory. So
  extremes are taken out first, with a product by a power of two, and what is left is Markstein's division: the inverse
  of the scale, correctly rounded, once for all that share it; then for each element a product and two corrections by
  the remainder, each with one rounding. Quotients by powers of two stop after the first product.
* Rounding to FP8 is one instruction a pair of elements, PTX's `cvt.rn.satfinite`: to nearest even, saturating, NaN
  stays NaN. Triton's interpreter has no such thing: its own cast is off by up to a factor of two and loses NaN. There
  the value is saturated and put on the grid first, after which any cast is exact.
* Codes for a sum over rows are stored transposed: what a GEMM sums over lies contiguously. The turn happens in shared
  memory, one byte an element, so that loads and both stores are full lines.

Offsets are computed in 64 bits throughout.
"""

import triton
import triton.language as tl

SMALLEST_SCALE = tl.constexpr(2.0**-126)
SMALLEST_SCALE_BITS = tl.constexpr(1 << 23)
INFINITY_BITS = tl.constexpr(0x7F800000)
INVERSE_OF_1_75 = tl.constexpr(9586981 * 2.0**-24)  # rounded to fp32
FAR = tl.constexpr(2.0**18)  # so far beyond both formats that its quotient by less than two saturates as well
# Read when this module is loaded, as Triton itself reads it where a kernel is decorated.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fp32(x):
    """Bf16, fp16 or fp32 `x` in fp32."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # which widens subnormal numbers wrongly
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def magnitude(x):
    """The bits of |x| in fp32, as int32."""
    return fp32(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(magnitude, FP8: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`numerics.quantize.scale_of` of an amax given by its bits; some non-finite number where that is not finite."""
    # The largest values are 448 = 1.75 * 2^8 and 57344 = 1.75 * 2^15.
    EXPONENT: tl.constexpr = 8 if tl.float8e4nv == FP8 else 15
    if POWER_OF_TWO:
        # Adding all below 1.75's significand carries into the exponent beyond it: the next power of two, undivided.
        bits = ((magnitude + 0x1FFFFF) & INFINITY_BITS) - (EXPONENT << 23)
        bits = tl.where(bits < SMALLEST_SCALE_BITS, SMALLEST_SCALE_BITS, bits)
        scale = tl.where(magnitude < INFINITY_BITS, bits, magnitude).to(tl.float32, bitcast=True)
    else:
        significand, power = _split(magnitude)
        ones = tl.full(magnitude.shape, 1.0, tl.float32)
        scale = _divide(significand, ones * 1.75, ones * INVERSE_OF_1_75)
        scale = scale * power * 2.0**-EXPONENT
        scale = tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)
        scale = tl.where(magnitude < INFINITY_BITS, scale, magnitude.to(tl.float32, bitcast=True))
    return tl.where(magnitude == 0, 1.0, scale)


@triton.jit
def encode(x, scale, FP8: tl.constexpr, POWER_OF_TWO: tl.constexpr, REMEMBERED: tl.constexpr):
    """The codes of fp32 `x`, for decode scales that broadcast against it; of no meaning where a scale is not finite.

    POWER_OF_TWO promises that the scales are powers of two; REMEMBERED says that they may be too small for `x`.
    """
    bits = scale.to(tl.int32, bitcast=True)
    significand, _ = _split(bits)
    # x / scale = (x / power) / significand
    scaled = x * (0x7F000000 - (bits & INFINITY_BITS)).to(tl.float32, bitcast=True)
    if not POWER_OF_TWO:
        if REMEMBERED:
            scaled = tl.where(scaled > FAR, FAR, tl.where(scaled < -FAR, -FAR, scaled))  # NaN stays
        scaled = _divide(scaled, significand, tl.math.div_rn(tl.full(significand.shape, 1.0, tl.float32), significand))
    return to_fp8(scaled, FP8)


@triton.jit
def to_fp8(x, FP8: tl.constexpr):
    """The codes nearest to fp32 `x`, ties to even; saturating, but NaN stays NaN."""
    if INTERPRETED:
        codes = _on_grid(x, FP8).to(FP8).to(tl.uint8, bitcast=True)
        return tl.where(x != x, 0x7F, codes).to(tl.uint8).to(FP8, bitcast=True)
    return x.to(FP8)


@triton.jit
def _split(bits):
    """A positive normal number, given by its bits, as a significand in [1, 2) and a power of two."""
    significand = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return significand, (bits & INFINITY_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _divide(x, y, inverse):
    """The quotient x / y, rounded as IEEE says.

    x is finite, 1 <= y < 2, and the inverse that of y, rounded. Below |x| = 2^-100 the result is good to a few parts
    in 2^24 only: it is then far below what FP8 can hold.
    """
    quotient = x * inverse
    quotient = multiply_add(multiply_add(-quotient, y, x), inverse, quotient)
    quotient = multiply_add(multiply_add(-quotient, y, x), inverse, quotient)
    return with_sign_of(quotient, x)  # a zero has lost it


@triton.jit
def with_sign_of(y, x):
    """The size of fp32 `y` with the sign of fp32 `x`."""
    bits = (y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & (-0x7FFFFFFF - 1))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def multiply_add(a, b, c):
    """A * b + c, rounded once."""
    if INTERPRETED:  # whose own rounds twice; in fp64 the product is exact
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _on_grid(x, FP8: tl.constexpr):
    """The value of FP8 nearest to fp32 `x`, saturating: what `cvt.rn.satfinite` makes of it, still in fp32."""
    LARGEST: tl.constexpr = 448.0 if tl.float8e4nv == FP8 else 57344.0
    SMALLEST_NORMAL: tl.constexpr = 2.0**-6 if tl.float8e4nv == FP8 else 2.0**-14
    MANTISSA: tl.constexpr = 3 if tl.float8e4nv == FP8 else 2
    x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    # A number so large that its last bit is the last bit of the grid here: adding it rounds, to nearest even.
    bits = x.to(tl.int32, bitcast=True)
    binade = (bits & INFINITY_BITS).to(tl.float32, bitcast=True)
    binade = tl.where(binade < SMALLEST_NORMAL, SMALLEST_NORMAL, binade)
    shifter = binade * (1.5 * 2.0 ** (23 - MANTISSA))
    return with_sign_of((x + shifter) - shifter, x)


@triton.jit
def tile_origin(K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row and column of this program's tile, int64; tiles follow one another along a matrix's rows."""
    across = tl.cdiv(K, COLUMNS)
    tile = tl.program_id(0)
    return (tile // across).to(tl.int64) * ROWS, (tile % across).to(tl.int64) * COLUMNS


@triton.jit
def load_tile(x_ptr, m, k, M, K):
    """x[m, k], zeros outside of the matrix [M, K]."""
    inside = (m[:, None] < M) & (k[None, :] < K)
    return tl.load(x_ptr + (m[:, None] * K + k[None, :]), mask=inside, other=0.0)


@triton.jit
def store_rows(codes, rows_ptr, m, k, M, K):
    """Stores codes of x[m, k] into [M, K]."""
    tl.store(rows_ptr + (m[:, None] * K + k[None, :]), codes, mask=(m[:, None] < M) & (k[None, :] < K))


@triton.jit
def store_columns(codes, columns_ptr, m, k, M, K):
    """Stores codes of x[m, k], transposed, into [K, M]."""
    tl.store(columns_ptr + (k[:, None] * M + m[None, :]), tl.trans(codes), mask=(k[:, None] < K) & (m[None, :] < M))
