"""How far the predictions of `lightning-fp8 estimate` are from what others measured.

    python benchmarks/roofline.py

One efficiency a device is fitted on torchtitan's rows of Llama-3-8B (the geometric mean of measured over ideal speed);
the other rows are never fitted on. The aims are 20 % on tokens a second in bf16 and 10 % on the ratio of FP8 to bf16.
All rows: Llama-3-8B, sequences of 8,192, FSDP2, compiled, fp32 weights and moments, gradients reduced in fp32.

Sources:
    torchtitan   benchmarks/llama3_h100_202412_torchtitan.md (H100s of 96 GB limited to 500 W); its table of 2025-06 by
                 Trainy for H200. Selective checkpointing there computes every second product again.
    torchao      docs/source/workflows/training.md (8 devices, a sequence each, selective checkpointing as above);
                 its pre-training tutorial ("tutorial"), without checkpointing's details
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml

from lightning_fp8.compute import PRESETS
from lightning_fp8.estimate import COMMUNICATIONS, Setup, predict_step
from lightning_fp8.estimate.roofline import EFFICIENCY, Again
from lightning_fp8.hardware import ACCELERATORS
from lightning_fp8.models import DecoderConfig

SHAPE = Path(__file__).parents[1] / "configs" / "model" / "llama-3-8b.yaml"
_, _, FSDP2, FSDP2_FP8 = COMMUNICATIONS
EVERY_SECOND_PRODUCT = Again(gemms=0.5, attention=0.0, rest=1.0)


class Row(NamedTuple):
    """A setting that others measured.

    Attributes:
        source: Whose table it stands in.
        hardware: Of `hardware.ACCELERATORS`.
        devices: How many.
        batch: Sequences a device.
        measured: Tokens a second and device, by preset; "bf16" is none. With tensorwise weights are gathered in FP8.
        fitted: Whether the efficiency may be fitted on it.
    """

    source: str
    hardware: str
    devices: int
    batch: int
    measured: dict[str, float]
    fitted: bool = False


ROWS = (
    Row("torchtitan 2024-12", "h100", 8, 2, {"bf16": 6667, "tensorwise": 8532}, fitted=True),
    Row("torchtitan 2024-12", "h100", 128, 2, {"bf16": 6514, "tensorwise": 8380}, fitted=True),
    Row("torchtitan 2025-06", "h200", 32, 2, {"tensorwise": 10938}, fitted=True),
    Row("torchtitan 2025-06", "h200", 64, 2, {"tensorwise": 10753}, fitted=True),
    Row("torchao", "h100", 8, 1, {"bf16": 6150, "tensorwise": 7689.5, "rowwise": 6768}),
    Row("torchao tutorial", "h100", 8, 1, {"bf16": 6300, "tensorwise": 7600, "rowwise": 7000}),
    Row("torchao", "b200", 8, 1, {"bf16": 8307.5, "tensorwise": 10417, "rowwise": 8640, "mxfp8": 9969}),
    Row(
        "torchao",
        "mi300x",
        8,
        1,
        {"bf16": 5376.5, "tensorwise": 5376.5 * 1.147, "rowwise_gw_hp": 5376.5 * 1.135, "rowwise": 5376.5 * 1.096},
    ),
)


def llama_3_8b() -> DecoderConfig:
    """The shape, from its configuration."""
    return DecoderConfig(**yaml.safe_load(SHAPE.read_text())["model"]["config"])


def predicted(row: Row, preset: str, efficiency: float) -> float:
    """Tokens a second and device."""
    setup = Setup(
        llama_3_8b(), row.batch, 8192, ACCELERATORS[row.hardware], row.devices, grad_bytes=4.0, state_bytes=12.0
    )
    how = FSDP2_FP8 if preset == "tensorwise" else FSDP2
    recipe = None if preset == "bf16" else PRESETS[preset]
    return predict_step(setup, how, recipe, efficiency=efficiency, again=EVERY_SECOND_PRODUCT).tokens_per_second


def fit(rows: Iterable[Row]) -> dict[str, float]:
    """The efficiency of each device that may be fitted."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        for preset, speed in row.measured.items() if row.fitted else ():
            logs.setdefault(row.hardware, []).append(math.log(speed / predicted(row, preset, efficiency=1.0)))
    return {hardware: math.exp(sum(found) / len(found)) for hardware, found in logs.items()}


class Error(NamedTuple):
    """A prediction beside what was measured; `aim` is the largest error that is aimed at."""

    row: Row
    what: str
    measured: float
    predicted: float
    aim: float

    @property
    def relative(self) -> float:
        """Above 0 where the prediction is too high."""
        return self.predicted / self.measured - 1

    @property
    def missed(self) -> bool:
        """Whether the aim is."""
        return abs(self.relative) > self.aim


def errors(rows: Iterable[Row]) -> list[Error]:
    """Of bf16's speed and of each preset's ratio to it, with the efficiencies of the package."""
    found = []
    for row in rows:
        efficiency = EFFICIENCY.get(row.hardware, EFFICIENCY["h100"])
        speed = {preset: predicted(row, preset, efficiency) for preset in row.measured}
        for preset, measured in row.measured.items():
            if preset == "bf16" or "bf16" not in row.measured:
                found.append(Error(row, f"{preset}, tokens/s", measured, speed[preset], 0.2))
            else:
                ratio = measured / row.measured["bf16"]
                found.append(Error(row, f"{preset} / bf16", ratio, speed[preset] / speed["bf16"], 0.1))
    return found


def main() -> None:
    found = {name: f"{value:.3f}" for name, value in fit(ROWS).items()}
    print(
        f"efficiencies fitted on torchtitan's rows: {found}; in the package: {EFFICIENCY}; other devices take h100's\n"
    )
    for fitted in (True, False):
        print("fitted on" if fitted else "\nnot fitted on")
        for error in errors(row for row in ROWS if row.fitted == fitted):
            row = error.row
            where = f"{row.source:19}{row.devices:4} x {row.hardware:7}{error.what:24}"
            numbers = f"{error.measured:10,.2f}{error.predicted:10,.2f}{error.relative:+8.1%}"
            print(f"{where}{numbers}{'  MISSED' if error.missed else ''}")


if __name__ == "__main__":
    main()
