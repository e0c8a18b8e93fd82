"""Which layers become Transformer Engine's, and the context in which these run in FP8."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fp8.compute.autocast import scales_frozen
from lightning_fp8.compute.convert import (
    KEEP_HIGH_PRECISION,
    ConversionReport,
    bypassed,
    foreign,
    matches,
    reason_to_keep,
    restore_linears,
)
from lightning_fp8.compute.recipe import Recipe, resolve_recipe
from lightning_fp8.compute.sizes import slower
from lightning_fp8.compute.transformer_engine.layers import ConvertedLinear, abandon, adopt
from lightning_fp8.compute.transformer_engine.recipe import require_transformer_engine, transformer_engine_recipe

_MX_MULTIPLE = 32


def convert_to_transformer_engine(
    module: nn.Module,
    recipe: str | Mapping[str, Any] | Recipe = "tensorwise",
    *,
    keep_high_precision: Sequence[str] = KEEP_HIGH_PRECISION,
    keep_slow: bool = False,
    cache_weights: bool = False,
) -> ConversionReport:
    """Converts the linear layers and norms of `module` to Transformer Engine's, in place; idempotent.

    Norms are converted if they have all that Transformer Engine's have: a gain, for LayerNorm a bias, for RMSNorm an
    eps. They do not compute in FP8 and are no part of the report.

    Call it in `configure_model`, before `fully_shard`, to use `FP8Precision(backend="transformer_engine")` with
    `ModelParallelStrategy`: Transformer Engine prepares for FSDP2 what is sharded after it was made.

    Args:
        module: Any model; the root itself is converted too if it is an `nn.Linear`.
        recipe: A preset's name, a mapping as in YAML, or a `Recipe`.
        keep_high_precision: Shell patterns of names of layers, norms included, to leave as they are.
        keep_slow: As of `convert_linears`.
        cache_weights: Keep the FP8 copies of the weights while gradients accumulate.

    Returns:
        Every linear layer, converted or kept with the reason.

    Raises:
        ValueError: A recipe that is unknown or that Transformer Engine lacks; Transformer Engine cannot run here; the
            model is sharded already.
    """
    resolved = resolve_recipe(recipe)
    require_transformer_engine(resolved)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matched = matches(module, keep_high_precision)
    report = ConversionReport()
    for name, layer in module.named_modules():
        report.kept.update(bypassed(name, layer))
        if isinstance(layer, nn.RMSNorm | nn.LayerNorm):
            _convert_norm(name, layer, keep=name in matched)
        if not isinstance(layer, nn.Linear):
            continue
        reason = reason_to_keep(layer, matched.get(name), embeddings) or _too_ragged(layer, resolved)
        if keep_slow and not reason:
            reason = slower(layer.in_features, layer.out_features, resolved)
        was_converted = isinstance(layer, ConvertedLinear)
        stays = was_converted and layer.te_recipe == resolved and not reason
        if _is_sharded(layer.weight) and (was_converted if reason else not stays):
            raise ValueError(
                f"FP8 backend 'transformer_engine': {name} is sharded already. Under ModelParallelStrategy, call"
                " lightning_fp8.compute.convert_to_transformer_engine(self, recipe) in configure_model, before"
                " fully_shard, with what the plugin is given."
            )
        if not stays:
            abandon(layer)
            reason = reason or foreign(layer)
        if reason:
            report.kept[name] = reason
            continue
        _convert_linear(name, layer, resolved, cache_weights)
        report.converted.append(name)
    return report


def _convert_linear(name: str, layer: nn.Linear, recipe: Recipe, cache_weights: bool) -> None:
    converted: Any = layer
    if not isinstance(layer, ConvertedLinear):
        restore_linears(layer)
        adopt(layer, name)
        converted.te_recipe, converted.te_loaded = recipe, None
        converted.fp8_active, converted.fp8_fallback = True, False
    converted.te_cache_weights, converted.te_cast_version = cache_weights, None


def _convert_norm(name: str, norm: nn.RMSNorm | nn.LayerNorm, *, keep: bool) -> None:
    if _is_sharded(norm.weight):
        return
    whole = isinstance(norm.weight, nn.Parameter) and norm.eps is not None and getattr(norm, "bias", norm) is not None
    if keep:
        abandon(norm)
    elif type(norm) in (nn.RMSNorm, nn.LayerNorm) and whole:
        adopt(norm, name)


def _is_sharded(parameter: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _too_ragged(layer: nn.Linear, recipe: Recipe) -> str | None:
    """Why Transformer Engine cannot cast this weight, beyond what all backends cannot; None if it can."""
    ragged = layer.in_features % _MX_MULTIPLE or layer.out_features % _MX_MULTIPLE
    if recipe.weight.granularity == "mx_1x32" and ragged:
        return f"sizes {layer.in_features} x {layer.out_features} are not multiples of {_MX_MULTIPLE}"
    return None


def restore_from_transformer_engine(module: nn.Module) -> list[str]:
    """Turns every layer of `module` back into the torch layer it was; returns the names of the linear ones.

    Attributes set since the conversion go with it; parameters, hooks and the training mode stay.
    """
    restored = [(name, layer) for name, layer in module.named_modules() if abandon(layer)]
    return [name for name, layer in restored if isinstance(layer, nn.Linear)]


@contextmanager
def transformer_engine_autocast(
    recipe: str | Mapping[str, Any] | Recipe = "tensorwise", enabled: bool = True
) -> Iterator[None]:
    """The context in which converted layers compute in FP8; under delayed scaling, scales follow where it ends.

    The precision plugins enter it. In a plain loop, put it around the forward pass, with the recipe of the conversion.
    Activation checkpointing computes again outside of it: use `transformer_engine.pytorch.checkpoint`, which knows.

    Raises:
        ValueError: A recipe that is unknown or that Transformer Engine lacks.
    """
    theirs = transformer_engine_recipe(resolve_recipe(recipe))
    import transformer_engine.pytorch as te

    # Transformer Engine lets scales follow where its outermost context ends, if that one is enabled.
    outer = te.autocast(enabled=False, recipe=theirs) if scales_frozen() else nullcontext()
    with outer, te.autocast(enabled=enabled, recipe=theirs):
        yield
