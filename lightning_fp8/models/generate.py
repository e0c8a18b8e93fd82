"""Continuing a text: sampling from a decoder, token by token.

Each token recomputes the whole window, so the cost of n tokens is n forward passes; a key/value cache would trade
memory for that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


@torch.inference_mode()
def generate(
    decoder: nn.Module,
    prompt: list[int],
    *,
    max_new_tokens: int,
    window: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yields new token ids after `prompt`, one by one.

    Args:
        decoder: Tokens [1, T] -> logits [1, T, V].
        prompt: Token ids, at least one.
        max_new_tokens: Where to stop at the latest.
        window: How many of the last tokens the decoder sees.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Samples among this many likeliest tokens; 0 means all.
        seed: Of the sampling.
        stop_token: An id that ends the text; it is not yielded.

    Raises:
        ValueError: The prompt is empty, or a number is out of range.
    """
    if not prompt:
        raise ValueError("generate: the prompt has no tokens; give at least one.")
    if temperature < 0 or top_k < 0 or max_new_tokens < 0 or window < 1:
        raise ValueError("generate: temperature, top_k and max_new_tokens must be 0 or more, and window 1 or more.")
    device = next(decoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits_v = decoder(torch.tensor([tokens[-window:]], device=device))[0, -1].float()
        token = int(_draw(logits_v, temperature, top_k, generator))
        if token == stop_token:
            return
        tokens.append(token)
        yield token


def _draw(logits_v: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_v.argmax()
    if 0 < top_k < logits_v.numel():
        threshold = logits_v.topk(top_k).values[-1]
        logits_v = logits_v.masked_fill(logits_v < threshold, float("-inf"))
    return torch.multinomial((logits_v / temperature).softmax(0), 1, generator=generator)
