"""The folder of a run: config.json, metrics.jsonl, last.pt and best.pt."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .checkpoint import link_atomic, load_checkpoint, save_checkpoint, write_atomic
from .config import RELOCATABLE, TrainConfig
from .errors import ConfigError, DataError

__all__ = ["RunFolder", "is_free"]


class RunFolder:
    """One training run on disk.

    ``config.json``
        the settings and the software they ran with.
    ``metrics.jsonl``
        one JSON object per finished epoch.
    ``last.pt``, ``best.pt``
        state after the last and after the best epoch; ``torch.load(weights_only=True)`` reads it.

    Args:
        path: the folder; created by :meth:`create`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"
        self.metrics = self.path / "metrics.jsonl"
        self._config = self.path / "config.json"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self._config.is_file()

    def check(self, config: TrainConfig, *, resume: bool) -> None:
        """Say whether ``config`` may start, or resume, here; changes nothing.

        Raises:
            ConfigError: something is in the way, nothing is there to resume, or the run there has
                other settings.
        """
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
        differences = [
            f"{name} is {saved[name]!r} there, {wanted[name]!r} here"
            for name in saved
            if name not in RELOCATABLE and saved[name] != wanted[name]
        ]
        if differences:
            raise ConfigError(f"cannot resume {self.path}: {'; '.join(differences)}")

    def read_config(self) -> TrainConfig:
        """The settings of the run here.

        Raises:
            ConfigError: there is no run, or its settings are not readable.
        """
        if not self.exists():
            raise ConfigError(f"no run to resume in {self.path}: it has no config.json")
        try:
            return TrainConfig.from_dict(json.loads(self._config.read_text())["config"])
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self._config} is not readable: {error}") from error

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write ``config.json``, unless a run exists here."""
        if self.exists():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"config": config.to_dict(), "environment": _environment(config)}
        text = json.dumps(content, indent=2) + "\n"
        write_atomic(self._config, lambda file: file.write(text.encode()))

    def save(self, state: dict[str, Any], record: dict[str, Any], *, best: bool) -> None:
        """Store the state after an epoch and append its record to the metrics."""
        save_checkpoint(self.last, state)
        if best:
            link_atomic(self.last, self.best)
        with self.metrics.open("a") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def restore(self) -> dict[str, Any] | None:
        """The state after the last finished epoch, if any; the other files then agree with it.

        Raises:
            DataError: the checkpoint is damaged.
        """
        state = load_checkpoint(self.last) if self.last.exists() else None
        history = state["history"] if state else []
        text = "".join(map(_line, history))
        write_atomic(self.metrics, lambda file: file.write(text.encode()))
        if state and state["best_epoch"] == len(history):
            link_atomic(self.last, self.best)
        return state

    def history(self) -> list[dict[str, Any]]:
        """The records of all finished epochs, from the metrics; empty before the first.

        Raises:
            DataError: the metrics are damaged.
        """
        if not self.metrics.exists():
            return []
        try:
            return [json.loads(line) for line in self.metrics.read_text().splitlines()]
        except ValueError as error:
            raise DataError(f"{self.metrics} is damaged: {error}") from error


def is_free(path: Path) -> bool:
    """Whether ``path`` is absent or a folder without visible files."""
    if not path.exists():
        return True
    return path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _environment(config: TrainConfig) -> dict[str, Any]:
    device = config.torch_device()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": gpu or f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
    }
