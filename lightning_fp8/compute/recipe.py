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
GEMMS: tuple[Gemm, ...] = get_args(Gemm)
_TILES: dict[str, Tile | None] = {
    "tensor": None,
    "row": (1, None),
    "block_1x128": (1, 128),
    "block_128x128": (128, 128),
    "mx_1x32": (1, 32),
}
# Granularities of two operands that hardware multiplies (torch's scaled_mm, cuBLASLt).
_PAIRS = {(name, name) for name in ("tensor", "row", "block_1x128", "mx_1x32")} | {("block_1x128", "block_128x128")}
_OPERANDS: dict[Gemm, tuple[str, str]] = {
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
        scaling: "current" takes each scale from the tensor that is being cast.
        high_precision: GEMMs that stay in the layer's own dtype: any of "forward", "input_grad", "weight_grad".
    """

    input: Operand = field(default_factory=Operand)
    weight: Operand = field(default_factory=Operand)
    grad_output: Operand = field(default_factory=lambda: Operand("e5m2"))
    scaling: Literal["current"] = "current"
    high_precision: tuple[Gemm, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("scaling", self.scaling, ("current",))
        for gemm in self.high_precision:
            _check_choice("high_precision", gemm, GEMMS)
        if set(self.high_precision) == set(GEMMS):
            raise ValueError(
                "Recipe.high_precision names all three GEMMs, so nothing would run in FP8. "
                "Leave one out, or keep the layer out of FP8 with keep_high_precision."
            )

        for gemm, (a, b) in _OPERANDS.items():
            pair = getattr(self, a).granularity, getattr(self, b).granularity
            if self.uses_fp8(gemm) and pair not in _PAIRS:
                raise ValueError(
                    f"Recipe: the {gemm} GEMM multiplies {a}, scaled by {pair[0]}, and {b}, scaled by {pair[1]}, which"
                    " no FP8 hardware does. Give both the same granularity (a weight by block_128x128 goes with"
                    f" block_1x128), or name {gemm} in high_precision."
                )

    def uses_fp8(self, gemm: Gemm) -> bool:
        """Whether `gemm` runs in FP8."""
        return gemm not in self.high_precision


_ROW = Operand(granularity="row", power_of_two=True)
_ROWWISE = Recipe(input=_ROW, weight=_ROW, grad_output=_ROW)
_BLOCK = Operand(granularity="block_1x128")
_MX = Operand(granularity="mx_1x32", power_of_two=True)
PRESETS = {
    "tensorwise": Recipe(),  # the least work
    "rowwise": _ROWWISE,  # an outlier blurs its own row only
    "rowwise_gw_hp": dataclasses.replace(_ROWWISE, high_precision=("weight_grad",)),  # the gradient that trains in bf16
    "blockwise": Recipe(input=_BLOCK, weight=Operand(granularity="block_128x128"), grad_output=_BLOCK),  # DeepSeek-V3's
    "mxfp8": Recipe(input=_MX, weight=_MX, grad_output=_MX),  # Blackwell's
}


def resolve_recipe(recipe: str | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a preset's name, from a mapping (YAML) with an optional "preset" key, or as it is.

    Raises:
        ValueError: Unknown preset or field, with the nearest valid name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        _check_choice("preset", recipe, tuple(PRESETS))
        return PRESETS[recipe]
    changes = dict(recipe)
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
