"""Kernels in Triton's interpreter, which needs no GPU but a process in which TRITON_INTERPRET is set."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheels for this platform")


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("interpreted.py", 100),
        ("interpreted_adamw.py", 25),
        ("interpreted_gradients.py", 60),
        ("interpreted_fused.py", 60),
    ],
)
def test_kernels_agree_with_their_reference(file, tests):
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__).with_name(file)),
        "-q",
        "-x",
        "--no-header",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) > tests
    assert "skipped" not in run.stdout
