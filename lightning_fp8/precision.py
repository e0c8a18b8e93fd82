"""FP8 as a Lightning precision plugin: a list of phase hooks, for Fabric and for the Trainer.

    convert_module      weights to their dtype, linear layers to FP8, in place (DDP ignores what is returned)
    init contexts       new modules and tensors get the weights' dtype
    forward_context     FP8 on; default dtype bf16 (weights "bf16") or torch.autocast to bf16 (weights "fp32")
    *_step_context      the same with FP8 on or off for evaluation, as `eval_precision` says
    connect             the optimizer is checked before the first step

Weights "fp32", the default, is safe with any optimizer: fp32 weights, bf16 compute, FP8 GEMMs. Weights "bf16" needs an
optimizer that rounds stochastically, or small updates are lost; the plugin says so if it sees none.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import Precision
from lightning_utilities import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp8.compute.autocast import fp8_autocast
from lightning_fp8.compute.convert import KEEP_HIGH_PRECISION, ConversionReport, convert_linears
from lightning_fp8.compute.gemm import Backend, select_backend
from lightning_fp8.compute.recipe import Recipe, resolve_recipe

Phase = Literal["fp8", "bf16"]


class FabricFP8Precision(FabricPrecision):
    """FP8 training with Fabric: `Fabric(plugins=[FabricFP8Precision()])`.

    Args:
        recipe: A preset's name, a `Recipe`, or a mapping of its fields.
        backend: What multiplies: "auto", or a backend's name.
        weights: Dtype of the weights: "fp32" (any optimizer) or "bf16" (an optimizer that rounds stochastically).
        keep_high_precision: Shell patterns of names of linear layers that stay out of FP8.
        eval_precision: Whether converted layers run in "fp8" or in "bf16" where no gradients are computed.

    Raises:
        ValueError: Unknown recipe, backend, weights or eval_precision.
    """

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe = "tensorwise",
        *,
        backend: Backend = "auto",
        weights: Literal["fp32", "bf16"] = "fp32",
        keep_high_precision: Sequence[str] = KEEP_HIGH_PRECISION,
        eval_precision: Phase = "fp8",
    ) -> None:
        if weights not in ("fp32", "bf16"):
            raise ValueError(f"FP8Precision: weights {weights!r} is not one of fp32, bf16.")
        if eval_precision not in ("fp8", "bf16"):
            raise ValueError(f"FP8Precision: eval_precision {eval_precision!r} is not one of fp8, bf16.")
        self.recipe = resolve_recipe(recipe)
        self.backend = select_backend(backend)
        self.weights = weights
        self.keep_high_precision = tuple(keep_high_precision)
        self.eval_precision = eval_precision
        self.report = ConversionReport()
        # What Lightning and others should take the compute precision for: linear layers apart, it is this.
        self.precision = "bf16-true" if weights == "bf16" else "bf16-mixed"
        self._weights_dtype = torch.bfloat16 if weights == "bf16" else torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts the weights and converts the linear layers, in place; idempotent.

        Raises:
            ValueError: No linear layer can run in FP8.
        """
        module.to(self._weights_dtype)
        self.report = convert_linears(
            module, self.recipe, keep_high_precision=self.keep_high_precision, backend=self.backend
        )
        if not self.report.converted:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.report.kept.items())[:3])
            raise ValueError(
                f"FP8Precision: {type(module).__name__} has no linear layer that can run in FP8"
                f" ({reasons or 'it has no torch.nn.Linear'}). Remove the plugin, or widen what it may convert."
            )
        rank_zero_info(
            f"FP8: {len(self.report.converted)} linear layers converted, {len(self.report.kept)} kept in high"
            f" precision; backend {self.backend}, weights {self.weights}."
        )
        self._module = module
        return module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New tensors have the weights' dtype."""
        return _default_dtype(self._weights_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New modules have the weights' dtype."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """FP8 on, or as `eval_precision` says where gradients are off."""
        return self._forward_context("fp8" if torch.is_grad_enabled() else self.eval_precision)

    def convert_input(self, data: Any) -> Any:
        """Floating-point inputs to the weights' dtype; integers stay."""
        return apply_to_collection(data, dtype=Tensor, function=_cast_floating, to=self._weights_dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point outputs to the default dtype; integers stay."""
        return apply_to_collection(data, dtype=Tensor, function=_cast_floating, to=torch.get_default_dtype())

    @contextmanager
    def _forward_context(self, phase: Phase) -> Iterator[None]:
        device_type = next(self._module.parameters()).device.type
        mixed = torch.autocast(device_type, torch.bfloat16) if self.weights == "fp32" else nullcontext()
        with fp8_autocast(enabled=phase == "fp8"), self.tensor_init_context(), mixed:
            yield


class FP8Precision(FabricFP8Precision, Precision):
    """FP8 training with the Trainer: `Trainer(plugins=[FP8Precision()])`. Arguments as of `FabricFP8Precision`."""

    @contextmanager
    def val_step_context(self) -> Iterator[None]:
        """As `eval_precision` says."""
        with self._forward_context(self.eval_precision):
            yield

    @contextmanager
    def test_step_context(self) -> Iterator[None]:
        """As `eval_precision` says."""
        with self._forward_context(self.eval_precision):
            yield

    @contextmanager
    def predict_step_context(self) -> Iterator[None]:
        """As `eval_precision` says."""
        with self._forward_context(self.eval_precision):
            yield

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Checks that the optimizers train this model, and can train weights of this dtype.

        Raises:
            ValueError: An optimizer holds parameters that are not the model's, or releases gradients that the Trainer
                is to clip, accumulate or reduce.
        """
        own = {id(p) for p in model.parameters()}
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if any(id(p) not in own for p in params):
                raise ValueError(
                    f"FP8Precision: {type(optimizer).__name__} holds parameters that are not the model's, so training"
                    " would change nothing. Build it in configure_optimizers from self.parameters()."
                )
            rounds = all(group.get("rounding", "nearest") != "nearest" for group in optimizer.param_groups)
            if self.weights == "bf16" and not rounds:
                rank_zero_warn(
                    f"FP8Precision: the weights are bf16 and {type(optimizer).__name__} rounds them to nearest, which"
                    ' loses small updates. Use lightning_fp8.optim.FP8AdamW, or FP8Precision(weights="fp32").'
                )
            release = getattr(optimizer, "gradient_release", None)  # of lightning_fp8.optim, which this need not know
            if release is not None:
                trainer = self._module.trainer if isinstance(self._module, LightningModule) else None
                release.check(
                    model,
                    gradient_clip_val=trainer.gradient_clip_val if trainer else None,
                    accumulate_grad_batches=_accumulation(trainer) if trainer else 1,
                )
        return model, optimizers, lr_schedulers


def _accumulation(trainer: Trainer) -> int:
    """The largest number of batches a step, of all epochs."""
    schedules = [c.scheduling for c in cast(Any, trainer).callbacks if isinstance(c, GradientAccumulationScheduler)]
    return max(trainer.accumulate_grad_batches, *(n for schedule in schedules for n in schedule.values()), 1)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _cast_floating(tensor: Tensor, to: torch.dtype) -> Tensor:
    return tensor.to(to) if tensor.is_floating_point() else tensor
