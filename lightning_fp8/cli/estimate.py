"""`estimate`: the memory of weights, gradients and optimizer state, before a model is trained or a machine is rented.

Takes the configuration of `fit`. With `--hardware` it also says what a device of that kind would hold, send and do.
"""

from collections.abc import Iterator

import torch
from lightning.pytorch.cli import LightningArgumentParser

from lightning_fp8.cli.blueprint import Blueprint, read
from lightning_fp8.cli.forecast import show
from lightning_fp8.hardware import ACCELERATORS
from lightning_fp8.models import DecoderLM
from lightning_fp8.optim.estimate import MODES, Mode, estimate
from lightning_fp8.optim.ledger import Ledger


def run(args: list[str]) -> None:
    """Prints the table for the configuration in `args`, the verb first."""
    cli = read(EstimateCLI, args)
    devices = cli.config.devices
    if devices < 1:
        raise ValueError(f"estimate: devices is {devices}; it must be 1 or more.")
    lines = table(cli.model, cli.configured_mode(), devices)
    print("\n".join(as_markdown(lines) if cli.config.markdown else as_text(lines)))
    largest = max(p.numel() for p in cli.model.parameters()) * 2 / 1e9
    print(f"\nReleased gradients exist one at a time; the largest takes {largest:.3g} GB. Activations are not counted.")
    if devices > 1:
        print(
            "DDP keeps the gradients a second time in its buckets, unless gradient_as_bucket_view=True, and refuses"
            " gradient release. FSDP2 gathers the weights of a module at a time beside its shards."
        )
    if cli.config.hardware:
        hardware = ACCELERATORS[cli.config.hardware]
        show(cli.model, cli.configured_mode(), cli.plugin(), cli.example().shape, hardware, devices)


class EstimateCLI(Blueprint):
    """Adds `--devices`, `--hardware` and `--markdown`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of `fit`, and those of the table."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--devices", type=int, default=1, help="How many train together.")
        parser.add_argument(
            "--hardware", default=None, choices=list(ACCELERATORS), help="Also predict a step on devices of this kind."
        )
        parser.add_argument("--markdown", type=bool, default=False, help="Print a table for a README.")

    def configured_mode(self) -> Mode:
        """What the configuration itself asks for."""
        fp8, precision = self.config.fp8, self.config.trainer.precision
        bf16 = fp8.weights == "bf16" if fp8.enabled else precision in ("bf16-true", "bf16")
        dtype = torch.bfloat16 if bf16 else torch.float32
        return Mode("as configured", dtype, self.model.optimizer, release=self.model.gradient_release)


def table(model: DecoderLM, configured: Mode, devices: int) -> list[list[str]]:
    """The head and a line for each mode: bytes a parameter, then GB of all and, with several devices, of one."""
    lines = []
    for mode in (*MODES, configured):
        whole = estimate(model, mode)
        grads = "transient" if mode.release else f"{whole.grads:.2f}"
        sizes = [_size(whole)]
        if devices > 1:
            sizes = ["refused" if mode.release else _size(whole), _size(estimate(model, mode, ways=devices))]
        per_param = [f"{whole.weights:.2f}", grads, f"{whole.moments:.2f}", f"{whole.scales:.2f}", f"{whole.total:.2f}"]
        lines.append([mode.name, *per_param, *sizes])
    one = "all" if devices == 1 else "a device of DDP"
    head = ["", "weights", "grads", "moments", "scales", "B/param", f"{_count(whole.parameters)} parameters, {one}"]
    return [head + ([f"a device of {devices}, FSDP2"] if devices > 1 else []), *lines]


def as_text(lines: list[list[str]]) -> Iterator[str]:
    """Aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        yield "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])


def as_markdown(lines: list[list[str]]) -> Iterator[str]:
    """A GitHub table."""
    head, *rest = lines
    rule = ["---", *("---:" for _ in head[1:])]
    for line in (head, rule, *rest):
        yield f"| {' | '.join(line)} |"


def _size(ledger: Ledger) -> str:
    return f"{ledger.total_bytes / 1e9:,.3g} GB"


def _count(number: int) -> str:
    unit, name = next((u, n) for u, n in ((1e9, " B"), (1e6, " M"), (1, "")) if number >= u or u == 1)
    return f"{number / unit:.3g}{name}"
