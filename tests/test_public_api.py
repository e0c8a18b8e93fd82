import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_fp8

PACKAGE = Path(lightning_fp8.__file__).parent
# What others' code imports. A name may be added here; one that disappears breaks somebody.
PROMISED = {
    "lightning_fp8.checkpoint": ["export_checkpoint", "import_checkpoint", "load_fabric_state"],
    "lightning_fp8": ["FP8Linear", "FP8Precision", "FabricFP8Precision", "Recipe", "convert_linears", "fp8_autocast"],
    "lightning_fp8.optim": [
        "FP8AdamW",
        "FP8Optimizer",
        "FP8OptimizerOf",
        "Schedule",
        "WarmupCosine",
        "WarmupStableDecay",
        "convert_state",
        "enable_gradient_release",
        "export_fp32_state",
        "import_adamw_state",
    ],
    "lightning_fp8.models": ["Decoder", "DecoderConfig", "DecoderLM", "generate"],
    "lightning_fp8.data": ["TokenDataModule", "prepare"],
    "lightning_fp8.callbacks": ["FP8Gradients", "LastCheckpoint", "RunLog", "RunReport", "StepProgress", "Throughput"],
    "lightning_fp8.distributed": ["FP8GradientReduction"],
    "lightning_fp8.metrics": ["BitsPerByte", "Perplexity"],
}


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names_are_public(module: str) -> None:
    home = importlib.import_module(module)
    assert set(PROMISED[module]) <= set(home.__all__)
    assert all(hasattr(home, name) for name in home.__all__)


def test_dir_lists_the_public_names() -> None:
    assert set(lightning_fp8.__all__) <= set(dir(lightning_fp8))


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match=r"'lightning_fp8' has no attribute 'FP9Linear'"):
        _ = lightning_fp8.FP9Linear


def test_version() -> None:
    assert lightning_fp8.__version__.split(".")[0].isdecimal()


def test_import_alone_is_light() -> None:
    """`lightning-fp8 doctor` has to start where torch or lightning is broken."""
    code = "import lightning_fp8, lightning_fp8.cli.main, lightning_fp8.cli.doctor, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = run.stdout.split()
    assert "lightning_fp8" in loaded
    assert not {"torch", "lightning", "torchmetrics", "litdata", "jsonargparse", "numpy"} & set(loaded)


def undocumented(node: ast.AST, name: str) -> Iterator[str]:
    """Public modules, classes and functions below `node` without a docstring; empty modules need none."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        overload = any("overload" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))
        if node.body and not overload and ast.get_docstring(node) is None:
            yield name
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if not getattr(child, "name", "_").startswith("_"):
                yield from undocumented(child, f"{name}:{child.lineno} {child.name}")


def test_everything_public_has_a_docstring() -> None:
    files = {path.relative_to(PACKAGE.parent): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    found = [complaint for path, tree in files.items() for complaint in undocumented(tree, str(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["x = 1", '"""M."""\ndef f(): pass', '"""M."""\nclass C:\n    "C."\n    def f(self): 0']
)
def test_missing_docstring_is_seen(text: str) -> None:
    assert len(list(undocumented(ast.parse(text), "file"))) == 1
