"""CIFAR-10 and CIFAR-100 in their original pickled form, file by file as they were published."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .archive import download as fetch
from .archive import extract, md5
from .errors import DataError
from .splits import MemorySplit

__all__ = ["load_cifar"]


@dataclass(frozen=True)
class _Layout:
    """Where everything is; ``checksums`` are MD5, of the archive and its files."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: str
    names: str
    classes: int
    checksums: dict[str, str]


_URL = "https://www.cs.toronto.edu/~kriz/"
_LAYOUTS = {
    "cifar10": _Layout(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        labels="labels",
        meta="batches.meta",
        names="label_names",
        classes=10,
        checksums={
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": _Layout(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test=("test",),
        labels="fine_labels",
        meta="meta",
        names="fine_label_names",
        classes=100,
        checksums={
            "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}


def load_cifar(
    name: str, root: Path, *, download: bool = True
) -> tuple[MemorySplit, MemorySplit, list[str]]:
    """The train split, the test split and the class names of CIFAR-10 or CIFAR-100.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: the folder that holds (or will hold) torchvision's ``cifar-10-batches-py`` or
            ``cifar-100-python``, or that folder itself. The archive in it is enough, too.
        download: fetch the archive into ``root`` when neither is there.

    Raises:
        DataError: the files are absent and cannot be fetched, or are not the published ones: each
            has a known checksum.
        MissingExtra: a download is needed and torchvision is not installed.
    """
    layout = _LAYOUTS[name]
    folder = root if root.name == layout.folder else root / layout.folder
    if not folder.is_dir():
        _provide(name, layout, folder, download)
    classes = _class_names(folder / layout.meta, layout)
    train, test = (_split(folder, files, layout) for files in (layout.train, layout.test))
    _check_files(folder, layout)
    return train, test, classes


def _alternatives(layout: _Layout) -> str:
    return (
        f"point --data-dir to a folder that holds {layout.folder}, use --dataset folder with a "
        "train/<class>/*, test/<class>/* tree, or --dataset digits, which needs no network"
    )


def _provide(name: str, layout: _Layout, folder: Path, download: bool) -> None:
    archive = folder.parent / layout.archive
    checksum = layout.checksums[archive.name]
    wrong = ""
    if archive.is_file():
        if md5(archive) == checksum:
            extract(archive, folder, _files(layout))
            return
        wrong = f"{archive} is damaged or cut off, its checksum is wrong; "
    if not download:
        raise DataError(f"{wrong}no copy of {name} in {folder.parent}: {_alternatives(layout)}")
    try:
        fetch(name, _URL + archive.name, archive, checksum)
    except DataError as error:
        raise DataError(f"{wrong}{error}: {_alternatives(layout)}") from error
    extract(archive, folder, _files(layout))


def _files(layout: _Layout) -> tuple[str, ...]:
    return (layout.meta, *layout.train, *layout.test)


def _class_names(path: Path, layout: _Layout) -> list[str]:
    names = _read(path).get(layout.names)
    if (
        not isinstance(names, list)
        or len(names) != layout.classes
        or not all(isinstance(name, str) for name in names)
    ):
        wanted = f"{layout.classes} {layout.names}"
        raise DataError(f"{path} does not have {wanted}: delete {path.parent} and try again")
    return names


def _split(folder: Path, files: tuple[str, ...], layout: _Layout) -> MemorySplit:
    images, targets = [], []
    for file in files:
        batch = _read(folder / file)
        try:
            images.append(_pixels(batch.get("data")))
            targets.append(_targets(batch.get(layout.labels), len(images[-1]), layout.classes))
        except ValueError as error:
            raise DataError(
                f"{folder / file} is not a CIFAR batch, {error}: delete {folder} and try again"
            ) from error
    return MemorySplit(torch.cat(images), torch.cat(targets))


def _pixels(data: Any) -> Tensor:
    try:
        pixels = torch.from_numpy(data)
    except (TypeError, ValueError):
        pixels = torch.empty(0)
    if pixels.dtype != torch.uint8 or pixels.dim() != 2 or pixels.shape[1] != 3 * 32 * 32:
        raise ValueError("data must be an array of uint8, 3072 an image")
    return pixels.reshape(-1, 3, 32, 32)


def _targets(labels: Any, count: int, classes: int) -> Tensor:
    values = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(values, list) or len(values) != count or count == 0:
        raise ValueError("it must have as many labels as images, and some")
    for value in values:
        if type(value) is not int or not 0 <= value < classes:
            raise ValueError(f"labels must be integers from 0 to {classes - 1}, got {value!r:.40}")
    return torch.tensor(values)


def _check_files(folder: Path, layout: _Layout) -> None:
    wrong = [name for name in _files(layout) if md5(folder / name) != layout.checksums[name]]
    if wrong:
        raise DataError(
            f"not as published, by the checksum, in {folder}: {', '.join(wrong)}; delete it "
            "and try again, or use --dataset folder for images of your own"
        )


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
    if not path.is_file():
        raise DataError(f"{path} is missing: delete {path.parent} and try again")
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is damaged ({error}): delete its folder and try again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a CIFAR dictionary")
    return content
