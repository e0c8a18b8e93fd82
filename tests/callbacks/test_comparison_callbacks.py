"""What parity adds to runs: the control's dead blocks, and the sizes of gradients and updates."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from small_models import QUIET
from torch import nn
from torch.utils.data import DataLoader

from lightning_fp8.callbacks import DeadBlocks, StepSizes
from lightning_fp8.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=16, qk_norm=False
)


def test_blocks_are_dead_and_the_rest_is_not() -> None:
    torch.manual_seed(0)
    module = SimpleNamespace(decoder=Decoder(CONFIG))
    tokens = torch.randint(32, (2, 9))

    def loss() -> torch.Tensor:
        module.decoder.zero_grad()
        value = module.decoder(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        return value

    before = loss()
    alive = {name for name, p in module.decoder.named_parameters() if p.grad.any()}
    callback = DeadBlocks()
    callback.on_fit_start(None, module)
    assert torch.equal(loss(), before)
    grads = {name: p.grad for name, p in module.decoder.named_parameters()}
    assert {name for name, grad in grads.items() if grad.any()} == {"embedding.weight", "norm.weight", "lm_head.weight"}
    assert all(grad is not None for grad in grads.values())  # DDP waits for each
    callback.on_fit_end(None, module)
    loss()
    assert {name for name, p in module.decoder.named_parameters() if p.grad.any()} == alive


def test_a_module_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder and its blocks"):
        DeadBlocks().on_fit_start(None, nn.Linear(2, 2))


class Line(LightningModule):
    """One weight, 2, whose gradient is 3; a step of 0.1 makes it 1.7."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.seen = []

    def training_step(self, batch, batch_idx):
        return 3 * self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *args):
        self.seen.append({k: float(v) for k, v in self.trainer.logged_metrics.items()})


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_are_measured_before_clipping_and_updates_after(clip) -> None:
    module = Line()
    options = {**QUIET, "log_every_n_steps": 2, "gradient_clip_val": clip}
    trainer = Trainer(max_steps=2, callbacks=[StepSizes()], enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(torch.zeros(4, 1)))
    moved = 0.1 * (clip or 3.0)
    assert trainer.logged_metrics["grad_norm"] == pytest.approx(3.0)
    assert trainer.logged_metrics["update_ratio"] == pytest.approx(moved / (2.0 - moved))
    assert "grad_norm" not in module.seen[0]  # weights are copied at the logging interval alone
