import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import roofline as benchmark

from lightning_fp8.compute import PRESETS
from lightning_fp8.estimate import COMMUNICATIONS, Setup, bytes_per_step, predict_step
from lightning_fp8.estimate.roofline import EFFICIENCY, Again, device_work
from lightning_fp8.estimate.setup import layers
from lightning_fp8.hardware import ACCELERATORS
from lightning_fp8.models.accounting import flops_per_token

DDP, DDP_FP8, FSDP2, FSDP2_FP8 = COMMUNICATIONS
H100 = ACCELERATORS["h100"]
LLAMA = benchmark.llama_3_8b()
SETUP = Setup(LLAMA, 2, 8192, H100, devices=8)


def test_bytes_between_devices() -> None:
    """Llama-3-8B has 8,030,261,248 parameters, of which 6,979,321,856 in linear layers of blocks."""
    p, linear = 8_030_261_248, 6_979_321_856
    assert layers(LLAMA).parameters == p
    assert bytes_per_step(SETUP, DDP, None) == 2 * 7 / 8 * 2 * p
    assert bytes_per_step(SETUP, DDP_FP8, None) == pytest.approx(2 * 7 / 8 * p, rel=1e-5)
    assert bytes_per_step(SETUP, FSDP2, None) == 7 / 8 * (2 * 2 + 2) * p
    gathered = 2 * linear + 4 * (p - linear)
    assert bytes_per_step(SETUP, FSDP2_FP8, PRESETS["tensorwise"]) == 7 / 8 * (gathered + 2 * p)
    assert bytes_per_step(SETUP, FSDP2_FP8, PRESETS["rowwise"]) == bytes_per_step(SETUP, FSDP2, None)
    assert bytes_per_step(SETUP, FSDP2_FP8, None) == bytes_per_step(SETUP, FSDP2, None)
    assert all(bytes_per_step(SETUP._replace(devices=1), how, None) == 0 for how in COMMUNICATIONS)


def test_work_is_that_of_the_flops() -> None:
    """On a device whose memory is no limit: 6 FLOPs a weight at 70 % of the peak, attention's half square at 35 %."""
    wide = dataclasses.replace(H100, bandwidth=1e30)
    found = device_work(SETUP._replace(hardware=wide), FSDP2, None, Again(0, 0, 0))
    whole_square = LLAMA.num_layers * 2 * 2 * 8192 * 4096
    gemms = flops_per_token(LLAMA, 8192) - 3 * whole_square
    attention = 3.5 * whole_square / 2
    assert found.compute == pytest.approx(SETUP.tokens * (gemms / 0.7 + attention / 0.35) / H100.bf16)
    again = device_work(SETUP._replace(hardware=wide), FSDP2, None, Again(1, 1, 1))
    head = 6 * 4096 * LLAMA.vocab_size
    more = (gemms - head) / 3 / 0.7 + whole_square / 2 / 0.35
    assert again.compute - found.compute == pytest.approx(SETUP.tokens * more / H100.bf16)


@pytest.mark.parametrize(
    ("setup", "resource"),
    [
        (SETUP, "compute"),
        (SETUP._replace(hardware=dataclasses.replace(H100, bandwidth=1e11)), "memory"),
        (SETUP._replace(batch=1, length=128, devices=64), "network"),
    ],
)
def test_what_binds_is_named(setup: Setup, resource: str) -> None:
    assert predict_step(setup, FSDP2, None).bound_by == resource


def test_the_network_is_hidden_until_it_is_not() -> None:
    within, across = predict_step(SETUP, DDP, None), predict_step(SETUP._replace(devices=16), DDP, None)
    assert within.network < within.seconds
    assert across.network / within.network == pytest.approx((15 / 16 * 450) / (7 / 8 * 50))
    slow = SETUP._replace(length=512, devices=16)
    bf16, fp8 = predict_step(slow, DDP, None), predict_step(slow, DDP_FP8, None)
    assert bf16.bound_by == "network"
    assert fp8.tokens_per_second / bf16.tokens_per_second == pytest.approx(2, rel=1e-2)


def test_efficiency_is_the_fitted_one() -> None:
    assert benchmark.fit(benchmark.ROWS) == pytest.approx(EFFICIENCY, abs=5e-4)


def test_errors_on_what_was_not_fitted_on() -> None:
    """The aims are met on H100; what is missed elsewhere is known by name, and docs/distributed.md says why."""
    found = [error for error in benchmark.errors(benchmark.ROWS) if not error.fitted]
    missed = {(error.row.source.split()[0], error.row.hardware, error.what) for error in found if error.missed}
    assert len(found) == 15
    assert missed == {
        ("torchao", "b200", "rowwise / bf16"),
        ("torchao", "mi300x", "tensorwise / bf16"),
        ("torchao", "mi300x", "rowwise / bf16"),
        ("Megatron", "h100 sxm", "tensorwise, tokens/s"),
        ("Megatron", "b200", "tensorwise, tokens/s"),
    }


def test_the_fit_sees_no_other_rows() -> None:
    fitted = [row for row in benchmark.ROWS if row.fitted]
    assert {row.source.split()[0] for row in fitted if row.hardware in ("h100", "h200")} == {"torchtitan"}
    assert {row.fitted for row in fitted if row.hardware in ("b200", "mi300x")} == {("bf16",)}
    assert benchmark.fit(fitted) == benchmark.fit(benchmark.ROWS)


def test_the_memory_is_that_of_the_machines_measured() -> None:
    """On the H100s of datasheets, with 1.4 times the bandwidth, casts would look too cheap."""
    row = next(row for row in benchmark.ROWS if row.source == "torchao" and row.hardware == "h100")
    measured, sold = (
        benchmark.predicted(row._replace(hardware=name), "rowwise", 1.0)
        / benchmark.predicted(row._replace(hardware=name), "bf16", 1.0)
        for name in ("h100", "h100 sxm")
    )
    published = row.measured["rowwise"] / row.measured["bf16"]
    assert abs(measured / published - 1) < 0.1 < sold / published - 1
