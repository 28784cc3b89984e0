"""Checkpoints that carry a checksum of the whole file, so that no damage goes unnoticed.

A checkpoint is what ``torch.save`` writes, a zip archive, and ``torch.load(weights_only=True)``
reads it. The archive's comment, which ends the file, holds the SHA-256 of all that comes before it.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import DataError, StorageError
from .files import link_atomic, write_atomic

__all__ = ["load_checkpoint", "pack_checkpoint", "write_checkpoint"]

_MARK, _DIGITS = b"wus_ext sha256 ", 2 * hashlib.sha256().digest_size
#: A zip archive ends with the size of its comment, in two bytes, and the comment.
_TAIL = (len(_MARK) + _DIGITS).to_bytes(2, "little") + _MARK
_END = len(_TAIL) + _DIGITS
#: The last record of an archive without a comment.
_EMPTY = 22
_CHUNK = 2**20


def pack_checkpoint(state: dict[str, Any]) -> bytes:
    """The file that holds ``state``, tensors and plain values only, with its checksum."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(-2, os.SEEK_END)
    file.truncate()
    digest = hashlib.sha256(file.getbuffer()).hexdigest().encode()
    file.write(_TAIL + digest)
    return file.getvalue()


def write_checkpoint(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Replace ``path`` by ``content``, once that is on the disk and reads back as it is.

    Args:
        path: the checkpoint.
        content: from :func:`pack_checkpoint`.
        previous: becomes the checkpoint that ``path`` was before, if any.

    Raises:
        StorageError: naming the file that cannot be written; ``path`` is what it was.
    """

    def check(written: Path) -> None:
        if not _holds(written, content):
            raise StorageError(f"cannot write {path}: what was written does not read back the same")
        if previous is not None and path.exists():
            link_atomic(path, previous)

    write_atomic(path, lambda file: file.write(content), check=check)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code that it may contain.

    Every bit of the file is verified. A file that ``torch.save`` itself wrote has no checksum of
    the whole; the archive's own, of the values, are verified then.

    Args:
        path: ``last.pt`` or ``best.pt`` of a run.

    Returns:
        What :meth:`Trainer.state_dict` gave: tensors and plain values.

    Raises:
        DataError: naming the file, when it is missing, no checkpoint or damaged.

    >>> load_checkpoint("nowhere.pt")
    Traceback (most recent call last):
    wus_ext.training.errors.DataError: nowhere.pt is missing
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is {'no file' if path.exists() else 'missing'}")
    try:
        with path.open("rb") as file:
            _verify(path, file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} is not a readable checkpoint: {reason}") from error


def _verify(path: Path, file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END))
    end = file.read()
    if end[: len(_TAIL)] == _TAIL:
        digest = hashlib.sha256()
        file.seek(0)
        for chunk in _chunks(file, size - _END):
            digest.update(chunk)
        whole = digest.hexdigest().encode() == end[len(_TAIL) :]
    elif zipfile.is_zipfile(file):
        # torch.save leaves the comment empty: with anything after the archive, it was one of ours.
        whole = end[-_EMPTY:].startswith(b"PK\5\6") and end.endswith(bytes(2))
        with zipfile.ZipFile(file) as archive:
            whole = whole and archive.testzip() is None
    else:
        raise DataError(f"{path} is not a readable checkpoint: it is no archive, or cut off")
    if not whole:
        raise DataError(f"{path} is damaged: its checksum is wrong")


def _holds(path: Path, content: bytes) -> bool:
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # ask the disk, not the memory that still holds it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = 0
        for chunk in _chunks(file, len(content) + 1):
            if chunk != content[start : start + len(chunk)]:
                return False
            start += len(chunk)
    return start == len(content)


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of ``file``, or as many as there are."""
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        size -= len(chunk)
        yield chunk
