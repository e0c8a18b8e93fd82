"""Runs a test's function in real processes, over gloo, as ranks of one node that Lightning recognises."""

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 300.0


def spawn(
    function: Callable[..., None], world_size: int, folder: Path, *args: object, seconds: float = SECONDS
) -> None:
    """Calls `function(folder, *args)` on every rank; raises what the first failing one raised.

    Raises:
        TimeoutError: They are not done after `seconds`; they are ended then.
    """
    deadline = time.monotonic() + seconds
    arguments = (function, world_size, folder, args, seconds)
    ranks = torch.multiprocessing.spawn(_enter, arguments, nprocs=world_size, join=False)
    while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in ranks.processes:
                process.kill()
                process.join()
            raise TimeoutError(f"{world_size} processes were not done with {function.__name__} after {seconds} s")


def _enter(
    rank: int, function: Callable[..., None], world_size: int, folder: Path, args: tuple[object, ...], seconds: float
) -> None:
    # With LOCAL_RANK set, Lightning starts no processes of its own; a file needs no free port.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.8 * seconds)  # a rank that hangs says where
    meeting, timeout = f"file://{folder}/rendezvous", timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timeout)
    function(folder, *args)
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()  # not after an error, when the other ranks may wait for this one
    # A thread of gloo that still holds a tensor when Python ends aborts the process (torch 2.14, seen under load in
    # `AsyncAllgatherCoalescedWork`), so Python does not end: all that the test asks has been seen.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
