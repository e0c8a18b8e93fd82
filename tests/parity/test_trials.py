"""What a trial's configuration has of the user's, and what of the comparison."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_fp8.cli.comparison import configuration
from lightning_fp8.parity.arms import ARMS, CONTROL, choose
from lightning_fp8.parity.trials import learning_rate, trial

ROOT = Path(__file__).parents[2]
QUICKSTART = [str(ROOT / "configs/quickstart.yaml")]
NADAM = [*QUICKSTART, str(ROOT / "configs/optimizer/fp8-nadam.yaml")]


def config(**trainer: Any) -> dict[str, Any]:
    return {
        "seed_everything": 5,
        "model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}},
        "data": {"path": "data", "seed": 5},
        "trainer": {"max_steps": 100, "callbacks": None, **trainer},
        "max_tokens": None,
    }


def names(one: Any) -> list[str]:
    return [callback["class_path"].rpartition(".")[2] for callback in one.config["trainer"]["callbacks"]]


def test_seed_steps_and_validation_are_the_comparisons(tmp_path: Path) -> None:
    given = config(accumulate_grad_batches=4, val_check_interval=7, max_epochs=3)
    one = trial("arm", given, 2, tmp_path, steps=None)
    trainer = one.config["trainer"]
    assert (one.config["seed_everything"], one.config["data"]["seed"], one.steps) == (2, 2, 100)
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["val_check_interval"]) == (100, -1, 400)
    assert trainer["default_root_dir"] == str(tmp_path / "arm-2")
    assert given == config(accumulate_grad_batches=4, val_check_interval=7, max_epochs=3)
    assert trial("arm", given, 2, tmp_path, steps=9).config["trainer"]["max_steps"] == 9


@pytest.mark.parametrize("steps", [*range(1, 30), 300, 500, 1000])
def test_no_checkpoint_is_of_the_last_step_before_its_validation(tmp_path: Path, steps: int) -> None:
    callbacks = trial("arm", config(), 0, tmp_path, steps=steps).config["trainer"]["callbacks"]
    every = callbacks[0]["init_args"]["every_n_steps"]
    assert steps % every
    assert every <= max(3, steps // 4 + 4)


def test_callbacks_of_the_user_stay_and_none_is_there_twice(tmp_path: Path) -> None:
    own = [
        {"class_path": "lightning_fp8.callbacks.StepProgress", "init_args": {}},
        {"class_path": "lightning_fp8.callbacks.LastCheckpoint", "init_args": {"every_n_steps": 1}},
        {"class_path": "lightning_fp8.callbacks.FP8Monitor", "init_args": {"every_n_steps": 3}},
        {"class_path": "mine.Callback", "init_args": {}},
    ]
    one = trial("arm", config(callbacks=own), 0, tmp_path, steps=None)
    assert names(one)[:2] == ["FP8Monitor", "Callback"]
    assert sorted(names(one)) == sorted(
        ["FP8Monitor", "Callback", "LastCheckpoint", "Throughput", "StepSizes", "RunReport"]
    )
    assert own[2] in one.config["trainer"]["callbacks"]


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_are_positive(tmp_path: Path, steps: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        trial("arm", config(), 0, tmp_path, steps=steps)


def test_a_configuration_without_an_end_needs_steps(tmp_path: Path) -> None:
    for given in (config(max_steps=-1), {**config(), "max_tokens": "1M"}):
        with pytest.raises(ValueError, match="give --steps"):
            trial("arm", given, 0, tmp_path, steps=None)
    one = trial("arm", {**config(), "max_tokens": "1M"}, 0, tmp_path, steps=4)
    assert one.config["max_tokens"] is None


@pytest.mark.parametrize("files", [QUICKSTART, NADAM], ids=["optimizer", "wrapped optimizer"])
def test_a_rate_is_set_where_the_optimizer_has_it(tmp_path: Path, files: list[str]) -> None:
    whole = configuration(files, ARMS["fp8"], [])
    assert learning_rate(whole) == 3e-3
    assert learning_rate(trial("fp8", whole, 0, tmp_path, steps=None, rate=0.5).config) == 0.5
    assert learning_rate(whole) == 3e-3


def test_an_optimizer_without_a_rate_is_told(tmp_path: Path) -> None:
    given = config()
    given["model"]["optimizer"]["init_args"] = {}
    with pytest.raises(ValueError, match="no lr"):
        trial("arm", given, 0, tmp_path, steps=None, rate=1.0)


@pytest.mark.parametrize("name", ARMS)
def test_each_arm_is_a_configuration_of_fit_and_keeps_what_it_does_not_change(name: str) -> None:
    whole, plain = configuration(QUICKSTART, ARMS[name], []), configuration(QUICKSTART, ARMS["fp8"], [])
    assert whole["data"] == plain["data"]
    assert learning_rate(whole) == learning_rate(plain)
    assert whole["trainer"]["max_steps"] == plain["trainer"]["max_steps"]
    optimizer = whole["model"]["optimizer"]
    assert optimizer["init_args"]["weight_decay"] == 0.1
    assert optimizer["init_args"]["betas"] == [0.9, 0.95]
    if name in ("bf16", CONTROL):
        assert whole["fp8"]["enabled"] is False
        assert (whole["trainer"]["precision"], optimizer["class_path"]) == ("bf16-mixed", "torch.optim.AdamW")


@pytest.mark.parametrize(("name", "file"), [("fp8-lm", "fp8_lm"), ("nanotron", "nanotron")])
def test_presets_say_what_their_configs_say(name: str, file: str) -> None:
    told = yaml.safe_load((ROOT / f"configs/recipes/{file}.yaml").read_text())
    told["trainer"].pop("default_root_dir")

    def within(wanted: Any, found: Any) -> bool:
        if isinstance(wanted, dict):
            return isinstance(found, dict) and all(key in found and within(wanted[key], found[key]) for key in wanted)
        return bool(wanted == found)

    overlay = {**ARMS[name].overlay, "fp8": {**ARMS[name].overlay["fp8"]}}
    assert within(told, overlay)
    assert overlay["fp8"].pop("enabled") is True
    assert overlay["trainer"].pop("precision", "missing") is None
    assert within(overlay, told)


def test_an_arm_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("fp8: {recipe: rowwise}")
    (mine,) = choose([f"mine={tmp_path / 'mine.yaml'}"])
    assert configuration(QUICKSTART, mine, [])["fp8"]["recipe"] == "rowwise"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["bf17"], "There is no arm 'bf17'; there are bf16,"),
        (["bf16", "bf16"], "more than once"),
        (["a=missing.yaml"], "no file"),
        (["a/b=x.yaml"], "name of letters"),
        (["=x.yaml"], "name of letters"),
    ],
)
def test_a_wrong_arm_is_told(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose(names)


@pytest.mark.parametrize("text", ["- a", "a: [", ""])
def test_an_overlay_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not"):
        choose([f"a={tmp_path / 'x.yaml'}"])
