"""Putting behaviour before a module's class, in place, and taking it out again.

The class of a module is swapped for one made of it, as that of a linear layer is, so parameters, hooks and state dict
stay. Several can be put before one class, in an order of their own; each is taken out without the others.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

_made: dict[tuple[type, ...], Any] = {}


class Mixin:
    """What may be put before a module's class: it overrides `forward`, and `super().forward` is the module's own.

    `surrounds` says that it acts around whatever computes, and so goes before those that compute themselves.
    """

    surrounds = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[type, ...], dict[str, Any]]:
        """Copies and pickles, for which a class made here has no name."""
        return _rebuild, _parts(type(self)), self.__dict__


def put_before(module: nn.Module, mixin: type[Mixin]) -> None:
    """Puts `mixin` before the class of `module`, once."""
    if not isinstance(module, mixin):
        *mixins, kind = mixin, *_parts(type(module))
        module.__class__ = _class_of((*sorted(mixins, key=lambda m: not m.surrounds), kind))


def take_out(module: nn.Module, mixin: type[Mixin]) -> None:
    """Undoes `put_before`."""
    if isinstance(module, mixin):
        module.__class__ = _class_of(tuple(part for part in _parts(type(module)) if part is not mixin))


def _class_of(parts: tuple[type, ...]) -> Any:
    """The class that is made of some mixins and, last, a module's own class; one for each."""
    *mixins, kind = parts
    if not mixins:
        return kind
    if parts not in _made:
        _made[parts] = type(kind.__name__, parts, {"__module__": kind.__module__, "__doc__": kind.__doc__})
    return _made[parts]


def _parts(cls: type) -> tuple[type, ...]:
    return cls.__bases__ if _made.get(cls.__bases__) is cls else (cls,)


def _rebuild(*parts: type) -> Any:
    cls = _class_of(parts)
    return cls.__new__(cls)
