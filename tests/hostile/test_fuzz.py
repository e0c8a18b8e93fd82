"""What reads files of others, on the seeds of the fuzzer and on variations of them; see `fuzz.py`."""

from pathlib import Path

import pytest
from hostile.fuzz import READERS, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SEEDS = sorted((Path(__file__).parent / "seeds").iterdir())
QUICK = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_reader_has_a_seed() -> None:
    assert {path.read_bytes()[:1] for path in SEEDS} == set(READERS)


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.name)
def test_seeds(path: Path) -> None:
    read(path.read_bytes())
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ["manifest", "index", "config", "metadata", "checkpoint", "recipe", "tokens"])
def test_what_is_right_is_read(name: str) -> None:
    data = (Path(__file__).parent / "seeds" / name).read_bytes()
    READERS[data[:1]](data[1:])


@QUICK
@given(st.sampled_from(SEEDS), st.data())
def test_damage(path: Path, data: st.DataObject) -> None:
    """A stretch is replaced, put in or left out."""
    content = path.read_bytes()
    at = data.draw(st.integers(1, len(content)))
    end = data.draw(st.integers(at, min(len(content), at + 40)))
    read(content[:at] + data.draw(st.binary(max_size=24)) + content[end:])


@QUICK
@given(st.sampled_from([path for path in SEEDS if path.name in ("manifest", "index", "config")]), VALUES, st.data())
def test_other_values(path: Path, value: object, data: st.DataObject) -> None:
    """One value, at any depth of a JSON file, is another."""
    import json

    content = path.read_bytes()
    tree = json.loads(content[1:])
    at, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
    at[key] = value
    read(content[:1] + json.dumps(tree).encode())


@QUICK
@given(st.dictionaries(st.sampled_from(["preset", "input", "scaling", "history", "amax", "high_precision"]), VALUES))
def test_recipes(recipe: dict[str, object]) -> None:
    import yaml

    read(b"r" + yaml.safe_dump(recipe).encode())
