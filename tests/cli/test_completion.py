"""The script that is printed, loaded by a real bash."""

import shutil
import subprocess

import pytest

from lightning_fp8.cli.completion import options_of_all, script
from lightning_fp8.cli.main import main


@pytest.fixture(scope="module")
def printed() -> str:
    return script(options_of_all())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["p"], {"parity", "predict", "prepare", "plan"}),
        (["fit", "--fp8.rec"], {"--fp8.recipe", "--fp8.recipe.help"}),
        (["fit", "--max_t"], {"--max_tokens"}),
        (["prepare", "--val"], {"--val_fraction"}),
        (["generate", "--min"], {"--min_p"}),
        (["export", "--fp"], {"--fp8"}),
        (["estimate", "--hard"], {"--hardware"}),
        (["fit", "--trainer.max_st"], {"--trainer.max_steps"}),
        (["generate", "--ckpt", "a-fi"], {"a-file.ckpt"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes(words: list[str], wanted: set[str], printed: str, tmp_path, monkeypatch) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.fail("these tests need bash")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file.ckpt").touch()
    typed = " ".join(["lightning-fp8", *words])
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _lightning_fp8; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run([bash, "-c", f"{printed}\n{ask}"], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == wanted
    assert not done.stderr


def test_it_is_printed(capsys: pytest.CaptureFixture[str], printed: str) -> None:
    main(["completion"])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit):
        main(["completion", "fish"])
