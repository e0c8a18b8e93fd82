"""A process that is killed or hangs ends the job, which says so, or has torchrun start it again where it was."""

import time

import jobs
import pytest
import torch.distributed as dist
from jsonargparse import Namespace
from ranks import spawn

from lightning_fp8.cli.launch import batches_per_step, follow_torchrun
from lightning_fp8.distributed.peers import REMEDY, LostPeerError, name_culprit, naming_lost_peers

ELASTIC = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


def test_a_killed_rank_is_named_and_the_job_goes_on_as_if_nothing_had_happened(prepared, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Without a checkpoint "last" begins at the beginning. The fault is at step 5, after the checkpoint at 4.
    options = ("--ckpt_path=last", "--global_batch=16")
    status, printed = jobs.fit(whole, prepared, *options, torchrun=ELASTIC)
    assert status == 0, printed[-3000:]
    status, printed = jobs.fit(killed, prepared, *options, torchrun=ELASTIC, fault="1 5 SIGKILL")
    assert status == 0, printed[-3000:]
    said = [line for line in printed.splitlines() if line.startswith("lightning-fp8:")]
    assert len(said) == 1, printed[-3000:]
    assert said[0].startswith("lightning-fp8: rank 0 of 2, at optimizer step 5: rank 1 does not answer: killed,")
    assert REMEDY in printed
    assert "Traceback" not in printed
    assert len(jobs.curve(whole)) == 8
    assert jobs.curve(killed) == jobs.curve(whole)


def test_a_stopped_rank_ends_the_job_that_lightning_started(prepared, tmp_path):
    # 12 seconds from step 3 on; before, the strategy's, in which the processes must have started.
    started = time.monotonic()
    options = ("--trainer.devices=2", "--trainer.strategy.init_args.timeout=0:02:00")
    process = jobs.fit(tmp_path, prepared, *options, fault="1 3 SIGSTOP", wait=False, TIMEOUT="12")
    status, printed = jobs.ended(process)
    assert status == 1
    assert "lightning-fp8: rank 0 of 2, at optimizer step 3: rank 1 does not answer: killed, stopped" in printed
    assert "Timed out" in printed
    assert REMEDY in printed
    assert "Traceback" not in printed
    assert time.monotonic() - started < 110  # of which most is the start; and its output ended, as rank 1 did


@pytest.mark.slow
def test_the_strategy_s_timeout_is_how_long_a_stopped_rank_is_waited_for(prepared, tmp_path):
    options = ("--trainer.strategy.init_args.timeout=0:00:25",)
    torchrun = ("--standalone", "--nproc-per-node", "4")
    hsdp = ("--model.processes_a_copy=2",)  # whose groups torch would give half an hour
    status, printed = jobs.fit(tmp_path, prepared, *options, *hsdp, torchrun=torchrun, fault="2 3 SIGSTOP")
    assert status == 1
    assert "rank 2 does not answer: killed, stopped or out of reach" in printed
    assert "25000ms" in printed


def meet_or_fail(rank, failing):
    with naming_lost_peers() as peers:
        peers.step = 7
        dist.barrier()
        if rank == failing:
            raise ValueError("the data is not there")
        dist.barrier()


def lose(folder, failing):
    rank = dist.get_rank()
    with pytest.raises(ValueError if rank == failing else LostPeerError) as raised:
        meet_or_fail(rank, failing)
    if rank != failing:
        said = f"rank {rank} of 3, at optimizer step 7: rank 1 failed with ValueError: the data is not there ("
        assert str(raised.value).startswith(said)
        assert str(raised.value).endswith(REMEDY)


def test_what_one_rank_fails_with_is_said_by_the_others(tmp_path):
    spawn(lose, 3, tmp_path, 1)


def environment(monkeypatch, world, local, **others):
    variables = {"RANK": 0, "GROUP_RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    variables |= {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local, **others}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def config(**options):
    name = "lightning.pytorch.strategies.ModelParallelStrategy"
    strategy = Namespace(class_path=name, init_args=Namespace(**options))
    return Namespace(trainer=Namespace(devices=8, num_nodes=2, strategy=strategy))


def test_torchrun_s_processes_are_those_of_the_run(monkeypatch):
    alone = config(data_parallel_size=16, tensor_parallel_size=1)
    follow_torchrun(alone)
    assert (alone.trainer.devices, alone.trainer.num_nodes) == (8, 2)
    environment(monkeypatch, 12, 4)
    for size, expected in ((1, 12), (2, 6), ("auto", 16)):
        found = config(data_parallel_size=16, tensor_parallel_size=size)
        follow_torchrun(found)
        assert (found.trainer.devices, found.trainer.num_nodes) == (4, 3)
        assert found.trainer.strategy.init_args.data_parallel_size == expected


def test_a_restart_that_would_fail_is_refused_before_it_is_needed(monkeypatch):
    environment(monkeypatch, 2, 2, TORCHELASTIC_MAX_RESTARTS=1, TORCHELASTIC_USE_AGENT_STORE=True)
    with pytest.raises(ValueError, match="Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        follow_torchrun(config())
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    follow_torchrun(config())


def test_a_global_batch_is_that_of_any_number_of_processes():
    assert [batches_per_step(64, 4, processes) for processes in (1, 2, 4, 16)] == [16, 8, 4, 1]
    with pytest.raises(ValueError, match=r"64 is no multiple of data.batch_size 4 x 3 processes"):
        batches_per_step(64, 4, 3)
    with pytest.raises(ValueError, match="global_batch is 0; it must be from 1 to"):
        batches_per_step(0, 4, 1)


@pytest.mark.parametrize(
    ("before", "after", "ended", "said"),
    [
        ("00", "10", {}, "rank 1 does not answer"),
        ("0000", "1010", {}, "rank 1 and rank 3 does not answer"),
        ("005", "115", {0: "lost another process"}, "rank 2 does not answer"),
        ("00", "11", {0: "lost another process"}, "rank 1 is alive and did not come to the exchange"),
        ("00", "10", {1: "ValueError: no"}, "rank 1 failed with ValueError: no"),
        ("00", "11", dict.fromkeys(range(2), "lost another process"), "the network between the processes failed"),
        (["3", ""], ["4", ""], {}, "rank 1 does not answer"),
    ],
)
def test_who_is_blamed(before, after, ended, said):
    assert name_culprit(before, after, ended).startswith(said)
