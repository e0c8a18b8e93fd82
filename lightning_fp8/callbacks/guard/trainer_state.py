"""All of a Trainer's state that training depends on, taken in `on_train_batch_end` and put back there.

What a checkpoint holds, and the random numbers and the buffers besides: weights, optimizers, schedules, the precision
plugin's scales, loop counters, other callbacks and the position in the data. It goes back in the middle of a running
loop, where a checkpoint could not be loaded: the loops are not restarting. So the counters are set one by one, and the
loop goes on as it did after the snapshot.

A loader goes back if it has `state_dict` and `load_state_dict`. One that has not goes on where it is: all that it gave
since the snapshot is then left out, and the counters of the epoch, which count its batches, stay too.
"""

from typing import Any, cast

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _BaseProgress
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_fp8.data.loader import TokenLoader


def take(trainer: Trainer, pl_module: LightningModule, besides: Callback) -> dict[str, Any]:
    """The state of a training that is between two steps, not copied.

    Args:
        trainer: In `on_train_batch_end`, after an optimizer step.
        pl_module: Its module.
        besides: The callback whose state is not taken, because it takes the others'.
    """
    return {
        "global_step": trainer.global_step,
        "weights": dict(pl_module.state_dict()),
        "buffers": dict(pl_module.named_buffers()),  # those outside the state dict too
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "loops": cast(Any, trainer.fit_loop).state_dict(),
        "callbacks": {i: c.state_dict() for i, c in _stateful(trainer, besides)},
        "random": _random_states(),
    }


def _random_states() -> dict[str, Any]:
    """Of torch, Python and NumPy; NumPy's array as a list, so that a file of it loads as tensors and plain values."""
    states = _collect_rng_states(include_cuda=True)
    if "numpy" in states:
        states["numpy"] = tuple(part.tolist() if hasattr(part, "tolist") else part for part in states["numpy"])
    return states


@torch.no_grad()
def put_back(trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], besides: Callback) -> bool:
    """Puts a copy of what `take` returned back; in the same hook, with the same arguments.

    Returns:
        Whether the data went back too.
    """
    pl_module.load_state_dict(state["weights"])
    for name, buffer in pl_module.named_buffers():
        saved = state["buffers"].get(name)
        if saved is not None and saved.shape == buffer.shape:  # or it is a cache that has grown since
            buffer.copy_(saved)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedules"], strict=True):
        config.scheduler.load_state_dict(saved)
    for i, callback in _stateful(trainer, besides):
        callback.load_state_dict(state["callbacks"][i])
    went_back = _put_back_loops(trainer, state["loops"])
    plugin: Any = trainer.precision_plugin
    plugin.on_load_checkpoint({"global_step": state["global_step"], type(plugin).__qualname__: state["precision"]})
    plugin.load_state_dict(state["precision"])
    for checkpoint in trainer.checkpoint_callbacks:
        cast(Any, checkpoint)._last_global_step_saved = 0  # of steps that are yet to come, again
    cast(Any, trainer)._results.reset()  # what this batch logged is of a step that is undone
    _set_rng_states(state["random"])
    return went_back


def leave_out(trainer: Trainer, steps: int) -> None:
    """Leaves out the batches of the next optimizer steps.

    A `TokenLoader`'s stream has no end, so it moves on in it and the epoch stays as long. From another loader the
    batches are taken and dropped, which ends with the epoch at the latest.
    """
    fit_loop: Any = trainer.fit_loop
    loaders, fetcher, loop = fit_loop._combined_loader.flattened, fit_loop._data_fetcher, fit_loop.epoch_loop
    if all(isinstance(loader, TokenLoader) for loader in loaders):
        for loader in loaders:
            loader.leave_out(steps * trainer.accumulate_grad_batches)
        _begin_iterating(trainer)
        return
    for _ in range(steps * trainer.accumulate_grad_batches):
        if not fetcher.done:
            next(fetcher)
            loop.batch_progress.current.increment_by(1)
    loop.batch_progress.is_last_batch = fetcher.done


def _stateful(trainer: Trainer, besides: Callback) -> list[tuple[int, Callback]]:
    callbacks = enumerate(cast(Any, trainer).callbacks)
    others = [(i, c) for i, c in callbacks if c is not besides and not isinstance(c, Checkpoint)]
    return [(i, callback) for i, callback in others if type(callback).state_dict is not Callback.state_dict]


def _put_back_loops(trainer: Trainer, saved: dict[str, Any]) -> bool:
    """Sets the counters and the loaders; returns whether these could go back."""
    fit_loop: Any = trainer.fit_loop
    loader, batches, epochs = fit_loop._combined_loader, fit_loop.epoch_loop.batch_progress, fit_loop.epoch_progress
    positions = saved["state_dict"].get("combined_loader", [])
    goes_back = len(positions) == len(loader.flattened)
    current, is_last, epoch = vars(batches.current).copy(), batches.is_last_batch, epochs.state_dict()
    _set_counters(fit_loop, saved, "")
    fit_loop.epoch_loop._batches_that_stepped = saved["epoch_loop.state_dict"]["_batches_that_stepped"]
    if goes_back:
        loader._load_state_dicts(positions)
        _begin_iterating(trainer)
    else:
        vars(batches.current).update(current)
        batches.is_last_batch = is_last
        epochs.load_state_dict(epoch)
    return goes_back


def _set_counters(loop: Any, saved: dict[str, Any], prefix: str) -> None:
    for name, value in vars(loop).items():
        if isinstance(value, _BaseProgress):
            value.load_state_dict(saved[prefix + name])
        elif isinstance(value, _Loop):
            _set_counters(value, saved, f"{prefix}{name}.")


def _begin_iterating(trainer: Trainer) -> None:
    """Lets the loaders give batches from where they now stand.

    Random numbers are left as they are, but by a loader that draws them with its first batch.
    """
    fit_loop: Any = trainer.fit_loop
    fetcher = fit_loop._data_fetcher
    with isolate_rng():
        iter(fetcher)
    fetcher.fetched += fit_loop.epoch_loop.batch_progress.current.ready
