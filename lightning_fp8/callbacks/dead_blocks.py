"""The control of a comparison: a model whose blocks learn nothing, and whose loss falls all the same."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class DeadBlocks(Callback):
    """Makes the gradient at the output of every linear layer in the decoder's blocks zero.

    That is what FP8 leaves of gradients that all underflow: weights of blocks get no gradient, nor does what is before
    them, but along the residual stream. Embedding and head learn what a table of bigrams knows, which on an easy task
    is everything. For `DecoderLM`.

    Raises:
        ValueError: The module has no `decoder` with blocks.
    """

    def __init__(self) -> None:
        self._hooks = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cuts the layers off."""
        blocks: Any = getattr(getattr(pl_module, "decoder", None), "blocks", None)
        if blocks is None:
            raise ValueError("DeadBlocks needs a module with a decoder and its blocks, as DecoderLM is.")
        for layer in blocks.modules():
            if isinstance(layer, nn.Linear):
                self._hooks.callback(layer.register_forward_hook(_without_gradient).remove)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connects them again."""
        self._hooks.close()


def _without_gradient(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    # Zero and not none: optimizers step all weights, and DDP waits for a gradient of each.
    return output.detach() + 0 * output
