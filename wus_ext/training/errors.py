"""What can go wrong in a training run, and the module to import it from when it does."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

__all__ = [
    "ConfigError",
    "DataError",
    "MissingExtra",
    "RunWarning",
    "StorageError",
    "TrainingError",
    "require",
    "usable",
]


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot be trained with."""


class DataError(ValueError):
    """A dataset that is missing, incomplete or unreadable."""


class TrainingError(RuntimeError):
    """Training went wrong: the loss is no longer a finite number."""


class StorageError(OSError):
    """A file of a run that cannot be written: no space left, no permission."""


class RunWarning(UserWarning):
    """What a user should know about a run, or about its data, while training goes on."""


class MissingExtra(ImportError):
    """An optional dependency that this feature needs is not installed."""


@contextlib.contextmanager
def usable(folder: Path, verb: str = "use") -> Iterator[None]:
    """A folder for results that the system refuses, for any reason, is a ConfigError.

    >>> with usable(Path("out")):
    ...     Path("x" * 300).mkdir()
    Traceback (most recent call last):
    wus_ext.training.errors.ConfigError: cannot use out (File name too long): choose another --out
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot {verb} {folder} ({reason}): choose another --out") from error


def require(module: str, purpose: str, *, extra: str = "train") -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name of the module to import.
        purpose: what it is needed for, as the subject of a sentence ("the digits dataset").
        extra: of this package, that brings it.

    Raises:
        MissingExtra: naming the module, the purpose and the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{purpose} needs {module.partition('.')[0]}: pip install 'wus_ext[{extra}]' ({error})"
        ) from error
