import subprocess
import sys
from pathlib import Path

import pytest

from lightning_fp8 import hardware
from lightning_fp8.cli import doctor
from lightning_fp8.cli.doctor import Finding, check_imports, check_transformer_engine, explain_mismatch

BROKEN = "RuntimeError: operator torchvision::nms does not exist"


def script(folder: Path, text: str) -> str:
    """An executable that stands in for a Python interpreter."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def run(*args: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        doctor.run(["doctor", *args])
    return stopped.value.code


def test_a_healthy_machine() -> None:
    """In a process of its own, as a user calls it: the real imports are tried."""
    result = subprocess.run(
        [sys.executable, "-m", "lightning_fp8", "doctor"], capture_output=True, text=True, timeout=240
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line for line in lines if line.startswith("imports")] == [
        f"{'imports':18}  torch, torchvision and lightning work together"
    ]
    assert {"python", "torch", "lightning", "device", "FP8", "transformer-engine"} <= {
        line.split()[0] for line in lines
    }
    assert "->" not in result.stdout
    engine = doctor._version("transformer-engine")
    assert lines[-1].split(maxsplit=1)[1].startswith(f"{engine}, " if engine else "not installed (optional): pip")


def test_broken_imports_are_reported_with_the_remedy(tmp_path: Path) -> None:
    python = script(tmp_path, f"echo Traceback >&2; echo '{BROKEN}' >&2; exit 1")
    finding = check_imports(python)
    assert finding.state == f"broken: {BROKEN}"
    assert "pip install" in finding.remedy
    assert "torch torchvision" in finding.remedy


@pytest.mark.parametrize(("text", "state"), [("exit 7", "broken: exit code 7"), ("exit 0", "torch, torchvision and")])
def test_silent_interpreters(text: str, state: str, tmp_path: Path) -> None:
    assert check_imports(script(tmp_path, text)).state.startswith(state)


@pytest.mark.parametrize(
    ("imports", "code"),
    [(Finding("imports", "fine"), 0), (Finding("imports", f"broken: {BROKEN}", "pip install torch"), 1)],
    ids=["fine", "broken"],
)
def test_report_and_exit_code(
    imports: Finding, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "check_imports", lambda: imports)
    monkeypatch.setattr(doctor, "check_transformer_engine", lambda: Finding("transformer-engine", "asked"))
    assert run() == code
    shown = capsys.readouterr().out
    assert ("-> pip install torch" in shown) == (code == 1)
    assert ("FP8 GEMMs" in shown) == ("asked" in shown) == (code == 0)  # asking the device takes a torch that works


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "_OPTIONAL", ("no-such-option",))
    monkeypatch.setattr(doctor, "check_transformer_engine", lambda: Finding("transformer-engine", "fine"))
    monkeypatch.setattr(doctor, "check_imports", lambda: Finding("imports", "fine"))
    assert run() == 1
    shown = capsys.readouterr().out
    assert "-> pip install no-such-package" in shown
    assert "not installed (optional)" in shown
    assert "pip install no-such-option" not in shown


@pytest.mark.parametrize(("args", "code"), [(["--help"], 0), (["-h"], 0), (["--fix"], 2)])
def test_it_has_no_options(args: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == code
    assert "usage: lightning-fp8 doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torch", "torchvision", "said"),
    [
        (None, "0.26.0", "pip install torch torchvision"),
        ("2.13.0", None, "pip install torch torchvision"),
        ("2.13.0+cpu", "0.26.0+cu132", "different builds: pip install --upgrade --force-reinstall torch torchvision"),
        ("2.13.0+cpu", "0.26.0", "different builds: pip install --upgrade --force-reinstall torch torchvision"),
        ("2.13.0+cpu", "0.20.0+cpu", "do not match: pip install --upgrade torch torchvision"),
        ("2.13.0", "0.20.0", "do not match: pip install --upgrade torch torchvision"),
    ],
)
def test_explain_mismatch(torch: str | None, torchvision: str | None, said: str) -> None:
    explanation = explain_mismatch(torch, torchvision)
    assert explanation.endswith(said)
    assert all(version in explanation for version in (torch, torchvision) if torch and torchvision)


PIP = 'pip install --no-build-isolation "lightning-fp8[te]"'


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda name: "2.20.2")


def test_a_missing_transformer_engine_is_no_fault_and_its_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    finding = check_transformer_engine("no-such-python")
    assert finding.state.startswith(f"not installed (optional): {PIP} (it is compiled against")
    assert not finding.remedy


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "echo noise; echo '> Transformer Engine does not'; echo 'import (OSError: x)'",
            "does not import (OSError: x)",
        ),
        ("echo '> pydantic is not installed'", "pydantic is not installed"),
        ("kill -SEGV $$", "importing it ends Python, exit code -11"),
    ],
)
@pytest.mark.usefixtures("on_a_gpu")
def test_a_broken_transformer_engine_is_a_fault_where_there_is_a_gpu(
    text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = check_transformer_engine(script(tmp_path, text))
    assert finding.state.startswith("2.20.2, ")
    assert finding.state.endswith(problem)
    assert finding.remedy.startswith(PIP)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finding = check_transformer_engine(script(tmp_path, text))
    assert finding.state.endswith(f"{problem}; there is no CUDA device that it could use")
    assert not finding.remedy


@pytest.mark.usefixtures("on_a_gpu")
def test_a_transformer_engine_that_works_says_which_recipes_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"mx_1x32": "Device compute capability 10.0 or higher required"}
    monkeypatch.setattr(hardware, "why_not_transformer_engine", reasons.get)
    finding = check_transformer_engine(script(tmp_path, "echo '> '"))
    assert finding.state == f"2.20.2, runs tensorwise, delayed, blockwise; not mxfp8: {reasons['mx_1x32']}"
    assert not finding.remedy
    monkeypatch.setattr(hardware, "why_not_transformer_engine", lambda _: "Device too old")
    assert (
        "runs no recipe; not tensorwise, delayed: Device too old"
        in check_transformer_engine(script(tmp_path, "echo '> '")).state
    )
