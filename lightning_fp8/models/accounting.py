"""What a model computes: FLOPs counted from its shapes, and from the products that really run."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lightning_fp8.models.config import DecoderConfig


def flops_per_token(config: DecoderConfig, length: int) -> int:
    """Model FLOPs of one token of a training step, a multiply-add as two; what MFU is defined by.

    A weight that is multiplied by takes 2 FLOPs forward and 4 backward. Attention takes, in each block, two products
    of T by its width forward and four backward: as usual (PaLM, appendix B) the whole square is counted, without the
    half that a causal kernel may leave out, and nothing that a kernel computes twice.

    Args:
        config: The decoder's shape.
        length: Tokens in a sequence, T.
    """
    d, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attention_width = heads * config.head_size
    projections = d * config.head_size * (2 * heads + 2 * kv_heads) + 3 * d * config.intermediate_size
    products = config.num_layers * (projections + 2 * length * attention_width) + d * config.vocab_size
    return 3 * 2 * products


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
