from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fp8.callbacks import Throughput, throughput

BATCH = torch.zeros(4, 11)  # 40 predicted tokens


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class Run:
    """Calls the hooks as the Trainer does, and keeps what is logged."""

    def __init__(self, callback: Throughput, log_every_n_steps: int = 1000, world_size: int = 1) -> None:
        self.trainer: Any = SimpleNamespace(world_size=world_size, global_step=0, log_every_n_steps=log_every_n_steps)
        self.callback, self.logged = callback, list[float]()
        self.module: Any = SimpleNamespace(log=lambda name, value, **_: self.logged.append(value))
        callback.on_train_start(self.trainer, self.module)

    def batch(self, clock: Clock, seconds: float, validation: float = 0.0) -> None:
        clock.now += seconds
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, BATCH, 0)
        if validation:
            clock.now += validation
            self.callback.on_validation_end(self.trainer, self.module)


@pytest.mark.parametrize("world_size", [1, 3])
def test_average_is_tokens_over_seconds(clock: Clock, world_size: int) -> None:
    callback = Throughput(warmup_batches=0)
    run = Run(callback, world_size=world_size)
    assert callback.tokens_per_second == 0
    for seconds in (1.0, 2.0, 5.0):
        run.batch(clock, seconds)
    assert callback.tokens_per_second == pytest.approx(world_size * 120 / 8)


def test_validation_takes_no_time(clock: Clock) -> None:
    callback = Throughput(warmup_batches=0)
    run = Run(callback)
    run.batch(clock, 2.0, validation=1000.0)
    run.batch(clock, 2.0)
    assert callback.tokens_per_second == pytest.approx(20)


def test_warm_up_counts_neither_as_tokens_nor_as_time(clock: Clock) -> None:
    callback = Throughput(warmup_batches=2)
    run = Run(callback)
    for seconds in (50.0, 20.0):
        run.batch(clock, seconds)
        assert callback.tokens_per_second == 0
    run.batch(clock, 4.0)
    assert callback.tokens_per_second == pytest.approx(10)


def test_logs_the_speed_of_the_interval(clock: Clock) -> None:
    run = Run(Throughput(warmup_batches=0), log_every_n_steps=2)
    for seconds in (1.0, 3.0, 5.0, 5.0, 9.0):
        run.batch(clock, seconds)
    assert run.logged == pytest.approx([80 / 4, 80 / 10])
