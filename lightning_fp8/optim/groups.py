"""Parameter groups: decay matrices, leave gains and biases alone; and the names of the parameters in a group.

The groups hold (name, parameter) pairs, so that the optimizer knows the names: `FP8AdamW` keys its random bits by them.
"""

from typing import Any

from torch import nn

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "module")  # of compile, activation checkpointing and DDP


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of `module`'s trainable parameters: of two and more dimensions, and the others.

    The first takes the optimizer's own weight decay, the second has none. A shared (tied) parameter appears once.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    vectors = [(name, p) for name, p in named if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def parameter_names(group: dict[str, Any], number: int) -> list[str]:
    """The names of the parameters of group `number`, without what torch's wrappers put into them.

    In a group without names they are the group's number and the position.
    """
    names = group.get("param_names")
    if not names:
        return [f"{number}.{i}" for i in range(len(group["params"]))]
    return [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
