"""The result of :func:`wus_ext.profile`, and how it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Layer", "Profile", "Step"]

MIB = 2**20


@dataclass(frozen=True)
class Step:
    """What a kind of step costs.

    Attributes:
        name: of the kind.
        milliseconds: median of the rounds.
        spread: half the distance of the quartiles, as a part of the median.
        saved: bytes kept from forward to backward.
        transformed: bytes of transformed weights.
        gradients: bytes of the parameters' gradients.
        peak: the most bytes that a step has allocated at one time.
    """

    name: str
    milliseconds: float
    spread: float
    saved: int = 0
    transformed: int = 0
    gradients: int = 0
    peak: int = 0

    @property
    def held(self) -> int:
        """Bytes that a step holds: saved, transformed weights, gradients."""
        return self.saved + self.transformed + self.gradients


@dataclass(frozen=True)
class Layer:
    """How a layer runs in skip steps.

    Attributes:
        name: in the model.
        chain: the layer and what runs with it; empty: it runs by itself.
        algorithm: of its chain.
        note: why it runs by itself.
    """

    name: str
    chain: str
    algorithm: str
    note: str


@dataclass(frozen=True)
class Profile:
    """What every kind of step costs on a model; ``print`` it, or read its fields.

    Attributes:
        model: name of its class.
        device: of its parameters.
        threads: of torch, on the CPU.
        steps: by kind: ``"stock full"``, ``"stock frozen"``, ``"skip"``, ``"input gradients"``,
            ``"fused full"``, ``"stock evaluation"``, ``"evaluation"``; with ``bf16=True`` those
            with gradients again, named ``"... bf16"``.
        layers: how each convolution and linear layer runs in skip steps, in the order of calls.
    """

    model: str
    device: str
    threads: int
    steps: dict[str, Step]
    layers: Sequence[Layer]

    def ratio(self, kind: str, base: str = "stock full") -> float:
        """Time of one kind of step, as a part of another's.

        Args:
            kind, base: keys of ``steps``.

        Raises:
            KeyError: there is no such kind.
        """
        return self.steps[kind].milliseconds / self.steps[base].milliseconds

    @property
    def advice(self) -> str:
        """One sentence: what to use on this model, and what it saves."""
        parts = []
        fused, skip, frozen = (self.ratio(kind) for kind in ("fused full", "skip", "stock frozen"))
        if fused < 0.97:
            parts.append(f"full='fused' saves {1 - fused:.0%} of a full step")
        else:
            parts.append("keep full='stock'")
        held = self.steps["skip"].held / max(1, self.steps["stock full"].held)
        parts.append(
            f"a skip step saves {1 - skip:.0%} (stock with frozen weights {1 - frozen:.0%}) and "
            f"holds {held:.2f} of what stock's full step holds"
        )
        alone = [layer for layer in self.layers if not layer.chain]
        if alone and len(alone) == len(self.layers):
            parts.append(f"every layer runs by itself: {alone[0].note}")
        elif alone:
            parts.append(f"{len(alone)} of {len(self.layers)} layers run by themselves")
        return "; ".join(parts) + "."

    def __str__(self) -> str:
        rows = [
            (
                step.name,
                f"{step.milliseconds:.1f}",
                f"{self.ratio(step.name):.2f}",
                f"{step.spread:.0%}",
                *(
                    f"{value / MIB:.1f}" if value else "-"
                    for value in (step.saved, step.transformed, step.gradients, step.held)
                ),
                f"{step.peak / MIB:.1f}" if step.peak else "-",
            )
            for step in self.steps.values()
        ]
        header = (
            "step",
            "ms",
            "of full",
            "+-",
            "saved",
            "transformed",
            "gradients",
            "held",
            "peak",
        )
        layers = [(layer.name, layer.chain, layer.algorithm, layer.note) for layer in self.layers]
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        return "\n\n".join(
            [
                f"{self.model} on {self.device}{threads}; memory in MiB",
                _table(header, rows),
                _table(("layer", "runs as", "algorithm", "note"), layers),
                self.advice,
            ]
        )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
