"""Gradients of DistributedDataParallel, averaged in FP8: a communication hook, and what it remembers.

    ddp = DistributedDataParallel(model)                    reduction = FP8GradientReduction(ddp)
    model = fabric.setup(model, optimizer)[0]               reduction = FP8GradientReduction(model)
    Trainer(strategy="ddp", callbacks=[FP8Gradients()])     see `lightning_fp8.callbacks`

How it is computed, and how exactly, is told in `reduction.py`. Three collectives a bucket: an all-reduce of one fp32
number a tensor, an all-to-all and an all-gather of bytes, which is half of what bf16 sends. All but the calls is
asynchronous on a GPU: DDP goes on with backward meanwhile, and nothing is read back to the host.

The headroom belongs to a parameter, by name, and not to a bucket, which DDP makes anew after the first step. It is the
same on every rank, so one rank's checkpoint is everyone's.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # DDP asks for it in the hook's signature
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_fp8.distributed.reduction import (
    Counts,
    accumulate,
    chunk_length,
    decode_into,
    encode,
    largest_magnitudes,
    next_headroom,
    shared_scale,
    within_chunk,
)
from lightning_fp8.numerics import FORMATS

_VERSION = 1


class _Bucket(NamedTuple):
    """The tensors that are reduced together.

    Attributes:
        places: int64 [P], their numbers among the model's parameters.
        sizes: int64 [P], elements of each.
        chunk: Elements that each rank owns.
        owned: Where each tensor lies in this rank's chunk.
    """

    places: Tensor
    sizes: Tensor
    chunk: int
    owned: list[slice]


class FP8GradientReduction:
    """Averages the gradients of a model in DistributedDataParallel in FP8, from now on.

    Save it with the model (`fabric.save(path, {"model": model, "reduction": reduction})`): its state is the headroom of
    every tensor, and what the casts did so far. With one process nothing is sent, and gradients stay as they are.

    Args:
        model: In DistributedDataParallel, as torch or `fabric.setup` returns it.
        format: On the wire: "e4m3" or, with a wider range and half the precision, "e5m2".

    Raises:
        ValueError: The model is not in DistributedDataParallel, or there is no such format.
    """

    def __init__(self, model: nn.Module, format: Literal["e4m3", "e5m2"] = "e4m3") -> None:
        if format not in FORMATS:
            raise ValueError(f"FP8GradientReduction: format {format!r} is not one of {', '.join(FORMATS)}.")
        ddp = getattr(model, "_forward_module", model)  # which Fabric has wrapped
        if not isinstance(ddp, DistributedDataParallel):
            raise ValueError(
                f"FP8GradientReduction is for DistributedDataParallel, and this model is a {type(ddp).__name__}."
                " Wrap it first (strategy ddp); FSDP2 reduces gradients by itself, in its mp_policy's dtype."
            )
        parameters = [(name, p) for name, p in ddp.module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in parameters]
        self._format = FORMATS[format]
        self._group: Any = ddp.process_group
        self._ways = dist.get_world_size(self._group)
        self._places = {p: place for place, (_, p) in enumerate(parameters)}
        self._buckets: dict[tuple[int, ...], _Bucket] = {}
        device = parameters[0][1].device
        self.headroom = torch.full((len(parameters),), 1 / self._ways, device=device)
        self.counts = torch.zeros(len(parameters), 3, dtype=torch.int64, device=device)
        ddp.register_comm_hook(None, self._reduce)

    def rates(self) -> dict[str, Tensor]:
        """Shares of all casts so far, those sent and those returned, on all ranks: fp32 scalars on the device."""
        saturated, underflown, casts = self.counts.sum(0).unbind()
        return {"saturation": saturated / casts.clamp_min(1), "underflow": underflown / casts.clamp_min(1)}

    def state_dict(self) -> dict[str, Any]:
        """The headroom and the counts (saturated, underflown, all casts) of each parameter."""
        return {
            "version": _VERSION,
            "names": list(self.names),
            "headroom": self.headroom.clone(),
            "counts": self.counts.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned, of any number of ranks; parameters it does not name start anew.

        Raises:
            ValueError: The state is of a later version than this library knows.
        """
        if state["version"] > _VERSION:
            raise ValueError(
                f"The state of FP8GradientReduction is of version {state['version']}, and this lightning-fp8 knows"
                f" {_VERSION}: upgrade lightning-fp8, or leave the state out."
            )
        saved = {name: place for place, name in enumerate(state["names"])}
        both = [(place, saved[name]) for place, name in enumerate(self.names) if name in saved]
        here, there = [place for place, _ in both], [place for _, place in both]
        self.headroom[here] = state["headroom"].to(self.headroom)[there].clamp(1 / self._ways, 1)
        self.counts[here] = state["counts"].to(self.counts)[there]

    def _reduce(self, _: None, bucket: GradBucket) -> Future[Tensor]:
        """The hook: starts the average of a bucket."""
        buffer: Tensor = bucket.buffer()
        start: Future[Any] = Future(devices=[buffer.device] if buffer.is_cuda else [])
        if self._ways == 1:
            start.set_result(buffer)
            return start
        gradients: list[Tensor] = bucket.gradients()
        known = self._bucket(tuple(self._places[p] for p in bucket.parameters()), gradients)
        largest = largest_magnitudes(gradients)
        shared: Any = dist.all_reduce(largest, dist.ReduceOp.MAX, self._group, async_op=True)
        if buffer.is_cuda:
            # NCCL's futures call back at once, on a stream of their own, which all that follows then waits in.
            averaged: Future[Tensor] = shared.get_future().then(
                lambda _: self._average(known, gradients, largest, buffer)
            )
            return averaged
        # Gloo's call back on a thread of its own, where collectives of two buckets could change places.
        shared.wait()
        start.set_result(self._average(known, gradients, largest, buffer))
        return start

    def _average(self, bucket: _Bucket, gradients: list[Tensor], largest: Tensor, buffer: Tensor) -> Tensor:
        ways, fmt, headroom = self._ways, self._format, self.headroom[bucket.places]
        scale = shared_scale(largest, fmt)
        sent, at_sending = encode(gradients, scale, fmt, ways * bucket.chunk)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        mine, at_returning = accumulate(received.view(ways, -1), bucket.owned, headroom, fmt)
        counts = torch.stack(_added(at_sending, at_returning, scale.isfinite()))
        message = torch.cat([mine, counts.flatten().view(torch.uint8)])
        gathered = message.new_empty(ways * len(message))
        dist.all_gather_into_tensor(gathered, message, group=self._group)
        messages = gathered.view(ways, -1)
        decode_into(gradients, messages[:, : bucket.chunk].flatten(), scale, headroom, ways, fmt)
        counts = messages[:, bucket.chunk :].contiguous().view(torch.int32).view(ways, 2, -1).sum(0)
        self.headroom[bucket.places] = next_headroom(headroom, counts[0], bucket.sizes, ways)
        self.counts[bucket.places] += torch.stack([*counts, (ways + 1) * bucket.sizes], dim=1)
        return buffer

    def _bucket(self, places: tuple[int, ...], gradients: list[Tensor]) -> _Bucket:
        if places not in self._buckets:
            sizes = [g.numel() for g in gradients]
            chunk = chunk_length(sum(sizes), self._ways)
            start = dist.get_rank(self._group) * chunk
            device = gradients[0].device
            self._buckets[places] = _Bucket(
                torch.tensor(places, device=device),
                torch.tensor(sizes, device=device),
                chunk,
                list(within_chunk(sizes, start, start + chunk)),
            )
        return self._buckets[places]


def _added(first: Counts, second: Counts, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Both casts together; of tensors that are not finite, nothing is said."""
    saturated, underflown = (a + b for a, b in zip(first, second, strict=True))
    return saturated * finite, underflown * finite
