import pytest

from lightning_fp8.models.text_stream import TextStream


def decode(tokens: list[int]) -> str:
    """Tokens are bytes."""
    return bytes(tokens).decode(errors="replace")


def pieces(text: str, *stops: str, prompt: str = "") -> list[str]:
    stream = TextStream(decode, list(prompt.encode()), stops)
    out = [stream.push(token) for token in text.encode()]
    return [*out, stream.flush()]


def test_characters_are_not_cut_into_bytes() -> None:
    assert pieces("aé€😀") == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert pieces("é", prompt="€€") == ["", "é", ""]


def test_broken_bytes_do_not_hold_up_the_text_for_ever() -> None:
    stream = TextStream(decode, [])
    shown = "".join(stream.push(token) for token in [0xE2, 0x82, *b"abc"])
    assert shown.endswith("abc")


@pytest.mark.parametrize("stop", ["!", "END", "ENDED"])
def test_a_stop_string_and_what_follows_are_not_shown(stop: str) -> None:
    assert "".join(pieces(f"one {stop} two", stop)) == "one "
    assert "".join(pieces(f"one {stop}", stop)) == "one "


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert pieces("aENxEND", "END") == ["a", "", "", "ENx", "", "", "", ""]
    assert "".join(pieces("aEN", "END")) == "aEN"  # it did not become one
    assert "".join(pieces("aEENDb", "END")) == "aE"


def test_the_first_of_several_stop_strings_ends() -> None:
    assert "".join(pieces("a. b? c! d", "!", "?", "")) == "a. b"


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    assert "".join(pieces("b", "END", prompt="aEND")) == "b"
    assert "".join(pieces("Db", "END", prompt="aEN")) == "Db"
