"""Dataclasses of settings as plain values: written to JSON, read back with every value checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError

__all__ = ["check_type", "check_types", "differences", "from_plain", "reading", "to_plain"]

Settings = TypeVar("Settings")

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def check_type(name: str, value: Any, hint: Any, *, several: str = "values") -> None:
    """Check one value that came from outside.

    Args:
        name: what the error calls it.
        hint: bool, int, float, str, a tuple of any number of one of them, or one of these or None.
            An int is no bool and fits into 64 bits, a float may be given as an int.
        several: what the error calls the values of a tuple.

    Raises:
        ConfigError: naming the value and what it must be.

    >>> check_type("seed", 3, int)
    >>> check_type("train_gamma", "no", bool)
    Traceback (most recent call last):
    wus_ext.training.errors.ConfigError: train_gamma must be true or false, got 'no'
    """
    if isinstance(hint, types.UnionType):
        hints = [part for part in get_args(hint) if part is not type(None)]
        if value is not None:
            check_type(name, value, hints[0], several=several)
    elif get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        if not isinstance(value, list | tuple) or not all(_is_a(kind, item) for item in value):
            raise ConfigError(f"{name} must be a tuple of {several}, got {value!r}")
    elif not _is_a(hint, value):
        raise ConfigError(f"{name} must be {_NAMES.get(hint, hint)}, got {value!r}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name} must fit into 64 bits, got {value}")


def _is_a(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def check_types(settings: Any) -> None:
    """Check that every field of a dataclass has the type that it is annotated with.

    Raises:
        ConfigError: naming the first that has not.
    """
    for field in dataclasses.fields(settings):
        several = f"{field.metadata.get('metavar', 'value')}s".lower()
        hint = _hints(type(settings))[field.name]
        check_type(field.name, getattr(settings, field.name), hint, several=several)


def to_plain(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass, ready for JSON."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def from_plain(cls: type[Settings], values: Any) -> Settings:
    """The inverse of :func:`to_plain`; a field that is not there has its default.

    Raises:
        ConfigError: a name is no field, or a value has not the field's type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"settings must be names with values, got {type(values).__name__}")
    unknown = sorted(map(str, values.keys() - _hints(cls).keys()))
    if unknown:
        raise ConfigError(f"unknown setting: {', '.join(unknown)}")
    settings = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    check_types(settings)
    return settings


def differences(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    where: tuple[str, str],
    *,
    ignore: Collection[str] = (),
) -> list[str]:
    """What two sets of plain settings do not agree on, as text.

    >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0}, ("there", "here"))
    ['lr is 0.1 there, 0.2 here']
    """
    return [
        f"{name} is {first[name]!r} {where[0]}, {second[name]!r} {where[1]}"
        for name in first
        if name not in ignore and first[name] != second[name]
    ]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[dict[str, Any]]:
    """The values in a JSON file; what goes wrong inside is an error that names the file.

    Raises:
        ConfigError: it holds something else, or the block raises a ConfigError or KeyError.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ConfigError(f"expected names with values, got {type(values).__name__}")
        yield values
    except KeyError as error:
        raise ConfigError(f"{path} is not readable: it lacks {error}") from error
    except (ConfigError, OSError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not readable: {error}") from error


_hints: Callable[[type], dict[str, Any]] = functools.cache(get_type_hints)
