"""`lightning-fp8 generate`: continue texts from a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lightning_fp8.checkpoint.integrity import check_checkpoint
from lightning_fp8.cli.parsers import call_from_command_line
from lightning_fp8.data.tokenizer import end_of_text, read_tokenizer
from lightning_fp8.models.cache import PlainStore
from lightning_fp8.models.fp8_store import FP8Store
from lightning_fp8.models.generate import SINKS, generate_batch
from lightning_fp8.models.sampling import Sampling
from lightning_fp8.models.saved import load_decoder, trained_length
from lightning_fp8.models.text_stream import TextStream


def run(args: list[str]) -> None:
    """Runs `continue_text` with the options in `args`, the verb first."""
    call_from_command_line(continue_text, args)


def continue_text(
    ckpt: str,
    prompt: list[str] | str,
    tokenizer: str | None = None,
    max_new_tokens: int | None = 200,
    window: int | None = None,
    sinks: int = SINKS,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: list[str] | str | None = None,
    seed: int = 0,
    cache: Literal["plain", "fp8"] = "plain",
) -> None:
    """Prints `prompt` and its continuation.

    Args:
        ckpt: A checkpoint that `fit` or `import` wrote.
        prompt: The text to continue, shown as it grows; or several, '["one", "another"]', shown when all are done.
        tokenizer: A tokenizer.json; by default the one beside the checkpoint's folder, where `fit` puts it.
        max_new_tokens: How many tokens to add at most; null goes on for ever.
        window: How many tokens the model sees at most, the first `sinks` and the last ones; by default the sequence
            length that it was trained with or, of an imported model, its context length.
        sinks: First tokens that stay in sight when the text is longer than the window.
        temperature: Lower is more predictable; 0 always takes the likeliest token.
        top_k: Sample among this many likeliest tokens; 0 means all.
        top_p: Sample among the likeliest tokens that make up this probability together.
        min_p: Sample among tokens at least so likely as this share of the likeliest.
        stop: A text that ends the continuation, or several; not shown.
        seed: Of the sampling.
        cache: How keys and values are kept: in the weights' dtype, or in FP8.
    """
    if not Path(ckpt).is_file():
        raise ValueError(f"--ckpt {ckpt}: there is no such file.")
    check_checkpoint(ckpt)
    decoder = load_decoder(ckpt).eval()
    words = read_tokenizer(tokenizer or str(Path(ckpt).parent.parent / "tokenizer.json"))
    largest, size = max(words.get_vocab(with_added_tokens=True).values()), decoder.config.vocab_size
    if largest >= size:
        raise ValueError(
            f"The tokenizer has token id {largest} and the model of {ckpt} a vocabulary of {size}: give the tokenizer"
            " that it was trained with, --tokenizer."
        )
    prompts = [prompt] if isinstance(prompt, str) else prompt
    tokens = [list(words.encode(text).ids) for text in prompts]
    steps = generate_batch(
        decoder,
        tokens,
        max_new_tokens=max_new_tokens,
        window=trained_length(ckpt) if window is None else window,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        stop_token=end_of_text(words),
        sinks=sinks,
        store=FP8Store if cache == "fp8" else PlainStore,
    )
    stops = [stop] if isinstance(stop, str) else stop or []
    streams = [TextStream(words.decode, ids, stops) for ids in tokens]
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for (piece,) in _texts(steps, streams):
            print(piece, end="", flush=True)
        print()
        return
    for text, pieces in zip(prompts, zip(*_texts(steps, streams), strict=True), strict=True):
        print(text + "".join(pieces), end="\n\n")


def _texts(steps: Iterator[list[int | None]], streams: list[TextStream]) -> Iterator[list[str]]:
    """What each step adds to each text, until all have ended."""
    for step in steps:
        yield ["" if token is None else stream.push(token) for token, stream in zip(step, streams, strict=True)]
        if all(stream.ended for stream in streams):
            break
    yield [stream.flush() for stream in streams]
