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
_OPTIONAL = ("triton",)


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
    if not findings[-1].remedy:  # asking the device takes a torch that works
        findings += [*_device(), check_transformer_engine()]
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


def check_transformer_engine(python: str = sys.executable) -> Finding:
    """Whether Transformer Engine, which is optional, is installed, imports, and which recipes it can run here."""
    import torch

    from lightning_fp8 import hardware

    name, version, on_gpu = "transformer-engine", _version("transformer-engine"), torch.cuda.is_available()
    if version is None:
        return Finding(name, f"not installed (optional): {hardware.INSTALL_TRANSFORMER_ENGINE}")
    code = "from lightning_fp8.hardware import what_ails_transformer_engine as ask; print('>', ask() or '')"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    answers = re.findall(r"^> (.*)", result.stdout, re.DOTALL | re.MULTILINE)
    # Libraries that do not go together may end the process rather than raise.
    problem = " ".join(answers[-1].split()) if answers else f"importing it ends Python, exit code {result.returncode}"
    if not on_gpu:
        return Finding(name, f"{version}, {problem or 'imports'}; there is no CUDA device that it could use")
    if problem:
        return Finding(name, f"{version}, {problem}", hardware.INSTALL_TRANSFORMER_ENGINE)
    granularities = {"tensor": "tensorwise, delayed", "block_1x128": "blockwise", "mx_1x32": "mxfp8"}
    problems = {presets: hardware.why_not_transformer_engine(which) for which, presets in granularities.items()}
    can = [presets for presets, reason in problems.items() if not reason]
    cannot = [f"not {presets}: {reason}" for presets, reason in problems.items() if reason]
    return Finding(name, f"{version}, " + "; ".join([f"runs {', '.join(can) or 'no recipe'}", *cannot]))


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
