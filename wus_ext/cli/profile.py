"""``wus-ext profile``: what each kind of step costs on a network."""

from __future__ import annotations

from typing import Any

import torch

from ..profiling import profile
from ..training.config import TrainConfig
from ..training.errors import ConfigError
from ..training.networks import build_network
from .options import Commands, add_command

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "profile",
        _profile,
        summary="what full, frozen, skip and fused steps cost on a network, and how its layers run",
        description="Measure stock's steps and this package's on a network: time, memory, and how "
        "each layer runs.",
        epilog="example: wus-ext profile --model torchvision:mobilenet_v2 --image-size 224",
    )
    command.add_argument(
        "--model", default=TrainConfig().model, metavar="NAME",
        help="as for train: one of the six, torchvision:NAME, timm:NAME or FILE.py:FUNCTION",
    )  # fmt: skip
    command.add_argument("--image-size", type=int, default=32, metavar="PIXELS", help="default: 32")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: 16")
    command.add_argument("--classes", type=int, default=10, metavar="N", help="default: 10")
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    command.add_argument("--bf16", action="store_true", default=False, help="under autocast too")


def _profile(given: dict[str, Any]) -> int:
    for name in ("image_size", "batch_size", "classes", "rounds"):
        if given[name] < 1:
            raise ConfigError(f"{name} must be at least 1, got {given[name]}")
    size = given["image_size"]
    model = build_network(given["model"], given["classes"]).to(memory_format=torch.channels_last)
    images = torch.randn(given["batch_size"], 3, size, size)
    images = images.contiguous(memory_format=torch.channels_last)
    print(profile(model, images, rounds=given["rounds"], bf16=given["bf16"]))
    return 0
