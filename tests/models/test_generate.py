from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp8.models import Decoder, DecoderConfig, generate

VOCAB = 8


class Fixed(nn.Module):
    """The same logits at every position, or those that `rule` makes of the tokens seen; keeps what it was shown."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule, self.shown = rule, list[list[int]]()
        self.device_marker = nn.Parameter(torch.zeros(()))

    def forward(self, tokens_bt: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.shown.append(tokens_bt[0].tolist())
        return self.rule(tokens_bt[0]).expand(1, tokens_bt.shape[1], VOCAB)


def counting(tokens: Tensor) -> Tensor:
    """Much prefers the next number."""
    return torch.nn.functional.one_hot((tokens[-1] + 1) % VOCAB, VOCAB) * 100.0


def flat(tokens: Tensor) -> Tensor:
    """Slightly prefers larger numbers."""
    return torch.arange(VOCAB) / VOCAB


def continue_(rule: Callable[[Tensor], Tensor], prompt: list[int], **options: Any) -> list[int]:
    return list(generate(Fixed(rule), prompt, **{"max_new_tokens": 6, "window": 4, **options}))


def test_greedy_takes_the_likeliest() -> None:
    assert continue_(flat, [0], temperature=0, max_new_tokens=3) == [VOCAB - 1] * 3


def test_greedy_is_the_limit_of_a_low_temperature() -> None:
    assert continue_(counting, [3], temperature=0) == continue_(counting, [3], temperature=0.1) == [4, 5, 6, 7, 0, 1]


def test_seeds_reproduce_and_differ() -> None:
    runs = [continue_(flat, [0], seed=seed, max_new_tokens=40) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    continue_(flat, [0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("top_k", "kept"), [(1, {7}), (3, {5, 6, 7}), (0, set(range(VOCAB))), (99, set(range(VOCAB)))])
def test_top_k(top_k: int, kept: set[int]) -> None:
    assert set(continue_(flat, [0], temperature=1.0, top_k=top_k, max_new_tokens=300)) == kept


def test_temperature_divides_the_logits() -> None:
    drawn = continue_(flat, [0], temperature=0.25, top_k=0, max_new_tokens=2000)
    share = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / len(drawn)
    torch.testing.assert_close(share, (4 * flat(torch.tensor([0]))).softmax(0), rtol=0, atol=0.04)


def test_window_is_what_the_decoder_sees() -> None:
    decoder = Fixed(counting)
    list(generate(decoder, [0, 1], max_new_tokens=4, window=3, temperature=0))
    assert decoder.shown == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_stop_token_ends_and_is_not_shown() -> None:
    assert continue_(counting, [3], temperature=0, stop_token=6) == [4, 5]


def test_the_prompt_is_left_alone() -> None:
    prompt = [3]
    continue_(counting, prompt)
    assert prompt == [3]


@pytest.mark.parametrize("option", ["temperature", "top_k", "max_new_tokens"])
def test_negative_numbers_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        continue_(flat, [0], **{option: -1})


@pytest.mark.parametrize(("prompt", "window", "message"), [([], 4, "the prompt has no tokens"), ([0], 0, "window 1")])
def test_empty_prompt_and_window_are_refused(prompt: list[int], window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continue_(flat, prompt, window=window)


def test_decoder_continues_with_its_own_argmax() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, num_layers=1, intermediate_size=32))
    prompt = [1, 2, 3]
    for token in generate(decoder, list(prompt), max_new_tokens=5, window=16, temperature=0):
        assert token == decoder(torch.tensor([prompt]))[0, -1].argmax()
        prompt.append(token)
    assert len(prompt) == 8
