"""CIFAR-10 and CIFAR-100 in their original pickled form; torchvision fetches and checks them."""

from __future__ import annotations

import contextlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import DataError, require
from .splits import MemorySplit

__all__ = ["load_cifar"]


@dataclass(frozen=True)
class _Layout:
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: str
    names: str
    torchvision: str


_LAYOUTS = {
    "cifar10": _Layout(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        labels="labels",
        meta="batches.meta",
        names="label_names",
        torchvision="CIFAR10",
    ),
    "cifar100": _Layout(
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        labels="fine_labels",
        meta="meta",
        names="fine_label_names",
        torchvision="CIFAR100",
    ),
}


def load_cifar(
    name: str, root: Path, *, download: bool = True
) -> tuple[MemorySplit, MemorySplit, list[str]]:
    """The train split, the test split and the class names of CIFAR-10 or CIFAR-100.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: the folder that holds (or will hold) torchvision's ``cifar-10-batches-py`` or
            ``cifar-100-python``, or that folder itself.
        download: fetch the archive into ``root`` when it is not there; its checksum is verified.

    Raises:
        DataError: the files are absent and cannot be fetched, or are damaged.
        MissingExtra: a download is needed and torchvision is not installed.
    """
    layout = _LAYOUTS[name]
    folder = root if root.name == layout.folder else root / layout.folder
    if not folder.is_dir():
        if not download:
            raise DataError(f"no copy of {name} in {root}: {_alternatives(layout)}")
        _download(name, layout, folder.parent)
    classes = _read(folder / layout.meta)[layout.names]
    train, test = (
        _split(folder, files, layout.labels, len(classes)) for files in (layout.train, layout.test)
    )
    return train, test, list(classes)


def _alternatives(layout: _Layout) -> str:
    return (
        f"point --data-dir to a folder that holds {layout.folder}, use --dataset folder with a "
        "train/<class>/*, test/<class>/* tree, or --dataset digits, which needs no network"
    )


def _download(name: str, layout: _Layout, root: Path) -> None:
    datasets = require("torchvision.datasets", f"downloading {name}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(datasets, layout.torchvision)(str(root), download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot download {name} ({reason}): {_alternatives(layout)}") from error


def _split(folder: Path, files: tuple[str, ...], labels: str, classes: int) -> MemorySplit:
    parts = []
    for file in files:
        batch = _read(folder / file)
        try:
            pixels = torch.from_numpy(batch["data"])
            target = torch.tensor(batch[labels], dtype=torch.int64)
            good = (
                pixels.dtype == torch.uint8
                and pixels.shape == (len(target), 3 * 32 * 32)
                and len(target) > 0
                and 0 <= int(target.min()) <= int(target.max()) < classes
            )
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise DataError(f"{folder / file} is not a CIFAR batch: delete {folder} and try again")
        parts.append((pixels.view(-1, 3, 32, 32), target))
    images, targets = zip(*parts, strict=True)
    return MemorySplit(torch.cat(images), torch.cat(targets))


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain values only: a dataset has no business running code."""

    allowed = frozenset({"_reconstruct", "ndarray", "dtype", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.allowed:
            # NumPy 2 renamed the private package that these pickles refer to.
            with contextlib.suppress(ImportError):
                return super().find_class(module.replace("numpy.core", "numpy._core"), name)
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: delete {path.parent} and try again") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is damaged ({error}): delete its folder and try again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a CIFAR dictionary")
    return content
