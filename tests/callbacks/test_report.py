import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import RunLog, RunReport, Throughput
from lightning_fp8.compute import gemm
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderConfig, DecoderLM
from lightning_fp8.optim import WarmupCosine

SHAPE = DecoderConfig(vocab_size=272, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=96)
STEPS, BATCH, LENGTH = 3, 2, 8
KEYS = ["val/loss", "val/perplexity", "val/bits_per_byte"]
KEYS += ["tokens_per_second", "fp8/linears", "fp8/flop_share", "bytes_per_param", "torch_threads"]


def fit(folder: Path, data: Path, callbacks: list[Callback], model: DecoderLM | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        plugins=options.pop("plugins", FP8Precision(weights="bf16")),
        default_root_dir=folder,
        logger=RunLog(str(folder)),
        callbacks=[Throughput(warmup_batches=0), *callbacks],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{
            "max_steps": STEPS,
            "limit_val_batches": 2,
            "val_check_interval": STEPS,
            "check_val_every_n_epoch": None,
            **options,
        },
    )
    model = model or DecoderLM(SHAPE, schedule=WarmupCosine(warmup_steps=1))
    trainer.fit(model, datamodule=TokenDataModule(str(data), sequence_length=LENGTH, batch_size=BATCH))
    return trainer


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs") / "report"
    trainer, threads = fit(folder, prepared, [RunReport()]), torch.get_num_threads()
    summary = json.loads((folder / "summary.json").read_text())
    return SimpleNamespace(folder=folder, trainer=trainer, summary=summary, threads=threads)


def test_summary_has_the_documented_keys(run: Any) -> None:
    assert list(run.summary) == KEYS
    assert list(run.summary["bytes_per_param"]) == ["weights", "grads", "moments"]


def test_summary_repeats_what_was_logged(run: Any) -> None:
    rows = run.trainer.logger.rows()
    logged = {name: float(row[name]) for row in rows for name in KEYS if row.get(name)}
    for name in KEYS[:3]:
        assert run.summary[name] == pytest.approx(logged[name])
    assert run.summary["val/perplexity"] == pytest.approx(math.exp(run.summary["val/loss"]), rel=1e-5)
    assert run.summary["tokens_per_second"] > 0


def test_the_number_of_threads_is_recorded_and_another_is_warned_of(run: Any, tmp_path: Path) -> None:
    threads = run.summary["torch_threads"]
    assert threads == run.threads
    torch.set_num_threads(threads)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["RunReport"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RunReport().load_state_dict(state)
    torch.set_num_threads(threads + 1)
    expected = rf"made with {threads} torch threads and goes on with {threads + 1}.*OMP_NUM_THREADS={threads}"
    with pytest.warns(UserWarning, match=expected):
        RunReport().load_state_dict(state)


def test_every_linear_of_the_blocks_ran_in_fp8(run: Any) -> None:
    assert run.summary["fp8/linears"] == 7 * SHAPE.num_layers


def test_flop_share_is_that_of_the_shapes(run: Any) -> None:
    """Each linear layer has three GEMMs of 2 MKN.

    What attention adds depends on the kernel: between nothing (not counted) and, a query-key pair and width, 2 x 2
    forward and 2 x 5 backward, where the scores are computed again.
    """
    d, tokens = SHAPE.hidden_size, BATCH * LENGTH
    in_fp8 = 3 * 2 * tokens * SHAPE.num_layers * (4 * d * d + 3 * d * SHAPE.intermediate_size)
    head = 3 * 2 * tokens * d * SHAPE.vocab_size
    attention = (4 + 10) * SHAPE.num_layers * tokens * LENGTH * d
    assert in_fp8 / (in_fp8 + head + attention) <= run.summary["fp8/flop_share"] <= in_fp8 / (in_fp8 + head)


def test_bytes_are_those_of_bf16_and_fp8(run: Any) -> None:
    measured = run.summary["bytes_per_param"]
    count = sum(p.numel() for p in run.trainer.model.parameters())
    state = [value for s in run.trainer.optimizers[0].state.values() for value in s.values()]
    assert measured["weights"] == measured["grads"] == 2.0
    assert measured["moments"] == pytest.approx(sum(t.numel() * t.element_size() for t in state) / count)
    assert 2.0 < measured["moments"] < 2.5


def test_loss_curve_is_a_picture(run: Any) -> None:
    picture = (run.folder / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


def test_tokenizer_lies_beside_the_checkpoints(run: Any, prepared: Path) -> None:
    assert (run.folder / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()


def test_a_run_without_fp8_says_so(prepared: Path, tmp_path: Path) -> None:
    fit(tmp_path, prepared, [RunReport()], max_steps=1, plugins=None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == KEYS[3:]  # no validation, no loss
    assert summary["fp8/linears"] == summary["fp8/flop_share"] == 0
    assert summary["bytes_per_param"]["weights"] == 4.0


class Stop(Callback):
    """What EarlyStopping does, after the first validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = True


def test_a_run_that_is_stopped_early_is_reported(prepared: Path, tmp_path: Path) -> None:
    trainer = fit(tmp_path, prepared, [RunReport(), Stop()], max_steps=50)
    assert trainer.global_step == STEPS
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == KEYS
    assert summary["bytes_per_param"]["grads"] == 2.0


def test_gradient_accumulation_is_measured_as_well(prepared: Path, tmp_path: Path) -> None:
    fit(tmp_path, prepared, [RunReport()], max_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 2.0 < summary["bytes_per_param"]["moments"] < 2.5


class Failing(DecoderLM):
    """Fails in its first batch, after a forward."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        super().training_step(batch, batch_idx)
        raise RuntimeError("first batch")


def test_counters_are_taken_off_when_the_first_batch_fails(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="first batch"):
        fit(tmp_path, prepared, [RunReport()], Failing(SHAPE))
    assert gemm._records == []
    assert _get_current_dispatch_mode() is None
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(("interval", "said"), [(STEPS, "nats a token "), (2, "nats a token, at step 2")])
def test_the_table_says_which_step_was_validated(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: int, said: str
) -> None:
    fit(tmp_path, prepared, [RunReport()], val_check_interval=interval)
    printed = capsys.readouterr().out
    assert f"After {STEPS} steps" in printed
    assert said in printed
