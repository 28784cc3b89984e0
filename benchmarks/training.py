"""The figures of docs/results.md: one command for each network.

    python benchmarks/training.py cifar10 alexnet --seeds 3 --data-dir DIR
    python benchmarks/training.py digits vgg11_bn --seeds 3

DIR holds CIFAR-10 as image files, train/<class>/* and test/<class>/*. A run that was interrupted
goes on where it stopped. ``--limit-train``, ``--limit-test`` and ``--epochs`` make it longer or
shorter than the page's. Memory is that of a step, in full epochs -> in skipped ones: what it saves
for backward and the transformed weights that it keeps; on a GPU the allocator's peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

from common import machine, table

from wus_ext.training import ConfigError, DataError, TrainConfig
from wus_ext.training.compare import CompareConfig, compare
from wus_ext.training.report import Run, targets

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


def seconds(run: Run, epochs: int | None = None) -> float:
    """Training time, of the first ``epochs`` or all, each epoch at the median of its kind.

    So it does not count whatever else the machine did.
    """
    typical = {
        kind: median(record["train_seconds"] for record in group)
        for kind in (False, True)
        if (group := [record for record in run.history if record["skipped"] == kind])
    }
    return sum(typical[record["skipped"]] for record in run.history[:epochs])


def lines(runs: Sequence[Run], target: float | None) -> list[list[str]]:
    """Means over the seeds; time is saved against the baseline of the same seed."""
    wanted = targets(runs, target)
    baseline = {run.seed: seconds(run) for run in runs if run.method == "baseline"}

    def mean(name: str, figure: Callable[[Run], float | None]) -> float | None:
        values = [figure(run) for run in runs if run.method == name]
        values = [value for value in values if value is not None]
        return fmean(values) if values else None

    def saved(run: Run) -> float:
        return 100 * (1 - seconds(run) / baseline[run.seed])

    def to_target(name: str) -> str:
        group = [run for run in runs if run.method == name]
        ends = [(run, run.epochs_to(wanted[run.model, run.seed])) for run in group]
        reached = [seconds(run, end) for run, end in ends if end]
        some = f" ({len(reached)} of {len(group)})" if len(reached) < len(group) else ""
        return f"{fmean(reached):.0f}{some}" if reached else "-"

    def memory(name: str) -> str:
        full, skip = (mean(name, lambda run, s=s: run.memory(skipped=s)) for s in (False, True))
        return " -> ".join(f"{mib:.0f}" for mib in (full, skip) if mib is not None) or "-"

    made = []
    for name in dict.fromkeys(run.method for run in runs if not run.control):
        accuracy = f"{mean(name, lambda run: run.accuracy):.1f}"
        if name == "baseline":
            made.append(["stock", accuracy, *"----", to_target(name), memory(name), *"---"])
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
                to_target(name),
                memory(name),
                f"{mean(control, saved):.0f}",
                f"{mean(control, lambda run: run.accuracy):.1f}",
                to_target(control),
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
    parser.add_argument(
        "--target", type=float, help="accuracy in %% (default: the baseline's last, less 1)"
    )
    parser.add_argument("--out", type=Path, help="default: runs/results/PROTOCOL-NETWORK")
    args = parser.parse_args()
    out = args.out or Path("runs/results") / f"{args.protocol}-{args.network}"
    try:
        resume = (out / "compare.json").exists()
        runs = compare(settings(args), out, resume=resume, target=args.target, say=print)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from here\n")
    header = [
        "method",
        "accuracy, %",
        "steps skipped, s, %",
        "skip / full step, r",
        "s (1 - r), %",
        "time saved, %",
        "to target, s",
        "memory, MiB",
        "control: time saved, %",
        "control: accuracy, %",
        "control: to target, s",
    ]
    print(f"{args.network}, {args.protocol}, {args.seeds} seeds; {machine()}\n")
    print(table(header, lines(runs, args.target)))


if __name__ == "__main__":
    main()
