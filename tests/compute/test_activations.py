"""What chosen modules keep for backward, in FP8: how much, how exactly, and what is left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lightning_fp8 import convert_linears, fp8_autocast
from lightning_fp8.compute.activations import keep_activations_in_fp8
from lightning_fp8.models import DecoderConfig
from lightning_fp8.models.decoder import SwiGLU
from lightning_fp8.models.norm import RMSNorm

SHAPE = DecoderConfig(vocab_size=64, hidden_size=256, num_layers=1, num_heads=4, intermediate_size=688)
TOKENS = 256


def mlp(dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(RMSNorm(SHAPE.hidden_size), SwiGLU(SHAPE)).to(dtype)


def activations(dtype=torch.bfloat16, seed=1):
    """Not a leaf: a leaf that learns counts as a parameter."""
    x = torch.randn(2, TOKENS // 2, SHAPE.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_() * 1


def kept_bytes(module, x):
    """What is allocated while `module` runs and still there when its output has come into being, without the output."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = module(x)
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]") - y.nbytes


def gradients(module, x):
    return torch.autograd.grad(module(x).float().square().sum(), [*module.parameters(), x])


def distance(a, b):
    return max(float((p.double() - q.double()).norm() / q.double().norm()) for p, q in zip(a, b, strict=True))


def test_a_swiglu_keeps_at_most_six_tenths_of_what_bf16_keeps():
    d, f = SHAPE.hidden_size, SHAPE.intermediate_size
    in_bf16 = kept_bytes(mlp()[1], activations())
    module = convert_linears_of(mlp()[1])
    keep_activations_in_fp8(module, [""])
    in_fp8 = kept_bytes(module, activations())
    # gate, silu of it, up and their product; the input is someone else's in bf16, and a copy of ours in FP8.
    assert in_bf16 == pytest.approx(TOKENS * 2 * 4 * f, rel=0.01)
    scales = 4 / 128
    assert in_fp8 == pytest.approx(TOKENS * (d + f + 3 * f * (1 + scales)), rel=0.01)
    assert in_fp8 <= 0.6 * (in_bf16 + TOKENS * 2 * d)


def convert_linears_of(module):
    convert_linears(module)
    return module


def test_a_norm_keeps_a_byte_for_each_element_of_each_tensor():
    """On CPUs torch composes it: the input in fp32, which two operations keep, and the normalised one are kept."""
    norm, x = RMSNorm(SHAPE.hidden_size).bfloat16(), activations()
    keep_activations_in_fp8(norm, [""])
    elements, inverse_rms = TOKENS * SHAPE.hidden_size, 4 * TOKENS
    tensors = 2
    assert kept_bytes(norm, x) <= tensors * elements * (1 + 4 / 128) + inverse_rms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_is_exact_and_gradients_are_those_of_rounded_operands(dtype):
    plain, ours, x = mlp(dtype), mlp(dtype), activations(dtype)
    keep_activations_in_fp8(ours, ["0", "1"])
    assert torch.equal(plain(x), ours(x))
    # E4M3 rounds to 2^-4 of a value at worst; a gradient is a product of at most three rounded operands, and the first
    # of them goes through silu', whose slope is below 1.1.
    assert 0 < distance(gradients(ours, x), gradients(plain, x)) < (1 + 2**-4) ** 3 - 1


def test_gradients_are_exactly_those_of_the_rounded_input():
    """A square keeps its input, and its gradient is twice what was kept."""

    class Square(nn.Module):
        def forward(self, x):
            return x.square()

    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    module = nn.Sequential(Square())
    keep_activations_in_fp8(module, ["0"])
    (gradient,) = torch.autograd.grad(module(x * 1).sum(), x)
    blocks = x.detach().view(4, 2, 128)
    scale = blocks.abs().amax(-1, keepdim=True) / 448
    expected = (blocks / scale).to(torch.float8_e4m3fn).float() * scale * 2
    assert torch.equal(gradient, expected.view(4, 256))


def test_weights_and_gains_are_kept_as_they_are():
    """A plain linear layer's weight, its cast under autocast, its transpose: backward gets the exact ones."""
    linear = nn.Sequential(nn.Linear(64, 64, bias=False))
    keep_activations_in_fp8(linear, ["0"])
    x = torch.randn(8, 64).requires_grad_()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = linear(x * 1)
        (dx,) = torch.autograd.grad(y.float().sum(), x)
        weight = linear[0].weight.bfloat16() if autocast else linear[0].weight
        ones = torch.ones(8, 64, dtype=weight.dtype)
        assert torch.equal(dx, (ones @ weight).float())


def test_the_model_stays_the_same_one():
    model = mlp()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert keep_activations_in_fp8(model, ["0", "1"]) == ["0", "1"]
    keep_activations_in_fp8(model, ["0", "1"])
    assert isinstance(model[1], SwiGLU)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    x = activations()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is type(model[1])
        assert distance(gradients(other, x), gradients(model, x)) == 0
    keep_activations_in_fp8(model, ["1"])
    assert type(model[0]) is RMSNorm
    assert type(model[1]) is not SwiGLU
    keep_activations_in_fp8(model, [])
    assert type(model[1]) is SwiGLU


def test_they_wait_while_others_decide_what_is_kept():
    plain, ours, x = mlp(), mlp(), activations()
    keep_activations_in_fp8(ours, ["0", "1"])
    exact = gradients(plain, x)
    assert distance(gradients(ours, x), exact) > 0
    again = gradients(ours_checkpointed := _Checkpointed(ours), x)
    assert distance(again, exact) == 0
    assert kept_bytes(ours_checkpointed, activations()) < TOKENS * SHAPE.hidden_size
    with fp8_autocast(enabled=False):
        assert distance(gradients(ours, x), exact) == 0


class _Checkpointed(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False)


def test_a_nan_is_not_hidden():
    norm = RMSNorm(256).float()
    keep_activations_in_fp8(norm, [""])
    x = torch.ones(2, 256).requires_grad_()
    y = norm(x * torch.tensor([1.0, float("nan")])[:, None])
    (gradient,) = torch.autograd.grad(y[:1].sum() + y[1:].sum() * 0, x)
    assert gradient[1].isnan().all()


def test_a_pattern_without_modules_is_an_error():
    with pytest.raises(ValueError, match=r"'\*mpl'.*gate_proj"):
        keep_activations_in_fp8(mlp(), ["*mpl"])


def test_what_changes_in_place_is_stored_anew():
    class Twice(nn.Module):
        def forward(self, x):
            first = x.square().sum()
            x.mul_(2)
            return first + x.square().sum()

    module = nn.Sequential(Twice())
    keep_activations_in_fp8(module, ["0"])
    x = torch.full((2, 128), 1.5).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x * 1), x)
    assert torch.equal(gradient, torch.full((2, 128), 2 * 1.5 + 2 * 3.0 * 2))
