"""What a forward pass leaves in memory for backward, counted on tensors that have no storage.

No formula says what autograd keeps: the decoder itself runs, under torch's fake tensors, and what is alive afterwards
is summed. So checkpointing, casts that layers share, modules that keep FP8 and a loss in chunks count as they are.
Where blocks are alike, one and two of them tell what any number takes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_fp8.compute.activations import keep_activations_in_fp8
from lightning_fp8.compute.convert import convert_linears
from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.compute.recipe import Recipe
from lightning_fp8.estimate.setup import Setup, layers
from lightning_fp8.models.config import DecoderConfig
from lightning_fp8.models.decoder import Decoder
from lightning_fp8.models.loss import CHUNK_LOGITS
from lightning_fp8.models.recompute import Recompute
from lightning_fp8.optim.estimate import Mode, estimate

_LOGIT_BYTES = 2 + 4 + 4 + 4  # bf16; in fp32 themselves, their softmax and its gradient


class Activations(NamedTuple):
    """Bytes of one device's batch.

    Attributes:
        kept: By autograd, from forward to backward.
        recomputed: Of a block, besides, while backward computes it again.
        logits: Of the chunk of positions for which there are any, and their gradient.
    """

    kept: int
    recomputed: int
    logits: int

    @property
    def peak(self) -> int:
        """All of it that is in memory at once; the loss is over when blocks are computed again."""
        return self.kept + max(self.recomputed, self.logits)


class LiveBytes(TorchDispatchMode):
    """Knows the storages that were made while it is on, and how much of them is still alive."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self._made: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._made[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        return out

    def without(self, module: nn.Module) -> int:
        """Bytes that are alive, but for those of the module's parameters, of which operators return views."""
        own = {p.untyped_storage()._cdata for p in module.parameters()}
        return sum(n for ref, n in self._made.items() if not ref.expired() and ref.cdata not in own)


def activations(
    config: DecoderConfig,
    batch: int,
    length: int,
    recipe: Recipe | None,
    recompute: Recompute = "none",
    fp8_activations: Sequence[str] = (),
) -> Activations:
    """What a batch leaves and needs in memory, weights in bf16.

    Args:
        config: The decoder's shape.
        batch: Sequences.
        length: Tokens of a sequence.
        recipe: Of the linear layers, the head apart, or None for bf16.
        recompute: Activation checkpointing.
        fp8_activations: Patterns of the modules that keep FP8; those in checkpointed blocks do not.

    Raises:
        ValueError: A pattern chooses no module.
    """
    one, two = (_kept(config, blocks, batch, length, recipe, recompute, fp8_activations) for blocks in (1, 2))
    again = 0
    if recompute != "none":
        whole_one, whole_two = (_kept(config, blocks, batch, length, recipe, "none", ()) for blocks in (1, 2))
        again = (whole_two - whole_one) - (two - one)
    kept = one + (config.num_layers - 1) * (two - one)
    if not _blocks_are_alike(config, fp8_activations):
        kept = _kept(config, config.num_layers, batch, length, recipe, recompute, fp8_activations)
    return Activations(kept, again, _logits(config, batch * length))


def _blocks_are_alike(config: DecoderConfig, patterns: Sequence[str]) -> bool:
    """Whether the same modules are chosen in every block."""
    with torch.device("meta"):
        model = Decoder(config)
    chosen = set(keep_activations_in_fp8(model, patterns))
    names = [name for name, _ in model.blocks[0].named_modules(prefix="")]
    alike: bool = all(len({f"blocks.{i}.{name}" in chosen for i in range(config.num_layers)}) == 1 for name in names)
    return alike


def _logits(config: DecoderConfig, tokens: int) -> int:
    chunk = min(tokens, max(1, CHUNK_LOGITS // config.vocab_size))
    return chunk * config.vocab_size * _LOGIT_BYTES


def _kept(
    config: DecoderConfig,
    blocks: int,
    batch: int,
    length: int,
    recipe: Recipe | None,
    recompute: Recompute,
    fp8_activations: Sequence[str],
) -> int:
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(config, num_layers=blocks), activation_checkpointing=recompute)
    with FakeTensorMode(), _default_bf16():
        _give_memory(model)
        if recipe is not None:
            convert_linears(model, recipe, backend="emulated")
            for layer in model.modules():
                if isinstance(layer, FP8Linear):
                    layer.fp8_backend = "native"  # which no device has to run here
        keep_activations_in_fp8(model, [pattern for pattern in fp8_activations if _matches(model, pattern)])
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        with LiveBytes() as live:
            loss = model(tokens, tokens)
            kept: int = live.without(model)
        del loss
    return kept


def _matches(model: nn.Module, pattern: str) -> bool:
    """Whether the pattern chooses something in this part of the model."""
    return any(fnmatchcase(name, pattern) for name, _ in model.named_modules())


def _give_memory(model: nn.Module) -> None:
    """Puts tensors of the mode that is on in the place of the model's, which fake ones cannot be swapped for."""
    made = {p: nn.Parameter(torch.empty(p.shape)) for p in model.parameters()}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, made[p])


class DeviceMemory(NamedTuple):
    """Bytes of one device at the height of a step.

    Attributes:
        weights: Its own.
        grads: Its own; none of them together, where they are released.
        moments: Its own, with scales.
        copies: FP8 casts of weights, kept or of the largest layer alone.
        exchange: DDP's buckets; what FSDP2 makes whole: two blocks, embedding and head, a block's gradients.
        activations: Of its batch.
    """

    weights: float
    grads: float
    moments: float
    copies: float
    exchange: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def device_memory(
    model: nn.Module, mode: Mode, setup: Setup, *, sharded: bool, fp8: bool, cached: bool, activations: float
) -> DeviceMemory:
    """What a device needs.

    Args:
        model: On the meta device.
        mode: How it is trained.
        setup: The step.
        sharded: By FSDP2, or whole on every device under DDP.
        fp8: Whether its blocks' linear layers are cast.
        cached: Whether their casts, one for each of two layouts, are kept.
        activations: Bytes.
    """
    ledger = estimate(model, mode, ways=setup.devices if sharded else 1)
    weights, grads = ledger.weights * ledger.parameters, ledger.grads * ledger.parameters
    moments = (ledger.moments + ledger.scales) * ledger.parameters
    sizes = layers(setup.config)
    block = sum(k * n for k, n in sizes.linears)
    converted = setup.config.num_layers * block if cached else max(k * n for k, n in sizes.linears)
    embeddings = sizes.parameters - setup.config.num_layers * block
    exchange = 0.0
    if setup.devices > 1:
        exchange = 2.0 * (2 * block + embeddings) + setup.grad_bytes * block if sharded else grads
    return DeviceMemory(weights, grads, moments, 2.0 * converted if fp8 else 0.0, exchange, activations)


@contextmanager
def _default_bf16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
