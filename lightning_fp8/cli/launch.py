"""A configuration fitted to the processes there are, so that a job that lost some of them goes on with the rest.

torchrun starts again, after a failure, with as many processes as it can get, and from the same command line. Their
number is a fact by then, and what a configuration says of it, for the launch it was written for, gives way.
"""

import os
from typing import Any

from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_fp8 import hardware

_A_CORE = 16  # processes of a CPU's core, at most: each takes half a gigabyte and a second to start
_LARGEST = 2**31 - 1
_SHARDING = "ModelParallelStrategy"


def follow_torchrun(config: Any) -> None:
    """Sets devices, nodes and the data-parallel size to what torchrun has started, if it was torchrun.

    Args:
        config: Of a verb, before anything is made of it; changed in place.

    Raises:
        ValueError: A restart would fail.
    """
    if not TorchElasticEnvironment.detect():
        return
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torch 2.15 keeps one store over all restarts, and what its process groups wrote into it.
        raise ValueError(
            "torchrun --max-restarts would fail at the first restart: processes would look for each other at the"
            " addresses of those before. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun."
        )
    world, devices = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    _set(config.trainer, "devices", devices)
    _set(config.trainer, "num_nodes", world // devices)
    strategy = config.trainer.get("strategy")
    if getattr(strategy, "get", None) and str(strategy.get("class_path")).endswith(_SHARDING):
        cut = strategy.init_args.get("tensor_parallel_size")
        if isinstance(cut, int) and world % cut == 0:
            _set(strategy.init_args, "data_parallel_size", world // cut)


def check_processes(accelerator: object, devices: object) -> None:
    """Checks how many processes are to be started on a CPU; on GPUs Lightning counts these.

    Raises:
        ValueError: They are none, or more than this machine could run.
    """
    cores = os.cpu_count() or 1
    on_cpu = accelerator == "cpu" or (accelerator in (None, "auto") and hardware.device_type() == "cpu")
    if not on_cpu or not isinstance(devices, int | str | list) or devices == "auto":
        return
    number = int(str(devices)) if str(devices).isdecimal() else 0  # a list of GPUs is no number, either
    if number < 1:
        raise ValueError(f"trainer.devices is {devices}: on a CPU it is a number of processes, 1 or more.")
    if number > _A_CORE * cores:
        raise ValueError(
            f"trainer.devices is {devices}: on a CPU that many processes would start, and this machine has {cores}"
            f" cores. Set it to {cores} or less."
        )


def check_nodes(num_nodes: object) -> None:
    """Checks that more than one node is asked for only where something has started the others.

    Raises:
        ValueError: The run would wait for nodes that cannot find it.
    """
    if not isinstance(num_nodes, int) or num_nodes == 1:
        return
    if num_nodes < 1:
        raise ValueError(f"trainer.num_nodes is {num_nodes}; it must be 1 or more.")
    launchers = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment)
    if "MASTER_ADDR" not in os.environ and not any(launcher.detect() for launcher in launchers):
        raise ValueError(
            f"trainer.num_nodes is {num_nodes}, and nothing has started this run on the others: start it with srun or"
            " torchrun on each node, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there."
        )


def _set(config: Any, name: str, value: int) -> None:
    written = config.get(name)
    config[name] = value
    if written not in (value, "auto", None):
        rank_zero_info(f"torchrun: {name} is {value}, where the configuration says {written}.")


def batches_per_step(global_batch: int, batch: int, processes: int) -> int:
    """Batches that each process accumulates, for an optimizer step of so many sequences in all.

    Args:
        global_batch: Sequences of a step.
        batch: Sequences of a batch, of one process.
        processes: How many there are.

    Raises:
        ValueError: They do not come out even, or are no number of sequences.
    """
    if not 1 <= global_batch <= _LARGEST:
        raise ValueError(f"global_batch is {global_batch}; it must be from 1 to {_LARGEST}.")
    if global_batch % (batch * processes):
        raise ValueError(
            f"global_batch {global_batch} is no multiple of data.batch_size {batch} x {processes} processes:"
            f" set data.batch_size to a divisor of {global_batch / processes:g}, or start another number of processes."
        )
    return global_batch // (batch * processes)
