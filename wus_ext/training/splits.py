"""One part (train, validation or test) of a dataset: in memory, or as files read on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .errors import DataError

__all__ = ["FileSplit", "MemorySplit", "Split", "balanced_order"]


class MemorySplit:
    """Images and labels held as tensors on one device.

    Args:
        images: uint8, shape (N, 3, 32, 32).
        labels: int64, shape (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

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
        total = torch.zeros(2, self.images.shape[1], dtype=torch.float64)
        for part in self.images.split(4096):
            part = part.double().div_(255)
            total += torch.stack([part.sum((0, 2, 3)), part.square().sum((0, 2, 3))]).cpu()
        mean, square = total / (self.images.numel() // self.images.shape[1])
        return mean.float(), (square - mean.square()).clamp_min_(0).sqrt().float()


class FileSplit:
    """Images that stay in their files and are decoded by the workers of a ``DataLoader``.

    Args:
        paths: one file per image.
        labels: int64, shape (N,).
        decode: reads one file as a uint8 tensor of shape (3, 32, 32).
        workers: processes that decode; 0 decodes in this process.
    """

    sample = 4096

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        decode: Callable[[Path], Tensor],
        workers: int = 0,
    ) -> None:
        self.paths, self.labels, self.decode, self.workers = paths, labels, decode, workers
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> FileSplit:
        """The images at ``indices``, in that order."""
        paths = [self.paths[i] for i in indices.tolist()]
        return FileSplit(paths, self.labels[indices], self.decode, self.workers)

    def to(self, device: torch.device) -> FileSplit:
        """The same files; their batches arrive on ``device``."""
        other = FileSplit(self.paths, self.labels, self.decode, self.workers)
        other.device = device
        return other

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of up to ``size`` images, visited in ``order``."""
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            _Files(self),
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
        """As :meth:`MemorySplit.statistics`, of up to 4096 images spread evenly over the split."""
        return self.in_memory(max(1, len(self) // self.sample)).statistics()

    def in_memory(self, every: int = 1) -> MemorySplit:
        """Decode every ``every``-th image."""
        images = [self.decode(path) for path in self.paths[::every]]
        return MemorySplit(torch.stack(images), self.labels[::every])


class _Files(Dataset[Any]):
    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            return self.split.decode(self.split.paths[index]), self.split.labels[index]
        except DataError as error:  # raised in a worker, its message would be a traceback
            return error


def _collate(items: Sequence[tuple[Tensor, Tensor] | DataError]) -> Any:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else default_collate(list(items))


Split = MemorySplit | FileSplit


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A shuffled order that takes one image of each class in turn: any prefix is class-balanced.

    Args:
        labels: int64, shape (N,), on the CPU.
        generator: on the CPU.

    >>> order = balanced_order(torch.tensor([0, 0, 0, 1, 1]), torch.Generator().manual_seed(0))
    >>> sorted(torch.tensor([0, 0, 0, 1, 1])[order[:4]].tolist())
    [0, 0, 1, 1]
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - starts[labels[by_class]]
    return by_class[torch.argsort(rank, stable=True)]
