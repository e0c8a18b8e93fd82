"""TensorBoard's events, which are worth less than the run: a disk that takes no more of them costs a warning."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_warn


class SpareEvents(TensorBoardLogger):
    """TensorBoardLogger that ends with a warning, and not with the run, when the disk fails."""

    _failed = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs metrics."""
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        """Hands what is logged to the disk."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """Ends the file."""
        self._try(super().finalize, status)

    def _try(self, call: Callable[..., Any], *args: Any) -> None:
        if self._failed:
            return
        try:
            call(*args)
        except Exception as error:
            reason = _disk(error)
            if reason is None:
                raise
            self._failed = True
            rank_zero_warn(f"No more TensorBoard events for {self.log_dir} ({reason}); metrics.csv goes on.")


def _disk(error: BaseException | None) -> OSError | None:
    """What the disk said, which Lightning and the writer's thread wrap in errors of their own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
