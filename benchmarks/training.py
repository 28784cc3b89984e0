"""The figures of docs/results.md: one command for each network.

    python benchmarks/training.py cifar10 alexnet --seeds 3 --data-dir DIR
    python benchmarks/training.py digits vgg11_bn --seeds 3

DIR holds CIFAR-10 as image files, train/<class>/* and test/<class>/*. A run that was interrupted
goes on where it stopped. ``--limit-train``, ``--limit-test`` and ``--epochs`` make it longer or
shorter than the page's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

from common import machine, table

from wus_ext.training import ConfigError, DataError, TrainConfig
from wus_ext.training.compare import CompareConfig, compare
from wus_ext.training.report import Run

NETWORKS = ("alexnet", "vgg11_bn", "vgg16_bn", "resnet18")
#: Short runs, whose accuracy still rises, and long ones, where it is flat at last.
PROTOCOLS = {
    "cifar10": {
        "dataset": "folder",
        "limit_train": 1920,
        "limit_test": 1000,
        "epochs": 10,
        "warmup": 3,
        "threshold": 4.0,
        "max_window": 2,
    },
    "digits": {
        "dataset": "digits",
        "limit_train": 640,
        "limit_test": 700,
        "epochs": 24,
        "warmup": 8,
        "threshold": 3.0,
        "max_window": 3,
    },
}
SHARED = {"batch_size": 64, "lr": 0.02, "schedule": "cosine", "patience": 1}


def settings(args: argparse.Namespace) -> CompareConfig:
    """A protocol, with what the command line replaces."""
    names = ("limit_train", "limit_test", "epochs", "data_dir")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    base = TrainConfig(**SHARED, **(PROTOCOLS[args.protocol] | given))
    return CompareConfig(base=base, models=(args.network,), seeds=args.seeds)


def seconds(run: Run) -> float:
    """Training time, each epoch at the median of its kind, whatever else the machine did."""
    kinds = [[e["train_seconds"] for e in run.history if e["skipped"] == s] for s in (False, True)]
    return sum(len(times) * median(times) for times in kinds if times)


def lines(runs: Sequence[Run]) -> list[list[str]]:
    """Means over the seeds; time is saved against the baseline of the same seed."""
    baseline = {run.seed: seconds(run) for run in runs if run.method == "baseline"}

    def mean(name: str, figure: Callable[[Run], float | None]) -> float | None:
        values = [figure(run) for run in runs if run.method == name]
        values = [value for value in values if value is not None]
        return fmean(values) if values else None

    def saved(run: Run) -> float:
        return 100 * (1 - seconds(run) / baseline[run.seed])

    made = []
    for name in dict.fromkeys(run.method for run in runs if not run.control):
        accuracy = f"{mean(name, lambda run: run.accuracy):.1f}"
        if name == "baseline":
            made.append(["stock", accuracy, *["-"] * 6])
            continue
        skipped, cost = mean(name, lambda run: run.skipped), mean(name, lambda run: run.skip_cost)
        control = f"baseline in the time of {name}"
        made.append(
            [
                name.upper(),
                accuracy,
                f"{skipped:.0f}",
                "-" if cost is None else f"{cost:.2f}",
                "-" if cost is None else f"{skipped * (1 - cost):.0f}",
                f"{mean(name, saved):.0f}",
                f"{mean(control, saved):.0f}",
                f"{mean(control, lambda run: run.accuracy):.1f}",
            ]
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data-dir", help="for cifar10")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--out", type=Path, help="default: runs/results/PROTOCOL-NETWORK")
    args = parser.parse_args()
    out = args.out or Path("runs/results") / f"{args.protocol}-{args.network}"
    try:
        runs = compare(settings(args), out, resume=(out / "compare.json").exists(), say=print)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from here\n")
    header = [
        "method",
        "accuracy, %",
        "epochs skipped, s, %",
        "skip / full step, r",
        "s (1 - r), %",
        "time saved, %",
        "control: time saved, %",
        "control: accuracy, %",
    ]
    print(f"{args.network}, {args.protocol}, {args.seeds} seeds; {machine()}\n")
    print(table(header, lines(runs)))


if __name__ == "__main__":
    main()
