"""The runs of a comparison: for each a whole configuration and a folder, fixed before the first one starts.

The configuration of a trial is the user's, under the arm's overlay, with the seed for weights and data, the number of
steps, one validation after the last, and the callbacks whose records are compared. It is written beside the trial's
folder; a trial that is there with another configuration is not taken for the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]
READINGS = 20  # of layer health in a run
CHECKPOINTS = 4  # in a run
ROWS = 200  # of metrics.csv, about
_OURS = "lightning_fp8.callbacks."
_REPLACED = (f"{_OURS}LastCheckpoint", f"{_OURS}StepProgress", f"{_OURS}checkpoint.LastCheckpoint")


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        arm: Its name.
        seed: Of weights and data.
        steps: Optimizer steps.
        config: For `fit`, complete.
        place: The path of what it leaves: a folder of this name, the run's, and files with it as their stem.
        rate: The learning rate, in a sweep.
    """

    arm: str
    seed: int
    steps: int
    config: Config
    place: Path
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.place.name

    def beside(self, suffix: str) -> Path:
        """A file beside the folder."""
        return self.place.with_name(f"{self.name}.{suffix}")

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return self.beside("done").exists()

    def prepare(self) -> None:
        """Writes the configuration.

        Raises:
            ValueError: There is another configuration in this place.
        """
        file = self.beside("yaml")
        if file.exists() and yaml.safe_load(file.read_text()) != self.config:
            raise ValueError(
                f"{file} is of another configuration than the trial that would go there: give another --output, or"
                f" remove {self.place.parent}."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(self.config, sort_keys=False))

    @property
    def checkpoint(self) -> Path:
        """From which it goes on."""
        return self.place / "checkpoints" / "last.ckpt"


def trial(arm: str, config: Config, seed: int, folder: Path, *, steps: int | None, rate: float | None = None) -> Trial:
    """The run of an arm whose overlaid configuration is `config`.

    Args:
        arm: Its name.
        config: As `fit --print_config` has it; not changed.
        seed: Of weights and data.
        folder: Where the trials' folders are.
        steps: Optimizer steps; None takes the configuration's.
        rate: A learning rate in the place of the configuration's.

    Raises:
        ValueError: The number of steps is not known or not positive, there is no learning rate to set, or the
            configuration leaves out the validation whose losses are to be compared.
    """
    trainer = dict(config["trainer"])
    steps = steps if steps is not None else _steps(config)
    if steps < 1:
        raise ValueError(f"--steps {steps} must be 1 or more.")
    if trainer.get("limit_val_batches") == 0:
        raise ValueError(
            f"trainer.limit_val_batches is 0 in the arm {arm!r}, so it has no validation loss to compare: set it to"
            " a number of batches, or leave it out."
        )
    place = folder / (f"{arm}-{seed}" if rate is None else f"{arm}-{rate:.3g}-{seed}")
    trainer |= {
        "default_root_dir": str(place),
        "max_steps": steps,
        "max_epochs": -1,
        # Counted in batches, over epochs: one validation, after the last step.
        "val_check_interval": steps * (trainer.get("accumulate_grad_batches") or 1),
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": max(1, steps // ROWS),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": None,
        "callbacks": _callbacks(trainer.get("callbacks"), steps),
    }
    fixed = {
        **config,
        "seed_everything": seed,
        "max_tokens": None,
        "data": {**config["data"], "seed": seed},
        "trainer": trainer,
    }
    if rate is not None:
        fixed["model"] = {**config["model"], "optimizer": _with_rate(config["model"]["optimizer"], rate)}
    fixed.pop("ckpt_path", None)
    return Trial(arm, seed, steps, fixed, place, rate)


def learning_rate(config: Config) -> float:
    """The peak rate of a configuration.

    Raises:
        ValueError: Its optimizer has none that is known.
    """
    return float(_rate_holder(config["model"]["optimizer"])["lr"])


def _steps(config: Config) -> int:
    steps = config["trainer"].get("max_steps")
    if steps in (None, -1) or config.get("max_tokens") is not None:
        raise ValueError("The configuration does not end after a number of steps (trainer.max_steps): give --steps.")
    return int(steps)


def _callbacks(configured: Any, steps: int) -> list[Config]:
    """Those of the configuration and what a comparison needs besides, each once; no progress bars."""
    listed = configured if isinstance(configured, list) else [configured] if configured else []
    kept = [one for one in listed if one["class_path"] not in _REPLACED and "ProgressBar" not in one["class_path"]]
    # A checkpoint at the last step would be older than the validation that follows it, which a resumed run leaves out.
    every = next(n for n in range(max(1, steps // CHECKPOINTS), steps + 2) if steps % n)
    wanted: dict[str, Config] = {
        "LastCheckpoint": {"every_n_steps": every},
        "Throughput": {},
        "StepSizes": {},
        "FP8Monitor": {
            "every_n_steps": max(1, steps // READINGS),
            "read_every_n_steps": max(1, steps // READINGS),
        },
        "RunReport": {},
    }
    there = {one["class_path"].rpartition(".")[2] for one in kept}
    ours = [{"class_path": _OURS + name, "init_args": args} for name, args in wanted.items() if name not in there]
    return kept + ours


def _with_rate(optimizer: Mapping[str, Any], rate: float) -> Config:
    init_args = dict(optimizer["init_args"])
    if "base" in init_args and "lr" not in init_args:
        return {**optimizer, "init_args": {**init_args, "base": _with_rate(init_args["base"], rate)}}
    _rate_holder(optimizer)
    return {**optimizer, "init_args": {**init_args, "lr": rate}}


def _rate_holder(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    init_args: Mapping[str, Any] = optimizer.get("init_args") or {}
    if "lr" in init_args:
        return init_args
    if "base" in init_args:
        return _rate_holder(init_args["base"])
    raise ValueError(f"{optimizer.get('class_path')} has no lr in model.optimizer.init_args: set it.")
