"""The decoder over several processes: cut by FSDP2, and never whole on any of them.

Each block is gathered by itself, just before it runs; embedding, last norm and head together, as the root. The weights
come into being already cut: the decoder is built on the meta device, cut, and only then given memory. They are drawn
one parameter at a time, whole, from the random numbers of the first process, and each process keeps its part. So they
are those of a decoder that was never cut, bit for bit, on any number of processes, and what exists at once is a shard
and one parameter in fp32.

Gradients are summed in fp32. Blocks may be gathered in bf16 where the weights are fp32 and the compute is bf16; the
root is gathered as it is stored, because its embedding begins the residual stream.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_fp8.models.decoder import Decoder, assign


def shard(decoder: Decoder, mesh: DeviceMesh, *, gather_dtype: torch.dtype | None = None) -> Decoder:
    """Cuts `decoder` along the last dimension of `mesh`, in place; along another, processes hold copies (HSDP).

    Args:
        decoder: On the meta device, for `materialize`, or with its weights.
        mesh: The data-parallel processes, of one or two dimensions.
        gather_dtype: Of the gathered weights of blocks; None is their own.

    Returns:
        `decoder`.
    """
    policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(decoder, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return decoder


def materialize(decoder: Decoder, device: torch.device) -> Decoder:
    """`Decoder.materialize` for a decoder that was cut; every process of the mesh must call it.

    Returns:
        `decoder`.
    """
    weight = decoder.embedding.weight
    if isinstance(weight, DTensor):
        _share_random_numbers(device, weight.device_mesh)
    decoder.materialize(device)
    return decoder


def mesh_of(data_parallel: DeviceMesh, processes_a_copy: int | None) -> DeviceMesh:
    """The mesh that `shard` cuts along, from the data-parallel processes.

    Args:
        data_parallel: One dimension.
        processes_a_copy: How many processes hold one copy of the model together; None is all.

    Raises:
        ValueError: They do not divide the processes.
    """
    processes = data_parallel.size()
    if processes_a_copy is None or processes_a_copy == processes:
        return data_parallel
    if processes_a_copy < 1 or processes % processes_a_copy:
        raise ValueError(
            f"processes_a_copy is {processes_a_copy}, which does not divide the {processes} data-parallel processes:"
            " choose a divisor, such as the number of devices in a node."
        )
    ranks = data_parallel.mesh.view(-1, processes_a_copy)
    mesh = DeviceMesh(data_parallel.device_type, ranks, mesh_dim_names=("copies", "shards"))
    _wait_as_long_as_all(mesh)
    return mesh


def _wait_as_long_as_all(mesh: DeviceMesh) -> None:
    """Gives the groups of a mesh the timeout of the job's: torch gives new ones its own, half an hour for gloo."""
    device, everyone = torch.device(mesh.device_type), distributed_c10d._get_default_group()
    timeout = everyone._get_backend(device).options._timeout
    set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout  # before 2.15
    for dimension in range(mesh.ndim):
        set_timeout(timeout, mesh.get_group(dimension))


def copy_weights(weights: dict[str, Tensor], decoder: Decoder) -> None:
    """Copies whole `weights` (a state dict, on any device) into a decoder that may be cut; each is read as it is used.

    Raises:
        ValueError: A weight is missing, or has another shape.
    """
    for name, p in decoder.state_dict().items():
        if name not in weights or weights[name].shape != p.shape:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise ValueError(f"The weight {name} should have shape {tuple(p.shape)}, and it is {found}.")
        assign(p, weights[name])


def _share_random_numbers(device: torch.device, mesh: DeviceMesh) -> None:
    """Continues the random numbers of the first process on all: parts of one draw must be of the same draw."""
    source = torch if device.type == "cpu" else torch.get_device_module(device)
    state = source.get_rng_state().to(device)
    for dimension in range(mesh.ndim):
        dist.broadcast(state, group=mesh.get_group(dimension), group_src=0)
    source.set_rng_state(state.cpu())
