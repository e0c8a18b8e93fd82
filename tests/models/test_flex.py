"""FlexAttention sees what the mask in memory sees.

On CPUs it has no kernel, only its reference, and torch refuses gradients there before it comes to the reference's
backward: without that refusal the backward is held against the mask's. The kernels themselves need a device.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from lightning_fp8.models import Decoder, DecoderConfig, attention
from lightning_fp8.models.flex import attend, block_mask
from lightning_fp8.models.masks import causal_mask, documents

CPU = torch.device("cpu")
LENGTH = 160  # more than a block of 128, and no multiple of it


def packed(batch=2, length=LENGTH):
    tokens = torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(0))
    return tokens, documents(tokens, end_of_text=0)


@pytest.mark.parametrize("window", [None, 5, 130, 500])
@pytest.mark.parametrize("with_documents", [False, True])
@torch.no_grad()
def test_it_attends_as_under_the_mask_in_memory(window, with_documents):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, LENGTH, 16, generator=generator) for heads in (4, 2, 2))
    numbers = packed()[1] if with_documents else None
    mask = causal_mask(LENGTH, window, numbers, CPU)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    rule = block_mask(LENGTH, window, numbers, CPU, compiled=False)
    # Sums of 160 terms in fp32, in another order.
    torch.testing.assert_close(attend(q, k, v, rule, 0.25), expected, rtol=160 * 2**-24, atol=160 * 2**-24)


@pytest.mark.parametrize("window", [None, 5, 130])
@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_are_those_under_the_mask_in_memory(window, with_documents, monkeypatch):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(2, heads, LENGTH, 16, generator=generator) for heads in (4, 2, 2)]
    ours, theirs = ([t.clone().requires_grad_() for t in x] for _ in range(2))
    numbers = packed()[1] if with_documents else None
    mask = causal_mask(LENGTH, window, numbers, CPU)
    y = attend(*ours, block_mask(LENGTH, window, numbers, CPU, compiled=False), 0.25)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    dy = torch.randn(y.shape, generator=generator)
    for a, b in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, theirs, dy), strict=True):
        # A gradient is a sum of 160 products of such sums.
        assert (a - b).abs().max() <= 2 * LENGTH * 2**-24 * b.abs().max()


def test_blocks_that_hold_no_pair_are_left_out():
    numbers = torch.arange(512)[None] // 128
    rule = block_mask(512, None, numbers, CPU, compiled=False)
    assert rule.sparsity() == 75  # per cent: of 4 x 4 blocks, the 4 of the diagonal are left


@torch.no_grad()
def test_the_decoder_takes_it_where_there_are_kernels(monkeypatch):
    """The choice itself needs a device: here the rule stands in for the mask on a CPU."""
    config = DecoderConfig(vocab_size=20, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, sliding_window=9)
    model = Decoder(config)
    tokens, numbers = packed()
    expected = model(tokens, documents_bt=numbers)
    seen = []

    def rule(*arguments):
        seen.append(arguments)
        return block_mask(*arguments, compiled=False)

    monkeypatch.setattr(attention, "causal_mask", rule)
    torch.testing.assert_close(model(tokens, documents_bt=numbers), expected, rtol=1e-5, atol=1e-5)
    assert [window for _, window, *_ in seen] == [9]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
def test_outputs_and_gradients_on_a_device(window):
    """Compiled, in bf16, against the mask in memory in fp32: within a few roundings of bf16."""
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(2, heads, LENGTH, 64, generator=generator).cuda() for heads in (4, 2, 2)]
    numbers = packed()[1].cuda()
    exact, ours = ([t.to(dtype).requires_grad_() for t in x] for dtype in (torch.float32, torch.bfloat16))
    mask = causal_mask(LENGTH, window, numbers, numbers.device)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    y = attend(*ours, block_mask(LENGTH, window, numbers, numbers.device), 0.125)
    dy = torch.randn(y.shape, generator=generator).cuda()
    gradients = torch.autograd.grad(y, ours, dy.bfloat16()), torch.autograd.grad(expected, exact, dy)
    for got, wanted in [(y, expected), *zip(*gradients, strict=True)]:
        assert (got.float() - wanted).norm() <= 4 * 2**-8 * wanted.norm()
