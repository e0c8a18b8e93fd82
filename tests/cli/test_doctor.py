import subprocess
import sys
from pathlib import Path

import pytest

from lightning_fp8.cli import doctor
from lightning_fp8.cli.doctor import Finding, check_imports, explain_mismatch

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
    result = subprocess.run([sys.executable, "-m", "lightning_fp8", "doctor"], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line for line in lines if line.startswith("imports")] == [
        f"{'imports':18}  torch, torchvision and lightning work together"
    ]
    assert {"python", "torch", "lightning", "device", "FP8"} <= {line.split()[0] for line in lines}
    assert "->" not in result.stdout


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
    assert run() == code
    shown = capsys.readouterr().out
    assert ("-> pip install torch" in shown) == (code == 1)
    assert ("FP8 GEMMs" in shown) == (code == 0)  # asking the device takes a torch that works


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "_OPTIONAL", ("no-such-option",))
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
