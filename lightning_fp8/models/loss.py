"""The cross-entropy of the next token, without the fp32 logits of a whole batch.

With 128k tokens in the vocabulary the logits of 16k positions take 8 GB in fp32, and their gradient as much, more than
all else that a step keeps. So they are made, used and dropped a chunk of positions at a time: through the head's own
forward (its hooks, FP8 or sharding stay in force), which is computed again in backward. A plain fp32 head is left to
torch's `linear_cross_entropy`, where there is one: it computes gradients in forward, three products instead of four. A
bf16 head is not, because that returns the loss in bf16 too: 6.44 for 6.40. What fits into one chunk takes neither way:
the plain one costs least.

The z-loss keeps logits from drifting, to which a softmax is blind (PaLM, 5; Wortsman et al., 2309.14322). It adds
gradients and no value, so that the loss is the cross-entropy whatever its weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 26  # of one chunk: 256 MB in fp32, and 512 positions of a vocabulary of 128k

_fused: Callable[..., Tensor] | None = getattr(F, "linear_cross_entropy", None)
_FusedOptions: Callable[..., Any] | None = getattr(nn, "LinearCrossEntropyOptions", None)


def next_token_loss(
    x_btd: Tensor,
    head: nn.Module,
    targets_bt: Tensor,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    z_loss: float = 0.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """The mean cross-entropy in nats, fp32, of `targets_bt` under softmax(transform(head(x))).

    Args:
        x_btd: What the head reads.
        head: The last layer, [.., D] -> logits [.., V]; it knows V as `out_features`.
        targets_bt: int64; those of -100 do not count.
        transform: Of the logits, such as a soft-cap.
        z_loss: Weight of mean(logsumexp(transform(head(x)))^2), whose gradient is added.
        chunk_logits: Most logits to have in memory at once.
    """
    x_nd, targets_n = x_btd.flatten(0, 1), targets_bt.flatten()
    rows = max(1, chunk_logits // int(getattr(head, "out_features", 1)))
    count = (targets_n != -100).sum()
    if len(x_nd) <= rows:
        logits_nv = _logits(x_nd, head, transform).float()
        loss = F.cross_entropy(logits_nv, targets_n)
        return loss + gradient_only(z_loss * _drift(logits_nv, targets_n) / count) if z_loss else loss
    if (
        transform is None
        and not z_loss
        and isinstance(head, nn.Linear)
        and _is_plain(head)
        and _fused
        and _FusedOptions
    ):
        options = _FusedOptions(batch_chunk_size=rows, chunking_method=None)
        return _fused(x_nd.float(), head.weight, targets_n, linear_bias=head.bias, options=options)
    total = x_nd.new_zeros((), dtype=torch.float32)
    for x, targets in zip(x_nd.split(rows), targets_n.split(rows), strict=True):
        chunk = x, targets, head, transform, z_loss
        total = total + checkpoint(_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total / count


def gradient_only(penalty: Tensor) -> Tensor:
    """A zero whose gradient is that of `penalty`."""
    return penalty - penalty.detach()


def _chunk(
    x_nd: Tensor, targets_n: Tensor, head: nn.Module, transform: Callable[[Tensor], Tensor] | None, z_loss: float
) -> Tensor:
    """The sum over a chunk's targets, with the gradient of their z-loss."""
    logits_nv = _logits(x_nd, head, transform).float()
    total = F.cross_entropy(logits_nv, targets_n, reduction="sum")
    return total + gradient_only(z_loss * _drift(logits_nv, targets_n)) if z_loss else total


def _drift(logits_nv: Tensor, targets_n: Tensor) -> Tensor:
    """The sum of squared log-partition functions over positions that have a target."""
    return (logits_nv.logsumexp(-1).square() * (targets_n != -100)).sum()


def _logits(x_nd: Tensor, head: nn.Module, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    logits_nv: Tensor = head(x_nd)
    return logits_nv if transform is None else transform(logits_nv)


def _is_plain(head: nn.Linear) -> bool:
    """Whether all that its forward does is to multiply in fp32."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    weight = head.weight
    in_fp32 = weight.dtype == torch.float32 and not torch.is_autocast_enabled(weight.device.type)
    return type(head) is nn.Linear and type(weight) is nn.Parameter and in_fp32 and not any(hooks)
