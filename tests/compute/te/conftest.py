import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import transformer_engine_on_cpu

NEEDED = ("transformer_engine", "triton", "pydantic", "einops", "onnx", "onnxscript")


@pytest.fixture(scope="session")
def python_layer() -> ModuleType:
    """Transformer Engine's Python layer over stand-in kernels, imported once a process."""
    if "transformer_engine_torch" in sys.modules:
        pytest.skip("Transformer Engine's real extension is loaded in this process")
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; all but triton come with the test extra")
    te: ModuleType = transformer_engine_on_cpu.install()
    return te


@pytest.fixture
def te(python_layer: ModuleType) -> Iterator[ModuleType]:
    """The same, with the CPU taken for a GPU; see `transformer_engine_on_cpu` for what that proves."""
    with transformer_engine_on_cpu.cpu_taken_for_gpu():
        yield python_layer
