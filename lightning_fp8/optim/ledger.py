"""Bytes a parameter, measured on the storages that exist, on any device: on the meta device it is an estimate.

What a rank holds of a model that is sharded N ways follows from the same tensors: FSDP2 cuts each, state included,
along its first dimension, and the first rank has the largest part.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.optim.shards import local_part


@dataclass(frozen=True)
class Ledger:
    """Bytes a parameter.

    Attributes:
        weights: Of the parameters themselves.
        grads: Of their gradients, as they exist now.
        moments: Of the optimizers' state with one number an element: moments, momenta, corrections of weights.
        scales: Of the rest of it: scales of blocks, and step counts.
        parameters: How many there are.
    """

    weights: float
    grads: float
    moments: float
    scales: float
    parameters: int

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.grads + self.moments + self.scales

    @property
    def total_bytes(self) -> float:
        """Of all parameters."""
        return self.total * self.parameters


def measure_ledger(parameters: Iterable[Tensor], optimizers: Iterable[Optimizer], *, ways: int = 1) -> Ledger:
    """Sums the storages that exist now in this process for `parameters`; shared storages count once.

    Args:
        parameters: Of which the ledger is asked, all of a model or some.
        optimizers: Whose state is looked up.
        ways: Count what the first of so many ranks would hold if the tensors were sharded by FSDP2.
    """
    params = list(dict.fromkeys(parameters))
    grads = [p.grad for p in params if p.grad is not None]
    moments: list[Tensor] = []
    scales: list[Tensor] = []
    for optimizer in optimizers:
        for p in params:
            state: dict[str, Any] = optimizer.state.get(p, {})
            for value in (v for v in state.values() if isinstance(v, Tensor)):
                (moments if value.shape == p.shape and value.dim() else scales).append(value)
    count = sum(_part(p, ways) for p in map(local_part, params))
    sizes = [_storage_bytes(map(local_part, tensors), ways) for tensors in (params, grads, moments, scales)]
    per_param = [size / max(1, count) for size in sizes]
    return Ledger(per_param[0], per_param[1], per_param[2], per_param[3], count)


def _storage_bytes(tensors: Iterable[Tensor], ways: int) -> int:
    storages = {t.untyped_storage()._cdata: t for t in tensors}
    return sum(t.untyped_storage().nbytes() * _part(t, ways) // max(1, t.numel()) for t in storages.values())


def _part(t: Tensor, ways: int) -> int:
    """How many elements the first of `ways` ranks has of `t`; scalars are not cut."""
    return -(-t.shape[0] // ways) * (t.numel() // max(1, t.shape[0])) if t.dim() else t.numel()
