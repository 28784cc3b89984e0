"""A dataset's archive: downloaded, verified, and only the files that it ought to hold taken out."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from .errors import DataError, require

__all__ = ["download", "extract", "md5"]


def md5(path: Path) -> str:
    """The MD5 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(name: str, url: str, path: Path, checksum: str) -> None:
    """Fetch ``url`` with torchvision; ``path`` is replaced once the whole is there.

    Args:
        name: what errors call it.
        checksum: its MD5, in hexadecimal.

    Raises:
        DataError: it cannot be fetched or stored, or has another checksum.
        MissingExtra: torchvision is not installed.
    """
    utils = require("torchvision.datasets.utils", f"downloading {name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                utils.download_url(url, folder, path.name, checksum)
            os.replace(Path(folder, path.name), path)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot download {name} ({str(error) or type(error).__name__})") from error


def extract(archive: Path, folder: Path, names: Collection[str]) -> None:
    """Take the files ``names`` out of a tar archive, whose only folder is ``folder``'s name.

    ``folder`` appears when all of them are there. Nothing is written elsewhere, and no links.

    Raises:
        DataError: the archive is damaged, lacks a file, or holds what does not belong there: a
            link, a device, or a path that leads out of the folder.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".extract-", dir=folder.parent) as temporary:
            target = Path(temporary, folder.name)
            target.mkdir()
            _extract(archive, target, names)
            try:
                os.rename(target, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{archive} is damaged or cut off ({error}): delete it") from error
    except OSError as error:
        raise DataError(f"cannot extract {archive}: {error.strerror or error}") from error


def _extract(archive: Path, target: Path, names: Collection[str]) -> None:
    missing = set(names)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            inside = path.parts[:1] == (target.name,) and ".." not in path.parts
            if not inside or not (member.isreg() or member.isdir()):
                raise DataError(
                    f"{archive} is not what it should be and was not extracted: it holds "
                    f"{member.name!r}, {_kind(member)}"
                )
            if member.isreg() and path.parts[1:] == (path.name,) and path.name in names:
                source = tar.extractfile(member)
                assert source is not None  # of a regular file
                with source, (target / path.name).open("wb") as file:
                    shutil.copyfileobj(source, file)
                missing.discard(path.name)
    if missing:
        raise DataError(
            f"{archive} is not what it should be: it lacks {', '.join(sorted(missing))}"
        )


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    return "outside of its folder" if member.isreg() or member.isdir() else "which is no file"
