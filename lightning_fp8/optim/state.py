"""Loading an optimizer's state with every bit as it was saved.

`torch.optim.Optimizer.load_state_dict` casts state to the parameter's dtype: codes (uint8) and scales (fp32) of a bf16
weight would become bf16. Here the state goes round that cast, between the user's hooks: hooks before loading see all
of it, and so do those after. The hooks of this file live as long as one call, because an optimizer that is copied or
unpickled has lost its hooks.

State dicts of either kind load: with integer keys (`state_dict()`) or with names (torch.distributed.checkpoint);
sharded as the parameters are, otherwise, or not at all.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.optim.shards import cut_alike


def load_exactly(optimizer: Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Loads `state_dict` through `load`, torch's own method, except for the state itself, which is copied.

    A hyperparameter that the saved groups lack keeps the optimizer's value.
    """
    saved: dict[str, Any] = {}

    def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved.update(state_dict)
        known = [{k: v for k, v in group.items() if k in optimizer.defaults} for group in optimizer.param_groups]
        groups = state_dict["param_groups"]
        if len(groups) == len(known):  # or torch's own error will say so
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
