"""The table of a comparison: per network and method, over seeds, next to the paper's figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from ..methods.table import BASELINE, METHODS
from .config import TrainConfig
from .files import write_atomic
from .plot import draw
from .run import Run

__all__ = ["PAPER", "markdown", "targets", "write_report"]

#: Reduction of training time that the paper reports, in percent, by data, device and method:
#: the average of AlexNet, VGG-11, VGG-16 and ResNet-18 (arXiv 2012.02792).
PAPER = {
    ("CIFAR-10", "CPU"): {"wus": 54, "wus+lr": 50},
    ("CIFAR-100", "CPU"): {"wus": 43, "wus+lr": 35},
    ("CIFAR-10", "GPU"): {"wus": 22, "wus+lr": 21},
    ("CIFAR-100", "GPU"): {"wus": 22, "wus+lr": 21},
}


@dataclass(frozen=True)
class Row:
    """A run's figures, or a mean of several with their deviation; ``None`` where there is none."""

    model: str
    method: str
    epochs: float
    accuracy: float
    seconds: float
    saved: float
    skipped: float
    skip_cost: float | None
    to_target: float | None
    memory: float | None
    skip_memory: float | None


_MEMORY = {
    "cpu": "what a step saves for backward, at most, and the transformed weights that it keeps.",
    "cuda": "the peak of an epoch's steps beyond what was allocated before.",
}
#: Column of the table and of table.csv, digits in the table.
_FIGURES = {
    "epochs": ("epochs", "epochs", 0),
    "accuracy": ("test accuracy (%)", "test_accuracy_percent", 2),
    "seconds": ("training time (s)", "train_seconds", 1),
    "saved": ("time saved (%)", "time_saved_percent", 1),
    "skipped": ("steps skipped (%)", "steps_skipped_percent", 0),
    "skip_cost": ("skip step / full step", "skip_step_over_full_step", 2),
    "to_target": ("time to target (s)", "train_seconds_to_target", 1),
    "memory": ("memory (MiB)", "memory_mib", 1),
    "skip_memory": ("memory, skipped epochs (MiB)", "memory_skipped_epochs_mib", 1),
}


def targets(runs: Sequence[Run], target: float | None = None) -> dict[tuple[str, int], float]:
    """``target`` in percent, by network and seed; by default the baseline's accuracy less 1."""
    return {
        (run.model, run.seed): run.accuracy - 1 if target is None else target
        for run in runs
        if run.method == BASELINE
    }


def rows(runs: Sequence[Run], target: float | None = None) -> list[Row]:
    """One row per run; ``saved`` is against the baseline of the same network and seed, in %."""
    baseline = {(run.model, run.seed): run.seconds for run in runs if run.method == BASELINE}
    wanted = targets(runs, target)
    return [
        Row(
            model=run.model,
            method=run.method,
            epochs=len(run.history),
            accuracy=run.accuracy,
            seconds=run.seconds,
            saved=100 * (1 - run.seconds / baseline[run.model, run.seed]),
            skipped=run.skipped,
            skip_cost=run.skip_cost,
            to_target=_seconds_to(run, wanted[run.model, run.seed]),
            memory=run.memory(skipped=False),
            skip_memory=run.memory(skipped=True),
        )
        for run in runs
    ]


def _seconds_to(run: Run, target: float) -> float | None:
    epochs = run.epochs_to(target)
    return None if epochs is None else sum(r["train_seconds"] for r in run.history[:epochs])


def markdown(runs: Sequence[Run], config: TrainConfig, target: float | None = None) -> str:
    """The table, with what was run above it and the paper's figures below it.

    Args:
        runs: all runs of the comparison, each network's baseline included.
        config: the settings that they share.
        target: of "time to target", in percent; default: the baseline's last accuracy of the same
            network and seed, less 1.
    """
    every = rows(runs, target)
    models = list(dict.fromkeys(row.model for row in every))
    methods = list(dict.fromkeys(row.method for row in every))
    methods.sort(key=lambda name: ("time of" in name, name != BASELINE))
    seeds = len({run.seed for run in runs})
    lines = [
        f"{config.dataset}, {_device(config)}, {config.epochs} epochs of the baseline, "
        f"schedule {config.schedule}, batch {config.batch_size}, "
        + (f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"),
        "",
        f"| network | method | {' | '.join(title for title, *_ in _FIGURES.values())} |",
        f"|---|---{'|--:' * len(_FIGURES)}|",
    ]
    for model in models:
        for method in methods:
            lines.append(
                _line(model, method, [r for r in every if (r.model, r.method) == (model, method)])
            )
    if len(models) > 1:
        for method in methods:
            lines.append(
                _line("**average**", method, [r for r in every if r.method == method], True)
            )
    notes = _notes(any(run.control for run in runs), config, target)
    return "\n".join([*lines, "", *notes]) + "\n"


def _line(model: str, method: str, group: Sequence[Row], average: bool = False) -> str:
    cells = [model, method]
    for name, (_, _, digits) in _FIGURES.items():
        values = [getattr(row, name) for row in group]
        if (method, name) == (BASELINE, "saved"):
            values = [None]
        cells.append(_cell(values, digits, spread=not average and name != "epochs"))
    return f"| {' | '.join(cells)} |"


def _cell(values: Sequence[float | None], digits: int, *, spread: bool) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{fmean(known):.{digits}f}"
    if spread and len(known) > 1:
        text += f" ± {stdev(known):.{digits}f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def _notes(control: bool, config: TrainConfig, target: float | None) -> list[str]:
    figures = "; ".join(
        f"{data} {device}: "
        + ", ".join(f"{part} % {METHODS[method].label}" for method, part in saved.items())
        for (data, device), saved in PAPER.items()
    )
    notes = [
        "Time saved is wall-clock training time, without evaluation, against the stock PyTorch "
        "baseline of the same schedule and seed. Accuracy is that after the last epoch.",
        "",
        "Time to target is the training time until the test accuracy after an epoch first reaches "
        + ("the baseline's less 1 point" if target is None else f"{target:g} %")
        + "; (1 of 3): that many runs have such a figure. Memory is "
        + _MEMORY[config.torch_device().type],
        "",
        "The paper (arXiv 2012.02792) reports, as average time saved on AlexNet, VGG-11, VGG-16 "
        f"and ResNet-18: {figures}.",
    ]
    if control:
        notes[1:1] = [
            "",
            "*baseline in the time of* a method is stock PyTorch, trained for the number of "
            "epochs nearest to that method's time, its schedule shortened alike, and *fused in the "
            "time of* it the same with fused full steps. Skipping is worth its while only where it "
            "beats these rows.",
        ]
    return notes


def write_report(
    runs: Sequence[Run], config: TrainConfig, out: Path, target: float | None = None
) -> str:
    """Write ``table.md``, ``table.csv`` (a line per run) and ``plot.png``; returns the table."""
    table = markdown(runs, config, target)
    write_atomic(out / "table.md", lambda file: file.write(table.encode()))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["network", "method", "seed", *(name for _, name, _ in _FIGURES.values())])
    for run, row in zip(runs, rows(runs, target), strict=True):
        figures = (getattr(row, name) for name in _FIGURES)
        writer.writerow([row.model, row.method, run.seed, *figures])
    write_atomic(out / "table.csv", lambda file: file.write(text.getvalue().encode()))
    write_atomic(out / "plot.png", lambda file: draw(runs, file))
    return table


def _device(config: TrainConfig) -> str:
    device = config.torch_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"
