from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8 import FP8Linear, convert_linears
from lightning_fp8.models import Decoder, DecoderConfig, smooth
from lightning_fp8.models.smooth import factors, smoothed
from lightning_fp8.numerics import E4M3, dequantize, quantize

SMALL = DecoderConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48)
TOKENS = torch.randint(97, (4, 33), generator=torch.Generator().manual_seed(1))
T, D, F_ = 512, 128, 384


def aligned(gain: float = 30.0) -> tuple[Tensor, nn.Linear]:
    """The SwiGLU product [T, F] where one neuron's gate and up weights are both `gain` u, and a down projection."""
    gen = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(T, D, generator=gen), dim=1) * D**0.5
    gate, up, down = (0.02 * torch.randn(*s, generator=gen) for s in ((F_, D), (F_, D), (D, F_)))
    gate[0] = up[0] = gain * F.normalize(torch.randn(D, generator=gen), dim=0)
    linear = nn.Linear(F_, D, bias=False)
    linear.weight.data = down
    return F.silu(x @ gate.T) * (x @ up.T), linear


def flushed(x: Tensor) -> float:
    """The share of what is not zero that a cast to E4M3 with one scale makes zero."""
    return float(((dequantize(quantize(x, E4M3)) == 0) & (x != 0)).float().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_function_bit_for_bit(dtype: torch.dtype, bias: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias).to(dtype)
    h = (torch.randn(2, 7, 48, generator=gen) * torch.randn(48, generator=gen).mul(6).exp2()).to(dtype).requires_grad_()
    dy = torch.randn(2, 7, 32, generator=gen).to(dtype)
    results = []
    for call in (linear, lambda x: smoothed(linear, x)):
        y = call(h)
        results.append([y, *torch.autograd.grad(y, [h, *linear.parameters()], dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_decoder_computes_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    plain = Decoder(replace(SMALL, init_std=0.3))
    torch.manual_seed(0)
    other = Decoder(replace(SMALL, init_std=0.3, smooth_swiglu=True))
    assert other.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(TOKENS), other(TOKENS))


def test_factors_are_the_roots_of_the_magnitudes_rounded_up_to_powers_of_two() -> None:
    h = torch.tensor([[4.0, -5.0, 0.0, 1e-30, float("inf"), float("nan"), 3e38], [1.0, 16.0, 0.0, 0, 0, 0, 0]])
    assert factors(h).tolist() == [2.0, 4.0, 1.0, 2.0**-40, 1.0, 1.0, 2.0**40]


def test_what_is_not_finite_stays_visible() -> None:
    linear = nn.Linear(16, 16)
    h = torch.ones(2, 16)
    h[0, 3] = float("nan")
    y = smoothed(linear, h)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.fixture(params=["none", "amax", "root"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[float]]:
    """A row of the table in `smooth.py`: shares flushed and errors of y, dh and dw."""
    kind, (h, linear) = request.param, aligned()
    s = {"none": torch.ones(F_), "amax": h.abs().amax(0).log2().ceil().exp2(), "root": factors(h)}[kind]
    monkeypatch.setattr(smooth, "factors", lambda _: s)
    shares = [flushed(h / s), flushed(linear.weight.detach() * s)]
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    results = []
    for convert in (False, True):
        if convert:
            convert_linears(nn.Sequential(linear))
        x = h.clone().requires_grad_()
        y = smoothed(linear, x)
        results.append([y.detach(), *torch.autograd.grad(y, [x, linear.weight], dy)])
    assert type(linear) is FP8Linear
    errors = [(a - b).norm(dim=d) / a.norm(dim=d) for a, b, d in zip(*results, (1, 0, 0), strict=True)]
    return kind, [*shares, *(float(e.median()) for e in errors)]


def test_the_table_of_the_three_factors(table: tuple[str, list[float]]) -> None:
    kind, (h_zero, w_zero, y, dh, dw) = table
    if kind == "none":
        assert h_zero > 0.5
        assert min(y, dw) > 0.2
    elif kind == "amax":
        assert w_zero > 0.3
        assert min(y, dh) > 0.15
    else:
        # Two operands, each rounded to 2^-4 of itself at most, uniformly: an rms of 2^-4 / sqrt(3) of either, and of
        # a gradient in E5M2 twice that.
        assert max(h_zero, w_zero) < 0.05
        assert y < 2**-4 * (2 / 3) ** 0.5
        assert max(dh, dw) < 2**-4 * (5 / 3) ** 0.5


class Inputs:
    """The shares of the down projections' inputs that their casts flush to zero."""

    def __init__(self, decoder: Decoder) -> None:
        self.shares: list[float] = []
        for block in decoder.blocks:
            block.mlp.down_proj.register_forward_pre_hook(self._note)  # type: ignore[union-attr, operator]

    def _note(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.shares.append(flushed(args[0].detach()))


@pytest.mark.parametrize("smooth_swiglu", [False, True])
def test_an_aligned_neuron_in_a_decoder(smooth_swiglu: bool) -> None:
    """Of the normalised input of the MLP, one neuron of each block becomes quadratic: gate = up = 30 u."""
    torch.manual_seed(0)
    decoder = Decoder(replace(SMALL, smooth_swiglu=smooth_swiglu))
    convert_linears(decoder)
    direction = F.normalize(torch.randn(SMALL.hidden_size), dim=0)
    for block in decoder.blocks:
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):  # type: ignore[union-attr]
            linear.weight.data[0] = 30 * direction  # type: ignore[union-attr, operator, index]
    inputs = Inputs(decoder)
    decoder(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    if smooth_swiglu:
        assert max(inputs.shares) < 0.05
    else:
        assert max(inputs.shares) > 0.3
    assert all(p.grad.isfinite().all() for p in decoder.parameters())  # type: ignore[union-attr]


def test_it_compiles() -> None:
    linear = nn.Linear(32, 16, bias=False)
    h = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(smoothed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(linear, h), linear(h))
