"""Any tree of images: ``train/<class>/*`` and ``test/<class>/*``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import DataError, require
from .splits import FileSplit

__all__ = ["decode_image", "scan_folder"]

SIZE = 32


def scan_folder(root: Path, *, workers: int = 0) -> tuple[FileSplit, FileSplit, list[str]]:
    """List the images under ``root`` without reading them.

    Args:
        root: holds ``train`` and ``test``, each with one folder per class. Hidden files and
            folders are ignored; every other file counts as an image.
        workers: processes that decode images when the set does not fit into memory.

    Raises:
        DataError: a part or a class is missing or empty, or train and test name other classes.
    """
    if not root.is_dir():
        raise DataError(f"no such folder: {root}")
    classes = _classes(root / "train")
    found = _classes(root / "test")
    if found != classes:
        odd = sorted(set(classes) ^ set(found))
        raise DataError(
            f"{root}: train and test must have the same classes, but {', '.join(odd[:5])} "
            f"{'is' if len(odd) == 1 else 'are'} in only one of them"
        )
    if len(classes) < 2:
        raise DataError(f"{root}: found only the class {classes[0]}, at least 2 are needed")
    return (
        _scan(root / "train", classes, workers),
        _scan(root / "test", classes, workers),
        classes,
    )


def decode_image(path: Path) -> Tensor:
    """Read one image as uint8 of shape (3, 32, 32): RGB, resized when it has another size.

    Raises:
        DataError: naming the file, when it is no readable image.
    """
    image_module = require("PIL.Image", "the folder dataset")
    try:
        with image_module.open(path) as image:
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = image.resize((SIZE, SIZE), image_module.Resampling.BILINEAR)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"cannot read {path} as an image: {error}") from error
    return pixels.view(SIZE, SIZE, 3).permute(2, 0, 1)


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _classes(part: Path) -> list[str]:
    if not part.is_dir():
        raise DataError(f"{part.parent} has no {part.name} folder: expected {part}/<class>/<image>")
    classes = [entry.name for entry in _entries(part) if entry.is_dir()]
    if not classes:
        raise DataError(f"{part} has no class folders: expected {part}/<class>/<image>")
    return classes


def _scan(part: Path, classes: list[str], workers: int) -> FileSplit:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = [entry for entry in _entries(part / name) if entry.is_file()]
        if not files:
            raise DataError(f"the class folder {part / name} has no images")
        paths += files
        labels += [label] * len(files)
    return FileSplit(paths, torch.tensor(labels), decode_image, workers)
