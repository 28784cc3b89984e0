"""The command ``wus-ext``: a file for each subcommand."""

from .command import main, parser

__all__ = ["main", "parser"]
