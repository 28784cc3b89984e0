"""The command ``wus-ext``: train, compare, info."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import packed_bytes, set_skip
from ._machine import describe
from .distributed import processes
from .methods.table import METHODS, SKIPPING
from .training.compare import CompareConfig, compare, read_compare
from .training.config import MODELS, TrainConfig
from .training.errors import ConfigError, DataError, MissingExtra, RunWarning, TrainingError
from .training.launch import launched, launched_count
from .training.methods import build_model
from .training.progress import Progress
from .training.runfolder import RunFolder
from .training.trainer import Trainer

__all__ = ["main"]

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_GROUPS = {
    "what to train": ("model", "dropout", "dataset", "method"),
    "optimisation": (
        *("epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "gamma"),
        *("milestones", "amp", "channels_last", "cuda_graphs", "device", "seed"),
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
        "workers",
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 is success, 1 a training that failed or cannot be stored, 2 bad arguments or data or a folder
    that another run uses, 130 an interrupt.

    Args:
        arguments: instead of those of the process, without the program's name.
    """
    given = vars(_parser().parse_args(arguments))
    run: Callable[..., int] = given.pop("run")
    command: str = given.pop("command")
    try:
        with _warnings_as_lines(command):
            return run(given)
    except (ConfigError, DataError, MissingExtra) as error:
        return _fail(command, error, 2)
    except (OSError, TrainingError) as error:
        if isinstance(error, BrokenPipeError):
            _close_output()
        return _fail(command, error, 1)
    except (MemoryError, RuntimeError) as error:
        if not (reason := _lack(error)):
            raise
        return _fail(command, reason, 1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _lack(error: Exception) -> str | None:
    """What the machine lacks, if that is the reason."""
    text = str(error).strip().partition("\n")[0]
    if "DataLoader worker" in text:
        return f"a process that reads images died, for lack of memory? Use fewer --workers ({text})"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: use a smaller --batch-size ({text or type(error).__name__})"
    return None


def _fail(command: str, error: Exception | str, code: int) -> int:
    if not getattr(error, "raised_by_first", False):  # the first process says it
        rank = int(os.environ.get("RANK", 0))
        who = f" (process {rank})" if rank else ""
        print(f"wus-ext {command}{who}: error: {error}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _warnings_as_lines(command: str) -> Iterator[None]:
    """Warnings about the run in one line each, without the place in the code."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **to: Any) -> None:
            if issubclass(category, RunWarning):
                print(f"wus-ext {command}: warning: {message}", file=sys.stderr)
            else:
                shown(message, category, *where, **to)

        warnings.showwarning = show
        yield


def _close_output() -> None:
    """Keep Python from failing once more, at its end, to write what nobody reads."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _train(given: dict[str, Any]) -> int:
    with launched(given.get("device", "auto")):
        return _train_here(given)


def _train_here(given: dict[str, Any]) -> int:
    out, resume = given.pop("out", None), given.pop("resume", False)
    if resume:
        if out is None:
            raise ConfigError("--resume needs --out, the folder of the run")
        config = processes.from_first(RunFolder(out).read_config).replace(**given)
    else:
        config = TrainConfig(**given)
        config.validate()
        out = out or Path("runs") / config.run_name()
    progress = Progress() if processes.rank() == 0 else None
    try:
        trainer = Trainer(config, out=out, resume=resume, progress=progress)
        try:
            trainer.run()
        except Exception:
            if not resume and not trainer.history and progress and trainer.folder:
                trainer.folder.discard()
            raise
    except KeyboardInterrupt:
        return _interrupted("train", out, "config.json")
    if progress is None:
        return 0
    last, best = trainer.history[-1], trainer.history[trainer.best_epoch - 1]
    seconds = sum(record["train_seconds"] for record in trainer.history)
    progress.say(
        f"done: test accuracy {last['test_accuracy']:.2f} % after {last['epoch']} epochs, "
        f"best epoch {best['epoch']} ({best['test_accuracy']:.2f} %), {seconds:.1f} s of training, "
        f"all in {out}"
    )
    return 0


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
        return _interrupted("compare", out, "compare.json")
    print(f"all in {out}: table.md, table.csv, plot.png")
    return 0


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _interrupted(command: str, out: str | Path, settings: str) -> int:
    if processes.rank() > 0:
        return 130
    program, count = "wus-ext", os.environ.get("LOCAL_WORLD_SIZE")
    if launched_count() > 1:
        program = f"torchrun --nproc-per-node {count or launched_count()} -m wus_ext"
    hint = "before training began"
    if (Path(out).expanduser() / settings).exists():
        hint = f"continue with: {program} {command} --resume --out {shlex.quote(str(out))}"
    print(f"\ninterrupted; {hint}", file=sys.stderr)
    return 130


def _info(given: dict[str, Any]) -> int:
    for name, value in describe().items():
        print(f"{name}: {value}")
    costs = ", ".join(f"{name} {_packed_mib(name)} MiB" for name in MODELS)
    print(f"transformed weights in a skip window (CPU, float32, --algo auto): {costs}")
    return 0


def _packed_mib(name: str) -> int:
    """What a network's transformed weights take, found by running one skip step forward."""
    model = build_model(TrainConfig(model=name), 10).to(memory_format=torch.channels_last)
    set_skip(model, True)
    model(torch.zeros(2, 3, 32, 32))
    return round(packed_bytes(model) / 2**20)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wus-ext",
        description="Train image classifiers with Weight Update Skipping (arXiv 2012.02792): while "
        "the accuracy is flat, weights stay frozen, only biases train, and a step costs less.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,compare,info}")

    train = _add(
        commands,
        "train",
        _train,
        "train one network",
        "Train one network. A run folder keeps config.json, metrics.jsonl, last.pt and best.pt "
        "(best by validation accuracy, or by test accuracy without --validation).",
        "example: wus-ext train --model vgg16 --dataset cifar10 --method wus --epochs 60. In "
        "several processes: torchrun --nproc-per-node 2 -m wus_ext train ...",
    )
    _add_config(train, skip=())
    _add_folder(
        train,
        "runs/MODEL-DATASET-METHOD-seedSEED",
        "the run in --out after its last finished epoch",
    )

    comparison = _add(
        commands,
        "compare",
        _compare,
        "train networks with several methods and tabulate accuracy and time",
        "Train the same networks, from the same weights and in the same data order, with each "
        "method, and tabulate accuracy, time and skipped epochs. The methods take turns, an epoch "
        "each; times are wall-clock times, so leave the machine alone. --schedule applies to all "
        "methods alike: wus ignores jumps of the learning rate, wus+lr reopens weight updates at "
        "a jump. The baseline always runs.",
        "example: wus-ext compare --models alexnet vgg11 --dataset cifar10 --seeds 3",
    )
    comparison.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="MODEL",
        help=f"networks, of {', '.join(MODELS)} (default: vgg11)",
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
    _add_config(comparison, skip=("model", "method", "seed"))
    _add_folder(comparison, "runs/compare-DATASET", "the comparison in --out where it stopped")

    _add(
        commands,
        "info",
        _info,
        "show versions, devices and how the extension was built",
        "Show versions, devices and how the extension was built.",
        None,
    )
    return parser


def _add(
    commands: Any,
    name: str,
    run: Callable[..., int],
    summary: str,
    description: str,
    epilog: str | None,
) -> argparse.ArgumentParser:
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


def _add_config(parser: argparse.ArgumentParser, skip: Sequence[str]) -> None:
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in skip:
                _add_option(group, name)


def _add_option(group: Any, name: str) -> None:
    field = _FIELDS[name]
    flag = f"--{name.replace('_', '-')}"
    text = field.metadata["help"].replace("%", "%%")
    if isinstance(field.default, bool):
        yes = "yes" if field.default else "no"
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
    group.add_argument(flag, help=f"{text} (default: {shown})", **options)


def _add_folder(parser: argparse.ArgumentParser, default: str, where: str) -> None:
    group = parser.add_argument_group("results")
    group.add_argument("--out", metavar="DIR", help=f"folder for the results (default: {default})")
    group.add_argument(
        "--resume",
        action="store_true",
        help=f"continue {where}; the settings need not be repeated",
    )
