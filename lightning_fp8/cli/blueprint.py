"""A training configuration read without training: its model on the meta device, no data, no trainer."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_fp8.cli.fit import FP8CLI, start
from lightning_fp8.models import DecoderLM


class Blueprint(FP8CLI):
    """The configuration of `fit`, of which the model is built, and nothing else.

    The data need not exist yet, and the trainer may be of a device that this machine does not have.
    """

    model: DecoderLM

    def instantiate_classes(self) -> None:
        """Builds the model, on the meta device."""
        model_only = self.config.clone()
        for name in [name for name in vars(model_only) if name != "model"]:
            model_only.pop(name)
        self.config_init = self.config
        self.model = self.parser.instantiate_classes(model_only).model
        with torch.device("meta"):
            self.model.configure_model()

    def example(self) -> Tensor:
        """The input tokens [B, T] of one micro-batch, on the meta device.

        Raises:
            ValueError: There are none.
        """
        data: Any = self.config.data
        for name in ("batch_size", "sequence_length"):
            if data[name] < 1:
                raise ValueError(f"data.{name} is {data[name]}; it must be 1 or more.")
        return torch.zeros(data.batch_size, data.sequence_length, dtype=torch.int64, device="meta")


Kind = TypeVar("Kind", bound=Blueprint)


def read(cli: type[Kind], args: list[str]) -> Kind:
    """The blueprint of the configuration in `args`, the verb first."""
    argv = [f"lightning-fp8 {args[0]}", *args[1:]]
    return start(cli, argv, run=False, save_config_callback=None, seed_everything_default=False)
