"""The runs of settings.py: what each does in each of its epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

from wus_ext.methods.rules import Phase, Settings, decide

LR = 0.02
WIDTHS = (32, 64, 64, 128, 128)
LOWER, UPPER = ("0", "4", "7"), ("11", "14", "19")


@cache
def multiplications() -> dict[str, int]:
    """Those of a layer's weight gradient, for each image."""
    sizes, inputs = (16, 8, 8, 4, 4), (3, *WIDTHS)
    products = [9 * s * s * c * w for s, c, w in zip(sizes, inputs, WIDTHS, strict=False)]
    return dict(zip(LOWER + UPPER, [*products, 4 * WIDTHS[-1] * 10], strict=True))


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch or a part of one."""

    #: "F": full steps, "S": skip steps, or a pattern that repeats step by step, such as "FSS".
    steps: str = "F"
    #: A learning rate, or the stretch of the cosine from LR to 0 that a whole epoch covers.
    rate: float | tuple[float, float] = LR
    part: float = 1.0
    #: Those that skip in skip steps (norms go on training then); none: every layer.
    layers: tuple[str, ...] = ()
    #: Factor of the learning rate in skip steps.
    bias_rate: float = 1.0
    #: The weights' momentum is dropped before this epoch.
    fresh: bool = False

    def lr(self, progress: float) -> float:
        if isinstance(self.rate, float):
            return self.rate
        start, end = self.rate
        return LR * 0.5 * (1 + math.cos(math.pi * min(1, start + (end - start) * progress)))

    def cost(self, r: float) -> float:
        products = multiplications()
        share = sum(products[name] for name in self.layers or products) / sum(products.values())
        return self.part * (1 - (1 - r) * share * self.steps.count("S") / len(self.steps))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run: its epochs, or as many of them with windows where a policy opens them."""

    epochs: tuple[Epoch, ...]
    gamma: bool = False
    policy: Settings | None = None

    def next(self, done: Sequence[Epoch], accuracies: Sequence[float]) -> Epoch | None:
        """The epoch to follow these, whose training accuracies are given; None at the end."""
        if len(done) == len(self.epochs):
            return None
        epoch = self.epochs[len(done)]
        if self.policy and done:
            phases = [(kind, len(list(run))) for kind, run in groupby(e.steps for e in done)]
            kind, length = phases[-1]
            skips = decide(accuracies, Phase(kind == "S", length), self.policy)
            epoch = replace(epoch, steps="S" if skips else "F")
        return epoch


def constant(letters: str, rate: float = LR, **skip: Any) -> tuple[Epoch, ...]:
    """F and S epochs at one rate; ``skip`` alters the skip epochs."""
    skip = {"steps": "S"} | skip
    return tuple(Epoch(rate=rate, **(skip if letter == "S" else {})) for letter in letters)


def cosine(letters: str, *, held: bool = False, **skip: Any) -> tuple[Epoch, ...]:
    """A cosine from LR to 0 over all epochs or, ``held``, over the full ones alone."""
    moves = [letter == "F" or not held for letter in letters]
    ends = [sum(moves[:i]) / sum(moves) for i in range(len(moves) + 1)]
    return tuple(
        replace(epoch, rate=(ends[i], ends[i + 1]))
        for i, epoch in enumerate(constant(letters, **skip))
    )


def stepped(letters: str) -> tuple[Epoch, ...]:
    """A tenth of the rate from half of the run on, a hundredth from three quarters on."""
    done = [i / len(letters) for i in range(len(letters))]
    factors = [1 if part < 0.5 else 0.1 if part < 0.75 else 0.01 for part in done]
    return tuple(
        replace(epoch, rate=LR * factor)
        for epoch, factor in zip(constant(letters), factors, strict=True)
    )


def decay(count: int = 1, start: float = 0.5, **changes: Any) -> tuple[Epoch, ...]:
    """The rest of a cosine to 0 from ``start`` on; a ``part`` of it stops on the way."""
    points = [start + (1 - start) * i / count for i in range(count + 1)]
    return tuple(Epoch(rate=(points[i], points[i + 1]), **changes) for i in range(count))


def fresh(epochs: tuple[Epoch, ...]) -> tuple[Epoch, ...]:
    """The same, the weights' momentum dropped at the end of each window."""
    before = (None, *epochs)
    return tuple(
        replace(epoch, fresh=bool(last and last.steps == "S"))
        for last, epoch in zip(before, epochs, strict=False)
    )


F8, F10, F12 = (constant("F" * count) for count in (8, 10, 12))
S, QUARTER = constant("S"), constant("S", part=0.25)
SLOW_S, SLOW_QUARTER = constant("S", LR / 2), constant("S", LR / 2, part=0.25)
LOW = {count: constant("F" * count, 0.005) for count in range(8, 13)}
EARLY = cosine("FFFSFSFSFFFF", held=True)

#: By schedule and name. What never skips is a control.
ROWS: dict[str, dict[str, tuple[Epoch, ...] | Row]] = {
    "constant 0.02": {
        **{f"F{count}": constant("F" * count) for count in range(8, 17)},
        "F8 S": F8 + S,
        "F10 S": F10 + S,
        "F12 S": F12 + S,
        "F12 SS": F12 + S + S,
        "F15 S": constant("F" * 15) + S,
        "F12, S of 0.1 epoch": F12 + constant("S", part=0.1),
        "F12, S of 0.25 epoch": F12 + QUARTER,
        "F12, S of 0.5 epoch": F12 + constant("S", part=0.5),
        "F12 S, statistics only": F12 + constant("S", bias_rate=0.0),
        "F12 S, bias rate x3": F12 + constant("S", bias_rate=3.0),
        "F12 S, gamma trains": Row(epochs=F12 + S, gamma=True),
        "F12 S, rate to 0 in S": F12 + decay(steps="S"),
        "F4 (FS)x6": constant("FFFF" + "FS" * 6),
        "F4 (SF)x6": constant("FFFF" + "SF" * 6),
        "F4 (FFS)x4": constant("FFFF" + "FFS" * 4),
        **{
            f"WUS, threshold {threshold}": Row(
                epochs=constant("F" * 16),
                policy=Settings(threshold=threshold, patience=1, max_window=2, warmup=4),
            )
            for threshold in (2, 3)
        },
    },
    "constant 0.005": {
        **{f"low F{count}": epochs for count, epochs in LOW.items()},
        **{f"low F{n} S": LOW[n] + constant("S", 0.005) for n in (8, 10, 12)},
        "low F10, S of 0.25 epoch": LOW[10] + constant("S", 0.005, part=0.25),
        "low F10 S, statistics only": LOW[10] + constant("S", 0.005, bias_rate=0.0),
    },
    "constant 0.005, decay": {
        "low F10, decay of 0.25 epoch": LOW[10] + decay(start=2 / 3, part=0.25),
        "low F10, decay": LOW[10] + decay(start=2 / 3),
    },
    "constant 0.02, decay": {
        "F8, decay": F8 + decay(),
        "F8, decay of 2": F8 + decay(2),
        "F8, decay of 3": F8 + decay(3),
        "F10, decay": F10 + decay(),
        "F12, decay": F12 + decay(),
        "F8, decay, S": F8 + decay() + SLOW_S,
        "F8, S, decay": F8 + S + decay(),
        "F8, decay, S of 0.25": F8 + decay() + SLOW_QUARTER,
        "F8, decay of 2, S of 0.25": F8 + decay(2) + SLOW_QUARTER,
        "F10, decay, S of 0.25": F10 + decay() + SLOW_QUARTER,
        "F8, decay of 2, steps FS": F8 + decay(2, steps="FS"),
        "F8, decay of 3, steps FSS": F8 + decay(3, steps="FSS"),
        "F8, decay of 2, lower half skips": F8 + decay(2, steps="S", layers=LOWER),
        "F8, decay of 2, upper half skips": F8 + decay(2, steps="S", layers=UPPER),
    },
    "constant 0.02, short decay": {
        **{f"F12, decay of {part} epoch": F12 + decay(part=part) for part in (0.1, 0.25, 0.35)},
        "F12, decay and S of 0.25": F12 + decay(part=0.25) + QUARTER,
        "F12, decay and S of 0.25, statistics only": F12
        + decay(part=0.25)
        + constant("S", part=0.25, bias_rate=0.0),
        "F12, S of 0.25, decay of 0.25": F12 + QUARTER + decay(part=0.25),
        "F4 S F4 S F4, decay of 0.25": constant("FFFFSFFFFSFFFF") + decay(part=0.25),
    },
    "cosine": {
        **{f"cosine F{count}": cosine("F" * count) for count in (8, 9, 10, 12)},
        **{f"cosine of 12, stopped at {n}": cosine("F" * 12)[:n] for n in (8, 9, 10, 11)},
        "cosine F11 S": cosine("F" * 11 + "S"),
        "cosine F10 SS": cosine("F" * 10 + "SS"),
        "cosine of 12, stopped at 10, S of 0.25": cosine("F" * 12)[:10] + SLOW_QUARTER,
        "cosine F9, then S": cosine("F" * 9) + SLOW_S,
        "cosine F9, then S of 0.25": cosine("F" * 9) + SLOW_QUARTER,
        "cosine F3 (SF)x3 F3": cosine("FFFSFSFSFFFF"),
        "cosine F3 (SF)x3 F3, held": EARLY,
        "cosine, held, gamma trains": Row(epochs=EARLY, gamma=True),
        "cosine, held, momentum dropped": fresh(EARLY),
        "cosine, held, bias rate x3": cosine("FFFSFSFSFFFF", held=True, bias_rate=3.0),
        "cosine F6 SS F3, held": cosine("FFFFFFSSFFF", held=True),
        "cosine, steps FS from 4 on": cosine("FFFFSSSSSSSS", steps="FS"),
        "cosine, steps FSS from 6 on": cosine("FFFFFFSSSSSS", steps="FSS"),
        "cosine, steps FSSS from 9 on": cosine("FFFFFFFFFSSS", steps="FSSS"),
        "cosine, lower half skips from 6 on": cosine("FFFFFFSSSSSS", layers=LOWER),
        "cosine, upper half skips from 6 on": cosine("FFFFFFSSSSSS", layers=UPPER),
        "cosine, lower half skips from 9 on": cosine("FFFFFFFFFSSS", layers=LOWER),
    },
    "steps": {
        **{f"steps F{count}": stepped("F" * count) for count in (8, 10, 12)},
        "steps, windows before drops": stepped("FFFFSSFFSFFF"),
        "steps, windows after drops": stepped("FFFFFFFSSFFS"),
    },
}
