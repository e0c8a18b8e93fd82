"""Adaptive gradient clipping for any LightningModule."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_fp8.optim.clipping import AdaGC, ZClip


class AdaptiveClipping(Callback):
    """Clips gradients by what is usual in this run, before `gradient_clip_val` and the optimizer see them.

    Its state is in the checkpoint, and goes back when `FP8Guard` does.

    Args:
        clipping: `ZClip` or `AdaGC`, of `lightning_fp8.optim`.

    Raises:
        ValueError: Gradients are released in backward, so there are never all of them; or there are several optimizers.
    """

    def __init__(self, clipping: ZClip | AdaGC) -> None:
        self.clipping = clipping

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses gradient release and several optimizers, before the first step."""
        if len(trainer.optimizers) > 1:
            raise ValueError("AdaptiveClipping follows the gradients of one optimizer, and there are several.")
        if any(getattr(optimizer, "gradient_release", None) is not None for optimizer in trainer.optimizers):
            raise ValueError(
                "AdaptiveClipping needs all gradients at once, and gradient release frees each in backward: leave out"
                " the callback, or set gradient_release: false."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clips the gradients of the step."""
        self.clipping.clip(p for group in optimizer.param_groups for p in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """What is usual."""
        return self.clipping.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.clipping.load_state_dict(state_dict)
