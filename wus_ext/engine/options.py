"""How a converted model's steps run: the settings of :func:`wus_ext.convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NORMS = ("batch", "frozen")
ALGORITHMS = ("auto", "measure", "direct", "f2", "f4")
FULL = ("stock", "fused")


@dataclass(frozen=True)
class SkipOptions:
    """Settings of a converted model's steps.

    Args:
        skip_gamma: the scale of normalisation layers counts as a weight (default True).
        norm: statistics that batch norm uses in skip steps while training: ``"batch"`` (default,
            as stock, running statistics keep updating) or ``"frozen"`` (running statistics, which
            stand still; the layer folds into its convolution and saves nothing).
        algo: convolution algorithm of the CPU's skip steps in float32: ``"direct"`` (oneDNN),
            ``"f2"`` and ``"f4"`` (Winograd F(2x2, 3x3) and F(4x4, 3x3), where a layer allows),
            ``"auto"`` (default: the fastest for each layer by its numbers, the same in every run),
            ``"measure"`` (the fastest by trying, once for each layer and shape; what was chosen
            decides how the run rounds, and :func:`wus_ext.measured` hands it on to the next run).
        memory_budget: bytes that transformed copies of weights may take together. Default
            ``"auto"``: as many as a skip step holds less than stock's full step does, in gradients
            and in what is saved for backward; what does not fit is transformed for each use.
            A number: layers that do not fit run with a smaller transform or directly. None: no
            limit, as fast as possible.
        fuse: whether chains of layers may run as one (default True).
        full: what runs where weights train: ``"stock"`` (default: stock PyTorch, bit for bit) or
            ``"fused"``, on the CPU in float32 and bfloat16, and on a GPU: the same chains and
            convolutions as in skip steps, on the CPU in float32 with weight gradients by Winograd
            as well; equal to stock's up to rounding.

    Raises:
        ValueError: for a value that is none of these; the message names the setting.
    """

    skip_gamma: bool = True
    norm: str = "batch"
    algo: str = "auto"
    memory_budget: int | Literal["auto"] | None = "auto"
    fuse: bool = True
    full: str = "stock"

    def __post_init__(self) -> None:
        for name, allowed in (("norm", NORMS), ("algo", ALGORITHMS), ("full", FULL)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        for name in ("skip_gamma", "fuse"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected True or False, got {value!r}")
        if self.norm == "frozen" and not self.skip_gamma:
            raise ValueError(
                "norm='frozen' needs skip_gamma=True: a layer that trains is not frozen"
            )
        if self.full == "fused" and not self.fuse:
            raise ValueError("full='fused' needs fuse=True: full steps run the fused chains")
        budget = self.memory_budget
        if budget not in (None, "auto") and (not isinstance(budget, int) or budget < 0):
            raise ValueError(
                "memory_budget: expected a number of bytes from 0 up, 'auto', or None, "
                f"got {budget!r}"
            )
