"""What is estimated: a decoder, its batches, the devices, and what they send each other."""

from typing import NamedTuple

from lightning_fp8.hardware import Accelerator
from lightning_fp8.models.config import DecoderConfig
from lightning_fp8.models.recompute import Recompute


class Communication(NamedTuple):
    """What devices send each other in a step.

    Attributes:
        name: In words.
        sharded: Whether weights, gradients and moments are sharded (FSDP2), or every device has all (DDP).
        fp8: Whether FP8 is sent: by DDP gradients, by FSDP2 the weights of converted layers.
    """

    name: str
    sharded: bool
    fp8: bool


COMMUNICATIONS = (
    Communication("DDP", sharded=False, fp8=False),
    Communication("DDP, FP8 gradients", sharded=False, fp8=True),
    Communication("FSDP2", sharded=True, fp8=False),
    Communication("FSDP2, FP8 all-gather", sharded=True, fp8=True),
)


class Setup(NamedTuple):
    """A training step.

    Attributes:
        config: The decoder's shape.
        batch: Sequences a device.
        length: Tokens of a sequence.
        hardware: The devices.
        devices: How many there are.
        recompute: Activation checkpointing.
        grad_bytes: A number of a gradient, as it is kept and reduced.
        state_bytes: A parameter's weight and optimizer state, which a step reads and writes.
    """

    config: DecoderConfig
    batch: int
    length: int
    hardware: Accelerator
    devices: int = 1
    recompute: Recompute = "none"
    grad_bytes: float = 2.0
    state_bytes: float = 4.1

    @property
    def tokens(self) -> int:
        """Of a device's batch."""
        return self.batch * self.length


class Layers(NamedTuple):
    """The matrices of a decoder's block, as (inputs, outputs) of linear layers, and what else there is.

    Attributes:
        linears: Of one block; those that run in FP8.
        head: Of the decoder.
        parameters: Of the whole decoder.
        tensors: How many parameters there are.
    """

    linears: tuple[tuple[int, int], ...]
    head: tuple[int, int]
    parameters: int
    tensors: int


def layers(config: DecoderConfig) -> Layers:
    """The sizes that follow from a decoder's shape; biases, of which few models have any, are left out."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    linears = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
    norms = 2 * d + (2 * config.head_size if config.qk_norm else 0)
    embeddings = 1 if config.tied_embeddings else 2
    block = sum(k * n for k, n in linears) + norms
    tensors = config.num_layers * (len(linears) + (4 if config.qk_norm else 2)) + embeddings + 1
    return Layers(linears, (d, v), config.num_layers * block + embeddings * d * v + d, tensors)
