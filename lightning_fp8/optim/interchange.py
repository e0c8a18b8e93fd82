"""From the state of `torch.optim.AdamW` to FP8 moments, and back to fp32.

A run that began with fp32 moments goes on with `import_adamw_state`; one that is to be continued elsewhere leaves with
`export_fp32_state`, which `torch.optim.AdamW` loads. Both go through the codecs a bounded chunk of rows at a time.
Exporting is exact: the fp32 values are those that the codes stand for. Importing rounds once, to nearest.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_fp8.optim import blocks, shards
from lightning_fp8.optim.adamw import FP8AdamW
from lightning_fp8.optim.fresh import moments_of, new_state

_CHUNK_ELEMENTS = 1 << 20
_NAMES = {"exp_avg": "m", "exp_avg_sq": "v"}


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
            if p in optimizer.state:
                state[number] = _decoded(p, group, optimizer.state[p])
    return {"state": state, "param_groups": groups}


def _encoded(p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Tensor]:
    for name in _NAMES:
        if saved[name].shape != p.shape:
            raise ValueError(
                f"The AdamW state has {name} of shape {tuple(saved[name].shape)} for a parameter of shape"
                f" {tuple(p.shape)}; the groups must hold the same parameters in the same order."
            )
    state = new_state(p, group)
    state["step"].copy_(torch.as_tensor(saved["step"]))
    place, size = shards.place_of(p), group["block_size"]
    if not all(place.shape):
        return state
    moments = [shards.local_part(shards.cut_alike(saved[name], p)).float().view(place.shape) for name in _NAMES]
    kind = moments_of(p, group["moments"])
    stored = _matrices(kind._fields, state, place)
    for rows in blocks.chunks((place.shape,), _CHUNK_ELEMENTS):
        m, v = (blocks.gather([t], rows, size) for t in moments)
        # Half a code up and down: to nearest, because nothing repeats this rounding.
        for target, value in zip(stored, kind.encode(m, v, torch.full_like(m, 0.5)), strict=True):
            blocks.scatter(value, [target], rows)
    return state


def _decoded(p: Tensor, group: dict[str, Any], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name: shards.new_elements(p, torch.float32) for name in _NAMES}
    place, size = shards.place_of(p), group["block_size"]
    if not all(place.shape):
        return {"step": saved["step"].float(), **state}
    targets = [shards.local_part(value).view(place.shape) for value in state.values()]
    kind = moments_of(p, group["moments"])
    stored = _matrices(kind._fields, saved, place)
    for rows in blocks.chunks((place.shape,), _CHUNK_ELEMENTS):
        moments = kind(*(blocks.gather([t], rows, size if t.shape == place.shape else 1) for t in stored)).decode()
        for target, value in zip(targets, moments, strict=True):
            blocks.scatter(value, [target], rows)
    return {"step": saved["step"].float(), **state}


def _matrices(names: Iterable[str], state: dict[str, Tensor], place: shards.Place) -> list[Tensor]:
    """The local parts of what a codec stores, as matrices, in its order."""
    return [shards.local_part(state[name]).view(place.shape[0], -1) for name in names]
