"""Which operand of which GEMM is cast how: the recipe.

A linear layer y = x w^T has three GEMMs, each a product of two of three operands:

    forward      y  = x  w^T          input, weight
    input_grad   dx = dy w            grad_output, weight
    weight_grad  dw = dy^T x          grad_output, input

A recipe names a format for each operand and the GEMMs that stay in high precision. It is frozen and made of strings,
booleans and tuples alone, so that it can be written in YAML, compared, hashed and stored in a checkpoint.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_fp8.numerics.formats import FORMATS, Format
from lightning_fp8.numerics.quantize import Tile

Gemm = Literal["forward", "input_grad", "weight_grad"]
Role = Literal["input", "weight", "grad_output"]
GEMMS: tuple[Gemm, ...] = get_args(Gemm)
ROLES: tuple[Role, ...] = get_args(Role)
_TILES: dict[str, Tile | None] = {
    "tensor": None,
    "row": (1, None),
    "block_1x128": (1, 128),
    "block_128x128": (128, 128),
    "mx_1x32": (1, 32),
}
# Granularities of two operands that hardware multiplies (torch's scaled_mm, cuBLASLt).
_PAIRS = {(name, name) for name in ("tensor", "row", "block_1x128", "mx_1x32")} | {("block_1x128", "block_128x128")}
_OPERANDS: dict[Gemm, tuple[Role, Role]] = {
    "forward": ("input", "weight"),
    "input_grad": ("grad_output", "weight"),
    "weight_grad": ("grad_output", "input"),
}


def _check_choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"FP8 recipe: {what} {value!r} is not one of {', '.join(allowed)}.{hint}")


@dataclass(frozen=True)
class Operand:
    """How one operand is cast.

    Attributes:
        format: "e4m3" (precision) or "e5m2" (range).
        granularity: What shares a scale: the whole operand ("tensor"); along the dimension that the GEMM sums over,
            each line ("row"), each 128 or 32 elements of a line ("block_1x128", "mx_1x32"); or each square tile
            ("block_128x128"). "mx_1x32" is the OCP's microscaling format: its scales are powers of two.
        power_of_two: Round scales up to powers of two.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    granularity: Literal["tensor", "row", "block_1x128", "block_128x128", "mx_1x32"] = "tensor"
    power_of_two: bool = False

    def __post_init__(self) -> None:
        _check_choice("format", self.format, tuple(FORMATS))
        _check_choice("granularity", self.granularity, tuple(_TILES))
        if self.granularity == "mx_1x32" and not self.power_of_two:
            raise ValueError(
                "FP8 recipe: granularity 'mx_1x32' has power-of-two scales by definition; set power_of_two."
            )

    @property
    def number_format(self) -> Format:
        """The format as numbers."""
        return FORMATS[self.format]

    def tile(self, along: int) -> Tile | None:
        """What shares a scale in a matrix whose dimension `along` is summed over; see `numerics.quantize`."""
        tile = _TILES[self.granularity]
        return tile if tile is None or along == 1 else (tile[1], tile[0])


@dataclass(frozen=True)
class Recipe:
    """How a linear layer computes in FP8.

    Attributes:
        input: The cast of the layer's input.
        weight: The cast of its weight.
        grad_output: The cast of the gradient that arrives at its output.
        scaling: "current" takes each scale from the tensor that is being cast; "delayed" from the largest magnitudes
            of the steps before (`scaling.py`).
        history: Delayed scaling only: how many steps are remembered.
        amax: Delayed scaling only: whether the "max" of the history or its "most_recent" entry sets the scale.
        margin: Delayed scaling only: headroom, in powers of two, for what grows from one step to the next.
        sync_amax: Current scaling only: one scale for all processes' inputs, and one for their gradients, so that what
            is computed does not depend on how a batch is spread over them. It costs an all-reduce a cast, and is for
            comparisons; delayed scaling always shares.
        high_precision: GEMMs that stay in the layer's own dtype: any of "forward", "input_grad", "weight_grad".
        fast_accumulation: GEMMs that native FP8 hardware may sum with fewer bits than fp32 (on Hopper 14 or so),
            which is faster; no other backend does.
    """

    input: Operand = field(default_factory=Operand)
    weight: Operand = field(default_factory=Operand)
    grad_output: Operand = field(default_factory=lambda: Operand("e5m2"))
    scaling: Literal["current", "delayed"] = "current"
    history: int = 16
    amax: Literal["max", "most_recent"] = "max"
    margin: int = 0
    sync_amax: bool = False
    high_precision: tuple[Gemm, ...] = ()
    fast_accumulation: tuple[Gemm, ...] = ("forward",)

    def __post_init__(self) -> None:
        for name in ("high_precision", "fast_accumulation"):
            for gemm in getattr(self, name):
                _check_choice(name, gemm, GEMMS)
        if set(self.high_precision) == set(GEMMS):
            raise ValueError(
                "Recipe.high_precision names all three GEMMs, so nothing would run in FP8. "
                "Leave one out, or keep the layer out of FP8 with keep_high_precision."
            )
        self._check_scaling()
        for gemm, (a, b) in _OPERANDS.items():
            if self.uses_fp8(gemm):
                self._check_product(gemm, a, b)

    def _check_scaling(self) -> None:
        _check_choice("scaling", self.scaling, ("current", "delayed"))
        _check_choice("amax", self.amax, ("max", "most_recent"))
        whole = isinstance(self.history, int) and isinstance(self.margin, int)
        if not whole or self.history < 1 or self.margin < 0:
            raise ValueError(
                f"Recipe: history is {self.history!r} and margin {self.margin!r}; they must be whole numbers of at"
                " least 1 and 0."
            )
        changed = [field.name for field in _DELAYED_FIELDS if getattr(self, field.name) != field.default]
        if self.scaling == "current" and changed:
            raise ValueError(
                f"Recipe: {', '.join(changed)} would have no effect, because current scaling remembers nothing."
                " Set scaling to 'delayed', or leave it out."
            )
        finer = [f"{role} by {self.operand(role).granularity}" for role in ROLES if self.operand(role).tile(1)]
        if self.sync_amax and (self.scaling == "delayed" or finer):
            reason = "delayed scaling always does so" if self.scaling == "delayed" else f"here it is {', '.join(finer)}"
            raise ValueError(
                f"Recipe: sync_amax shares one magnitude a tensor over all processes, and {reason}. Leave it out."
            )
        if self.scaling == "delayed" and finer:
            raise ValueError(
                f"Recipe: delayed scaling remembers one magnitude a tensor, and here it is {', '.join(finer)}."
                " Set granularity to 'tensor', or scaling to 'current'."
            )

    def _check_product(self, gemm: Gemm, a: Role, b: Role) -> None:
        pair = self.operand(a).granularity, self.operand(b).granularity
        if pair not in _PAIRS:
            raise ValueError(
                f"Recipe: the {gemm} GEMM multiplies {a}, scaled by {pair[0]}, and {b}, scaled by {pair[1]}, which"
                " no FP8 hardware does. Give both the same granularity (a weight by block_128x128 goes with"
                f" block_1x128), or name {gemm} in high_precision."
            )
        if self.operand(a).format == self.operand(b).format == "e5m2":
            raise ValueError(
                f"Recipe: the {gemm} GEMM multiplies {a} and {b}, both e5m2, which no FP8 hardware does."
                f" Make one of them e4m3, or name {gemm} in high_precision."
            )

    def operand(self, role: Role) -> Operand:
        """How the operand of this role is cast."""
        operand: Operand = getattr(self, role)
        return operand

    def uses_fp8(self, gemm: Gemm) -> bool:
        """Whether `gemm` runs in FP8."""
        return gemm not in self.high_precision


_DELAYED_FIELDS = tuple(field for field in dataclasses.fields(Recipe) if field.name in ("history", "amax", "margin"))
_ROW = Operand(granularity="row", power_of_two=True)
_ROWWISE = Recipe(input=_ROW, weight=_ROW, grad_output=_ROW)
_BLOCK = Operand(granularity="block_1x128")
_MX = Operand(granularity="mx_1x32", power_of_two=True)
PRESETS = {
    "tensorwise": Recipe(),  # the least work
    "delayed": Recipe(scaling="delayed"),  # the same, with scales known beforehand: one pass over memory a cast
    "rowwise": _ROWWISE,  # an outlier blurs its own row only
    "rowwise_gw_hp": dataclasses.replace(_ROWWISE, high_precision=("weight_grad",)),  # the gradient that trains in bf16
    "blockwise": Recipe(input=_BLOCK, weight=Operand(granularity="block_128x128"), grad_output=_BLOCK),  # DeepSeek-V3's
    "mxfp8": Recipe(input=_MX, weight=_MX, grad_output=_MX),  # Blackwell's
}


def resolve_recipe(recipe: str | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a preset's name, from a mapping (YAML) with an optional "preset" key, or as it is.

    Raises:
        ValueError: Unknown preset or field, with the nearest valid name; or a value of another type.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        _check_choice("preset", recipe, tuple(PRESETS))
        return PRESETS[recipe]
    if not isinstance(recipe, Mapping):
        raise ValueError(f"FP8 recipe: {recipe!r} is neither a mapping nor one of {', '.join(PRESETS)}.")
    try:
        return _changed(dict(recipe))
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"FP8 recipe: {dict(recipe)} has a value of another type ({error}); correct it.") from error


def _changed(changes: dict[str, Any]) -> Recipe:
    base = resolve_recipe(changes.pop("preset", "tensorwise"))
    for name, value in changes.items():
        _check_choice("field", name, _names(Recipe))
        if isinstance(value, Mapping):
            for key in value:
                _check_choice(f"field of {name}", key, _names(Operand))
            changes[name] = dataclasses.replace(getattr(base, name), **value)
        elif isinstance(value, list):
            changes[name] = tuple(value)
    return dataclasses.replace(base, **changes)


def _names(cls: type[Operand] | type[Recipe]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))
