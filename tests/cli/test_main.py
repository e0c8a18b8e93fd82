import sys
from types import ModuleType

import pytest

import lightning_fp8
from lightning_fp8.cli import main as cli
from lightning_fp8.cli.main import VERBS, main


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A verb `probe` that returns; tests give it another `run`. What it was called with is in `calls`."""
    module = ModuleType("probe_verb")
    module.calls = []
    module.run = module.calls.append
    monkeypatch.setitem(sys.modules, "probe_verb", module)
    monkeypatch.setitem(cli.VERBS, "probe", ("probe_verb", "for a test"))
    return module


def fail(error: Exception) -> object:
    def run(args: list[str]) -> None:
        raise error

    return run


def test_verbs_are_modules_that_run() -> None:
    assert set(VERBS) >= {"fit", "validate", "test", "predict", "prepare", "generate", "doctor"}
    for module, text in VERBS.values():
        assert callable(__import__(module, fromlist=["run"]).run)
        assert text


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]], ids=["nothing", "-h", "--help"])
def test_help_lists_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(argv)
    shown = capsys.readouterr().out
    for verb, (_, text) in VERBS.items():
        assert any(line.split() == [verb, *text.split()] for line in shown.splitlines())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == lightning_fp8.__version__


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fitt", "--config", "x"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert "'fitt'" in line
    assert all(verb in line for verb in VERBS)


def test_arguments_reach_the_verb(verb: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["probe", "--debug", "--x", "1"])
    monkeypatch.setattr(sys, "argv", ["lightning-fp8", "probe"])
    main()
    assert verb.calls == [["probe", "--x", "1"], ["probe"]]


@pytest.mark.parametrize("error", [ValueError("the reason"), FileNotFoundError("the reason")])
def test_a_mistake_is_one_line(error: Exception, verb: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    verb.run = fail(error)
    with pytest.raises(SystemExit) as stopped:
        main(["probe"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "lightning-fp8: the reason\n"


@pytest.mark.parametrize("argv", [["probe", "--debug"], ["--debug", "probe"]])
def test_debug_shows_where(argv: list[str], verb: ModuleType) -> None:
    verb.run = fail(ValueError("the reason"))
    with pytest.raises(ValueError, match="the reason"):
        main(argv)


def test_our_own_errors_are_told_as_such(verb: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    verb.run = fail(TypeError("a bug"))
    with pytest.raises(SystemExit) as stopped:
        main(["probe"])
    first, where, remedy = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert first == "lightning-fp8: TypeError: a bug"
    assert "not foreseen" in where
    assert "main.py:" in where
    assert "--debug" in remedy
    with pytest.raises(TypeError, match="a bug"):
        main(["probe", "--debug"])
