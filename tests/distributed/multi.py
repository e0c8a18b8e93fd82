"""Small fits of the decoder, alone or on several processes, for tests of strategies and checkpoints."""

import torch
import torch.distributed as dist
from lightning import seed_everything
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from small_models import QUIET
from torch.distributed.tensor import DTensor

from lightning_fp8 import convert_linears
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderConfig, DecoderLM
from lightning_fp8.optim import FP8AdamW, WarmupCosine

SHAPE = DecoderConfig(vocab_size=272, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=96)


def smooth(groups):
    """An optimizer that does not blow up the last bits of small gradients; fp32 moments."""
    return FP8AdamW(groups, lr=2e-3, eps=1e-2, moments="fp32")


class Seen(Callback):
    """The mean loss over all processes of each batch, and what each evaluation says."""

    def __init__(self):
        self.losses, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone() * trainer.accumulate_grad_batches
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.losses.append(loss.item() / trainer.world_size)

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(trainer.callback_metrics["val/loss"].item())


class Converted(DecoderLM):
    """In FP8 without a plugin, so that everything else stays in fp32."""

    recipe = None

    def configure_model(self):
        if self.decoder is None:
            super().configure_model()
            convert_linears(self, self.recipe)


def strategy_of(name, processes):
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    if name == "fsdp2 full":
        return ModelParallelStrategy(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy() if name == "ddp" else "auto"


def fit(folder, data, name="alone", plugin=None, *, recipe=None, steps=6, batch=8, resume=None, seed=0, **options):
    """Fits `steps` optimizer steps of `batch` sequences in all; returns the Trainer, the model and what was seen."""
    processes = dist.get_world_size() if dist.is_initialized() and name != "alone" else 1
    accumulate = options.get("accumulate_grad_batches", 1)
    optimizer = options.pop("optimizer", None) or (lambda groups: FP8AdamW(groups, lr=5e-3))
    seed_everything(seed, verbose=False)
    seen = Seen()
    trainer = Trainer(
        strategy=strategy_of(name, processes),
        devices=processes,
        plugins=[*([plugin] if plugin else []), *options.pop("plugins", [])],
        max_steps=steps,
        callbacks=[seen, *options.pop("callbacks", [])],
        default_root_dir=folder,
        use_distributed_sampler=False,
        **{"enable_checkpointing": False, "limit_val_batches": 0, **QUIET, **options},
    )
    kind = type("Converted", (Converted,), {"recipe": recipe}) if recipe else DecoderLM
    model = kind(SHAPE, optimizer, schedule=WarmupCosine(warmup_steps=2))
    loader = TokenDataModule(str(data), sequence_length=16, batch_size=batch // (processes * accumulate))
    trainer.fit(model, datamodule=loader, ckpt_path=resume)
    return trainer, model, seen


def whole(value):
    """A copy of a tensor, gathered if it is cut."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def contents(trainer, model):
    """What a fit ends with: weights, moments and the plugin's scales, gathered."""
    return state_of(model, trainer.optimizers[0], trainer.precision_plugin)


def state_of(model, optimizer, plugin):
    """Weights, moments and the plugin's scales, gathered."""
    names = dict(model.named_parameters())
    found = {f"weight {name}": whole(p) for name, p in names.items()}
    for name, p in names.items():
        found |= {f"{key} {name}": whole(value) for key, value in optimizer.state[p].items()}
    for module, scales in enumerate(plugin.state_dict().get("scales", [])):
        for name, layer in scales["layers"].items():
            found |= {f"{key} {module} {name}": v.clone() for key, v in layer.items() if isinstance(v, torch.Tensor)}
    return found


def assert_all_have(found):
    """Every process ended with the same numbers, and they are numbers."""
    mine = torch.stack([value.double().sum() for value in found.values()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(one, mine) for one in everyone)
    assert mine.isfinite().all()


def different(a, b):
    """Names of what is not the same, bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
