"""Switching FP8 on and off around any piece of code.

A converted layer runs in FP8 unless told otherwise; `fp8_autocast(enabled=False)` makes it compute as the plain
`torch.nn.Linear` it also is. The switch is a context variable: nested, restored when an exception passes, and each
thread has its own. Backward needs no switch: it follows what forward did. What backward computes again (activation
checkpointing) it does outside the block: put the block into the checkpointed function, or switch the layers themselves
(`FP8Linear.fp8_active`), as a schedule does.

Compiled code reads a copy of the switches that lies in a `threading.local`: torch 2.11 cannot trace context variables.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_enabled = ContextVar("fp8_enabled", default=True)
_frozen = ContextVar("fp8_scales_frozen", default=False)


class _Traced(threading.local):
    def __init__(self) -> None:  # and not in the class: compiled code is guarded by attributes of instances only
        self.enabled = True
        self.frozen = False


_traced = _Traced()


@contextmanager
def fp8_autocast(enabled: bool = True) -> Iterator[None]:
    """Runs converted layers in FP8 (or, with `enabled=False`, in their own dtype) inside the block."""
    token, before = _enabled.set(enabled), _traced.enabled
    _traced.enabled = enabled
    try:
        yield
    finally:
        _enabled.reset(token)
        _traced.enabled = before


def fp8_enabled() -> bool:
    """Whether converted layers run in FP8 here and now."""
    return _traced.enabled if torch.compiler.is_compiling() else _enabled.get()


@contextmanager
def frozen_scales() -> Iterator[None]:
    """Inside the block layers with delayed scaling note nothing of what they see, whether gradients are on or off."""
    token, before = _frozen.set(True), _traced.frozen
    _traced.frozen = True
    try:
        yield
    finally:
        _frozen.reset(token)
        _traced.frozen = before


def scales_frozen() -> bool:
    """Whether delayed scaling takes no notes here and now."""
    return _traced.frozen if torch.compiler.is_compiling() else _frozen.get()
