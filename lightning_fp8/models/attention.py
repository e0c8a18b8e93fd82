"""Causal grouped-query attention: rotary positions, sliding windows, documents, a key/value cache.

What the tokens of a call have in common, their rotations and what each of them sees, is worked out once for all layers:
the `Sight`.

Suffixes of tensor names:  b batch, t position, u position that is seen, d hidden, h query head, k key/value head,
s head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from lightning_fp8.models.cache import KVCache
from lightning_fp8.models.config import DecoderConfig
from lightning_fp8.models.flex import attend, block_mask
from lightning_fp8.models.masks import causal_mask
from lightning_fp8.models.norm import RMSNorm
from lightning_fp8.models.rope import rotary_tables, rotate
from lightning_fp8.models.scores import Attended, explicit_attention, with_sink

Tables = tuple[Tensor, Tensor]
Mask = Tensor | BlockMask | None


class Sight(NamedTuple):
    """Where the tokens of a call stand, and what each of them sees.

    Attributes:
        queries: Cosines and sines of the tokens' rotations.
        keys: Those of what they look at.
        masks: For each sliding window that occurs among the layers (None: no window), the mask; None is causal.
        cache: Holds what was read before.
    """

    queries: Tables
    keys: Tables
    masks: dict[int | None, Mask]
    cache: KVCache | None = None


def sight_of_text(length: int, config: DecoderConfig, documents_bt: Tensor | None, device: torch.device) -> Sight:
    """The sight of tokens [B, `length`] that begin a text; see `masks` for the documents [B, T]."""
    tables = rotary_tables(torch.arange(length, device=device), config)
    masks: dict[int | None, Mask] = {}
    for window in _windows(config):
        plain = documents_bt is None and (window is None or window >= length)
        make = block_mask if device.type == "cuda" and not plain and not _changes_scores(config) else causal_mask
        masks[window] = make(length, window, documents_bt, device)
    return Sight(tables, tables, masks)


def sight_of_cache(length: int, config: DecoderConfig, lengths_b: Tensor | None, cache: KVCache) -> Sight:
    """The sight of `length` new tokens a row, of which `lengths_b` [B] are no padding, after those in `cache`."""
    query_bt, key_bu, seen_btu = cache.place(length, lengths_b)
    distance_btu = query_bt[..., None] - key_bu[:, None]
    masks: dict[int | None, Mask] = {
        window: (seen_btu if window is None else seen_btu & (distance_btu < window))[:, None]
        for window in _windows(config)
    }
    queries, keys = (rotary_tables(positions[:, None], config) for positions in (query_bt, key_bu))
    return Sight(queries, keys, masks, cache)


def _changes_scores(config: DecoderConfig) -> bool:
    return config.attention_sink or config.attention_softcap is not None or config.clipped_softmax is not None


def _windows(config: DecoderConfig) -> set[int | None]:
    return {config.window_of(layer) for layer in range(config.num_layers)}


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and, by default, normalised queries and keys."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window_of(layer)
        self.head_size, self.softcap = config.head_size, config.attention_softcap
        self.grouped = config.num_kv_heads != config.num_heads
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.clip = config.clipped_softmax
        self.sink_logit = nn.Parameter(torch.zeros(config.num_heads)) if config.attention_sink else None

    def forward(self, x_btd: Tensor, sight: Sight) -> Tensor:
        """The attention's contribution to the residual stream."""
        q_bhts = self.q_norm(self._heads(self.q_proj(x_btd)))
        k_bkus = self.k_norm(self._heads(self.k_proj(x_btd)))
        v_bkus = self._heads(self.v_proj(x_btd))
        if sight.cache is not None:
            k_bkus, v_bkus = sight.cache.update(self.layer, k_bkus, v_bkus)
        q_bhts, k_bkus = rotate(q_bhts, *sight.queries), rotate(k_bkus, *sight.keys)
        if x_btd.is_cpu:
            # Torch's backward of bf16 attention takes five to seven times as long as that of fp32 on CPUs without
            # matrix units (measured at T = 128 and 256).
            q_bhts, k_bkus, v_bkus = q_bhts.float(), k_bkus.float(), v_bkus.float()
        mask = sight.masks[self.window]
        if isinstance(mask, BlockMask):
            y_bhts = attend(q_bhts, k_bkus, v_bkus, mask, self.head_size**-0.5)
        else:
            y_bhts = self._attend(Attended(q_bhts, k_bkus, v_bkus, mask))
        y_btd: Tensor = self.o_proj(y_bhts.transpose(1, 2).flatten(2).to(x_btd.dtype))
        return y_btd

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)

    def _attend(self, x: Attended) -> Tensor:
        scale = self.head_size**-0.5
        causal = x.mask is None
        if self.sink_logit is not None:
            x = with_sink(x, self.sink_logit, scale)
        if self.softcap is not None or self.clip is not None:
            y_bhts = explicit_attention(x, scale, softcap=self.softcap, clip=self.clip)
        else:
            y_bhts = F.scaled_dot_product_attention(
                *x[:3], attn_mask=x.mask, is_causal=causal, scale=scale, enable_gqa=self.grouped
            )
        if self.sink_logit is None:
            return y_bhts
        return y_bhts[:, :, causal:, : self.head_size]
