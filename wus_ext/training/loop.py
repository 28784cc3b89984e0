"""One epoch of training, one evaluation: no files, no policy, no output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from ..conversion.convert import packed_bytes
from ..distributed import processes
from .graphs import StepGraphs
from .memory import StepMemory
from .timing import StepTimer, synchronize

__all__ = ["Result", "Totals", "evaluate", "train_epoch"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Result:
    """What an epoch or an evaluation came to.

    Args:
        loss: mean cross-entropy per image.
        accuracy: in percent.
        images: how many were seen.
        seconds: wall-clock time, data preparation included.
        step_seconds: median of one step without data preparation, of skip steps where there are
            any; NaN for an evaluation.
        skipped: fraction of the steps that skipped weight updates.
        peak_bytes: see :class:`~wus_ext.training.memory.StepMemory`.
        packed_bytes: see :func:`wus_ext.packed_bytes`; after the first step.
    """

    loss: float
    accuracy: float
    images: int
    seconds: float
    step_seconds: float = float("nan")
    skipped: float = 0.0
    peak_bytes: int = 0
    packed_bytes: int = 0


class Totals:
    """Running sums that stay on the device: reading them, and only that, waits for it.

    They are those of this process; :meth:`of_all` adds up several.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """Count one batch: its mean loss (0-dim), output (N, classes) and labels (N,)."""
        self.loss += loss.detach().double() * len(labels)
        self.correct += (output.detach().argmax(1) == labels).sum()
        self.images += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent so far."""
        images = max(1, self.images)
        return self.loss.item() / images, 100 * self.correct.item() / images

    def of_all(self) -> tuple[float, float, int]:
        """Mean loss, accuracy in percent and number of images in all processes together."""
        each = processes.gather((self.loss.item(), self.correct.item(), self.images))
        loss, correct, images = map(sum, zip(*each, strict=True))
        return loss / max(1, images), 100 * correct / max(1, images), images


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as ``amp`` ("off", "bf16" or "fp16") says."""
    return torch.autocast(device.type, dtype=_DTYPES.get(amp), enabled=amp != "off")


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    amp: str = "off",
    scaler: torch.amp.GradScaler | None = None,
    label_smoothing: float = 0.0,
    clip_grad_norm: float | None = None,
    on_step: Callable[[Totals], None] | None = None,
    cuda_graphs: bool = False,
    begin: Callable[[int], bool] = lambda step: False,
) -> Result:
    """Train ``model`` on every batch once; of several processes each brings its own batches.

    Args:
        batches: pairs of images (N, C, H, W) and labels (N,) on ``device``.
        scaler: for fp16; ``None`` stands for a disabled one.
        label_smoothing: see :func:`torch.nn.functional.cross_entropy`.
        clip_grad_norm: largest norm of all gradients together; ``None`` for any.
        on_step: called after each step with the sums so far.
        cuda_graphs: replay recorded steps; needs a GPU and no ``scaler``.
        begin: called before each step with its number, from 0; says whether it is a skip step.
    """
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        watched = memory.of_forward(model, images, labels, skipping=skipping)
        with autocast(device, amp), watched:
            output = model(images)
            loss = cross_entropy(output, labels, label_smoothing=label_smoothing)
        scaler.scale(loss).backward()
        if clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(parameters, clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), output.detach()

    skipping, kinds, packed, memory = False, [], 0, StepMemory(device)
    run = StepGraphs(step, skipping=lambda: skipping) if cuda_graphs else step
    totals, timers = Totals(device), (StepTimer(device), StepTimer(device))
    synchronize(device)
    start = time.perf_counter()
    for number, (images, labels) in enumerate(batches):
        skipping = begin(number)
        kinds.append(skipping)
        with timers[skipping]:
            loss, output = run(images, labels)
        totals.add(loss, output, labels)
        if number == 0:  # a stock full step drops them
            packed = packed_bytes(model)
        if on_step:
            on_step(totals)
    synchronize(device)
    seconds = time.perf_counter() - start
    return Result(
        *totals.of_all(),
        seconds,
        step_seconds=timers[any(kinds)].median(),
        skipped=sum(kinds) / max(1, len(kinds)),
        peak_bytes=memory.peak(),
        packed_bytes=packed,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: str = "off",
) -> Result:
    """Loss and accuracy of ``model``, in evaluation mode, on all batches."""
    model.eval()
    totals = Totals(device)
    start = time.perf_counter()
    for images, labels in batches:
        with autocast(device, amp):
            output = model(images)
            loss = cross_entropy(output, labels)
        totals.add(loss, output, labels)
    result = totals.of_all()
    return Result(*result, time.perf_counter() - start)
