"""``wus-ext`` itself: its subcommands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..training.errors import ConfigError, DataError, MissingExtra, TrainingError
from . import compare, evaluate, export, info, profile, train
from .faults import close_output, fail, lack, warnings_as_lines

__all__ = ["main", "parser"]

#: In the order of ``--help``; a new one is a file beside this one, with its ``add``.
_COMMANDS = (train, compare, evaluate, export, profile, info)


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
    given = vars(parser().parse_args(arguments))
    run: Callable[..., int] = given.pop("run")
    command: str = given.pop("command")
    try:
        with warnings_as_lines(command):
            return run(given)
    except (ConfigError, DataError, MissingExtra) as error:
        return fail(command, error, 2)
    except (OSError, TrainingError) as error:
        if isinstance(error, BrokenPipeError):
            close_output()
        return fail(command, error, 1)
    except (MemoryError, RuntimeError) as error:
        if not (reason := lack(error)):
            raise
        return fail(command, reason, 1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="wus-ext",
        description="Train image classifiers with Weight Update Skipping (arXiv 2012.02792): while "
        "the accuracy is flat, weights stay frozen, only biases train, and a step costs less.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add(commands)
    commands.metavar = f"{{{','.join(commands.choices)}}}"
    return parser
