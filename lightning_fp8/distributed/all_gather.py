"""FSDP2 gathers the weights of FP8 layers as FP8 codes: one byte an element instead of the two of bf16.

A weight's scale must be that of the whole weight, of which a process holds a part. So the magnitudes of all weights
are reduced together, in one all-reduce, before the first forward pass after they changed. Then each process casts its
part, and what is gathered is, bit for bit, what a cast after a gather in bf16 would have been.

FSDP2 asks the local tensor of a sharded parameter what to gather (`fsdp_pre_all_gather`) and what to make of it
(`fsdp_post_all_gather`). Here that local tensor is a `Shard`: the same memory and dtype under another class, which
operators do not hand on. So optimizer, gradients and state dict see the plain parameter, and checkpoints are those of a
model that is gathered in bf16. Moving a module or loading into it makes new local tensors; a hook that runs before
FSDP2's own looks after them, and after weights that changed.

Codes travel as uint8, because gloo knows no FP8. What is gathered is decided once a layer, at its first gather: FSDP2
keeps the buffers. A layer that is switched out of FP8 later computes with the decoded values (`compute/gathered.py`).
The protocol is torch's; the idea of gathering in FP8 with precomputed scales is that of torchao's float8 training.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_fp8.compute.gathered import GatheredWeight
from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.compute.recipe import ROLES, Operand, Recipe
from lightning_fp8.kernels import cast
from lightning_fp8.numerics.quantize import scale_of


def gather_in_fp8(module: nn.Module) -> list[str]:
    """Has FSDP2 gather the weights of the FP8 layers of `module` as codes; idempotent.

    Call it after `convert_linears` and `fully_shard`, and before the first forward pass. An optimizer that changes
    weights past torch's version counter, as fused kernels do, has to be followed by `end_step` of `compute`; the
    precision plugins see to it.

    Returns:
        The names of the layers whose weights are gathered in FP8: those that `fully_shard` cut.

    Raises:
        ValueError: A layer's recipe needs its weight in high precision, or with finer scales than one a tensor.
    """
    names = []
    for name, layer in module.named_modules():
        if isinstance(layer, FP8Linear):
            if reason := why_not(layer.fp8_recipe):
                raise ValueError(f"The weight of {name} cannot be gathered in FP8: {reason}.")
            if isinstance(layer.weight, DTensor):
                names.append(name)
    for root in _roots(module):
        hooks = root._forward_pre_hooks.values()
        if not any(isinstance(hook, _Gathering) for hook in hooks):
            layers = [layer for layer in root.modules() if isinstance(layer, FP8Linear)]
            root.register_forward_pre_hook(_Gathering(layers), prepend=True)  # before FSDP2's own
    return names


def why_not(recipe: Recipe) -> str | None:
    """Why weights cannot be gathered in FP8 under `recipe`; None if they can."""
    if recipe.weight.granularity != "tensor":
        return f"it is scaled by {recipe.weight.granularity}, and a part of it knows the scale of the whole alone"
    kept = [gemm for gemm in ("forward", "input_grad") if gemm in recipe.high_precision]
    return f"the {kept[0]} GEMM takes it in high precision" if kept else None


def check_gather(recipe: Recipe, backend: str, *, in_bf16: bool) -> None:
    """Checks that weights can be gathered in FP8 at all.

    Args:
        recipe: Of the layers.
        backend: Of the plugin.
        in_bf16: Whether the layers are to run in high precision at times.

    Raises:
        ValueError: They cannot.
    """
    if backend == "transformer_engine":
        reason: str | None = "Transformer Engine's layers cast their weights themselves"
    elif in_bf16:
        reason = "steps or evaluations in bf16 would use weights that have been through FP8"
    else:
        reason = (found := why_not(recipe)) and f"of the weight, {found}"
    if reason:
        raise ValueError(f"fp8_all_gather is not possible here: {reason}. Leave it out, or change that.")


def _roots(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that `fully_shard` was called with; those inside are gathered in their forward passes."""
    if isinstance(module, FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _roots(child)


class _Gathering:
    """What a root does before its forward pass: it makes shards of local tensors, and measures weights that changed."""

    def __init__(self, layers: list[FP8Linear]) -> None:
        self.layers = layers
        self.operands = [layer.fp8_recipe.weight for layer in layers]
        self.measured: list[_Version] = []

    def __call__(self, root: nn.Module, args: Any) -> None:
        found = [self._version(layer, operand) for layer, operand in zip(self.layers, self.operands, strict=True)]
        versions = [version for version in found if version is not None]
        layers = [layer for layer, version in zip(self.layers, found, strict=True) if version is not None]
        same = len(versions) == len(self.measured) and all(map(_Version.same, versions, self.measured))
        stale = any(isinstance(layer, FP8Linear) and layer.fp8_weight_amax is None for layer in layers)
        if layers and (stale or not same):
            _measure(layers, [version.shard for version in versions])
            self.measured = versions

    @staticmethod
    def _version(layer: FP8Linear, operand: Operand) -> "_Version | None":
        """The shard of a layer's weight; None where it is gathered now, as a root stays after an evaluation."""
        weight = layer.weight
        if not isinstance(weight, DTensor):
            return None
        local = weight._local_tensor
        if not isinstance(local, Shard):
            local = local.detach().as_subclass(Shard)
            weight._local_tensor = local
        local.operand = operand
        return _Version(local, weight._version, local._version)


class _Version(NamedTuple):
    """A shard, and how often it was written: by way of the DTensor, and by way of its local part."""

    shard: "Shard"
    whole: int
    part: int

    def same(self, other: "_Version") -> bool:
        """Whether nothing was written between the two."""
        return self.shard is other.shard and self[1:] == other[1:]


@torch.inference_mode(False)  # the first forward pass may be an evaluation, and what it leaves is used in training
@torch.no_grad()
def _measure(layers: list[FP8Linear], shards: list["Shard"]) -> None:
    """Gives every shard the largest magnitude of the whole weight; one all-reduce for all of one mesh."""
    meshes: dict[DeviceMesh, list[int]] = {}
    for index, layer in enumerate(layers):
        weight: Any = layer.weight
        meshes.setdefault(weight.device_mesh, []).append(index)
    for mesh, members in meshes.items():
        largest = torch.zeros(len(members), dtype=torch.float32, device=shards[members[0]].device)
        filled = [i for i, member in enumerate(members) if shards[member].numel()]
        if filled:
            found = torch._foreach_norm([shards[members[i]] for i in filled], torch.inf)
            largest[filled] = torch.stack([norm.float() for norm in found])
        largest = largest.nan_to_num(nan=torch.inf, posinf=torch.inf)
        # Along the last dimension weights are cut; along another, processes hold copies.
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group(mesh.ndim - 1))
        for member, value in zip(members, largest.unbind(), strict=True):
            shards[member].largest = layers[member].fp8_weight_amax = value


class Shard(Tensor):
    """A part of a weight, in its own dtype, that is gathered as codes.

    Attributes:
        operand: How it is cast.
        largest: fp32 scalar, the largest magnitude of the whole weight.
    """

    operand: Operand
    largest: Tensor

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # operators return plain tensors

    # FSDP2 pads uneven parts anew when it finds them in other memory than before; they are to stay shards.
    def new_zeros(self, *args: Any, **kwargs: Any) -> "Shard":
        """As of any tensor, but a shard."""
        return super().new_zeros(*args, **kwargs).as_subclass(Shard)

    def narrow(self, *args: Any, **kwargs: Any) -> "Shard":
        """As of any tensor, but a shard."""
        part = super().narrow(*args, **kwargs).as_subclass(Shard)
        part.__dict__.update(self.__dict__)
        return part

    @torch.inference_mode(False)
    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor], tuple[Tensor, Tensor, Operand]]:
        """The codes of this part, as uint8 with the rows that the largest part has; scale and amax of the whole."""
        operand, dtype = self.operand, mp_policy.param_dtype or self.dtype
        amax = self.largest.to(dtype).float()  # rounding does not change which is the largest
        scale = scale_of(amax, operand.number_format, power_of_two=operand.power_of_two)
        if isinstance(module, FP8Linear) and module.fp8_scales is not None:
            remembered = module.fp8_scales.scale[ROLES.index("weight")]
            scale = torch.where(remembered > 0, remembered, scale)
        part = self.as_subclass(Tensor).to(dtype)
        made = cast(part, operand.number_format, rows=True, power_of_two=operand.power_of_two, remembered=scale).rows
        if made is None:
            raise ValueError("A weight could not be cast.")
        codes = made.codes.view(torch.uint8)
        rows = -(-outer_size[0] // mesh.size())
        if len(codes) < rows:
            codes = torch.cat([codes, codes.new_zeros(rows - len(codes), *codes.shape[1:])])
        return (codes,), (scale + amax * 0, amax, operand)

    @torch.inference_mode(False)
    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: tuple[Tensor, Tensor, Operand],
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight, from the codes of all parts; or new codes in the memory of `out`, which it was before."""
        (gathered,) = all_gather_outputs
        scale, amax, operand = metadata
        if isinstance(out, GatheredWeight):
            out.scale, out.largest = scale, amax
            return None
        codes = gathered.view(operand.number_format.dtype)
        return GatheredWeight(codes, scale, amax, param_dtype), (gathered,)
