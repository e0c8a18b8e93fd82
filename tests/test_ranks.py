"""Tests that start processes end, whatever these do."""

import multiprocessing
import time

import pytest
import torch.distributed as dist
from ranks import spawn


def hang(folder):
    if dist.get_rank() == 0:
        dist.barrier()  # which the other never comes to
    time.sleep(600)


def fail(folder):
    dist.barrier()
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 has failed")
    time.sleep(600)


def test_processes_that_hang_are_ended(tmp_path):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"2 processes were not done with hang after 5\.0 s"):
        spawn(hang, 2, tmp_path, seconds=5.0)
    assert time.monotonic() - started < 45
    assert multiprocessing.active_children() == []


def test_what_one_process_raises_ends_the_others(tmp_path):
    with pytest.raises(Exception, match="rank 1 has failed"):
        spawn(fail, 2, tmp_path)
    assert multiprocessing.active_children() == []
