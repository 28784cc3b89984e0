"""Tables and the picture of the runs that share epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import BinaryIO

from branches import Kept, Missing, Record, Store
from common import table
from paper import (
    CHOICE,
    CHOICE_UNIT,
    EPOCHS,
    Entry,
    Plan,
    Skipping,
    Unit,
    settings,
)

from wus_ext.training.plot import draw
from wus_ext.training.run import Run

HEADER = ("method", "epochs", "skipped, %", "cost", "saved, %", "accuracy, %", "best, %")


def lines(entries_of_seeds: Sequence[Sequence[Entry]]) -> list[list[str]]:
    """Means over the seeds that have the entry."""
    by_method: dict[str, list[Entry]] = {}
    for entries in entries_of_seeds:
        for entry in entries:
            by_method.setdefault(entry.method, []).append(entry)
    return [
        [
            method if len(group) == len(entries_of_seeds) else f"{method} ({len(group)} seeds)",
            f"{fmean(len(entry.path) for entry in group):.0f}",
            f"{fmean(entry.skipped for entry in group):.0f}",
            f"{fmean(entry.cost for entry in group):.2f}",
            f"{fmean(100 * (1 - entry.cost / EPOCHS) for entry in group):.0f}",
            spread([entry.last for entry in group]),
            spread([entry.best for entry in group]),
        ]
        for method, group in by_method.items()
    ]


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def history(entry: Entry, full: float, skip: float) -> list[Record]:
    """As in metrics.jsonl, an epoch's time being its cost."""
    return [
        {**record, "train_seconds": skip if record["skipped"] else full} for record in entry.records
    ]


#: What the picture shows of the plan, under the names of METHODS.
SHOWN = {
    "baseline": "baseline",
    "fused": "fused",
    "WUS, ending in a window": "wus",
    "baseline in its time": "baseline in the time of wus",
    "fused in its time": "fused in the time of wus",
}


def draw_units(units: Mapping[Unit, Sequence[Entry]], file: BinaryIO) -> None:
    """The package's picture of a comparison, with costs for times."""
    runs = []
    for unit, entries in units.items():
        full, skip, _ = unit.scale.costs[unit.network]
        for entry in entries:
            if entry.method in SHOWN:
                costs = (1.0, 1.0) if entry.method.startswith("baseline") else (full, skip)
                name = f"{unit.network}, {unit.dataset}"
                runs.append(Run(name, SHOWN[entry.method], unit.seed, history(entry, *costs)))
    draw(runs, file, axis="training time (stock's full epochs)")


#: Of each run that skips, and of what competes with it: columns of the short table.
SHORT = {
    "baseline": "baseline",
    "WUS": "WUS, ending in a window",
    "fused": "fused in its time",
    "to rate 0": "fused in its time, last epoch to rate 0",
    "averaged": "fused in its time, 5 epochs averaged",
    "baseline, steps": "baseline, steps",
    "WUS+LR": "WUS+LR",
    "fused, steps": "fused, steps, in its time",
}


def short(found: Mapping[Unit, Sequence[Entry]]) -> str:
    """Accuracy after the last epoch, and in brackets the percentage of time saved."""
    rows = []
    for pair in dict.fromkeys((unit.network, unit.dataset) for unit in found):
        seeds = [entries for unit, entries in found.items() if (unit.network, unit.dataset) == pair]
        row = [*pair, str(len(seeds))]
        for method in SHORT.values():
            group = [entry for entries in seeds for entry in entries if entry.method == method]
            saved = [100 * (1 - entry.cost / EPOCHS) for entry in group]
            shown = (
                f"{spread([entry.last for entry in group])} ({fmean(saved):.0f})" if group else "-"
            )
            row.append(shown)
        rows.append(row)
    return table(["network", "dataset", "seeds", *SHORT], rows)


def report(units: Sequence[Unit], out: Path, plot: Path | None) -> None:
    """A table for each network and dataset, of what there is."""
    found = {
        unit: entries
        for unit in units
        if (entries := list(Plan(Kept(Store(out / str(unit))), unit).entries()))
    }
    for pair in dict.fromkeys((unit.network, unit.dataset) for unit in found):
        seeds = [entries for unit, entries in found.items() if (unit.network, unit.dataset) == pair]
        print(f"\n{', '.join(pair)}, {len(seeds)} seeds\n")
        print(table(list(HEADER), lines(seeds)))
    print(f"\n{short(found)}")
    if plot and found:
        plot.parent.mkdir(parents=True, exist_ok=True)
        with plot.open("wb") as file:
            draw_units(found, file)


def report_choice(out: Path) -> None:
    """The settings to choose from, by validation accuracy after the last epoch."""
    runs = Kept(Store(out / str(CHOICE_UNIT)))
    scale = CHOICE_UNIT.scale
    full, skip, _ = scale.costs["small"]
    shown = []
    for choice in (None, *CHOICE):
        for final_window in (0, 1):
            flat = scale.constant(EPOCHS)
            more = {"total_epochs": EPOCHS, "final_window": final_window}
            with suppress(Missing):
                path = (
                    runs.decided(EPOCHS, Skipping(flat, **settings(choice), **more))
                    if choice
                    else flat
                )
                skipped = sum(epoch.skip for epoch in path)
                price = full * (EPOCHS - skipped) + skip * skipped
                shown.append(
                    [
                        "baseline" if choice is None else ", ".join(f"{part:g}" for part in choice),
                        "yes" if final_window else "no",
                        f"{100 * skipped / EPOCHS:.0f}",
                        f"{100 * (1 - price / EPOCHS):.0f}",
                        f"{runs.record(path)['validation_accuracy']:.1f}",
                    ]
                )
            if choice is None:
                break
    header = ["threshold, patience, longest window", "ends in a window", "skipped, %", "saved, %"]
    print(table([*header, "validation accuracy, %"], shown))
