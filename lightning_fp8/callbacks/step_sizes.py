"""How large gradients and updates are, of any optimizer: two figures by which runs are compared."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class StepSizes(Callback):
    """Logs `grad_norm`, before clipping, and `update_ratio`, |W_after - W_before| / |W| over all weights.

    At the Trainer's logging interval; weights are copied for that one step. Where gradients are released, backward
    has moved the weights before there is anything to measure, and nothing is logged.
    """

    def __init__(self) -> None:
        self._before: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measures the gradients, and keeps the weights."""
        if (trainer.global_step + 1) % max(1, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return
        weights = _weights(optimizer)
        grads = [p.grad for p in weights if p.grad is not None]
        if not grads:
            return
        pl_module.log("grad_norm", _norm(grads))
        self._before = [p.detach().clone() for p in weights]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Compares them with those after the step."""
        if not self._before:
            return
        weights = [weight.detach() for optimizer in trainer.optimizers for weight in _weights(optimizer)]
        moved = [now.float() - old.float() for now, old in zip(weights, self._before, strict=True)]
        pl_module.log("update_ratio", _norm(moved) / _norm(self._before))
        self._before = []


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch.stack([_whole(torch.linalg.vector_norm(t, dtype=torch.float32)) for t in tensors])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


def _whole(norm: Tensor) -> Tensor:
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole
