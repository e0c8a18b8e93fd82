"""Runs a test's function in real processes, over gloo, as ranks of one node that Lightning recognises."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 180  # seconds; start-up takes ten or so, and a busy machine several times that


def spawn(function: Callable[..., None], world_size: int, folder: Path, *args: object, timeout: int = TIMEOUT) -> None:
    """Calls `function(folder, *args)` on every rank; raises what the first failing one raised.

    Raises:
        TimeoutError: The ranks were still running after `timeout` seconds; they are killed.
    """
    inputs = (function, world_size, folder, timeout, args)
    ranks = torch.multiprocessing.spawn(_enter, inputs, nprocs=world_size, join=False)
    end = time.monotonic() + timeout
    while not ranks.join(timeout=1):
        if time.monotonic() > end:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} did not end within {timeout} s.")


def _enter(
    rank: int, function: Callable[..., None], world_size: int, folder: Path, timeout: int, args: tuple[object, ...]
) -> None:
    # With LOCAL_RANK set, Lightning starts no processes of its own; a file needs no free port.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=limit)
    try:
        function(folder, *args)
    finally:
        dist.destroy_process_group()
