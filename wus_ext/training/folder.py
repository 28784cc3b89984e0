"""Any tree of images: ``train/<class>/*`` and ``test/<class>/*``, or ``val`` instead."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import DataError, RunWarning
from .splits import FileSplit

__all__ = ["scan_folder", "scan_part"]

#: What the part for tests is called; ImageNet's has the second name.
_TESTS = ("test", "val")
_SHOWN = 5


def scan_folder(root: Path, **options: Any) -> tuple[FileSplit, FileSplit, list[str]]:
    """List the images under ``root`` without reading them.

    Args:
        root: holds ``train`` and ``test`` (or ``val``), each with one folder per class. Hidden
            files and folders are ignored; every other file, or link to one, in the folder of a
            class counts as an image. A warning counts and names whatever else there is, and images
            that are not in the folder of a class itself: they are left out.
        **options: as for :class:`FileSplit`: how images are made one size, and by how many workers.

    Raises:
        DataError: a part or a class is missing or empty, or train and test name other classes.
        OSError: a folder is not readable.
    """
    if not root.is_dir():
        raise DataError(f"no such folder: {root}")
    train, test = root / "train", _tests(root)
    classes = _classes(train)
    found = _classes(test)
    if found != classes:
        odd = sorted(set(classes) ^ set(found))
        are = "is" if len(odd) == 1 else "are"
        raise DataError(
            f"{root}: train and {test.name} must have the same classes, but "
            f"{', '.join(odd[:_SHOWN])} {are} in only one of them"
        )
    if len(classes) < 2:
        raise DataError(f"{root}: found only the class {classes[0]}, at least 2 are needed")
    return _split(train, classes, options), _split(test, classes, options), classes


def scan_part(root: Path, name: str, classes: Sequence[str], **options: Any) -> FileSplit:
    """One part of the images under ``root``, of known classes; the other need not be there.

    Args:
        root, options: as for :func:`scan_folder`.
        name: ``train`` or ``test``.
        classes: their names; the part may lack some, and may have no others.

    Raises:
        DataError, OSError: as :func:`scan_folder`.
    """
    part = _tests(root) if name == "test" else root / name
    found = _classes(part)
    if odd := [name for name in found if name not in classes]:
        raise DataError(
            f"{part} has classes that the run did not train: {', '.join(odd[:_SHOWN])}; "
            f"it trained {', '.join(classes[:_SHOWN])}{', ...' if len(classes) > _SHOWN else ''}"
        )
    return _split(part, list(classes), options, missing=set(classes) - set(found))


def _tests(root: Path) -> Path:
    return next((root / name for name in _TESTS if (root / name).is_dir()), root / _TESTS[0])


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _classes(part: Path) -> list[str]:
    if not part.is_dir():
        raise DataError(f"{part.parent} has no {part.name} folder: expected {part}/<class>/<image>")
    classes = [entry.name for entry in _entries(part) if entry.is_dir()]
    if not classes:
        raise DataError(f"{part} has no class folders: expected {part}/<class>/<image>")
    return classes


def _split(
    part: Path, classes: list[str], options: dict[str, Any], missing: Collection[str] = ()
) -> FileSplit:
    paths: list[Path] = []
    labels: list[int] = []
    odd = [entry for entry in _entries(part) if not entry.is_dir()]
    for label, name in enumerate(classes):
        if name in missing:
            continue
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
    return FileSplit(paths, torch.tensor(labels), **options)


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
