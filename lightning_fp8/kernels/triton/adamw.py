"""The step of `FP8AdamW` in Triton: a parameter group in one launch, or one parameter.

Decode, update, round and encode happen in registers: a program holds TILE elements, whole blocks of one parameter, and
of each element 10.2 bytes are read or written (weight 2 + 2, gradient 2, codes of m and v 1 + 1 each, scales).

A table says where the parameters lie, one row each, as `launch_adamw.py` makes it.

A step that is not to be taken (`finite` is false) ends before it reads anything else; the host need not know.

Launched with `enable_fp_fusion=False`; see `elementary.py`. Offsets are 64 bits wide.
"""

import triton
import triton.language as tl

from lightning_fp8.kernels.triton import moments, special
from lightning_fp8.kernels.triton.elementary import as_float, as_int
from lightning_fp8.kernels.triton.random import drawn, stochastic_bf16, widened
from lightning_fp8.kernels.triton.table import owner_of, pointer

TILE = 2048  # elements a program: 16 a thread, so that each loads and stores 16 bytes of codes
NUMBERS = tl.constexpr(5)  # of a parameter: rate, decay, corrections of both moments, factor of the gradient
COUNTS = tl.constexpr(6)  # of a parameter: the fields of `optim.health.Counts`
# Columns of the table, int64: nine addresses and six numbers, in the order of `one_kernel`'s arguments, and the place
# among the steps and numbers.
COLUMNS = tl.constexpr(16)


@triton.jit(do_not_specialize=["PARAMETERS"])
def many_kernel(
    table_ptr,
    first_ptr,
    steps_ptr,
    numbers_ptr,
    levels_ptr,
    finite_ptr,
    counts_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    max_update,
    PARAMETERS,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Steps parameters as their table says; WEIGHT and GRAD are int16 for bf16, or fp32."""
    if finite_ptr is not None:  # noqa: SIM102  one is known on compiling
        if tl.load(finite_ptr) == 0:
            return
    program = tl.program_id(0)
    owner = owner_of(first_ptr, program, PARAMETERS, PADDED)
    at = table_ptr + owner * COLUMNS
    place = tl.load(at + 15)
    _step(
        pointer(at, WEIGHT, ALIGNMENT),
        pointer(at + 1, GRAD, ALIGNMENT),
        pointer(at + 2, tl.uint8, ALIGNMENT),
        pointer(at + 3, tl.uint8, 1),
        pointer(at + 4, tl.uint8, ALIGNMENT),
        pointer(at + 5, tl.float32, 1),
        pointer(at + 6, tl.uint8, 1),
        pointer(at + 7, tl.uint8, 1),
        pointer(at + 8, tl.uint8, 1),
        program - tl.load(first_ptr + owner),
        tl.load(at + 9),
        tl.multiple_of(tl.load(at + 10), ALIGNMENT),
        tl.load(at + 11),
        tl.load(at + 12),
        tl.load(at + 13),
        tl.load(at + 14),
        tl.load(steps_ptr + place),
        numbers_ptr + place * NUMBERS,
        levels_ptr,
        None if counts_ptr is None else counts_ptr + place * COUNTS,
        beta1,
        rest1,
        beta2,
        rest2,
        eps,
        max_update,
        BLOCK,
        TILE,
    )


@triton.jit(do_not_specialize=["rows", "first_row", "first_column", "key0", "key1"])
def one_kernel(
    weight_ptr,
    grad_ptr,
    m_codes_ptr,
    m_scale_ptr,
    v_codes_ptr,
    v_max_ptr,
    v_density_ptr,
    v_split_ptr,
    v_gap_ptr,
    rows,
    columns,
    first_row,
    first_column,
    key0,
    key1,
    steps_ptr,
    numbers_ptr,
    levels_ptr,
    finite_ptr,
    counts_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    max_update,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Steps one parameter, for gradient release: there is no table to be made and copied."""
    if finite_ptr is not None:  # noqa: SIM102  one is known on compiling
        if tl.load(finite_ptr) == 0:
            return
    _step(
        weight_ptr,
        grad_ptr,
        m_codes_ptr,
        m_scale_ptr,
        v_codes_ptr,
        v_max_ptr,
        v_density_ptr,
        v_split_ptr,
        v_gap_ptr,
        tl.program_id(0),
        rows,
        columns,
        first_row,
        first_column,
        key0,
        key1,
        tl.load(steps_ptr),
        numbers_ptr,
        levels_ptr,
        counts_ptr,
        beta1,
        rest1,
        beta2,
        rest2,
        eps,
        max_update,
        BLOCK,
        TILE,
    )


@triton.jit
def _step(
    weight_ptr,
    grad_ptr,
    m_codes_ptr,
    m_scale_ptr,
    v_codes_ptr,
    v_max_ptr,
    v_density_ptr,
    v_split_ptr,
    v_gap_ptr,
    tile,
    rows,
    columns,
    first_row,
    first_column,
    key0,
    key1,
    step,
    numbers_ptr,
    levels_ptr,
    counts_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    max_update,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Steps tile number `tile` of a parameter: whole blocks, the last of a row ragged."""
    across = tl.cdiv(columns, BLOCK).to(tl.int32)
    block = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    row, left = block // across, block % across * BLOCK
    lane = tl.arange(0, BLOCK)
    exists = row < rows
    inside = exists[:, None] & (left[:, None] + lane[None, :] < columns)
    offsets = (row.to(tl.int64) * columns + left)[:, None] + lane[None, :]

    w = widened(tl.load(weight_ptr + offsets, mask=inside, other=0))
    g = widened(tl.load(grad_ptr + offsets, mask=inside, other=0)) * tl.load(numbers_ptr + 4)
    m, v = moments.decode(
        tl.load(m_codes_ptr + offsets, mask=inside, other=0),
        tl.load(m_scale_ptr + block, mask=exists, other=0),
        tl.load(v_codes_ptr + offsets, mask=inside, other=0),
        tl.load(v_max_ptr + block, mask=exists, other=0.0),
        tl.load(v_density_ptr + block, mask=exists, other=0),
        tl.load(v_split_ptr + block, mask=exists, other=0),
        tl.load(v_gap_ptr + block, mask=exists, other=0),
        levels_ptr,
    )
    m = tl.fma(g, rest1, m * beta1)
    v = tl.fma(g * rest2, g, v * beta2)
    hi = tl.max(v, axis=1)

    lr, shrink = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    m_correction, v_correction = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    update = _update(m, v, hi, special.inverse(m_correction), special.root(v_correction), eps)
    if max_update is not None:
        update = tl.minimum(tl.maximum(update, -max_update), max_update)
    exact = tl.fma(update, -lr, w * shrink)
    random, uniform = drawn(
        key0.to(tl.uint32),
        key1.to(tl.uint32),
        step.to(tl.uint32),
        (row + first_row).to(tl.uint32),
        (left[:, None] + lane[None, :] + first_column).to(tl.uint32),
    )
    if weight_ptr.dtype.element_ty == tl.int16:  # noqa: SIM108  known on compiling; the two have different types
        stored = stochastic_bf16(exact, random)
    else:
        stored = exact
    tl.store(weight_ptr + offsets, stored, mask=inside)
    if counts_ptr is not None:
        _count_updates(counts_ptr, tl.where(inside, update, 0.0), inside & (exact != w), widened(stored) == w)

    m_codes, m_scale, v_codes, v_max, v_density, v_split, v_gap, inverse, octave = moments.encode(m, v, hi, uniform)
    if counts_ptr is not None:
        unit = as_float((127 - octave) << 23)[:, None]
        _count_floor(counts_ptr, inside & (v >= moments.TINY), (v * unit * inverse) * (inverse * unit))
    tl.store(m_codes_ptr + offsets, m_codes, mask=inside)
    tl.store(v_codes_ptr + offsets, v_codes, mask=inside)
    tl.store(m_scale_ptr + block, m_scale, mask=exists)
    tl.store(v_max_ptr + block, v_max, mask=exists)
    tl.store(v_density_ptr + block, v_density, mask=exists)
    tl.store(v_split_ptr + block, v_split, mask=exists)
    tl.store(v_gap_ptr + block, v_gap, mask=exists)


@triton.jit
def _count_updates(counts_ptr, update, to_move, stayed):
    """Adds what `optim.health.Counts` has of updates and weights."""
    tl.atomic_max(counts_ptr + 2, tl.max(tl.max(tl.abs(update), axis=1), axis=0))
    tl.atomic_add(counts_ptr + 3, tl.sum(tl.sum(update * update, axis=1), axis=0))
    tl.atomic_add(counts_ptr + 4, _number_of(to_move))
    tl.atomic_add(counts_ptr + 5, _number_of(to_move & stayed))


@triton.jit
def _count_floor(counts_ptr, positive, share):
    """Likewise of second moments; `share` is v over the stored one."""
    tl.atomic_add(counts_ptr, _number_of(positive))
    tl.atomic_add(counts_ptr + 1, _number_of(positive & (share < 0.5)))


@triton.jit
def _number_of(mask):
    return tl.sum(tl.sum(mask.to(tl.int32), axis=1), axis=0).to(tl.float32)


@triton.jit
def _update(m, v, hi, m_divisor, v_root, eps):
    """The moments' quotient, corrected: m / (m_divisor * (sqrt(v) * v_root + eps)).

    Below 2^-126 the special functions know no number, so the root is of v in units of an even power of two near hi.
    """
    exponent = tl.minimum(as_int(tl.maximum(hi, moments.TINY)) >> 23, 252) & ~1
    root = special.root(v * as_float((253 - exponent) << 23)[:, None])
    unit = as_float((64 + (exponent >> 1)) << 23) * (v_root * m_divisor)
    return m * special.inverse(tl.fma(root, unit[:, None], eps * m_divisor))
