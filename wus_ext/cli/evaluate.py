"""``wus-ext evaluate``: a checkpoint on a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training.errors import ConfigError, usable
from ..training.evaluation import evaluate_checkpoint, read_checkpoint
from ..training.files import write_atomic
from .options import Commands, add_checkpoint, add_command, add_option

__all__ = ["add"]

_WORST = 5
_PARTS = ("test", "validation", "train")
#: Settings of the run that may be others.
_SETTINGS = ("dataset", "data_dir", "download", "batch_size", "amp", "device", "workers")


def add(commands: Commands) -> None:
    """Declare the subcommand."""
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        summary="accuracy of a checkpoint, and the classes that it takes for others",
        description="Evaluate a trained network on the images that its run kept for tests, or on "
        "others. Of a folder only the part that is looked at need be there.",
        epilog="example: wus-ext evaluate runs/birds --dataset folder --data-dir more-birds",
    )
    add_checkpoint(evaluate)
    evaluate.add_argument(
        "--part", choices=_PARTS, default="test", help="of the images (default: test)"
    )
    evaluate.add_argument(
        "--worst", type=int, metavar="N", default=_WORST,
        help=f"show so many classes that are taken for others (default: {_WORST})",
    )  # fmt: skip
    evaluate.add_argument(
        "--confusion", metavar="FILE", help="write how often which class is taken for which, as CSV"
    )
    group = evaluate.add_argument_group("instead of the settings of the run")
    for name in _SETTINGS:
        add_option(group, name, default="as in training")


def _evaluate(given: dict[str, Any]) -> int:
    checkpoint = read_checkpoint(given.pop("trained"), given.pop("checkpoint"))
    part, worst, file = given.pop("part"), given.pop("worst"), given.pop("confusion", None)
    if worst < 0:
        raise ConfigError(f"worst must be at least 0, got {worst}")
    found, data = evaluate_checkpoint(checkpoint, part=part, **given)
    print(f"{checkpoint.path}, epoch {checkpoint.epoch}: {data.about}")
    print(f"accuracy {found.accuracy:.2f} %, loss {found.loss:.4f}")
    if lines := found.worst(worst):
        print("worst classes:", *(f"  {line}" for line in lines), sep="\n")
    if file is not None:
        path = Path(file).expanduser()
        with usable(path.parent):
            write_atomic(path, lambda opened: opened.write(found.table().encode()))
    return 0
