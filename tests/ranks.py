"""Runs a test's function in real processes, over gloo, as ranks of one node that Lightning recognises."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def spawn(function: Callable[..., None], world_size: int, folder: Path, *args: object) -> None:
    """Calls `function(folder, *args)` on every rank; raises what the first failing one raised."""
    torch.multiprocessing.spawn(_enter, (function, world_size, folder, args), nprocs=world_size)


def _enter(rank: int, function: Callable[..., None], world_size: int, folder: Path, args: tuple[object, ...]) -> None:
    # With LOCAL_RANK set, Lightning starts no processes of its own; a file needs no free port.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    try:
        function(folder, *args)
    finally:
        dist.destroy_process_group()
