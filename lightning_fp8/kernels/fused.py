"""Norms and activations that write FP8: RMSNorm and SwiGLU's product, each with the cast of its result.

    gated_cast     silu(gate) * up            4 bytes read an element of bf16 a pass, and only codes written
    normed_cast    x * rstd * gain            2 bytes read a pass; rstd is kept for backward

How many passes there are is told in `triton/tensor.py`, `tiles.py` and `norm.py`: one under delayed scaling, and one
for SwiGLU's pieces of 1 x 128. Under current scaling the scale of a tensor needs all of it, hence two: the first finds
the amax, the second makes the numbers again rather than read a copy, which would have had to be written as well.

Results are those of the plain operations in x's dtype, cast. On a GPU silu may differ by a unit in the last place of
fp32, and rstd with the order of its sum, before they are rounded; codes are the cast of what results, bit for bit.
Scales by row have no kernel: a column's amax, too, needs all of it, and the plain way is hardly longer.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8 import hardware
from lightning_fp8.kernels.cast import Cast, cast, collect, fill_by_reference
from lightning_fp8.kernels.outputs import WHOLE, Outputs, allocate
from lightning_fp8.numerics import FORMATS, Format
from lightning_fp8.numerics.quantize import Tile

_TILES_WITH_KERNELS = (WHOLE, (1, 128), (1, 32))


class Normed(NamedTuple):
    """What RMSNorm leaves.

    Attributes:
        values: [M, K] in x's dtype; without elements if they were not asked for.
        rstd: fp32 [M, 1], 1 / sqrt(mean(x^2) + eps).
        cast: Of the values.
    """

    values: Tensor
    rstd: Tensor
    cast: Cast


@torch.no_grad()
def gated_cast(
    gate: Tensor,
    up: Tensor,
    fmt: Format,
    tile: Tile | None = None,
    *,
    rows: bool = False,
    columns: bool = False,
    power_of_two: bool = False,
    remembered: Tensor | None = None,
) -> Cast:
    """Casts silu(gate) * up, as `kernels.cast` does.

    Args:
        gate: [M, K] in bf16, fp16 or fp32.
        up: The same.
        fmt: The target format.
        tile: See `kernels.cast`, as for the rest.
        rows: Whether `Cast.rows` is wanted.
        columns: Whether `Cast.columns` is wanted.
        power_of_two: Round scales up to powers of two.
        remembered: The decode scale to use.
    """
    tile = tile or WHOLE
    how = {"rows": rows, "columns": columns, "power_of_two": power_of_two, "remembered": remembered}
    if not _has_kernel(gate, tile):
        return cast(gated(gate, up), fmt, tile, **how)  # type: ignore[arg-type]
    given = gate.contiguous(), up.contiguous(), remembered, fmt.name, *tile, power_of_two, rows, columns
    return collect(Outputs(*torch.ops.lightning_fp8.gated_cast(*given)), tile, rows, columns)


@torch.no_grad()
def normed_cast(
    x: Tensor,
    gain: Tensor,
    eps: float,
    fmt: Format,
    tile: Tile | None = None,
    *,
    rows: bool = False,
    columns: bool = False,
    power_of_two: bool = False,
    remembered: Tensor | None = None,
    values: bool = False,
) -> Normed:
    """RMSNorm over dimension 1, and the cast of its result.

    Args:
        x: [M, K] in bf16, fp16 or fp32.
        gain: [K] in x's dtype.
        eps: Is added to the mean square.
        fmt: The target format.
        tile: See `kernels.cast`, as for the rest.
        rows: Whether `Cast.rows` is wanted.
        columns: Whether `Cast.columns` is wanted.
        power_of_two: Round scales up to powers of two.
        remembered: The decode scale to use.
        values: Whether the result is wanted in x's dtype, too.
    """
    tile = tile or WHOLE
    if not _has_kernel(x, tile):
        y, rstd = normed(x, gain, eps)
        how = {"rows": rows, "columns": columns, "power_of_two": power_of_two, "remembered": remembered}
        return Normed(y, rstd, cast(y, fmt, tile, **how))  # type: ignore[arg-type]
    given = x.contiguous(), gain.contiguous(), eps, remembered, fmt.name, *tile, power_of_two, rows, columns, values
    y, rstd, *made = torch.ops.lightning_fp8.normed_cast(*given)
    return Normed(y, rstd, collect(Outputs(*made), tile, rows, columns))


def _has_kernel(x: Tensor, tile: Tile) -> bool:
    """Which of the two runs is decided here and nowhere else."""
    return x.is_cuda and tile in _TILES_WITH_KERNELS and hardware.runs_kernels()


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product in plain torch."""
    return F.silu(gate) * up


def normed(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm's result [M, K] and rstd [M, 1] in plain torch: the bits of `F.rms_norm`, which keeps rstd to itself."""
    rstd = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (gain.float() * (rstd * x.float())).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x [..., K] and gain [K]; torch's kernel where it has one, else its operations once more."""
    if x.is_cuda:
        rstd = rstd.view(*x.shape[:-1], 1)
        dx, dgain = torch.ops.aten._fused_rms_norm_backward(dy, x, gain.shape, rstd, gain, [True, True])
        return dx, dgain
    with torch.enable_grad():
        x, gain = x.detach().requires_grad_(), gain.detach().requires_grad_()
        dx, dgain = torch.autograd.grad(F.rms_norm(x, gain.shape, gain, eps), (x, gain), dy)
        return dx, dgain


_CAST = "str format, int? tile_rows, int? tile_columns, bool power_of_two, bool rows, bool columns"
_OUTPUTS = "Tensor rows, Tensor columns, Tensor row_scale, Tensor column_scale, Tensor amax"
for _name, _given, _made in (
    ("gated_cast", f"Tensor gate, Tensor up, Tensor? remembered, {_CAST}", _OUTPUTS),
    (
        "normed_cast",
        f"Tensor x, Tensor gain, float eps, Tensor? remembered, {_CAST}, bool values",
        f"Tensor values, Tensor rstd, {_OUTPUTS}",
    ),
):
    _signature = f"({_given}) -> ({_made})"
    torch.library.define(f"lightning_fp8::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)


class _How(NamedTuple):
    """The operators' last arguments."""

    remembered: Tensor | None
    format: str
    tile_rows: int | None
    tile_columns: int | None
    power_of_two: bool
    rows: bool
    columns: bool

    def allocate(self, x: Tensor) -> Outputs:
        return allocate(x, FORMATS[self.format], self.tile, self.rows, self.columns)

    @property
    def tile(self) -> Tile:
        return self.tile_rows, self.tile_columns

    @property
    def cast(self) -> tuple[Format, Tile, bool, Tensor | None]:
        return FORMATS[self.format], self.tile, self.power_of_two, self.remembered


def _room_for_normed(x: Tensor, values: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if values else x.new_empty(0), x.new_empty((x.shape[0], 1), dtype=torch.float32)


# Operators' schemas, not these signatures, name the arguments: what follows the tensors is `_How`, in its order.
def _fake_gated(gate: Tensor, up: Tensor, *how: object) -> Outputs:
    return _How(*how).allocate(gate)  # type: ignore[arg-type]


def _fake_normed(x: Tensor, gain: Tensor, eps: float, *how: object) -> tuple[Tensor, ...]:
    return *_room_for_normed(x, bool(how[-1])), *_How(*how[:-1]).allocate(x)  # type: ignore[arg-type]


def _gated_by_reference(gate: Tensor, up: Tensor, *how: object) -> Outputs:
    given = _How(*how)  # type: ignore[arg-type]
    outputs = given.allocate(gate)
    fill_by_reference(gated(gate, up), *given.cast, outputs)
    return outputs


def _normed_by_reference(x: Tensor, gain: Tensor, eps: float, *how: object) -> tuple[Tensor, ...]:
    given = _How(*how[:-1])  # type: ignore[arg-type]
    outputs = given.allocate(x)
    y, rstd = normed(x, gain, eps)
    fill_by_reference(y, *given.cast, outputs)
    return y if how[-1] else x.new_empty(0), rstd, *outputs


def _gated_by_kernel(gate: Tensor, up: Tensor, *how: object) -> Outputs:
    from lightning_fp8.kernels.triton.launch import launch_gated

    if not gate.numel():
        return _gated_by_reference(gate, up, *how)
    given = _How(*how)  # type: ignore[arg-type]
    outputs = given.allocate(gate)
    with hardware.device_of(gate):
        launch_gated(gate, up, *given.cast, outputs)
    return outputs


def _normed_by_kernel(x: Tensor, gain: Tensor, eps: float, *how: object) -> tuple[Tensor, ...]:
    from lightning_fp8.kernels.triton.launch import launch_normed

    if not x.numel():
        return _normed_by_reference(x, gain, eps, *how)
    given = _How(*how[:-1])  # type: ignore[arg-type]
    values, rstd = _room_for_normed(x, bool(how[-1]))
    outputs = given.allocate(x)
    with hardware.device_of(x):
        launch_normed(x, gain, eps, *given.cast, values, rstd, outputs)
    return values, rstd, *outputs


torch.library.register_fake("lightning_fp8::gated_cast", _fake_gated)
torch.library.register_fake("lightning_fp8::normed_cast", _fake_normed)
torch.library.impl("lightning_fp8::gated_cast", "cpu", _gated_by_reference)
torch.library.impl("lightning_fp8::normed_cast", "cpu", _normed_by_reference)
torch.library.impl("lightning_fp8::gated_cast", "cuda", _gated_by_kernel)
torch.library.impl("lightning_fp8::normed_cast", "cuda", _normed_by_kernel)
