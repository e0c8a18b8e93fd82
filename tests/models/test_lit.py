from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_fp8 import FP8Precision
from lightning_fp8.models import Decoder, DecoderConfig, DecoderLM
from lightning_fp8.models.config import RopeScaling
from lightning_fp8.models.saved import load_decoder
from lightning_fp8.optim import FP8AdamW, WarmupCosine

SHAPE = DecoderConfig(vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=96)
BATCH = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
LR = 1e-2
PRECISIONS = {
    "fp32": lambda: None,
    "fp8, fp32 weights": lambda: FP8Precision(weights="fp32"),
    "fp8, bf16 weights": lambda: FP8Precision(weights="bf16"),
}


class Watch(Callback):
    """Keeps the loss of each batch and, at each optimizer step, the learning rate."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def loader(batches: int = 40) -> DataLoader[torch.Tensor]:
    return DataLoader([BATCH] * batches, batch_size=None)


def model_of(config: DecoderConfig = SHAPE, **schedule: float) -> DecoderLM:
    torch.manual_seed(0)
    options = {"warmup_steps": 2, "final_ratio": 0.1, **schedule}
    return DecoderLM(config, lambda params: FP8AdamW(params, lr=LR), WarmupCosine(**options))


def trainer_of(precision: str = "fp32", **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        plugins=PRECISIONS[precision](),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def checkpoint(precision: str, tmp_path: Path) -> tuple[DecoderLM, Path]:
    """A model after two steps, and the checkpoint of it."""
    trainer, model = trainer_of(precision, max_steps=2), model_of()
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return model, tmp_path / "last.ckpt"


def test_a_batch_is_learnt_by_heart(precision: str) -> None:
    watch = Watch()
    trainer_of(precision, max_steps=40, callbacks=[watch]).fit(model_of(), loader())
    assert watch.losses[0] == pytest.approx(4.16, abs=0.1)  # ln 64
    assert watch.losses[-1] < 1.0


def test_checkpoint_rebuilds_the_decoder(checkpoint: tuple[DecoderLM, Path]) -> None:
    model, path = checkpoint
    content = torch.load(path, weights_only=True)
    assert content["decoder_config"] == asdict(SHAPE)
    assert "hyper_parameters" not in content
    assert set(content["state_dict"]) == {f"decoder.{name}" for name in Decoder(SHAPE).state_dict()}
    rebuilt = load_decoder(str(path))
    assert rebuilt.config == SHAPE
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(weight, rebuilt.state_dict()[name]), name
        assert weight.dtype == rebuilt.state_dict()[name].dtype


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, [1, 2], b"", b"text", b"PK\3\4 half a zip file"],
    ids=["other model", "list", "empty", "text", "cut"],
)
def test_load_decoder_refuses_other_files(content: object, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"other.ckpt is no DecoderLM checkpoint"):
        load_decoder(str(path))


def test_checkpoint_of_another_model_is_refused_with_all_differences() -> None:
    saved = asdict(replace(SHAPE, num_layers=3, qk_norm=False)) | {"experts": 8}
    with pytest.raises(ValueError, match="another model") as caught:
        model_of().on_load_checkpoint({"decoder_config": saved})
    message = str(caught.value)
    assert "num_layers is 1 here and 3 there" in message
    assert "qk_norm is True here and False there" in message
    assert "experts is missing here and 8 there" in message
    assert "hidden_size" not in message


def test_checkpoint_of_the_same_model_is_taken() -> None:
    model_of().on_load_checkpoint({"decoder_config": asdict(SHAPE)})


@pytest.mark.parametrize(("vocabulary", "fits"), [(65, False), (64, True), (10, True)])
def test_vocabulary_of_the_data_must_fit(vocabulary: int, fits: bool) -> None:
    model = model_of()
    data = SimpleNamespace(vocab_size=vocabulary, token_bytes=lambda: torch.ones(vocabulary, dtype=torch.int64))
    model._trainer = SimpleNamespace(datamodule=data)
    if fits:
        model.setup("fit")
        assert model.bits_per_byte is not None
    else:
        with pytest.raises(ValueError, match=r"set model\.config\.vocab_size to 65 or more"):
            model.setup("fit")


@pytest.mark.parametrize(
    ("options", "total"),
    [({"max_steps": 5}, 5), ({"max_epochs": 2, "limit_train_batches": 6}, 6), ({"max_epochs": 1}, 10)],
)
def test_schedule_moves_with_optimizer_steps(options: dict[str, int], total: int) -> None:
    watch, model = Watch(), model_of(warmup_steps=2)
    trainer = trainer_of(accumulate_grad_batches=2, callbacks=[watch], **options)
    trainer.fit(model, loader(20))
    assert watch.rates == pytest.approx([LR * model.schedule.multiplier(step, total) for step in range(total)])
    assert watch.rates[-1] == pytest.approx(LR * 0.1)  # final_ratio, so the total is what the schedule was given


def test_only_matrices_decay() -> None:
    trainer, model = trainer_of(max_steps=1), model_of()
    trainer.fit(model, loader())
    decay = {name: g["weight_decay"] for g in trainer.optimizers[0].param_groups for name in g["param_names"]}
    for name, p in model.named_parameters():
        assert decay.pop(name) == (0.01 if p.dim() >= 2 else 0.0), name
    assert not decay


def test_predict_gives_the_log_likelihood_of_each_token() -> None:
    model = model_of()
    (predicted,) = trainer_of().predict(model, loader(1))
    expected = model(BATCH[:, :-1]).log_softmax(-1).gather(-1, BATCH[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(predicted, expected)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_logs_the_mean_over_all_tokens(stage: str) -> None:
    model, trainer = model_of(), trainer_of()
    evaluate = trainer.validate if stage == "val" else trainer.test
    (logged,) = evaluate(model, DataLoader([BATCH, BATCH[:1]], batch_size=None), verbose=False)
    sequences = torch.cat([BATCH, BATCH[:1]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(sequences[:, :-1]).transpose(1, 2), sequences[:, 1:])
    assert logged == pytest.approx({f"{stage}/loss": loss.item(), f"{stage}/perplexity": loss.exp().item()}, rel=1e-5)
    assert model.perplexity.count == 0  # reset


def test_outside_a_trainer_the_decoder_is_made_when_called() -> None:
    logits = model_of()(BATCH[:, :-1])
    assert logits.shape == (4, 16, 64)


def test_released_gradients_train_the_same_model() -> None:
    """Also in a second fit, whose optimizer is another."""
    weights = []
    for released in (False, True):
        model = model_of()
        model.gradient_release = released
        for _ in range(2):
            trainer_of(max_steps=3).fit(model, loader())
        assert all((p.grad is None) is released for p in model.parameters())
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_gradients_that_are_released_cannot_be_clipped_or_accumulated(options: dict[str, Any]) -> None:
    model = model_of()
    model.gradient_release = True
    with pytest.raises(ValueError, match=next(iter(options))):
        trainer_of(max_steps=2, **options).fit(model, loader())


def test_training_can_begin_with_given_weights(checkpoint: tuple[DecoderLM, Path]) -> None:
    trained, path = checkpoint
    model = DecoderLM(SHAPE, initial_weights=str(path))
    model.configure_model()
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(weight, trained.decoder.state_dict()[name].float()), name
    longer = replace(SHAPE, rope_scaling=RopeScaling("linear", 4.0), context_length=512)  # of the same weights
    DecoderLM(longer, initial_weights=str(path)).configure_model()
    with pytest.raises(ValueError, match=r"last\.ckpt is of another model: num_layers is 5 here and 1 there"):
        DecoderLM(replace(SHAPE, num_layers=5), initial_weights=str(path)).configure_model()


def test_activation_checkpointing_changes_memory_alone() -> None:
    states = []
    for how in ("none", "full"):
        torch.manual_seed(0)
        model = DecoderLM(SHAPE, lambda params: FP8AdamW(params, lr=LR), activation_checkpointing=how)
        trainer_of("fp8, bf16 weights", max_steps=3).fit(model, loader())
        assert model.decoder.activation_checkpointing == how
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_documents_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model, sequence = DecoderLM(SHAPE, end_of_text=0), BATCH[:1].clone()
    sequence[0, 5] = 0
    packed, alone = model(sequence), model(sequence[:, 6:])
    torch.testing.assert_close(packed[:, 6:], alone, rtol=1e-4, atol=1e-5)
