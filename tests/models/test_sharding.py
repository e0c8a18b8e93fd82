"""The decoder cut over processes: what it starts from, what it computes, and what is never whole."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import spawn
from small_models import QUIET
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_fp8.models import Decoder, DecoderConfig, DecoderLM
from lightning_fp8.models.config import config_from_dict
from lightning_fp8.models.sharding import copy_weights, materialize, mesh_of, shard

SHAPE = {"vocab_size": 67, "hidden_size": 48, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
SHAPE |= {"intermediate_size": 80, "qkv_bias": True}
CONFIGS = Path(__file__).parents[2] / "configs/model"
CPU = torch.device("cpu")


def config_of(tied=False, **fields):
    return DecoderConfig(**SHAPE, tied_embeddings=tied, **fields)


def plain(config, seed=5, how="none"):
    torch.manual_seed(seed)
    return Decoder(config, activation_checkpointing=how)


def cut(config, mesh, seed=5, how="none"):
    torch.manual_seed(seed)
    with torch.device("meta"):
        decoder = Decoder(config, activation_checkpointing=how)
    return materialize(shard(decoder, mesh), CPU)


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


def same(a, b):
    names = [name for name, _ in b.named_parameters()]
    return names == [name for name, _ in a.named_parameters()] and all(
        torch.equal(whole(p), whole(q)) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def on_a_rank(folder):
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for tied in (False, True):
        # 67 rows over two processes: the last has fewer. Of seeds, the first process's counts.
        sharded = cut(config_of(tied), mesh, seed=5 + rank)
        assert all(isinstance(p, DTensor) and not p.is_meta for p in sharded.parameters())
        assert same(sharded, plain(config_of(tied)))
        assert (sharded.lm_head.weight is sharded.embedding.weight) is tied
    copy_weights(plain(config_of(), seed=9).state_dict(), sharded := cut(config_of(), mesh))
    assert same(sharded, plain(config_of(), seed=9))
    with pytest.raises(ValueError, match=r"lm_head.weight should have shape \(67, 48\), and it is missing"):
        copy_weights({k: v for k, v in plain(config_of()).state_dict().items() if k != "lm_head.weight"}, sharded)
    with pytest.raises(ValueError, match="does not divide the 2"):
        mesh_of(mesh, 3)
    assert mesh_of(mesh, None) is mesh
    copies = mesh_of(mesh, 1)
    assert copies.mesh.tolist() == [[0], [1]]
    assert same(cut(config_of(), copies, seed=5 + rank), plain(config_of()))
    for how in ("none", "selective", "full"):
        gradients_are_those_of_a_whole_decoder(mesh, how)
    no_process_holds_the_whole_model(mesh)


def gradients_are_those_of_a_whole_decoder(mesh, how):
    tokens = torch.randint(67, (4, 9), generator=torch.Generator().manual_seed(0))
    reference, sharded = plain(config_of()), cut(config_of(), mesh, how=how)
    loss = reference(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    mine = tokens[2 * mesh.get_local_rank() :][:2]
    part = sharded(mine[:, :-1], mine[:, 1:])
    part.backward()
    mean = part.detach().clone()
    dist.all_reduce(mean, group=mesh.get_group())
    torch.testing.assert_close(mean / 2, loss.detach(), rtol=1e-6, atol=0)
    for (name, p), q in zip(reference.named_parameters(), sharded.parameters(), strict=True):
        # fp32 sums in another order: 2^-24 a term, and a gradient here is a sum over 32 positions and more
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")


def lightning_module(config, **options):
    strategy = ModelParallelStrategy(**{"data_parallel_size": 2, "tensor_parallel_size": 1, **options})
    trainer = Trainer(strategy=strategy, devices=2, enable_checkpointing=False, **QUIET)
    model = DecoderLM(config)
    trainer.strategy.connect(model)
    model.trainer = trainer
    trainer.strategy.setup_environment()
    return model


def no_process_holds_the_whole_model(mesh):
    # 8 B parameters, half of them on each process, if they had memory.
    fields = yaml.safe_load((CONFIGS / "llama-3-8b.yaml").read_text())["model"]["config"]
    with torch.device("meta"):
        decoder = Decoder(config_from_dict(fields))
    elements = sum(p.numel() for p in decoder.parameters())
    shard(decoder, mesh)
    assert elements > 8e9
    assert sum(p.to_local().numel() for p in decoder.parameters()) == elements / 2
    assert all(p.is_meta for p in decoder.parameters())

    # 54 M parameters: a shard, one parameter in fp32, and never the 218 MB of all.
    big = {"vocab_size": 2048, "hidden_size": 1024, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8}
    model = lightning_module(DecoderConfig(**big, intermediate_size=2816))
    seed_everything(5, verbose=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.configure_model()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    size = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert grown < size / 2 + 2 * largest + 20e6, (grown, size, largest)

    with pytest.raises(ValueError, match="no plan for tensor parallelism, and tensor_parallel_size is 2"):
        lightning_module(config_of(), data_parallel_size=1, tensor_parallel_size=2).configure_model()


def test_a_cut_decoder_is_the_whole_one(tmp_path):
    spawn(on_a_rank, 2, tmp_path)
