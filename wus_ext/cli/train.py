"""``wus-ext train``: one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..distributed import processes
from ..methods.table import METHODS
from ..training.config import TrainConfig
from ..training.errors import ConfigError
from ..training.launch import launched
from ..training.progress import Progress
from ..training.runfolder import RunFolder
from ..training.trainer import Trainer
from .faults import interrupted
from .options import Commands, add_command, add_config, add_folder

__all__ = ["add"]

_RECIPES = [name for name, method in METHODS.items() if method.always]


def add(commands: Commands) -> None:
    """Declare the subcommand."""
    train = add_command(
        commands,
        "train",
        _train,
        summary="train one network",
        description="Train one network. A run folder keeps config.json, metrics.jsonl, last.pt "
        "and best.pt (best by validation accuracy, or by test accuracy without --validation).",
        epilog="example: wus-ext train --model vgg16 --dataset cifar10 --method wus --epochs 60. "
        "In several processes: torchrun --nproc-per-node 2 -m wus_ext train ...",
    )
    group = add_config(train)["what to train"]
    group.add_argument(
        "--train",
        choices=_RECIPES,
        help="what trains in fine-tuning: biases is --method biases, head is --method head "
        "(default: as --method has it)",
    )
    group.add_argument(
        "--freeze-backbone", action="store_const", const="head", help="the same as --train head"
    )
    add_folder(
        train,
        "runs/MODEL-DATASET-METHOD-seedSEED",
        "the run in --out after its last finished epoch",
    )


def _recipe(given: dict[str, Any]) -> dict[str, Any]:
    """The settings, with a recipe in the place of its one word."""
    method = given.get("method")
    for word in ("train", "freeze_backbone"):
        if (recipe := given.pop(word, None)) is None:
            continue
        if method not in (None, recipe):
            flag = f"--train {recipe}" if word == "train" else "--freeze-backbone"
            raise ConfigError(f"{flag} is --method {recipe}: leave the {method!r} out")
        method = given["method"] = recipe
    return given


def _train(given: dict[str, Any]) -> int:
    with launched(given.get("device", "auto")):
        return _train_here(given)


def _train_here(given: dict[str, Any]) -> int:
    given = _recipe(given)
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
        if progress and trainer.data.about:
            progress.say(trainer.data.about)
        try:
            trainer.run()
        except Exception:
            if not resume and not trainer.history and progress and trainer.folder:
                trainer.folder.discard()
            raise
    except KeyboardInterrupt:
        return interrupted("train", out, "config.json")
    if progress is None:
        return 0
    last, best = trainer.history[-1], trainer.history[trainer.best_epoch - 1]
    seconds = sum(record["train_seconds"] for record in trainer.history)
    if last["epoch"] < config.epochs:
        progress.say(
            f"stopped before epoch {last['epoch'] + 1} of {config.epochs}: no better validation "
            f"accuracy in {config.early_stop} epochs"
        )
    progress.say(
        f"done: test accuracy {last['test_accuracy']:.2f} % after {last['epoch']} epochs, "
        f"best epoch {best['epoch']} ({best['test_accuracy']:.2f} %), {seconds:.1f} s of training, "
        f"all in {out}"
    )
    return 0
