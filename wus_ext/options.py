"""How skip steps run: the settings of :func:`wus_ext.convert`."""

from __future__ import annotations

from dataclasses import dataclass

NORMS = ("batch", "frozen")
ALGORITHMS = ("auto", "direct", "f2", "f4")


@dataclass(frozen=True)
class SkipOptions:
    """Settings of a converted model's skip steps; full steps are stock whatever they are.

    Args:
        skip_gamma: the scale of normalisation layers counts as a weight (default True).
        norm: statistics that batch norm uses in skip steps while training: ``"batch"`` (default,
            as stock, running statistics keep updating) or ``"frozen"`` (running statistics, which
            stand still; the layer folds into its convolution and saves nothing).
        algo: convolution algorithm of the CPU's skip steps in float32: ``"direct"`` (oneDNN),
            ``"f2"`` and ``"f4"`` (Winograd F(2x2, 3x3) and F(4x4, 3x3), where a layer allows),
            ``"auto"`` (default: the fastest for each layer).
        memory_budget: bytes that transformed copies of weights may take together; layers that do
            not fit run with a smaller transform or directly. Default None: no limit.
        fuse: whether chains of layers may run fused (default True). A model whose ``forward``
            depends on Python state other than ``training`` must set it to False.

    Raises:
        ValueError: for a value that is none of these; the message names the setting.
    """

    skip_gamma: bool = True
    norm: str = "batch"
    algo: str = "auto"
    memory_budget: int | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("norm", NORMS), ("algo", ALGORITHMS)):
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
        budget = self.memory_budget
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            raise ValueError(
                f"memory_budget: expected a number of bytes from 0 up, or None, got {budget!r}"
            )
