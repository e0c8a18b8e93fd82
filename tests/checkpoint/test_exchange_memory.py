"""Exporting and importing hold no more of a model than they have to, and shards are as large as allowed."""

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from random_decoder import SHAPE, save
from safetensors import safe_open
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_fp8.checkpoint import exchange, export_checkpoint, import_checkpoint
from lightning_fp8.checkpoint.weights import Weights, open_ours, write_shards


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that `function` had allocated on the CPU at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def test_sharded_checkpoints_are_put_together(tmp_path: Path) -> None:
    """A folder as ModelParallelStrategy writes it: a distributed checkpoint, and the rest in meta.pt."""
    from torch.distributed import checkpoint as dcp

    decoder = save(SHAPE, tmp_path / "run/checkpoints/last.ckpt")
    state = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
    moments = {"m": torch.zeros(3)}
    dcp.save({"state_dict": state, "optimizer_0": moments}, checkpoint_id=tmp_path / "run/sharded", no_dist=True)
    torch.save({"decoder_config": asdict(SHAPE)}, tmp_path / "run/sharded/meta.pt")
    for source, target in (("sharded", "a"), ("checkpoints/last.ckpt", "b")):
        export_checkpoint(str(tmp_path / "run" / source), str(tmp_path / target))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_sharded_checkpoint_is_not_put_together_in_memory(tmp_path: Path) -> None:
    """Counted on what torch allocates: the shard that is written, and the tensor that is read."""
    from torch.distributed import checkpoint as dcp

    decoder = save(SHAPE, tmp_path / "run/checkpoints/last.ckpt")
    state = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
    total = sum(weight.nbytes for weight in state.values())
    largest = max(weight.nbytes for weight in state.values())
    dcp.save({"state_dict": state}, checkpoint_id=tmp_path / "run/sharded", no_dist=True)
    torch.save({"decoder_config": asdict(SHAPE)}, tmp_path / "run/sharded/meta.pt")
    source, target, shard = str(tmp_path / "run/sharded"), str(tmp_path / "hf"), total // 6
    peak = peak_bytes(lambda: export_checkpoint(source, target, shard_gb=shard / 1e9))
    assert 0 < peak <= shard + 2 * largest < total


class Alive:
    """Counts the bytes of the tensors passed on that nobody has dropped."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def watch(self, tensor: Tensor) -> Tensor:
        own = tensor.clone()
        self.now += own.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(own, self._drop, own.nbytes)
        return own

    def _drop(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("fp8", [False, True])
def test_an_export_holds_one_shard_at_a_time(
    fp8: bool, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, shard = Alive(), 40_000
    weights = open_ours(ckpt)
    sizes = [weights.read(name).nbytes for name in weights.names()]
    watched = Weights(weights.config, lambda name: alive.watch(weights.read(name)))
    monkeypatch.setattr(exchange, "open_ours", lambda path: watched)
    export_checkpoint(str(ckpt), str(tmp_path / "hf"), shard_gb=shard / 1e9, fp8=fp8)
    assert sum(sizes) > 4 * shard
    assert alive.peak <= shard + 2 * max(sizes)


def test_an_import_holds_the_model_once(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Alive()
    export_checkpoint(str(ckpt), str(tmp_path / "hf"), shard_gb=4e-5)
    opened = exchange.open_hf(tmp_path / "hf")
    total = sum(opened.read(name).nbytes for name in opened.names())
    watched = Weights(opened.config, lambda name: alive.watch(opened.read(name)))
    monkeypatch.setattr(exchange, "open_hf", lambda path: watched)
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert alive.peak == total


def test_shards_are_as_large_as_allowed(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i, size in enumerate([10, 10, 10, 50, 5, 5]):
            yield f"t{i}", torch.full((size,), i, dtype=torch.uint8)

    assert write_shards(tensors(), tmp_path, 25) == 90
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 90
    files = [
        [t for t, file in index["weight_map"].items() if file == f"model-0000{i}-of-00004.safetensors"]
        for i in range(1, 5)
    ]
    assert files == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert (opened.get_tensor(name) == int(name[1:])).all()
