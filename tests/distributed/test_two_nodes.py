"""Two nodes, which are two launches on one machine: copies between them, a copy cut over the processes of each."""

import re
import socket

import jobs
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

# Of a node, where configs/cluster/two-nodes.yaml has eight devices.
SIZES = ("--model.processes_a_copy=2", "--global_batch=32")


def node(folder, data, rank, port):
    torchrun = ("--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "2")
    torchrun += ("--master-addr", "127.0.0.1", "--master-port", str(port))
    options = (*SIZES, "--trainer.strategy.init_args.timeout=0:02:00")
    return jobs.fit(folder, data, *options, strategy="cluster/two-nodes", torchrun=torchrun, wait=False)


def weights(folder):
    dcp_to_torch_save(folder / "run/checkpoints/last.ckpt", folder / "whole.pt")
    return torch.load(folder / "whole.pt")["state_dict"]


@pytest.mark.slow
def test_two_nodes_train_as_one_does(prepared, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [node(tmp_path / "nodes", prepared, rank, port) for rank in (0, 1)]
    ends = [jobs.ended(process) for process in nodes]
    assert [status for status, _ in ends] == [0, 0], ends[0][1][-3000:]
    assert re.search(r"torchrun: devices is 2, where the configuration says 8", ends[0][1])
    four = tmp_path / "four"
    torchrun = ("--standalone", "--nproc-per-node", "4")
    status, printed = jobs.fit(four, prepared, *SIZES[1:], torchrun=torchrun)
    assert status == 0, printed[-3000:]
    ours, expected = jobs.curve(tmp_path / "nodes"), jobs.curve(four)
    assert len(ours) == len(expected) == 8
    # Gradients are summed in fp32, in two stages: weights may be rounded otherwise now and then.
    for (step, rate, loss), (other_step, other_rate, other_loss) in zip(ours, expected, strict=True):
        assert (step, rate) == (other_step, other_rate)
        assert abs(float(loss) - float(other_loss)) < 1e-3
    nodes_weights, four_weights = weights(tmp_path / "nodes"), weights(four)
    assert nodes_weights.keys() == four_weights.keys()
    for (
        name,
        weight,
    ) in nodes_weights.items():  # and after eight steps of Adam, of 1e-3 each at most, are where they were
        assert (weight - four_weights[name]).abs().max() < 2e-3, name
