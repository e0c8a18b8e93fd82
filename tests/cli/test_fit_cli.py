import csv
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import dropwhile
from pathlib import Path

import pytest
import torch
import yaml

from lightning_fp8.callbacks.start import training_flops
from lightning_fp8.cli.fit import parse_tokens
from lightning_fp8.cli.main import main
from lightning_fp8.compute.gemm import record_gemms
from lightning_fp8.data import prepare
from lightning_fp8.models import Decoder, DecoderConfig, DecoderLM

Fit = Callable[..., None]
FSDP = "lightning.pytorch.strategies.FSDPStrategy"
PLUGIN = "lightning_fp8.FP8Precision"
MIXED = {torch.float8_e4m3fn, torch.float8_e5m2}
BY_PATH = ["--fp8.enabled", "false", "--trainer.plugins", PLUGIN]
CONFIG = """
model:
  config: {vocab_size: 272, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 32}
data: {path: DATA, sequence_length: 8, batch_size: 2}
fp8: {weights: bf16}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 1
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_model_summary: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_fp8.callbacks.LastCheckpoint
    - class_path: lightning_fp8.callbacks.RunReport
"""


@pytest.fixture
def fit(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fit]:
    """Runs a verb, by default `fit`, with a tiny configuration and further options; the run's folder is `run`."""
    (tmp_path / "config.yaml").write_text(CONFIG.replace("DATA", str(prepared)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])  # LightningCLI reads it, so the verb sets it

    def call(*options: str, verb: str = "fit") -> None:
        main([verb, "--config", "config.yaml", "--trainer.default_root_dir", "run", *options])

    with warnings.catch_warnings():
        yield call


def steps(folder: str) -> list[int]:
    with Path(folder, "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--trainer.max_stepz", "3"], 2, "max_stepz"),
        (["--model.config.hiden_size", "3"], 2, "hiden_size"),
        (["--data.batch_size", "many"], 2, "data.batch_size"),
        (["--config", "missing.yaml"], 2, "missing.yaml"),
        (["--fp8.recipe", "tensorwize"], 1, "Did you mean 'tensorwise'?"),
        (["--fp8.recipe", "{inputt: {format: e5m2}}"], 1, "Did you mean 'input'?"),
        (["--fp8.recipe.input.formatt=e5m2"], 1, "Did you mean 'format'?"),
        (["--fp8.recipee", "delayed"], 2, "recipee"),
        (["--fp8.backend", "native"], 1, "'native' cannot run here"),
        (
            ["--trainer.strategy", "fsdp"],
            1,
            "strategies.ModelParallelStrategy",
        ),
        ([f'--trainer.strategy={{"class_path": "{FSDP}"}}'], 1, "with its data_parallel_size"),
        (["--trainer.plugins", PLUGIN], 1, "fp8.enabled and a precision plugin in trainer.plugins exclude each other"),
        ([*BY_PATH, "--trainer.plugins.recipe", "tensorwize"], 1, "Did you mean 'tensorwise'?"),
        ([*BY_PATH, "--trainer.plugins.recipe", "{scalling: delayed}"], 1, "Did you mean 'scaling'?"),
        ([*BY_PATH, "--trainer.plugins.recipee", "delayed"], 2, "recipee"),
        (["--trainer.precision", "bf16-mixed"], 1, "fp8.enabled and trainer.precision=bf16-mixed exclude each other"),
        (["--model.config.vocab_size", "100"], 1, "set model.config.vocab_size to 272 or more"),
        (["--data.path", "nowhere"], 1, "lightning-fp8 prepare"),
        (["--max_tokens", "1M"], 1, "max_tokens and trainer.max_steps=2 exclude each other"),
        (["--trainer.max_steps=-1", "--max_tokens", "1M", "--trainer.max_epochs=3"], 1, "trainer.max_epochs=3 exclude"),
        (["--trainer.max_steps=-1", "--max_tokens", "much"], 1, "max_tokens 'much' is no number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_briefly(
    options: list[str], code: int, said: str, fit: Fit, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(*options)
    shown = capfd.readouterr().err.splitlines()
    lines = list(dropwhile(lambda line: not line.startswith("lightning-fp8: "), shown))  # it is the last that is said
    assert stopped.value.code == code
    assert 1 <= len(lines) <= (3 if code == 2 else 1)
    assert said in "\n".join(lines)
    assert not Path("run/checkpoints").exists()


def test_a_run_leaves_its_folder_and_keeps_an_earlier_one(fit: Fit) -> None:
    fit()
    left = {path.name for path in Path("run").iterdir()}
    assert {"config.yaml", "metrics.csv", "loss.png", "checkpoints", "summary.json", "tokenizer.json"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_steps"] == 2

    fit("--trainer.max_steps", "1")
    assert (steps("run.1"), steps("run")) == ([0, 1], [0])

    fit("--trainer.max_steps", "3", "--ckpt_path", "last")
    assert steps("run") == [0, 1, 2]
    with pytest.raises(SystemExit):
        fit("--data.path", "nowhere")
    assert steps("run") == [0, 1, 2]
    assert not Path("run.2").exists()


def test_an_evaluation_leaves_the_run_as_it_was(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch", "null")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    summary = yaml.safe_load(Path("run/summary.json").read_text())
    capsys.readouterr()
    for verb, prefix in {"validate": "val", "test": "test", "predict": None}.items():
        limit = f"--trainer.limit_{prefix or verb}_batches"
        fit("--ckpt_path", "run/checkpoints/last.ckpt", limit, "1", "--trainer.max_steps", "9", verb=verb)
        shown = capsys.readouterr().out
        if prefix:  # the model, the data and the precision are those of the end of the run: so is the loss
            loss = re.search(rf"{prefix}/loss\D+([\d.]+)", shown)
            assert float(loss[1]) == pytest.approx(summary["val/loss"], rel=1e-6)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert not Path("run.1").exists()


@pytest.mark.parametrize(
    ("options", "dtype", "linears", "gemms", "formats"),
    [
        (["--fp8.recipe", "{preset: tensorwise, high_precision: [weight_grad]}"], torch.bfloat16, 7, 2 * 7, MIXED),
        (
            ["--fp8.recipe", "{grad_output: {format: e4m3}}", "--fp8.keep_high_precision", "['*q_proj', '*k_proj']"],
            torch.bfloat16,
            6,
            3 * 6,
            {torch.float8_e4m3fn},
        ),
        (
            ["--fp8.recipe.grad_output.format=e4m3", "--fp8.recipe.high_precision", "[weight_grad]"],
            torch.bfloat16,
            7,
            2 * 7,
            {torch.float8_e4m3fn},
        ),
        (["--fp8.enabled", "false"], torch.float32, 0, 0, set()),
        ([*BY_PATH, "--trainer.plugins.weights", "bf16"], torch.bfloat16, 7, 3 * 7, MIXED),
    ],
    ids=["preset and field", "nested field", "fields by dots", "off", "off, and by class path"],
)
def test_fp8_options_reach_the_plugin(
    options: list[str], dtype: torch.dtype, linears: int, gemms: int, formats: set[torch.dtype], fit: Fit
) -> None:
    with record_gemms() as records:
        fit("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", *options)
    ran = [record for record in records if record.backend != "native"]  # as the estimate before the run assumes
    assert len(ran) == gemms
    assert {dtype for record in ran for dtype in (record.a_dtype, record.b_dtype)} == formats
    summary = yaml.safe_load(Path("run/summary.json").read_text())
    weights = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert summary["fp8/linears"] == linears  # in the second case q_proj and k_proj are out, but lm_head is in


@pytest.mark.parametrize(("accumulate", "budget", "wanted"), [(1, "64", 4), (2, "0.1K", 4), (1, "65", 5)])
def test_a_token_budget_gives_the_steps(
    accumulate: int, budget: str, wanted: int, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.max_steps=-1", "--max_tokens", budget, f"--trainer.accumulate_grad_batches={accumulate}"]
    fit(*options)  # 2 blocks of 8 tokens a micro-batch
    assert steps("run")[-1] == wanted - 1
    shown = capsys.readouterr().out
    tokens = 16 * accumulate
    assert f"tokens      {wanted * tokens:,} in {wanted} steps of {tokens}" in shown
    weights = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"].values()
    assert f"parameters  {sum(weight.numel() for weight in weights):,}\n" in shown
    assert "run folder  run\n" in shown
    state, held = (float(re.search(rf"([\d.]+) MB of {what}", shown)[1]) for what in ("weights", "activations"))
    measured = yaml.safe_load(Path("run/summary.json").read_text())["bytes_per_param"]
    parameters = sum(weight.numel() for weight in weights)
    assert state == pytest.approx(sum(measured.values()) * parameters / 1e6, rel=0.01)
    assert held > 0
    fit("--trainer.max_steps=-1", "--max_tokens", "1K", "--trainer.fast_dev_run", "1", verb="validate")


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("300M", 300_000_000), ("1.5b", 1_500_000_000), ("10T", 10**13), ("2e3", 2000)]
)
def test_tokens_are_read(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "B", "-3M", "0", "1e-9", "nan", "inf", "1 G"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of tokens"):
        parse_tokens(text)


def test_flops_of_a_token_are_those_of_its_products() -> None:
    config = DecoderConfig(64, 32, 2, 2, 1, 48)
    length = 16
    with torch.device("meta"):
        linears = [module for module in Decoder(config).modules() if isinstance(module, torch.nn.Linear)]
    products = sum(6 * linear.weight.numel() for linear in linears)
    attention = 3 * 2 * 2 * length * 32 * 2  # two products of all pairs, forward and backward, in two layers
    assert training_flops(DecoderLM(config), length) == products + attention


def test_each_set_has_its_own_figures(fit: Fit, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "y.jsonl").write_text("\n".join('{"text": "%s"}' % ("xyz " * (9 + i)) for i in range(40)))
    prepare([str(tmp_path / "y.jsonl")], str(tmp_path / "other"), tokenizer=str(prepared / "tokenizer.json"))
    both = f"{{{prepared}: 3, {tmp_path}/other: 1}}"
    every = ["--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch", "null"]
    fit("--data.path", both, *every, "--trainer.limit_val_batches", "1.0")
    with Path("run/metrics.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    figures = {name: float(value) for name, value in row.items() if name.startswith("val/") and value}
    sets = [figures[f"val/loss/{name}"] for name in ("data", "other")]
    assert min(sets) < figures["val/loss"] < max(sets)
    assert {"val/perplexity/data", "val/bits_per_byte/other"} <= set(figures)
    for name in ("data", "other"):
        assert figures[f"val/perplexity/{name}"] == pytest.approx(math.exp(figures[f"val/loss/{name}"]), rel=1e-4)
