"""Switching FP8 on and off around any piece of code.

A converted layer runs in FP8 unless told otherwise; `fp8_autocast(enabled=False)` makes it compute as the plain
`torch.nn.Linear` it also is. The switch is a context variable: nested, restored when an exception passes, and each
thread has its own. Backward needs no switch: it follows what forward did. What backward computes again (activation
checkpointing) it does outside the block: put the block into the checkpointed function, or switch the layers themselves
(`FP8Linear.fp8_active`), as a schedule does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_enabled = ContextVar("fp8_enabled", default=True)
_frozen = ContextVar("fp8_scales_frozen", default=False)


@contextmanager
def fp8_autocast(enabled: bool = True) -> Iterator[None]:
    """Runs converted layers in FP8 (or, with `enabled=False`, in their own dtype) inside the block."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def fp8_enabled() -> bool:
    """Whether converted layers run in FP8 here and now."""
    return _enabled.get()


@contextmanager
def frozen_scales() -> Iterator[None]:
    """Inside the block layers with delayed scaling note nothing of what they see, whether gradients are on or off."""
    token = _frozen.set(True)
    try:
        yield
    finally:
        _frozen.reset(token)


def scales_frozen() -> bool:
    """Whether delayed scaling takes no notes here and now."""
    return _frozen.get()
