"""Which layers run in FP8, and why the others do not.

Conversion swaps the class of each chosen `nn.Linear` in place (see `linear.py`), so it can run before or after an
optimizer is built or a checkpoint is loaded, and twice. Every `nn.Linear` of the model appears in the report, either
as converted or with the reason why it was kept; so does what torch's own attention modules multiply behind the backs
of their linear layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_fp8.compute.gemm import select_backend
from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.compute.recipe import Recipe, resolve_recipe
from lightning_fp8.compute.scaling import DelayedScales
from lightning_fp8.compute.sizes import impossible, slower

KEEP_HIGH_PRECISION = ("*lm_head*",)


@dataclass
class ConversionReport:
    """What `convert_linears` did.

    Attributes:
        converted: Fully qualified names of the layers that run in FP8.
        kept: Name -> reason, for every other `nn.Linear` and for what bypasses them.
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
    keep_slow: bool = False,
    cache_weights: bool = False,
    backend: str = "auto",
) -> ConversionReport:
    """Converts the linear layers of `module` to FP8, in place; idempotent.

    Args:
        module: Any model. The root itself is converted too if it is an `nn.Linear`.
        recipe: A preset's name, a mapping as in YAML, or a `Recipe`.
        keep_high_precision: Shell patterns of layer names to leave as they are. The blocks of a `ModuleList` or
            `Sequential` count from its end too: "*blocks.-1.*" is the last one.
        keep_slow: Also keep layers of sizes for which FP8 is known to be slower than bf16 on FP8 hardware (the table
            is in `compute/sizes.py`). Off by default, so that a model computes the same everywhere, and because FP8
            saves memory at any size.
        cache_weights: Keep the FP8 copies of the weights until the optimizer steps, a byte a parameter (two where
            scales are finer than a tensor): faster under gradient accumulation. Call `end_step` after each step. Not
            of weights that FSDP2 shards.
        backend: "auto", or the name of a GEMM backend.

    Returns:
        Every linear layer, converted or kept with the reason.

    Raises:
        ValueError: Unknown recipe or backend, or a backend that cannot run here.
    """
    resolved = resolve_recipe(recipe)
    chosen = select_backend(backend, resolved)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matched = matches(module, keep_high_precision)
    report = ConversionReport()
    for name, layer in module.named_modules():
        report.kept.update(bypassed(name, layer))
        if not isinstance(layer, nn.Linear):
            continue
        reason = foreign(layer) or reason_to_keep(layer, matched.get(name), embeddings)
        if keep_slow and not reason:
            reason = slower(layer.in_features, layer.out_features, resolved)
        if reason:
            report.kept[name] = reason
            _restore(layer)
            continue
        _swap(layer, resolved, chosen, cache_weights)
        report.converted.append(name)
    return report


def _swap(layer: nn.Linear, recipe: Recipe, backend: str, cache_weights: bool) -> None:
    swapped: Any = layer
    if not isinstance(layer, FP8Linear) or swapped.fp8_recipe != recipe:
        delayed = recipe.scaling == "delayed"
        swapped.fp8_scales = DelayedScales.unknown(recipe.history, layer.weight.device) if delayed else None
    swapped.__class__ = _as_sharded(type(layer), FP8Linear)
    swapped.fp8_weight_amax = None
    swapped.fp8_recipe, swapped.fp8_backend, swapped.fp8_cache_weights = recipe, backend, cache_weights
    swapped.fp8_active, swapped.fp8_fallback = True, False


def restore_linears(module: nn.Module) -> list[str]:
    """Turns every `FP8Linear` of `module` back into the `nn.Linear` it was; returns their names."""
    return [name for name, layer in module.named_modules() if _restore(layer)]


def _restore(layer: nn.Module) -> bool:
    if not isinstance(layer, FP8Linear):
        return False
    swapped: Any = layer
    for attribute in FP8Linear.__annotations__:
        delattr(swapped, attribute)
    swapped.__class__ = _as_sharded(type(layer), nn.Linear)
    return True


def _unsharded(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer as it was before `fully_shard` was called with the layer itself."""
    return cls.__mro__[2] if cls.__mro__[1].__name__ == "FSDPModule" else cls


_sharded_classes: dict[tuple[Any, Any], Any] = {}


def _as_sharded(cls: Any, new: Any) -> Any:
    """`new`, made what `fully_shard` made of `cls`: a class whose parent FSDPModule comes before the layer's own."""
    if _unsharded(cls) is cls:
        return new
    if (cls, new) not in _sharded_classes:
        attributes = {"__deepcopy__": cls.__dict__["__deepcopy__"]}
        _sharded_classes[cls, new] = type(f"FSDP{new.__name__}", (cls.__mro__[1], new), attributes)
    return _sharded_classes[cls, new]


def foreign(layer: nn.Linear) -> str | None:
    """Why a layer of this class cannot be converted; None if it can."""
    if _unsharded(type(layer)) not in (nn.Linear, FP8Linear):
        return f"is a {type(layer).__name__}, whose own computation would be lost"
    return None


def matches(module: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """The first of the shell `patterns` that each module's name matches: name -> pattern, for those that match one.

    A module in a `ModuleList` or `Sequential` has two names, "blocks.2.mlp" and, if there are three, "blocks.-1.mlp".
    """
    found: dict[str, str] = {}
    aliases: dict[str, set[str]] = {"": {""}}
    for name, _ in module.named_modules(remove_duplicate=False):
        if name:
            parent_name, _, own = name.rpartition(".")
            parent = module.get_submodule(parent_name)
            owns = {own}
            if isinstance(parent, nn.ModuleList | nn.Sequential) and own.isdecimal():
                owns.add(str(int(own) - len(parent)))
            aliases[name] = {f"{prefix}.{o}".lstrip(".") for prefix in aliases[parent_name] for o in owns}
        for pattern in patterns:
            if any(fnmatchcase(alias, pattern) for alias in aliases[name]):
                found.setdefault(name, pattern)
    return found


def reason_to_keep(layer: nn.Linear, pattern: str | None, embeddings: set[int]) -> str | None:
    """Why a `pattern` that its name matches, its weight (one of `embeddings`, by `id`) or size keep a layer out of FP8.

    None if nothing does.
    """
    if pattern is not None:
        return f"name matches {pattern!r}"
    if id(layer.weight) in embeddings:
        return "weight is tied to an embedding"
    return impossible(layer.in_features, layer.out_features)


def bypassed(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """What `module` multiplies without calling a linear layer: name -> reason."""
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.MultiheadAttention):
        weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        yield from (
            (prefix + weight, "MultiheadAttention multiplies by it itself")
            for weight in weights
            if getattr(module, weight) is not None
        )
    if isinstance(module, nn.TransformerEncoderLayer):
        yield (
            f"{prefix}forward (evaluation)",
            "torch's fused path runs the whole layer in its own dtype; torch.backends.mha.set_fastpath_enabled(False)"
            " turns it off",
        )
