"""Gradient release: each parameter steps in backward, as soon as its gradient is there, and the gradient is freed.

Gradients then never exist all at once, which saves their 2 bytes a parameter (bf16): 2 + 2.06 are left. In one process
the result is that of `optimizer.step()`, bit for bit, because a parameter's step depends on nothing but itself.

    enable_gradient_release(model, optimizer)
    loss.backward()          # steps every parameter
    optimizer.step()         # nothing is left to do; a closure is run, as Lightning's automatic optimisation needs
    scheduler.step()

What needs all gradients at once cannot work and is refused: accumulation over several backward passes, norm clipping,
DDP (its all-reduce comes after the hooks, so replicas would drift apart). FSDP2 works: its hooks come after the
reduction. A gradient that is not finite skips the step of its parameter alone, on every process that has a shard of
it; agreeing on that takes a collective operation on a scalar for each sharded parameter. Enable it after the model has
been wrapped or sharded.
"""

from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


class StepsParameters(Protocol):
    """An optimizer that can step one parameter."""

    param_groups: list[dict[str, Any]]
    gradient_release: "GradientRelease | None"

    def step_parameter(self, group: int, index: int) -> None:
        """Steps parameter `index` of group number `group`."""

    def register_step_post_hook(self, hook: Any) -> Any:
        """As of `torch.optim.Optimizer`."""


class GradientRelease:
    """What `enable_gradient_release` put in place; `remove()` takes it out again."""

    def __init__(self, model: nn.Module, optimizer: StepsParameters) -> None:
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._places = {
            p: (number, index)
            for number, group in enumerate(optimizer.param_groups)
            for index, p in enumerate(group["params"])
        }
        released = [(name, p) for name, p in model.named_parameters() if p in self._places and p.requires_grad]
        for name, p in released:
            hooks: dict[int, Any] = p._post_accumulate_grad_hooks or {}
            if any(isinstance(getattr(hook, "__self__", None), GradientRelease) for hook in hooks.values()):
                raise ValueError(
                    f"Gradient release is enabled already for {name}; call remove() on the earlier handle first, or two"
                    " optimizers would step it."
                )
        self._names: dict[Tensor, str] = {p: name for name, p in released}
        self._handles = [p.register_post_accumulate_grad_hook(self._on_gradient) for _, p in released]
        self._handles += [
            optimizer.register_step_post_hook(self._on_step),
            model.register_forward_pre_hook(_refuse_active_ddp),
        ]

    def remove(self) -> None:
        """Undoes the release: gradients stay, and `optimizer.step()` steps."""
        for handle in self._handles:
            handle.remove()
        self._optimizer.gradient_release = None

    def check(self, model: nn.Module, *, gradient_clip_val: float | None, accumulate_grad_batches: int) -> None:
        """Refuses what needs all gradients at once, before training starts.

        Args:
            model: As it will be trained, wrappers included.
            gradient_clip_val: The largest norm or value that gradients are to be clipped to.
            accumulate_grad_batches: Backward passes a step.

        Raises:
            ValueError: Gradients are clipped or accumulated, or the model is in DDP or FSDP1.
        """
        _refuse_wrappers(model)
        if gradient_clip_val:
            raise ValueError(
                f"Gradient release cannot clip gradients (gradient_clip_val={gradient_clip_val}): they are gone before"
                " the last one is known. Leave gradient_clip_val out, or do not enable gradient release."
            )
        if accumulate_grad_batches > 1:
            raise ValueError(
                f"Gradient release cannot accumulate gradients (accumulate_grad_batches={accumulate_grad_batches}):"
                " every backward pass steps. Use larger batches, or do not enable gradient release."
            )

    def _on_gradient(self, p: Tensor) -> None:
        if p in self._stepped:
            raise ValueError(
                f"Gradient release: {self._names[p]} got a second gradient before optimizer.step(). Gradients cannot"
                " be accumulated; call optimizer.step() after each backward pass."
            )
        self._stepped.add(p)
        self._optimizer.step_parameter(*self._places[p])
        p.grad = None

    def _on_step(self, *_: Any) -> None:
        self._stepped.clear()


def enable_gradient_release(model: nn.Module, optimizer: StepsParameters) -> GradientRelease:
    """Lets `optimizer` step each parameter of `model` in backward and frees its gradient; see the module docstring.

    Args:
        model: Wrapped or sharded already, where it will be.
        optimizer: `FP8AdamW` or `FP8Optimizer`. Parameters of it that are not the model's are stepped by `step()`.

    Returns:
        A handle, also found as `optimizer.gradient_release`; `remove()` undoes the release. A copied or unpickled
        optimizer has no release.

    Raises:
        ValueError: The model is in DDP or FSDP1, the optimizer cannot step one parameter, or the model's gradients are
            released already.
    """
    _refuse_wrappers(model)
    if not hasattr(optimizer, "step_parameter"):
        raise ValueError(
            f"Gradient release needs an optimizer that can step one parameter, and {type(optimizer).__name__} cannot:"
            " use lightning_fp8.optim.FP8AdamW."
        )
    optimizer.gradient_release = GradientRelease(model, optimizer)
    return optimizer.gradient_release


def _refuse_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            raise _refusal(type(module).__name__)


def _refuse_active_ddp(module: nn.Module, args: Any) -> None:
    """A hook before each forward pass, because the model may have been wrapped after the release was enabled."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise _refusal("DistributedDataParallel")


def _refusal(wrapper: str) -> ValueError:
    return ValueError(
        f"Gradient release does not work with {wrapper}: gradients are used before they are reduced, so replicas would"
        " drift apart. Shard with fully_shard (FSDP2, ModelParallelStrategy), or do not enable gradient release."
    )
