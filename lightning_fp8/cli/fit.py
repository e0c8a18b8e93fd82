"""`fit`, `validate`, `test`, `predict`: LightningCLI over `DecoderLM` and `TokenDataModule`.

Added to LightningCLI: the `fp8` group, which builds the precision plugin (`fp8.enabled: false` is the off switch); a
run folder, `trainer.default_root_dir`, that holds everything a run leaves behind; a budget of tokens from which the
steps follow; errors of one line.
"""

import sys
import warnings
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_fp8.callbacks import ContinuedLog, PeerWatch, RunLog, StartReport
from lightning_fp8.callbacks.events import SpareEvents
from lightning_fp8.callbacks.start import tokens_per_step
from lightning_fp8.checkpoint.integrity import check_checkpoint
from lightning_fp8.checkpoint.io import CheckedCheckpointIO
from lightning_fp8.cli.launch import batches_per_step, check_nodes, check_processes, follow_torchrun
from lightning_fp8.cli.mistakes import wrong_file
from lightning_fp8.cli.parsers import FitParser, reason, refuse
from lightning_fp8.cli.run_folder import StartRun
from lightning_fp8.cli.trust import load_tensors_only, restrict_class_paths
from lightning_fp8.data import TokenDataModule
from lightning_fp8.distributed.peers import LostPeerError, loss_said_of
from lightning_fp8.models import DecoderLM
from lightning_fp8.precision import FP8Precision

MOST_TOKENS = 10**18  # of which there are not so many; beyond, numbers of steps are no integers of 64 bits
CLI = TypeVar("CLI", bound=LightningCLI)

# Said of Lightning's and litdata's own code, or of a choice that is right here: nothing that a user can act on.
_NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*Your `IterableDataset` has `__len__` defined.*",
    r".*does not have many workers.*",
    r".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are computed over all processes already
)


def run(args: list[str]) -> None:
    """Runs LightningCLI with `args`, the verb first."""
    start(FP8CLI, ["lightning-fp8", *args])


def start(cli: type[CLI], argv: list[str], **options: Any) -> CLI:
    """A LightningCLI over the decoder and its data, with the command line `argv`, the program's name first.

    Args:
        cli: The class.
        argv: The verb, which is carried out, and its options.
        options: Of LightningCLI, instead of those of `fit`.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    argv = restrict_class_paths(argv)
    load_tensors_only()
    if complaint := wrong_file(argv):
        refuse(complaint)
    # LightningCLI advises against its `args` parameter for command lines. Lightning starts more processes by argv[0].
    sys.argv = [*(sys.argv[:1] or argv[:1]), *argv[1:]]
    defaults: dict[str, Any] = {
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "save_config_callback": StartRun,
        "save_config_kwargs": {"save_to_log_dir": False},
        "parser_class": FitParser,
        "parser_kwargs": {"prog": argv[0]},
        "trainer_defaults": {"default_root_dir": "runs/default"},
    }
    try:
        return cli(DecoderLM, TokenDataModule, **{**defaults, **options})
    except ValueError as error:
        what = "seed_everything: " if "numpy accepts" in str(error) else ""
        raise ValueError(what + reason(str(error))) from error
    except RuntimeError as error:
        lost = loss_said_of(error)
        if lost is None:
            raise
        raise LostPeerError(lost) from error


class FP8CLI(LightningCLI):
    """LightningCLI with an `fp8` group and a run folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--fp8.*`."""
        parser.add_class_arguments(FP8Precision, "fp8", instantiate=False)
        parser.add_argument(
            "--fp8.enabled",
            type=bool,
            default=True,
            help="Use the FP8 plugin; false leaves precision to the trainer.",
        )
        parser.add_argument(
            "--max_tokens",
            type=str | None,
            default=None,
            help="Tokens to train on, such as 300M or 10B, instead of trainer.max_steps.",
        )
        parser.add_argument(
            "--global_batch",
            type=int | None,
            default=None,
            help="Sequences of an optimizer step, of all processes, however many there are: sets"
            " trainer.accumulate_grad_batches.",
        )

    def before_instantiate_classes(self) -> None:
        """Takes the number of processes from torchrun."""
        follow_torchrun(self.config[self.subcommand] if self.subcommand else self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the plugin and, for `fit`, the loggers of the run folder."""
        trainer_config = self._get(self.config_init, "trainer", default={})
        plugin = self.plugin()
        if plugin is not None:
            if trainer_config.get("precision") is not None:
                raise ValueError(
                    f"fp8.enabled and trainer.precision={trainer_config['precision']} exclude each other:"
                    " leave trainer.precision out, or set fp8.enabled=false."
                )
            plugins = trainer_config.get("plugins") or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            if any(isinstance(other, Precision) for other in plugins):
                raise ValueError(
                    "fp8.enabled and a precision plugin in trainer.plugins exclude each other: leave that plugin out,"
                    " or set fp8.enabled=false."
                )
            if _is_fsdp1(trainer_config.get("strategy")):
                raise ValueError(
                    "FSDPStrategy runs with Lightning's own precision plugins only. To shard under FP8, set"
                    " trainer.strategy to lightning.pytorch.strategies.ModelParallelStrategy, with its"
                    " data_parallel_size."
                )
            trainer_config["plugins"] = [*plugins, plugin]
        folder = trainer_config["default_root_dir"]
        training = self.subcommand == "fit"
        budget = self._get(self.config_init, "max_tokens") if training else None
        global_batch = self._get(self.config_init, "global_batch") if training else None
        if budget is not None:
            _check_no_other_end(trainer_config)
            trainer_config["max_epochs"] = -1
        if trainer_config.get("logger") is None:
            if training:
                loggers = [RunLog(folder), SpareEvents(folder, name="", version="")]
                trainer_config["logger"] = loggers
            else:
                trainer_config["logger"] = False
        _check_numbers(trainer_config)
        trainer = self._trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckedCheckpointIO()
        cast(Any, trainer).callbacks.insert(0, PeerWatch())
        if training:
            cast(Any, trainer).callbacks[:0] = [StartReport(), ContinuedLog()]
        if global_batch is not None:
            if trainer.accumulate_grad_batches != 1:
                raise ValueError("global_batch and trainer.accumulate_grad_batches exclude each other: leave one out.")
            trainer.accumulate_grad_batches = batches_per_step(
                global_batch, self.datamodule.batch_size, trainer.world_size
            )
        if budget is not None:
            tokens, step = parse_tokens(budget), tokens_per_step(trainer, self.datamodule)
            # The size of a step is not known before the trainer has counted its devices.
            trainer.fit_loop.epoch_loop.max_steps = -(-tokens // step)
        return trainer

    def _trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception as error:
            accelerator = str(self._get(self.config_init, "trainer", default={}).get("accelerator"))
            if "backend found" in str(error) or "can not run on your system" in str(error):
                raise ValueError(
                    f"trainer.accelerator is {accelerator}, and torch finds none here: set it to cpu or auto;"
                    " `lightning-fp8 doctor` says what this machine has."
                ) from error
            raise

    def _parse_ckpt_path(self) -> None:
        """Looks at the checkpoint first; LightningCLI would look in it for options, which ours have none of."""
        path = str(self.config[self.config.subcommand].get("ckpt_path") or "") if self.config.get("subcommand") else ""
        if path in ("", "last", "best", "hpc", "registry") or "://" in path:
            return
        if Path(path).is_dir() and cast(Any, rank_zero_only).rank:  # one process reads all shards, and not every one
            return
        check_checkpoint(path)

    def plugin(self) -> FP8Precision | None:
        """What the `fp8` group describes; None if it is switched off."""
        options = dict(vars(self._get(self.config_init, "fp8")))
        if not options.pop("enabled"):
            return None
        return FP8Precision(**{**options, "recipe": _nested(options["recipe"])})


def _nested(recipe: Any) -> Any:
    """`--fp8.recipe.input.format e4m3` comes as {"input.format": "e4m3"}: its parts are fields of fields."""
    if not isinstance(recipe, dict):
        return recipe
    nested: dict[str, Any] = {}
    for name, value in recipe.items():
        first, _, rest = str(name).partition(".")
        held = nested.get(first)
        if rest and (held is None or isinstance(held, dict)):
            nested[first] = {**(held or {}), **_nested({rest: value})}
        else:
            nested[str(name)] = value
    return nested


def _is_fsdp1(strategy: object) -> bool:
    return isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and "fsdp" in strategy.lower())


def parse_tokens(text: str) -> int:
    """A number of tokens, such as 4096, 300M or 1.5B.

    Raises:
        ValueError: It is none.
    """
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        tokens = round(Decimal(digits) * unit)
    except (InvalidOperation, ValueError, OverflowError):
        tokens = 0
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"max_tokens {text!r} is no number of tokens to train on: write it as 300M, 1.5B or 2000000.")
    return tokens


def _check_numbers(trainer_config: Any) -> None:
    """What the Trainer takes without a word."""
    for name, least in {"gradient_clip_val": 0, "accumulate_grad_batches": 1, "log_every_n_steps": 0}.items():
        value = trainer_config.get(name)
        if value is not None and value < least:
            raise ValueError(f"trainer.{name} is {value}; it must be {least} or more.")
    if trainer_config.get("val_check_interval") == 0:
        raise ValueError("trainer.val_check_interval is 0: for no validation set trainer.limit_val_batches to 0.")
    check_processes(trainer_config.get("accelerator"), trainer_config.get("devices"))
    check_nodes(trainer_config.get("num_nodes"))


def _check_no_other_end(trainer_config: Any) -> None:
    for name in ("max_steps", "max_epochs"):
        if trainer_config.get(name) not in (None, -1):
            raise ValueError(
                f"max_tokens and trainer.{name}={trainer_config[name]} exclude each other: leave one out, "
                f"or set trainer.{name} to -1."
            )
