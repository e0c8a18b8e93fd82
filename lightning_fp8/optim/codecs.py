"""Which codec stores which state of which torch optimizer: one table.

    second moments      power-law E8M0, rounded stochastically; never 0 where they are positive
    first moments       in units of the root of the second moment, where the optimizer has one
    other momentum      companded E4M3, relative to the block's largest

An optimizer that is missing here either is not element-wise or keeps state that a rounding would falsify; `REFUSED`
says which.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.numerics.moments import FP8Moments, decode_v, encode_v
from lightning_fp8.numerics.signed import Signed


class Stored(NamedTuple):
    """A tensor of the stored state: its name and dtype, and whether it has one number a block or an element."""

    name: str
    dtype: torch.dtype
    per_block: bool


class Codec(NamedTuple):
    """How some keys of an optimizer's state are stored.

    Attributes:
        keys: Of the optimizer's own state.
        stored: What is kept instead.
        encode: (values fp32 [n, b], one a key; uniform random numbers fp32 [n, b]) -> what is stored.
        decode: What is stored -> values fp32 [n, b].
    """

    keys: tuple[str, ...]
    stored: tuple[Stored, ...]
    encode: Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]
    decode: Callable[[Sequence[Tensor]], Sequence[Tensor]]


_MOMENTS = (
    Stored("m_codes", torch.uint8, per_block=False),
    Stored("m_scale", torch.uint8, per_block=True),
    Stored("v_codes", torch.uint8, per_block=False),
    Stored("v_max", torch.float32, per_block=True),
    Stored("v_density", torch.uint8, per_block=True),
    Stored("v_split", torch.uint8, per_block=True),
    Stored("v_gap", torch.uint8, per_block=True),
)


def both_moments(first: str, second: str) -> Codec:
    """A first and a second moment, stored as by `FP8AdamW`: 2.06 bytes an element."""
    return Codec(
        (first, second),
        _MOMENTS,
        lambda values, random: FP8Moments.encode(values[0], values[1], random),
        lambda stored: FP8Moments(*stored).decode(),
    )


def moment_and_size(first: str, size: str) -> Codec:
    """A first moment and a size, which is the root of what is stored as the second: Adamax's largest gradient.

    Sizes below 2^-63, whose squares count as 0, lose their momentum.
    """

    def decode(stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        m, v = FP8Moments(*stored).decode()
        return m, v.sqrt()

    return Codec(
        (first, size),
        _MOMENTS,
        lambda values, random: FP8Moments.encode(values[0], values[1].square(), random),
        decode,
    )


def second_moment(key: str) -> Codec:
    """A second moment alone: 1.05 bytes an element."""
    stored = (
        Stored(f"{key}_codes", torch.uint8, per_block=False),
        Stored(f"{key}_max", torch.float32, per_block=True),
        Stored(f"{key}_density", torch.uint8, per_block=True),
        Stored(f"{key}_split", torch.uint8, per_block=True),
        Stored(f"{key}_gap", torch.uint8, per_block=True),
    )
    return Codec(
        (key,),
        stored,
        lambda values, random: encode_v(values[0], random),
        lambda stored: (decode_v(*stored),),
    )


def momentum(key: str) -> Codec:
    """A signed state alone: 1.04 bytes an element."""
    stored = (
        Stored(f"{key}_codes", torch.uint8, per_block=False),
        Stored(f"{key}_max", torch.float32, per_block=True),
        Stored(f"{key}_power", torch.uint8, per_block=True),
    )
    return Codec(
        (key,),
        stored,
        lambda values, random: Signed.encode(values[0]),
        lambda stored: (Signed(*stored).decode(),),
    )


def exact(key: str) -> Codec:
    """State in fp32, as it is: of vectors, and where no codec is asked for."""
    return Codec(
        (key,), (Stored(key, torch.float32, per_block=False),), lambda values, random: values, lambda stored: stored
    )


CODECS: dict[type[Optimizer], tuple[Codec, ...]] = {
    torch.optim.Adam: (both_moments("exp_avg", "exp_avg_sq"),),
    torch.optim.AdamW: (both_moments("exp_avg", "exp_avg_sq"),),
    torch.optim.NAdam: (both_moments("exp_avg", "exp_avg_sq"),),
    torch.optim.RAdam: (both_moments("exp_avg", "exp_avg_sq"),),
    torch.optim.Adamax: (moment_and_size("exp_avg", "exp_inf"),),
    torch.optim.Adagrad: (second_moment("sum"),),
    torch.optim.RMSprop: (second_moment("square_avg"), momentum("momentum_buffer")),
    torch.optim.SGD: (momentum("momentum_buffer"),),
    torch.optim.Muon: (momentum("momentum_buffer"),),
}
WHOLE_MATRICES: tuple[type[Optimizer], ...] = (torch.optim.Muon,)  # a step of one element depends on the others
REFUSED: dict[type[Optimizer], str] = {
    torch.optim.Adadelta: "its second average, of updates, feeds back into itself and has no codec",
    torch.optim.Adafactor: "its second moment is factored already, to less than a byte",
    torch.optim.ASGD: "its average of the weights needs the weights' own precision",
    torch.optim.LBFGS: "it is not element-wise: it keeps whole past gradients",
    torch.optim.Rprop: "its step sizes must be exact: they change by fixed factors",
    torch.optim.SparseAdam: "its state is for sparse gradients",
}
# Options that change what is stored or how, and why each is refused.
REFUSED_OPTIONS = {
    "amsgrad": "a running maximum of rounded values climbs",
    "centered": "a variance of rounded averages may be negative",
    "fused": "a fused kernel reads the state where it lies",
    "capturable": "the step is counted on the host",
    "differentiable": "rounding has no gradient",
}


def check_base(optimizer: Optimizer) -> None:
    """Raises ValueError, saying why, if the state of `optimizer` has no codecs."""
    kind = type(optimizer)
    if kind not in CODECS:
        reason = REFUSED.get(kind, "its state is not known here")
        names = ", ".join(known.__name__ for known in CODECS)
        raise ValueError(f"FP8Optimizer cannot wrap {kind.__name__}: {reason}. It wraps {names}.")


def codecs_for(optimizer: Optimizer, keys: Iterable[str], *, quantized: bool) -> list[Codec]:
    """How state under `keys` of `optimizer` is stored: by the table if it is to be quantised, else as it is."""
    table = [codec for codec in CODECS[type(optimizer)] if quantized and set(codec.keys) <= set(keys)]
    return table + [exact(key) for key in keys if all(key not in codec.keys for codec in table)]


def codecs_in(optimizer: Optimizer, names: Iterable[str]) -> list[Codec]:
    """By which codecs the stored state with these `names` was stored."""
    table = [codec for codec in CODECS[type(optimizer)] if codec.stored[0].name in names]
    return table + [exact(name) for name in names if all(name not in [s.name for s in c.stored] for c in table)]


def incomplete(optimizer: Optimizer, state: dict[str, Any]) -> set[str]:
    """What is missing of the saved `state` of a parameter: the rest of a codec of which there is a part.

    Where something is there that `optimizer` has no codec for, its own state is missing.
    """
    names = {name for name, value in state.items() if isinstance(value, Tensor) and value.dim()}
    missing: set[str] = set()
    for codec in CODECS[type(optimizer)]:
        ways = [{stored.name for stored in codec.stored}, set(codec.keys)]
        begun = [way - names for way in ways if way & names]
        missing |= min(begun, key=len, default=set())
        names -= ways[0] | ways[1]
    return missing or (set(CODECS[type(optimizer)][0].keys) if names else set())
