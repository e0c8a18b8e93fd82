"""FP8 as a Lightning precision plugin: a list of phase hooks, for Fabric and for the Trainer.

    convert_module      weights to their dtype, linear layers to FP8, in place (DDP ignores what is returned)
    init contexts       new modules and tensors get the weights' dtype
    forward_context     FP8 on or off; default dtype bf16 (weights "bf16") or torch.autocast to bf16 (weights "fp32")
    *_step_context      the same for evaluation, as `eval_precision` says
    optimizer_step      delayed scales advance and cached weight casts end, of the layers that the optimizer trains; the
                        schedule counts
    connect             the optimizer is checked before the first step; with Fabric, which has no such hook, in it
    state dict          the scaling state and the step; never in the model's own

Weights "fp32", the default, is safe with any optimizer: fp32 weights, bf16 compute, FP8 GEMMs. Weights "bf16" needs an
optimizer that rounds stochastically, or small updates are lost; the plugin says so if it sees none.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning_utilities import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp8.checks import (
    check_converted,
    check_owns_all,
    check_owns_some,
    check_release,
    check_total,
    total_steps,
    trained_layers,
    trainer_of,
    warn_of_rounding,
)
from lightning_fp8.compute.activations import keep_activations_in_fp8
from lightning_fp8.compute.autocast import fp8_autocast, frozen_scales
from lightning_fp8.compute.convert import KEEP_HIGH_PRECISION, ConversionReport, convert_linears
from lightning_fp8.compute.dtypes import cast_floating, cast_weights, default_dtype
from lightning_fp8.compute.gemm import Backend, describe_backend, select_backend
from lightning_fp8.compute.linear import end_step_of, switch
from lightning_fp8.compute.recipe import Recipe, resolve_recipe
from lightning_fp8.compute.state import fp8_state_dict, load_fp8_state_dict
from lightning_fp8.compute.transformer_engine.convert import convert_to_transformer_engine, transformer_engine_autocast
from lightning_fp8.compute.transformer_engine.recipe import require_transformer_engine
from lightning_fp8.distributed.all_gather import check_gather, gather_in_fp8

Phase = Literal["fp8", "bf16"]


class FabricFP8Precision(FabricPrecision):
    """FP8 training with Fabric: `Fabric(plugins=[FabricFP8Precision()])`.

    Fabric saves no plugin's state. With delayed scaling or a schedule, put the plugin into the checkpoint yourself:
    `fabric.save(path, {"model": model, "fp8": plugin, ...})`, and likewise `fabric.load` after `fabric.setup`.

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
        fp8_activations: Shell patterns of modules that keep what they save for backward in FP8, as `("*mlp", "*norm")`;
            see `compute/activations.py`.
        fp8_all_gather: Where FSDP2 shards the model, gather the weights of converted layers as FP8 codes.

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
        fp8_activations: Sequence[str] = (),
        fp8_all_gather: bool = False,
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
        if fp8_all_gather:
            check_gather(
                self.recipe, backend, in_bf16=bf16_first_steps + bf16_last_steps > 0 or eval_precision == "bf16"
            )
        self.fp8_all_gather = fp8_all_gather
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
        self.fp8_activations = tuple(fp8_activations)
        self.steps = 0
        self.report = ConversionReport()
        # What Lightning and others should take the compute precision for: linear layers apart, it is this.
        self.precision = "bf16-true" if weights == "bf16" else "bf16-mixed"
        self._last_step = total_steps
        self._weights_dtype = torch.bfloat16 if weights == "bf16" else torch.float32
        self._switched_to: Phase | None = None  # what the layers run in; unknown at first
        self._know_nothing()

    def __repr__(self) -> str:
        # FSDPStrategy refuses plugins of others by printing them: its error is to name what shards instead.
        return f"{type(self).__name__}(weights={self.weights!r}, …), which is sharded by ModelParallelStrategy"

    def _know_nothing(self) -> None:
        self._modules = WeakKeyDictionary[nn.Module, None]()  # in the order in which they were set up
        self._optimizers = WeakSet[Optimizer]()  # those that were checked

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are given a copy, as those of `ddp_spawn`: each sets up models and optimizers itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_modules", "_optimizers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._know_nothing()

    @property
    def phase(self) -> Phase:
        """What the next training step runs in, as the schedule says."""
        starting = self.steps < self.bf16_first_steps
        ending = self._last_step is not None and self.steps >= self._last_step - self.bf16_last_steps
        return "bf16" if starting or (ending and self.bf16_last_steps) else "fp8"

    def compute_dtype(self) -> torch.dtype:
        """What later releases of Lightning ask, whose ThroughputMonitor would take the plugin for fp32."""
        return torch.bfloat16

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts the weights and converts the linear layers, in place; idempotent.

        Raises:
            ValueError: No linear layer can run in FP8.
        """
        cast_weights(module, self._weights_dtype)
        options: dict[str, Any] = {
            "keep_high_precision": self.keep_high_precision,
            "keep_slow": self.keep_slow,
            "cache_weights": self.cache_weights,
        }
        if self.backend == "transformer_engine":
            self.report = convert_to_transformer_engine(module, self.recipe, **options)
        else:
            self.report = convert_linears(module, self.recipe, backend=self.backend, **options)
        check_converted(module, self.report.converted, self.report.kept)
        keep_activations_in_fp8(module, self.fp8_activations)
        rank_zero_info(
            f"FP8: {len(self.report.converted)} linear layers converted, {len(self.report.kept)} kept in high"
            f" precision; weights are {self.weights}, GEMMs {self._describe_gemms()}."
        )
        self._modules[module] = None
        self._switched_to = None
        return module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New tensors have the weights' dtype."""
        return default_dtype(self._weights_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New modules have the weights' dtype."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """FP8 on or off as the schedule says or, where gradients are off, `eval_precision`."""
        return self._forward_context(evaluating=not torch.is_grad_enabled())

    def convert_input(self, data: Any) -> Any:
        """Floating-point inputs to the weights' dtype; integers stay."""
        return apply_to_collection(data, dtype=Tensor, function=cast_floating, to=self._weights_dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point outputs to the default dtype; integers stay."""
        return apply_to_collection(data, dtype=Tensor, function=cast_floating, to=torch.get_default_dtype())

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Steps as Lightning does, and ends the step of the layers it trains: once an accumulation window.

        Raises:
            ValueError: The optimizer holds no parameter of a model that was set up.
        """
        if isinstance(optimizer, Optimizer) and optimizer not in self._optimizers:  # Fabric has no earlier hook for it
            check_owns_some(self._modules, optimizer)
            self._accept(optimizer)
        result = super().optimizer_step(optimizer, *args, **kwargs)
        if self.recipe.scaling == "delayed" or self.cache_weights or self.fp8_all_gather:
            end_step_of(trained_layers(self._modules, optimizer, self._optimizers))
        before = self.phase
        self.steps += 1
        if self.phase != before:
            rank_zero_info(f"FP8: from optimizer step {self.steps} on, linear layers run in {self.phase}.")
        return result

    def state_dict(self) -> dict[str, Any]:
        """The step and the scaling state, as plain tensors and numbers; nothing where neither matters."""
        state: dict[str, Any] = {}
        if self.bf16_first_steps or self.bf16_last_steps:
            state.update(steps=self.steps, last_step=self._last_step)
        if self.recipe.scaling == "delayed":
            state["scales"] = [fp8_state_dict(module) for module in self._modules]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, after conversion, and says what is calibrated anew."""
        self.steps = state_dict.get("steps", self.steps)
        if self._last_step is None:  # as in an evaluation, which plans no steps of its own
            self._last_step = state_dict.get("last_step")
        for module, scales in zip_longest(self._modules, state_dict.get("scales", []), fillvalue=None):
            message = load_fp8_state_dict(module, scales or {}) if module else ""
            if message:
                rank_zero_info(f"FP8: {message}")

    @contextmanager
    def _forward_context(self, *, evaluating: bool) -> Iterator[None]:
        if not evaluating:
            check_total(self.bf16_last_steps, self._last_step)
        self._switch_layers()
        phase = "bf16" if evaluating and self.eval_precision == "bf16" else self.phase
        device_type = next((p.device.type for module in self._modules for p in module.parameters()), "cpu")
        mixed = torch.autocast(device_type, torch.bfloat16) if self.weights == "fp32" else nullcontext()
        fp8, theirs = phase == "fp8", self.backend == "transformer_engine"
        frozen = frozen_scales() if evaluating else nullcontext()
        engine = transformer_engine_autocast(self.recipe, enabled=fp8) if theirs else nullcontext()
        with fp8_autocast(enabled=fp8), frozen, engine, self.tensor_init_context(), mixed:
            yield

    def _switch_layers(self) -> None:
        """Puts the layers themselves into the phase, for what backward computes again, outside of any context."""
        if self._switched_to != self.phase:
            self._switched_to = self.phase
            for module in self._modules:
                switch(module, on=self.phase == "fp8")
                if self.fp8_all_gather:  # here, because Fabric shards after the conversion
                    gather_in_fp8(module)

    def _describe_gemms(self) -> str:
        theirs = self.backend == "transformer_engine"
        return "Transformer Engine's" if theirs else describe_backend(self.backend, self.recipe)

    def _accept(self, optimizer: Optimizer) -> None:
        warn_of_rounding(self.weights, optimizer)
        self._optimizers.add(optimizer)


class FP8Precision(FabricFP8Precision, Precision):
    """FP8 training with the Trainer: `Trainer(plugins=[FP8Precision()])`. Arguments as of `FabricFP8Precision`."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """As in Fabric, for the one module that this fit trains."""
        self._know_nothing()
        return super().convert_module(module)

    @contextmanager
    def val_step_context(self) -> Iterator[None]:
        """As `eval_precision` says."""
        with self._forward_context(evaluating=True):
            yield

    test_step_context = predict_step_context = val_step_context

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Checks that the optimizers train this model, and can train weights of this dtype; starts the schedule.

        Raises:
            ValueError: An optimizer holds parameters that are not the model's, or releases gradients that the Trainer
                is to clip, accumulate or reduce; or `bf16_last_steps` cannot be counted.
        """
        for optimizer in optimizers:
            check_owns_all(model, optimizer)
            check_release(model, optimizer)
            self._accept(optimizer)
        if optimizers:
            trainer = trainer_of(model)
            self.steps = trainer.global_step
            if self.bf16_last_steps:
                self._last_step = self.total_steps or total_steps(trainer)
                check_total(self.bf16_last_steps, self._last_step)
        return model, optimizers, lr_schedulers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues the schedule at the checkpoint's step, whatever precision it was written in."""
        self.steps = int(checkpoint.get("global_step", 0))
        if type(self).__qualname__ not in checkpoint:
            self.load_state_dict({})
