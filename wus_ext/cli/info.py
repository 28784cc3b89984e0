"""``wus-ext info``: what is here."""

from __future__ import annotations

from typing import Any

import torch

from .. import packed_bytes, set_skip
from .._machine import describe
from ..training.config import TrainConfig
from ..training.methods import build_model
from ..training.networks import MODELS
from .options import Commands, add_command

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Declare the subcommand."""
    add_command(
        commands,
        "info",
        _info,
        summary="show versions, devices and how the extension was built",
        description="Show versions, devices and how the extension was built.",
    )


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
