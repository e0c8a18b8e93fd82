"""Clipping that follows the gradients of the run instead of a limit that is fixed before it.

A fixed limit on the norm is too high for most of a run, in which norms fall, and so lets spikes through. These two know
what is usual and cut what is not:

ZClip (Kumar et al., arXiv 2504.02507), one number for all gradients. With the norm n, running mean mu and deviation s:

    z = (n - mu) / s;    where z > z0:  n* = mu + s z0^2 / z,  else n* = n;    gradients <- gradients n* / n
    mu <- alpha mu + (1 - alpha) n*;    s^2 <- alpha s^2 + (1 - alpha) (n* - mu)^2

The further out, the harder the cut: down towards mu. The first `warmup_steps` norms give mu and s, uncut.

AdaGC (Wang et al., arXiv 2502.11034), one number a tensor, because spikes begin in one. With norms n_i, averages c_i:

    warm-up:  gradients <- gradients min(1, absolute / |all|);  c_i <- min(c_i, n_i*)
    after:    g_i <- g_i min(1, relative c_i / n_i);            c_i <- beta c_i + (1 - beta) n_i*

n* being the norm after the cut. Nothing is read by the host. Gradients that are not finite are left as they are, for
the optimizer to leave the step out, and the averages do not see them; AdaGC's do not see a norm of 0 either, which says
nothing of the next. Both need all gradients at once: not with gradient release. Sharded gradients count as a whole.

    clip = ZClip();  ...  loss.backward();  clip.clip(model.parameters());  optimizer.step()      # in any loop
    fabric.save(path, {..., "clip": clip})                                                        # state_dict

With the Trainer, `callbacks.AdaptiveClipping` does both.

`clip_grad_norm` is the fixed limit without its pass over all gradients: the step of `FP8AdamW` multiplies them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_fp8.optim.adamw import FP8AdamW
from lightning_fp8.optim.shards import local_part


@torch.no_grad()
def clip_grad_norm(optimizer: FP8AdamW, max_norm: float) -> Tensor:
    """Limits the norm of all gradients of `optimizer` in its next step, as torch's `clip_grad_norm_` would.

    The gradients stay as they are, and are multiplied by min(1, max_norm / (norm + 1e-6)) where the step reads them, in
    fp32. That saves 4 of 14 bytes a parameter that go through memory, and a rounding of bf16 gradients.

    Args:
        optimizer: Its step comes next; `optimizer.zero_grad()` withdraws the limit.
        max_norm: The largest norm.

    Returns:
        The norm, an fp32 scalar on the device of the gradients.

    Raises:
        ValueError: There is no gradient, or `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm {max_norm} must be above 0.")
    norm = _norms(_gradients(p for group in optimizer.param_groups for p in group["params"])).square().sum().sqrt()
    optimizer.grad_factor = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    return norm


class Clipping(Protocol):
    """What clips gradients and remembers what is usual."""

    def clip(self, params: Iterable[Tensor]) -> Tensor:
        """Clips the gradients in place; returns their norm before."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""


class ZClip:
    """Clips the norm of all gradients where it stands out; see the module's docstring. Costs some 30 operations a step.

    Args:
        alpha: Decay of the mean and the variance.
        z_threshold: Deviations above the mean from which on norms are cut.
        warmup_steps: Norms of which the first mean and variance are made.
    """

    def __init__(self, alpha: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25) -> None:
        if not 0 <= alpha < 1 or z_threshold <= 0 or warmup_steps < 2:
            raise ValueError(
                f"ZClip: alpha {alpha} must be in [0, 1), z_threshold {z_threshold} more than 0, warmup_steps"
                f" {warmup_steps} at least 2."
            )
        self.alpha, self.z_threshold, self.warmup_steps = alpha, z_threshold, warmup_steps
        self._state = torch.zeros(3)

    @torch.no_grad()
    def clip(self, params: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `params` in place; returns their norm before, an fp32 scalar on the device."""
        grads = _gradients(params)
        norm = _norms(grads).square().sum().sqrt()
        self._state, factor = self.next(self._state.to(norm.device), norm)
        torch._foreach_mul_([local_part(grad) for grad in grads], factor)
        return norm

    def next(self, state: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The state after a step, and the factor of its gradients.

        Args:
            state: Number of norms seen, mean, variance: [3].
            norm: Of all gradients, a scalar.
        """
        seen, mean, variance = state.unbind()
        warm, finite = seen < self.warmup_steps, norm.isfinite()
        z = (norm - mean) / (variance.sqrt() + 1e-6)
        cut = mean + variance.sqrt() * self.z_threshold**2 / z
        clipped = torch.where(~warm & (z > self.z_threshold), cut, norm)
        rate = torch.where(warm, 1 / (seen + 1), 1 - self.alpha)
        new_mean = mean + rate * (clipped - mean)
        # While warm the sum of squares about the moving mean (Welford); then about the new mean, as the paper has it.
        spread = (clipped - new_mean) * torch.where(warm, clipped - mean, clipped - new_mean)
        new_variance = (1 - rate) * variance + rate * spread
        after = torch.stack([seen + 1, new_mean, new_variance])
        return torch.where(finite, after, state), torch.where(finite & (norm > 0), clipped / norm, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Number of norms seen, mean and variance."""
        return {"state": self._state.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._state = state_dict["state"].clone()


class AdaGC:
    """Clips the norm of each gradient where it stands out; see the module's docstring.

    Args:
        relative: Of its average, what a norm may be.
        beta: Decay of the averages.
        absolute: What the norm of all gradients may be during warm-up.
        warmup_steps: Steps of it.
    """

    def __init__(
        self, relative: float = 1.05, beta: float = 0.98, absolute: float = 1.0, warmup_steps: int = 100
    ) -> None:
        if relative <= 0 or not 0 <= beta < 1 or absolute <= 0 or warmup_steps < 1:
            raise ValueError(
                f"AdaGC: relative {relative} and absolute {absolute} must be more than 0, beta {beta} in [0, 1),"
                f" warmup_steps {warmup_steps} at least 1."
            )
        self.relative, self.beta, self.absolute, self.warmup_steps = relative, beta, absolute, warmup_steps
        self._averages = torch.empty(0)  # infinite where nothing was seen
        self._steps = 0

    @torch.no_grad()
    def clip(self, params: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `params`, always the same ones, in place; returns the norm of all before."""
        params = list(params)
        with_grad = [i for i, p in enumerate(params) if p.grad is not None]
        grads = _gradients(params)
        norms = _norms(grads)
        if len(self._averages) != len(params):
            self._averages = torch.full((len(params),), torch.inf, device=norms.device)
        self._averages = self._averages.to(norms.device)
        whole = len(with_grad) == len(params)
        averages = self._averages if whole else torch.stack([self._averages[i] for i in with_grad])
        averages, factors = self.next(averages, norms, warm=self._steps < self.warmup_steps)
        if whole:
            self._averages = averages
        else:
            for i, average in zip(with_grad, averages.unbind(), strict=True):
                self._averages[i] = average
        self._steps += 1
        torch._foreach_mul_([local_part(grad) for grad in grads], list(factors.unbind()))
        return norms.square().sum().sqrt()

    def next(self, averages: Tensor, norms: Tensor, *, warm: bool) -> tuple[Tensor, Tensor]:
        """The averages after a step, and the factors of its gradients; all [n], of n gradients."""
        if warm:
            total = norms.square().sum().sqrt()
            factors = torch.where(total > self.absolute, self.absolute / total, 1.0).expand_as(norms)
        else:
            factors = torch.where(norms > self.relative * averages, self.relative * averages / norms, 1.0)
        factors = torch.where(norms.isfinite().all(), factors, 1.0)
        clipped = norms * factors
        known = averages.isfinite()
        moved = torch.minimum(averages, clipped) if warm else self.beta * averages + (1 - self.beta) * clipped
        after = torch.where(known, moved, clipped)
        return torch.where(norms.isfinite().all() & (norms > 0), after, averages), factors

    def state_dict(self) -> dict[str, Any]:
        """The averages, one a parameter, and the number of steps."""
        return {"averages": self._averages.clone(), "steps": self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._averages, self._steps = state_dict["averages"].clone(), state_dict["steps"]


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        raise ValueError("There is no gradient to clip: call clip() after backward(), and not with gradient release.")
    return grads


def _norms(grads: Sequence[Tensor]) -> Tensor:
    """The norm of each gradient, of all its shards: fp32 [n]."""
    if not any(isinstance(grad, DTensor) for grad in grads):
        return torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32))
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])
