"""Every block of Python in the README and in docs/ runs as it stands, and the site builds without a warning."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(page, match[1], id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
]


def test_there_are_blocks() -> None:
    assert {page.name for page, _ in (block.values for block in BLOCKS)} >= {"README.md", "recipes.md", "moments.md"}


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_a_block_runs(page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path, command_line: ModuleType) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    elsewhere = ("http://", "https://", *([command_line.PAGE] if page.parent.name == "docs" else []))
    assert not [t for t in targets if not t.startswith(elsewhere) and not (page.parent / t).exists()]


@pytest.fixture(scope="module")
def command_line() -> ModuleType:
    """The hook that writes the reference of the command line."""
    spec = importlib.util.spec_from_file_location("command_line", ROOT / "docs/command_line.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["command_line"] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_verb_and_its_options(command_line: ModuleType) -> None:
    from lightning_fp8.cli.main import VERBS

    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", command_line.page(), re.DOTALL | re.MULTILINE))
    assert list(sections) == list(VERBS)
    assert "`--fp8.recipe` · " in sections["fit"]
    assert "`--trainer.max_steps` · `int`, default `-1`" in sections["fit"]
    assert "`--vocab_size` · `int`, default `2048`" in sections["prepare"]
    assert "`ckpt` · `str`, required" in sections["export"]
    assert "`--hardware`" in sections["estimate"]
    assert "`--trainer.max_steps`" not in sections["estimate"]  # which says that it takes the options of `fit`
    unexplained = [line for line in command_line.page().splitlines() if line.strip() == ":"]
    assert not unexplained


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "FP8Precision" in (tmp_path / "api/index.html").read_text()
    assert "--fp8.recipe" in (tmp_path / "command-line/index.html").read_text()
