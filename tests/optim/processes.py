"""Runs a test's function in real processes, over gloo."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def spawn(function: Callable[[Path], None], world_size: int, folder: Path) -> None:
    """Calls `function(folder)` on every rank; raises what the first failing one raised."""
    torch.multiprocessing.spawn(_enter, (function, world_size, str(folder)), nprocs=world_size)


def _enter(rank: int, function: Callable[[Path], None], world_size: int, folder: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        function(Path(folder))
    finally:
        dist.destroy_process_group()
