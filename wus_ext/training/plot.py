"""The picture of a comparison: accuracy over training time, with the skip windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO

from .config import SKIPPING, TrainConfig
from .errors import require

if TYPE_CHECKING:
    from .report import Run

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {"baseline": "#333333", "fused": "#009E73", "wus": "#0072B2", "wus+lr": "#D55E00"}
_NAMES = {"baseline": "stock", "fused": "fused", "wus": "WUS", "wus+lr": "WUS+LR"}
_FAINT = "#888888"


def draw(runs: Sequence[Run], config: TrainConfig, file: BinaryIO) -> None:
    """Write a PNG with one panel per network; of several seeds it shows the first.

    Args:
        runs: all runs of the comparison.
        config: the settings that they share.
        file: open for writing bytes.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", "the picture of a comparison")
    models = list(dict.fromkeys(run.model for run in runs))
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    figure = figure_module.Figure(
        figsize=(6.4 * columns, 4.4 * rows + 0.5), dpi=150, layout="constrained"
    )
    grid = figure.add_gridspec(rows, columns, wspace=0.06, hspace=0.08)
    for index, model in enumerate(models):
        first = min(run.seed for run in runs)
        chosen = [run for run in runs if run.model == model and run.seed == first]
        _panel(figure, grid[index // columns, index % columns], model, chosen)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, format="png")


def _panel(figure, cell, model: str, runs: Sequence[Run]) -> None:
    methods = [run for run in runs if not run.control]
    skipping = [run for run in methods if run.method in SKIPPING]
    parts = cell.subgridspec(2, 1, height_ratios=[12, max(1, len(skipping))], hspace=0.04)
    axes = figure.add_subplot(parts[0])
    lanes = figure.add_subplot(parts[1], sharex=axes)

    # Methods often coincide: what comes later is drawn thinner, so that the others show.
    later = {run.method: len(methods) - 1 - index for index, run in enumerate(methods)}
    later["baseline"] = 0
    for run in methods:
        colour, more = _COLOURS[run.method], later[run.method]
        times, accuracies = _ends(run), [record["test_accuracy"] for record in run.history]
        axes.plot(times, accuracies, color=colour, lw=1.6 + 1.6 * more, label=_NAMES[run.method])
        axes.plot(times[-1], accuracies[-1], "o", color=colour, ms=5 + 3 * more)
    for run in runs:
        if run.control:
            full, _, name = run.method.partition(" in the time of ")
            axes.plot(
                _ends(run)[-1],
                run.accuracy,
                "D" if full == "baseline" else "s",
                ms=6 + 3.5 * later[name],
                mfc="none",
                mew=1.6,
                color=_COLOURS[name],
                label=f"{_NAMES[full]} in {_NAMES[name]}'s time",
            )
    axes.set_title(model, loc="left", fontweight="bold")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.tick_params(labelbottom=False, length=0)
    axes.spines[["top", "right"]].set_visible(False)

    for lane, run in enumerate(skipping):
        ends = _ends(run)
        for record, end in zip(run.history, ends, strict=True):
            span = (end - record["train_seconds"], record["train_seconds"])
            shade = 0.9 if record["skipped"] else 0.15
            lanes.broken_barh(
                [span], (lane - 0.4, 0.8), color=_COLOURS[run.method], alpha=shade, lw=0
            )
    lanes.set_yticks(range(len(skipping)), [_NAMES[run.method] for run in skipping])
    lanes.set_ylim(max(1, len(skipping)) - 0.5, -0.5)
    lanes.set_xlabel("training time (s); dark: weights skipped")
    lanes.set_xlim(left=0)
    lanes.tick_params(axis="y", length=0)
    lanes.spines[["top", "right", "left"]].set_visible(False)


def _ends(run: Run) -> list[float]:
    return list(accumulate(record["train_seconds"] for record in run.history))
