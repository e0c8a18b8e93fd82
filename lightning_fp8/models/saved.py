"""A decoder out of the file that holds it: what the Trainer, or `lightning-fp8 import`, saved of a `DecoderLM`.

The file alone is enough: the shape of the decoder lies beside its weights. Nothing in it is run as a program, and
weights are read from the disk as they are used.
"""

import pickle
from typing import Any

import torch
from torch import Tensor

from lightning_fp8.models.config import config_from_dict
from lightning_fp8.models.decoder import Decoder

CONFIG_KEY = "decoder_config"
LENGTH_KEY = "sequence_length"  # tokens that the model read at once; a model that was imported has none


def load_weights(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The decoder's configuration and weights in a `DecoderLM` checkpoint, read from the file as they are used.

    Args:
        path: A checkpoint file that the Trainer, or `lightning-fp8 import`, wrote.

    Raises:
        ValueError: It is not such a checkpoint.
    """
    checkpoint, prefix = _read(path), "decoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return checkpoint[CONFIG_KEY], weights


def load_decoder(path: str) -> Decoder:
    """The decoder of a `DecoderLM` checkpoint, on the CPU, in the dtype its weights were saved in.

    Args:
        path: A checkpoint file that the Trainer, or `lightning-fp8 import`, wrote.

    Raises:
        ValueError: It is not such a checkpoint.
    """
    saved, weights = load_weights(path)
    with torch.device("meta"):
        decoder = Decoder(config_from_dict(saved))
    decoder.to(weights["norm.weight"].dtype).to_empty(device="cpu")
    if decoder.config.tied_embeddings:
        decoder.lm_head.weight = decoder.embedding.weight
    decoder.load_state_dict(weights)
    return decoder


def trained_length(path: str) -> int:
    """How many tokens the decoder of a checkpoint is used to reading at once.

    Args:
        path: A checkpoint file. One of `fit` has the length of its sequences; for others, such as those of
            `lightning-fp8 import`, it is the `context_length` of the decoder.

    Raises:
        ValueError: It is not such a checkpoint.
    """
    checkpoint = _read(path)
    length = checkpoint.get(LENGTH_KEY, config_from_dict(checkpoint[CONFIG_KEY]).context_length)
    if type(length) is not int or length < 1:
        raise ValueError(f"{path} is damaged: its {LENGTH_KEY} is {length!r}.")
    return length


def _read(path: str) -> dict[str, Any]:
    """The checkpoint, its tensors left on the disk."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError) as error:  # as the bytes happen to mislead it
        raise ValueError(f"{path} is no DecoderLM checkpoint: torch.load cannot read it.") from error
    if CONFIG_KEY not in checkpoint:
        raise ValueError(f"{path} is no DecoderLM checkpoint: it has no {CONFIG_KEY!r}.")
    return checkpoint
