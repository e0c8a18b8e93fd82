"""FP8 gradient reduction through the Trainer, on two processes."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import spawn
from small_models import Regression, batches, trainer

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import FP8Gradients
from lightning_fp8.optim import FP8AdamW, enable_gradient_release


def fit(folder, steps, ckpt_path=None):
    """Trains up to `steps` on half of the batches, and saves."""
    torch.manual_seed(0)
    model, gradients = Regression(), FP8Gradients()
    save = ModelCheckpoint(folder, filename=f"{steps}-{ckpt_path is not None}", every_n_train_steps=steps)
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "max_steps": steps, "enable_checkpointing": True}
    run = trainer(folder, FP8Precision("delayed"), callbacks=[gradients, save], **options)
    run.fit(model, batches(8), ckpt_path=ckpt_path)
    return model, gradients, run, save.best_model_path


def train_and_resume(folder):
    whole, gradients, run, _ = fit(folder, 6)
    ways = 2
    state = gradients.state_dict()
    assert gradients.reduction is None
    assert state["names"] == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    sizes = torch.tensor([64 * 32, 64, 16 * 64, 16])
    assert torch.equal(state["counts"][:, 2], 6 * (ways + 1) * sizes)  # steps, casts, elements
    assert torch.allclose(state["headroom"], torch.full((4,), 0.5 * 2 ** (6 / 1000)))
    logged = run.callback_metrics
    assert {"fp8/gradient_underflow", "fp8/gradient_saturation"} <= set(logged)
    assert 0 <= logged["fp8/gradient_underflow"] < 0.1
    flat = torch.cat([p.detach().flatten() for p in whole.parameters()])
    others = [torch.empty_like(flat) for _ in range(ways)]
    dist.all_gather(others, flat)
    assert torch.equal(others[0], others[1])

    *_, checkpoint = fit(folder, 4)
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]["FP8Gradients"]
    assert torch.equal(saved["counts"][:, 2], 4 * (ways + 1) * sizes)
    resumed, again, _, _ = fit(folder, 6, checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert torch.equal(again.state_dict()["headroom"], state["headroom"])
    assert torch.equal(again.state_dict()["counts"], state["counts"])
    refuse_release(folder)


def refuse_release(folder):
    class Released(Regression):
        def configure_optimizers(self):
            optimizer = FP8AdamW(self.parameters(), lr=1e-2)
            enable_gradient_release(self, optimizer)
            return optimizer

    run = trainer(folder, strategy="ddp", devices=2, callbacks=[FP8Gradients()])
    with pytest.raises(ValueError, match="uses and frees them"):
        run.fit(Released(), batches(4))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    spawn(train_and_resume, 2, tmp_path)


def test_strategies_that_would_not_use_it_are_refused(tmp_path):
    with pytest.raises(ValueError, match="works with strategy ddp, and this is SingleDeviceStrategy"):
        trainer(tmp_path, callbacks=[FP8Gradients()]).fit(Regression(), batches(1))
