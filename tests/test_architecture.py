"""The library's import rules, held by reading its source: every violation is listed with its file and line.

Each rule is a function from a source file to (line, complaint) pairs. `test_rule_catches` shows each of them a file
that breaks it, so that a rule which has stopped looking is noticed.
"""

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import lightning_fp8

PACKAGE = Path(lightning_fp8.__file__).parent
OURS = "lightning_fp8"

# The decoder and what it consists of. They know each other, and nothing else of ours.
DECODER_FILES = (
    "config",
    "rope",
    "norm",
    "masks",
    "scores",
    "smooth",
    "cache",
    "attention",
    "flex",
    "loss",
    "recompute",
    "decoder",
    "sharding",
    "sampling",
    "generate",
)
# What a part may import of ours, besides itself. The most specific entry holds; "*" is everything but cli.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "": ("compute", "precision"),
    "__main__": ("cli",),
    "numerics": (),
    "hardware": (),
    "kernels": ("numerics", "hardware"),
    "compute": ("numerics", "hardware", "kernels"),
    "optim": ("numerics", "kernels"),
    "distributed": ("numerics", "kernels", "compute"),
    "metrics": ("numerics",),
    "estimate": ("compute", "hardware", "distributed", "optim", "models"),
    "checks": (),
    "files": (),
    "precision": ("numerics", "compute", "distributed", "hardware", "checks"),
    "data": ("files",),
    "models": ("metrics", "optim"),
    "models.config": (),
    **dict.fromkeys([f"models.{name}" for name in DECODER_FILES], tuple(f"models.{name}" for name in DECODER_FILES)),
    "models.fp8_store": ("models.cache", "numerics"),
    "models.text_stream": (),
    "models.saved": ("models.config", "models.decoder"),
    "models.accounting": ("models.config", "models.decoder"),
    "checkpoint": ("models", "numerics", "data.tokenizer", "files"),
    "callbacks": ("*",),
    "parity": ("callbacks", "metrics", "hardware"),
    "cli": ("*", "cli"),
}
# These import torch (and what is named here) alone: no other package.
PURE = {
    "numerics": ("torch",),
    "optim": ("torch",),
    **dict.fromkeys([f"models.{name}" for name in DECODER_FILES], ("torch",)),
    "models.accounting": ("torch",),
    "models.saved": ("torch",),
    "metrics": ("torch", "torchmetrics"),
}
LIGHTNING = ("lightning", "lightning_utilities", "lightning_fabric", "pytorch_lightning")
KNOW_LIGHTNING = (
    "precision",
    "checks",
    "models.lit",
    "checkpoint.exchange",
    "checkpoint.fabric",
    "checkpoint.io",
    "data.datamodule",
    "data.prepare",
    "callbacks",
    "cli",
)
# Triton's kernels are written at the top of files that import it, which so count as Triton themselves.
NEED_TRITON = f"{OURS}.kernels.triton"
IMPORTED_WHERE_USED = (
    "transformer_engine",
    "triton",
    NEED_TRITON,
    "safetensors",
    "tokenizers",
    "matplotlib",
    "pyarrow",
)
CAPABILITIES = ("torch.cuda", "torch.cpu", "torch.accelerator", "torch.backends", "importlib.metadata")
KNOW_CAPABILITIES = ("hardware", "cli.doctor")
MAX_LINES = 320


class Source(NamedTuple):
    """A file of the package; `module` is its dotted name below the package, "" for the package itself."""

    module: str
    text: str
    path: str = "example.py"


class Import(NamedTuple):
    """An imported name, dotted; `on_load` is false in functions and under TYPE_CHECKING."""

    name: str
    line: int
    on_load: bool


Complaints = Iterator[tuple[int, str]]


def sources() -> list[Source]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        found.append(Source(module, path.read_text(), str(path.relative_to(PACKAGE.parent))))
    return found


def within(name: str, *parts: str) -> bool:
    """Whether a dotted name is one of `parts` or lies below one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def imports(source: Source) -> Iterator[Import]:
    yield from _imports(ast.parse(source.text), on_load=True)


def _imports(node: ast.AST, on_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, on_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = f"{'.' * child.level}{child.module or ''}"
            yield from (Import(f"{module}.{alias.name}", child.lineno, on_load) for alias in child.names)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, on_load and not is_function and not is_for_types)


def direction(source: Source) -> Complaints:
    """Parts import each other in one direction; nothing imports cli but cli and __main__."""
    part = _most_specific(source.module, MAY_IMPORT)
    if part is None:
        yield 1, f"{source.module} has no entry in MAY_IMPORT"
        return
    allowed = MAY_IMPORT[part]
    for name, line, _ in imports(source):
        if name.startswith("."):
            yield line, "is a relative import"
        if not within(name, OURS):
            continue
        target = name.removeprefix(OURS).lstrip(".")
        free = "*" in allowed and not within(target, "cli")
        if not free and not within(target, *allowed, *([part] if part else ["__version__"])):
            yield line, f"imports {name}"


def _most_specific(module: str, table: dict[str, tuple[str, ...]]) -> str | None:
    return max((part for part in table if module == part or (part and within(module, part))), key=len, default=None)


def purity(source: Source) -> Complaints:
    """Parts that a user of plain torch could copy depend on torch alone."""
    part = _most_specific(source.module, PURE)
    for name, line, _ in imports(source) if part else ():
        package = name.split(".")[0]
        if package not in (*PURE[part], OURS) and package not in sys.stdlib_module_names:
            yield line, f"imports {package}"


def lightning_at_the_edge(source: Source) -> Complaints:
    """Lightning is known to the parts that plug into it only."""
    for name, line, _ in imports(source):
        if within(name, *LIGHTNING) and not within(source.module, *KNOW_LIGHTNING):
            yield line, f"imports {name}"


def heavy_imports_where_used(source: Source) -> Complaints:
    """What few uses need is imported in functions."""
    if within(f"{OURS}.{source.module}", NEED_TRITON):
        return
    for name, line, on_load in imports(source):
        if on_load and within(name, *IMPORTED_WHERE_USED):
            yield line, f"imports {name} when it is loaded"


def one_place_for_capabilities(source: Source) -> Complaints:
    """Only `hardware` and `doctor` ask what a device or an installed package can do."""
    if within(source.module, *KNOW_CAPABILITIES):
        return
    asked = {(name, line) for name, line, _ in imports(source) if within(name, *CAPABILITIES)}
    chains = [node for node in ast.walk(ast.parse(source.text)) if isinstance(node, ast.Attribute)]
    asked |= {(text, node.lineno) for node in chains if (text := ast.unparse(node)) in CAPABILITIES}
    yield from ((line, f"asks {name}") for name, line in sorted(asked))


def names_and_sizes(source: Source) -> Complaints:
    """No drawer for everything, and no file with two ideas in it."""
    if "utils" in source.module.split("."):
        yield 1, "is called utils"
    lines = len(source.text.splitlines())
    if lines > MAX_LINES:
        yield lines, f"has more than {MAX_LINES} lines"


RULES: list[Callable[[Source], Complaints]] = [
    direction,
    purity,
    lightning_at_the_edge,
    heavy_imports_where_used,
    one_place_for_capabilities,
    names_and_sizes,
]


def complaints(rule: Callable[[Source], Complaints], files: list[Source]) -> list[str]:
    return [f"{source.path}:{line}: {complaint}" for source in files for line, complaint in rule(source)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule: Callable[[Source], Complaints]) -> None:
    found = complaints(rule, sources())
    assert not found, "\n".join([str(rule.__doc__), *found])


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (direction, "numerics.formats", "from lightning_fp8 import hardware"),
        (direction, "compute.linear", "import lightning_fp8.optim"),
        (direction, "compute.linear", "def f():\n    from lightning_fp8.precision import FP8Precision"),
        (direction, "optim.adamw", "from lightning_fp8.compute.recipe import Recipe"),
        (direction, "optim.adamw", "from ..compute import Recipe"),
        (direction, "metrics.perplexity", "from lightning_fp8.compute import Recipe"),
        (direction, "models.decoder", "from lightning_fp8.models.lit import DecoderLM"),
        (direction, "models.decoder", "from lightning_fp8.compute import FP8Linear"),
        (direction, "models.lit", "from lightning_fp8.precision import FP8Precision"),
        (direction, "callbacks.report", "from lightning_fp8.cli import main"),
        (direction, "parity.run", "from lightning_fp8.cli.fit import start"),
        (direction, "parity.arms", "from lightning_fp8.optim import FP8AdamW"),
        (direction, "nowhere", ""),
        (purity, "models.generate", "import numpy"),
        (purity, "models.decoder", "if TYPE_CHECKING:\n    from lightning import Trainer"),
        (purity, "metrics.perplexity", "import lightning"),
        (lightning_at_the_edge, "compute.convert", "from lightning.pytorch import Trainer"),
        (lightning_at_the_edge, "parity.run", "from lightning.pytorch import Trainer"),
        (lightning_at_the_edge, "data.tokenizer", "def f():\n    import lightning_utilities.core"),
        (heavy_imports_where_used, "callbacks.plots", "from matplotlib.figure import Figure"),
        (heavy_imports_where_used, "kernels.adamw", "try:\n    import triton\nexcept ImportError: pass"),
        (heavy_imports_where_used, "kernels.cast", "from lightning_fp8.kernels.triton.launch import launch"),
        (heavy_imports_where_used, "checkpoint", "class A:\n    import safetensors.torch"),
        (one_place_for_capabilities, "optim.adamw", "if torch.cuda.is_available(): pass"),
        (one_place_for_capabilities, "cli.fit", "from importlib.metadata import version"),
        (one_place_for_capabilities, "precision", "from torch import backends"),
        (names_and_sizes, "data.utils", ""),
        (names_and_sizes, "precision", "\n" * (MAX_LINES + 1)),
    ],
)
def test_rule_catches(rule: Callable[[Source], Complaints], module: str, text: str) -> None:
    assert len(complaints(rule, [Source(module, text)])) == 1


@pytest.mark.parametrize(
    "text", ["def f():\n    import triton", "if TYPE_CHECKING:\n    import tokenizers", "import tritonclient"]
)
def test_imports_where_used_are_let_through(text: str) -> None:
    assert not complaints(heavy_imports_where_used, [Source("kernels.adamw", text)])


def test_the_package_is_seen() -> None:
    modules = {source.module for source in sources()}
    assert {"", "__main__", "numerics", "compute.linear", "models.decoder", "cli.main"} <= modules


def test_modules_of_tests_and_benchmarks_have_names_of_their_own() -> None:
    """They are imported by their names alone, each from its folder: of two with one name the first would be taken."""
    names = [path.name for folder in ("tests", "benchmarks") for path in (PACKAGE.parent / folder).rglob("*.py")]
    assert [name for name, count in Counter(names).items() if count > 1 and name != "conftest.py"] == []
