"""What a model costs, measured: bytes in storages, FLOPs of the products that really ran."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Ledger:
    """Bytes a parameter.

    Attributes:
        weights: Of the parameters themselves.
        grads: Of their gradients, as they exist now.
        moments: Of everything the optimizers keep for them, scales included.
    """

    weights: float
    grads: float
    moments: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.grads + self.moments


def measure_ledger(parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> Ledger:
    """Sums the storages that exist now for `parameters`; shared storages count once.

    Args:
        parameters: Of which the ledger is asked, all of a model or some.
        optimizers: Whose state is looked up.
    """
    params = list(dict.fromkeys(parameters))
    count = sum(p.numel() for p in params)
    states: list[Any] = [optimizer.state[p] for optimizer in optimizers for p in params if p in optimizer.state]
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    sizes = (_storage_bytes(tensors) for tensors in (params, [p.grad for p in params if p.grad is not None], moments))
    return Ledger(*(size / max(1, count) for size in sizes))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products and attention that run inside it, a multiply-add as two.

    torch's FlopCounterMode also decomposes operators, which changes results by an ulp; a training step that is counted
    with it is not the step that it would have been. This one watches and changes nothing.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:  # named for each device and backend; the formula is the same
            shapes = [t.shape for t in args[:4] if isinstance(t, Tensor)]
            backward = "backward" in name  # of (dy, q, k, v), and not of (q, k, v)
            formula = sdpa_backward_flop_count if backward else sdpa_flop_count
            self.flops += formula(*shapes[: 4 if backward else 3])
        elif name == "_linear_cross_entropy_batch_chunked":  # of (x, weight, …, whether three gradients are wanted)
            wanted_dx, wanted_dw, _ = args[-3:]
            self.flops += 2 * args[0].shape[0] * args[1].numel() * (1 + wanted_dx + wanted_dw)
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
