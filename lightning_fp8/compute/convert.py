"""Which layers run in FP8, and why the others do not.

Conversion swaps the class of each chosen `nn.Linear` in place (see `linear.py`), so it can run before or after an
optimizer is built or a checkpoint is loaded, and twice. Every `nn.Linear` of the model appears in the report, either
as converted or with the reason why it was kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_fp8.compute.gemm import select_backend
from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.compute.recipe import Recipe, resolve_recipe

KEEP_HIGH_PRECISION = ("*lm_head*",)
_MULTIPLE = 16  # hardware FP8 GEMMs want both inner sizes to be multiples of this


@dataclass
class ConversionReport:
    """What `convert_linears` did.

    Attributes:
        converted: Fully qualified names of the layers that run in FP8.
        kept: Name -> reason, for every other `nn.Linear`.
    """

    converted: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line a layer."""
        width = max((len(name) for name in [*self.converted, *self.kept]), default=0)
        lines = [f"{name:{width}}  FP8" for name in self.converted]
        return "\n".join(lines + [f"{name:{width}}  kept: {reason}" for name, reason in self.kept.items()])


def convert_linears(
    module: nn.Module,
    recipe: str | Mapping[str, Any] | Recipe = "tensorwise",
    *,
    keep_high_precision: Sequence[str] = KEEP_HIGH_PRECISION,
    backend: str = "auto",
) -> ConversionReport:
    """Converts the linear layers of `module` to FP8, in place; idempotent.

    Args:
        module: Any model. The root itself is converted too if it is an `nn.Linear`.
        recipe: A preset's name, a mapping as in YAML, or a `Recipe`.
        keep_high_precision: Shell patterns of layer names to leave as they are.
        backend: "auto", or the name of a GEMM backend.

    Returns:
        Every linear layer, converted or kept with the reason.

    Raises:
        ValueError: Unknown recipe or backend.
    """
    resolved, chosen = resolve_recipe(recipe), select_backend(backend)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    report = ConversionReport()
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        reason = _reason_to_keep(name, layer, keep_high_precision, embeddings)
        if reason:
            report.kept[name] = reason
            continue
        _swap(layer, resolved, chosen)
        report.converted.append(name)
    return report


def _swap(layer: nn.Linear, recipe: Recipe, backend: str) -> None:
    swapped: Any = layer
    swapped.__class__ = FP8Linear
    swapped.fp8_recipe, swapped.fp8_backend = recipe, backend


def restore_linears(module: nn.Module) -> list[str]:
    """Turns every `FP8Linear` of `module` back into the `nn.Linear` it was; returns their names."""
    restored = []
    for name, layer in module.named_modules():
        if type(layer) is FP8Linear:
            swapped: Any = layer
            del swapped.fp8_recipe, swapped.fp8_backend
            swapped.__class__ = nn.Linear
            restored.append(name)
    return restored


def _reason_to_keep(name: str, layer: nn.Linear, patterns: Sequence[str], embeddings: set[int]) -> str | None:
    if type(layer) not in (nn.Linear, FP8Linear):
        return f"is a {type(layer).__name__}, whose own computation would be lost"
    for pattern in patterns:
        if fnmatchcase(name, pattern):
            return f"name matches {pattern!r}"
    if id(layer.weight) in embeddings:
        return "weight is tied to an embedding"
    if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
        return f"sizes {layer.in_features} x {layer.out_features} are not multiples of {_MULTIPLE}"
    return None
