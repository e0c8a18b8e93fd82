import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from lightning_fp8.cli.main import main
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderLM

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
PREPARE = CONFIGS / "data" / "quickstart.yaml"
OVERLAYS = (
    "precision",
    "model",
    "context",
    "memory",
    "optimizer",
    "recipes",
    "stability",
    "strategy",
    "cluster",
    "checkpoint",
    "data",
)
COMMANDS: dict[Path, list[str]] = {
    **{path: ["fit", "--config", str(path)] for path in sorted(CONFIGS.glob("*.yaml"))},
    **{
        path: ["fit", "--config", str(QUICKSTART), "--config", str(path)]
        for folder in OVERLAYS
        for path in sorted(CONFIGS.glob(f"{folder}/*.yaml"))
    },
    PREPARE: ["prepare", "--config", str(PREPARE)],
    **{
        CONFIGS / "evidence" / f"{name}.yaml": [
            "fit",
            *(word for file in (*before, f"evidence/{name}.yaml") for word in ("--config", str(CONFIGS / file))),
        ]
        for name, before in {
            "skip-bigram": (),
            "zipf": ("evidence/skip-bigram.yaml",),
            **dict.fromkeys(("text", "26m", "150m"), ("quickstart.yaml",)),
        }.items()
    },
}


def named(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def differences(wanted: Any, parsed: Any, name: str = "") -> Iterator[str]:
    """Where `parsed` lacks or changes something of `wanted`; it may hold more."""
    if isinstance(wanted, dict) and isinstance(parsed, dict):
        texts = {str(key): value for key, value in parsed.items()}
        for key, value in ((str(key), value) for key, value in wanted.items()):  # numbers are printed as texts
            found = texts.get(key.removesuffix("+"), "nothing")
            if key.endswith("+") and isinstance(found, list):  # added to a list of the configuration before
                found = found[-len(value) :]
            yield from differences(value, found, f"{name}.{key}".strip("."))
    elif isinstance(wanted, list) and isinstance(parsed, list) and len(wanted) == len(parsed):
        for index, pair in enumerate(zip(wanted, parsed, strict=True)):
            yield from differences(*pair, f"{name}[{index}]")
    elif wanted != parsed:
        yield f"{name}: {wanted!r} was read as {parsed!r}"


def test_every_config_has_a_command() -> None:
    assert set(COMMANDS) == set(CONFIGS.rglob("*.y*ml"))


@pytest.mark.parametrize("path", COMMANDS, ids=named)
def test_config_parses_to_what_it_says(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])  # the verb sets it
    with pytest.raises(SystemExit) as stopped:
        main([*COMMANDS[path], "--print_config"])
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    assert list(differences(yaml.safe_load(path.read_text()), yaml.safe_load(shown.out))) == []


# What a machine without the hardware of a configuration needs to be told.
INSTEAD = {
    CONFIGS / "cluster" / "two-nodes.yaml": "--trainer.devices=1",
    CONFIGS / "evidence" / "26m.yaml": "--trainer.accelerator=cpu",
    CONFIGS / "evidence" / "150m.yaml": "--trainer.accelerator=cpu",
}


@pytest.mark.parametrize("path", [path for path, command in COMMANDS.items() if command[0] == "fit"], ids=named)
def test_config_makes_a_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its classes are made; what `fit` would then do is for other tests."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(Trainer, "fit", lambda self, model, **given: made.update(given, trainer=self, model=model))
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # as of a job on several nodes, or it is refused
    main([*COMMANDS[path], f"--trainer.default_root_dir={tmp_path}", *filter(None, [INSTEAD.get(path)])])
    assert isinstance(made["model"], DecoderLM)
    assert isinstance(made["datamodule"], TokenDataModule)
    wanted = yaml.safe_load(path.read_text()).get("trainer", {})
    assert made["trainer"].num_nodes == wanted.get("num_nodes", 1)
    if "callbacks" in wanted:
        kinds = {type(callback).__name__ for callback in made["trainer"].callbacks}
        assert {one["class_path"].rpartition(".")[2] for one in wanted["callbacks"]} <= kinds


def uncommented(text: str) -> Iterator[str]:
    """Keys without a comment on their line or right above it; those of nested mappings need none."""
    lines = text.splitlines()

    def is_nested(value: yaml.Node) -> bool:
        return isinstance(value, yaml.MappingNode) or (
            isinstance(value, yaml.SequenceNode) and any(is_nested(item) for item in value.value)
        )

    def walk(node: yaml.Node) -> Iterator[str]:
        for item in node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ():
            key, value = item if isinstance(item, tuple) else (None, item)
            yield from walk(value)
            if key is None or is_nested(value):
                continue
            first, last = key.start_mark.line, value.end_mark.line
            above = lines[first - 1].strip() if first else ""
            if not above.startswith("#") and "#" not in lines[last][value.end_mark.column :]:
                yield f"line {first + 1}: {key.value}"

    yield from walk(yaml.compose(text))


@pytest.mark.parametrize("path", COMMANDS, ids=named)
def test_every_key_is_explained(path: Path) -> None:
    assert list(uncommented(path.read_text())) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("a: 1  # why", []),
        ("# why\na: 1", []),
        ("a: 1", ["line 1: a"]),
        ("a: '#'", ["line 1: a"]),
        ("a: 1  # why\nb: 2", ["line 2: b"]),
        ("a:\n  b: 1  # why", []),
        ("a:\n  - b: 1", ["line 2: b"]),
        ("a: [1, 2]", ["line 1: a"]),
        ("a: [1, 2]  # why", []),
    ],
)
def test_missing_comment_is_seen(text: str, missing: list[str]) -> None:
    assert list(uncommented(text)) == missing


@pytest.mark.parametrize("parsed", [{"a": 1}, {"a": {"b": [1]}}, {"a": {"b": [1, 3]}}, {"a": {"c": 1}}])
def test_differences_are_seen(parsed: dict[str, Any]) -> None:
    assert list(differences({"a": {"b": [1, 2]}}, parsed))


@pytest.mark.parametrize(
    ("parsed", "same"), [([0, 1, 2], True), ([1, 2], True), ([1, 2, 0], False), ("nothing", False)]
)
def test_what_is_added_to_a_list_comes_last(parsed: Any, same: bool) -> None:
    assert (not list(differences({"a+": [1, 2]}, {"a": parsed}))) is same
