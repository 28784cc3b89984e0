"""Several processes: how many there are, and what they tell each other. One needs no set-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def count(group: Any = None) -> int:
    """Processes of ``group`` (by default all): 1 unless torch.distributed was initialised."""
    return dist.get_world_size(group) if _initialised() else 1


def rank() -> int:
    """This process's number, from 0; 0 unless torch.distributed was initialised."""
    return dist.get_rank() if _initialised() else 0


def gather(value: Value, group: Any = None) -> list[Value]:
    """The values of all processes, by rank; every process must call.

    Args:
        value: anything that pickles.
        group: the processes, by default all.

    >>> from wus_ext.distributed import processes
    >>> processes.gather(3)
    [3]
    """
    if count(group) == 1:
        return [value]
    values: list[Any] = [None] * count(group)
    dist.all_gather_object(values, value, group=group)
    return values


def mean(value: Any, check: Callable[[Any], float], group: Any = None) -> float:
    """The mean of ``check(value)`` over the processes; every process must call.

    Raises:
        TypeError, ValueError: what ``check`` raised in any process, in every process.

    >>> from wus_ext.distributed import processes
    >>> processes.mean("2.5", float)
    2.5
    """
    if count(group) == 1:
        return check(value)
    try:
        mine: Any = check(value)
    except (TypeError, ValueError) as error:
        mine = error
    values = gather(mine, group)
    if isinstance(mine, Exception):
        raise mine
    for process, given in enumerate(values):
        if isinstance(given, Exception):
            raise type(given)(f"process {process}: {given}")
    # The mean of equal numbers is that number, without rounding.
    return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)


def from_first(make: Callable[[], Value]) -> Value:
    """What ``make()`` returns in the first process, which alone runs it; every process must call.

    Raises:
        Exception: what ``make()`` raised, in every process; elsewhere than in the first with an
            attribute ``raised_by_first`` that is True.
    """
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].raised_by_first = rank() > 0
        raise outcome[1]
    return outcome[0]


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
