"""The operators of casts fused with a norm or an activation, and their reference; see `compute/test_fused.py`."""

import pytest
import torch
from torch.nn import functional as F

from lightning_fp8.kernels import cast
from lightning_fp8.kernels.fused import gated_cast, normed, normed_cast
from lightning_fp8.kernels.outputs import WHOLE
from lightning_fp8.numerics import E4M3

HOW = [
    (None, "e4m3", None, None, False, True, True),
    (torch.tensor(0.5), "e5m2", None, None, True, True, False),
    (None, "e4m3", 1, 128, False, False, True),
]


@pytest.mark.parametrize("how", HOW, ids=["current", "delayed", "1x128"])
def test_operators_are_what_torch_expects_of_them(how):
    x, y, gain = torch.randn(40, 70).bfloat16(), torch.randn(40, 70).bfloat16(), torch.randn(70).bfloat16()
    torch.library.opcheck(torch.ops.lightning_fp8.gated_cast, (x, y, *how))
    for values in (False, True):
        torch.library.opcheck(torch.ops.lightning_fp8.normed_cast, (x, gain, 1e-5, *how, values))


@pytest.mark.parametrize("tile", [WHOLE, (1, None), (1, 128), (1, 32)], ids=str)
@pytest.mark.parametrize("shape", [(40, 130), (0, 64), (1, 1)], ids=str)
@pytest.mark.parametrize("by_operator", [False, True])
def test_the_reference_is_the_plain_operations_cast(monkeypatch, tile, shape, by_operator):
    """The operators' CPU implementations stand in for kernels: what lies around them is the same on a GPU."""
    if by_operator:
        monkeypatch.setattr("lightning_fp8.kernels.fused._has_kernel", lambda x, tile: True)
    torch.manual_seed(0)
    gate, up, gain = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), torch.randn(shape[1]).bfloat16()
    wanted = {"rows": True, "columns": True}
    h = F.silu(gate) * up
    y = F.rms_norm(up, (shape[1],), gain, 1e-5)
    values, rstd, made = normed_cast(up, gain, 1e-5, E4M3, tile, values=True, **wanted)
    assert torch.equal(values, y)
    assert torch.equal(normed(up, gain, 1e-5)[1], rstd)
    for actual, expected in ((gated_cast(gate, up, E4M3, tile, **wanted), cast(h, E4M3, tile, **wanted)),
                             (made, cast(y, E4M3, tile, **wanted))):  # fmt: skip
        for name in ("rows", "columns"):
            a, e = getattr(actual, name), getattr(expected, name)
            assert torch.equal(a.codes.view(torch.uint8), e.codes.view(torch.uint8))
            assert torch.equal(a.scale, e.scale)
            assert a.tile == e.tile
        assert actual.amax is None or torch.equal(actual.amax, expected.amax)
