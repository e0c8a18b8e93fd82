"""Loading an optimizer's state with every bit as it was saved.

`torch.optim.Optimizer.load_state_dict` casts state to the parameter's dtype: codes (uint8) and scales (fp32) of a bf16
weight would become bf16. Here the state goes round that cast, between the user's hooks: hooks before loading see all
of it, and so do those after. The hooks of this file live as long as one call, because an optimizer that is copied or
unpickled has lost its hooks.

State dicts of either kind load: with integer keys (`state_dict()`) or with names (torch.distributed.checkpoint);
sharded as the parameters are, otherwise, or not at all.

torch gives a loaded optimizer the hyperparameters that were saved. Those that say how numbers are kept are not among
them here: that a checkpoint undoes them unseen, or that codes are read as what they are not, is an error when loading
and not a surprise in the next step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.optim.groups import parameter_name
from lightning_fp8.optim.shards import cut_alike, local_part

KEPT_AS = ("moments", "block_size", "rounding")  # options of a group that say what its state means
_MAGNITUDES = ("_max", "_scale", "_sq")  # how names end of what is never below zero; `v` is not either
Missing = Callable[[Tensor, dict[str, Any], dict[str, Any]], set[str]]


def load_exactly(
    optimizer: Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None], missing: Missing
) -> None:
    """Loads `state_dict` through `load`, torch's own method, except for the state itself, which is copied.

    A hyperparameter that the saved groups lack keeps the optimizer's value.

    Args:
        optimizer: To load into.
        state_dict: Of the same class, or what the class takes for it.
        load: `torch.optim.Optimizer.load_state_dict` of the optimizer.
        missing: (parameter, its group, its saved state) -> the fields that a step would look for in vain.

    Raises:
        ValueError: Numbers were kept in another way than the optimizer keeps them, are not all there, or are none that
            a step makes.
    """
    saved: dict[str, Any] = {}

    def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved.update(state_dict)
        known = [{k: v for k, v in group.items() if k in optimizer.defaults} for group in optimizer.param_groups]
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] == [len(g["params"]) for g in optimizer.param_groups]:
            _check(optimizer, state_dict, missing)  # of other groups torch's own error will tell
            groups = [{**own, **group} for own, group in zip(known, groups, strict=True)]
        return {**state_dict, "state": {}, "param_groups": groups}

    def put(_: Optimizer) -> None:
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                optimizer.state[p][name] = cut_alike(value, p) if isinstance(value, Tensor) else value

    handles = (
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(put, prepend=True),
    )
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _check(optimizer: Optimizer, state_dict: dict[str, Any], missing: Missing) -> None:
    kind = type(optimizer).__name__
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
        differing = [name for name in KEPT_AS if name in saved and saved[name] != group[name]]
        if differing:
            there, here = (", ".join(f"{name}={g[name]!r}" for name in differing) for g in (saved, group))
            raise ValueError(
                f"{kind}: parameter group {number} was saved with {there}, and this optimizer has {here}. Build it"
                " with what was saved, or load with lightning_fp8.optim.convert_state(optimizer, state_dict)."
            )
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            state = state_dict["state"].get(key)
            lacking = missing(p, group, state) if state else set()
            if lacking:
                raise ValueError(
                    f"{kind}: the saved state of {parameter_name(group, number, index)!r} lacks"
                    f" {', '.join(sorted(lacking))}; it has {', '.join(state)}. It is of another optimizer or release:"
                    " load it there and bring its fp32 state (export_fp32_state, base_state_dict) here."
                )
            for name, value in (state or {}).items():
                if isinstance(value, Tensor) and not _possible(name, value):
                    raise ValueError(
                        f"{kind}: {name} in the saved state of {parameter_name(group, number, index)!r} has values that"
                        " are not finite, or below zero: it is damaged. Resume from another checkpoint."
                    )


@torch.no_grad()
def _possible(name: str, value: Tensor) -> bool:
    """Whether a step may have left this: steps whose gradients are not finite are skipped."""
    value = local_part(value)
    if not value.is_floating_point():
        return True
    least = 0.0 if name == "v" or name.endswith(_MAGNITUDES) else -torch.inf
    return bool((value.isfinite() & (value >= least)).all())
