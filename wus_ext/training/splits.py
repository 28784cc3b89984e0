"""One part (train, validation or test) of a dataset: in memory, or as files read on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .errors import DataError
from .images import Shape, decode_image
from .seeding import generator
from .transforms import centre, random_resized_crop

__all__ = ["FileSplit", "MemorySplit", "Split", "balanced_order"]

#: What random numbers are made from: see :func:`~wus_ext.training.seeding.generator`.
Seed = tuple[int, *tuple[int | str, ...]]

_CHUNK = 256


class MemorySplit:
    """Images and labels held as tensors on one device.

    Args:
        images: uint8, shape (N, 3, height, width).
        labels: int64, shape (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Pixels in each direction."""
        return self.images.shape[-1]

    def select(self, indices: Tensor) -> MemorySplit:
        """The images at ``indices``, in that order."""
        return MemorySplit(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> MemorySplit:
        """The same images on ``device``."""
        return MemorySplit(self.images.to(device), self.labels.to(device))

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of up to ``size`` images, visited in ``order``."""
        for indices in order.to(self.labels.device).split(size):
            yield self.images[indices], self.labels[indices]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel, shape (3,), in units of full brightness."""
        return _statistics(self.images.split(_CHUNK))


class FileSplit:
    """Images that stay in their files and are decoded by the workers of a ``DataLoader``.

    Args:
        paths: one file per image.
        labels: int64, shape (N,).
        size: pixels of an image in each direction.
        side: what its shorter side is made before the middle is cut out; default: ``size``.
        workers: processes that decode; 0 decodes in this process.
    """

    #: Images that stand for all in :meth:`statistics`.
    sample = 4096

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        *,
        size: int = 32,
        side: int | None = None,
        workers: int = 0,
    ) -> None:
        self.paths, self.labels = paths, labels
        self.size, self.side, self.workers = size, side or size, workers
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def _with(self, paths: Sequence[Path], labels: Tensor) -> FileSplit:
        return FileSplit(paths, labels, size=self.size, side=self.side, workers=self.workers)

    def select(self, indices: Tensor) -> FileSplit:
        """The images at ``indices``, in that order."""
        return self._with([self.paths[i] for i in indices.tolist()], self.labels[indices])

    def to(self, device: torch.device) -> FileSplit:
        """The same files; their batches arrive on ``device``."""
        other = self._with(self.paths, self.labels)
        other.device = device
        return other

    def batches(
        self, order: Tensor, size: int, *, crops: Seed | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of up to ``size`` images, visited in ``order``.

        Args:
            crops: seed of random crops that are resized; default: the middle of each image.
        """
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            _Files(self, crops),
            batch_sampler=[part.tolist() for part in order.split(size)],
            num_workers=self.workers,
            pin_memory=on_gpu,
            collate_fn=_collate,
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            yield (
                images.to(self.device, non_blocking=on_gpu),
                labels.to(self.device, non_blocking=on_gpu),
            )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """As :meth:`MemorySplit.statistics`, of about 4096 images spread evenly over the split."""
        order = torch.arange(0, len(self), max(1, len(self) // self.sample))
        return _statistics(images for images, _ in self.batches(order, _CHUNK))

    def in_memory(self) -> MemorySplit:
        """Decode every image."""
        batches = list(self.batches(torch.arange(len(self)), _CHUNK))
        return MemorySplit(torch.cat([images for images, _ in batches]), self.labels)


class _Files(Dataset[Any]):
    def __init__(self, split: FileSplit, crops: Seed | None) -> None:
        self.split, self.crops = split, crops

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | DataError:
        split = self.split
        try:
            return decode_image(split.paths[index], self._shape(index)), split.labels[index]
        except DataError as error:  # raised in a worker, its message would be a traceback
            return error

    def _shape(self, index: int) -> Shape:
        split = self.split
        if self.crops is None:
            return partial(centre, size=split.size, side=split.side)
        # Each image has random numbers of its own: workers and processes change nothing.
        return partial(
            random_resized_crop, size=split.size, generator=generator("cpu", *self.crops, index)
        )


def _collate(items: Sequence[tuple[Tensor, Tensor] | DataError]) -> Any:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else default_collate(list(items))


def _statistics(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    total, pixels = torch.zeros(2, 3, dtype=torch.float64), 0
    for part in parts:
        pixels += part.numel() // part.shape[1]
        part = part.double().div_(255)
        total += torch.stack([part.sum((0, 2, 3)), part.square().sum((0, 2, 3))]).cpu()
    mean, square = total / pixels
    return mean.float(), (square - mean.square()).clamp_min_(0).sqrt().float()


Split = MemorySplit | FileSplit


def balanced_order(labels: Tensor, random: torch.Generator) -> Tensor:
    """A shuffled order that takes one image of each class in turn: any prefix is class-balanced.

    Args:
        labels: int64, shape (N,), on the CPU.
        random: on the CPU.

    >>> order = balanced_order(torch.tensor([0, 0, 0, 1, 1]), torch.Generator().manual_seed(0))
    >>> sorted(torch.tensor([0, 0, 0, 1, 1])[order[:4]].tolist())
    [0, 0, 1, 1]
    """
    shuffled = torch.randperm(len(labels), generator=random)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - starts[labels[by_class]]
    return by_class[torch.argsort(rank, stable=True)]
