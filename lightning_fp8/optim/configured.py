"""`FP8Optimizer` as a configuration file can write it: the base optimizer is a class and its options, not an object.

    optimizer:
      class_path: lightning_fp8.optim.FP8OptimizerOf
      init_args:
        base:
          class_path: torch.optim.NAdam
          init_args:
            lr: 3.0e-3

LightningCLI gives the parameters to an optimizer that it has been told the class and options of. `FP8Optimizer` wraps
an optimizer that has its parameters already, so the two come together here.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch.optim import AdamW, Optimizer

from lightning_fp8.optim.wrapper import FP8Optimizer


class FP8OptimizerOf(FP8Optimizer):
    """`FP8Optimizer(base(params), ...)`.

    Args:
        params: Parameters, (name, parameter) pairs or groups of either.
        base: What makes the base optimizer of them: a class of torch.optim, or such a class with its options.
        moments: See `FP8Optimizer`, also for what follows.
        block_size: Elements that share scales.
        rounding: How bf16 weights are rounded.
        seed: Of the random bits.
        max_skipped_steps: Raise when this many steps in a row had gradients that are not finite.

    Raises:
        ValueError: See `FP8Optimizer`.
    """

    def __init__(
        self,
        params: Any,
        base: Callable[[Iterable[Any]], Optimizer] = AdamW,
        moments: Literal["fp8", "fp32"] = "fp8",
        *,
        block_size: int = 128,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        max_skipped_steps: int | None = None,
    ) -> None:
        super().__init__(
            base(params),
            moments,
            block_size=block_size,
            rounding=rounding,
            seed=seed,
            max_skipped_steps=max_skipped_steps,
        )
