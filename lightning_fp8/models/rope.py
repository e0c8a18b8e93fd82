"""Rotary positions, and their scalings for texts longer than a model was trained on.

Pair i of a head of width S turns by theta^(-2i/S) a position (Su et al., RoFormer). All scalings change these
frequencies and nothing else, but for YaRN's factor on the scores, which is folded into the cosines and sines:

    linear   f / factor                                                  (Chen et al., Position Interpolation)
    ntk      theta becomes theta * factor^(S / (S - 2)): the first pair keeps its frequency, the last is divided
    llama3   by its turns in the original context, f / factor below low_freq_factor, f above high_freq_factor, and
             a mixture linear in the turns between                       (Llama 3.1)
    yarn     the same idea with a mixture linear in the pair's index     (Peng et al., YaRN)

Suffixes of tensor names:  b batch, t position, h head, s head width, i pair.
"""

import math

import torch
from torch import Tensor

from lightning_fp8.models.config import DecoderConfig, RopeScaling


def rotary_tables(positions: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., T, S] of the rotary angles at `positions` [..., T], fp32 whatever the default dtype is.

    They are made anew for each batch and are no buffers, so that casting a model to bf16 cannot blur positions.
    """
    freq_i, factor = frequencies(config, positions.device)
    angles_ts = (positions[..., None].float() * freq_i).tile(2)
    if factor == 1:
        return angles_ts.cos(), angles_ts.sin()
    return angles_ts.cos() * factor, angles_ts.sin() * factor


def frequencies(config: DecoderConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians a position [S / 2] of each pair, fp32, and what the rotated vectors are multiplied with."""
    size, scaling, theta = config.head_size, config.rope_scaling, config.rope_theta
    if scaling and scaling.kind == "ntk":
        theta = ntk_theta(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    freq_i: Tensor = theta**-exponents
    if scaling is None or scaling.kind == "ntk":
        return freq_i, 1.0
    if scaling.kind == "linear":
        return freq_i / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _mix(freq_i, _kept_by_turns(freq_i, scaling), scaling.factor), 1.0
    attention_factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return _mix(freq_i, _kept_by_index(freq_i, theta, scaling), scaling.factor), attention_factor


def ntk_theta(config: DecoderConfig) -> float:
    """The raised base that "ntk" scaling amounts to."""
    factor = config.rope_scaling.factor if config.rope_scaling else 1.0
    return float(config.rope_theta * factor ** (config.head_size / (config.head_size - 2)))


def _mix(freq_i: Tensor, kept_i: Tensor, factor: float) -> Tensor:
    return freq_i * kept_i + freq_i / factor * (1 - kept_i)


def _kept_by_turns(freq_i: Tensor, scaling: RopeScaling) -> Tensor:
    turns_i = (scaling.original_context or 0) * freq_i / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_i - low) / (high - low)).clamp(0, 1)


def _kept_by_index(freq_i: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    size = 2 * freq_i.numel()

    def pair_that_turns(times: float) -> float:
        return size * math.log((scaling.original_context or 0) / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), size - 1)
    index_i = torch.arange(freq_i.numel(), dtype=torch.float32, device=freq_i.device)
    return 1 - ((index_i - first) / max(last - first, 0.001)).clamp(0, 1)


def rotate(x_bhts: Tensor, cos_ts: Tensor, sin_ts: Tensor) -> Tensor:
    """Rotates each pair (i, i + S/2) of a head by its position's angle, in fp32; tables [T, S] or [B, 1, T, S]."""
    x = x_bhts.float()  # once: two casts would each round their part of the gradient to bf16 before it is added up
    first, second = x.chunk(2, dim=-1)
    return (x * cos_ts + torch.cat((-second, first), dim=-1) * sin_ts).to(x_bhts.dtype)
