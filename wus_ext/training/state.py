"""What a run keeps of its epochs: the records, and the state in a checkpoint; both read back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_args, get_origin, get_type_hints

from .checkpoint import load_checkpoint
from .config import TrainConfig
from .errors import ConfigError, DataError
from .settings import check_type

__all__ = ["FORMAT", "Record", "check_records", "lines", "read_records", "read_state", "table"]

#: Of the checkpoints that this version writes and reads.
FORMAT = 2


class Record(TypedDict):
    """One finished epoch: accuracies in percent, memory in bytes, rates and times in seconds."""

    epoch: int
    lr: float
    skipped: bool
    skipped_steps: NotRequired[float]
    train_loss: float
    train_accuracy: float
    validation_loss: NotRequired[float | None]
    validation_accuracy: NotRequired[float | None]
    test_loss: float
    test_accuracy: float
    train_seconds: float
    eval_seconds: float
    images_per_second: float
    step_seconds: float
    peak_bytes: NotRequired[int]
    packed_bytes: NotRequired[int]


def check_records(records: Any, where: str) -> None:
    """Check that ``records`` are those of the epochs 1, 2, ...

    Raises:
        DataError: beginning with ``where``.
    """
    if not isinstance(records, list):
        raise DataError(f"{where}: expected the records of epochs, got {type(records).__name__}")
    for epoch, record in enumerate(records, 1):
        if not isinstance(record, Mapping) or record.get("epoch") != epoch:
            raise DataError(f"{where}: expected the record of epoch {epoch}, got {record!r:.80}")
        for name, hint in _FIELDS.items():
            if name in record:
                try:
                    check_type(name, record[name], hint)
                except ConfigError as error:
                    raise DataError(f"{where}: in the record of epoch {epoch}, {error}") from error
            elif name not in _OPTIONAL:
                raise DataError(f"{where}: the record of epoch {epoch} lacks {name}")


def lines(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as lines of JSON."""
    return "".join(json.dumps(record) + "\n" for record in records)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as CSV, a line each below their names; what is None stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_FIELDS), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file of :func:`lines`; none if there is no file.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        for line in path.read_text().splitlines():
            records.append(json.loads(line))
    except (OSError, RecursionError, ValueError) as error:
        raise DataError(f"{path} is damaged in line {len(records) + 1}: {error}") from error
    check_records(records, str(path))
    return records


def read_state(path: Path) -> dict[str, Any]:
    """The state of a run in a checkpoint, its settings as a :class:`TrainConfig`.

    Raises:
        DataError: naming the file, when it is missing, damaged or no such state.
    """
    state = load_checkpoint(path)
    if not isinstance(state, dict) or "format" not in state:
        raise DataError(f"{path} is not the state of a run")
    if state["format"] != FORMAT:
        raise DataError(f"{path} has format {state['format']!r}, this version reads {FORMAT}")
    for name, kinds in _STATE.items():
        if not isinstance(state.get(name, 1 if name == "processes" else None), kinds):
            found = f"is {state[name]!r:.80}" if name in state else "is missing"
            raise DataError(f"{path} is not the state of a run: {name} {found}")
    check_records(state["history"], f"{path} is not the state of a run")
    epochs = len(state["history"])
    if state["epoch"] != epochs or not 1 <= state["best_epoch"] <= epochs:
        raise DataError(
            f"{path} is not the state of a run: it has {epochs} records, epoch {state['epoch']} "
            f"and best epoch {state['best_epoch']}"
        )
    try:
        state["config"] = TrainConfig.from_dict(state["config"])
    except ConfigError as error:
        raise DataError(f"{path} is not the state of a run: {error}") from error
    return state


_HINTS = get_type_hints(Record, include_extras=True)
_OPTIONAL = {name for name, hint in _HINTS.items() if get_origin(hint) is NotRequired}
_FIELDS = {n: get_args(hint)[0] if n in _OPTIONAL else hint for n, hint in _HINTS.items()}
_STATE: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "processes": int,
    "classes": list,
    "mean": list,
    "std": list,
    "epoch": int,
    "best_epoch": int,
    "history": list,
    "model": dict,
    "optimizer": dict,
    "scheduler": (dict, type(None)),
    "policy": (dict, type(None)),
    "scaler": dict,
    "measured": (dict, type(None)),
}
