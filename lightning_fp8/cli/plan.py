"""`lightning-fp8 plan`: which layers of a configuration would run in FP8, and what that gains on a device.

The gain is measured where this machine has FP8 GEMMs, and predicted from the datasheet of `--device` elsewhere.
"""

from lightning.pytorch.cli import LightningArgumentParser

from lightning_fp8 import hardware
from lightning_fp8.cli.blueprint import Blueprint, read
from lightning_fp8.compute.convert import convert_linears
from lightning_fp8.compute.recipe import ROLES, Recipe
from lightning_fp8.compute.speed import LayerSize, Seconds, layer_sizes, measure, predict


class PlanCLI(Blueprint):
    """Adds `--device`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of `fit`, and the device."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--device",
            default="h100",
            choices=list(hardware.ACCELERATORS),
            help="Whose datasheet to predict with, where FP8 cannot be measured.",
        )


def run(args: list[str]) -> None:
    """Prints the plan for the configuration in `args`."""
    cli = read(PlanCLI, args)
    plugin = cli.plugin()
    if plugin is None:
        raise ValueError("fp8.enabled is false, so no layer would run in FP8. Set it to true to plan.")
    model = cli.model
    sizes = layer_sizes(model, cli.example())
    report = convert_linears(
        model, plugin.recipe, keep_high_precision=plugin.keep_high_precision, keep_slow=plugin.keep_slow
    )
    total = sum(size.flops for size in sizes.values())
    rows = [
        (name, _show(size), f"{size.flops / total:.1%}", f"kept: {report.kept[name]}" if name in report.kept else "FP8")
        for name, size in sizes.items()
    ]
    print(_table(("layer", "M x K x N", "FLOPs", ""), *rows))
    converted = {name: sizes[name] for name in report.converted}
    unused = {name: reason for name, reason in report.kept.items() if name not in sizes}
    for name, reason in unused.items():
        print(f"{name}: {reason}")
    if not converted:
        raise ValueError("No layer would run in FP8; the reasons stand above.")
    speeds, source = _speeds(set(converted.values()), plugin.recipe, cli.config["device"])
    print(f"\nforward and backward, {source}:")
    shapes = [
        (_show(size), str(list(converted.values()).count(size)), f"{seconds.speedup:.2f}x")
        for size, seconds in sorted(speeds.items())
    ]
    print(_table(("M x K x N", "layers", "FP8 / bf16"), *shapes))
    bf16, fp8 = (sum(getattr(speeds[size], arm) for size in converted.values()) for arm in ("bf16", "fp8"))
    share = sum(size.flops for size in converted.values()) / total
    print(f"\n{len(converted)} of {len(sizes)} layers in FP8: {share:.1%} of the FLOPs, {bf16 / fp8:.2f}x as fast.")
    slow = [name for name, size in converted.items() if speeds[size].speedup < 1]
    if slow:
        print(f"{len(slow)} are slower than in bf16: FP8 saves memory there, not time (see fp8.keep_slow).")


def _speeds(sizes: set[LayerSize], recipe: Recipe, device: str) -> tuple[dict[LayerSize, Seconds], str]:
    """The seconds of each size, and where they come from."""
    problem = hardware.why_not_native({recipe.operand(role).granularity for role in ROLES})
    if problem is None:
        measured = {size: measure(size, recipe, "cuda", backend="native") for size in sizes}
        return measured, f"measured on {hardware.describe_device()}, eager"
    accelerator = hardware.ACCELERATORS[device]
    predicted = {size: predict(size, recipe, accelerator) for size in sizes}
    return predicted, f"predicted for an {accelerator.name} from its datasheet ({problem} to measure on)"


def _show(size: LayerSize) -> str:
    return " x ".join(str(length) for length in size)


def _table(*lines: tuple[str, ...]) -> str:
    """Columns as wide as they must be, the first line being their names."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
