"""What is said where Transformer Engine cannot run; none of it needs Transformer Engine."""

import sys

import pytest
import torch

from lightning_fp8 import FabricFP8Precision, FP8Precision, convert_linears

PIP = r"pip install --no-build-isolation \"lightning-fp8\[te\]\""


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A function that makes `import transformer_engine` find a package of the given source, on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)

    def write(source, pytorch=""):
        folder = tmp_path / "transformer_engine"
        (folder / "pytorch").mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        (folder / "pytorch" / "__init__.py").write_text(pytorch)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def refused():
    with pytest.raises(ValueError, match="FP8 backend 'transformer_engine' cannot run here") as error:
        FP8Precision(backend="transformer_engine")
    return error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_that_is_said():
    with pytest.raises(ValueError, match=r"cannot run here: there is no CUDA device\. Backend 'auto' runs anywhere"):
        FabricFP8Precision(backend="transformer_engine")


def test_where_it_is_not_installed_the_command_that_installs_it_is_given(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert refused().match(f"transformer_engine is not installed. {PIP}")


def test_a_missing_dependency_is_named(package):
    package('__version__ = "2.20.2"', "import a_package_that_is_not_there")
    assert refused().match(f"a_package_that_is_not_there is not installed. {PIP}")


def test_where_it_does_not_import_the_reason_is_given(package):
    package('raise RuntimeError("Found empty meta package")')
    assert refused().match(rf"does not import \(RuntimeError: Found empty meta package\). {PIP}")


def test_an_old_release_is_refused(package):
    package('__version__ = "2.9.0+abc"')
    assert refused().match(r"Transformer Engine 2.9.0\+abc is older than 2.20")


def test_what_the_device_cannot_do_is_said_in_transformer_engines_words(package):
    answer = "is_fp8_available = is_fp8_block_scaling_available = is_mxfp8_available = "
    package('__version__ = "2.20.2"', answer + "lambda return_reason: (False, 'Device too old.')")
    assert refused().match(r"cannot run here: Device too old. Backend 'auto'")


def test_convert_linears_points_to_the_other_function():
    with pytest.raises(ValueError, match="convert_to_transformer_engine know transformer_engine"):
        convert_linears(torch.nn.Linear(32, 32), backend="transformer_engine")
