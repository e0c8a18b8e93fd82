from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fp8 import hardware
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


H200 = hardware.ACCELERATORS["h200"]


@pytest.fixture
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator", lambda device: H200)
    monkeypatch.setattr(hardware, "peak_memory", lambda device: 3 * 2**30)


class Logged(Run):
    """Keeps names as well, of a model that knows its FLOPs."""

    def __init__(self, callback: Throughput, *, knows: bool = True, world_size: int = 1) -> None:
        super().__init__(callback, log_every_n_steps=1, world_size=world_size)
        self.named: list[dict[str, float]] = []
        self.module = SimpleNamespace(log=self._log)
        if knows:
            self.module.flops_per_token = lambda length: 1e9 * length

    def _log(self, name: str, value: float, **_: Any) -> None:
        if name == "tokens_per_second":
            self.named.append({})
        self.named[-1][name] = value


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.usefixtures("on_an_h200")
def test_mfu_is_of_the_dense_peaks_of_one_device(
    clock: Clock, world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    callback = Throughput(warmup_batches=0)
    run = Logged(callback, world_size=world_size)
    with caplog.at_level("INFO"):
        run.batch(clock, 0.5)
        run.batch(clock, 0.5)
    flops = 80 * 10e9  # a second and device: 40 tokens of 10 GFLOPs in half a second
    expected = {"mfu_bf16": flops / 989.4e12, "mfu_fp8": flops / 1978.9e12}
    for logged in run.named:
        assert logged == pytest.approx({"tokens_per_second": 80 * world_size, "memory_gib": 3, **expected})
    assert callback.mfu(callback.tokens_per_second) == pytest.approx(expected)
    said = [record.message for record in caplog.records if "MFU" in record.message]
    assert said == [
        "Throughput: MFU is of the dense peaks of H200 SXM, 989 TFLOP/s in bf16 and 1,979 in FP8, at 10 GFLOPs a token."
    ]


@pytest.mark.usefixtures("on_an_h200")
def test_flops_can_be_given_for_a_model_that_does_not_know_them(clock: Clock) -> None:
    run = Logged(Throughput(warmup_batches=0, flops_per_token=2e9), knows=False)
    run.batch(clock, 1.0)
    assert run.named[0]["mfu_bf16"] == pytest.approx(40 * 2e9 / 989.4e12)


def test_no_mfu_on_a_device_of_unknown_peak_is_said_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    run = Logged(Throughput(warmup_batches=0))
    with caplog.at_level("INFO"):
        for _ in range(3):
            run.batch(clock, 1.0)
    assert [set(logged) for logged in run.named] == [{"tokens_per_second"}] * 3
    said = [record.message for record in caplog.records if "no MFU" in record.message]
    assert len(said) == 1
    assert "the peak of this device is not known" in said[0]


@pytest.mark.usefixtures("on_an_h200")
def test_no_mfu_without_the_flops_of_the_model(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    run = Logged(Throughput(warmup_batches=0), knows=False)
    with caplog.at_level("INFO"):
        run.batch(clock, 1.0)
    assert set(run.named[0]) == {"tokens_per_second", "memory_gib"}
    assert "the model does not say its FLOPs a token" in caplog.text
