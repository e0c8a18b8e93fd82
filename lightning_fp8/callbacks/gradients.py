"""FP8 gradient reduction for the Trainer: a callback, for two reasons.

`DDPStrategy(ddp_comm_hook=...)` registers hooks on GPUs alone and says nothing where it does not, and nobody saves what
a hook remembers. A callback has a state in the checkpoint, and a word to say before the first step.
"""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_fp8.distributed import FP8GradientReduction


class FP8Gradients(Callback):
    """Averages gradients over ranks in FP8: half of what bf16 sends. For `strategy: ddp`.

    Logs `fp8/gradient_underflow` and `fp8/gradient_saturation`, shares of all casts so far. See
    `lightning_fp8.distributed.reduction` for what is computed, and how exactly.

    Args:
        format: On the wire: "e4m3" or, with a wider range and half the precision, "e5m2".
    """

    def __init__(self, format: Literal["e4m3", "e5m2"] = "e4m3") -> None:
        self.format = format
        self.reduction: FP8GradientReduction | None = None
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that would not use it.

        Raises:
            ValueError: The strategy is not DDP.
        """
        if stage == "fit" and not isinstance(trainer.strategy, DDPStrategy):
            raise ValueError(
                f"FP8Gradients works with strategy ddp, and this is {type(trainer.strategy).__name__}: set"
                " trainer.strategy to ddp, or leave the callback out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over from DDP's all-reduce.

        Raises:
            ValueError: An optimizer releases gradients before they are reduced.
        """
        if any(getattr(optimizer, "gradient_release", None) for optimizer in trainer.optimizers):
            raise ValueError(
                "FP8Gradients reduces gradients after backward, and gradient release uses and frees them in it: leave"
                " one of the two out."
            )
        model: Any = trainer.strategy.model
        self.reduction = FP8GradientReduction(model, self.format)
        if self._loaded is not None:
            self.reduction.load_state_dict(self._loaded)
            self._loaded = None
        rank_zero_info(f"FP8: gradients of {len(self.reduction.names)} parameters are averaged in {self.format}.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Logs the rates."""
        if self.reduction is not None and trainer.world_size > 1:
            for name, rate in self.reduction.rates().items():
                pl_module.log(f"fp8/gradient_{name}", rate)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the model, keeping the state for another fit."""
        self._loaded = self.state_dict()
        self.reduction = None

    def state_dict(self) -> dict[str, Any]:
        """That of the reduction."""
        return self.reduction.state_dict() if self.reduction is not None else (self._loaded or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until there is a model."""
        self._loaded = state_dict or None
