"""How far the predictions of `lightning-fp8 estimate` are from what others measured.

    python benchmarks/roofline.py

One efficiency a device is fitted, the geometric mean of measured over ideal speed: on torchtitan's rows of Llama-3-8B
for H100 and H200. Of B200 and MI300X torchtitan has no rows; theirs are fitted on torchao's one speed in bf16 (a run of
torchtitan), and only ratios are left to predict. The aims, wherever nothing was fitted, are 20 % on tokens a second and
10 % on ratios. All rows: Llama-3-8B, sequences of 8,192, fp32 master weights and moments, gradients reduced in fp32.

Two things are modelled as they were where it was measured:

    memory   the H100s of torchtitan and torchao have HBM2e of 2.4 TB/s, not the 3.35 TB/s of those that are sold
    casts    compiled by torchao, of rows and of blocks of 32, read an operand once for each layout, where the kernels
             of this package make both layouts in one read

Sources:
    torchtitan   benchmarks/llama3_h100_202412_torchtitan.md (H100s of 96 GB, 2.4 TB/s, limited to 500 W); its table of
                 2025-06 by Trainy for H200. FSDP2; selective checkpointing there computes every second product again.
    torchao      docs/source/workflows/training.md (8 devices, a sequence each, FSDP2, selective checkpointing as above;
                 B200 limited in power); its pre-training tutorial ("tutorial"), without checkpointing's details.
                 Memory and casts: torchao/testing/training/roofline_utils.py
    Megatron     Megatron-Bridge, docs/performance-summary-archive.md, container 25.11: another stack, of fused kernels
                 and CUDA graphs, nothing computed again, 16 sequences a device and step
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.speed import stream
from lightning_fp8.estimate import COMMUNICATIONS, Communication, Setup, predict_step
from lightning_fp8.estimate.roofline import EFFICIENCY, Again
from lightning_fp8.estimate.setup import layers
from lightning_fp8.hardware import ACCELERATORS
from lightning_fp8.models import DecoderConfig

SHAPE = Path(__file__).parents[1] / "configs" / "model" / "llama-3-8b.yaml"
DDP, _, FSDP2, FSDP2_FP8 = COMMUNICATIONS
META_H100 = dataclasses.replace(ACCELERATORS["h100"], name="H100 96 GB HBM2e", bandwidth=2.4e12, memory=96e9)
MACHINES = ACCELERATORS | {"h100": META_H100, "h100 sxm": ACCELERATORS["h100"]}


class Stack(NamedTuple):
    """What trained.

    Attributes:
        again: What is computed twice.
        how: What devices send each other; with tensorwise, `how_tensorwise`.
        how_tensorwise: The same.
        casts: Bytes that casts move more than those of this package, by preset: of an element of inputs and gradients.
    """

    again: Again
    how: Communication
    how_tensorwise: Communication
    casts: Mapping[str, int]


# Rows: 8 bytes instead of 6 where both layouts are cast, 3 instead of 5 for one; blocks of 32: 6 instead of 4.
COMPILED = Stack(Again(0.5, 0.0, 1.0), FSDP2, FSDP2_FP8, {"rowwise": 2, "rowwise_gw_hp": -2, "mxfp8": 2})
MEGATRON_DDP, MEGATRON_FSDP = (Stack(Again(0, 0, 0), how, how, {}) for how in (DDP, FSDP2))


class Row(NamedTuple):
    """A setting that others measured.

    Attributes:
        source: Whose table it stands in.
        hardware: Of `MACHINES`; its first word is that of the efficiency.
        devices: How many.
        batch: Sequences a device and step.
        measured: Tokens a second and device, by preset; "bf16" is none. The first is what ratios are to.
        fitted: Of these the efficiency may be fitted.
        stack: What trained.
    """

    source: str
    hardware: str
    devices: int
    batch: int
    measured: dict[str, float]
    fitted: tuple[str, ...] = ()
    stack: Stack = COMPILED


ALL, BF16 = ("bf16", "tensorwise"), ("bf16",)
ROWS = (
    Row("torchtitan 2024-12", "h100", 8, 2, {"bf16": 6667, "tensorwise": 8532}, ALL),
    Row("torchtitan 2024-12", "h100", 128, 2, {"bf16": 6514, "tensorwise": 8380}, ALL),
    Row("torchtitan 2025-06", "h200", 32, 2, {"tensorwise": 10938}, ALL),
    Row("torchtitan 2025-06", "h200", 64, 2, {"tensorwise": 10753}, ALL),
    Row("torchao", "h100", 8, 1, {"bf16": 6150, "tensorwise": 7689.5, "rowwise": 6768}),
    Row("torchao tutorial", "h100", 8, 1, {"bf16": 6300, "tensorwise": 7600, "rowwise": 7000}),
    Row("torchao", "b200", 8, 1, {"bf16": 8307.5, "tensorwise": 10417, "rowwise": 8640.5, "mxfp8": 9969}, BF16),
    Row(
        "torchao",
        "mi300x",
        8,
        1,
        {"bf16": 5376.5, "tensorwise": 6166, "rowwise_gw_hp": 6100, "rowwise": 5891},
        BF16,
    ),
    Row("Megatron 25.11", "h100 sxm", 8, 16, {"tensorwise": 14451}, stack=MEGATRON_FSDP),
    Row("Megatron 25.11", "b200", 8, 16, {"tensorwise": 30624, "mxfp8": 29521}, stack=MEGATRON_DDP),
)


def llama_3_8b() -> DecoderConfig:
    """The shape, from its configuration."""
    return DecoderConfig(**yaml.safe_load(SHAPE.read_text())["model"]["config"])


def predicted(row: Row, preset: str, efficiency: float) -> float:
    """Tokens a second and device."""
    config, device, stack = llama_3_8b(), MACHINES[row.hardware], row.stack
    setup = Setup(config, row.batch, 8192, device, row.devices, grad_bytes=4.0, state_bytes=12.0)
    how = stack.how_tensorwise if preset == "tensorwise" else stack.how
    recipe = None if preset == "bf16" else PRESETS[preset]
    step = predict_step(setup, how, recipe, efficiency=efficiency, again=stack.again)
    elements = setup.tokens * config.num_layers * sum(k + n for k, n in layers(config).linears)
    casts = stream(elements * stack.casts.get(preset, 0), device) * (1 + stack.again.gemms / 3)
    return setup.tokens / max((step.work.seconds + casts) / efficiency, step.network)


def fit(rows: Iterable[Row]) -> dict[str, float]:
    """The efficiency of each device that may be fitted."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        for preset in row.measured.keys() & set(row.fitted):
            speed = row.measured[preset]
            logs.setdefault(row.hardware, []).append(math.log(speed / predicted(row, preset, efficiency=1.0)))
    return {hardware: math.exp(sum(found) / len(found)) for hardware, found in logs.items()}


class Error(NamedTuple):
    """A prediction beside what was measured; `aim` is the largest error that is aimed at where nothing was fitted."""

    row: Row
    what: str
    measured: float
    predicted: float
    aim: float
    fitted: bool

    @property
    def relative(self) -> float:
        """Above 0 where the prediction is too high."""
        return self.predicted / self.measured - 1

    @property
    def missed(self) -> bool:
        """Whether the aim is."""
        return abs(self.relative) > self.aim


def errors(rows: Iterable[Row]) -> list[Error]:
    """Of each row's first speed and of the others' ratios to it, with the efficiencies of the package."""
    found = []
    for row in rows:
        speed = {preset: predicted(row, preset, EFFICIENCY[row.hardware.split()[0]]) for preset in row.measured}
        base, *others = row.measured
        found.append(Error(row, f"{base}, tokens/s", row.measured[base], speed[base], 0.2, base in row.fitted))
        for preset in others:
            ratio = row.measured[preset] / row.measured[base]
            what, fitted = f"{preset} / {base}", preset in row.fitted
            found.append(Error(row, what, ratio, speed[preset] / speed[base], 0.1, fitted))
    return found


def main() -> None:
    found = {name: f"{value:.3f}" for name, value in fit(ROWS).items()}
    print(f"efficiencies: fitted {found}; in the package {EFFICIENCY}\n")
    for fitted in (True, False):
        print("fitted on" if fitted else "\nnot fitted on")
        for error in (error for error in errors(ROWS) if error.fitted == fitted):
            row = error.row
            where = f"{row.source:19}{row.devices:4} x {row.hardware:10}{error.what:24}"
            numbers = f"{error.measured:10,.2f}{error.predicted:10,.2f}{error.relative:+8.1%}"
            print(f"{where}{numbers}{'  MISSED' if error.missed else ''}")


if __name__ == "__main__":
    main()
