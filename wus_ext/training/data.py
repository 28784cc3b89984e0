"""A dataset ready for training: its parts, its classes and how its images are prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..distributed import processes
from .augment import Normalize, crop_and_flip
from .cifar import load_cifar
from .config import TrainConfig
from .digits import load_digits
from .errors import DataError
from .folder import scan_folder, scan_part
from .networks import pretrained_statistics
from .seeding import generator
from .splits import FileSplit, Split, balanced_order
from .transforms import shorter_side

__all__ = ["Data", "load_data", "load_part"]

#: Mean and deviation of a channel, by the name of the setting.
_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass
class Data:
    """The parts of a dataset on the training device.

    Args:
        train, validation, test: the images; ``validation`` may be ``None``.
        classes: names of the classes, by label.
        normalize: what a network gets instead of bytes.
        flip: whether a mirrored image still shows its class.
        augment: of training images: ``crop`` (shifted by up to an eighth of their size),
            ``resized`` (random parts of the files' images, resized), or ``none``.
        size: what images are enlarged or reduced to at last, in pixels; ``None``: as they are.
        about: what was done with them, in a line.
    """

    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    normalize: Normalize
    flip: bool = True
    augment: str = "crop"
    size: int | None = None
    about: str = ""

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
        if self.augment == "resized" and isinstance(self.train, FileSplit):
            batches = self.train.batches(order, size, crops=(seed, "crop", epoch))
        else:
            batches = self.train.batches(order, size)
        for images, labels in batches:
            images = crop_and_flip(
                images, random, padding=self._shift, flip=self.flip, first=first, of=together
            )
            yield self._prepared(images), labels

    def evaluation_batches(self, split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of ``split``, normalised, in their order; of several processes each gets
        its part."""
        part = torch.arange(len(split)).tensor_split(processes.count())[processes.rank()]
        for images, labels in split.batches(part, size):
            yield self._prepared(images), labels

    def sample(self) -> Tensor:
        """The first images for test, two if there are so many, as evaluation has them."""
        count = min(2, len(self.test))
        images, _ = next(self.test.batches(torch.arange(count), count))
        return self._prepared(images)

    def steps(self, size: int) -> int:
        """Batches that :meth:`training_batches` yields."""
        return len(self.train) // self._sizes(size)[1]

    @property
    def _shift(self) -> int:
        return self.train.size // 8 if self.augment == "crop" else 0

    def _prepared(self, images: Tensor) -> Tensor:
        images = self.normalize(images)
        if self.size in (None, images.shape[-1]):
            return images
        smaller = self.size < images.shape[-1]
        return interpolate(images, (self.size,) * 2, mode="bilinear", antialias=smaller)

    def _sizes(self, size: int) -> tuple[int, int]:
        """Images of a step in one process, and in all together."""
        count = processes.count()
        if len(self.train) < count:
            raise DataError(f"{len(self.train)} training images are too few for {count} processes")
        size = min(size, len(self.train) // count)
        return size, size * count


def load_data(config: TrainConfig) -> Data:
    """Load the dataset of ``config`` onto its device.

    Args:
        config: the settings; those of training itself are not looked at.

    Returns:
        Its parts, in memory or as files that are read on the way.

    Raises:
        ConfigError: it is to be normalised as for pretrained weights that do not exist.
        DataError: it is missing, incomplete or unreadable, or a limit is below the class count.
        MissingExtra: it needs a package that is not installed.
    """
    train, test, classes = _sources(config)
    train = _limited(train, config.limit_train, "limit_train", len(classes))
    test = _limited(test, config.limit_test, "limit_test", len(classes))
    validation = None
    if config.validation:
        train, validation = _hold_out(train, config.validation)
    parts = {"train": train, "test": test}
    if validation is not None:
        parts["validation"] = validation
    parts = _held(parts, config)
    data = Data(
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts["test"],
        classes=classes,
        normalize=Normalize(*_statistics(config, parts["train"])).to(config.torch_device()),
        flip=config.flip and config.dataset != "digits",
        augment=config.augmentation(),
        size=config.pixels(),
    )
    data.about = _about(config, data)
    return data


def load_part(
    config: TrainConfig,
    part: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Data:
    """One part of the dataset of ``config``, for evaluation: its ``test``, as of :func:`load_data`.

    Args:
        config: the settings.
        part: ``train``, ``validation`` or ``test``. Of a folder the others need not be there.
        classes: names of the classes that a network knows, by label.
        mean, std: what its images were normalised with.

    Raises:
        DataError, MissingExtra: as :func:`load_data`; or the classes are others.
    """
    folder = "test" if part == "test" else "train"
    limit = f"limit_{folder}"
    split: Split
    if config.dataset == "folder":
        with _readable(config):
            split = scan_part(config.data_path(), folder, classes, **file_options(config))
    else:
        train, test, found = _sources(config)
        if list(classes) != found:
            raise DataError(
                f"{config.dataset} has {len(found)} classes ({', '.join(found[:3])}, ...), the "
                f"network knows {len(classes)} others ({', '.join(classes[:3])}, ...)"
            )
        split = test if folder == "test" else train
    split = _limited(split, getattr(config, limit), limit, len(classes))
    if config.validation and folder == "train":
        split = _hold_out(split, config.validation)[part == "validation"]
    device = config.torch_device()
    data = Data(
        train=split,
        validation=None,
        test=split.to(device),
        classes=list(classes),
        normalize=Normalize(torch.tensor(mean), torch.tensor(std)).to(device),
        size=config.pixels(),
    )
    data.about = f"{len(split)} images of {config.dataset}, {part}"
    return data


@contextmanager
def _readable(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, reason = error.filename or config.data_path(), error.strerror or error
        raise DataError(f"cannot read {where}: {reason}") from error


def _sources(config: TrainConfig) -> tuple[Split, Split, list[str]]:
    with _readable(config):
        if config.dataset == "digits":
            return load_digits()
        if config.dataset == "folder":
            return scan_folder(config.data_path(), **file_options(config))
        return load_cifar(config.dataset, config.data_path(), download=config.download)


def file_options(config: TrainConfig) -> dict[str, int]:
    """The settings of a :class:`FileSplit`."""
    size = config.pixels()
    side = shorter_side(size) if config.augmentation() == "resized" else size
    return {"size": size, "side": side, "workers": config.workers}


def _held(parts: dict[str, Split], config: TrainConfig) -> dict[str, Split]:
    """The parts on their device: those that are always read alike in memory, if they fit."""
    random = ("train",) if config.augmentation() == "resized" else ()
    held = {name: part for name, part in parts.items() if name not in random}
    if sum(3 * part.size**2 * len(part) for part in held.values()) <= config.memory_budget * 2**30:
        for name, part in held.items():
            parts[name] = part.in_memory() if isinstance(part, FileSplit) else part
    device = config.torch_device()
    return {name: part.to(device) for name, part in parts.items()}


def _statistics(config: TrainConfig, train: Split) -> tuple[Tensor, Tensor]:
    name = config.normalisation()
    if name == "pretrained":
        return pretrained_statistics(config.model)
    if name == "dataset":
        return train.statistics()
    mean, std = _STATISTICS[name]
    return torch.tensor(mean), torch.tensor(std)


def _about(config: TrainConfig, data: Data) -> str:
    counts = [f"{len(data.train)} for training", f"{len(data.test)} for test"]
    if data.validation is not None:
        counts.insert(1, f"{len(data.validation)} for validation")
    size, own = config.pixels(), data.train.size
    shape = f"{size}x{size}"
    if config.dataset == "folder":
        side = file_options(config)["side"]
        shape += f" from the middle of each, whose shorter side is made {side}"
    elif size != own:
        shape += f", resized from {own}x{own}"
    changes = {
        "crop": [f"shifted by up to {data._shift} pixels"],
        "resized": ["random parts, resized"],
        "none": [],
    }[data.augment] + ["mirrored"] * data.flip
    return (
        f"images: {config.dataset}, {', '.join(counts)}, {len(data.classes)} classes; {shape}; "
        f"training images {' and '.join(changes) or 'as they are'}; "
        f"normalised with {config.normalisation()} mean and deviation"
    )


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
