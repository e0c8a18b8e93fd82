"""Every block of the README and of docs/ runs, Python as it stands, and the site builds without a warning."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hostile.world import make

from lightning_fp8.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[Path, int, str]]:
    """Page, line and text of the blocks of a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [
        (page, page.read_text()[: match.start()].count("\n") + 1, match[1])
        for page in PAGES
        for match in pattern.finditer(page.read_text())
    ]


BLOCKS = [pytest.param(page, code, id=f"{page.name}:{line}") for page, line, code in blocks("python")]
COMMANDS = [
    shlex.split(command, comments=True)
    for _, _, text in blocks("console")
    for command in re.findall(r"^\$ (.*)", text.replace("\\\n", ""), re.MULTILINE)
]
SMALL = [
    *("--model.config.vocab_size=272", "--model.config.num_layers=1", "--model.schedule.warmup_steps=1"),
    *("--data.path=data", "--data.sequence_length=32", "--data.batch_size=2", "--data.num_workers=0"),
    *("--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"),
]


def test_there_are_blocks() -> None:
    assert {page.name for page, _ in (block.values for block in BLOCKS)} >= {"README.md", "recipes.md", "moments.md"}


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_a_block_runs(page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_every_block_is_one_that_is_tried() -> None:
    languages = {language for page in PAGES for language in re.findall(r"^ *```(.+)", page.read_text(), re.MULTILINE)}
    assert languages == {"python", "console", "yaml", "text"}
    assert len(blocks("text")) == 1  # what `make train` ends with


def test_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `make train`; those of `fit` over less data, a smaller model and fewer steps."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # which the command sets, for this test alone
    Path("configs").symlink_to(ROOT / "configs")
    shutil.copy("configs/quickstart.yaml", "run.yaml")
    main(["fit", "-c", "configs/quickstart.yaml", *SMALL, "--trainer.max_steps=2"])
    assert {Path(program).name for program, *_ in COMMANDS} == {"make", "lightning-fp8"}
    for program, verb, *options in COMMANDS:
        if program == "make":
            assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            main([verb, *options, *(SMALL if verb == "fit" else ())])
    assert {path.name for path in Path("runs").iterdir()} == {"quickstart", "quickstart.1", "bf16"}
    assert Path("runs/quickstart/report.html").is_file()


@pytest.mark.parametrize("text", [text for _, _, text in blocks("yaml")])
def test_a_block_of_configuration_is_taken(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])
    (tmp_path / "block.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", str(ROOT / "configs/quickstart.yaml"), "-c", str(tmp_path / "block.yaml"), "--print_config"])
    assert ended.value.code == 0


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
