"""The last two snapshots of a run, in memory or on disk, one file a process.

A checkpoint names the snapshots that the run has when it is written, and keeps them from being deleted until another
checkpoint is: so a run that resumes from its newest checkpoint finds what the run that died would have gone back to.
Snapshots in memory die with the run; after a resume the first step makes a new one.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from lightning_fp8.files import write_whole

KEPT = 2


def copied(value: Any) -> Any:
    """A copy of nested containers that shares nothing with them; tensors in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return copy.deepcopy(value)


class Snapshots:
    """The newest snapshots.

    Args:
        folder: Where to write them; None keeps them in memory.
        rank: Of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self._folder = folder
        self._rank = rank
        self._names: list[str] = []  # oldest first
        self._held: dict[str, Any] = {}
        self._pinned: set[str] = set()  # named by the newest checkpoint

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, state: Any) -> None:
        """Keeps a copy of `state`, in place of the oldest snapshot if there are enough."""
        state = copied(state)
        if self._folder is None:
            self._held[name] = state
        else:
            write_whole(self._file(name), lambda file: torch.save(state, cast(IO[bytes], file)))
        self._names = [*self._names, name][-KEPT:]
        self._clean()

    def back_to_oldest(self) -> Any:
        """A copy of the oldest snapshot; later ones are forgotten."""
        self._names = self._names[:1]
        self._clean()
        name = self._names[0]
        if self._folder is None:
            return copied(self._held[name])
        return torch.load(self._file(name), map_location="cpu", weights_only=True)

    def pin(self) -> list[str]:
        """The names of the snapshots, for a checkpoint; they stay until the next call."""
        self._pinned = set(self._names)
        return list(self._names)

    def adopt(self, names: list[str]) -> bool:
        """Takes the snapshots of a checkpoint, if all are there; returns whether they are."""
        found = self._folder is not None and all(self._file(name).exists() for name in names)
        self._names = list(names) if found else []
        self._pinned = set(self._names)
        return found

    def clear(self) -> None:
        """Deletes all."""
        self._names, self._pinned = [], set()
        self._clean()

    def _clean(self) -> None:
        needed = {*self._names, *self._pinned}
        self._held = {name: state for name, state in self._held.items() if name in self._names}
        if self._folder is not None and self._folder.exists():
            for file in self._folder.glob(f"*.rank{self._rank}.pt"):
                if file.name.removesuffix(f".rank{self._rank}.pt") not in needed:
                    file.unlink()

    def _file(self, name: str) -> Path:
        return (self._folder or Path()) / f"{name}.rank{self._rank}.pt"
