"""What a user's mistakes and damaged or hostile files end in: the table is in `hostile/cases_*.py`, a line a case.

Each runs as `lightning-fp8 COMMAND` does, in this process: importing torch again for each would take ten minutes. That
the command line itself ends so is shown by a few in processes of their own.
"""

import os
import shutil
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import dropwhile
from pathlib import Path

import pytest
from hostile import cases_configuration, cases_data, cases_runs
from hostile.world import CKPT, Case, fit, make

from lightning_fp8.cli.main import main

TABLE = [*cases_configuration.CASES, *cases_data.CASES, *cases_runs.CASES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything is right."""
    folder = tmp_path_factory.mktemp("right")
    make(folder)
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # which the command sets, for this test alone
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def test_the_table_is_large_and_each_case_is_one() -> None:
    assert len(TABLE) >= 120
    assert len({case.name for case in TABLE}) == len(TABLE)
    assert {case.code for case in TABLE} == {1, 2}
    assert all(len(case.says) >= 2 for case in TABLE)


def test_nothing_is_wrong_with_what_the_cases_spoil(world: Path) -> None:
    with warnings.catch_warnings():
        main(fit("--trainer.max_steps=4", "--ckpt_path", CKPT))
        main(["validate", "-c", "config.yaml", "--ckpt_path", CKPT])
        main(["generate", "--ckpt", CKPT, "--prompt", "a", "--tokenizer=data/tokenizer.json", "--max_new_tokens=2"])
        main(["export", CKPT, "out"])


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_a_mistake_is_told(case: Case, world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoiled = case.spoil()
    kept = {path: path.read_bytes() for path in Path("run/checkpoints").iterdir()}
    context = spoiled if isinstance(spoiled, AbstractContextManager) else nullcontext()
    with warnings.catch_warnings(), context, pytest.raises(SystemExit) as stopped:
        main(case.command)
    shown = capfd.readouterr().err.splitlines()
    lines = list(dropwhile(lambda line: not line.startswith("lightning-fp8: "), shown))  # it is the last that is said
    said = "\n".join(lines)
    assert stopped.value.code == case.code
    assert 1 <= len(lines) <= 3, said
    assert all(what in said for what in case.says), said
    assert not any(word in said for word in ("Traceback", "not foreseen", "Errno")), said
    assert max(map(len, lines)) < 300, said
    assert not Path("pwned").exists()
    run = "run.1" if Path("run.1").exists() else "run"
    assert {path: Path(run, *path.parts[1:]).read_bytes() for path in kept} == kept  # no mistake costs a checkpoint


@pytest.mark.parametrize("name", ["config key", "ids out of range", "program"])
def test_the_process_ends_so(name: str, world: Path) -> None:
    case = next(case for case in TABLE if case.name == name)
    case.spoil()
    command = [sys.executable, "-m", "lightning_fp8", *case.command]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == case.code
    assert all(what in ended.stderr for what in case.says)
    assert "Traceback" not in ended.stderr
    if name == "ids out of range":
        debugged = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False, timeout=120)
        assert "Traceback" in debugged.stderr


def test_only_trusted_class_paths_are_imported(world: Path) -> None:
    """In processes of their own: what is trusted holds for the whole of one."""
    Path("mine.py").write_text("open('imported', 'w')\nimport lightning\nclass Mine(lightning.Callback): pass\n")
    added = ["--trainer.callbacks+=mine.Mine"]
    trusted = ["--trust_class_paths", "lightning_fp8,lightning,torch"]

    def run(*options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "lightning_fp8", *fit("--trainer.default_root_dir=new", *options)]
        env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{world}", **environment}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)

    for options, environment in [
        ([*trusted, *added], {}),
        (added, {"LIGHTNING_FP8_TRUST_CLASS_PATHS": "lightning_fp8,lightning,torch"}),
    ]:
        refused = run(*options, **environment)
        assert refused.returncode == 2
        assert "mine.Mine is not among the trusted class paths" in refused.stderr
        assert "--trust_class_paths" in refused.stderr
        assert not Path("imported").exists()
    assert run(*trusted).returncode == 0
    assert run(*added).returncode == 0
    assert Path("imported").exists()
