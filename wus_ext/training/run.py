"""One finished training run, as tables and pictures read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Args:
        model: the network.
        method: one of :data:`~wus_ext.methods.table.METHODS`, or one that never skips ``in the time
            of`` another.
        seed: of weights and data order.
        history: its records, as in ``metrics.jsonl``.
    """

    model: str
    method: str
    seed: int
    history: Sequence[dict[str, Any]]

    @property
    def control(self) -> bool:
        """Whether this is a run without skipping, shortened to the time of a method."""
        return " in the time of " in self.method

    @property
    def seconds(self) -> float:
        """Training time without evaluation."""
        return sum(record["train_seconds"] for record in self.history)

    def typical_seconds(self, epochs: int | None = None) -> float:
        """Training time, of the first ``epochs`` or all, each epoch at the median of its kind.

        So single epochs that other work on the machine disturbed do not count.
        """
        typical = {
            kind: median(r["train_seconds"] for r in self.history if r["skipped"] == kind)
            for kind in {r["skipped"] for r in self.history}
        }
        return sum(typical[record["skipped"]] for record in self.history[:epochs])

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent after the last epoch."""
        return self.history[-1]["test_accuracy"]

    @property
    def skipped(self) -> float:
        """Percentage of steps that skipped weight updates: of epochs, without ``full_every``."""
        return 100 * fmean(r["skipped_steps"] for r in self.history)

    def memory(self, *, skipped: bool) -> float | None:
        """Peak memory of the steps of epochs of this kind, in MiB; ``None`` without any.

        See :class:`~wus_ext.training.memory.StepMemory`.
        """
        peaks = [r["peak_bytes"] for r in self.history if r["skipped"] == skipped]
        return max(peaks) / 2**20 if any(peaks) else None

    def epochs_to(self, target: float) -> int | None:
        """The first epoch after which the test accuracy reaches ``target`` percent, if any."""
        reached = (r["epoch"] for r in self.history if r["test_accuracy"] >= target)
        return next(reached, None)

    @property
    def skip_cost(self) -> float | None:
        """Skip step over full step of the same run, medians; ``None`` without both kinds.

        With ``full_every`` it leaves out that weights are transformed anew after each full step.
        """
        steps: dict[bool, list[float]] = {True: [], False: []}
        for record in self.history:
            steps[record["skipped"]].append(record["step_seconds"])
        return median(steps[True]) / median(steps[False]) if all(steps.values()) else None
