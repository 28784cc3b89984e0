"""``wus-ext compare``: the paper's table, for the user's machine."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..methods.table import METHODS
from ..training.compare import CompareConfig, compare, read_compare
from ..training.config import TrainConfig
from ..training.errors import ConfigError
from ..training.launch import launched_count
from .faults import interrupted
from .options import Commands, add_command, add_config, add_folder

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the subcommand."""
    comparison = add_command(
        commands,
        "compare",
        _compare,
        summary="train networks with several methods and tabulate accuracy and time",
        description="Train the same networks, from the same weights and in the same data order, "
        "with each method, and tabulate accuracy, time and skipped epochs. The methods take turns, "
        "an epoch each; times are wall-clock times, so leave the machine alone. --schedule applies "
        "to all methods alike: wus ignores jumps of the learning rate, wus+lr reopens weight "
        "updates at a jump. The baseline always runs.",
        epilog="example: wus-ext compare --models alexnet vgg11 --dataset cifar10 --seeds 3",
    )
    comparison.add_argument(
        "--models", nargs="+", metavar="MODEL",
        help="networks, as for train --model (default: vgg11)",
    )  # fmt: skip
    comparison.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"methods, of {', '.join(METHODS)} (default: baseline wus wus+lr)",
    )  # fmt: skip
    comparison.add_argument(
        "--seeds", type=int, metavar="N",
        help="runs of each, seeds 0 to N - 1; --resume may add some (default: 1)",
    )  # fmt: skip
    comparison.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        help="also train the baseline for only the time that each method took: does skipping beat "
        "training less? (default: yes)",
    )
    comparison.add_argument(
        "--target", type=float, metavar="X",
        help="also tell when the test accuracy reached this many percent (default: the baseline's "
        "last accuracy less 1)",
    )  # fmt: skip
    add_config(comparison, skip=("model", "method", "seed", "early_stop"))
    add_folder(comparison, "runs/compare-DATASET", "the comparison in --out where it stopped")


def _compare(given: dict[str, Any]) -> int:
    if launched_count() > 1:
        raise ConfigError("compare times one process; start it without torchrun")
    out, resume = given.pop("out", None), given.pop("resume", False)
    target = given.pop("target", None)
    own = {
        name: given.pop(name) for name in ("models", "methods", "seeds", "control") if name in given
    }
    own |= {name: tuple(own[name]) for name in ("models", "methods") if name in own}
    if resume:
        if out is None:
            raise ConfigError("--resume needs --out, the folder of the comparison")
        saved = read_compare(out)
        config = dataclasses.replace(saved, base=saved.base.replace(**given), **own)
    else:
        config = CompareConfig(base=TrainConfig(**given), **own)
        out = out or Path("runs") / f"compare-{config.base.dataset}"
    config.validate()
    try:
        compare(config, out, resume=resume, target=target, say=_say)
    except KeyboardInterrupt:
        return interrupted("compare", out, "compare.json")
    print(f"all in {out}: table.md, table.csv, plot.png")
    return 0


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)
