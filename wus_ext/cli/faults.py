"""What went wrong, in one line, and the exit code that says of what kind it was."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..distributed import processes
from ..training.errors import RunWarning
from ..training.launch import launched_count

__all__ = ["close_output", "fail", "interrupted", "lack", "warnings_as_lines"]


def lack(error: Exception) -> str | None:
    """What the machine lacks, if that is the reason."""
    text = str(error).strip().partition("\n")[0]
    if "DataLoader worker" in text:
        return f"a process that reads images died, for lack of memory? Use fewer --workers ({text})"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: use a smaller --batch-size ({text or type(error).__name__})"
    return None


def fail(command: str, error: Exception | str, code: int) -> int:
    """Print the line, in the first process that knows it; returns ``code``."""
    if not getattr(error, "raised_by_first", False):  # the first process says it
        rank = int(os.environ.get("RANK", 0))
        who = f" (process {rank})" if rank else ""
        print(f"wus-ext {command}{who}: error: {error}", file=sys.stderr)
    return code


@contextlib.contextmanager
def warnings_as_lines(command: str) -> Iterator[None]:
    """Warnings about the run in one line each, without the place in the code."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **to: Any) -> None:
            if issubclass(category, RunWarning):
                print(f"wus-ext {command}: warning: {message}", file=sys.stderr)
            else:
                shown(message, category, *where, **to)

        warnings.showwarning = show
        yield


def close_output() -> None:
    """Keep Python from failing once more, at its end, to write what nobody reads."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def interrupted(command: str, out: str | Path, settings: str) -> int:
    """Say how to continue what is in ``out`` if its ``settings`` were written; returns 130."""
    if processes.rank() > 0:
        return 130
    program, count = "wus-ext", os.environ.get("LOCAL_WORLD_SIZE")
    if launched_count() > 1:
        program = f"torchrun --nproc-per-node {count or launched_count()} -m wus_ext"
    hint = "before training began"
    if (Path(out).expanduser() / settings).exists():
        hint = f"continue with: {program} {command} --resume --out {shlex.quote(str(out))}"
    print(f"\ninterrupted; {hint}", file=sys.stderr)
    return 130
