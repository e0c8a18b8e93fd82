"""Continuing texts: sampling from a decoder, token by token, with a key/value cache.

A new token costs one position. Memory is that of the cache, `window` tokens a text, so generation can go on for ever:
beyond the window the oldest tokens are dropped, the first few excepted (see `cache.py`).
"""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from lightning_fp8.models.cache import KVCache, MakeStore, PlainStore
from lightning_fp8.models.decoder import Decoder
from lightning_fp8.models.sampling import Sampling, draw

SINKS = 4  # as many as StreamingLLM found to be enough


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int | None,
    window: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_token: int | None = None,
    sinks: int = SINKS,
    store: MakeStore = PlainStore,
) -> Iterator[int]:
    """Yields new token ids after `prompt`, one by one.

    Args:
        decoder: The model.
        prompt: Token ids, at least one.
        max_new_tokens: Where to stop at the latest; None is never.
        window: How many tokens the decoder sees at most: the first `sinks` and the last ones.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Samples among this many likeliest tokens; 0 means all.
        top_p: Samples among the likeliest tokens that make up this probability together.
        min_p: Samples among tokens at least so likely as this share of the likeliest.
        seed: Of the sampling.
        stop_token: An id that ends the text; it is not yielded.
        sinks: First tokens that stay in sight when the text is longer than the window.
        store: Keeps keys and values; `FP8Store` takes half the memory of bf16.

    Raises:
        ValueError: The prompt is empty, or a number is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    steps = generate_batch(
        decoder,
        [prompt],
        max_new_tokens=max_new_tokens,
        window=window,
        sampling=sampling,
        seed=seed,
        stop_token=stop_token,
        sinks=sinks,
        store=store,
    )
    return (token for (token,) in steps if token is not None)


def generate_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None,
    window: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    sinks: int = SINKS,
    store: MakeStore = PlainStore,
) -> Iterator[list[int | None]]:
    """Yields the next token id of every prompt, step by step; None where a text has ended.

    The prompts may differ in length. Arguments are those of `generate`, `sampling` (default: its defaults) taking
    together what limits the draw.

    Raises:
        ValueError: A prompt is empty, there is none, or a number is out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate: the prompt has no tokens; give at least one.")
    if window < 1 or not sinks >= 0 or (max_new_tokens or 0) < 0:
        raise ValueError("generate: max_new_tokens and sinks must be 0 or more, and window 1 or more.")
    return _steps(decoder, prompts, max_new_tokens, window, sampling or Sampling(), seed, stop_token, sinks, store)


@torch.inference_mode()
def _steps(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None,
    window: int,
    sampling: Sampling,
    seed: int,
    stop_token: int | None,
    sinks: int,
    store: MakeStore,
) -> Iterator[list[int | None]]:
    weight = decoder.embedding.weight
    sinks = min(sinks, window - 1)
    shown = [list(p) if len(p) <= window else [*p[:sinks], *p[sinks - window :]] for p in prompts]
    longest = max(map(len, shown))
    capacity = window if max_new_tokens is None else min(window, longest + max_new_tokens)
    cache = KVCache(
        decoder.config,
        len(shown),
        capacity,
        sinks=min(sinks, capacity - 1),
        dtype=weight.dtype,
        device=weight.device,
        store=store,
    )
    generator = torch.Generator(weight.device).manual_seed(seed)
    tokens_bt = torch.tensor([p + [0] * (longest - len(p)) for p in shown], device=weight.device)
    lengths_b = torch.tensor([len(p) for p in shown], device=weight.device)
    logits_bv: Tensor | None = None
    ended = [False] * len(shown)
    for _ in count() if max_new_tokens is None else range(max_new_tokens):
        if logits_bv is None:
            logits_btv = decoder(tokens_bt, cache=cache, lengths_b=lengths_b)
            logits_bv = logits_btv[torch.arange(len(shown), device=weight.device), lengths_b - 1]
        else:
            logits_bv = decoder(tokens_bt, cache=cache)[:, -1]
        drawn_b = draw(logits_bv, sampling, generator)
        tokens_bt, drawn = drawn_b[:, None], drawn_b.tolist()
        ended = [before or token == stop_token for before, token in zip(ended, drawn, strict=True)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, drawn, strict=True)]
