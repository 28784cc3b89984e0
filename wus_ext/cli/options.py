"""The options of subcommands; those of a run are made from the fields of :class:`TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..methods.table import SKIPPING
from ..training.config import TrainConfig

__all__ = ["Commands", "add_checkpoint", "add_command", "add_config", "add_folder", "add_option"]

#: What ``argparse`` gives to add subcommands to.
Commands = Any

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_GROUPS = {
    "what to train": ("model", "weights", "dropout", "dataset", "method"),
    "optimisation": (
        *("epochs", "early_stop", "batch_size", "optimizer", "lr", "momentum", "weight_decay"),
        *("label_smoothing", "clip_grad_norm", "lr_warmup", "schedule", "gamma", "milestones"),
        *("amp", "channels_last", "cuda_graphs", "device", "seed", "tensorboard"),
    ),
    f"when to skip ({', '.join(SKIPPING)})": (
        *("watch", "threshold", "patience", "max_window", "warmup", "min_open", "final_window"),
        "lr_drop",
    ),
    f"how to skip ({', '.join(SKIPPING)})": (
        *("skip_layers", "full_every", "train_gamma", "bias_lr", "window_momentum"),
        *("full", "norm", "algo", "packed_budget"),
    ),
    "data": (
        *("data_dir", "download", "limit_train", "limit_test", "validation", "memory_budget"),
        *("workers", "image_size", "augment", "flip", "normalize"),
    ),
}


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[dict[str, Any]], int],
    *,
    summary: str,
    description: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Declare a subcommand; what it was given goes to ``run``, which returns the exit code."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        # What is not given stays absent, so that --resume can tell it from a contradiction.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Add an option for each field of :class:`TrainConfig` except those to ``skip``.

    Returns:
        The groups of options, by their titles.
    """
    groups: dict[str, Any] = {}
    for title, names in _GROUPS.items():
        group = groups[title] = parser.add_argument_group(title)
        for name in names:
            if name not in skip:
                add_option(group, name)
    return groups


def add_option(group: Any, name: str, default: str | None = None) -> None:
    """Add an option for a field of :class:`TrainConfig`.

    Args:
        default: what help says it is, if not the field's.
    """
    field = _FIELDS[name]
    flag = f"--{name.replace('_', '-')}"
    text = field.metadata["help"].replace("%", "%%")
    if isinstance(field.default, bool):
        yes = default or ("yes" if field.default else "no")
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, help=f"{text} (default: {yes})"
        )
        return
    options: dict[str, Any] = {"type": field.metadata.get("type", type(field.default))}
    shown: Any = field.metadata.get("unset", "all") if field.default is None else field.default
    if isinstance(field.default, tuple):
        options["nargs"] = "+"
        shown = " ".join(map(str, field.default)) or "all"
    if "choices" in field.metadata:
        options["choices"] = field.metadata["choices"]
    else:
        kinds = {int: "N", float: "X", str: "TEXT"}
        kind = "DIR" if name.endswith("_dir") else kinds[options["type"]]
        options["metavar"] = field.metadata.get("metavar", kind)
    group.add_argument(flag, help=f"{text} (default: {default or shown})", **options)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the run, or the checkpoint, to look at."""
    parser.add_argument("trained", metavar="RUN", help="folder of a run, or one of its checkpoints")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="which epoch of a run (default: best)",
    )


def add_folder(parser: argparse.ArgumentParser, default: str, where: str) -> None:
    """Add ``--out`` and ``--resume``."""
    group = parser.add_argument_group("results")
    group.add_argument("--out", metavar="DIR", help=f"folder for the results (default: {default})")
    group.add_argument(
        "--resume",
        action="store_true",
        help=f"continue {where}; the settings need not be repeated",
    )
