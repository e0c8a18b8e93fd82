"""Fabric's checkpoints, with everything in them taken over.

`Fabric.load` fills what has a state of its own, such as the precision plugin, a loader or a schedule, from a checkpoint
file. Of a folder of parts (`ModelParallelStrategy`) Lightning 2.6 does not: the saved state takes the object's place in
the dictionary or, a loader's, is dropped, and the object stays as it was, without a word. So model and optimizers are
asked for by `Fabric.load`, and the rest, which it then returns as it was saved, is taken over here.
"""

from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.wrappers import _unwrap_objects
from torch import nn
from torch.optim import Optimizer


def load_fabric_state(fabric: Fabric, path: str | Path, state: dict[str, Any]) -> dict[str, Any]:
    """`fabric.load`, under any strategy; every process must call it.

    Args:
        fabric: Has set up what is in `state`.
        path: What `fabric.save` wrote.
        state: What was saved, by its names. Objects with a `load_state_dict` are filled, other values replaced.

    Returns:
        What else there is in the checkpoint.

    Raises:
        KeyError: The checkpoint lacks a name.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, nn.Module | Optimizer)}
    saved = fabric.load(path, tensors, weights_only=True)
    for name in state.keys() - tensors.keys():
        if name not in saved:
            raise KeyError(f"{path} has no {name}, only {', '.join(sorted(saved))}: leave {name} out of what to load.")
        own = _unwrap_objects(state[name])  # Fabric's loaders hide the state of those that they wrap
        if hasattr(own, "load_state_dict"):
            own.load_state_dict(saved.pop(name))
        else:
            state[name] = saved.pop(name)
    return saved
