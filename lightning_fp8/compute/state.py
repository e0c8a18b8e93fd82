"""Saving the scaling state of converted layers, beside the model's own state dict and never in it.

The state is a dict of plain tensors, strings and numbers, so `torch.load(weights_only=True)` reads it:

    {"version": 1, "layers": {layer name: {"recipe": {...}, "running", "history", "scale", "nonfinite"}}}

A layer of Transformer Engine's has its own tensors there instead: {"scale_fwd", "amax_history_fwd", "scale_bwd",
"amax_history_bwd"}. Its scales multiply before a cast, and the first row of a history is of the step that runs.

Only delayed scaling has state. Loading never fails for want of it: a layer without saved scales takes them from its
tensors at the first step, as a new one does, and the caller is told which layers these are. It does fail for damage: a
scale follows from its history, so one that does not was changed since it was saved, and would take its tensor to
zeros or to NaN for as long as the history is long.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.compute.recipe import ROLES, Recipe
from lightning_fp8.compute.scaling import DelayedScales, scales_of
from lightning_fp8.compute.transformer_engine.layers import ConvertedLinear

_VERSION = 1
# What torch's and Lightning's wrappers put into names: a state must fit whatever wraps the model later.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_forward_module", "_original_module", "module")


def fp8_state_dict(module: nn.Module) -> dict[str, Any]:
    """The scaling state of the converted layers of `module`; empty where they have none (current scaling).

    Save it beside the model: `fabric.save(path, {"model": model, "fp8": fp8_state_dict(model)})`.
    """
    layers = {name: saved for name, layer in _delayed_layers(module) if (saved := _saved(layer))}
    return {"version": _VERSION, "layers": layers} if layers else {}


def load_fp8_state_dict(module: nn.Module, state: dict[str, Any]) -> str:
    """Gives the converted layers of `module` the scaling state that `fp8_state_dict` returned.

    Returns:
        Which layers could not take it over and why, in one line; empty if all could.

    Raises:
        ValueError: The state is of a later version than this library knows, or damaged.
    """
    if state.get("version", _VERSION) > _VERSION:
        raise ValueError(
            f"The FP8 scaling state is of version {state['version']}, and this lightning-fp8 knows {_VERSION}:"
            " upgrade lightning-fp8, or leave the state out to calibrate anew."
        )
    layers, saved = _delayed_layers(module), state.get("layers", {})
    anew: dict[str, str] = {}
    for name, layer in layers:
        if name not in saved:
            anew[name] = "the checkpoint has no scales of them"
        elif different := _differences(saved[name]["recipe"], _recipe(layer)):
            anew[name] = f"the recipe's {', '.join(different)} changed"
        elif ("scale" in saved[name]) is isinstance(layer, ConvertedLinear):
            anew[name] = "the checkpoint's scales are of another backend"
        else:
            if not isinstance(layer, ConvertedLinear):
                _check(name, saved[name], layer.fp8_recipe)
            _load(layer, saved[name])
    if not anew:
        return ""
    names = ", ".join(list(anew)[:3]) + (", …" if len(anew) > 3 else "")
    reasons = " and ".join(dict.fromkeys(anew.values()))
    return f"{len(anew)} of {len(layers)} FP8 layers ({names}) calibrate their scales anew: {reasons}."


def _delayed_layers(module: nn.Module) -> list[tuple[str, FP8Linear | ConvertedLinear]]:
    return [
        (".".join(part for part in name.split(".") if part not in _WRAPPERS), layer)
        for name, layer in module.named_modules()
        if isinstance(layer, FP8Linear | ConvertedLinear) and _recipe(layer).scaling == "delayed"
    ]


def _recipe(layer: FP8Linear | ConvertedLinear) -> Recipe:
    return layer.fp8_recipe if isinstance(layer, FP8Linear) else layer.te_recipe


def _saved(layer: FP8Linear | ConvertedLinear) -> dict[str, Any]:
    """The layer's state, copied; empty if it has none yet."""
    tensors: Mapping[str, Tensor] = {}
    if isinstance(layer, ConvertedLinear):
        tensors = layer.scaling_tensors() or layer.te_loaded or {}
    elif layer.fp8_scales is not None:
        scales = layer.fp8_scales
        tensors = {
            "running": torch.stack(scales.running),
            "history": scales.history,
            "scale": scales.scale,
            "nonfinite": scales.nonfinite,
        }
    if not tensors:
        return {}
    return {"recipe": _plain(_recipe(layer)), **{name: tensor.clone() for name, tensor in tensors.items()}}


def _check(name: str, saved: dict[str, Any], recipe: Recipe) -> None:
    """Refuses magnitudes that none can be, and scales that are not theirs."""
    history, scale = saved["history"], saved["scale"]
    expected = scales_of(history.unsqueeze(0), recipe)[0]
    for i, role in enumerate(ROLES):
        possible = bool((history[i].isfinite() & (history[i] >= 0)).all())
        if not possible or not torch.isclose(scale[i], expected[i], rtol=1e-3, atol=0.0):
            raise ValueError(
                f"The checkpoint's FP8 scale of the {role} of {name!r} is {scale[i].item():.4g}, and its history of"
                f" magnitudes, up to {history[i].max().item():.4g}, makes it {expected[i].item():.4g}: it is damaged."
                " Resume from another checkpoint, or leave the FP8 state out to calibrate anew."
            )


def _load(layer: FP8Linear | ConvertedLinear, saved: dict[str, Any]) -> None:
    if isinstance(layer, ConvertedLinear):
        layer.load_scaling_tensors({name: value for name, value in saved.items() if name != "recipe"})
        return
    running, history, scale, nonfinite = (
        saved[name].to(layer.weight.device, copy=True) for name in ("running", "history", "scale", "nonfinite")
    )
    x, weight, dy = (cell.clone() for cell in running.unbind())
    layer.fp8_scales = DelayedScales((x, weight, dy), history, scale, nonfinite)


def _differences(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """The fields on which scales depend and in which the recipe is another."""
    own = _plain(recipe)
    independent = ("high_precision", "fast_accumulation", "sync_amax")
    return [name for name, value in own.items() if name not in independent and saved.get(name) != value]


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts, strings, numbers and lists."""
    fields = dataclasses.asdict(recipe).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
