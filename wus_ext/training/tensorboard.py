"""The records of a run as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import StorageError, require

__all__ = ["Scalars", "check_tensorboard", "scalars"]

_EVENTS = "events.out.tfevents.*"


def check_tensorboard() -> None:
    """Raise MissingExtra where TensorBoard is not installed."""
    require("tensorboard", "--tensorboard", extra="tensorboard")


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values for a record, losses and accuracies of all parts side by side.

    >>> dict(scalars({"epoch": 1, "test_loss": 0.5, "lr": 0.1, "skipped": True}))
    {'loss/test': 0.5, 'run/lr': 0.1, 'run/skipped': 1.0}
    """
    for name, value in record.items():
        if name == "epoch" or value is None:
            continue
        part, _, kind = name.rpartition("_")
        tag = f"{kind}/{part}" if kind in ("loss", "accuracy") else f"run/{name}"
        yield tag, float(value)


class Scalars:
    """Event files that always hold one value for each epoch.

    Args:
        folder: what TensorBoard is to show; made with the first epoch.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        check_tensorboard()
        self.folder = folder
        self._writer: Any = None

    def begin(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write ``history`` in the place of what is there.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            for path in self.folder.glob(_EVENTS):
                path.unlink()
        except OSError as error:
            raise StorageError(f"cannot write {self.folder}: {error}") from error
        for record in history:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one more epoch.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self.folder)
            for tag, value in scalars(record):
                self._writer.add_scalar(tag, value, record["epoch"])
            self._writer.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.folder}: {error}") from error

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
