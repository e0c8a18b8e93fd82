"""From the state of `torch.optim.AdamW` to FP8 moments, and back to fp32.

A run that began with fp32 moments goes on with `import_adamw_state`; one that is to be continued elsewhere leaves with
`export_fp32_state`, which `torch.optim.AdamW` loads. Exporting is exact: the fp32 values are those that the codes stand
for. Importing rounds once, to nearest. `convert_state` does both, for a run that goes on with other `moments`.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_fp8.optim.adamw import FP8AdamW
from lightning_fp8.optim.codecs import Codec, Stored
from lightning_fp8.optim.fresh import moments_of, new_state
from lightning_fp8.optim.state import KEPT_AS
from lightning_fp8.optim.stored import expand, store
from lightning_fp8.optim.wrapper import FP8Optimizer

_NAMES = ("exp_avg", "exp_avg_sq")


def import_adamw_state(optimizer: FP8AdamW, state_dict: dict[str, Any]) -> None:
    """Takes over the moments, step counts and hyperparameters of `torch.optim.AdamW`, or of Adam.

    Args:
        optimizer: Over the same parameters, in the same groups and order. What it has and AdamW has not (moments,
            block size, rounding, seed) stays as it is.
        state_dict: From `state_dict()`, or with names as keys from torch.distributed.checkpoint. Moments may be of any
            floating-point dtype.

    Raises:
        ValueError: The groups differ in size, a moment has another shape than its parameter, or amsgrad was used.
    """
    groups = state_dict["param_groups"]
    sizes, own = ([len(g["params"]) for g in gs] for gs in (groups, optimizer.param_groups))
    if sizes != own:
        raise ValueError(f"The AdamW state has groups of {sizes} parameters and the optimizer has groups of {own}.")
    if any(group.get("amsgrad") for group in groups):
        raise ValueError("The AdamW state was made with amsgrad=True, whose third moment FP8AdamW does not have.")
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        shared = set(optimizer.defaults) | {"initial_lr"}
        group.update({name: value for name, value in saved.items() if name in shared})
        for p, key in zip(group["params"], saved["params"], strict=True):
            if key in state_dict["state"]:
                optimizer.state[p] = _encoded(p, group, state_dict["state"][key])


def export_fp32_state(optimizer: FP8AdamW) -> dict[str, Any]:
    """The optimizer's state as `torch.optim.AdamW` would have it, with fp32 moments; 8 bytes a parameter.

    Returns:
        A state dict with integer keys, sharded as the parameters are, for `torch.optim.AdamW.load_state_dict`.
    """
    adamw = torch.optim.AdamW([torch.zeros(1)]).defaults
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        first = sum(len(g["params"]) for g in groups)
        known = {name: value for name, value in group.items() if name in (*adamw, "initial_lr", "param_names")}
        groups.append({**adamw, **known, "params": list(range(first, first + len(group["params"])))})
        for number, p in enumerate(group["params"], start=first):
            if stored := optimizer.state.get(p):
                moments = expand(p, group["block_size"], [_codec(p, group, stored)], stored)
                state[number] = {"step": stored["step"].float(), **moments}
    return {"state": state, "param_groups": groups}


def convert_state(optimizer: FP8AdamW | FP8Optimizer, state_dict: dict[str, Any]) -> None:
    """Loads what an optimizer of the same class has saved with other `moments`, `block_size` or `rounding`.

    Moments pass through fp32, which takes 8 bytes a parameter for the time, and are rounded once, to nearest. What the
    weights' rounding kept (Kahan's compensation, the correction) is left behind: half a last bit of bf16 at most. Of
    the hyperparameters those that torch's optimizer has too become the saved ones.

    Args:
        optimizer: Over the same parameters, in the same groups and order.
        state_dict: As for its `load_state_dict`.

    Raises:
        ValueError: See `load_state_dict`.
    """
    groups = [
        {**own, **{name: saved[name] for name in KEPT_AS if name in saved}}
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    if isinstance(optimizer, FP8AdamW):
        source = FP8AdamW(groups)
        source.load_state_dict(state_dict)
        import_adamw_state(optimizer, export_fp32_state(source))
    else:
        kind: Any = type(optimizer.base)
        wrapped = FP8Optimizer(kind(groups))
        wrapped.load_state_dict(state_dict)
        optimizer.load_state_dict(wrapped.base_state_dict())


def _encoded(p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Tensor]:
    for name in _NAMES:
        if saved[name].shape != p.shape:
            raise ValueError(
                f"The AdamW state has {name} of shape {tuple(saved[name].shape)} for a parameter of shape"
                f" {tuple(p.shape)}; the groups must hold the same parameters in the same order."
            )
    state = new_state(p, group)
    state["step"].copy_(torch.as_tensor(saved["step"]))
    return state | store(p, group["block_size"], [_codec(p, group, state)], saved)


def _codec(p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> Codec:
    """How the moments in `state` are stored."""
    kind = moments_of(p, group["moments"])
    stored = tuple(Stored(name, state[name].dtype, per_block=state[name].shape != p.shape) for name in kind._fields)
    return Codec(
        _NAMES, stored, lambda values, random: kind.encode(values[0], values[1], random), lambda s: kind(*s).decode()
    )
