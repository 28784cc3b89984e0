"""The picture of settings.py: what skipping reaches against full steps alone at equal cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, BinaryIO

from wus_ext.training.errors import require

if TYPE_CHECKING:
    from settings import Controls, Mean

#: What the picture calls some settings, by schedule.
SHOWN = {
    "constant 0.02": {
        "F12 S": "F12 S",
        "F15 S": "F15 S",
        "F4 (FS)x6": "F4, then FS six times",
        "F4 (SF)x6": "F4, then SF six times",
        "WUS, threshold 2": "WUS",
    },
    "constant 0.005": {"low F10 S": "F10 S", "low F12 S": "F12 S"},
    "constant 0.02, decay": {
        "F8, decay, S": "F8, decay, S",
        "F8, decay of 2, steps FS": "every other step of the decay",
    },
    "constant 0.02, short decay": {
        "F12, decay and S of 0.25": "F12, a quarter each of decay and S"
    },
    "cosine": {
        "cosine F10 SS": "F10 SS",
        "cosine F3 (SF)x3 F3, held": "F3, SF three times, F3",
        "cosine, steps FS from 4 on": "every other step from epoch 4 on",
        "cosine, lower half skips from 6 on": "lower half of the layers from epoch 6 on",
    },
    "steps": {
        "steps, windows before drops": "windows before the drops",
        "steps, windows after drops": "windows after the drops",
    },
}


@dataclass(frozen=True)
class Bar:
    """A setting of the picture: its accuracy, and what full steps reach at its cost."""

    schedule: str
    label: str
    cost: float
    accuracy: float
    same: float
    best: float


def bars(results: Sequence[Mean], controls: Controls) -> Iterator[Bar]:
    """Those of SHOWN that have controls, with the first of SKIP_COSTS."""
    for mean in results:
        label = SHOWN.get(mean.schedule, {}).get(mean.name)
        same = controls.at(mean.costs[0], mean.schedule)
        best = controls.best(mean.costs[0])
        if label is not None and same is not None and best is not None:
            yield Bar(mean.schedule, label, mean.costs[0], mean.accuracy, same, best)


#: Okabe and Ito's palette, which colour-blind readers can tell apart.
AHEAD, BEHIND, SAME, BEST = "#0072B2", "#D55E00", "#333333", "#aaaaaa"
MARKS = {
    "skipping, ahead of it": {"marker": "o", "ms": 9, "color": AHEAD},
    "skipping, behind it": {"marker": "o", "ms": 9, "color": BEHIND},
    "the same schedule, full steps only": {
        "marker": "o",
        "ms": 7,
        "color": "white",
        "mec": SAME,
        "mew": 1.6,
    },
    "the best schedule, full steps only": {"marker": "|", "ms": 15, "mew": 2.5, "color": BEST},
}


def draw(shown: Sequence[Bar], file: BinaryIO) -> None:
    """A line for each setting, from what full steps reach at its cost to what it reaches."""
    groups = [list(group) for _, group in groupby(shown, key=lambda bar: bar.schedule)]
    figure = require("matplotlib.figure", "--plot").Figure(
        figsize=(10, 1.3 + 0.3 * (len(shown) + 1.4 * len(groups))), dpi=130, layout="constrained"
    )
    axes = figure.subplots()
    labels: dict[float, tuple[str, str]] = {}
    y = 0.0
    for group in groups:
        labels[y] = group[0].schedule, "bold"
        for bar in group:
            y -= 1
            labels[y] = f"{bar.label}   {bar.cost:5.2f}", "normal"
            _draw_bar(axes, y, bar)
        y -= 1.4
    axes.set_yticks(list(labels), [text for text, _ in labels.values()], fontsize=9)
    for label, (_, weight) in zip(axes.get_yticklabels(), labels.values(), strict=True):
        label.set_fontweight(weight)
    axes.set_ylim(min(labels) - 0.8, 0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eeeeee", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("accuracy at the end (%); right: difference to the same schedule, points")
    for text, look in MARKS.items():
        axes.plot([], [], ls="", label=text, **look)
    figure.legend(
        loc="outside upper center",
        ncols=2,
        frameon=False,
        fontsize=9,
        title="Skipping against full steps alone at equal cost (behind the name, in full epochs)",
        title_fontproperties={"weight": "bold", "size": 11},
    )
    figure.savefig(file, format="png")


def _draw_bar(axes: Any, y: float, bar: Bar) -> None:
    ahead = bar.accuracy >= bar.same
    colour = AHEAD if ahead else BEHIND
    skipping, same, best = [list(MARKS)[i] for i in (0 if ahead else 1, 2, 3)]
    axes.plot([bar.same, bar.accuracy], [y, y], color=colour, lw=3)
    for x, mark in ((bar.best, best), (bar.same, same), (bar.accuracy, skipping)):
        axes.plot(x, y, **MARKS[mark])
    axes.annotate(
        f"{bar.accuracy - bar.same:+.1f}",
        (1, y),
        xycoords=axes.get_yaxis_transform(),
        va="center",
        fontsize=9,
        color=colour,
        annotation_clip=False,
    )
