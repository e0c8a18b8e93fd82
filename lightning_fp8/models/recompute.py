"""Activation checkpointing: computing a block again in backward instead of keeping what it computed.

    none        everything that backward needs is kept
    selective   products of matrices and attention are kept, whatever is cheap to make from them is computed again
    full        a block keeps its input alone and runs twice: a third more compute for the least memory

The second run sees the context variables of the first, on whatever thread backward runs: so a block that ran with FP8
switched off does so again. Random numbers are not replayed; the decoder draws none.
"""

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

_KEPT = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm", "fp8_gemm")


def recomputing(function: Callable[..., Tensor], how: Recompute) -> Callable[..., Tensor]:
    """`function`, to be computed again in backward as `how` says; the same results and gradients.

    Raises:
        ValueError: `how` is not one of the three.
    """
    if how not in get_args(Recompute):
        raise ValueError(f"activation_checkpointing {how!r} is not one of {', '.join(get_args(Recompute))}.")
    if how == "none" or not torch.is_grad_enabled():
        return function
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, partial(copy_context().run, function), **options)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.overloadpacket.__name__
    kept = name in _KEPT or "scaled_dot_product" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
