"""How good a checkpoint is: accuracy, and which classes are taken for which."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..conversion.convert import revert
from .config import TrainConfig
from .data import Data, load_part
from .errors import ConfigError, DataError
from .loop import autocast
from .networks import build_network
from .state import read_state

__all__ = ["Checkpoint", "Evaluation", "confusion", "evaluate_checkpoint", "read_checkpoint"]

_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, made of stock layers.

    Args:
        path: its file.
        config: what it was trained with.
        epoch: its last.
        record: that epoch's, as in ``metrics.jsonl``.
        classes: their names, by label.
        mean, std: what images are normalised with, per channel, in units of full brightness.
        model: in evaluation mode, on the CPU.
    """

    path: Path
    config: TrainConfig
    epoch: int
    record: dict[str, object]
    classes: list[str]
    mean: list[float]
    std: list[float]
    model: nn.Module


def read_checkpoint(path: str | Path, which: str = "best") -> Checkpoint:
    """The network in a checkpoint.

    Args:
        path: a checkpoint, or the folder of a run.
        which: of a run, ``best`` or ``last``.

    Raises:
        ConfigError: its network cannot be built here.
        DataError: naming the file, when it is missing, damaged or no checkpoint of a run.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / f"{which}.pt"
    state = read_state(path)
    config: TrainConfig = state["config"]
    model = revert(build_network(config.model, len(state["classes"]), dropout=config.dropout))
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} does not fit model {config.model!r} ({reason})") from error
    epoch = state["epoch"]
    return Checkpoint(
        path=path,
        config=config,
        epoch=epoch,
        record=state["history"][epoch - 1],
        classes=state["classes"],
        mean=state["mean"],
        std=state["std"],
        model=model.eval(),
    )


@dataclass(frozen=True)
class Evaluation:
    """What came of a set of images.

    Args:
        loss: mean cross-entropy per image.
        counts: int64, shape (classes, classes); images of a class (row) by what they were taken
            for (column).
        classes: their names.
    """

    loss: float
    counts: Tensor
    classes: Sequence[str]

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.counts.diagonal().sum().item() / max(1, int(self.counts.sum()))

    def worst(self, count: int) -> list[str]:
        """A line for each of the classes that were taken for others most often.

        >>> counts = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 10]])
        >>> Evaluation(0.1, counts, ["cat", "dog", "cow"]).worst(2)
        ['cat   80.0 % of 10: 2 taken for dog', 'dog   90.0 % of 10: 1 taken for cat']
        """
        totals, right = self.counts.sum(1), self.counts.diagonal()
        order = sorted(range(len(totals)), key=lambda k: (right[k] / totals[k].clamp(min=1)).item())
        wrong = [k for k in order if right[k] < totals[k]][:count]
        width = max((len(self.classes[k]) for k in wrong), default=0)
        return [self._line(k, width) for k in wrong]

    def _line(self, label: int, width: int) -> str:
        row = self.counts[label].clone()
        total, row[label] = int(row.sum()), 0
        taken = [(int(row[k]), self.classes[k]) for k in row.argsort(descending=True).tolist()]
        taken = [(count, name) for count, name in taken if count][:_SHOWN]
        first, *rest = (f"{count} taken for {name}" for count, name in taken)
        others = "".join(f", {text.replace(' taken', '')}" for text in rest)
        part = 100 * int(self.counts[label, label]) / total
        return f"{self.classes[label]:<{width}}  {part:5.1f} % of {total}: {first}{others}"

    def table(self) -> str:
        """All counts as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", *self.classes])
        rows = zip(self.classes, self.counts.tolist(), strict=True)
        writer.writerows([name, *row] for name, row in rows)
        return text.getvalue()


@torch.no_grad()
def confusion(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    device: torch.device,
    amp: str = "off",
) -> Evaluation:
    """Loss of ``model`` on all batches, and what it takes their images for."""
    count = len(classes)
    counts = torch.zeros(count * count, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for images, labels in batches:
        with autocast(device, amp):
            output = model(images)
            loss += cross_entropy(output, labels, reduction="sum").double()
        counts += torch.bincount(labels * count + output.argmax(1), minlength=count * count)
    counts = counts.view(count, count).cpu()
    return Evaluation(loss.item() / max(1, int(counts.sum())), counts, classes)


def evaluate_checkpoint(
    checkpoint: Checkpoint, *, part: str = "test", **changes: Any
) -> tuple[Evaluation, Data]:
    """Evaluate on a part of the images that the run was trained with, or of others.

    Args:
        checkpoint: from :func:`read_checkpoint`.
        part: ``test``, ``validation`` or ``train``; of the same images as in training, limits and
            validation fraction included.
        **changes: settings that are otherwise than in training. With a ``dataset`` or ``data_dir``
            all images of the part count.

    Returns:
        What came of it, and the images.

    Raises:
        ConfigError, DataError, MissingExtra: as :func:`~wus_ext.training.data.load_data`.
    """
    if {"dataset", "data_dir"} & changes.keys():
        changes = {"limit_train": None, "limit_test": None, "validation": 0.0, **changes}
    alone = {"method": "baseline", "watch": "train", "early_stop": None, "cuda_graphs": False}
    config = checkpoint.config.replace(**{**alone, "tensorboard": False, **changes})
    config.validate()
    if part == "validation" and not config.validation:
        raise ConfigError("part 'validation': the run held no images out (--validation)")
    data = load_part(config, part, checkpoint.classes, checkpoint.mean, checkpoint.std)
    device = config.torch_device()
    model = checkpoint.model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    batches = data.evaluation_batches(data.test, config.batch_size)
    return confusion(model, batches, data.classes, device=device, amp=config.amp), data
