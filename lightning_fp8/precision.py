"""FP8 as a Lightning precision plugin: a list of phase hooks, for Fabric and for the Trainer.

    convert_module      weights to their dtype, linear layers to FP8, in place (DDP ignores what is returned)
    init contexts       new modules and tensors get the weights' dtype
    forward_context     FP8 on or off; default dtype bf16 (weights "bf16") or torch.autocast to bf16 (weights "fp32")
    *_step_context      the same for evaluation, as `eval_precision` says
    optimizer_step      delayed scales advance, cached weight casts end, the schedule counts
    connect             the optimizer is checked before the first step
    state dict          the scaling state and the step; never in the model's own

Weights "fp32", the default, is safe with any optimizer: fp32 weights, bf16 compute, FP8 GEMMs. Weights "bf16" needs an
optimizer that rounds stochastically, or small updates are lost; the plugin says so if it sees none.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any, Literal

import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning_utilities import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp8.compute.autocast import fp8_autocast
from lightning_fp8.compute.convert import KEEP_HIGH_PRECISION, ConversionReport, convert_linears
from lightning_fp8.compute.gemm import Backend, select_backend
from lightning_fp8.compute.linear import end_step
from lightning_fp8.compute.recipe import Recipe, resolve_recipe
from lightning_fp8.compute.state import fp8_state_dict, load_fp8_state_dict
from lightning_fp8.compute.transformer_engine.convert import convert_to_transformer_engine, transformer_engine_autocast
from lightning_fp8.compute.transformer_engine.recipe import require_transformer_engine

Phase = Literal["fp8", "bf16"]


class FabricFP8Precision(FabricPrecision):
    """FP8 training with Fabric: `Fabric(plugins=[FabricFP8Precision()])`.

    Fabric saves no plugin's state. With delayed scaling or a schedule, put it into the checkpoint yourself:
    `fabric.save(path, {..., "fp8": plugin.state_dict()})`, and `plugin.load_state_dict(...)` after `fabric.setup`.

    Args:
        recipe: A preset's name, a `Recipe`, or a mapping of its fields.
        backend: What multiplies: "auto", "native", "emulated", or "transformer_engine": its layers, norms included,
            over the model's own parameters (extra `te`).
        weights: Dtype of the weights: "fp32" (any optimizer) or "bf16" (an optimizer that rounds stochastically).
        keep_high_precision: Shell patterns of names of linear layers that stay out of FP8.
        eval_precision: Where no gradients are computed, converted layers run in "bf16" or, with "fp8", as in training.
        bf16_first_steps: Optimizer steps at the start during which converted layers run in bf16.
        bf16_last_steps: The same at the end.
        total_steps: Optimizer steps of the run, for `bf16_last_steps`; the Trainer knows them by itself.
        keep_slow: Also keep layers out of FP8 whose sizes are known to be slower in it; see `convert_linears`.
        cache_weights: Keep the weights' FP8 copies while gradients accumulate, a byte or two a parameter.

    Raises:
        ValueError: An argument is not one of those it may be, or the backend cannot run here.
    """

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe = "tensorwise",
        *,
        backend: Backend | Literal["transformer_engine"] = "auto",
        weights: Literal["fp32", "bf16"] = "fp32",
        keep_high_precision: Sequence[str] = KEEP_HIGH_PRECISION,
        eval_precision: Phase = "fp8",
        bf16_first_steps: int = 0,
        bf16_last_steps: int = 0,
        total_steps: int | None = None,
        keep_slow: bool = False,
        cache_weights: bool = False,
    ) -> None:
        if weights not in ("fp32", "bf16"):
            raise ValueError(f"FP8Precision: weights {weights!r} is not one of fp32, bf16.")
        if eval_precision not in ("fp8", "bf16"):
            raise ValueError(f"FP8Precision: eval_precision {eval_precision!r} is not one of fp8, bf16.")
        if bf16_first_steps < 0 or bf16_last_steps < 0:
            raise ValueError(
                f"FP8Precision: bf16_first_steps {bf16_first_steps} and bf16_last_steps {bf16_last_steps} must be 0 or"
                " more."
            )
        self.recipe = resolve_recipe(recipe)
        if backend == "transformer_engine":
            require_transformer_engine(self.recipe)
        self.backend = backend if backend == "transformer_engine" else select_backend(backend, self.recipe)
        self.weights = weights
        self.keep_high_precision = tuple(keep_high_precision)
        self.eval_precision: Phase = eval_precision
        self.bf16_first_steps = bf16_first_steps
        self.bf16_last_steps = bf16_last_steps
        self.total_steps = total_steps
        self.keep_slow = keep_slow
        self.cache_weights = cache_weights
        self.steps = 0
        self.report = ConversionReport()
        # What Lightning and others should take the compute precision for: linear layers apart, it is this.
        self.precision = "bf16-true" if weights == "bf16" else "bf16-mixed"
        self._last_step = total_steps
        self._weights_dtype = torch.bfloat16 if weights == "bf16" else torch.float32
        self._modules: list[nn.Module] = []  # Fabric may set up several

    @property
    def phase(self) -> Phase:
        """What the next training step runs in, as the schedule says."""
        starting = self.steps < self.bf16_first_steps
        ending = self._last_step is not None and self.steps >= self._last_step - self.bf16_last_steps
        return "bf16" if starting or (ending and self.bf16_last_steps) else "fp8"

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts the weights and converts the linear layers, in place; idempotent.

        Raises:
            ValueError: No linear layer can run in FP8.
        """
        module.to(self._weights_dtype)
        options: dict[str, Any] = {
            "keep_high_precision": self.keep_high_precision,
            "keep_slow": self.keep_slow,
            "cache_weights": self.cache_weights,
        }
        if self.backend == "transformer_engine":
            self.report = convert_to_transformer_engine(module, self.recipe, **options)
        else:
            self.report = convert_linears(module, self.recipe, backend=self.backend, **options)
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
        if not any(module is known for known in self._modules):
            self._modules.append(module)
        return module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New tensors have the weights' dtype."""
        return _default_dtype(self._weights_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New modules have the weights' dtype."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """FP8 on or off as the schedule says or, where gradients are off, `eval_precision`."""
        return self._forward_context(evaluating=not torch.is_grad_enabled())

    def convert_input(self, data: Any) -> Any:
        """Floating-point inputs to the weights' dtype; integers stay."""
        return apply_to_collection(data, dtype=Tensor, function=_cast_floating, to=self._weights_dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point outputs to the default dtype; integers stay."""
        return apply_to_collection(data, dtype=Tensor, function=_cast_floating, to=torch.get_default_dtype())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Steps as Lightning does, and ends the step for the converted layers: once an accumulation window."""
        result = super().optimizer_step(*args, **kwargs)
        if self.recipe.scaling == "delayed" or self.cache_weights:
            for module in self._modules:
                end_step(module)
        before = self.phase
        self.steps += 1
        if self.phase != before:
            rank_zero_info(f"FP8: from optimizer step {self.steps} on, linear layers run in {self.phase}.")
        return result

    def state_dict(self) -> dict[str, Any]:
        """The step and the scaling state, as plain tensors and numbers; nothing where neither matters."""
        state: dict[str, Any] = {}
        if self.bf16_first_steps or self.bf16_last_steps:
            state["steps"] = self.steps
        if self.recipe.scaling == "delayed":
            state["scales"] = [fp8_state_dict(module) for module in self._modules]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, after conversion, and says what is calibrated anew."""
        self.steps = state_dict.get("steps", self.steps)
        for module, scales in zip_longest(self._modules, state_dict.get("scales", []), fillvalue=None):
            message = load_fp8_state_dict(module, scales or {}) if module else ""
            if message:
                rank_zero_info(f"FP8: {message}")

    @contextmanager
    def _forward_context(self, *, evaluating: bool) -> Iterator[None]:
        if self.bf16_last_steps and self._last_step is None and not evaluating:
            raise ValueError(
                "FP8Precision: bf16_last_steps needs to know how many optimizer steps there will be."
                " Set max_steps or max_epochs of the Trainer or, with Fabric, total_steps of the plugin."
            )
        fp8 = self.phase == "fp8" and not (evaluating and self.eval_precision == "bf16")
        device_type = next(self._modules[-1].parameters()).device.type
        mixed = torch.autocast(device_type, torch.bfloat16) if self.weights == "fp32" else nullcontext()
        theirs = self.backend == "transformer_engine"
        engine = transformer_engine_autocast(self.recipe, enabled=fp8) if theirs else nullcontext()
        with fp8_autocast(enabled=fp8), engine, self.tensor_init_context(), mixed:
            yield


class FP8Precision(FabricFP8Precision, Precision):
    """FP8 training with the Trainer: `Trainer(plugins=[FP8Precision()])`. Arguments as of `FabricFP8Precision`."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """As in Fabric, for the one module that this fit trains."""
        self._modules.clear()
        return super().convert_module(module)

    @contextmanager
    def val_step_context(self) -> Iterator[None]:
        """As `eval_precision` says."""
        with self._forward_context(evaluating=True):
            yield

    @contextmanager
    def test_step_context(self) -> Iterator[None]:
        """As `eval_precision` says."""
        with self._forward_context(evaluating=True):
            yield

    @contextmanager
    def predict_step_context(self) -> Iterator[None]:
        """As `eval_precision` says."""
        with self._forward_context(evaluating=True):
            yield

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Checks that the optimizers train this model, and can train weights of this dtype.

        Raises:
            ValueError: An optimizer holds parameters that are not the model's.
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
        if self.bf16_last_steps and optimizers:
            self._last_step = self.total_steps or _total_steps(model)
        return model, optimizers, lr_schedulers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues the schedule at the checkpoint's step, whatever precision it was written in."""
        self.steps = int(checkpoint["global_step"])
        if type(self).__qualname__ not in checkpoint:
            self.load_state_dict({})


def _total_steps(model: nn.Module) -> int | None:
    """How many optimizer steps the Trainer of `model` will make; None if it cannot tell."""
    wrapped: Any = model  # by DDP, or not at all
    module = model if isinstance(model, LightningModule) else wrapped.module
    total = module.trainer.estimated_stepping_batches
    return int(total) if 0 <= total < math.inf else None


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
