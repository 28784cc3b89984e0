"""The command lines of the examples beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def options(about: str, given: Sequence[str] | None = None, **defaults: Any) -> argparse.Namespace:
    """An option for each default, by its name and of its type; False is a flag.

    Args:
        about: its first line is for --help.
        given: instead of the arguments of the process.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    for name, default in defaults.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            kind = type(default) if default is not None else str
            parser.add_argument(f"--{name}", type=kind, default=default, help=f"({default})")
    return parser.parse_args(given)
