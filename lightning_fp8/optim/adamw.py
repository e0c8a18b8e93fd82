"""AdamW whose moments are one byte each, for weights that have no fp32 master copy.

Per step and parameter, all arithmetic in fp32 (Loshchilov & Hutter, "Decoupled Weight Decay Regularization"):

    w <- w * (1 - lr * weight_decay)
    m <- beta1 * m + (1 - beta1) * g              v <- beta2 * v + (1 - beta2) * g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

The update uses the fresh m and v; only what is stored is quantised (`numerics/moments.py`), and a bf16 weight is
rounded stochastically (`numerics/rounding.py`). Bytes a parameter, weights and gradients in bf16: 2 + 2 + 2.07, where
fp32 moments make it 2 + 2 + 8.

The step is a function on blocks, `step_blocks`; the class owns state, order and names. Parameters of one group are
packed into common blocks, a bounded chunk at a time (`blocks.py`), so a step is a fixed number of tensor operations a
chunk.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.numerics.moments import FP8Moments, FP32Moments
from lightning_fp8.numerics.rounding import parameter_key, random_bits, row_keys, stochastic_round_bf16
from lightning_fp8.optim import blocks, shards
from lightning_fp8.optim.groups import parameter_name
from lightning_fp8.optim.ledger import Ledger, measure_ledger
from lightning_fp8.optim.release import GradientRelease
from lightning_fp8.optim.state import load_exactly

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Moments = FP8Moments | FP32Moments

_PER_BLOCK = ("m_scale", "v_max", "v_octaves")  # state with one number a block; all other has one an element
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # temporaries that stay in a CPU's caches, or fill a GPU


class Hyper(NamedTuple):
    """The numbers of one step of one group."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class _Member(NamedTuple):
    """One parameter of a step: its plain name, and what this process holds of it, outside autograd."""

    name: str
    place: shards.Place
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]


class FP8AdamW(Optimizer):
    """AdamW with both moments in FP8 and stochastic rounding of bf16 weights.

    State of a parameter with at least 64 columns, seen as [R, C]: `m_codes` and `v_codes`, uint8 of the parameter's
    shape; `m_scale` uint8, `v_max` and `v_octaves` fp32, [R, ceil(C / block_size)]. Of any other parameter: `m` and
    `v` in fp32. In all cases `step`, an int64 scalar.

    Args:
        params: Parameters, (name, parameter) pairs or groups of either. Names key the random bits, so that they
            depend neither on the order of the parameters nor on how they are grouped; without them the position does.
        lr: Learning rate, a float or a scalar tensor.
        betas: Decay of the first and the second moment; may change from step to step.
        eps: Added to the denominator.
        weight_decay: Decoupled; a weight shrinks by lr * weight_decay a step.
        moments: "fp8", or "fp32" for comparison. May differ between groups.
        block_size: Elements that share the scales of their moments.
        rounding: How bf16 weights are rounded: "stochastic" or "nearest". fp32 weights need none.
        seed: Of the random bits.

    Raises:
        ValueError: An argument is out of range, or a parameter is neither bf16 nor fp32, or not contiguous.

    Caveats:
        A step's results are the same, bit for bit, for the same device, dtype and torch version only.
    """

    gradient_release: GradientRelease | None = None  # set by `enable_gradient_release`

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: Literal["fp8", "fp32"] = "fp8",
        block_size: int = 128,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "block_size": block_size,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and the gradients; always called if given.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            self._step_group(number, range(len(group["params"])))
        return loss

    @torch.no_grad()
    def step_parameter(self, group: int, index: int) -> None:
        """One step for parameter `index` of group number `group`, if it has a gradient: for gradient release."""
        self._step_group(group, [index])

    def _step_group(self, number: int, indices: Iterable[int]) -> None:
        """Steps those parameters of a group that have a gradient."""
        group = self.param_groups[number]
        params = group["params"]
        members = [
            _Member(
                parameter_name(group, number, i),
                shards.place_of(params[i]),
                shards.local_part(params[i]),
                shards.local_gradient(params[i]),
                self._state_of(params[i], group),
            )
            for i in indices
            if params[i].grad is not None
        ]
        for batch in _alike(members):
            _step_batch(batch, group)

    def memory(self) -> Ledger:
        """Bytes a parameter of weights, gradients, moments and scales, measured on the storages of this process."""
        return measure_ledger((p for group in self.param_groups for p in group["params"]), [self])

    def allocate(self) -> None:
        """Creates the state of every parameter that has none, as its first step would."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and not self.state[p]:
                    self.state[p].update(new_state(p, group))

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What this process holds of the state of `p`, created at its first step, with the step counted."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state.update(new_state(p, group))
        state["step"] += 1
        return {name: shards.local_part(value) for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict with every code and scale exactly as it was saved; see `state.py`.

        Raises:
            ValueError: It is the state of another optimizer.
        """
        if any("exp_avg" in state for state in state_dict["state"].values()):
            raise ValueError(
                "FP8AdamW: this is the state of torch.optim.AdamW; optim.import_adamw_state takes it over."
            )
        load_exactly(self, state_dict, super().load_state_dict)


def step_blocks(
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    bits: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    hyper: Hyper,
    stochastic: bool,
) -> tuple[Tensor, Moments]:
    """The step of n blocks of b elements: the formulas of the module docstring.

    Args:
        weight: bf16 or fp32 [n, b].
        grad: bf16 or fp32 [n, b].
        moments: What was stored of them after the last step.
        bits: int32 [n, b] random bits; the low half rounds the weight, the high half the second moment.
        correction1: fp32 [n, 1], 1 - beta1^t.
        correction2: fp32 [n, 1], 1 - beta2^t.
        hyper: Scalars.
        stochastic: Round a bf16 weight stochastically.

    Returns:
        The new weight, of the dtype of `weight`, and what to store of the new moments.
    """
    g = grad.float()
    m, v = moments.decode()
    m = m * hyper.beta1 + g * (1 - hyper.beta1)
    v = v * hyper.beta2 + g * g * (1 - hyper.beta2)
    update = (m / correction1) / ((v / correction2).sqrt() + hyper.eps)
    new_weight = weight.float() * (1 - hyper.lr * hyper.weight_decay) - update * hyper.lr
    if weight.dtype is torch.bfloat16:
        new_weight = stochastic_round_bf16(new_weight, bits) if stochastic else new_weight.to(torch.bfloat16)
    uniform = ((bits >> 16) & 0xFFFF).float() * 2.0**-16
    return new_weight, moments.encode(m, v, uniform)


def _step_batch(batch: list[_Member], group: dict[str, Any]) -> None:
    """Steps parameters of one kind, a bounded chunk of their rows at a time."""
    size, stochastic = group["block_size"], group["rounding"] == "stochastic"
    hyper = Hyper(group["lr"], group["betas"][0], group["betas"][1], group["eps"], group["weight_decay"])
    places = [member.place for member in batch]
    shapes = tuple(place.shape for place in places)
    weights = [member.weight.view(shape) for member, shape in zip(batch, shapes, strict=True)]
    grads = [member.grad.reshape(shape) for member, shape in zip(batch, shapes, strict=True)]
    kind = FP8Moments if "m_codes" in batch[0].state else FP32Moments
    states = {
        name: [member.state[name].view(rows, -1) for member, (rows, _) in zip(batch, shapes, strict=True)]
        for name in kind._fields
    }
    device = weights[0].device
    keys = torch.tensor([parameter_key(group["seed"], member.name) for member in batch], dtype=torch.int32)
    steps = torch.stack([member.state["step"] for member in batch])
    corrections = torch.stack([1 - beta ** steps.double() for beta in group["betas"]], dim=1).float().to(device)
    keys, counts = keys.to(device), steps.to(device, torch.int32)
    lanes = torch.arange(size, dtype=torch.int32, device=device)
    for rows in blocks.chunks(shapes, _CHUNK_ELEMENTS.get(device.type, 1 << 24)):
        owner, row, first_column = shards.positions(rows, places, size, device)
        bits = random_bits(row_keys(keys[owner], counts[owner], row), first_column + lanes)
        stored = [blocks.gather(t, rows, 1 if name in _PER_BLOCK else size) for name, t in states.items()]
        weight, moments = step_blocks(
            blocks.gather(weights, rows, size),
            blocks.gather(grads, rows, size),
            kind(*stored),
            bits,
            corrections[owner, :1],
            corrections[owner, 1:],
            hyper,
            stochastic,
        )
        blocks.scatter(weight, weights, rows)
        for tensors, value in zip(states.values(), moments, strict=True):
            blocks.scatter(value, tensors, rows)


def _alike(members: list[_Member]) -> list[list[_Member]]:
    """Splits parameters into batches that can be packed together: same device, dtypes and kind of moments.

    Empty parameters are left out: they have nothing to step, and no rows to pack.
    """
    batches: dict[Any, list[_Member]] = {}
    for member in filter(lambda member: member.weight.numel(), members):
        kind = (member.weight.device, member.weight.dtype, member.grad.dtype, "m_codes" in member.state)
        batches.setdefault(kind, []).append(member)
    return list(batches.values())


def new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of parameter `p` of `group` before its first step, cut as `p` is."""
    step = {"step": torch.zeros((), dtype=torch.int64, device=p.device)}
    if group["moments"] != "fp8" or not blocks.is_matrix(p.shape):
        return step | FP32Moments(*(shards.new_elements(p, torch.float32) for _ in "mv"))._asdict()
    size = group["block_size"]
    moments = FP8Moments(
        m_codes=shards.new_elements(p, torch.uint8),
        m_scale=shards.new_scales(p, size, torch.uint8) + 1,
        v_codes=shards.new_elements(p, torch.uint8),
        v_max=shards.new_scales(p, size, torch.float32),
        v_octaves=shards.new_scales(p, size, torch.float32),
    )
    return step | moments._asdict()


def _check_group(group: dict[str, Any]) -> None:
    """Raises ValueError naming the field, what it is and what it may be."""
    choices = {"moments": ("fp8", "fp32"), "rounding": ("stochastic", "nearest")}
    for name, allowed in choices.items():
        if group[name] not in allowed:
            raise ValueError(f"FP8AdamW: {name} {group[name]!r} is not one of {', '.join(allowed)}.")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"FP8AdamW: {name} is {group[name]}; it must be 0 or more.")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"FP8AdamW: betas are {group['betas']}; both must be in [0, 1).")
    if group["block_size"] < 1:
        raise ValueError(f"FP8AdamW: block_size is {group['block_size']}; it must be 1 or more.")
    for p in group["params"]:
        if p.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"FP8AdamW: a parameter is {p.dtype}; weights must be bfloat16 or float32.")
        if not p.is_contiguous():
            raise ValueError(f"FP8AdamW: a parameter of shape {tuple(p.shape)} is not contiguous; make it so first.")
