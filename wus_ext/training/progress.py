"""What a user sees of a run: a bar per epoch on a terminal, a line per epoch anywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from .loop import Totals

__all__ = ["Progress"]

_REFRESH_SECONDS = 1.0


class Progress:
    """Prints the course of a run.

    Args:
        label: begins every line, for telling runs apart.
        out: where the lines go; ``sys.stdout`` by default.
        err: where the bar goes if it is a terminal; ``sys.stderr`` by default.
    """

    def __init__(
        self, label: str = "", *, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.label = f"{label}  " if label else ""
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print one line."""
        print(self.label + text, file=self.out, flush=True)

    def begin(
        self, epoch: int, epochs: int, steps: int, skipped: bool
    ) -> Callable[[Totals], None] | None:
        """Show a new bar; returns what to call after each step, or ``None`` without a terminal."""
        tqdm = _tqdm() if self.err.isatty() else None
        if tqdm is None:
            return None
        bar = self._bar = tqdm(
            total=steps,
            desc=f"{self.label}epoch {epoch}/{epochs}, weights {_weights(skipped)}",
            unit="step",
            leave=False,
            file=self.err,
            dynamic_ncols=True,
        )
        start = shown = time.perf_counter()

        def on_step(totals: Totals) -> None:
            nonlocal shown
            bar.update()
            now = time.perf_counter()
            # Reading the sums waits for the device, so it must stay rare.
            if now - shown >= _REFRESH_SECONDS:
                shown = now
                loss, accuracy = totals.read()
                rate = totals.images / (now - start)
                bar.set_postfix_str(f"loss {loss:.3f}, {accuracy:.1f} %, {rate:.0f} images/s")

        return on_step

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def end(self, record: dict[str, Any], epochs: int) -> None:
        """Print the line of a finished epoch."""
        self.close()
        width = len(str(epochs))
        parts = [
            f"epoch {record['epoch']:>{width}}/{epochs}",
            f"loss {record['train_loss']:.3f}",
            f"train {record['train_accuracy']:5.1f} %",
        ]
        if record["validation_accuracy"] is not None:
            parts.append(f"validation {record['validation_accuracy']:5.1f} %")
        parts += [
            f"test {record['test_accuracy']:5.1f} %",
            f"lr {record['lr']:.4g}",
            f"{record['train_seconds']:.1f} s",
            f"{record['images_per_second']:.0f} images/s",
            f"weights {_weights(record['skipped'])}",
        ]
        if record["packed_bytes"]:
            parts.append(f"{record['packed_bytes'] / 2**20:.0f} MiB of transformed weights")
        self.say("  ".join(parts))


def _weights(skipped: bool) -> str:
    return "skipped" if skipped else "trained"


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:  # a bar is a comfort: the lines say the same
        return None
    return tqdm
