"""Any tree of images: ``train/<class>/*`` and ``test/<class>/*``."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import DataError, RunWarning
from .images import decode_image
from .splits import FileSplit

__all__ = ["scan_folder"]

_SHOWN = 5


def scan_folder(root: Path, *, workers: int = 0) -> tuple[FileSplit, FileSplit, list[str]]:
    """List the images under ``root`` without reading them.

    Args:
        root: holds ``train`` and ``test``, each with one folder per class. Hidden files and
            folders are ignored; every other file, or link to one, in the folder of a class counts
            as an image. A warning counts and names whatever else there is, and images that are
            not in the folder of a class itself: they are left out.
        workers: processes that decode images when the set does not fit into memory.

    Raises:
        DataError: a part or a class is missing or empty, or train and test name other classes.
        OSError: a folder is not readable.
    """
    if not root.is_dir():
        raise DataError(f"no such folder: {root}")
    classes = _classes(root / "train")
    found = _classes(root / "test")
    if found != classes:
        odd = sorted(set(classes) ^ set(found))
        raise DataError(
            f"{root}: train and test must have the same classes, but {', '.join(odd[:_SHOWN])} "
            f"{'is' if len(odd) == 1 else 'are'} in only one of them"
        )
    if len(classes) < 2:
        raise DataError(f"{root}: found only the class {classes[0]}, at least 2 are needed")
    return (
        _split(root / "train", classes, workers),
        _split(root / "test", classes, workers),
        classes,
    )


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _classes(part: Path) -> list[str]:
    if not part.is_dir():
        raise DataError(f"{part.parent} has no {part.name} folder: expected {part}/<class>/<image>")
    classes = [entry.name for entry in _entries(part) if entry.is_dir()]
    if not classes:
        raise DataError(f"{part} has no class folders: expected {part}/<class>/<image>")
    return classes


def _split(part: Path, classes: list[str], workers: int) -> FileSplit:
    paths: list[Path] = []
    labels: list[int] = []
    odd = [entry for entry in _entries(part) if not entry.is_dir()]
    for label, name in enumerate(classes):
        entries = _entries(part / name)
        files = [entry for entry in entries if entry.is_file()]
        left_out = [entry for entry in entries if not entry.is_file()]
        if not files:
            instead = f", only {_named(left_out, part)}" if left_out else ""
            raise DataError(f"the class folder {part / name} has no images{instead}")
        paths += files
        odd += left_out
        labels += [label] * len(files)
    if odd:
        are = "entry is" if len(odd) == 1 else "entries are"
        warnings.warn(
            f"{len(odd)} {are} no <class>/<image> in {part}, and left out: {_named(odd, part)}",
            RunWarning,
            stacklevel=2,
        )
    return FileSplit(paths, torch.tensor(labels), decode_image, workers)


def _named(entries: Sequence[Path], part: Path) -> str:
    named = [f"{entry.relative_to(part)} ({_kind(entry)})" for entry in entries[:_SHOWN]]
    more = len(entries) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _kind(entry: Path) -> str:
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "a link to nothing"
    if stat.S_ISDIR(mode):
        files = sum(path.is_file() for path in entry.rglob("*"))
        return f"a folder with {files} file{'s' * (files != 1)}"
    kinds = {stat.S_IFREG: "a file", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
