"""Casts of a layer's operands, each made once.

A cast is kept for as long as the tensor that was cast lives, in a table of weak references: nothing holds the tensor
alive, no address that was used again can be taken for the tensor that lay there before, and, unlike an attribute, it
is no part of what copies and files hold. It counts while the tensor's version does, so whatever changes the tensor in
place makes it void; under delayed scaling it also ends with the step, when its scale does. Two things follow from it:

* Layers that receive the same tensor (q, k and v; gate and up) share one FP8 copy of it, also through views of its
  whole storage. Without that, autograd would keep one copy for each, 1.5 times what BF16 keeps for all.
* A weight's casts can be kept over the micro-batches of a step. This costs a byte a parameter and layout, so it is
  asked for (`convert_linears(cache_weights=True)`), and ends with the step as well: some optimizers and FSDP2 write
  weights without counting a version.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_fp8.compute.recipe import ROLES, Operand, Recipe, Role
from lightning_fp8.compute.scaling import DelayedScales, shared_scale
from lightning_fp8.kernels import Cast
from lightning_fp8.kernels import cast as cast_matrix


class _Key(NamedTuple):
    """What a cast depends on besides the values of the tensor; two contiguous views of it have the same elements."""

    columns: int
    offset: int
    layout: tuple[tuple[int, ...], tuple[int, ...]] | None
    operand: Operand
    remembering: Recipe | None


class _Casts(NamedTuple):
    """The casts of a tensor as it was at `version`, each with the version of the scale it used."""

    version: int
    made: dict[_Key, tuple[int, Cast]]


_known = WeakTensorKeyDictionary()  # Tensor -> _Casts


def cast(
    x: Tensor,
    role: Role,
    recipe: Recipe,
    scales: DelayedScales | None,
    shared: bool = False,
    *,
    rows: bool,
    columns: bool,
) -> Cast:
    """Casts `x`, seen as a matrix, for GEMMs that sum over its dimension 1 (`rows`), 0 (`columns`) or each of them.

    Args:
        x: [..., K] in bf16, fp16 or fp32.
        role: Which operand of the layer it is.
        recipe: How operands are cast.
        scales: The layer's state under delayed scaling.
        shared: Whether all processes make this cast now, and are to use one scale.
        rows: Whether `Cast.rows` is wanted.
        columns: Whether `Cast.columns` is wanted.
    """
    operand = recipe.operand(role)
    remembered = None if scales is None else scales.scale[ROLES.index(role)]
    if shared and (rows or columns):
        remembered = shared_scale(x, operand)
    return cast_matrix(
        x.reshape(-1, x.shape[-1]),
        operand.number_format,
        operand.tile(1),
        rows=rows,
        columns=columns,
        power_of_two=operand.power_of_two,
        remembered=remembered,
    )


def shared_cast(
    x: Tensor,
    role: Role,
    recipe: Recipe,
    scales: DelayedScales | None,
    shared: bool = False,
    *,
    rows: bool,
    columns: bool,
) -> Cast:
    """As `cast`, or the cast that was made of the very same, unchanged tensor before."""
    if torch.compiler.is_compiling() or x.is_inference() or torch.is_inference_mode_enabled():
        # Inference tensors count no versions, and as casts they could not be saved for the backward of a later pass; a
        # compiled graph shares equal casts by itself.
        return cast(x, role, recipe, scales, shared, rows=rows, columns=columns)
    casts, key, step = _place(x, role, recipe, scales, shared)
    made_at, made = casts.made.get(key, (step, Cast()))
    if made_at != step:
        made = Cast()
    lacking = {"rows": rows and made.rows is None, "columns": columns and made.columns is None}
    if any(lacking.values()):
        new = cast(x, role, recipe, scales, shared, **lacking)
        made = Cast(made.rows or new.rows, made.columns or new.columns, new.amax)
        casts.made[key] = step, made
    return made


def know_cast(x: Tensor, made: Cast, role: Role, recipe: Recipe, scales: DelayedScales | None) -> None:
    """Lets `shared_cast` find a cast of `x` that was made together with `x` itself."""
    casts, key, step = _place(x, role, recipe, scales, False)
    casts.made[key] = step, made


def _place(
    x: Tensor, role: Role, recipe: Recipe, scales: DelayedScales | None, shared: bool
) -> tuple[_Casts, _Key, int]:
    """Where a cast of `x` is kept: among which, under which key, and the version of the scale that it is for."""
    base = x._base
    whole = base if base is not None and base.numel() == x.numel() else x
    casts: _Casts | None = _known.get(whole)
    if casts is None or casts.version != x._version:
        casts = _known[whole] = _Casts(x._version, {})
    layout = None if x.is_contiguous() else (x.shape, x.stride())
    remembering = recipe if shared or scales is not None else None
    key = _Key(x.shape[-1], int(x.storage_offset()), layout, recipe.operand(role), remembering)
    return casts, key, -1 if scales is None else scales.scale._version


def forget_casts(x: Tensor) -> None:
    """Drops what `shared_cast` keeps of `x`."""
    _known.pop(x, None)
