"""The figures of docs/results.md.

    python benchmarks/training.py choose --data-dir DIRS
    python benchmarks/training.py paper --networks vgg11_bn --seeds 3 --data-dir DIRS
    python benchmarks/training.py paper --device cuda --data-dir DIRS
    python benchmarks/training.py paper --report
    python benchmarks/training.py cifar10 alexnet --seeds 3 --data-dir DIR
    python benchmarks/training.py digits vgg11_bn --seeds 3

``choose`` and ``paper`` train runs that share epochs (paper.py), and compute their times from the
cost of steps; the others are timed by the clock. DIRS holds cifar10 and cifar100, DIR is one of
them: image files, train/<class>/* and test/<class>/*. A run that was interrupted goes on where it
stopped, and several processes with the same ``paper`` command share the work. Roundings, and so
single accuracies, depend on the number of threads: ``paper`` had one (OMP_NUM_THREADS=1).

By the clock: ``--limit-train``, ``--limit-test`` and ``--epochs`` make it longer or shorter than
the page's. Times are training times, each epoch at the median of its kind in the run. Memory is
that of a step, in full epochs -> in skipped ones: what it saves for backward and the transformed
weights that it keeps; on a GPU the allocator's peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import paper
import paper_tables
from common import machine, table

from wus_ext.methods.table import BASELINE, SKIPPING
from wus_ext.training import ConfigError, DataError, TrainConfig
from wus_ext.training.compare import CompareConfig, compare
from wus_ext.training.report import targets
from wus_ext.training.run import Run

NETWORKS = ("alexnet", "vgg11_bn", "vgg16_bn", "resnet18")
#: Accuracy that rises through most of a run, and one that is flat for most of it; the policy is
#: the library's default.
PROTOCOLS = {
    "cifar10": {"dataset": "folder", "limit_train": 960, "limit_test": 1000, "epochs": 16},
    "digits": {"dataset": "digits", "limit_train": 512, "limit_test": 700, "epochs": 24},
}
SHARED = {"batch_size": 64, "lr": 0.02, "schedule": "cosine", "full": "fused"}


def settings(args: argparse.Namespace) -> CompareConfig:
    """A protocol, with what the command line replaces."""
    names = ("limit_train", "limit_test", "epochs", "data_dir")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    base = TrainConfig(**SHARED, **(PROTOCOLS[args.protocol] | given))
    return CompareConfig(
        base=base, models=(args.network,), methods=(BASELINE, "fused", *SKIPPING), seeds=args.seeds
    )


def step_medians(run: Run) -> dict[bool, float]:
    """Median seconds of a skip step and of a full one."""
    groups: dict[bool, list[float]] = {}
    for record in run.history:
        groups.setdefault(record["skipped"], []).append(record["step_seconds"])
    return {kind: median(times) for kind, times in groups.items()}


class Table:
    """Means over the seeds; times against the baseline of the same seed."""

    HEADER = (
        "method",
        "accuracy, %",
        "full step, f",
        "skip step, r",
        "steps skipped, s, %",
        "1 - f (1 - s) - r s, %",
        "time saved, %",
        "to target, s",
        "memory, MiB",
    )

    def __init__(self, runs: Sequence[Run], target: float | None) -> None:
        self.runs = runs
        self.targets = targets(runs, target)
        self.baseline = {run.seed: run for run in runs if run.method == BASELINE}

    def lines(self) -> list[list[str]]:
        """A line for each method, its controls behind it."""
        methods = list(dict.fromkeys(run.method for run in self.runs if not run.control))
        controls = list(dict.fromkeys(run.method for run in self.runs if run.control))
        ordered = [
            name
            for method in methods
            for name in (method, *(c for c in controls if c.endswith(f" in the time of {method}")))
        ]
        return [self._line(name) for name in ordered]

    def _line(self, name: str) -> list[str]:
        group = [run for run in self.runs if run.method == name]
        steps = [self._steps(run) for run in group]
        full, skip = (mean([step.get(kind) for step in steps]) for kind in (False, True))
        skipped = mean([run.skipped for run in group])
        predicted = 100 - full * (100 - skipped) - (skip or 0.0) * skipped
        saved = mean([100 * (1 - run.typical_seconds() / self._stock(run)) for run in group])
        accuracies = [run.accuracy for run in group]
        spread = f" ± {stdev(accuracies):.1f}" if len(group) > 1 else ""
        return [
            name,
            f"{fmean(accuracies):.1f}{spread}",
            f"{full:.2f}",
            "-" if skip is None else f"{skip:.2f}",
            f"{skipped:.0f}",
            f"{predicted:.0f}",
            f"{saved:.0f}",
            self._to_target(group),
            self._memory(group),
        ]

    def _stock(self, run: Run) -> float:
        return self.baseline[run.seed].typical_seconds()

    def _steps(self, run: Run) -> dict[bool, float]:
        """A full and a skip step in stock's full steps."""
        stock = step_medians(self.baseline[run.seed])[False]
        return {kind: time / stock for kind, time in step_medians(run).items()}

    def _to_target(self, group: Sequence[Run]) -> str:
        ends = [(run, run.epochs_to(self.targets[run.model, run.seed])) for run in group]
        reached = [run.typical_seconds(end) for run, end in ends if end]
        some = f" ({len(reached)} of {len(group)})" if len(reached) < len(group) else ""
        return f"{fmean(reached):.0f}{some}" if reached else "-"

    def _memory(self, group: Sequence[Run]) -> str:
        peaks = [mean([run.memory(skipped=kind) for run in group]) for kind in (False, True)]
        return " -> ".join(f"{mib:.0f}" for mib in peaks if mib is not None) or "-"


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    values = [value for value in values if value is not None]
    return fmean(values) if values else None


def _add_clock_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data-dir", help="for cifar10")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument(
        "--target", type=float, help="accuracy in %% (default: the baseline's last, less 1)"
    )
    parser.add_argument("--out", type=Path, help="default: runs/results/PROTOCOL-NETWORK")
    parser.set_defaults(run=clock)


def _add_shared_arguments(commands: Any) -> None:
    chosen = commands.add_parser("choose", help="the policy's settings, on validation images")
    shared = commands.add_parser("paper", help="both methods, both datasets, and their rivals")
    for command, run in ((chosen, choose_settings), (shared, train_paper)):
        command.add_argument("--data-dir", type=Path, help="holds cifar10 and cifar100")
        command.add_argument("--out", type=Path, default=Path("runs/results/shared"))
        command.add_argument("--report", action="store_true", help="only tables, of what there is")
        command.set_defaults(run=run)
    networks = ("small", *NETWORKS)
    shared.add_argument("--networks", nargs="+", choices=networks, default=list(NETWORKS))
    shared.add_argument("--datasets", nargs="+", choices=paper.DATASETS, default=paper.DATASETS)
    shared.add_argument("--seeds", type=int, default=1)
    shared.add_argument("--device", choices=paper.SCALES, default="cpu", help="and so the scale")
    shared.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")


def train_paper(args: argparse.Namespace) -> None:
    costs = paper.SCALES[args.device].costs
    if unknown := [network for network in args.networks if network not in costs]:
        raise ConfigError(
            f"--networks {' '.join(unknown)}: their steps have no cost on --device {args.device}; "
            f"there are {', '.join(costs)}"
        )
    units = [
        paper.Unit(network, dataset, seed, args.device)
        for seed in range(args.seeds)
        for network in args.networks
        for dataset in args.datasets
    ]
    if not args.report:
        paper.train(units, _data_dir(args), args.out)
    paper_tables.report(units, args.out, args.plot)


def choose_settings(args: argparse.Namespace) -> None:
    if not args.report:
        paper.train([paper.CHOICE_UNIT], _data_dir(args), args.out)
    paper_tables.report_choice(args.out)


def _data_dir(args: argparse.Namespace) -> Path:
    if args.data_dir is None:
        raise ConfigError("--data-dir is needed to train; --report shows what there is")
    return args.data_dir


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="protocol", required=True)
    for name in PROTOCOLS:
        _add_clock_arguments(commands.add_parser(name))
    _add_shared_arguments(commands)
    args = parser.parse_args()
    try:
        args.run(args)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from here\n")


def clock(args: argparse.Namespace) -> None:
    out = args.out or Path("runs/results") / f"{args.protocol}-{args.network}"
    resume = (out / "compare.json").exists()
    runs = compare(settings(args), out, resume=resume, target=args.target, say=print)
    print(f"{args.network}, {args.protocol}, {args.seeds} seeds; {machine()}\n")
    print(table(list(Table.HEADER), Table(runs, args.target).lines()))


if __name__ == "__main__":
    main()
