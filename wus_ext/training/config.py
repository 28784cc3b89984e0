"""What a training run is: one dataclass, from which the command line is generated as well."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..distributed import processes
from ..engine.options import ALGORITHMS, FULL, NORMS
from ..methods.rules import LR_DROP, Settings
from ..methods.table import METHODS
from . import checks
from .errors import ConfigError
from .networks import MODELS, check_name
from .settings import from_plain, to_plain
from .weights import PRETRAINED

__all__ = ["DATASETS", "TrainConfig"]

DATASETS = ("digits", "cifar10", "cifar100", "folder")
#: The learning rate of each, unless another is given.
OPTIMIZERS = {"sgd": 0.01, "adamw": 0.001}
SCHEDULES = ("constant", "cosine", "step")
AMP = ("off", "bf16", "fp16")
WATCH = ("train", "validation")
MOMENTA = ("keep", "reset")
AUGMENT = ("auto", "crop", "resized", "none")
NORMALIZE = ("auto", "dataset", "imagenet", "half")
#: From this size on images are photographs, of which any part shows the class.
_LARGE = 64

_POLICY = Settings()


def option(default: Any, help: str, **extra: Any) -> Any:
    """A field with the text (and, where the default does not tell it, the type) for ``--help``."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the result of a training run.

    Each field is a flag of ``wus-ext train``. :meth:`validate` checks all of them; building a
    :class:`~wus_ext.training.Trainer` calls it.

    >>> TrainConfig(model="vgg11", dataset="digits", method="wus").validate()
    >>> TrainConfig(epochs=-1).validate()
    Traceback (most recent call last):
    wus_ext.training.errors.ConfigError: epochs must be at least 1, got -1
    """

    model: str = option(
        "vgg11",
        f"network: {', '.join(MODELS)} in their forms for 32x32 images, torchvision:NAME, "
        "timm:NAME, or path/file.py:function, which is called with the number of classes",
        metavar="MODEL",
        check=check_name,
    )
    weights: str | None = option(
        None,
        "weights to start from: a file (.safetensors, .pt), the folder of a run, or pretrained "
        "(those of torchvision: and timm:); a last layer for other classes stays new",
        type=str,
        metavar="FILE",
        unset="none, random ones",
    )
    dataset: str = option(
        "digits",
        "images: digits (bundled with scikit-learn), cifar10 and cifar100 (downloaded), or folder "
        "(your own train/<class>/*, test/<class>/*)",
        choices=DATASETS,
    )
    method: str = option(
        "wus",
        "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()),
        choices=METHODS,
    )

    dropout: float = option(0.5, "of AlexNet's and VGG's linear layers, in [0, 1)")

    epochs: int = option(30, "passes over the training images")
    early_stop: int | None = option(
        None,
        "stop after so many epochs without a better validation accuracy (needs --validation)",
        type=int,
        unset="never",
    )
    batch_size: int = option(
        128, "images per step, of each process; an incomplete last batch is left out"
    )
    optimizer: str = option("sgd", "sgd or adamw", choices=OPTIMIZERS)
    lr: float | None = option(
        None,
        "learning rate before the schedule falls",
        type=float,
        unset=", ".join(f"{rate} with {name}" for name, rate in OPTIMIZERS.items()),
    )
    momentum: float = option(0.9, "momentum of SGD, in [0, 1)")
    weight_decay: float = option(5e-4, "L2 penalty of SGD, decoupled weight decay of AdamW")
    label_smoothing: float = option(
        0.0, "part of each training label that is spread over all classes, in [0, 1)"
    )
    clip_grad_norm: float | None = option(
        None,
        "largest norm of all gradients together; larger ones are scaled down to it",
        type=float,
        unset="none",
    )
    lr_warmup: int = option(
        0, "epochs in which the learning rate rises evenly, before the schedule begins"
    )
    schedule: str = option(
        "cosine",
        "learning rate by epoch, for every method: constant, cosine (to zero), or step (times "
        "--gamma at each of --milestones)",
        choices=SCHEDULES,
    )
    gamma: float = option(0.1, "factor of --schedule step, in (0, 1)")
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "where --schedule step drops, in fractions of the epochs", type=float
    )
    amp: str = option("off", "automatic mixed precision", choices=AMP)
    channels_last: bool = option(True, "keep weights and activations in channels-last memory")
    cuda_graphs: bool = option(
        False, "record whole steps as CUDA graphs: less time in small steps (a GPU; not with fp16)"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is a GPU")
    seed: int = option(0, "seed of initial weights, order, augmentation and dropout")

    watch: str = option(
        "train",
        "accuracy that the policy watches: train (of the epoch's own steps, free) or validation "
        "(needs --validation)",
        choices=WATCH,
    )
    threshold: float = option(
        _POLICY.threshold, "variation in percentage points below which the accuracy is flat"
    )
    patience: int = option(_POLICY.patience, "variation is that of the last patience + 1 epochs")
    max_window: int = option(_POLICY.max_window, "longest skip window, in epochs")
    warmup: int = option(_POLICY.warmup, "epochs before the first skip window may open")
    min_open: int = option(_POLICY.min_open, "epochs that weights train between two windows")
    final_window: int | None = option(
        None,
        "epochs at the end of the run that skip, whatever the accuracy",
        type=int,
        unset="1 with --schedule constant, else 0",
    )
    lr_drop: float = option(
        LR_DROP, "wus+lr: ratio of learning rates that counts as a jump, in (0, 1)"
    )

    skip_layers: tuple[str, ...] = option(
        (),
        "layers that skip in skipped epochs, the others training as ever: patterns of their names, "
        "as in --skip-layers features 'layer[12].*'",
        type=str,
        metavar="PATTERN",
    )
    full_every: int | None = option(
        None,
        "train weights in every N-th step of a skipped epoch, N at least 2",
        type=int,
        unset="in none",
    )
    train_gamma: bool = option(False, "train the scale of norm layers in skipped epochs, too")
    bias_lr: float = option(
        1.0, "factor of the learning rate in skip steps, for whatever trains in them"
    )
    window_momentum: str = option(
        "keep",
        "momentum of the weights that skipped, after a skip window: keep (as it was before) or "
        "reset (to zero)",
        choices=MOMENTA,
    )
    full: str = option(
        "stock",
        "full steps of wus and wus+lr: stock (PyTorch's, bit for bit) or fused (on the CPU in "
        "float32 and on a GPU the skip step's kernels: faster, equal up to rounding)",
        choices=FULL,
    )
    norm: str = option(
        "batch",
        "batch norm in skipped epochs: batch (statistics of the batch, as ever) or frozen (running "
        "statistics stand still; costs less)",
        choices=NORMS,
    )
    algo: str = option(
        "auto",
        "convolutions of skipped epochs (with --full fused of all) on the CPU in float32: direct "
        "(oneDNN), f2, f4 (Winograd), auto (the fastest for each layer by its numbers) or measure "
        "(by trying, once; a resumed run keeps what was found)",
        choices=ALGORITHMS,
    )
    packed_budget: float | None = option(
        None, "GiB that transformed weights may take (skipped epochs; --full fused)", type=float
    )

    tensorboard: bool = option(
        False, "also write the records as scalars for TensorBoard, to OUT/tensorboard"
    )

    data_dir: str = option(
        "data", "where the dataset is, or is downloaded to; for folder: the folder of train, test"
    )
    download: bool = option(True, "fetch a dataset that is not in --data-dir (cifar10, cifar100)")
    limit_train: int | None = option(
        None, "use this many training images, class-balanced, the same for every --seed", type=int
    )
    limit_test: int | None = option(
        None, "use this many test images, class-balanced, the same for every --seed", type=int
    )
    validation: float = option(
        0.0, "fraction of the training images held out for validation, class-balanced"
    )
    memory_budget: float = option(
        2.0, "GiB of images to hold in memory; a larger folder is read from disk on the way"
    )
    workers: int = option(2, "processes that read images from disk, where they are not in memory")
    image_size: int | None = option(
        None,
        "pixels of an image in each direction; those of a folder keep their aspect, the middle is "
        "cut out",
        type=int,
        unset="32; of a folder, for networks that are not made for 32, 224",
    )
    augment: str = option(
        "auto",
        "of training images: crop (shifted by up to an eighth of their size), resized (random "
        "parts of a folder's images, resized, as for ImageNet), none, or auto (resized for a "
        f"folder and {_LARGE} pixels or more, else crop)",
        choices=AUGMENT,
    )
    flip: bool = option(True, "mirror half of the training images (never digits)")
    normalize: str = option(
        "auto",
        "mean and deviation that images are normalised with: dataset (of its training images), "
        "imagenet, half (0.5), or auto (as the pretrained weights want it, else dataset)",
        choices=NORMALIZE,
    )

    def validate(self) -> None:
        """Check every setting.

        Raises:
            ConfigError: naming the first setting that is wrong, its value and what is wanted.
        """
        checks.values(self)
        checks.machine(self)

    def skip_settings(self) -> dict[str, Any]:
        """The settings of :func:`wus_ext.convert`."""
        budget = "auto" if self.packed_budget is None else int(self.packed_budget * 2**30)
        return {
            "skip_gamma": not self.train_gamma,
            "norm": METHODS[self.method].norm or self.norm,
            "algo": self.algo,
            "memory_budget": budget,
            "full": METHODS[self.method].full or self.full,
        }

    def policy_settings(self) -> dict[str, Any]:
        """The settings of :class:`wus_ext.WUS`."""
        names = [field.name for field in dataclasses.fields(Settings)]
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if self.final_window is None:
            # What never settles by a falling rate settles in a window: docs/results.md.
            given["final_window"] = int(self.schedule == "constant")
        return {**given, "total_epochs": self.epochs}

    def torch_device(self) -> torch.device:
        """The device that ``device`` means here: of several processes each has a GPU of its own.

        Raises:
            ConfigError: it is no device, or not present.
        """
        cuda = torch.cuda.is_available()
        try:
            device = torch.device(
                ("cuda" if cuda else "cpu") if self.device == "auto" else self.device
            )
        except RuntimeError as error:
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}") from error
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if device == torch.device("cuda") and processes.count() > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {str(device)!r} is not present: use cpu or auto")
        return device

    def rate(self) -> float:
        """The learning rate before the schedule falls."""
        return OPTIMIZERS[self.optimizer] if self.lr is None else self.lr

    def pixels(self) -> int:
        """The size of an image in each direction."""
        small = self.dataset != "folder" or self.model in MODELS
        return self.image_size or (32 if small else 224)

    def augmentation(self) -> str:
        """What ``augment`` means here."""
        if self.augment != "auto":
            return self.augment
        return "resized" if self.dataset == "folder" and self.pixels() >= _LARGE else "crop"

    def normalisation(self) -> str:
        """What ``normalize`` means here; ``pretrained``: what the pretrained weights want."""
        if self.normalize != "auto":
            return self.normalize
        return "pretrained" if self.weights == PRETRAINED else "dataset"

    def model_name(self) -> str:
        """The model, as part of the name of a folder."""
        return re.sub(r"[^\w.]+", "-", self.model).strip("-.")

    def run_name(self) -> str:
        """The default name of the run's folder."""
        parts = (self.model_name(), self.dataset, self.method.replace("+", "-"))
        return f"{'-'.join(parts)}-seed{self.seed}"

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; a setting that is not there has its default.

        Raises:
            ConfigError: a name is no setting, or a value is wrong on any machine.
        """
        config = from_plain(cls, values)
        checks.values(config)
        return config

    def data_path(self) -> Path:
        """``data_dir`` as a path."""
        return Path(self.data_dir).expanduser()


def _described(field: dataclasses.Field[Any]) -> str:
    unset = field.metadata.get("unset")
    return f"    {field.name}: {field.metadata['help']}" + (f"; None: {unset}" if unset else "")


_FIELDS = "\n    ".join(map(_described, dataclasses.fields(TrainConfig)))
TrainConfig.__doc__ = f"{TrainConfig.__doc__}\n    Attributes:\n    {_FIELDS}\n"

# Where things are, not what is computed: a run may resume with others.
RELOCATABLE = frozenset(
    {"data_dir", "download", "memory_budget", "workers", "device", "tensorboard"}
)
