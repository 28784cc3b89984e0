"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import DataError

__all__ = ["link_atomic", "load_checkpoint", "save_checkpoint", "write_atomic"]


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``write`` puts into the binary file it is given.

    The new content is on the disk before it takes the old one's place.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def link_atomic(source: Path, path: Path) -> None:
    """Replace ``path`` by a second name of ``source``, or a copy where links are not possible.

    A later :func:`write_atomic` to ``source`` leaves ``path`` as it is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``, tensors and plain values only, atomically."""
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code that it may contain.

    Raises:
        DataError: naming the file, when it is no checkpoint or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise DataError(f"{path} is not a readable checkpoint: {error}") from error


def _sync_folder(folder: Path) -> None:
    # Not every file system lets a folder be synced; the rename itself is atomic all the same.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
