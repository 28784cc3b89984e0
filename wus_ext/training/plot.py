"""The picture of a comparison: accuracy over training time, time saved, and where windows lay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any, BinaryIO

from ..methods.table import BASELINE, METHODS
from .errors import require
from .run import Run

__all__ = ["draw"]

_GREY = "#6b6b6b"
_LINE = 0.26  # inches, of a row of bars


def draw(runs: Sequence[Run], file: BinaryIO, *, axis: str = "training time (s)") -> None:
    """Write a PNG with one panel per network.

    Above, test accuracy over time, skipped epochs as dots; a run that begins like another is drawn
    from where they part. Below, a bar for each run, as long as it took: dark where weights were
    skipped. Lines and bars are those of the first seed, the numbers are means over all.

    Args:
        runs: all runs of the comparison.
        file: open for writing bytes.
        axis: what ``train_seconds`` of the records are.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", "the picture of a comparison")
    networks = list(dict.fromkeys(run.model for run in runs))
    columns = min(2, len(networks))
    rows = -(-len(networks) // columns)
    bars = max(len({run.method for run in runs if run.model == name}) for name in networks)
    height = 3.0 + _LINE * (bars + 1)
    figure = figure_module.Figure(
        figsize=(8.0 * columns, height * rows + 0.4), dpi=130, layout="constrained"
    )
    panels = figure.subfigures(rows, columns, squeeze=False, hspace=0.04, wspace=0.04).flat
    for panel, network in zip(panels, networks, strict=False):
        _panel(panel, network, [run for run in runs if run.model == network], axis)
    figure.savefig(file, format="png")


def _panel(figure: Any, network: str, runs: Sequence[Run], axis: str) -> None:
    first = min(run.seed for run in runs)
    shown = {run.method: run for run in runs if run.seed == first}
    order = _order(list(shown))
    curves, bars = figure.subplots(2, 1, sharex=True, height_ratios=[3.0, _LINE * (len(order) + 1)])
    _curves(curves, [shown[name] for name in order if not shown[name].control])
    curves.set_title(network, loc="left", fontweight="bold")
    _bars(bars, order, shown, runs)
    bars.set_xlabel(f"{axis}; dark: weights skipped", color=_GREY)


def _order(names: Sequence[str]) -> list[str]:
    """Methods in the order of their table, each followed by what got its time."""
    methods = [name for name in METHODS if name in names]
    return [
        name
        for method in methods
        for name in (method, *(n for n in names if n.endswith(f" in the time of {method}")))
    ]


def _curves(axes: Any, runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        method = METHODS[run.method]
        start = max((_shared(run, other) for other in runs[:index]), default=0)
        times, accuracies = _ends(run), [record["test_accuracy"] for record in run.history]
        begin = max(0, start - 1)
        axes.plot(times[begin:], accuracies[begin:], color=method.colour, lw=1.8, zorder=2)
        skipped = [i for i, record in enumerate(run.history) if record["skipped"]]
        axes.plot(
            [times[i] for i in skipped],
            [accuracies[i] for i in skipped],
            "o",
            color=method.colour,
            mec="white",
            ms=6,
            zorder=3,
        )
        if run.method == BASELINE:
            axes.axhline(accuracies[-1], color=method.colour, lw=0.8, ls=(0, (4, 3)), zorder=1)
        axes.plot(times[-1], accuracies[-1], "s", color=method.colour, mec="white", ms=9, zorder=4)
    axes.set_ylabel("test accuracy (%)")
    seen = sorted(record["test_accuracy"] for run in runs for record in run.history)
    axes.set_ylim(bottom=seen[len(seen) // 12])  # the first epochs say little
    axes.margins(y=0.12)
    axes.grid(color="#e9e9e9", lw=0.8)
    axes.tick_params(labelbottom=False, length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _shared(run: Run, other: Run) -> int:
    """How many epochs both begin with: equal to the bit, at about the same time."""
    count = 0
    ends = zip(_ends(run), _ends(other), strict=False)
    for one, two, (here, there) in zip(run.history, other.history, ends, strict=False):
        same = (one["test_accuracy"], one["skipped"]) == (two["test_accuracy"], two["skipped"])
        if not same or abs(here - there) > 0.25 * there:
            break
        count += 1
    return count


def _bars(axes: Any, order: Sequence[str], shown: dict[str, Run], runs: Sequence[Run]) -> None:
    longest = max(run.seconds for run in shown.values())
    groups = {name: [run for run in runs if run.method == name] for name in order}
    baseline = {run.seed: run for run in groups.get(BASELINE, [])}
    for place, name in enumerate(order):
        run = shown[name]
        method = METHODS[name.partition(" in the time of ")[0]]
        thickness = 0.34 if run.control else 0.7
        for record, end in zip(run.history, _ends(run), strict=True):
            axes.broken_barh(
                [(end - record["train_seconds"], record["train_seconds"])],
                (place - thickness / 2, thickness),
                color=method.colour,
                alpha=1.0 if record["skipped"] else 0.28,
                lw=0,
            )
        look = {"va": "center", "color": _GREY if run.control else "black"}
        saved, accuracy = _figures(groups[name], baseline)
        axes.text(longest * 1.03, place, saved, **look)
        axes.text(longest * 1.22, place, accuracy, **look)
    for column, text in ((1.03, "time saved"), (1.22, "accuracy (difference)")):
        axes.text(longest * column, -1, text, va="center", color=_GREY, fontsize=9)
    axes.set_yticks(range(len(order)), [_label(name) for name in order])
    for tick, name in zip(axes.get_yticklabels(), order, strict=True):
        tick.set_color(_GREY if shown[name].control else METHODS[name].colour)
        tick.set_fontweight("normal" if shown[name].control else "bold")
    axes.set_ylim(len(order) - 0.5, -1.5)
    axes.set_xlim(0, longest * 1.48)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= longest])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, longest)


def _figures(runs: Sequence[Run], baseline: dict[int, Run]) -> tuple[str, str]:
    """Time saved and accuracy, means over the seeds, as text."""
    accuracy = f"{fmean(run.accuracy for run in runs):.1f} %"
    if not baseline or runs[0].method == BASELINE:
        return "", accuracy
    saved = fmean(100 * (1 - run.seconds / baseline[run.seed].seconds) for run in runs)
    gained = fmean(run.accuracy - baseline[run.seed].accuracy for run in runs)
    return f"{saved:.0f} %", f"{accuracy}  ({gained:+.1f})"


def _label(name: str) -> str:
    full, _, method = name.partition(" in the time of ")
    return f"{METHODS[full].label} in its time" if method else METHODS[full].label


def _ends(run: Run) -> list[float]:
    return list(accumulate(record["train_seconds"] for record in run.history))
