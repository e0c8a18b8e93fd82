"""FLOPs of the products that really ran."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


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
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
