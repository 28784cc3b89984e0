"""The table of a comparison: per network and method, over seeds, next to the paper's figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from .checkpoint import write_atomic
from .config import TrainConfig
from .plot import draw

__all__ = ["PAPER", "Run", "markdown", "write_report"]

#: Reduction of training time that the paper reports, in percent, by data, device and method:
#: the average of AlexNet, VGG-11, VGG-16 and ResNet-18 (arXiv 2012.02792).
PAPER = {
    ("CIFAR-10", "CPU"): {"wus": 54, "wus+lr": 50},
    ("CIFAR-100", "CPU"): {"wus": 43, "wus+lr": 35},
    ("CIFAR-10", "GPU"): {"wus": 22, "wus+lr": 21},
    ("CIFAR-100", "GPU"): {"wus": 22, "wus+lr": 21},
}


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Args:
        model: the network.
        method: ``baseline``, ``wus``, ``wus+lr`` or ``baseline in the time of ...``.
        seed: of weights and data order.
        history: its records, as in ``metrics.jsonl``.
    """

    model: str
    method: str
    seed: int
    history: Sequence[dict[str, Any]]

    @property
    def control(self) -> bool:
        """Whether this is a baseline shortened to the time of a method."""
        return " in the time of " in self.method

    @property
    def seconds(self) -> float:
        """Training time without evaluation."""
        return sum(record["train_seconds"] for record in self.history)

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent after the last epoch."""
        return self.history[-1]["test_accuracy"]

    @property
    def skipped(self) -> float:
        """Percentage of epochs that skipped weight updates."""
        return 100 * fmean(record["skipped"] for record in self.history)

    @property
    def skip_cost(self) -> float | None:
        """Median skip step over median full step of the same run; ``None`` without both kinds."""
        steps: dict[bool, list[float]] = {True: [], False: []}
        for record in self.history:
            steps[record["skipped"]].append(record["step_seconds"])
        return median(steps[True]) / median(steps[False]) if all(steps.values()) else None


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


_FIGURES = ("epochs", "accuracy", "seconds", "saved", "skipped", "skip_cost")


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row per run; ``saved`` is against the baseline of the same network and seed, in %."""
    baseline = {(run.model, run.seed): run.seconds for run in runs if run.method == "baseline"}
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
        )
        for run in runs
    ]


def markdown(runs: Sequence[Run], config: TrainConfig) -> str:
    """The table, with what was run above it and the paper's figures below it.

    Args:
        runs: all runs of the comparison, each network's baseline included.
        config: the settings that they share.
    """
    every = rows(runs)
    models = list(dict.fromkeys(row.model for row in every))
    methods = list(dict.fromkeys(row.method for row in every))
    methods.sort(key=lambda name: ("time of" in name, name != "baseline"))
    seeds = len({run.seed for run in runs})
    lines = [
        f"{config.dataset}, {_device(config)}, {config.epochs} epochs of the baseline, "
        f"schedule {config.schedule}, batch {config.batch_size}, "
        + (f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"),
        "",
        "| network | method | epochs | test accuracy (%) | training time (s) | time saved (%) "
        "| epochs skipped (%) | skip step / full step |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model in models:
        for method in methods:
            lines.append(
                _line(model, method, [r for r in every if (r.model, r.method) == (model, method)])
            )
    if len(models) > 1:
        for method in methods:
            lines.append(_line("**average**", method, [r for r in every if r.method == method], 1))
    return "\n".join([*lines, "", *_notes(any(run.control for run in runs))]) + "\n"


def _line(model: str, method: str, group: Sequence[Row], average: bool = False) -> str:
    cells = [model, method]
    for name, digits in zip(_FIGURES, (0, 2, 1, 1, 0, 2), strict=True):
        values = [getattr(row, name) for row in group if getattr(row, name) is not None]
        cells.append(_cell(values, digits, spread=not average and name != "epochs"))
    if method == "baseline":
        cells[_FIGURES.index("saved") + 2] = "-"
    return f"| {' | '.join(cells)} |"


def _cell(values: Sequence[float], digits: int, *, spread: bool) -> str:
    if not values:
        return "-"
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if spread and len(values) > 1 else text


def _notes(control: bool) -> list[str]:
    figures = "; ".join(
        f"{data} {device}: {saved['wus']} % WUS, {saved['wus+lr']} % WUS+LR"
        for (data, device), saved in PAPER.items()
    )
    notes = [
        "Time saved is wall-clock training time, without evaluation, against the stock PyTorch "
        "baseline of the same schedule and seed. Accuracy is that after the last epoch.",
        "",
        "The paper (arXiv 2012.02792) reports, as average time saved on AlexNet, VGG-11, VGG-16 "
        f"and ResNet-18: {figures}.",
    ]
    if control:
        notes[1:1] = [
            "",
            "*baseline in the time of* a method is stock PyTorch, trained for as many epochs as "
            "fit into that method's time, its schedule shortened alike. A method is worth its "
            "while only where it beats this row.",
        ]
    return notes


def write_report(runs: Sequence[Run], config: TrainConfig, out: Path) -> str:
    """Write ``table.md``, ``table.csv`` (a line per run) and ``plot.png``; returns the table."""
    table = markdown(runs, config)
    write_atomic(out / "table.md", lambda file: file.write(table.encode()))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        [
            "network",
            "method",
            "seed",
            "epochs",
            "test_accuracy_percent",
            "train_seconds",
            "time_saved_percent",
            "epochs_skipped_percent",
            "skip_step_over_full_step",
        ]
    )
    for run, row in zip(runs, rows(runs), strict=True):
        figures = (getattr(row, name) for name in _FIGURES)
        writer.writerow([row.model, row.method, run.seed, *figures])
    write_atomic(out / "table.csv", lambda file: file.write(text.getvalue().encode()))
    write_atomic(out / "plot.png", lambda file: draw(runs, config, file))
    return table


def _device(config: TrainConfig) -> str:
    device = config.torch_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"
