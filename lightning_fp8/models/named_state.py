"""Optimizer states that any strategy can read."""

from typing import Any


def by_name(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer under the names of its parameters, where its groups know them.

    Numbers mean one order to torch, that of the groups, and another to ModelParallelStrategy, that of the module: read
    by the other, moments would go to the wrong parameters. Both take names as they are.
    """
    groups = optimizer_state.get("param_groups", [])
    names = {
        p: name for group in groups for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    if not names or names.keys() != {p for group in groups for p in group["params"]}:
        return optimizer_state
    return {
        **optimizer_state,
        "state": {names[p]: values for p, values in optimizer_state["state"].items()},
        "param_groups": [{**group, "params": [names[p] for p in group["params"]]} for group in groups],
    }
