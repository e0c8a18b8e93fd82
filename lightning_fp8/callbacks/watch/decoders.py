"""What is measured of our own decoder besides its linear layers: attention, the output's softmax, SwiGLU.

    attention   max logit and entropy, of up to 64 queries at even distances in the first 4 rows of a batch: a fused
                kernel holds no logits, so these are computed anew
    output      log Z of up to 256 tokens at even distances: the loss never holds all logits in memory
    weight      of an MLP, how far gate and up are aligned; taken when a reading is due, from the weights alone

Any `Attention`, `Decoder` or `SwiGLU` within a model is found by its class, and nothing else is asked of the model.
Attention is measured again where activation checkpointing runs it again, since what a selective checkpoint stored must
be asked for in the same order; means and maxima stay what they are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle

from lightning_fp8.callbacks.watch.tally import Gauge, Place, Tally
from lightning_fp8.metrics.attention import AttentionEntropy, AttentionLogitMax, attention_scores
from lightning_fp8.metrics.log_z import OutputLogZ
from lightning_fp8.metrics.swiglu import SwiGLUAlignment
from lightning_fp8.models.attention import Attention, Mask, Sight
from lightning_fp8.models.decoder import Decoder, SwiGLU
from lightning_fp8.models.rope import rotate
from lightning_fp8.models.scores import soft_cap

QUERIES, ROWS, TOKENS = 64, 4, 256


def decoder_places(name: str, module: nn.Module) -> Iterator[tuple[Place, dict[str, Gauge]]]:
    """What is measured of `module`, if it is a part of our decoder."""
    if isinstance(module, Attention):
        yield (
            Place(name, "attention"),
            {"logit_max": Gauge.of(AttentionLogitMax), "entropy": Gauge.of(AttentionEntropy)},
        )
    if isinstance(module, Decoder):
        yield _head(name), {"log_z": Gauge.of(OutputLogZ)}
    if isinstance(module, SwiGLU):
        yield Place(name, "weight"), {"swiglu_alignment": Gauge.of(SwiGLUAlignment)}


def watch_decoder(name: str, module: nn.Module, tally: Tally) -> list[RemovableHandle]:
    """Measures `module` during one batch; the hooks to remove after it."""
    if isinstance(module, Attention):
        return _watch_attention(name, module, tally)
    if isinstance(module, Decoder):
        return [module.norm.register_forward_hook(_output_hook(name, module, tally))]
    return []


@torch.no_grad()
def measure_alignment(name: str, module: nn.Module, tally: Tally) -> None:
    """Measures the weights of `module`, if it is a SwiGLU with the shapes of one."""
    if isinstance(module, SwiGLU):
        gate, up = (_local(projection.weight) for projection in (module.gate_proj, module.up_proj))
        tally.add(Place(name, "weight"), {"swiglu_alignment": SwiGLUAlignment.measure(gate, up)})


def _local(weight: Tensor) -> Tensor:
    """A shard of rows, of sharded weights: the largest cosine of all rows is the largest of the shards'."""
    local: Any = getattr(weight, "to_local", None)
    return local() if local is not None else weight


def _head(name: str) -> Place:
    return Place(f"{name}.lm_head" if name else "lm_head", "output")


def _watch_attention(name: str, module: Attention, tally: Tally) -> list[RemovableHandle]:
    sights: list[Sight] = []
    queries: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        sights[:], queries[:] = [args[1]], []

    def at_queries(_: nn.Module, args: tuple[Any, ...], q_bhts: Tensor) -> None:
        queries[:] = [q_bhts.detach()]

    @torch.no_grad()
    def at_keys(_: nn.Module, args: tuple[Any, ...], k_bkus: Tensor) -> None:
        tally.add(Place(name, "attention"), _attention(module, sights[0], queries.pop(), k_bkus.detach()))

    return [
        module.register_forward_pre_hook(before),
        module.q_norm.register_forward_hook(at_queries),
        module.k_norm.register_forward_hook(at_keys),
    ]


def _attention(module: Attention, sight: Sight, q_bhts: Tensor, k_bkus: Tensor) -> dict[str, Tensor]:
    rows, length = slice(ROWS), q_bhts.shape[2]
    picked = torch.arange(0, length, -(-length // QUERIES), device=q_bhts.device)
    mask = _seen(sight.masks[module.window], q_bhts[rows].shape[0], picked, length)
    with torch.autocast(q_bhts.device.type, enabled=False):
        q = rotate(q_bhts[rows], *(_of(rows, table) for table in sight.queries))[:, :, picked]
        k = rotate(k_bkus[rows], *(_of(rows, table) for table in sight.keys))
        scores = soft_cap(attention_scores(q, k), module.softcap)
    return {
        "logit_max": AttentionLogitMax.measure(scores, mask),
        "entropy": AttentionEntropy.measure(scores, mask),
    }


def _seen(mask: Mask, rows: int, picked: Tensor, length: int) -> Tensor:
    """Which positions the `picked` ones of the first `rows` rows see: booleans [P, T], or [R, 1, P, T] with documents.

    A `BlockMask` holds no booleans but the rule of which they are made: it is asked for these positions alone.
    """
    positions = torch.arange(length, device=picked.device)
    if mask is None:
        return picked[:, None] >= positions
    if isinstance(mask, BlockMask):
        row = torch.arange(rows, device=picked.device)[:, None, None, None]
        seen: Tensor = mask.mask_mod(row, torch.zeros_like(row), picked[:, None], positions)
        return seen
    return (mask[:rows] if mask.dim() > 2 else mask)[..., picked, :]


def _of(rows: slice, table: Tensor) -> Tensor:
    """The rotations of some rows, where rows have their own."""
    return table[rows] if table.dim() > 2 else table


def _output_hook(name: str, decoder: Decoder, tally: Tally) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    @torch.no_grad()
    def hook(_: nn.Module, args: tuple[Any, ...], x_btd: Tensor) -> None:
        x_nd = x_btd.detach().flatten(0, 1)
        x_nd = x_nd[:: -(-x_nd.shape[0] // TOKENS)]
        head: Any = decoder.lm_head
        if hasattr(head.weight, "to_local"):  # a shard of the vocabulary has no log Z
            return
        with torch.autocast(x_nd.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            logits = F.linear(x_nd.float(), head.weight.float(), bias)
        tally.add(_head(name), {"log_z": OutputLogZ.measure(soft_cap(logits, decoder.config.logit_softcap))})

    return hook
