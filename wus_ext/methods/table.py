"""Every training method, a row each: its names, its colour, and who decides when to skip.

A new method is a file beside this one, with a class that is a :class:`Policy`, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..conversion.selection import Layers
from .always import AlwaysSkip
from .policy import WUS, WUSLR

__all__ = ["BASELINE", "METHODS", "SKIPPING", "Method", "Policy"]

#: What everything is measured against.
BASELINE = "baseline"


class Policy(Protocol):
    """Decides before each epoch whether it skips weight updates, and switches the model."""

    #: What skips, as for :func:`wus_ext.set_skip`.
    layers: Layers | None

    @property
    def skipping(self) -> bool:
        """Whether the next epoch skips weight updates."""

    def step(self, accuracy: float) -> bool:
        """After an epoch, and after the learning rate was set for the next: decide for that."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Args:
        name: on the command line, in files and in tables.
        label: in pictures.
        colour: there; of Okabe and Ito's palette, which colour-blind readers can tell apart.
        about: what it is, for ``--help``.
        build: makes the policy from (model, scheduler or None, lr_drop=, layers=, and the fields
            of :class:`~wus_ext.methods.rules.Settings`); None: weights train in every epoch.
        converts: whether the model is converted at all.
        full: ``convert``'s setting of that name, where the method and not the user decides it.
        norm: the same for its setting of that name.
        needs_schedule: whether it makes sense only with a learning rate that changes.
        always: whether every epoch skips, so that there are no windows.
    """

    name: str
    label: str
    colour: str
    about: str
    build: Callable[..., Policy] | None = None
    converts: bool = True
    full: str | None = None
    norm: str | None = None
    needs_schedule: bool = False
    always: bool = False


def _wus(model: nn.Module, scheduler: Any, *, lr_drop: float, **settings: Any) -> Policy:
    return WUS(model, **settings)


def _wus_lr(model: nn.Module, scheduler: Any, **settings: Any) -> Policy:
    return WUSLR(model, scheduler, step_scheduler=False, **settings)


def _biases(model: nn.Module, scheduler: Any, *, layers: Any, **settings: Any) -> Policy:
    return AlwaysSkip(model, layers=layers)


def _head(model: nn.Module, scheduler: Any, *, layers: Any, **settings: Any) -> Policy:
    return AlwaysSkip(model, layers=layers, skip_biases=True)


_ROWS = (
    Method(
        name=BASELINE,
        label="baseline",
        colour="#333333",
        about="stock PyTorch",
        converts=False,
    ),
    Method(
        name="fused",
        label="fused",
        colour="#009E73",
        about="no skipping, but full steps on the skip step's kernels",
        full="fused",
    ),
    Method(
        name="wus",
        label="WUS",
        colour="#0072B2",
        about="Weight Update Skipping",
        build=_wus,
    ),
    Method(
        name="wus+lr",
        label="WUS+LR",
        colour="#D55E00",
        about="the same, but a jump of the learning rate reopens weight updates",
        build=_wus_lr,
        needs_schedule=True,
    ),
    Method(
        name="biases",
        label="biases",
        colour="#CC79A7",
        about="biases and the last layer alone train, in every step (fine-tuning)",
        build=_biases,
        always=True,
    ),
    Method(
        name="head",
        label="last layer",
        colour="#E69F00",
        about="the last layer alone trains, statistics of batch norm stand still (fine-tuning)",
        build=_head,
        norm="frozen",
        always=True,
    ),
)
#: By name, in the order of tables and pictures.
METHODS = {method.name: method for method in _ROWS}
#: Those that open windows.
SKIPPING = tuple(name for name, method in METHODS.items() if method.build and not method.always)
