from collections.abc import Callable

import pytest
import torch
from peak_memory import peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8 import convert_linears
from lightning_fp8.models import Decoder, DecoderConfig, loss
from lightning_fp8.models.accounting import FlopCounter
from lightning_fp8.models.loss import next_token_loss

ROWS, WIDTH, VOCAB = 96, 32, 512
CHUNK = 20 * VOCAB  # five chunks, the last one not full
HEADS: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda head: None,
    "hooked": lambda head: head.register_forward_hook(lambda *_: None),
}


def problem(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    x = torch.randn(3, ROWS // 3, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCAB, (3, ROWS // 3))
    targets[0, ::5] = -100
    return x, head, targets


def plain(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).flatten(0, 1).float(), targets.flatten())


def results(value: Tensor, x: Tensor, head: nn.Module) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, [x, *head.parameters()])]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_change_neither_loss_nor_gradients(kind: str, bias: bool) -> None:
    x, head, targets = problem(bias=bias)
    expected = results(3 * plain(x, head, targets), x, head)
    HEADS[kind](head)
    own = results(3 * next_token_loss(x, head, targets, chunk_logits=CHUNK), x, head)
    for a, b in zip(own, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= VOCAB**0.5 * 2**-23 * b.abs().max()  # sums of so many terms, in fp32


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_the_loss_is_that_of_bf16_logits_and_stays_fp32(kind: str, autocast: bool) -> None:
    """The gradient of the weight is rounded to bf16 ten times: five products, four sums, and once in the other."""
    x, head, targets = problem(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = results(plain(x, head, targets), x, head)
        HEADS[kind](head)
        own = results(next_token_loss(x, head, targets, chunk_logits=CHUNK), x, head)
    assert own[0].dtype == torch.float32
    assert own[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for a, b in zip(own[1:], expected[1:], strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 10 * 2**-9 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fits_into_a_chunk_is_computed_as_ever(dtype: torch.dtype) -> None:
    x, head, targets = problem(dtype)
    for a, b in zip(
        results(next_token_loss(x, head, targets, chunk_logits=ROWS * VOCAB), x, head),
        results(plain(x, head, targets), x, head),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_transform_is_applied() -> None:
    x, head, targets = problem()
    expected = F.cross_entropy(head(x).flatten(0, 1).tanh(), targets.flatten())
    for chunk in (CHUNK, ROWS * VOCAB):
        own = next_token_loss(x, head, targets, transform=torch.tanh, chunk_logits=chunk)
        torch.testing.assert_close(own, expected)


def test_hooks_see_every_chunk() -> None:
    x, head, targets = problem()
    seen: list[int] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    next_token_loss(x, head, targets, chunk_logits=CHUNK)
    assert seen == [20, 20, 20, 20, 16]


def test_an_fp8_head_stays_fp8() -> None:
    x, head, targets = problem()
    convert_linears(head, keep_high_precision=())
    whole = next_token_loss(x, head, targets)
    chunks = next_token_loss(x, head, targets, chunk_logits=CHUNK)
    assert chunks.item() == pytest.approx(whole.item(), rel=1e-3)  # scales of chunks differ a little
    assert abs(chunks - plain(x, nn.Linear.__new__(nn.Linear) if False else head, targets)) < 1e-2


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_all_in_memory(kind: str, dtype: torch.dtype) -> None:
    rows, vocab = 1024, 2048
    head = nn.Linear(8, vocab, bias=False, dtype=dtype)
    x, targets = torch.randn(1, rows, 8, dtype=dtype, requires_grad=True), torch.randint(vocab, (1, rows))
    HEADS[kind](head)
    logits = rows * vocab * 4
    peaks = [
        peak_bytes(lambda n=n: next_token_loss(x, head, targets, chunk_logits=n).backward())
        for n in (rows * vocab, rows * vocab // 16)
    ]
    assert peaks[0] >= 2 * logits  # logits, their logarithms and gradients
    assert peaks[1] <= 4 * logits / 16 + 4 * sum(t.nbytes for t in (x, head.weight)) + 2**16


@pytest.mark.parametrize("kind", HEADS)
def test_flops_of_chunks_are_counted(kind: str) -> None:
    x, head, targets = problem()
    HEADS[kind](head)
    with FlopCounter() as counter:
        next_token_loss(x, head, targets, chunk_logits=CHUNK).backward()
    products = 3 if kind == "plain" and loss._fused else 4  # hooked heads run again in backward
    assert counter.flops == products * 2 * ROWS * WIDTH * VOCAB


def test_the_decoder_returns_the_loss_of_its_logits() -> None:
    for softcap in (None, 5.0):
        torch.manual_seed(0)
        config = DecoderConfig(
            vocab_size=64, hidden_size=32, num_layers=1, intermediate_size=32, logit_softcap=softcap, init_std=0.5
        )
        decoder, tokens = Decoder(config), torch.randint(64, (2, 9))
        logits = decoder(tokens[:, :-1])
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert torch.equal(decoder(tokens[:, :-1], tokens[:, 1:]), expected)
