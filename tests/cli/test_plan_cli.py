import pytest

from lightning_fp8 import hardware
from lightning_fp8.cli import plan
from lightning_fp8.cli.main import main
from lightning_fp8.compute.speed import Seconds

QUICKSTART = ["plan", "-c", "configs/quickstart.yaml"]
LLAMA_BLOCK = [f"--model.config.{name}" for name in ("hidden_size=4096", "num_heads=32", "num_kv_heads=8")]
LLAMA_BLOCK += ["--model.config.intermediate_size=14336", "--model.config.num_layers=1", "--data.batch_size=4"]


def test_every_layer_is_listed_with_size_share_and_verdict(capsys):
    main(QUICKSTART)
    lines = [line.split(maxsplit=7) for line in capsys.readouterr().out.splitlines()]
    layers = [line for line in lines if line and line[0].startswith("decoder.")]
    assert len(layers) == 3 * 7 + 1
    assert layers[4] == ["decoder.blocks.0.mlp.gate_proj", "2048", "x", "128", "x", "384", "5.5%", "FP8"]
    assert layers[-1][-1] == "kept: name matches '*lm_head*'"
    assert sum(float(line[6].rstrip("%")) for line in layers) == pytest.approx(100, abs=1)


def test_every_shape_has_a_predicted_speed_and_its_source(capsys):
    main([*QUICKSTART, *LLAMA_BLOCK, "--device", "h200"])
    out = capsys.readouterr().out
    assert "predicted for an H200 SXM from its datasheet" in out
    speeds = {line.split("  ")[0]: line.split() for line in out.split("bf16\n")[1].splitlines() if " x " in line}
    assert set(speeds) == {"512 x 4096 x 4096", "512 x 4096 x 1024", "512 x 4096 x 14336", "512 x 14336 x 4096"}
    assert speeds["512 x 4096 x 14336"][5] == "2"
    assert "7 of 8 layers in FP8" in out


def test_slow_layers_are_pointed_out(capsys):
    main(QUICKSTART)
    assert "21 are slower than in bf16" in capsys.readouterr().out


def test_where_fp8_can_be_measured_it_is(capsys, monkeypatch):
    monkeypatch.setattr(hardware, "why_not_native", lambda granularities: None)
    monkeypatch.setattr(plan, "measure", lambda size, recipe, device, backend: Seconds(3.0, 2.0))
    main(QUICKSTART)
    out = capsys.readouterr().out
    assert "measured on" in out
    assert "1.50x as fast" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fp8.enabled=false"], "fp8.enabled is false"),
        (["--fp8.keep_high_precision=['*']"], "No layer would run in FP8"),
        (["--device=h300"], "'h300'"),
        (["--fp8.recipe=tensorwize"], "tensorwise"),
    ],
)
def test_a_mistake_is_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*QUICKSTART, *options])
    assert stop.value.code in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
