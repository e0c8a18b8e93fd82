"""The tables of `estimate --hardware`: what a device would hold, send and do in a step."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_fp8.compute.recipe import PRESETS, ROLES, Recipe
from lightning_fp8.estimate import (
    COMMUNICATIONS,
    Communication,
    DeviceMemory,
    Setup,
    activations,
    bytes_per_step,
    device_memory,
    predict_step,
)
from lightning_fp8.estimate.roofline import EFFICIENCY
from lightning_fp8.hardware import ACCELERATORS, NODE_SIZE, Accelerator
from lightning_fp8.models import DecoderLM
from lightning_fp8.models.loss import CHUNK_LOGITS
from lightning_fp8.optim.estimate import Mode, estimate
from lightning_fp8.precision import FP8Precision

_USABLE = 0.92  # of a device's memory: contexts, communication buffers and fragments take the rest
_WIDTH = 118  # where the output is no terminal


def show(
    model: DecoderLM,
    mode: Mode,
    plugin: FP8Precision | None,
    batch: Sequence[int],
    hardware: Accelerator,
    devices: int,
) -> None:
    """Prints the tables.

    Args:
        model: On the meta device.
        mode: How the configuration trains it.
        plugin: What it runs in; None is bf16.
        batch: Sequences a device, and their tokens.
        hardware: The devices.
        devices: How many.
    """
    whole = estimate(model, mode)
    setup = Setup(
        model.config,
        batch[0],
        batch[1],
        hardware,
        devices,
        model.activation_checkpointing,
        grad_bytes=whole.grads or float(mode.dtype.itemsize),
        state_bytes=whole.weights + whole.moments + whole.scales,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    ways = COMMUNICATIONS if devices > 1 else COMMUNICATIONS[:1]
    console.print()
    console.print(_memory(model, mode, plugin, setup))
    console.print(_speed(setup, ways))
    fitted = any(ACCELERATORS[name] == hardware for name in EFFICIENCY)
    notes = [
        "compute, memory, network: what most of the time goes to. Large matrices and compiled layers are assumed.",
        "By row, torch has had slower kernels than this assumes: take it for an upper bound.",
        f"{hardware.name}: {hardware.source}",
    ]
    if not fitted:
        notes.append(
            f"The efficiency is an H100's, for want of published runs to fit it on: {hardware.name} may be far slower."
            " Ratios hold better."
        )
    for note in notes:
        console.print(note, highlight=False)


def _memory(model: DecoderLM, mode: Mode, plugin: FP8Precision | None, setup: Setup) -> Table:
    """GB of a device as configured, and how many sequences would fit."""
    recipe = plugin.recipe if plugin else None
    patterns = [pattern.removeprefix("decoder.") for pattern in plugin.fp8_activations] if plugin else []

    def needed(batch: int) -> int:
        return activations(setup.config, batch, setup.length, recipe, setup.recompute, patterns).peak

    def held(sharded: bool, activations: float) -> DeviceMemory:
        return device_memory(
            model,
            mode,
            setup,
            sharded=sharded,
            fp8=recipe is not None,
            cached=bool(plugin and plugin.cache_weights),
            activations=activations,
        )

    # Bytes grow in a line once the loss goes by chunks, and in a steeper one before that.
    chunked = CHUNK_LOGITS // setup.config.vocab_size // setup.length + 1
    lines = [(n, needed(n), needed(n + 1)) for n in dict.fromkeys((chunked, 1))]
    own = needed(setup.batch)
    table = Table(
        title=f"\nGB of a device, {setup.batch} x {setup.length:,} tokens, as configured", title_justify="left"
    )
    table.add_column("")
    for name in ("weights", "grads", "moments", "FP8 copies", "exchange", "activations", "all"):
        table.add_column(name, justify="right")
    table.add_column(f"of {setup.hardware.memory / 1e9:.0f}", justify="right")
    table.add_column("most sequences", justify="right")
    for name, sharded in (("DDP", False), ("FSDP2", True))[: 2 if setup.devices > 1 else 1]:
        all_of_it = held(sharded, own)
        free = _USABLE * setup.hardware.memory - held(sharded, 0).total
        counts = [(n, n + int((free - one) // (two - one))) for n, one, two in lines]
        most = next((count for n, count in counts if count >= n), 0)
        share = all_of_it.total / setup.hardware.memory
        fits = f"{share:.0%}" if share <= _USABLE else f"[red]{share:.0%}, too much[/red]"
        cells = (f"{part / 1e9:,.2f}" for part in (*all_of_it, all_of_it.total))
        label = name if setup.devices > 1 else "alone"
        table.add_row(label, *cells, fits, f"{most:,}" if most else "[red]none fits[/red]")
    return table


def _speed(setup: Setup, ways: Sequence[Communication]) -> Table:
    """Tokens a second of a device for every precision and every way to communicate."""
    across = "within a node" if setup.devices <= NODE_SIZE else f"{-(-setup.devices // NODE_SIZE)} nodes"
    place = "" if setup.devices == 1 else f", {across}"
    table = Table(title=f"\nTokens/s of a device, {setup.devices} x {setup.hardware.name}{place}", title_justify="left")
    table.add_column("")
    for how in ways:
        table.add_column(how.name if setup.devices > 1 else "alone")
    presets: dict[str, Recipe | None] = {"bf16": None, **PRESETS}
    for name, recipe in presets.items():
        if recipe is None or _runs(recipe, setup.hardware):
            table.add_row(name, *(_cell(setup, how, recipe) for how in ways))
    if setup.devices > 1:
        table.add_section()
        sent = [bytes_per_step(setup, how, PRESETS["tensorwise"]) for how in ways]
        table.add_row("GB sent a step", *(f"{n / 1e9:,.2f}" for n in sent))
        times = [predict_step(setup, how, PRESETS["tensorwise"]).network for how in ways]
        table.add_row("ms to send", *(f"{seconds * 1e3:,.1f}" for seconds in times))
    return table


def _cell(setup: Setup, how: Communication, recipe: Recipe | None) -> str:
    step, plain = predict_step(setup, how, recipe), predict_step(setup, how, None)
    gain = f"{step.tokens_per_second / plain.tokens_per_second:.2f}x "
    return f"{step.tokens_per_second:>7,.0f}  {gain if recipe else '':6}{step.bound_by}"


def _runs(recipe: Recipe, hardware: Accelerator) -> bool:
    return {recipe.operand(role).granularity for role in ROLES} <= set(hardware.granularities)
