"""A dataset ready for training: its parts, its classes and how its images are prepared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import processes
from .augment import Normalize, crop_and_flip
from .cifar import load_cifar
from .config import TrainConfig
from .digits import load_digits
from .errors import DataError
from .folder import scan_folder
from .seeding import generator
from .splits import FileSplit, Split, balanced_order

__all__ = ["Data", "load_data"]

_BYTES_PER_IMAGE = 3 * 32 * 32


@dataclass
class Data:
    """The parts of a dataset on the training device.

    Args:
        train, validation, test: the images; ``validation`` may be ``None``.
        classes: names of the classes, by label.
        normalize: with the statistics of ``train``.
        flip: whether a mirrored image still shows its class.
    """

    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    normalize: Normalize
    flip: bool = True

    def training_batches(
        self, size: int, seed: int, epoch: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of augmented, normalised batches; equal arguments give equal batches.

        Every batch is full: up to ``size - 1`` images, others in each epoch, are left out. A set
        smaller than ``size`` gives one batch. Of several processes each gets its part of batches
        that are together ``size`` times their number, as one process would get them.
        """
        # The order comes from the CPU's generator, so it is the same on every device.
        order = torch.randperm(len(self.train), generator=generator("cpu", seed, "order", epoch))
        size, together = self._sizes(size)
        first = processes.rank() * size
        order = order[: len(order) // together * together].view(-1, together)
        order = order[:, first : first + size].flatten()
        random = generator(device, seed, "augment", epoch)
        for images, labels in self.train.batches(order, size):
            images = crop_and_flip(images, random, flip=self.flip, first=first, of=together)
            yield self.normalize(images), labels

    def evaluation_batches(self, split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of ``split``, normalised, in their order; of several processes each gets
        its part."""
        part = torch.arange(len(split)).tensor_split(processes.count())[processes.rank()]
        for images, labels in split.batches(part, size):
            yield self.normalize(images), labels

    def steps(self, size: int) -> int:
        """Batches that :meth:`training_batches` yields."""
        return len(self.train) // self._sizes(size)[1]

    def _sizes(self, size: int) -> tuple[int, int]:
        """Images of a step in one process, and in all together."""
        count = processes.count()
        if len(self.train) < count:
            raise DataError(f"{len(self.train)} training images are too few for {count} processes")
        size = min(size, len(self.train) // count)
        return size, size * count


def load_data(config: TrainConfig) -> Data:
    """Load the dataset of ``config`` onto its device.

    Raises:
        DataError: it is missing, incomplete or unreadable, or a limit is below the class count.
        MissingExtra: it needs a package that is not installed.
    """
    train, test, classes = _sources(config)
    train = _limited(train, config.limit_train, "limit_train", len(classes))
    test = _limited(test, config.limit_test, "limit_test", len(classes))
    validation = None
    if config.validation:
        train, validation = _hold_out(train, config.validation)
    device = config.torch_device()
    parts = [part for part in (train, validation, test) if part is not None]
    size = sum(map(len, parts)) * _BYTES_PER_IMAGE
    if size <= config.memory_budget * 2**30:
        parts = [part.in_memory() if isinstance(part, FileSplit) else part for part in parts]
    parts = [part.to(device) for part in parts]
    return Data(
        train=parts[0],
        validation=parts[1] if validation is not None else None,
        test=parts[-1],
        classes=classes,
        normalize=Normalize(*parts[0].statistics()).to(device),
        flip=config.dataset != "digits",
    )


def _sources(config: TrainConfig) -> tuple[Split, Split, list[str]]:
    try:
        if config.dataset == "digits":
            return load_digits()
        if config.dataset == "folder":
            return scan_folder(config.data_path(), workers=config.workers)
        return load_cifar(config.dataset, config.data_path(), download=config.download)
    except OSError as error:
        where, reason = error.filename or config.data_path(), error.strerror or error
        raise DataError(f"cannot read {where}: {reason}") from error


def _limited(split: Split, limit: int | None, name: str, classes: int) -> Split:
    if limit is None:
        return split
    if limit < classes:
        raise DataError(f"{name} must be at least the number of classes, {classes}, got {limit}")
    return split.select(balanced_order(split.labels, generator("cpu", 0, name))[:limit])


def _hold_out(train: Split, fraction: float) -> tuple[Split, Split]:
    order = torch.randperm(len(train), generator=generator("cpu", 0, "validation"))
    labels = train.labels[order]
    held = torch.zeros(len(order), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise DataError(
                f"validation={fraction} leaves no training image of class {int(label)}, "
                f"which has {len(members)}"
            )
        held[members[:count]] = True
    return train.select(order[~held]), train.select(order[held])
