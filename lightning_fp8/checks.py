"""What the precision plugins ask of optimizers and trainers before it is too late: each answer is one line.

An optimizer of other parameters trains nothing and says nothing; bf16 weights rounded to nearest lose most of what a
small learning rate adds; a schedule that ends in bf16 has to know where the end is.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer


def check_converted(model: nn.Module, converted: Collection[str], kept: Mapping[str, str]) -> None:
    """Asks for one linear layer at least that runs in FP8.

    Args:
        model: What was converted.
        converted: Names of the layers that run in FP8.
        kept: Name -> reason, of the others.

    Raises:
        ValueError: There is none.
    """
    if converted:
        return
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    examples = {kept[name]: name for name in reversed(linears)}
    reasons = "; ".join(f"{name}: {reason}" for reason, name in list(examples.items())[::-1][:3])
    raise ValueError(
        f"FP8Precision: {type(model).__name__} has no linear layer that can run in FP8"
        f" ({reasons or 'it has no torch.nn.Linear'}). Remove the plugin, or widen what it may convert."
    )


def check_owns_all(model: nn.Module, optimizer: Optimizer) -> None:
    """For the Trainer, whose model is all there is.

    Raises:
        ValueError: The optimizer holds a parameter that is not the model's.
    """
    if not _ids(optimizer) <= {id(p) for p in model.parameters()}:
        raise ValueError(
            f"FP8Precision: {type(optimizer).__name__} holds parameters that are not the model's, so training"
            " would change nothing. Build it in configure_optimizers from self.parameters()."
        )


def check_owns_some(modules: Collection[nn.Module], optimizer: Optimizer) -> None:
    """For Fabric, where an optimizer may train other things as well.

    Raises:
        ValueError: The optimizer holds no parameter of any of the modules.
    """
    if modules and _ids(optimizer).isdisjoint(id(p) for module in modules for p in module.parameters()):
        raise ValueError(
            f"FP8Precision: {type(optimizer).__name__} holds no parameter of a model that was set up, so training"
            " would change nothing. Build it from the parameters of the model that fabric.setup returned."
        )


def trained_layers(modules: Iterable[nn.Module], optimizer: Any, known: Iterable[Optimizer]) -> Iterator[nn.Module]:
    """The layers for which a step of `optimizer` ends a step: where several take turns, each has layers of its own.

    These are the layers whose weights it holds and, in the models that it trains, those whose frozen weights no `known`
    optimizer holds (what another one holds may be frozen for this turn alone, as in a GAN). Optimizers of strategies
    that are none of torch's end the step of all layers.
    """
    if not isinstance(optimizer, Optimizer):
        for module in modules:
            yield from module.modules()
        return
    held, held_by_any = _ids(optimizer), {key for other in known for key in _ids(other)}
    for module in modules:
        if held.isdisjoint(id(p) for p in module.parameters()):
            continue
        for layer in module.modules():
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, nn.Parameter):
                continue
            if id(weight) in held or not (weight.requires_grad or id(weight) in held_by_any):
                yield layer


def warn_of_rounding(weights: str, optimizer: Optimizer) -> None:
    """Warns where bf16 weights meet an optimizer that rounds them to nearest."""
    rounds = all(group.get("rounding", "nearest") != "nearest" for group in optimizer.param_groups)
    if weights == "bf16" and not rounds:
        rank_zero_warn(
            f"FP8Precision: the weights are bf16 and {type(optimizer).__name__} rounds them to nearest, which"
            ' loses small updates. Use lightning_fp8.optim.FP8AdamW, or FP8Precision(weights="fp32").'
        )


def check_release(model: nn.Module, optimizer: Optimizer) -> None:
    """Checks an optimizer that steps in backward against what the Trainer is to do with the gradients.

    Raises:
        ValueError: It is to clip, accumulate or reduce them.
    """
    release = getattr(optimizer, "gradient_release", None)  # of lightning_fp8.optim, which this need not know
    if release is not None:
        trainer = trainer_of(model)
        release.check(
            model, gradient_clip_val=trainer.gradient_clip_val, accumulate_grad_batches=_accumulation(trainer)
        )


def check_total(bf16_last_steps: int, total: int | None) -> None:
    """Checks that the end of a schedule is known.

    Raises:
        ValueError: It is not, and there is something to do at the end.
    """
    if bf16_last_steps and total is None:
        raise ValueError(
            "FP8Precision: bf16_last_steps needs to know how many optimizer steps there will be."
            " Set max_steps or max_epochs of the Trainer or, with Fabric, total_steps of the plugin."
        )


def total_steps(trainer: Trainer) -> int | None:
    """How many optimizer steps the Trainer will make; None if it cannot tell."""
    total = trainer.estimated_stepping_batches
    return int(total) if 0 <= total < math.inf else None


def trainer_of(model: nn.Module) -> Trainer:
    """The Trainer of a LightningModule, which DDP may have wrapped."""
    wrapped: Any = model
    module = model if isinstance(model, LightningModule) else wrapped.module
    trainer: Trainer = module.trainer
    return trainer


def _accumulation(trainer: Trainer) -> int:
    """The largest number of batches a step, of all epochs."""
    schedules = [c.scheduling for c in cast(Any, trainer).callbacks if isinstance(c, GradientAccumulationScheduler)]
    return max(trainer.accumulate_grad_batches, *(n for schedule in schedules for n in schedule.values()), 1)


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
