"""Checkpoints out to Hugging Face's layout and back."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from random_decoder import SHAPE, save
from safetensors import safe_open
from torch.nn import functional as F

from lightning_fp8.checkpoint import export_checkpoint, import_checkpoint
from lightning_fp8.cli.main import main
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderConfig
from lightning_fp8.models.saved import load_decoder, trained_length

SHAPES = {
    "qwen 3": SHAPE,
    "qwen 2.5, tied": replace(SHAPE, qk_norm=False, qkv_bias=True, tied_embeddings=True),
    "mistral": replace(SHAPE, qk_norm=False, sliding_window=8),
    "llama": replace(SHAPE, qk_norm=False, num_kv_heads=4),
}
TOKENS = torch.randint(SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
IDS = {"ids": list(SHAPES)}


@pytest.mark.parametrize("config", SHAPES.values(), **IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_gb", [5.0, 5e-5], ids=["one file", "shards"])
def test_a_round_trip_is_exact(config: DecoderConfig, dtype: torch.dtype, shard_gb: float, tmp_path: Path) -> None:
    path = tmp_path / "run/checkpoints/last.ckpt"
    decoder = save(config, path, dtype)
    export_checkpoint(str(path), str(tmp_path / "hf"), shard_gb=shard_gb)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_gb < 1)
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "back"))
    back = load_decoder(str(tmp_path / "back/checkpoints/last.ckpt"))
    assert back.config == config
    assert back.state_dict().keys() == decoder.state_dict().keys()
    for name, weight in decoder.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], weight), name


@pytest.mark.parametrize("config", SHAPES.values(), **IDS)
def test_transformers_loads_the_export_and_computes_the_same(config: DecoderConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "run/checkpoints/last.ckpt"
    decoder = save(config, path, torch.float32)
    export_checkpoint(str(path), str(tmp_path / "hf"), shard_gb=5e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        ours, logits = decoder(TOKENS), theirs(TOKENS).logits
        losses = [F.cross_entropy(x[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()) for x in (ours, logits)]
    assert (ours - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert f"{losses[0].exp():.4g}" == f"{losses[1].exp():.4g}"


@pytest.mark.parametrize("config", SHAPES.values(), **IDS)
def test_what_transformers_saves_is_imported(config: DecoderConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "run/checkpoints/last.ckpt"
    decoder = save(config, path, torch.float32)
    export_checkpoint(str(path), str(tmp_path / "hf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "back"))
    back = load_decoder(str(tmp_path / "back/checkpoints/last.ckpt"))
    for name, weight in decoder.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


def test_the_end_of_a_published_tokenizer_is_not_its_beginning(ckpt: Path, tmp_path: Path) -> None:
    """Llama 3 lists the token that begins a text first."""
    file = ckpt.parent.parent / "tokenizer.json"
    content = json.loads(file.read_text().replace("<|endoftext|>", "<|begin_of_text|>"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 299, "content": "<|end_of_text|>"})
    file.write_text(json.dumps(content))
    export_checkpoint(str(ckpt), str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 299


def test_the_tokenizer_goes_along(ckpt: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_checkpoint(str(ckpt), str(tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("abc def")["input_ids"]) == "abc def"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == 0
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "back"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_one_file_is_imported_with_the_configuration_beside_it(ckpt: Path, tmp_path: Path) -> None:
    export_checkpoint(str(ckpt), str(tmp_path / "hf"))
    import_checkpoint(str(tmp_path / "hf/model.safetensors"), str(tmp_path / "back"))
    imported = str(tmp_path / "back/checkpoints/last.ckpt")
    assert load_decoder(imported).config == SHAPE
    assert trained_length(imported) == SHAPE.context_length


def test_an_fp8_export_is_read_back_as_what_it_stands_for(ckpt: Path, tmp_path: Path) -> None:
    decoder = load_decoder(str(ckpt))
    export_checkpoint(str(ckpt), str(tmp_path / "hf"), fp8=True)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.gate_proj.weight"
        assert file.get_tensor(name).dtype == torch.float8_e4m3fn
        assert file.get_tensor(f"{name}_scale").shape == (SHAPE.intermediate_size, 1)
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "back"))
    back = load_decoder(str(tmp_path / "back/checkpoints/last.ckpt")).state_dict()
    for name, weight in decoder.state_dict().items():
        if name.endswith("_proj.weight"):
            limit = weight.float().abs().amax(1, keepdim=True) / 448 * 2**-7  # half the step of the smallest numbers
            assert ((back[name] - weight).float().abs() <= limit + weight.float().abs() * (2**-4 + 2**-8)).all(), name
            assert not torch.equal(back[name], weight)
        else:
            assert torch.equal(back[name], weight), name


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype_of_an_export(dtype: Any, expected: torch.dtype, ckpt: Path, tmp_path: Path) -> None:
    export_checkpoint(str(ckpt), str(tmp_path / "hf"), dtype=dtype)
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {expected}  # noqa: SIM118
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_an_imported_model_is_trained_on_and_evaluated(
    ckpt: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [])
    main(["export", str(ckpt), "hf"])
    main(["import", "hf", "back"])
    overlay = yaml.safe_load(Path("back/model.yaml").read_text())
    assert overlay["model"]["initial_weights"] == "back/checkpoints/last.ckpt"
    config = {
        "data": {"path": str(prepared), "sequence_length": 8, "batch_size": 2},
        "fp8": {"weights": "bf16"},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    options = ["-c", "config.yaml", "-c", "back/model.yaml", "--trainer.enable_progress_bar=false"]
    main(["validate", *options, "--ckpt_path", "back/checkpoints/last.ckpt"])
    assert "val/perplexity" in capsys.readouterr().out
    frozen = "{class_path: lightning_fp8.optim.FP8AdamW, init_args: {lr: 0.0}}"
    main(["fit", *options, "--model.optimizer", frozen, "--trainer.default_root_dir", "run2"])
    trained = load_decoder(str(next(Path("run2").rglob("*.ckpt"))))
    for name, weight in load_decoder(str(ckpt)).state_dict().items():
        assert torch.equal(trained.state_dict()[name], weight), name


def test_a_model_trained_here_has_the_same_perplexity_in_transformers(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained in FP8 on bf16 weights, exported, and evaluated by both in fp32 on all held-out text: to four digits."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [])
    config = {
        "model": {"config": {**asdict(SHAPE), "vocab_size": 272}},
        "data": {"path": str(prepared), "sequence_length": 16, "batch_size": 4},
        "fp8": {"weights": "bf16"},
        "trainer": {"accelerator": "cpu", "max_steps": 40, "limit_val_batches": 0, "num_sanity_val_steps": 0},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    options = ["-c", "config.yaml", "--trainer.enable_progress_bar=false"]
    main(["fit", *options, "--trainer.default_root_dir", "run"])
    (ckpt,) = Path("run").rglob("*.ckpt")
    assert trained_length(str(ckpt)) == 16
    capsys.readouterr()
    whole = ["--fp8.enabled=false", "--trainer.limit_val_batches=1.0", "--ckpt_path", str(ckpt)]
    main(["validate", *options, *whole])
    ours = float(re.search(r"val/perplexity\D+([\d.]+)", capsys.readouterr().out)[1])

    main(["export", str(ckpt), "hf", "--dtype", "fp32"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf")
    blocks = torch.cat(list(TokenDataModule(str(prepared), sequence_length=16, batch_size=4).val_dataloader()))
    with torch.no_grad():
        logits = theirs(blocks[:, :-1]).logits
    perplexity = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).exp().item()
    assert perplexity < 0.5 * 272  # it has learnt
    assert ours == pytest.approx(perplexity, rel=5e-5)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["export", "nowhere.ckpt", "new"], "nowhere.ckpt: there is no such checkpoint"),
        (["export", "run/checkpoints/last.ckpt", "run"], "run is not empty; give a new folder"),
        (["import", "run", "new"], "run has no config.json"),
        (["import", "gpt2", "new"], "model_type 'gpt2'; known are llama, mistral, qwen2, qwen3"),
        (["import", "cut", "new"], "missing ['blocks.0.attention.k_proj.weight'], left over ['odd']"),
        (["import", "wide", "new"], "norm.weight is [63], its configuration says [64]"),
        (["import", "empty", "new"], "empty has neither model.safetensors nor model.safetensors.index.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(
    argv: list[str],
    said: str,
    ckpt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "cut", "wide", "empty"):
        export_checkpoint(str(ckpt), name)
    Path("gpt2/config.json").write_text('{"model_type": "gpt2"}')
    tensors = load_file("cut/model.safetensors")
    tensors["odd"] = tensors.pop("model.layers.0.self_attn.k_proj.weight")
    save_file(tensors, "cut/model.safetensors")
    tensors = load_file("wide/model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][:63].clone()}, "wide/model.safetensors")
    Path("empty/model.safetensors").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert said in line


def test_what_no_family_has_is_refused(tmp_path: Path) -> None:
    for config, said in (
        (replace(SHAPE, logit_softcap=30.0), "logit_softcap cannot be exported"),
        (replace(SHAPE, clipped_softmax=(-0.03, 1.0)), "clipped_softmax cannot be exported"),
        (replace(SHAPE, attention_sink=True), "attention_sink cannot be exported"),
        (replace(SHAPE, layer_scale=True), "layer_scale cannot be exported"),
        (replace(SHAPE, mlp_bias=True), "No family of Hugging Face's has qk_norm=True"),
    ):
        path = tmp_path / said[:6] / "checkpoints/last.ckpt"
        save(config, path)
        with pytest.raises(ValueError, match=said):
            export_checkpoint(str(path), str(tmp_path / "hf"))
        assert not (tmp_path / "hf").exists()


def test_what_changes_training_alone_is_exported_as_the_plain_model(tmp_path: Path) -> None:
    for name, config in (
        ("plain", SHAPE),
        ("trained otherwise", replace(SHAPE, smooth_swiglu=True, z_loss=1e-4, activation_l2=1e-5)),
    ):
        save(config, tmp_path / name / "checkpoints/last.ckpt")
        export_checkpoint(str(tmp_path / name / "checkpoints/last.ckpt"), str(tmp_path / f"{name} hf"))
    for file in ("config.json", "model.safetensors"):
        exported = [(tmp_path / f"{name} hf" / file).read_bytes() for name in ("plain", "trained otherwise")]
        assert exported[0] == exported[1]
