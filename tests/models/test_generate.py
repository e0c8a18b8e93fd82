from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp8.models import Decoder, DecoderConfig, Sampling, generate, generate_batch
from lightning_fp8.models.fp8_store import FP8Store

VOCAB = 8


class Table(nn.Module):
    """The logits of a token depend on that token alone, as `rule` says; keeps what it was shown and with what cache."""

    config = DecoderConfig(vocab_size=VOCAB, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1)

    def __init__(self, rule: Tensor) -> None:
        super().__init__()
        self.rule, self.shown, self.caches = rule, list[list[list[int]]](), list[Any]()
        self.embedding = nn.Embedding(1, 1)

    def forward(self, tokens_bt: Tensor, *, cache: Any, lengths_b: Tensor | None = None) -> Tensor:
        assert not torch.is_grad_enabled()
        self.shown.append(tokens_bt.tolist())
        self.caches.append(cache)
        return self.rule[tokens_bt]


COUNTING = 100.0 * torch.eye(VOCAB).roll(1, 1)  # much prefers the next number
FLAT = (torch.arange(VOCAB) / VOCAB).expand(VOCAB, VOCAB)  # slightly prefers larger numbers


def continue_(rule: Tensor, prompt: list[int], **options: Any) -> list[int]:
    return list(generate(Table(rule), prompt, **{"max_new_tokens": 6, "window": 9, **options}))


def small(seed: int = 0, **fields: Any) -> Decoder:
    torch.manual_seed(seed)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_kv_heads": 2, "intermediate_size": 32}
    return Decoder(DecoderConfig(**shape, init_std=0.3, **fields))


def test_greedy_takes_the_likeliest() -> None:
    assert continue_(FLAT, [0], temperature=0, max_new_tokens=3) == [VOCAB - 1] * 3


def test_greedy_is_the_limit_of_a_low_temperature() -> None:
    assert continue_(COUNTING, [3], temperature=0) == continue_(COUNTING, [3], temperature=0.1) == [4, 5, 6, 7, 0, 1]


def test_seeds_reproduce_and_differ() -> None:
    runs = [continue_(FLAT, [0], seed=seed, max_new_tokens=40) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_sampling_leaves_the_global_generator_alone() -> None:
    model = Table(FLAT)
    before = torch.get_rng_state()
    list(generate(model, [0], max_new_tokens=6, window=9))
    assert torch.equal(before, torch.get_rng_state())


def test_new_tokens_are_shown_one_by_one() -> None:
    model = Table(COUNTING)
    list(generate(model, [0, 1], max_new_tokens=4, window=16, temperature=0))
    assert model.shown == [[[0, 1]], [[2]], [[3]], [[4]]]
    assert model.caches[0] is model.caches[-1]


@pytest.mark.parametrize(("sinks", "shown"), [(0, [4, 5, 6, 7]), (2, [1, 2, 6, 7]), (9, [1, 2, 3, 7])])
def test_of_a_long_prompt_the_beginning_and_the_end_are_read(sinks: int, shown: list[int]) -> None:
    model = Table(COUNTING)
    list(generate(model, [1, 2, 3, 4, 5, 6, 7], max_new_tokens=1, window=4, sinks=sinks, temperature=0))
    assert model.shown == [[shown]]


def test_stop_token_ends_and_is_not_shown() -> None:
    assert continue_(COUNTING, [3], temperature=0, stop_token=6) == [4, 5]


def test_texts_of_a_batch_end_one_by_one() -> None:
    steps = generate_batch(
        Table(COUNTING), [[3], [0, 1], [5]], max_new_tokens=6, window=9, sampling=Sampling(0), stop_token=6
    )
    assert list(steps) == [[4, 2, None], [5, 3, None], [None, 4, None], [None, 5, None]]


def test_the_prompt_is_left_alone() -> None:
    prompt = [3]
    continue_(COUNTING, prompt)
    assert prompt == [3]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_k": -1}, {"max_new_tokens": -1}, {"top_p": 0.0}, {"min_p": 2.0}, {"sinks": -1}],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        continue_(FLAT, [0], **options)


@pytest.mark.parametrize(("prompt", "window", "message"), [([], 4, "the prompt has no tokens"), ([0], 0, "window 1")])
def test_empty_prompt_and_window_are_refused(prompt: list[int], window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continue_(FLAT, prompt, window=window)


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 3}], ids=["full", "windows"])
def test_decoder_continues_with_its_own_argmax(fields: dict[str, int]) -> None:
    """The same tokens as when the whole text is read again for each."""
    decoder, prompt = small(**fields), [1, 2, 3]
    for token in generate(decoder, list(prompt), max_new_tokens=20, window=64, temperature=0):
        assert token == decoder(torch.tensor([prompt]))[0, -1].argmax()
        prompt.append(token)
    assert len(prompt) == 23


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    decoder, prompts = small(), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    for window in (64, 8):
        steps = generate_batch(decoder, prompts, max_new_tokens=20, window=window, sinks=2, sampling=Sampling(0))
        together = [list(tokens) for tokens in zip(*steps, strict=True)]
        alone = [
            list(generate(decoder, prompt, max_new_tokens=20, window=window, sinks=2, temperature=0))
            for prompt in prompts
        ]
        assert together == alone


def test_an_fp8_cache_changes_little() -> None:
    decoder, options = small(), {"max_new_tokens": 12, "window": 32, "temperature": 0}
    plain = list(generate(decoder, [1, 2, 3], **options))
    fp8 = list(generate(decoder, [1, 2, 3], **options, store=FP8Store))
    assert fp8[:3] == plain[:3]


def test_generation_without_an_end() -> None:
    endless = generate(small(), [1], max_new_tokens=None, window=8, sinks=2)
    assert len([token for _, token in zip(range(100), endless, strict=False)]) == 100
