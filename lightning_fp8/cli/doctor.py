"""`lightning-fp8 doctor`: what this machine can do and what is wrong with what is installed.

Each check is a function that returns a line for the table and, where something is wrong, what to install. Imports
are tried in a process of their own, because a torchvision that does not match torch takes the interpreter's import
state with it.
"""

import importlib.metadata
import platform
import re
import subprocess
import sys
from dataclasses import dataclass

_REQUIRED = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "litdata",
    "jsonargparse",
    "tokenizers",
    "safetensors",
    "rich",
    "tensorboard",
    "matplotlib",
)
_OPTIONAL = ("triton", "transformer-engine")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty where all is well."""

    name: str
    state: str
    remedy: str = ""


def run(args: list[str]) -> None:
    """Prints the report; exits with 1 if something needs a remedy."""
    if len(args) > 1:
        print("usage: lightning-fp8 doctor\nChecks this machine and what is installed on it; it has no options.")
        raise SystemExit(0 if args[1] in ("-h", "--help") else 2)
    findings = [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += [_installed(name) for name in _REQUIRED]
    findings += [Finding(name, _version(name) or "not installed (optional)") for name in _OPTIONAL]
    findings += [check_imports()]
    if not findings[-1].remedy:
        findings += _device()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:{width}}  {finding.state}")
        if finding.remedy:
            print(f"{'':{width}}  -> {finding.remedy}")
    raise SystemExit(1 if any(finding.remedy for finding in findings) else 0)


def check_imports(python: str = sys.executable) -> Finding:
    """Whether `import torchvision` and `import lightning` work together with the torch that is installed."""
    result = subprocess.run(
        [python, "-c", "import torchvision, lightning.pytorch"], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return Finding("imports", "torch, torchvision and lightning work together")
    reason = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"exit code {result.returncode}"
    return Finding("imports", f"broken: {reason}", _remedy(reason))


def _remedy(reason: str) -> str:
    missing = re.search(r"No module named '([\w-]+)", reason)
    return f"pip install {missing[1]}" if missing else explain_mismatch(_version("torch"), _version("torchvision"))


def explain_mismatch(torch: str | None, torchvision: str | None) -> str:
    """What to install when torch and torchvision do not load together.

    Args:
        torch: Version of torch, with its local part ("2.13.0+cpu") if it has one; None if it is missing.
        torchvision: Version of torchvision, likewise.
    """
    if torch is None or torchvision is None:
        return "pip install torch torchvision"
    if "+" in torch and torch.split("+")[1] not in torchvision:
        return (
            f"torch {torch} and torchvision {torchvision} are different builds:"
            " pip install --upgrade --force-reinstall torch torchvision"
        )
    return f"torch {torch} and torchvision {torchvision} do not match: pip install --upgrade torch torchvision"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(name: str) -> Finding:
    version = _version(name)
    return Finding(name, version) if version else Finding(name, "missing", f"pip install {name}")


def _device() -> list[Finding]:
    from lightning_fp8 import hardware

    return [Finding("device", hardware.describe_device()), Finding("FP8 GEMMs", hardware.describe_fp8())]
