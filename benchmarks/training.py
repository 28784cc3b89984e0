"""The figures of docs/results.md: one command for each network.

    python benchmarks/training.py cifar10 alexnet --seeds 3 --data-dir DIR
    python benchmarks/training.py digits vgg11_bn --seeds 3

DIR holds CIFAR-10 as image files, train/<class>/* and test/<class>/*. A run that was interrupted
goes on where it stopped. ``--limit-train``, ``--limit-test`` and ``--epochs`` make it longer or
shorter than the page's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

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


def paired(runs: Sequence[Run]) -> list[list[str]]:
    """Each method against the baseline and against its control, seed by seed, then averaged.

    ``s (1 - r)`` is what a fraction s of skipped epochs saves when a skip step costs r of a full
    step; the clock should agree with it.
    """
    by_name = {(run.method, run.seed): run for run in runs}
    lines = []
    for method in dict.fromkeys(run.method for run in runs if not run.control):
        if method == "baseline":
            continue
        mine = [run for run in runs if run.method == method]
        stock = [by_name["baseline", run.seed] for run in mine]
        control = [by_name[f"baseline in the time of {method}", run.seed] for run in mine]
        predicted = [run.skipped * (1 - run.skip_cost) for run in mine if run.skip_cost]
        lines.append(
            [
                method,
                f"{fmean(predicted):.0f}" if predicted else "-",
                f"{fmean(_saved(run, base) for run, base in zip(mine, stock, strict=True)):.0f}",
                f"{fmean(_saved(run, base) for run, base in zip(control, stock, strict=True)):.0f}",
                _difference(mine, stock),
                _difference(mine, control),
            ]
        )
    return lines


def _saved(run: Run, baseline: Run) -> float:
    return 100 * (1 - run.seconds / baseline.seconds)


def _difference(runs: Sequence[Run], others: Sequence[Run]) -> str:
    points = [a.accuracy - b.accuracy for a, b in zip(runs, others, strict=True)]
    spread = f" ({min(points):+.1f} to {max(points):+.1f})" if len(points) > 1 else ""
    return f"{fmean(points):+.1f}{spread}"


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
        "s (1 - r), %",
        "time saved, %",
        "its control saved, %",
        "accuracy - stock's, points",
        "accuracy - control's, points",
    ]
    print(machine())
    print()
    print(table(header, paired(runs)))


if __name__ == "__main__":
    main()
