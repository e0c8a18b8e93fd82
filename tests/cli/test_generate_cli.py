import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from lightning_fp8.cli.main import main
from lightning_fp8.models import Decoder, DecoderConfig, generate

PROMPT = "abc def"


@pytest.fixture(scope="module")
def checkpoint(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an untrained model: `checkpoints/last.ckpt` and, beside the folder, the tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    config = {"vocab_size": 272, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**config, intermediate_size=32))
    state = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
    (folder / "checkpoints").mkdir()
    path = folder / "checkpoints" / "last.ckpt"
    torch.save({"decoder_config": {**config, "intermediate_size": 32}, "state_dict": state}, path)
    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    return path


def shown(capsys: pytest.CaptureFixture[str], checkpoint: Path, *options: str) -> str:
    main(["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--max_new_tokens", "12", *options])
    return capsys.readouterr().out


def test_prints_the_prompt_and_its_continuation(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer.from_file(str(checkpoint.parent.parent / "tokenizer.json"))
    content = torch.load(checkpoint, weights_only=True)
    decoder = Decoder(DecoderConfig(**content["decoder_config"]))
    decoder.load_state_dict({name.removeprefix("decoder."): w for name, w in content["state_dict"].items()})
    prompt = words.encode(PROMPT).ids
    new = list(generate(decoder, prompt, max_new_tokens=12, window=256, temperature=0))
    whole = words.decode([*prompt, *new])
    assert len(whole) > len(PROMPT)
    assert shown(capsys, checkpoint, "--temperature", "0").rstrip("\n") == whole.rstrip("\ufffd\n")


def test_options_reach_the_sampling(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [shown(capsys, checkpoint, "--temperature", "1", "--top_k", "0", "--seed", seed) for seed in "112"]
    assert texts[0] == texts[1] != texts[2]
    assert shown(capsys, checkpoint, "--max_new_tokens", "0") == f"{PROMPT}\n"


@pytest.mark.parametrize(
    ("saved", "options", "seen"),
    [({"sequence_length": 24}, [], 24), ({}, [], 96), ({"sequence_length": 24}, ["--window", "10"], 10)],
    ids=["trained", "imported", "given"],
)
def test_the_window_is_the_length_that_the_model_knows(
    saved: dict[str, int],
    options: list[str],
    seen: int,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["decoder_config"]["context_length"] = 96
    path = tmp_path / "last.ckpt"
    torch.save(content | saved, path)
    windows: list[int] = []
    monkeypatch.setattr(
        "lightning_fp8.cli.generate.generate_batch", lambda *_, window, **__: windows.append(window) or []
    )
    tokenizer = str(checkpoint.parent.parent / "tokenizer.json")
    main(["generate", "--ckpt", str(path), "--prompt", PROMPT, "--tokenizer", tokenizer, *options])
    assert windows == [seen]


def test_characters_are_not_cut_into_bytes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character of several byte tokens appears when its last byte has come."""
    words = Tokenizer.from_file(str(checkpoint.parent.parent / "tokenizer.json"))
    tokens = words.encode(" é€").ids
    assert len(tokens) > 3
    monkeypatch.setattr("lightning_fp8.cli.generate.generate_batch", lambda *_, **__: ([token] for token in tokens))
    assert shown(capsys, checkpoint) == f"{PROMPT} é€\n"


def test_several_prompts_are_continued_as_each_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["--temperature", "0", "--max_new_tokens", "9"]
    alone = []
    for prompt in ("abc def", "h"):
        main(["generate", "--ckpt", str(checkpoint), "--prompt", prompt, *greedy])
        alone.append(capsys.readouterr().out)
    main(["generate", "--ckpt", str(checkpoint), "--prompt", '["abc def", "h"]', *greedy])
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in alone)


def test_stop_strings_end_the_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["--temperature", "0", "--max_new_tokens", "12"]
    new = shown(capsys, checkpoint, *greedy)[len(PROMPT) : -1]
    stop = new[4:6]
    place = new.find(stop)
    for given in (stop, json.dumps(["never comes", stop])):
        assert shown(capsys, checkpoint, *greedy, "--stop", given) == PROMPT + new[:place] + "\n"


@pytest.mark.parametrize("options", [["--cache", "fp8"], ["--window", "6", "--sinks", "2"], ["--top_p", "0.1"]])
def test_further_options_are_taken(options: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, checkpoint, *options).startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ckpt", "missing.ckpt"], "--ckpt missing.ckpt: there is no such file."),
        (["--tokenizer", "missing.json"], "missing.json"),
        (["--temperature", "-1"], "temperature"),
    ],
    ids=["checkpoint", "tokenizer", "temperature"],
)
def test_a_mistake_is_one_line(
    options: list[str], said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert said in line


def test_a_file_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.ckpt").write_text("not a checkpoint")
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--ckpt", str(tmp_path / "x.ckpt"), "--prompt", PROMPT])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert "x.ckpt is damaged or no checkpoint" in line
