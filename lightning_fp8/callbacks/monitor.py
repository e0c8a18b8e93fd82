"""`FP8Monitor`: how each layer takes FP8, seen from inside a run, without stopping the device.

On every n-th optimizer step hooks are put on the layers for one batch, and taken off after its backward pass. They add
statistics to one buffer on the device (`watch/`). When a reading is due, one all-reduce merges the buffer over ranks
and one copy brings the figures to the host; that is the only time the host waits. Steps in between have no hooks and
run as if there were no monitor.

* What is measured does not change what is computed: a monitored run is the unmonitored one, bit for bit. The exception
  are compiled models: torch.compile does not see hooks that come and go, so the forward and backward pass of a sampled
  batch run eagerly, and differ from compiled ones as compiled and eager do.
* With gradient accumulation the first micro-batch of a sampled step is measured.
* The optimizer's figures are those of `FP8AdamW`'s last step, a layer at a time; they are there where its groups have
  `track_health`.
* Every logger gets `fp8/<layer>/<role>/<metric>`, except `RunLog`, which gets the worst layer's figure of each metric,
  `fp8/worst/<role>/<metric>`; the run folder gets all in `fp8.csv`, and two pictures at the end of fit.
* Scale drift is from one reading to the next.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.callbacks.run_log import RunLog
from lightning_fp8.callbacks.watch import table
from lightning_fp8.callbacks.watch.decoders import decoder_places, measure_alignment, watch_decoder
from lightning_fp8.callbacks.watch.limits import limit, worst_figures, worst_layers
from lightning_fp8.callbacks.watch.linears import SCALE, linear_places, watch_linear
from lightning_fp8.callbacks.watch.optimizers import measure_optimizer, optimizer_places
from lightning_fp8.callbacks.watch.pictures import draw_heat_map, draw_layers, short_name
from lightning_fp8.callbacks.watch.tally import Tally, Values

Listener = Callable[[Trainer, Reading], None]


class FP8Monitor(Callback):
    """Measures the layers of a run; see `readings.Reading` for what comes out.

    `listeners` are called with each reading, on all ranks, right after the host has it.

    Args:
        every_n_steps: Optimizer steps from one sample to the next.
        read_every_n_steps: Optimizer steps from one reading to the next, a multiple of `every_n_steps`; None reads
            every sample.
        worst: How many layers the table at the end shows.

    Raises:
        ValueError: The intervals do not fit.
    """

    def __init__(self, every_n_steps: int = 50, read_every_n_steps: int | None = None, worst: int = 8) -> None:
        read_every = every_n_steps if read_every_n_steps is None else read_every_n_steps
        if every_n_steps < 1 or read_every < 1 or read_every % every_n_steps:
            raise ValueError(
                f"FP8Monitor: read_every_n_steps is {read_every} and every_n_steps {every_n_steps}; the first must be"
                " a multiple of the second, and both at least 1."
            )
        self.every_n_steps, self.read_every_n_steps, self.worst = every_n_steps, read_every, worst
        self.listeners: list[Listener] = []
        self._tally: Tally | None = None
        self._watching = ExitStack()
        self._step_at_start = 0
        self._sampled = False  # whether this step was
        self._scales: dict[str, float] = {}  # of the last reading
        self._report: Table | None = None

    def state_dict(self) -> dict[str, Any]:
        """The scales that the next reading's drift is measured from."""
        return {"scales": dict(self._scales)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them over."""
        self._scales = dict(state_dict["scales"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what can be measured; continues `fp8.csv` of a resumed run at the right row."""
        places = dict(
            place
            for name, module in _named_modules(pl_module)
            for find in (linear_places, decoder_places)
            for place in find(name, module)
        )
        places.update(optimizer_places(trainer.optimizers, pl_module))
        self._tally = Tally(places, pl_module.device)
        self._sampled = False
        if trainer.is_global_zero:
            table.start_at(Path(trainer.default_root_dir), trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Puts the hooks on, if this batch is to be measured."""
        self._step_at_start = trainer.global_step
        if self._tally is None or self._sampled or (trainer.global_step + 1) % self.every_n_steps:
            return
        self._sampled = True
        if _is_compiled(pl_module):
            self._watching.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in _named_modules(pl_module):
            for watch in (watch_linear, watch_decoder):
                for handle in watch(name, module, self._tally):
                    self._watching.callback(handle.remove)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the hooks off."""
        self._watching.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads, if this batch ended a step at which a reading is due."""
        self._watching.close()  # there may have been no backward pass
        if trainer.global_step == self._step_at_start:
            return
        self._sampled = False
        if self._tally is not None and trainer.global_step % self.read_every_n_steps == 0:
            self._read(trainer, pl_module, self._tally)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off a batch that failed."""
        self._watching.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws what was read, of the run as a whole."""
        folder = Path(trainer.default_root_dir)
        readings = table.read(folder) if trainer.is_global_zero else []
        if readings:
            draw_heat_map(readings, folder / "fp8_heatmap.png")
            draw_layers(readings, folder / "fp8_layers.png")
            self._report = _table(readings, self.worst)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the worst layers, when the progress bar is off the screen."""
        self._watching.close()
        if self._report is not None:
            Console().print(self._report)
            self._report = None

    def _read(self, trainer: Trainer, pl_module: LightningModule, tally: Tally) -> None:
        for name, module in _named_modules(pl_module):
            measure_alignment(name, module, tally)
        measure_optimizer(trainer.optimizers, pl_module, tally)
        reading = Reading(trainer.global_step, self._with_drift(tally.read()))
        if trainer.is_global_zero:
            table.append(Path(trainer.default_root_dir), reading)
            self._log(trainer, reading)
        for listener in self.listeners:
            listener(trainer, reading)

    def _log(self, trainer: Trainer, reading: Reading) -> None:
        worst = {f"fp8/worst/{name}": value for name, value in worst_figures(reading).items()}
        every = {f"fp8/{f.layer}/{f.role}/{f.metric}": f.value for f in reading.figures()}
        for logger in trainer.loggers:
            # Loggers number the steps from 0.
            logger.log_metrics(worst if isinstance(logger, RunLog) else every, step=reading.step - 1)

    def _with_drift(self, values: Values) -> Values:
        """The figures, with the drift of each scale in its place."""
        for layer, roles in values.items():
            for role, metrics in roles.items():
                if SCALE in metrics:
                    name, scale = f"{layer}/{role}", metrics.pop(SCALE)
                    metrics["scale_drift"] = _octaves(self._scales.get(name, scale), scale)
                    self._scales[name] = scale
        return values


def _octaves(before: float, now: float) -> float:
    usable = math.isfinite(before) and math.isfinite(now) and before > 0 and now > 0
    return abs(math.log2(now / before)) if usable else math.nan


def _named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Under the names they have uncompiled."""
    return [(name.replace("_orig_mod.", ""), part) for name, part in module.named_modules()]


def _is_compiled(module: nn.Module) -> bool:
    whole: Any = module
    parts = any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in module.modules())
    return parts or getattr(whole, "_compiler_ctx", None) is not None


def _table(readings: list[Reading], worst: int) -> Table:
    shown = Table(title=f"The worst of {len(readings)} readings", title_justify="left")
    for column in ("layer", "operand", "step", "metric"):
        shown.add_column(column, overflow="fold")
    for column in ("figure", "limit", "x limit"):
        shown.add_column(column, justify="right")
    for severity, step, (layer, role, metric, value) in worst_layers(readings, worst):
        bound = limit(role, metric)
        style = "bold red" if severity > 1 else None
        cells = (short_name(layer), role, f"{step:,}", metric, f"{value:.3g}", f"{bound.value:.3g}" if bound else "")
        shown.add_row(*cells, f"{severity:.2g}", style=style)
    return shown
