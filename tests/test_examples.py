"""The examples, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from states import differences
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parent.parent
STEPS = 20


def run(*args, cwd):
    one_thread = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # a busy machine makes two threads wait for each other
    result = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=one_thread, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small corpus, prepared as the quickstart's."""
    folder = tmp_path_factory.mktemp("examples")
    source = Path(os.__file__).parent
    files = [str(source / f"{name}.py") for name in ("argparse", "ast", "csv", "enum", "inspect", "pickle", "typing")]
    options = ["--output_dir", "data/quickstart", "--vocab_size", "1024", "--val_fraction", "0.2"]
    run("-m", "lightning_fp8", "prepare", "--sources", json.dumps(files), *options, cwd=folder)
    return folder


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(example):
    assert len(example.read_text().splitlines()) <= 150


def test_fabric_resumes_bit_for_bit(work):
    script = [str(ROOT / "examples/fabric_pretrain.py"), "--recipe", "delayed", "--warmup", "5", "--steps", str(STEPS)]
    for part, options in (("whole", []), ("half", ["--stop-at", str(STEPS // 2)])):
        run(*script, "--checkpoint", f"{part}.ckpt", *options, cwd=work)
    run(*script, "--checkpoint", "half.ckpt", "--resume", "--seed", "1", cwd=work)  # its weights are those of the file
    whole, resumed = (torch.load(work / f"{part}.ckpt", weights_only=True) for part in ("whole", "half"))
    assert whole["step"] == STEPS
    assert len(whole["fp8"]["scales"][0]["layers"]) > 0
    assert differences(whole, resumed) == []


def test_fabric_reaches_the_loss_of_the_command_line(work):
    script = [str(ROOT / "examples/fabric_pretrain.py"), "--steps", str(STEPS), "--warmup", "5", "--save-every", "10"]
    printed = run(*script, cwd=work)
    fabric = float(re.search(r"validation loss ([\d.]+)", printed)[1])
    options = ["--model.config.vocab_size=1024", "--model.schedule.init_args.warmup_steps=5"]
    options += [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}"]
    run("-m", "lightning_fp8", "fit", "-c", str(ROOT / "configs/quickstart.yaml"), *options, cwd=work)
    trainer = json.loads((work / "runs/quickstart/summary.json").read_text())["val/loss"]
    assert fabric == round(trainer, 4)  # as printed: the two runs are the same to the last bit
    assert trainer < 6.5  # ln 1024 is 6.93: it has learnt something

    resumed = run(*script[:1], "--steps", str(STEPS), "--warmup", "5", "--resume", cwd=work)
    assert float(re.search(r"validation loss ([\d.]+)", resumed)[1]) == fabric  # the checkpoint is the final state


LOSS = r"step +\d+  loss [\d.]+"


def test_fsdp2_has_the_losses_and_weights_of_the_command_line(work, tmp_path, monkeypatch):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = (str(ROOT / "examples/fsdp2_pretrain.py"), "--warmup", "2", "--print-every", "1", "--steps", "6")
    printed = run(*torchrun, *script, "--checkpoint", str(tmp_path / "last"), cwd=work)
    losses = re.findall(LOSS, printed)
    assert len(losses) == 6
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent / "distributed"), *sys.path]))
    options = ["-c", str(ROOT / "configs/quickstart.yaml"), "-c", str(ROOT / "configs/strategy/fsdp2.yaml")]
    options += ["--trainer.devices=2", "--model.config.vocab_size=1024", "--model.schedule.init_args.warmup_steps=2"]
    options += ["--trainer.max_steps=6", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={tmp_path}"]
    options += ["--trainer.callbacks+=mean_losses.MeanLosses"]
    printed = run(*torchrun, "-m", "lightning_fp8", "fit", *options, "--fp8.fp8_all_gather=true", cwd=work)
    assert re.findall(LOSS, printed) == losses
    fabric, trainer = (whole(tmp_path / folder) for folder in ("last", "checkpoints/last.ckpt"))
    assert {f"decoder.{name}" for name in fabric} == set(trainer)
    assert all(torch.equal(w, trainer[f"decoder.{name}"]) for name, w in fabric.items())

    # A loop that was stopped goes on as if it had not been: loader and schedule, too.
    half = (*script, "--checkpoint", str(tmp_path / "half"))
    assert re.findall(LOSS, run(*torchrun, *half, "--stop-at", "3", cwd=work)) == losses[:3]
    assert re.findall(LOSS, run(*torchrun, *half, "--seed", "1", "--resume", cwd=work)) == losses[3:]
    assert differences(whole(tmp_path / "half"), fabric) == []


def whole(checkpoint):
    """The weights in a folder of parts."""
    dcp_to_torch_save(checkpoint, checkpoint.parent / "whole.pt")
    saved = torch.load(checkpoint.parent / "whole.pt")
    return saved.get("model") or saved["state_dict"]


COUNTED = """
import runpy, sys
from lightning_fp8.compute.gemm import record_gemms
del sys.argv[0]
with record_gemms() as gemms:
    runpy.run_path(sys.argv[0], run_name="__main__")
print(len(gemms), "FP8 GEMMs")
"""


@pytest.mark.parametrize(
    ("example", "layers", "pattern", "learnt"),
    [
        # The MLPs of two blocks and the head; then all the linear layers of two blocks.
        (
            "reuse_plugin_vision.py",
            2 * 2 + 1,
            r"accuracy ([\d.]+), by chance ([\d.]+)",
            lambda x, chance: x > 2 * chance,
        ),
        (
            "reuse_plugin_hf.py",
            2 * 7,
            r"loss ([\d.]+) nats a token, by chance ([\d.]+)",
            lambda found, chance: found < 0.2 * chance,  # 0.12; with FP8 layers that do not learn 0.31
        ),
    ],
)
def test_the_plugin_trains_other_people_s_models(tmp_path, example, layers, pattern, learnt):
    printed = run("-c", COUNTED, str(ROOT / "examples" / example), cwd=tmp_path)
    assert learnt(*map(float, re.search(pattern, printed).groups()))
    steps, evaluated = 60, 8  # batches, of which those of training have three GEMMs a layer
    assert int(re.search(r"(\d+) FP8 GEMMs", printed)[1]) == (3 * steps + evaluated) * layers


@pytest.mark.parametrize(("options", "bytes_a_parameter"), [((), 6.09), (("--release",), 4.09)])
def test_the_optimizer_alone(tmp_path, options, bytes_a_parameter):
    printed = run(str(ROOT / "examples/optimizer_only.py"), "--steps", "100", *options, cwd=tmp_path)
    taken = [float(found) for found in re.findall(r"([\d.]+) bytes a parameter after", printed)]
    assert taken == [16.0, bytes_a_parameter]
    fp8, fp32, chance = map(float, re.search(r"loss ([\d.]+) beside ([\d.]+), by chance ([\d.]+)", printed).groups())
    assert fp32 < 0.5 * chance
    assert abs(fp8 - fp32) < 0.01 * fp32


def test_a_foreign_model_goes_on_training(work):
    script = str(ROOT / "examples/continue_pretraining.py")
    printed = run(script, "--steps", "20", "--output", "continued", cwd=work)
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert 6.9 < before < 7.1  # ln 1024 is 6.93: it knew nothing
    assert after < before - 0.3
    assert (work / "continued/exported/model.safetensors").exists()
    assert (work / "continued/imported/checkpoints/trained.ckpt").exists()
