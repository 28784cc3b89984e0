"""The folder of a run: its settings, its metrics and its checkpoints."""

from __future__ import annotations

import contextlib
import filecmp
import json
import platform
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_checkpoint, pack_checkpoint, write_checkpoint
from .config import RELOCATABLE, TrainConfig
from .errors import ConfigError, DataError, RunWarning, StorageError, usable
from .files import link_atomic, remove_temporary, write_atomic
from .interrupts import uninterrupted
from .length import check_length
from .lock import FolderLock
from .settings import differences, reading
from .state import lines, read_records, read_state, table

__all__ = ["RunFolder", "is_free"]

#: What a resumed run may have otherwise; its length only if that changes no epoch so far.
_CHANGEABLE = RELOCATABLE | {"epochs"}


class RunFolder:
    """One training run on disk.

    ``config.json``
        the settings and the software they ran with.
    ``metrics.jsonl``
        one JSON object per finished epoch; a copy of what ``last.pt`` holds.
    ``metrics.csv``
        the same as a table.
    ``last.pt``, ``best.pt``
        state after the last and after the best epoch: :func:`load_checkpoint` verifies and reads
        it, ``torch.load(weights_only=True)`` reads it.
    ``previous.pt``
        state after the epoch before the last, until the run is finished.

    :meth:`open` reads and checks all of it and writes nothing, :meth:`begin` comes next. Every file
    is replaced whole: none is ever half written.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"
        self.previous = self.path / "previous.pt"
        self.metrics, self._table = self.path / "metrics.jsonl", self.path / "metrics.csv"
        self._config = self.path / "config.json"
        self._lock = FolderLock(self.path)

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self._config.is_file()

    def open(self, config: TrainConfig, *, resume: bool) -> dict[str, Any] | None:
        """Lock the folder for a run of ``config``.

        Returns:
            The state to resume from; ``None`` where no epoch has finished.

        Raises:
            ConfigError: something is in the way, nothing is there to resume, the run there has
                other settings, or another process trains there.
            DataError: the checkpoint is missing, damaged or not of this run.
        """
        with usable(self.path):
            self._check(config, resume=resume)
            self._lock.acquire()
            try:
                self._check(config, resume=resume)  # another process may have come between
                return self._read(config) if resume else None
            except BaseException:
                self.release()
                raise

    def begin(self, config: TrainConfig, state: dict[str, Any] | None) -> None:
        """Write the first files, or make those there agree with ``state``, from :meth:`open`.

        Raises:
            StorageError: naming what cannot be written.
        """
        with self._lock.writing(), uninterrupted():
            checkpoints = (self.last, self.previous, self.best)
            for path in (*checkpoints, self.metrics, self._table, self._config):
                remove_temporary(path)
            if not self.exists() or self.read_config().epochs != config.epochs:
                content = {"config": config.to_dict(), "environment": _environment(config)}
                self._write(self._config, json.dumps(content, indent=2) + "\n")
            self._agree(state)

    def save(self, state: dict[str, Any], *, best: bool) -> None:
        """Store the state after an epoch, which holds the records of all.

        The checkpoint before stays in place until the new one has been read back, and is then
        ``previous.pt``. An interrupt waits until all files are written.

        Raises:
            StorageError: naming what cannot be written and what is kept.
        """
        kept = state["epoch"] - 1
        with self._lock.writing(), uninterrupted():
            try:
                content = pack_checkpoint(state)
                write_checkpoint(self.last, content, previous=self.previous)
                kept += 1
                if best:
                    link_atomic(self.last, self.best)
                self._write(self.metrics, lines(state["history"]))
                self._write(self._table, table(state["history"]))
            except StorageError as error:
                held = f"{self.last} keeps epoch {kept}" if kept else "no epoch is stored yet"
                raise StorageError(f"{error}; {held}, continue with --resume") from error

    def finish(self) -> None:
        """End a run that is finished: no epoch before the last is needed any more.

        From then on ``best.pt`` is what remains if ``last.pt`` is damaged, so it is a file of its
        own.
        """
        with self._lock.writing(), uninterrupted(), contextlib.suppress(OSError):
            if self.best.samefile(self.last):
                write_checkpoint(self.best, self.last.read_bytes())
            self.previous.unlink(missing_ok=True)
        self.release()

    def discard(self) -> None:
        """Remove a run that has stored no epoch, for one with other settings to begin here."""
        if self.last.exists():
            return
        for path in (self._config, self.metrics, self._table):
            path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let others have the folder; a folder that :meth:`open` made and nothing filled goes."""
        self._lock.release()

    def read_config(self) -> TrainConfig:
        """The settings of the run here.

        Raises:
            ConfigError: there is no run, or its settings are not readable.
        """
        with usable(self.path):
            if not self.exists():
                raise ConfigError(f"no run to resume in {self.path}: it has no config.json")
        with reading(self._config) as values:
            return TrainConfig.from_dict(values["config"])

    def history(self) -> list[dict[str, Any]]:
        """The records of all finished epochs, from the metrics; empty before the first.

        Raises:
            DataError: the metrics are damaged.
        """
        return read_records(self.metrics)

    def finished(self, config: TrainConfig) -> list[dict[str, Any]] | None:
        """The records of the run of ``config`` here; ``None`` if epochs of it are left to train.

        They are the checkpoint's, and the other files are made to agree with it. The metrics are
        enough where a finished run's checkpoint was removed.

        Raises:
            ConfigError, DataError: as :meth:`open`.
        """
        if not self.exists():
            return None
        self._check(config, resume=True)
        with contextlib.suppress(DataError):
            if not self.last.exists() and len(history := self.history()) == config.epochs:
                return history
        state = self.open(config, resume=True)
        try:
            if state is None or state["epoch"] < config.epochs:
                return None
            self.begin(config, state)
            return state["history"]
        finally:
            self.release()

    def _check(self, config: TrainConfig, *, resume: bool) -> None:
        if not resume:
            if self.exists():
                raise ConfigError(
                    f"{self.path} already holds a run: continue it with --resume, or choose "
                    "another --out"
                )
            if not is_free(self.path):
                raise ConfigError(f"{self.path} exists and is no run: choose another --out")
            return
        saved, wanted = self.read_config().to_dict(), config.to_dict()
        if found := differences(saved, wanted, ("there", "here"), ignore=_CHANGEABLE):
            raise ConfigError(f"cannot resume {self.path}: {'; '.join(found)}")

    def _read(self, config: TrainConfig) -> dict[str, Any] | None:
        """The state in ``last.pt``; ``None`` if nothing says that there ever was one."""
        checkpoints = (self.last, self.previous, self.best)
        if not any(path.exists() for path in checkpoints) and not _text(self.metrics).strip():
            return None
        try:
            state = read_state(self.last)
        except DataError as error:
            raise DataError(f"{error}; {self._instead()}") from error
        where = (f"in {self._config}", f"in {self.last}")
        saved, wanted = config.to_dict(), state["config"].to_dict()
        if found := differences(saved, wanted, where, ignore=_CHANGEABLE):
            raise ConfigError(
                f"cannot resume {self.path}: {'; '.join(found)}; put config.json back as it was"
            )
        check_length(config, state["config"], state["epoch"], self.path)
        return state

    def _instead(self) -> str:
        """What to do without ``last.pt``."""
        for path in (self.previous, self.best):
            with contextlib.suppress(DataError):
                epoch = read_state(path)["epoch"]
                command = f"cp {shlex.quote(str(path))} {shlex.quote(str(self.last))}"
                return f"{path} is whole, to continue after epoch {epoch}: {command}"
        return "there is no whole previous.pt or best.pt either: choose another --out"

    def _agree(self, state: dict[str, Any] | None) -> None:
        history = state["history"] if state else []
        text = lines(history)
        there = _text(self.metrics)
        if there != text or not self.metrics.exists():
            if not text.startswith(there):  # what a kill between two files does not leave behind
                _warn(f"{self.metrics} did not agree with {self.last}: written anew from it")
            self._write(self.metrics, text)
        if (rows := table(history)) != _text(self._table):
            self._write(self._table, rows)
        if state is None:
            return
        if state["best_epoch"] == len(history):
            if not self.best.exists() or not filecmp.cmp(self.last, self.best, shallow=False):
                link_atomic(self.last, self.best)
            return
        try:
            load_checkpoint(self.best)
        except DataError as error:
            _warn(f"{error}; it held epoch {state['best_epoch']}, the best so far")

    def _write(self, path: Path, text: str) -> None:
        write_atomic(path, lambda file: file.write(text.encode()))


def is_free(path: Path) -> bool:
    """Whether ``path`` is absent or a folder without visible files."""
    if not path.exists():
        return True
    return path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())


def _text(path: Path) -> str:
    """What ``path`` holds, as far as it is text; nothing if it does not exist."""
    if not path.exists():
        return ""
    if not path.is_file():  # reading a pipe would wait forever
        raise DataError(f"{path} is no file")
    return path.read_text(errors="replace")


def _warn(text: str) -> None:
    warnings.warn(text, RunWarning, stacklevel=4)


def _environment(config: TrainConfig) -> dict[str, Any]:
    device = config.torch_device()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": gpu or f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
    }
