"""Where a cast finds its matrix: it lies in memory, or is made there from what a norm or an activation was given.

    other_ptr  rstd_ptr   the matrix [M, K]
    None       None       x
    matrix     None       silu(x) * other, SwiGLU's product
    gain [K]   fp32 [M]   x * rstd * gain, RMSNorm's result

Each is rounded where the plain operations round, so a cast sees the numbers that a module would have written: silu(x)
and the product to x's dtype, the norm's result once. What is not the reference's to the bit is silu in fp32, by the
approximations of exp2 and of a quotient, a few units of 2^-24 (the table is in `tests/kernels/interpreted_fused.py`).
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton.encode import INTERPRETED, fp32, load_tile


@triton.jit
def load_source(x_ptr, other_ptr, rstd_ptr, m, k, M, K):
    """The matrix at [m, k], zeros outside of [M, K], in x's dtype."""
    x = load_tile(x_ptr, m, k, M, K)
    if rstd_ptr is not None:
        rstd = tl.load(rstd_ptr + m, mask=m < M, other=0.0)
        x = normed(x, rstd[:, None], tl.load(other_ptr + k, mask=k < K, other=0.0)[None, :])
    elif other_ptr is not None:
        x = gated(x, load_tile(other_ptr, m, k, M, K))
    return x


@triton.jit
def normed(x, rstd, gain):
    """RMSNorm's result of x, in x's dtype: rstd is fp32, and all broadcast."""
    return rounded(fp32(gain) * (rstd * fp32(x)), x.dtype)


@triton.jit
def gated(gate, up):
    """SwiGLU's product of gate and up, in their dtype."""
    x = fp32(gate)
    silu = rounded(x / (1.0 + tl.exp(-x)), gate.dtype)
    return rounded(fp32(silu) * fp32(up), gate.dtype)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """Fp32 `x` in TYPE, to nearest even."""
    if INTERPRETED and tl.bfloat16 == TYPE:  # whose own cast does not round to nearest even
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)
