"""A folder that one run at a time writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, RunWarning, StorageError, usable

__all__ = ["FolderLock"]


class FolderLock:
    """The right to write to a folder, which no two processes have at the same time.

    It is an advisory lock (flock) of the file ``.lock`` in the folder. The system drops it when the
    process ends, killed or not, so that none is ever left behind. Within one process a later lock
    of the same folder takes it over from an earlier one, as when a cell of a notebook runs again.

    Args:
        path: the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent, FolderLock(Path(parent, "run")) as lock:
    ...     sorted(path.name for path in lock.path.iterdir())
    ['.lock']
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: _Held | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Make the folder, if there is none, and lock it; nothing if it is locked already.

        Raises:
            ConfigError: another process holds it, or it cannot be written to.
        """
        if self._held is not None:
            return
        key = os.path.realpath(self.path)
        with _mutex:
            held = _all_held.get(key)
            if held is None:
                held = _all_held[key] = self._lock(key)
            with held.mutex:  # not while the one before is writing
                held.owner = weakref.ref(self)
        self._held = held

    def _lock(self, key: str) -> _Held:
        try:
            with usable(self.path, "write to"):
                missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
                self.path.mkdir(parents=True, exist_ok=True)
                self._made = missing
                return _Held(key)
        except ConfigError:
            self._remove_empty()
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder, unless it is, and keep others of this process from taking it over.

        Raises:
            ConfigError: as :meth:`acquire`.
            StorageError: a later lock of this process has taken it over.
        """
        self.acquire()
        held = self._held
        assert held is not None
        with held.mutex:
            if held.owner() is not self:
                raise StorageError(f"{self.path} belongs to a later run of this process by now")
            yield

    def release(self) -> None:
        """Give the folder back; removes it if it was made here and is still empty."""
        held, self._held = self._held, None
        if held is None or held.owner() is not self:
            return
        with _mutex:
            held.close()
            _all_held.pop(held.folder, None)
        self._remove_empty()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()
        self._made = []

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class _Held:
    """The locked file; it is unlocked when nobody refers to it any more."""

    def __init__(self, folder: str) -> None:
        self.folder, path = folder, Path(folder, ".lock")
        self.mutex = threading.RLock()
        self.owner: weakref.ref[Any] = weakref.ref(self)
        self.descriptor = _lock(path)
        self.close = weakref.finalize(self, _unlock, self.descriptor, path, os.getpid())


_all_held: weakref.WeakValueDictionary[str, _Held] = weakref.WeakValueDictionary()
_mutex = threading.Lock()


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"{path.parent} is in use by another run ({holder or 'which just began'}): wait "
                "for its end, or choose another --out"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): let no other run write to it",
                RunWarning,
                stacklevel=2,
            )
            return descriptor
        if _is(descriptor, path):
            break
        os.close(descriptor)  # its holder removed it in between
    with contextlib.suppress(OSError):  # for the other's message only
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _unlock(descriptor: int, path: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child has closed its copy
        with contextlib.suppress(OSError):
            if _is(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    """A worker that outlives a killed run must not keep its lock."""
    for held in list(_all_held.values()):
        os.close(held.descriptor)
    _all_held.clear()


os.register_at_fork(after_in_child=_close_in_child)
