"""A Llama-family decoder in plain torch: nothing here knows of FP8 or of Lightning.

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention through scaled_dot_product_attention, SwiGLU.
q, k, v and gate, up are separate layers, under the names that published checkpoints use for them.

Suffixes of tensor names:  b batch, t position, d hidden, f MLP width, v vocabulary.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from lightning_fp8.models.attention import Attention, Sight, sight_of_cache, sight_of_text
from lightning_fp8.models.cache import KVCache
from lightning_fp8.models.config import DecoderConfig
from lightning_fp8.models.loss import gradient_only, next_token_loss
from lightning_fp8.models.norm import LayerScale, RMSNorm
from lightning_fp8.models.recompute import Recompute, recomputing
from lightning_fp8.models.scores import soft_cap
from lightning_fp8.models.smooth import smoothed

_FROM_ZERO = ("bias", "_scale.weight", "sink_logit")  # how names of vectors that start at zero end; gains start at 1


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, V] or, where targets are given, the loss; see `DecoderConfig`.

    Args:
        config: The shape.
        activation_checkpointing: What backward computes again instead of keeping it; see `recompute.py`.
    """

    def __init__(self, config: DecoderConfig, *, activation_checkpointing: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: Recompute = activation_checkpointing
        device = torch.get_default_device()
        with torch.device("meta"):  # layers draw weights of their own, which would be drawn again
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
            self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if device.type != "meta":
            self.materialize(device)
        else:
            self._tie()

    def materialize(self, device: torch.device) -> None:
        """Gives weights on the meta device memory on `device`, and their initial values."""
        self.to_empty(device=device)
        self._tie()
        self.reset_parameters()

    def _tie(self) -> None:
        if self.config.tied_embeddings:
            self.lm_head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Draws the weights from torch's global generator; gains are 1, biases, LayerScales and sinks 0.

        They are drawn in fp32 whatever the weights' dtype, and whole where a process holds a part, so that runs that
        differ in precision or in the number of processes start from the same point.
        """
        residual_std = self.config.init_std / (2 * self.config.num_layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 0.0 if name.endswith(_FROM_ZERO) else 1.0)
                continue
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self.config.init_std
            assign(p, torch.randn(p.shape, dtype=torch.float32, device=p.device).mul_(std))

    def forward(
        self,
        tokens_bt: Tensor,
        targets_bt: Tensor | None = None,
        *,
        documents_bt: Tensor | None = None,
        cache: KVCache | None = None,
        lengths_b: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the next token at every position, or the mean loss in nats, fp32.

        Args:
            tokens_bt: int64.
            targets_bt: The next tokens, int64, -100 where there is none to predict. The loss is returned, and the
                logits are never all in memory: see `loss.py`.
            documents_bt: The number of the document that each token of a packed sequence belongs to; attention stays
                within documents.
            cache: What was read before; the new tokens are added to it.
            lengths_b: With a cache, how many tokens of each row are no padding on the right.
        """
        x_btd = self.embedding(tokens_bt)
        if cache is None:
            sight = sight_of_text(tokens_bt.shape[1], self.config, documents_bt, tokens_bt.device)
        else:
            sight = sight_of_cache(tokens_bt.shape[1], self.config, lengths_b, cache)
        penalised = self.config.activation_l2 if targets_bt is not None else 0.0
        squares = []
        for block in self.blocks:
            x_btd = recomputing(block, self.activation_checkpointing)(x_btd, sight)
            if penalised:
                squares.append((x_btd * x_btd).mean(dtype=torch.float32))
        x_btd = self.norm(x_btd)
        cap = self.config.logit_softcap
        if targets_bt is None:
            return soft_cap(self.lm_head(x_btd), cap)
        transform = partial(soft_cap, cap=cap) if cap else None
        loss = next_token_loss(x_btd, self.lm_head, targets_bt, transform=transform, z_loss=self.config.z_loss)
        return loss + gradient_only(penalised * torch.stack(squares).mean()) if penalised else loss


@torch.no_grad()
def assign(p: Tensor, whole: Tensor) -> None:
    """Copies `whole` into `p` or, where this process holds a part of `p`, its part of it; nothing is sent."""
    if isinstance(p, DTensor):
        part = distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        p.to_local().copy_(part.to_local())
    else:
        p.copy_(whole)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.attention_scale = LayerScale(config.hidden_size) if config.layer_scale else nn.Identity()
        self.mlp_scale = LayerScale(config.hidden_size) if config.layer_scale else nn.Identity()

    def forward(self, x_btd: Tensor, sight: Sight) -> Tensor:
        """Returns the residual stream after this block."""
        h_btd: Tensor = x_btd + self.attention_scale(self.attention(self.attention_norm(x_btd), sight))
        y_btd: Tensor = self.mlp_scale(self.mlp(self.mlp_norm(h_btd)))
        return h_btd + y_btd


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.smooth = config.smooth_swiglu
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_btd: Tensor) -> Tensor:
        """The MLP's contribution to the residual stream."""
        h_btf = F.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd)
        y_btd: Tensor = smoothed(self.down_proj, h_btf) if self.smooth else self.down_proj(h_btf)
        return y_btd
