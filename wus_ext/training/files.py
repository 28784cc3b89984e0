"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import StorageError

__all__ = ["link_atomic", "remove_temporary", "write_atomic"]


def write_atomic(
    path: Path,
    write: Callable[[BinaryIO], object],
    *,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Replace ``path`` by what ``write`` puts into the binary file it is given.

    The new content is on the disk before it takes the old one's place.

    Args:
        path: the file to replace; its folder exists.
        write: writes the new content.
        check: called with the new file before that takes the place; raises to keep the old one.

    Raises:
        StorageError: naming ``path``, when it cannot be written. The old file is still there.
    """
    with _replacing(path) as temporary:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(temporary)


def link_atomic(source: Path, path: Path) -> None:
    """Replace ``path`` by a second name of ``source``, or a copy where links are not possible.

    A later :func:`write_atomic` to ``source`` leaves ``path`` as it is.

    Raises:
        StorageError: naming ``path``, when it cannot be written. The old file is still there.
    """
    with _replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def remove_temporary(path: Path) -> None:
    """Remove what a process that was killed while it wrote ``path`` left behind."""
    _temporary(path).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Not every file system lets a folder be synced; the rename itself is atomic all the same.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
