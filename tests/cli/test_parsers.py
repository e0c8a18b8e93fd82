import pytest

from lightning_fp8.cli.parsers import OneLineErrors


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("one", "one"),
        ("what\nwhy", "what\n  why"),
        ("what\n  - tried this\n\n  - tried that\n  - why  \n", "what\n  why"),
        ("", "wrong options"),
    ],
)
def test_an_error_is_its_first_and_last_line(message: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        OneLineErrors().error(message)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"lightning-fp8: {shown}\n"
