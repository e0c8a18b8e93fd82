"""A Llama-family decoder in plain torch: nothing here knows of FP8 or of Lightning.

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention through scaled_dot_product_attention, SwiGLU.
q, k, v and gate, up are separate layers, under the names that published checkpoints use for them.

Suffixes of tensor names:  b batch, t position, d hidden, h query head, k key/value head, s head width, f MLP width,
v vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8.models.config import DecoderConfig


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; see `DecoderConfig`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights from torch's global generator.

        They are drawn in fp32 whatever the weights' dtype, so that runs that differ in precision alone start from the
        same point.
        """
        residual_std = self.config.init_std / (2 * self.config.num_layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.ones_(p)
                continue
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self.config.init_std
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, dtype=torch.float32, device=p.device) * std)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """Logits [B, T, V] of the next token at every position of int64 `tokens_bt`."""
        x_btd = self.embedding(tokens_bt)
        cos_ts, sin_ts = rotary_tables(tokens_bt.shape[1], self.config, tokens_bt.device)
        for block in self.blocks:
            x_btd = block(x_btd, cos_ts, sin_ts)
        logits_btv: Tensor = self.lm_head(self.norm(x_btd))
        return logits_btv


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain follows the dtype of its input.

    Under autocast activations are bf16 and gains fp32; torch then warns and leaves its fused kernel unused.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / rms(x) * gain, over the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_btd: Tensor, cos_ts: Tensor, sin_ts: Tensor) -> Tensor:
        """Returns the residual stream after this block."""
        h_btd: Tensor = x_btd + self.attention(self.attention_norm(x_btd), cos_ts, sin_ts)
        y_btd: Tensor = self.mlp(self.mlp_norm(h_btd))
        return h_btd + y_btd


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and, by default, normalised queries and keys."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        kv_size = config.num_kv_heads * config.head_size
        self.grouped = config.num_kv_heads != config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_btd: Tensor, cos_ts: Tensor, sin_ts: Tensor) -> Tensor:
        """The attention's contribution to the residual stream."""
        q_bhts = self._heads(self.q_proj(x_btd))
        k_bkts = self._heads(self.k_proj(x_btd))
        v_bkts = self._heads(self.v_proj(x_btd))
        q_bhts = rotate(self.q_norm(q_bhts), cos_ts, sin_ts)
        k_bkts = rotate(self.k_norm(k_bkts), cos_ts, sin_ts)
        if x_btd.is_cpu:
            # Torch's backward of bf16 attention takes five to seven times as long as that of fp32 on CPUs without
            # matrix units (measured at T = 128 and 256).
            q_bhts, k_bkts, v_bkts = q_bhts.float(), k_bkts.float(), v_bkts.float()
        y_bhts = F.scaled_dot_product_attention(q_bhts, k_bkts, v_bkts, is_causal=True, enable_gqa=self.grouped)
        y_btd: Tensor = self.o_proj(y_bhts.transpose(1, 2).flatten(2).to(x_btd.dtype))
        return y_btd

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """The MLP's contribution to the residual stream."""
        h_btf = F.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd)
        y_btd: Tensor = self.down_proj(h_btf)
        return y_btd


def rotary_tables(length: int, config: DecoderConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, S] of the rotary angles, fp32 whatever the default dtype is.

    They are made anew for each batch and are no buffers, so that casting a model to bf16 cannot blur positions.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device) / config.head_size
    angles_ts = torch.outer(
        torch.arange(length, dtype=torch.float32, device=device), config.rope_theta**-exponents
    ).repeat(1, 2)
    return angles_ts.cos(), angles_ts.sin()


def rotate(x_bhts: Tensor, cos_ts: Tensor, sin_ts: Tensor) -> Tensor:
    """Rotates each pair (i, i + S/2) of a head by its position's angle, in fp32 (Su et al., RoFormer)."""
    first, second = x_bhts.float().chunk(2, dim=-1)
    rotated = x_bhts.float() * cos_ts + torch.cat((-second, first), dim=-1) * sin_ts
    return rotated.to(x_bhts.dtype)
