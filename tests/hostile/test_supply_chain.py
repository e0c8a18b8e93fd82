"""What is published: the same bytes from the same source, typed, and whole when it is installed alone."""

import hashlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EPOCH = "1700000000"


def hatchling(target: str, into: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH}, check=True, capture_output=True)
    (built,) = into.iterdir()
    return built


@pytest.mark.slow
@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_two_builds_are_the_same_bytes(target: str, tmp_path: Path) -> None:
    """The second after the files' times have changed, as in another checkout."""
    first = hatchling(target, tmp_path / "first")
    before = {path: path.stat() for path in (ROOT / "lightning_fp8").rglob("*.py")}
    try:
        for path in before:
            os.utime(path)
        second = hatchling(target, tmp_path / "second")
    finally:
        for path, stat in before.items():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert first.name == second.name
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_it_installs_into_an_empty_environment(target: str, tmp_path: Path) -> None:
    """Without what it depends on, which `make test-oldest` and every CI run install: its own files are all there."""
    built = hatchling(target, tmp_path / "built")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty/bin/python"
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    builder = {}
    if target == "sdist":  # which needs hatchling to build, that of these tests
        command.append("--no-build-isolation")
        builder = {"PYTHONPATH": sysconfig.get_path("purelib")}
    subprocess.run([*command, built], check=True, env={**os.environ, **builder})
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    said = subprocess.run(
        [tmp_path / "empty/bin/lightning-fp8", "--help"],
        check=True,
        capture_output=True,
        text=True,
        env=alone,
        cwd=tmp_path,
    )
    assert "usage: lightning-fp8 VERB" in said.stdout
    (site,) = (tmp_path / "empty/lib").glob("python*/site-packages")
    held = {str(path.relative_to(site)) for path in site.rglob("*")}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lightning_fp8").rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".typed")
    }
    assert package <= held
    assert "lightning_fp8/py.typed" in held
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in held)


@pytest.mark.slow
def test_the_source_archive_holds_its_tests(tmp_path: Path) -> None:
    with tarfile.open(hatchling("sdist", tmp_path / "built")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "Makefile", "LICENSE", "tests/test_bad_input.py", "tests/hostile/seeds/manifest"} <= names
