"""``wus-ext export``: a trained network as a stock ``state_dict``."""

from __future__ import annotations

from typing import Any

from ..training.evaluation import read_checkpoint
from ..training.export import export_weights
from .options import Commands, add_checkpoint, add_command

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the subcommand."""
    export = add_command(
        commands,
        "export",
        _export,
        summary="weights of a run as .safetensors or .pt, for use without this package",
        description="Write the weights of a trained network under their stock names, and say how "
        "to load them.",
        epilog="example: wus-ext export runs/birds --out birds.safetensors",
    )
    add_checkpoint(export)
    export.add_argument(
        "--out",
        metavar="FILE",
        help=".safetensors or .pt (default: model.safetensors beside the checkpoint)",
    )


def _export(given: dict[str, Any]) -> int:
    checkpoint = read_checkpoint(given.pop("trained"), given.pop("checkpoint"))
    out = given.pop("out", None) or checkpoint.path.parent / "model.safetensors"
    print(*export_weights(checkpoint, out), sep="\n")
    return 0
