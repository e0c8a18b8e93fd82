"""What a full disk does to TensorBoard's events, and that nothing else is forgiven."""

import errno
import warnings

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_fp8.callbacks.events import SpareEvents


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def wrapped(*_: object, **__: object) -> None:
    try:
        no_room()
    except OSError as error:
        raise ValueError("you tried to log something that is not supported") from error


@pytest.mark.parametrize("fail", [no_room, wrapped])
@pytest.mark.parametrize("method", ["log_metrics", "save", "finalize"])
def test_a_full_disk_costs_a_warning_and_no_more_of_them(fail, method, tmp_path, monkeypatch):
    logger = SpareEvents(tmp_path, name="", version="")
    arguments = {"log_metrics": ({"loss": 1.0}, 0), "save": (), "finalize": ("success",)}[method]
    monkeypatch.setattr(TensorBoardLogger, method, fail)
    with pytest.warns(UserWarning, match=r"No more TensorBoard events .*No space left on device.*metrics\.csv goes on"):
        getattr(logger, method)(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(logger, method)(*arguments)


def test_another_error_is_an_error(tmp_path, monkeypatch):
    logger = SpareEvents(tmp_path, name="", version="")
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logger.log_metrics({"loss": 1.0}, 0)


def test_events_are_written_where_there_is_room(tmp_path):
    logger = SpareEvents(tmp_path, name="", version="")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    logger.finalize("success")
    assert [path for path in tmp_path.iterdir() if path.name.startswith("events") and path.stat().st_size > 100]
