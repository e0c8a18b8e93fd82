"""`lightning-fp8 generate`: continue a text from a checkpoint."""

from pathlib import Path

from lightning_fp8.cli.parsers import call_from_command_line
from lightning_fp8.data.tokenizer import END_OF_TEXT, load_tokenizer
from lightning_fp8.models.generate import generate
from lightning_fp8.models.lit import load_decoder


def run(args: list[str]) -> None:
    """Runs `continue_text` with the options in `args`, the verb first."""
    call_from_command_line(continue_text, args)


def continue_text(
    ckpt: str,
    prompt: str,
    tokenizer: str | None = None,
    max_new_tokens: int = 200,
    window: int = 128,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> None:
    """Prints `prompt` and its continuation.

    Args:
        ckpt: A checkpoint that `fit` wrote.
        prompt: The text to continue.
        tokenizer: A tokenizer.json; by default the one beside the checkpoint's folder, where `fit` puts it.
        max_new_tokens: How many tokens to add at most.
        window: How many of the last tokens the model sees; at best the sequence length that it was
            trained with; 128 is the quickstart's.
        temperature: Lower is more predictable; 0 always takes the likeliest token.
        top_k: Sample among this many likeliest tokens; 0 means all.
        seed: Of the sampling.
    """
    if not Path(ckpt).is_file():
        raise ValueError(f"--ckpt {ckpt}: there is no such file.")
    decoder = load_decoder(ckpt).eval()
    words = load_tokenizer(tokenizer or str(Path(ckpt).parent.parent / "tokenizer.json"))
    tokens = words.encode(prompt).ids
    print(prompt, end="", flush=True)
    shown = words.decode(tokens)
    new = generate(
        decoder,
        list(tokens),
        max_new_tokens=max_new_tokens,
        window=window,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_token=words.token_to_id(END_OF_TEXT),
    )
    for token in new:
        tokens.append(token)
        text = words.decode(tokens)
        if not text.endswith("\ufffd"):  # an incomplete character: its other bytes are still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
